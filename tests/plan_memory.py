"""Estimate how much memory training takes on each GPU, without a GPU.

    python tests/plan_memory.py --preset 370m --batch-size 128 --gpus 8      stage 2, with a teacher
    python tests/plan_memory.py --preset 370m --batch-size 128 --gpus 8 --t2i               stage 1
    python tests/plan_memory.py --preset 3b --modalities rgb,depth,normal --no-teacher      three modalities
    python tests/plan_memory.py --preset klein-4B --batch-size 64 --optimizer adamw --ema 0      a pretrained backbone

The table has one row for each choice of --shard and --checkpoint-activations, and one column for each use of memory, in
GiB. Weights, gradients, optimizer state and EMA are counted from the network's shapes. Activations are counted by
running the forward and backward passes on fake tensors, which have shapes but no memory.

The estimate leaves out frozen encoders, CUDA's context, NCCL's buffers, fragmentation, and temporary tensors of the
optimizer. It counts passes that are not compiled. An 80 GB GPU has about 79 GiB.
"""

import sys
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from extras import flux2
from model import MODALITIES, PRESETS, RGB

FLOAT32 = 4  # bytes
BFLOAT16 = 2
GIB = 2**30
CHOICES = [(False, False), (False, True), (True, False), (True, True)]  # of (--shard, --checkpoint-activations)


def klein(width, double_depth, depth, text_dim):
    """Config of a published text-to-image network of FLUX.2 [klein]."""
    latents = replace(RGB, channels=128, stride=16)
    sizes = {"width": width, "double_depth": double_depth, "depth": depth, "head": 128, "patch": 16, "size": 512}
    return flux2.Flux2Config(**sizes, text_length=512, text_dim=text_dim, modalities=(latents,))


NETWORKS = {**PRESETS, "klein-4B": klein(3072, 5, 20, 7680), "klein-9B": klein(4096, 8, 24, 12288)}


def count(parameters):
    """Number of values in the parameters."""
    return sum(parameter.numel() for parameter in parameters)


def example_inputs(config, size, batch):
    """Zeros in the shapes that the network's forward takes: (noisy, t, text)."""
    noisy = {m.name: torch.zeros(batch, *m.shape(size)) for m in config.modalities}
    t = {m.name: torch.zeros(batch) for m in config.modalities}
    if config.text_dim:
        text = torch.zeros(batch, config.text_length, config.text_dim)
    else:
        text = torch.zeros(batch, config.text_length, dtype=torch.uint8)
    return noisy, t, text


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that exist (now), and the most that existed at once (peak)."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()  # addresses of the storages that are counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, address, size):
        self.known.remove(address)
        self.now -= size


def held_bytes(config, size, images, half, checkpointing):
    """The most bytes that a forward and a backward pass hold at once, beside weights and gradients.

    half: the passes run under bfloat16 autocast. Its copies of the weights are counted, too.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)  # as model.mixed_precision
    with torch.device("meta"):
        network = config.build()
    with FakeTensorMode(), LiveBytes() as live, autocast:
        weights = {name: torch.empty(parameter.shape) for name, parameter in network.named_parameters()}
        network.load_state_dict(weights, assign=True)
        inputs = example_inputs(config, size, images)
        if checkpointing:
            network.checkpoint_activations()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = live.now
        x0_hat = network(*inputs)
        sum(x.sum() for x in x0_hat.values()).backward()
    return live.peak - before


def gathered_bytes(network):
    """Bytes of weights and gradients that FSDP2 holds whole on every GPU beside the shards.

    These are the parameters outside the blocks, which stay gathered during a step, and two blocks: the one that is at
    work and the one that is prefetched.
    """
    blocks = network.all_blocks()
    largest_block = max((count(block.parameters()) for block in blocks), default=0)
    outside_blocks = count(network.parameters()) - sum(count(block.parameters()) for block in blocks)
    weights = FLOAT32 * (outside_blocks + 2 * largest_block)
    gradients = weights
    return weights + gradients


def memory_plan(
    config, size, images, gpus, optimizer="muon", teacher_config=None, half=True, ema=True, choices=CHOICES
):
    """Estimated peak bytes on each GPU: {(shard, checkpointing): {part: bytes}}.

    images: images that one GPU takes at a time. teacher_config: Config of the frozen teacher, or None. half: linear
    layers run in bfloat16, as they do on CUDA. ema: training keeps averaged weights.
    """
    with torch.device("meta"):
        network = config.build()
        teacher = teacher_config.build() if teacher_config else None

    parameters = count(network.parameters())
    optimizer_values = 2 * parameters  # AdamW keeps two averages of each gradient
    if optimizer == "muon":
        optimizer_values -= count(network.matrices())  # Muon keeps one
    teacher_bytes = 0
    if teacher is not None:
        teacher_bytes = FLOAT32 * count(teacher.parameters())
        if half:
            teacher_bytes -= (FLOAT32 - BFLOAT16) * count(teacher.matrices())
    held = {}
    for checkpointing in {checkpointing for _, checkpointing in choices}:
        held[checkpointing] = held_bytes(config, size, images, half, checkpointing)

    plans = {}
    for shard, checkpointing in choices:
        ranks = gpus if shard else 1
        plans[shard, checkpointing] = {
            "weights": FLOAT32 * parameters / ranks,
            "gradients": FLOAT32 * parameters / ranks,
            "optimizer": FLOAT32 * optimizer_values / ranks,
            "EMA": FLOAT32 * parameters / ranks if ema else 0,
            "teacher": teacher_bytes / ranks,
            "gathered": gathered_bytes(network) if shard else 0,
            "activations": held[checkpointing],
        }
    return plans


def format_plan(plans):
    """memory_plan's result as a markdown table in GiB."""
    columns = [*next(iter(plans.values())), "total"]
    lines = [f"| | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for (shard, checkpointing), parts in plans.items():
        flags = []
        if shard:
            flags.append("`--shard`")
        if checkpointing:
            flags.append("`--checkpoint-activations`")
        sizes = [*parts.values(), sum(parts.values())]
        cells = [f"{size / GIB:.2f}" for size in sizes]
        lines.append(f"| {' '.join(flags) or 'neither flag'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse():
    p = data.Flags(__doc__)
    p.setting("--preset", "370m", f"network: {', '.join(NETWORKS)}", choices=NETWORKS)
    p.setting("--modalities", "rgb,depth", f"rgb, then others of {', '.join(MODALITIES)}, with commas between")
    p.setting("--t2i", False, "plan stage 1, text-to-image, instead of stage 2")
    p.add_argument("--no-teacher", action="store_true", help="leave out stage 2's teacher, as --init none does")
    p.setting("--size", 0, "side of the images in pixels; 0 is the preset's", data.whole(0, 1 << 14))
    p.setting("--batch-size", 128, "images in a step on all GPUs together", data.whole(1, 1 << 20))
    p.setting("--grad-accum", 1, "micro-batches that each GPU's images are split into", data.whole(1, 1 << 20))
    p.setting("--gpus", 8, "number of GPUs", data.whole(1, 1 << 16))
    p.setting("--optimizer", "muon", "muon or adamw", choices=["muon", "adamw"])
    p.setting("--ema", 0.99, "decay of the averaged weights; 0 keeps none", data.SHARE)
    return p.parse_args()


def main():
    args = parse()
    names = ["rgb"] if args.t2i else args.modalities.split(",")
    if names[0] != "rgb" or not set(names) <= set(MODALITIES):
        data.fail(f"--modalities {args.modalities}: must be rgb, then others of {', '.join(MODALITIES)}")
    preset = NETWORKS[args.preset]
    config = preset.with_modalities(*preset.modalities, *(MODALITIES[name] for name in names[1:]))
    side = args.size or preset.size
    if side % preset.patch:
        data.fail(f"--size {side}: must be a multiple of the patch size, {preset.patch}")
    num_micro_batches = args.gpus * args.grad_accum
    if args.batch_size % num_micro_batches:
        data.fail(f"--batch-size {args.batch_size}: must be a multiple of --gpus x --grad-accum, {num_micro_batches}")
    images = args.batch_size // num_micro_batches
    has_teacher = len(names) > 1 and not args.no_teacher
    teacher_config = preset if has_teacher else None

    print(f"{args.preset}, {', '.join(names)}, {side} x {side} pixels, {images} images at a time on each GPU; GiB:\n")
    plans = memory_plan(config, (side, side), images, args.gpus, args.optimizer, teacher_config, ema=args.ema > 0)
    print(format_plan(plans))


if __name__ == "__main__":
    data.run_script(main)
