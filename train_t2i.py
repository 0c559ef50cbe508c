"""Stage 1: text-to-image pretraining. Flow matching on pixels with x-prediction (Sec. 3.1, Eq. 5-7).

    python train_t2i.py                          the built-in world on what this machine has; minutes on two CPU cores
    python train_t2i.py --resume                 go on after an interruption
    python train_t2i.py --data 'shards/{000..999}.tar'    your own images; data.py tells the layouts
    python train_t2i.py --preset 3b --dry-run    parameters, FLOPs and memory, without training
    torchrun --nproc-per-node 8 train_t2i.py --preset 370m \
        --batch-size 1024 --steps 500000 --lr 3e-4 --warmup 2000 --ema 0.9999

The run directory (--out) gets config.json, metrics.jsonl (a row a logged step), samples/ (pictures) and last.pt, which
train_forcing.py starts from. A step reads: draw a batch -> draw noise levels -> predict -> loss -> step.
"""

import argparse
import copy
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import (
    PRESETS,
    RGB,
    DiT,
    corrupt,
    draw_noise_levels,
    matmul_peak,
    sampling_grid,
    training_cost,
    velocity_loss,
)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def setting(flag, default, help, **kwargs):
        p.add_argument(flag, default=default, type=type(default), help=f"{help} (default: {default})", **kwargs)

    setting("--preset", "nano", f"network: {', '.join(PRESETS)}")
    data.source_settings(setting)
    setting("--size", 0, "side of the images in pixels; 0 is the preset's")
    setting("--steps", 650, "optimizer steps")
    setting("--batch-size", 32, "samples a step, over all ranks together")
    setting("--lr", 6e-3, "peak learning rate")
    setting("--optimizer", "muon", "muon (blocks' matrices; AdamW for the rest) or adamw", choices=("muon", "adamw"))
    setting("--warmup", 50, "steps of linear warm-up; then the rate falls linearly to zero")
    setting("--clip", 1.0, "gradient norm is clipped to this")
    setting("--ema", 0.99, "decay of the averaged weights, which sampling uses")
    setting("--drop-caption", 0.1, "share of captions dropped, for classifier-free guidance")
    setting("--seed", 0, "of weights, scenes and noise")
    setting("--device", "auto", "auto, cuda, mps or cpu")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA only)")
    setting("--out", "runs/t2i", "run directory")
    p.add_argument("--resume", action="store_true", help="go on from the run directory's last.pt")
    setting("--checkpoint-every", 250, "steps between checkpoints")
    setting("--log-every", 10, "steps between rows of metrics.jsonl")
    setting("--sample-every", 500, "steps between picture grids")
    p.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory, and stop")
    args = p.parse_args()
    config_file = Path(args.out) / "config.json"
    if args.resume and config_file.exists():  # a run goes on with its own settings, unless flags say otherwise
        p.set_defaults(**json.loads(config_file.read_text()) | {"resume": True})
        args = p.parse_args()
    data.at_least(args, size=0, seed=0, workers=0)
    data.at_least(args, steps=1, batch_size=1, warmup=1, checkpoint_every=1, log_every=1, sample_every=1)
    if args.preset not in PRESETS:
        data.fail(f"--preset {args.preset}: unknown; choose one of {', '.join(PRESETS)}")
    return args


def dry_run(args, config):
    parameters, flops, activations = training_cost(config, (args.size, args.size))
    half = 0.5 if args.device != "cpu" else 1  # bfloat16 activations on GPUs
    fixed = parameters * 4 * (1 + 1 + (1 if args.optimizer == "muon" else 2) + 1)
    print(f"{args.preset} at {args.size}x{args.size}, text-to-image: {parameters / 1e6:.1f}M parameters")
    print(f"training FLOPs per image (matmuls and attention, forward and backward): {flops / 1e9:.2f} GFLOP")
    print(f"estimated memory per GPU: {fixed / 2**30:.2f} GiB for weights, gradients, optimizer and EMA in float32")
    print(f"    + {activations * half / 2**20:.1f} MiB of activations per image, before torch.compile saves some")


@torch.no_grad()
def picture(model, encoders, args, device, path, count=8):
    """Validation images (the first ones of files) above what the model makes of their captions."""
    size = args.size, args.size
    source = data.open_source(args, "val", size, device, with_depth=False)
    batch = next(data.in_order(source, count, count, device, strict=False), None)
    if batch is None:
        return  # the first samples cannot be read
    values, _, captions, *_ = batch
    text, shape = encoders.encode_text(captions).to(device), model.modalities[0].shape(size)
    noise = torch.randn(len(text), *shape, generator=torch.Generator().manual_seed(0)).to(device)
    made = model.sample({"rgb": sampling_grid(25)}, {"rgb": noise}, text, {"rgb": 3.0})["rgb"]
    rows = [[data.paint_rgb(x) for x in images] for images in (values["rgb"], encoders.decode_image(made))]
    data.save_grid(path, rows, ["real", "from its\ncaption"])


def main():
    args = parse()
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = data.pick_device("cpu" if args.dry_run else args.device)
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
    config = PRESETS[args.preset].with_modalities(RGB)
    encoders = data.open_encoders(args.encoders, device, config)
    config = config.with_encoders(encoders)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch of {args.preset}, {config.patch}")
    config = replace(config, size=args.size)
    if args.dry_run:
        return dry_run(args, config)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.batch_size % world:
        data.fail(f"--batch-size {args.batch_size}: must be a multiple of the number of ranks, {world}")

    source = data.open_source(args, "train", (args.size, args.size), device, with_depth=False)

    # Network, averaged copy, optimizers.
    torch.manual_seed(args.seed)
    model = DiT(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = model.configure_optimizers(args.lr, args.optimizer)
    state = data.load_checkpoint(f"{args.out}/last.pt", "--resume") if args.resume else None
    if state:
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError):
            data.fail(
                f"--resume: {args.out}/last.pt is of another network or optimizer; resume with its first settings"
            )
    step = state["step"] if state else 0
    out = data.open_run(args.out, vars(args), step if state else None) if rank == 0 else None
    network = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if args.compile or (args.compile is None and cuda):
        network = torch.compile(network)
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def global_mean(total, count):
        """This rank's totals and counts -> a loss whose gradient, averaged over ranks, is the global mean's."""
        count = count.sum()
        if world > 1:
            dist.all_reduce(count)
        return total.sum() * world / count.clamp(min=1)

    _, flops, _ = training_cost(config, (args.size, args.size))
    peak = matmul_peak(device, torch.bfloat16 if cuda else torch.float32)
    if rank == 0:
        print(
            f"{args.preset}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True
        )
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, mininterval=2, dynamic_ncols=True)
    batches = data.training_batches(source, args, step, rank, world, device)
    clock, since = time.perf_counter(), step
    while step < args.steps:
        # Draw a batch, noise levels and noise: all of it follows from (seed, step, rank).
        generator = torch.Generator(device).manual_seed((args.seed * 1_000_003 + step) * world + rank)
        values, _, captions = next(batches)
        values["rgb"] = encoders.encode_image(values["rgb"])
        x0 = {m.name: m.encode(values[m.name]) for m in config.modalities}
        text = encoders.encode_text(captions).to(device)
        keep = torch.rand(len(text), generator=generator, device=device) >= args.drop_caption
        text = text * keep.view(-1, *[1] * (text.ndim - 1))
        t = draw_noise_levels(config.modalities, len(text), generator, device)
        noise = {m: torch.randn(x.shape, generator=generator, device=device) for m, x in x0.items()}

        # Predict, loss, step.
        rate = args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup))
        with autocast:
            x0_hat = network({m: corrupt(x0[m], noise[m], t[m]) for m in x0}, t, text)
        losses = {m: global_mean(*velocity_loss(x0_hat[m], x0[m], t[m])) for m in x0}
        loss = sum(losses.values())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        step += 1

        # Log, save, draw.
        bar.update()
        if step % args.log_every == 0 or step == args.steps:
            row = {
                "step": step,
                "loss": loss,
                **{f"loss_{m}": v for m, v in losses.items()},
                "grad_norm": norm,
                "lr": rate,
            }
            logged = torch.stack([torch.as_tensor(v, device=device).float() for v in row.values()]).detach()
            if world > 1:
                dist.all_reduce(logged)
                logged /= world
            row = dict(zip(row, logged.tolist(), strict=True), step=step)
            speed = (step - since) * args.batch_size / (time.perf_counter() - clock)
            row |= {"images_per_s": speed, "gflops": speed * flops / 1e9, "utilization": speed * flops / peak / world}
            clock, since = time.perf_counter(), step
            if rank == 0:
                with open(out / "metrics.jsonl", "a") as f:
                    f.write(json.dumps(row) + "\n")
                bar.set_postfix_str(
                    f"loss {row['loss']:.3f}, {speed:.0f} images/s, {row['utilization']:.2f} of matmul peak"
                )
            if not math.isfinite(row["loss"]):
                data.fail(f"step {step}: the loss is not finite; lower --lr (now {args.lr})")
        if rank == 0 and (step % args.checkpoint_every == 0 or step == args.steps):
            state = {"config": asdict(config), "settings": vars(args), "step": step, "model": model.state_dict()}
            state |= {"ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            data.save_checkpoint(out / "last.pt", state)
        if rank == 0 and (step % args.sample_every == 0 or step == args.steps):
            picture(ema, encoders, args, device, out / "samples" / f"{step:07}.png")
            clock, since = time.perf_counter(), step
    bar.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
