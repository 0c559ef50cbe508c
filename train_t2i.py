"""Stage 1: text-to-image pretraining. Flow matching on pixels with x-prediction (Sec. 3.1, Eq. 5-7).

    python train_t2i.py                          the built-in world on what this machine has; minutes on two CPU cores
    python train_t2i.py --resume                 continue after an interruption
    python train_t2i.py --data 'shards/{000..999}.tar'    your own images; docs/data.md lists the layouts
    python train_t2i.py --preset 3b --dry-run    print the number of parameters and the FLOPs, and stop
    torchrun --nproc-per-node 8 train_t2i.py --preset 370m --resume \
        --batch-size 1024 --grad-accum 4 --steps 500000 --lr 3e-4 --warmup 2000 --ema 0.9999

The run directory (--out) gets config.json, metrics.jsonl (losses and speed), samples/ and the last checkpoints.
train_forcing.py starts from last.pt, the newest. docs/gpu-node.md has more on clusters.

A step reads: draw a batch -> draw noise levels -> corrupt -> predict -> loss -> step. data.Run has what both stages
share: clipping, the learning rate, the averaged weights (EMA), ranks, checkpoints and metrics.
"""

import itertools
from dataclasses import replace

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data
from model import (
    PRESETS,
    RGB,
    DiT,
    corrupt,
    draw_noise_levels,
    loss_mask,
    sampling_grid,
    squared_error,
)


def parse():
    p = data.Flags(__doc__)
    p.setting("--preset", "nano", "network", choices=PRESETS)
    data.source_settings(p, maps=False)
    data.training_settings(p, steps=650, out="runs/t2i")
    return data.parse_run(p)


def choose_network(args, device):
    """(Config of the network, encoders). Sets args.size if it is left to the network."""
    config = PRESETS[args.preset].with_modalities(RGB)
    encoders = data.open_encoders(args.encoders, device, config)
    config = config.with_encoders(encoders)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size of {args.preset}, {config.patch}")
    return replace(config, size=args.size), encoders


@torch.no_grad()
def draw_samples(network, encoders, args, device):
    """Draw validation images, and below them what the network generates from their captions."""
    image = network.modalities[0]
    batch = data.validation_batch(args, network.modalities, device)
    text = encoders.encode_text(batch.captions).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(text), *image.shape((args.size, args.size)), generator=generator).to(device)
    samples = network.sample({"rgb": sampling_grid(25)}, {"rgb": noise}, text, guidance={"rgb": 3.0})
    generated = encoders.decode_image(samples["rgb"])
    rows = [[data.paint(image, x) for x in images] for images in (batch.values["rgb"], generated)]
    return data.draw_grid(rows, ["real", "from its\ncaption"])


def train(run, batches, encoders, args):
    modalities = run.model.modalities  # the image alone
    while run.goes_on():
        parts = []
        for batch in itertools.islice(batches, args.grad_accum):
            # Random numbers follow from the seed and the indices of the samples. So they do not depend on how a batch
            # is split over ranks and parts.
            rng = data.PerSampleRNG(args.seed, batch.indices, run.device)
            x0 = {"rgb": encoders.encode_image(batch.values["rgb"])}
            text = encoders.encode_text(batch.captions).to(run.device, non_blocking=True, copy=True)
            text[rng.rand() < args.drop_caption] = 0  # no text, for classifier-free guidance
            # The probability of a clean image, p_clean, has no effect here: no sample is held clean as a whole.
            t = draw_noise_levels(modalities, rng.rand)
            noisy = {"rgb": corrupt(x0["rgb"], rng.randn(*x0["rgb"].shape[1:]), t["rgb"])}  # Eq. 5
            mask = {"rgb": loss_mask(x0["rgb"], t["rgb"])}
            parts.append(data.Part(x0, noisy, t, mask, text))

        # The loss is a mean over the values of the whole batch, so it is divided by their number in all parts and on
        # all ranks.
        num_scored = run.sum_over_ranks({"rgb": sum(part.mask["rgb"].sum() for part in parts)})

        for part in run.each(parts):
            x0_hat = run.network(part.noisy, part.t, part.text)
            error = squared_error(x0_hat["rgb"], part.x0["rgb"], part.mask["rgb"])  # (B,)
            loss = modalities[0].loss_weight(part.t["rgb"]) * error  # (B,), Eq. 7
            run.backward(loss.sum() / num_scored["rgb"].clamp(min=1))
            run.record("loss_rgb", "rgb", loss, part)
            run.record("error_rgb", "rgb", error, part)
        run.end_step()


def main():
    args = parse()
    device = data.pick_device("cpu" if args.dry_run else args.device)
    config, encoders = choose_network(args, device)
    if args.dry_run:
        data.print_cost(config, (args.size, args.size))
        return

    source = data.open_source(args, "train", (args.size, args.size), config.modalities, device)
    torch.manual_seed(args.seed)
    network = DiT(config)

    def draw(network):
        return draw_samples(network, encoders, args, device)

    run = data.Run(args, device)
    run.start(network, draw)
    batches = data.training_batches(source, args, run.step, run.rank, run.ranks, device)
    train(run, batches, encoders, args)
    run.close()


if __name__ == "__main__":
    record(data.run_script)(main)
