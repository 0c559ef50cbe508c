"""Stage 2: Modality Forcing. A text-to-image checkpoint learns p(image, depth | text) from sparse depth (Sec. 3.2-3.3).

    python train_forcing.py                 from runs/t2i/last.pt, on the built-in world; minutes on two CPU cores
    python train_forcing.py --init none     from scratch, with no image pretraining and no teacher
    python train_forcing.py --data DIR      your own images and depth, as sparse as it is; data.py tells the layouts
    python train_forcing.py --resume        go on after an interruption
    torchrun --nproc-per-node 8 train_forcing.py --init t2i.pt \
        --batch-size 1024 --steps 100000 --lr 1e-4 --warmup 2000 --ema 0.9999

The whole method is in the loop below: every modality draws its own noise level, is corrupted to it, predicted, and
scored on its valid pixels. Held at t = 0 it conditions and costs nothing; missing pixels are noise, and cost nothing
either. The image prediction is also kept near the frozen text-to-image teacher's (Eq. 8), the more so the less the
depth can tell.

The run directory (--out) gets config.json, metrics.jsonl, samples/ and last.pt, which sample.py and evaluate.py read.
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
    DEPTH,
    JOINT,
    PRESETS,
    Config,
    DiT,
    corrupt,
    distillation_weight,
    draw_noise_levels,
    matmul_peak,
    sampling_grid,
    training_cost,
    velocity_loss,
    warp,
)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def setting(flag, default, help, **kwargs):
        p.add_argument(flag, default=default, type=type(default), help=f"{help} (default: {default})", **kwargs)

    setting(
        "--init",
        "runs/t2i/last.pt",
        "text-to-image checkpoint to start from and be taught by (or one of this stage, to go on), or none",
    )
    setting("--preset", "", f"network: {', '.join(PRESETS)}; empty is that of --init, or nano where that is none")
    data.source_settings(setting)
    setting(
        "--sparsity", "mixed", f"depth that training sees: mixed, {', '.join(data.PATTERNS)}, or a share such as 0.1"
    )
    setting("--size", 0, "side of the images in pixels; 0 is the preset's")
    setting("--steps", 540, "optimizer steps")
    setting("--batch-size", 32, "samples a step, over all ranks together")
    setting("--lr", 6e-3, "peak learning rate")
    setting("--optimizer", "muon", "muon (blocks' matrices; AdamW for the rest) or adamw", choices=("muon", "adamw"))
    setting("--warmup", 50, "steps of linear warm-up; then the rate falls linearly to zero")
    setting("--clip", 1.0, "gradient norm is clipped to this")
    setting("--ema", 0.99, "decay of the averaged weights, which sampling uses")
    setting("--p-i2d", 0.2, "probability that a sample holds its image clean")
    setting("--p-d2i", 0.2, "probability that a sample holds its depth clean")
    setting("--distill-hi", 0.5, "weight of self-distillation where depth is pure noise (lambda_hi of Eq. 8)")
    setting("--distill-lo", 0.05, "weight of self-distillation where depth is clean (lambda_lo of Eq. 8)")
    setting("--drop-caption", 0.1, "share of captions dropped, for classifier-free guidance")
    setting("--seed", 0, "of weights, scenes and noise")
    setting("--device", "auto", "auto, cuda, mps or cpu")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA only)")
    setting("--out", "runs/forcing", "run directory")
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
    try:
        known = args.sparsity in ("mixed", *data.PATTERNS) or 0 < float(args.sparsity) <= 1
    except ValueError:
        known = False
    if not known:
        data.fail(f"--sparsity {args.sparsity}: choose mixed, {', '.join(data.PATTERNS)}, or a share in (0, 1]")
    if args.p_i2d < 0 or args.p_d2i < 0 or args.p_i2d + args.p_d2i > 1:
        data.fail(f"--p-i2d {args.p_i2d} --p-d2i {args.p_d2i}: probabilities, whose sum is at most 1")
    return args


def count_flops(args, config, taught):
    """Training FLOPs per image: the student forward and backward, the teacher forward (a third of both)."""
    size = args.size, args.size
    return training_cost(config, size)[1] + (training_cost(taught, size)[1] / 3 if taught else 0)


def dry_run(args, config, taught):
    parameters, _, activations = training_cost(config, (args.size, args.size))
    half = 0.5 if args.device != "cpu" else 1  # bfloat16 activations on GPUs
    copies = 1 + 1 + (1 if args.optimizer == "muon" else 2) + 1
    frozen = training_cost(taught, (args.size, args.size))[0] if taught else 0
    fixed = 4 * (parameters * copies + frozen)
    print(f"{args.size}x{args.size}, image and depth: {parameters / 1e6:.1f}M parameters, teacher {frozen / 1e6:.1f}M")
    print(f"training FLOPs per image (matmuls and attention): {count_flops(args, config, taught) / 1e9:.2f} GFLOP")
    print(
        f"estimated memory per GPU: {fixed / 2**30:.2f} GiB of weights, gradients, optimizer, EMA, teacher in float32"
    )
    print(f"    + {activations * half / 2**20:.1f} MiB of activations per image, before torch.compile saves some")


@torch.no_grad()
def picture(model, encoders, args, device, path, count=8):
    """Validation samples (the first ones of files), then what the model makes of them in each direction."""
    size = args.size, args.size
    source = data.open_source(args, "val", size, device)
    batch = next(data.in_order(source, count, count, device, strict=False), None)
    if batch is None:
        return  # the first samples cannot be read
    values, valid, captions, *_ = batch
    text, real = encoders.encode_text(captions).to(device), values["rgb"]
    generator = torch.Generator().manual_seed(0)
    noise = {m.name: torch.randn(len(text), *m.shape(size), generator=generator).to(device) for m in model.modalities}
    values["rgb"] = encoders.encode_image(values["rgb"])
    given = {m.name: m.encode(values[m.name], valid[m.name]) for m in model.modalities}
    given = {m: corrupt(given[m], noise[m], torch.zeros(len(text), device=device), valid[m]) for m in given}
    grid, held = sampling_grid(25), sampling_grid(25) * 0
    i2d = model.sample({"rgb": held, "depth": grid}, {**noise, "rgb": given["rgb"]}, text)
    d2i = model.sample({"rgb": grid, "depth": held}, {**noise, "depth": given["depth"]}, text, {"rgb": 3.0})
    joint = model.sample({"rgb": grid, "depth": warp(grid, JOINT)}, noise, text, {"rgb": 3.0})
    depths = lambda x: [data.paint_depth(d) for d in DEPTH.decode(x)]
    images = lambda x: [data.paint_rgb(image) for image in encoders.decode_image(x)]
    rows = {
        "image": [data.paint_rgb(image) for image in real],
        "depth": [data.paint_depth(d, v) for d, v in zip(values["depth"], valid["depth"], strict=True)],
        "depth\nfrom image": depths(i2d["depth"]),
        "image\nfrom depth": images(d2i["rgb"]),
        "joint:\nimage": images(joint["rgb"]),
        "joint:\ndepth": depths(joint["depth"]),
    }
    data.save_grid(path, list(rows.values()), list(rows))


def main():
    args = parse()
    init = None if args.init == "none" else data.load_checkpoint(args.init, "--init")
    if init is None or args.preset:
        if (args.preset or "nano") not in PRESETS:
            data.fail(f"--preset {args.preset}: unknown; choose one of {', '.join(PRESETS)}")
        config = PRESETS[args.preset or "nano"]
    else:
        config = Config(**init["config"])
    config = config.with_modalities(
        replace(config.modalities[0], p_clean=args.p_i2d), replace(DEPTH, p_clean=args.p_d2i)
    )
    taught = Config(**init["config"]) if init else config
    if len(taught.modalities) == len(config.modalities):
        taught = None  # nothing before to go back to: trained from scratch, or on from a checkpoint of this stage
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = data.pick_device("cpu" if args.dry_run else args.device)
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
    trained_with = init["settings"].get("encoders", "") if init else None
    encoders = data.open_encoders(args.encoders, device, Config(**init["config"]) if init else config, trained_with)
    config = config.with_encoders(encoders)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the network's patch, {config.patch}")
    config = replace(config, size=args.size)
    if args.dry_run:
        return dry_run(args, config, taught)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.batch_size % world:
        data.fail(f"--batch-size {args.batch_size}: must be a multiple of the number of ranks, {world}")

    source = data.open_source(args, "train", (args.size, args.size), device)

    # Network, its frozen teacher, averaged copy, optimizers.
    torch.manual_seed(args.seed)
    model, teacher = DiT(config).to(device), None
    if taught:
        teacher = DiT(taught).requires_grad_(False)
        teacher.load_state_dict(init["ema"])
        teacher.to(device)
        known = [m.name for m in taught.modalities]
    if init:
        try:
            model.warm_start(init["ema"])
        except ValueError as error:
            data.fail(f"--init {args.init}: {error}")
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
        network, teacher = torch.compile(network), torch.compile(teacher) if teacher is not None else None
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    def global_mean(total, count):
        """This rank's totals and counts -> a loss whose gradient, averaged over ranks, is the global mean's."""
        count = count.sum()
        if world > 1:
            dist.all_reduce(count)
        return total.sum() * world / count.clamp(min=1)

    flops = count_flops(args, config, taught)
    peak = matmul_peak(device, torch.bfloat16 if cuda else torch.float32)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, mininterval=2, dynamic_ncols=True)
    batches = data.training_batches(source, args, step, rank, world, device)
    clock, since = time.perf_counter(), step
    while step < args.steps:
        # Draw a batch, with depth as sparse as sensors leave it. All randomness follows from (seed, step, rank).
        generator = torch.Generator(device).manual_seed((args.seed * 1_000_003 + step) * world + rank)
        values, valid, captions = next(batches)
        valid["depth"] = data.sparsify(valid["depth"], values["rgb"], args.sparsity, generator)
        values["rgb"] = encoders.encode_image(values["rgb"])
        x0 = {m.name: m.encode(values[m.name], valid[m.name]) for m in config.modalities}
        text = encoders.encode_text(captions).to(device)
        keep = torch.rand(len(text), generator=generator, device=device) >= args.drop_caption
        text = text * keep.view(-1, *[1] * (text.ndim - 1))

        # Draw noise levels: each modality its own (Sec. 3.2). Corrupt, predict.
        present = {m: v.flatten(1).any(1) for m, v in valid.items() if m in x0 and v is not None}
        t = draw_noise_levels(config.modalities, len(text), generator, device, present)
        noise = {m: torch.randn(x.shape, generator=generator, device=device) for m, x in x0.items()}
        noisy = {m: corrupt(x0[m], noise[m], t[m], valid[m]) for m in x0}
        with autocast:
            x0_hat = network(noisy, t, text)

        # Losses: each modality on its valid pixels (Eq. 7), and what the teacher knows kept (Eq. 8).
        losses = {m: global_mean(*velocity_loss(x0_hat[m], x0[m], t[m], valid[m])) for m in x0}
        if teacher is not None:
            with torch.no_grad(), autocast:
                taught = teacher({m: noisy[m] for m in known}, {m: t[m] for m in known}, text)
            t_unknown = torch.stack([t[m] for m in x0 if m not in known]).mean(0)
            weight = distillation_weight(t_unknown, args.distill_lo, args.distill_hi)
            for m in known:
                losses[f"distill_{m}"] = global_mean(*velocity_loss(x0_hat[m], taught[m], t[m], valid[m], weight))
        loss = sum(losses.values())
        loss.backward()

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        rate = args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup))
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
                parts = ", ".join(f"{m} {row[f'loss_{m}']:.3f}" for m in losses)
                bar.set_postfix_str(f"{parts}, {speed:.0f} images/s, {row['utilization']:.2f} of matmul peak")
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
