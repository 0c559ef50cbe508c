"""What sampling costs: images/s of each task, seconds against steps, peak memory of a batch.

python tests/benchmark_sampling.py                                  nano on a CPU; --preset 370m on a GPU
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from model import DEPTH, I2D_STEPS, PRESETS, RGB, DiT, noise_levels

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--preset", default="nano", choices=PRESETS)
p.add_argument("--batch-size", type=int, default=64)
p.add_argument("--device", default="auto")
args = p.parse_args()
device, batch = data.pick_device(args.device), args.batch_size
model = DiT(PRESETS[args.preset].with_modalities(RGB, DEPTH)).requires_grad_(False).to(device)
size = (model.config.size, model.config.size)


def peak():
    """Bytes: of the process since it began on a CPU, of tensors on a GPU."""
    on_gpu = device.type == "cuda"
    return torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(steps, given, guidance=None):
    """Of one batch."""
    noise = {m.name: torch.randn(batch, *m.shape(size), device=device) for m in model.modalities}
    text = torch.zeros(batch, model.config.text_length, dtype=torch.uint8, device=device)
    levels = noise_levels(["rgb", "depth"], steps, strength=dict.fromkeys(given, 1.0))
    begin = time.perf_counter()
    made = model.sample(levels, noise, text, {m: (noise[m].abs(), None) for m in given}, guidance)
    made["depth"].sum().item()  # waits for the device
    return time.perf_counter() - begin


seconds(1, ["rgb"])  # warm up
before = peak()
print(f"{args.preset} at {size[0]}x{size[1]}, batch {batch}, torch {torch.__version__}, {device.type}")
for task, *settings in (("image to depth", I2D_STEPS, ["rgb"]), ("joint, guided", 50, [], {"rgb": 3.0})):
    took = seconds(*settings)
    print(f"{task}, {settings[0]} steps: {batch / took:.2f} images/s ({took:.2f} s)")
print(
    f"peak memory: {peak() / 2**20:.0f} MiB, {before / 2**20:.0f} of it before (weights, torch, one batch of one step)"
)
took = {steps: min(seconds(steps, ["rgb"]) for _ in range(3)) for steps in (1, 2, 4, 8, 16, 32)}
print("image to depth, seconds a step: " + ", ".join(f"{steps} steps {t / steps:.3f}" for steps, t in took.items()))
