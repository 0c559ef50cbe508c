"""Estimate how much memory training takes on each GPU, without a GPU.

    python tests/plan_memory.py --preset 370m --batch-size 128 --gpus 8      stage 2, with a teacher
    python tests/plan_memory.py --preset 370m --batch-size 128 --gpus 8 --t2i               stage 1
    python tests/plan_memory.py --preset 3b --modalities rgb,depth,normal --no-teacher      three modalities

The table has one row for each choice of --shard and --checkpoint-activations, and one column for each use of memory, in
GiB. Weights, gradients, optimizer state and EMA are counted from the network's shapes. Activations are counted by
running the forward pass on fake tensors, which have shapes but no memory.

The estimate leaves out CUDA's context, NCCL's buffers, fragmentation and temporary tensors. It also leaves out what
torch.compile saves. An 80 GB GPU has about 79 GiB.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from model import MODALITIES, PRESETS, DiT

FLOAT32 = 4  # bytes
BFLOAT16 = 2
GIB = 2**30
CHOICES = [(False, False), (False, True), (True, False), (True, True)]  # of (--shard, --checkpoint-activations)


def count(parameters):
    """Number of values in the parameters."""
    return sum(parameter.numel() for parameter in parameters)


def example_inputs(config, size, batch):
    """Zeros in the shapes that DiT.forward takes: (noisy, t, text)."""
    noisy = {m.name: torch.zeros(batch, *m.shape(size)) for m in config.modalities}
    t = {m.name: torch.zeros(batch) for m in config.modalities}
    if config.text_dim:
        text = torch.zeros(batch, config.text_length, config.text_dim)
    else:
        text = torch.zeros(batch, config.text_length, dtype=torch.uint8)
    return noisy, t, text


def kept_bytes(config, size, batch, half, checkpointing):
    """Bytes that a forward pass keeps for its backward pass, without the weights themselves.

    half: the forward pass runs under bfloat16 autocast, whose copies of the weights are counted.
    """
    storages = {}

    def keep(tensor):
        # The dictionary holds the tensor, so that no other tensor can get the same address.
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        network = DiT(config)
        inputs = example_inputs(config, size, batch)
        if checkpointing:
            network.checkpoint_activations()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(*inputs)
        weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    activations = [tensor for address, tensor in storages.items() if address not in weights]
    return sum(tensor.untyped_storage().nbytes() for tensor in activations)


def split_kept_bytes(config, size, half, checkpointing):
    """(bytes kept whatever the batch size, bytes kept per image)."""
    with_one = kept_bytes(config, size, 1, half, checkpointing)
    with_two = kept_bytes(config, size, 2, half, checkpointing)
    per_image = with_two - with_one
    return with_one - per_image, per_image


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


def memory_plan(config, size, images, gpus, optimizer="muon", teacher_config=None, half=True):
    """Estimated peak bytes on each GPU: {(shard, checkpointing): {part: bytes}}.

    images: images that one GPU takes at a time. teacher_config: Config of the frozen teacher, or None. half: linear
    layers run in bfloat16, as they do on CUDA.
    """
    with torch.device("meta"):
        network = DiT(config)
        teacher = DiT(teacher_config) if teacher_config else None

    parameters = count(network.parameters())
    optimizer_values = 2 * parameters  # AdamW keeps two averages of each gradient
    if optimizer == "muon":
        optimizer_values -= count(network.matrices())  # Muon keeps one
    teacher_bytes = 0
    if teacher is not None:
        teacher_bytes = count(teacher.parameters()) * (BFLOAT16 if half else FLOAT32)

    copies, per_image = split_kept_bytes(config, size, half, checkpointing=False)
    _, per_image_checkpointed = split_kept_bytes(config, size, half, checkpointing=True)
    per_image_checkpointed += (per_image - per_image_checkpointed) / len(network.all_blocks())  # the block at work

    plans = {}
    for shard, checkpointing in CHOICES:
        ranks = gpus if shard else 1
        plans[shard, checkpointing] = {
            "weights": FLOAT32 * parameters / ranks,
            "gradients": FLOAT32 * parameters / ranks,
            "optimizer": FLOAT32 * optimizer_values / ranks,
            "EMA": FLOAT32 * parameters / ranks,
            "teacher": teacher_bytes / ranks,
            "gathered": gathered_bytes(network) if shard else 0,
            "bfloat16 copies": copies,  # autocast keeps them from the forward to the backward pass, sharded or not
            "activations": images * (per_image_checkpointed if checkpointing else per_image),
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
    p.setting("--preset", "370m", f"network: {', '.join(PRESETS)}", choices=PRESETS)
    p.setting("--modalities", "rgb,depth", f"names with commas between, of {', '.join(MODALITIES)}")
    p.setting("--t2i", False, "plan stage 1, text-to-image, instead of stage 2")
    p.add_argument("--no-teacher", action="store_true", help="leave out stage 2's teacher, as --init none does")
    p.setting("--size", 0, "side of the images in pixels; 0 is the preset's", data.whole(0, 1 << 14))
    p.setting("--batch-size", 128, "images in a step on all GPUs together", data.whole(1, 1 << 20))
    p.setting("--grad-accum", 1, "micro-batches that each GPU's images are split into", data.whole(1, 1 << 20))
    p.setting("--gpus", 8, "number of GPUs", data.whole(1, 1 << 16))
    p.setting("--optimizer", "muon", "muon or adamw", choices=["muon", "adamw"])
    return p.parse_args()


def main():
    args = parse()
    names = ["rgb"] if args.t2i else args.modalities.split(",")
    for name in names:
        if name not in MODALITIES:
            data.fail(f"--modalities {args.modalities}: choose from {', '.join(MODALITIES)}")

    preset = PRESETS[args.preset]
    config = preset.with_modalities(*(MODALITIES[name] for name in names))
    side = args.size or preset.size
    if side % preset.patch:
        data.fail(f"--size {side}: must be a multiple of the patch size, {preset.patch}")
    has_teacher = len(names) > 1 and not args.no_teacher
    teacher_config = preset if has_teacher else None
    images = args.batch_size / args.gpus / args.grad_accum

    print(f"{args.preset}, {', '.join(names)}, {side} x {side} pixels, {images:g} images at a time on each GPU; GiB:\n")
    print(format_plan(memory_plan(config, (side, side), images, args.gpus, args.optimizer, teacher_config)))


if __name__ == "__main__":
    data.run_script(main)
