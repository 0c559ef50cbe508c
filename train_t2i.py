"""Stage 1: text-to-image pretraining. Flow matching on pixels with x-prediction (Sec. 3.1, Eq. 5-7).

    python train_t2i.py                          the built-in world, on a GPU if there is one; minutes on two CPU cores
    python train_t2i.py --resume                 continue after an interruption
    python train_t2i.py --data 'shards/{000..999}.tar'    your own images; docs/data.md lists the layouts
    python train_t2i.py --preset 3b --dry-run    print the number of parameters and the FLOPs, and stop
    torchrun --nproc-per-node 8 train_t2i.py --preset 370m --grad-accum 4 --resume

The preset sets the defaults of steps, batch size, learning rate and so on; --dry-run prints them.

The run directory (--out) gets config.json, metrics.jsonl (losses and speed), samples/ and the last checkpoints.
train_forcing.py starts from last.pt, the newest. docs/gpu-node.md has more on clusters.

A step reads: draw a batch -> draw noise levels -> corrupt -> predict -> loss -> step. train_forcing.py does the same
for several modalities. data.Run has what both stages share: clipping, the learning rate, the averaged weights (EMA),
ranks, checkpoints and metrics.
"""

import functools
import itertools
from dataclasses import replace

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data
from model import (
    GUIDANCE,
    PRESETS,
    RGB,
    SAMPLING_STEPS,
    DiT,
    corrupt,
    draw_noise_levels,
    loss_mask,
    sampling_grid,
    squared_error,
)

# Defaults of flags by preset. Those of nano come from a search (RESULTS.md, "The speedrun"); the others are untested.
LARGE = {"steps": 500_000, "batch_size": 1024, "lr": 3e-4, "beta2": 0.95, "warmup": 2000, "ema": 0.9999}
MEDIUM = {"steps": 20_000, "batch_size": 64, "lr": 3e-3, "beta2": 0.95, "warmup": 200, "ema": 0.999}
RECIPES = {
    "nano": {"steps": 1800, "batch_size": 8, "lr": 3e-3, "beta2": 0.99, "warmup": 50, "ema": 0.99},
    "tiny": MEDIUM,
    "small": MEDIUM,
    "370m": LARGE,
    "800m": LARGE,
    "3b": LARGE,
}


def parse():
    p = data.Flags(__doc__)
    p.setting("--preset", "nano", "network", choices=PRESETS)
    data.source_settings(p, maps=False)
    data.training_settings(p, RECIPES["nano"], out="runs/t2i")
    return data.parse_run(p, RECIPES)


def choose_network(args, device):
    """(Config of the network, encoders). Sets args.size if it is left to the network."""
    config = PRESETS[args.preset].with_modalities(RGB)
    encoders = data.open_encoders(args.encoders, device, config)
    config = config.with_encoders(encoders)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size of {args.preset}, {config.patch}")
    return replace(config, size=args.size), encoders


def corrupt_batch(run, batch, encoders, args):
    """Encode a data.Batch and corrupt it to random noise levels: a data.MicroBatch."""
    # Random numbers follow from the seed and the samples' indices, however a batch is split over ranks.
    rng = data.PerSampleRNG(args.seed, batch.indices, run.device)
    x0 = encoders.encode_image(batch.values["rgb"])
    text = encoders.encode_text(batch.captions).to(run.device, non_blocking=True, copy=True)  # the next line changes it
    text[rng.rand() < args.drop_caption] = encoders.no_text  # for classifier-free guidance
    t = draw_noise_levels(run.model.modalities, rng.rand)["rgb"]  # above 0, or the sample would carry no loss
    noisy = corrupt(x0, rng.randn(*x0.shape[1:]), t)  # Eq. 5
    return data.MicroBatch({"rgb": x0}, {"rgb": noisy}, {"rgb": t}, {"rgb": loss_mask(x0, t)}, text)


def train(run, batches, encoders, args):
    image = run.model.modalities[0]
    while run.goes_on():
        pieces = itertools.islice(batches, args.grad_accum)
        micro_batches = [corrupt_batch(run, batch, encoders, args) for batch in pieces]
        # The loss is a mean over the whole batch: divide by the number of values in all micro-batches, on all ranks.
        num_scored = run.count_scored(micro_batches)

        for micro_batch in run.accumulate(micro_batches):
            x0_hat = run.network(micro_batch.noisy, micro_batch.t, micro_batch.text)
            error = squared_error(x0_hat["rgb"], micro_batch.x0["rgb"], micro_batch.mask["rgb"])  # (B,)
            loss = image.loss_weight(micro_batch.t["rgb"]) * error  # (B,), Eq. 7
            run.backward(loss.sum() / num_scored["rgb"])
            run.record("loss_rgb", "rgb", loss, micro_batch)
            run.record("error_rgb", "rgb", error, micro_batch)
        run.end_step()


@torch.no_grad()
def draw_samples(encoders, batch, args, device, network):
    """Draw a batch of validation images, and below them what the network generates from their captions."""
    image = network.modalities[0]
    text = encoders.encode_text(batch.captions).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(text), *image.shape((args.size, args.size)), generator=generator).to(device)
    schedule = {"rgb": sampling_grid(SAMPLING_STEPS)}
    samples = network.sample(schedule, {"rgb": noise}, text, guidance={"rgb": GUIDANCE}, no_text=encoders.no_text)
    generated = encoders.decode_image(samples["rgb"])
    rows = [[data.paint(image, x) for x in images] for images in (batch.values["rgb"], generated)]
    return data.draw_grid(rows, ["real", "from its\ncaption"])


def main():
    args = parse()
    device = data.pick_device("cpu" if args.dry_run else args.device)
    config, encoders = choose_network(args, device)
    if args.dry_run:
        data.print_cost(args, RECIPES[args.recipe], config)
        return

    source = data.open_source(args, "train", (args.size, args.size), config.modalities, device)
    validation = data.validation_batch(args, config.modalities, device)
    torch.manual_seed(args.seed)
    network = DiT(config)
    run = data.Run(args, device)
    run.start(network, functools.partial(draw_samples, encoders, validation, args, device))
    batches = data.training_batches(source, args, run.step, run.rank, run.ranks, device)
    train(run, batches, encoders, args)
    run.close()


if __name__ == "__main__":
    record(data.run_script)(main)  # torchrun then shows the error of the rank that failed first
