"""Where a training step's time goes, eager beside compiled, and memory beside the plan.

    python tests/benchmark_speed.py --preset small --batch-size 8
    python tests/benchmark_speed.py --preset 370m --batch-size 32 --forcing     on a GPU, in bfloat16

Eager and compiled copies of a network take turns, with the large matmul that utilisation is measured against between
them, so that a machine whose speed changes treats them alike. Medians over --turns; no teacher.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from model import DEPTH, PRESETS, RGB, DiT, matmul_peak, memory_plan, training_cost

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
parser.add_argument("--forcing", action="store_true", help="image and depth, not the image alone")
parser.add_argument("--turns", type=int, default=6, help="default: %(default)s")
parser.add_argument("--device", default="auto", help="default: %(default)s")
args = parser.parse_args()

device = data.pick_device(args.device)
cuda = device.type == "cuda"
config = PRESETS[args.preset].with_modalities(*((RGB, DEPTH) if args.forcing else (RGB,)))
size, dtype = (config.size, config.size), torch.bfloat16 if cuda else torch.float32
_, flops = training_cost(config, size)
synchronize = torch.cuda.synchronize if cuda else lambda: None
world, times = data.World("train", size, device), {}


def timed(name, work):
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    times.setdefault(name, []).append(time.perf_counter() - start)
    return result


def step(name, model, optimizers, ema):
    values, valid, captions = timed("render", lambda: world.samples(range(args.batch_size)))
    x = {m.name: m.encode(values[m.name], valid[m.name]) for m in config.modalities}
    t = {m: torch.rand(args.batch_size, device=device) for m in x}
    text = data.encode_text(captions, config.text_length).to(device)

    def train():
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            x0_hat = model(x, t, text)
        sum((x0_hat[m] - x[m]).square().mean() for m in x).backward()

    def update():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.01)

    timed(name, train)
    timed("optimizer, EMA", update)


copies = {}
for name in ("eager", "compiled"):
    before = torch.cuda.memory_allocated() if cuda else 0
    model = DiT(config).to(device)
    copies[name] = model, model.configure_optimizers(1e-4), DiT(config).to(device).requires_grad_(False)
    if name == "compiled":
        model.compile_blocks()
    for _ in range(2):
        step(f"{name}, first", *copies[name])
    if cuda:
        plan = sum(memory_plan(config, size, args.batch_size, 1)[False, False].values())
        taken = torch.cuda.max_memory_allocated() - before
        print(f"{name}: peak {taken / 2**30:.2f} GiB, planned {plan / 2**30:.2f}")
        torch.cuda.reset_peak_memory_stats()
peaks = []
for _ in range(args.turns):
    for name in copies:
        step(name, *copies[name])
        peaks.append(matmul_peak(device, dtype, repeats=2))
peak = statistics.median(peaks)
print(f"{args.preset}, batch {args.batch_size}, {device}, torch {torch.__version__}; matmul {peak / 1e12:.3f} TFLOP/s")
print(f"compilation and first step: {times['compiled, first'][0]:.1f} s")
for name, seconds in times.items():
    if "first" not in name:
        median = statistics.median(seconds)
        share = f", {args.batch_size * flops / median / peak:.2f} of matmul" if name in copies else ""
        print(f"{name:16} {median:8.4f} s, {args.batch_size / median:8.1f} images/s{share}")
