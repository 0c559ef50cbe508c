"""Stage 2: Modality Forcing. A text-to-image checkpoint learns p(image, depth | text) from sparse depth (Sec. 3.2-3.3).

    python train_forcing.py                 from runs/t2i/last.pt, on the built-in world; minutes on two CPU cores
    python train_forcing.py --init none     from scratch, with no image pretraining and no teacher
    python train_forcing.py --data DIR      your own images and depth, of any sparsity; data.py lists the layouts
    python train_forcing.py --resume        go on after an interruption
    torchrun --nproc-per-node 8 train_forcing.py --init t2i.pt \
        --batch-size 1024 --grad-accum 4 --steps 100000 --lr 1e-4 --warmup 2000 --ema 0.9999
    (two nodes, Slurm, and what can go wrong: README, "On a GPU node")

The whole method is in the loop below: every modality draws its own noise level, is corrupted to it, predicted, and
scored on its valid pixels. Held at t = 0 it conditions and carries no loss; missing pixels are noise and carry none
either. The image prediction is also kept near the frozen text-to-image teacher's (Eq. 8), most where depth is noise.

The run directory (--out) gets config.json, starts.jsonl (what ran where), metrics.jsonl (losses by modality, training
mode and range of t; speed), samples/ and the last checkpoints. Give its last.pt to sample.py and evaluate.py.
"""

import argparse
import copy
import itertools
import math
import signal
import time
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import (
    DEPTH,
    PRESETS,
    Config,
    DiT,
    breakdown,
    corrupt,
    distillation_weight,
    draw_noise_levels,
    format_plan,
    matmul_peak,
    memory_plan,
    noise_levels,
    scored,
    training_cost,
    velocity_loss,
)


def sparsity(text):
    """Type of --sparsity: one of data.sparsify's patterns, unchanged."""
    if text not in ("mixed", *data.PATTERNS):
        try:
            data.number(0, 1, above=True)(text)
        except argparse.ArgumentTypeError:
            known = f"must be mixed, {', '.join(data.PATTERNS)}, or a share above 0, up to 1"
            raise argparse.ArgumentTypeError(f"{text}: {known}") from None
    return text


def parse():
    p = data.Flags(__doc__)
    start = "checkpoint to start from: a text-to-image one, which is also the teacher; or one of this stage; or none"
    p.setting("--init", "runs/t2i/last.pt", start)
    network = f"network: {', '.join(PRESETS)}; the default is that of --init, or nano if that is none"
    p.setting("--preset", "", network, data.one_of("", *PRESETS))
    data.source_settings(p)
    kept = f"depth that training sees: mixed, {', '.join(data.PATTERNS)}, or a share such as 0.1"
    p.setting("--sparsity", "mixed", kept, sparsity)
    p.setting("--p-i2d", 0.2, "probability that a sample holds its image clean", data.SHARE)
    p.setting("--p-d2i", 0.2, "probability that a sample holds its depth clean", data.SHARE)
    weight = "weight of self-distillation where depth is"
    p.setting("--distill-hi", 0.5, f"{weight} pure noise (lambda_hi of Eq. 8); both 0: none", data.number(0, 1000))
    p.setting("--distill-lo", 0.05, f"{weight} clean (lambda_lo of Eq. 8)", data.number(0, 1000))
    data.training_settings(p, steps=540, out="runs/forcing")
    args = data.parse_run(p)
    data.check_depth_range(args)
    if args.p_i2d + args.p_d2i > 1:
        data.fail(f"--p-i2d {args.p_i2d} --p-d2i {args.p_d2i}: the sum of these probabilities must be at most 1")
    if args.distill_hi < args.distill_lo:
        data.fail(f"--distill-hi {args.distill_hi}: must be at least --distill-lo, {args.distill_lo}")
    return args


def count_flops(args, config, taught):
    """Training FLOPs per image: the student forward and backward, the teacher forward (a third of both)."""
    size = args.size, args.size
    return training_cost(config, size)[1] + (training_cost(taught, size)[1] / 3 if taught else 0)


def dry_run(args, config, taught):
    images, half = args.batch_size / args.dry_run / args.grad_accum, args.device in ("auto", "cuda")
    size = args.size, args.size
    teacher = f", teacher {training_cost(taught, size)[0] / 1e6:.1f}M" if taught else ""
    print(f"{args.size}x{args.size}, image and depth: {training_cost(config, size)[0] / 1e6:.1f}M parameters{teacher}")
    print(f"training FLOPs per image (matmuls and attention): {count_flops(args, config, taught) / 1e9:.2f} GFLOP")
    gpus = f"each of {args.dry_run} GPUs, {images:g} images at a time"
    print(f"estimated GiB on {gpus}, before torch.compile saves some:")
    print(format_plan(memory_plan(config, size, images, args.dry_run, args.optimizer, taught, half)))


def check_modalities(path, config, wanted):
    """Refuse a checkpoint's Config whose modalities are neither the first nor all of those that are wanted."""
    found, own = ([replace(m, p_clean=0) for m in c.modalities] for c in (config, wanted))
    if found[0].name != "rgb" or found not in (own[:1], own):
        names = ", ".join(m.name for m in found)
        data.fail(f"--init {path}: its modalities are {names}; must be rgb, or rgb and depth, as this stage has them")


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
    known = {"rgb": (encoders.encode_image(real), None), "depth": (values["depth"], valid["depth"])}
    levels = lambda **strength: noise_levels([m.name for m in model.modalities], 25, strength=strength)
    i2d = model.sample(levels(rgb=1.0), noise, text, {"rgb": known["rgb"]})
    d2i = model.sample(levels(depth=1.0), noise, text, {"depth": known["depth"]}, {"rgb": 3.0})
    joint = model.sample(levels(), noise, text, guidance={"rgb": 3.0})
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
    data.write_image(path, data.draw_grid(list(rows.values()), list(rows)))


def main():
    args = parse()
    planned = args.dry_run and args.preset and args.init != "none"  # then --init need not exist yet
    init = None if args.init == "none" or planned else data.load_checkpoint(args.init, "--init")
    base = PRESETS[args.preset or "nano"]
    if init and not args.preset:
        base = Config(**init["config"])
    config = base.with_modalities(replace(base.modalities[0], p_clean=args.p_i2d), replace(DEPTH, p_clean=args.p_d2i))
    rank, world = data.read_ranks()
    device = data.pick_device("cpu" if args.dry_run else args.device)
    cuda = device.type == "cuda"
    trained_with = init["settings"].get("encoders", "") if init else None
    encoders = data.open_encoders(args.encoders, device, base, trained_with)
    config = config.with_encoders(encoders)
    if init:
        check_modalities(args.init, Config(**init["config"]), config)
    taught = config
    if planned:
        taught = base.with_encoders(encoders)
    elif init:
        taught = Config(**init["config"])
    if len(taught.modalities) == len(config.modalities) or not (args.distill_lo or args.distill_hi):
        taught = None  # no teacher: its weights are zero, or --init is none, or --init knows depth already
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the network's patch, {config.patch}")
    config = replace(config, size=args.size)
    parts = (args.dry_run or world) * args.grad_accum
    if args.batch_size % parts:
        data.fail(f"--batch-size {args.batch_size}: must be a multiple of ranks x --grad-accum, {parts}")
    if args.dry_run:
        return dry_run(args, config, taught)
    stop_signals = data.catch_signals()
    if world > 1:
        data.join_ranks("nccl" if cuda else "gloo", args.timeout)

    source = data.open_source(args, "train", (args.size, args.size), device)

    # Network, its frozen teacher, averaged copy, optimizers.
    torch.manual_seed(args.seed)
    model, teacher = DiT(config).to(device), None
    if taught:
        teacher = DiT(taught).requires_grad_(False)
        teacher.load_state_dict(init["ema"])
        teacher.to(device)
        if cuda:
            for matrix in teacher.matrices():
                matrix.data = matrix.data.bfloat16()  # as autocast would, at each use
        known = [m.name for m in taught.modalities]
    if init:
        try:
            model.warm_start(init["ema"])
        except ValueError as error:
            data.fail(f"--init {args.init}: {error}")
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = model.configure_optimizers(args.lr, args.optimizer, args.shard and world > 1)
    if rank == 0:
        data.lock_run(args.out, args.resume)
    # sums {name of a loss: (total, count)} are those since the last row of metrics.jsonl.
    step, skipped, sums = data.resume(args.out, args.resume, rank, model, ema, optimizers)
    out = data.open_run(args.out, vars(args), device, world, step if args.resume else None) if rank == 0 else None
    if args.compile or (args.compile is None and cuda):
        model.compile_blocks()
        if teacher is not None:
            teacher.compile_blocks()
    if args.checkpoint_activations:
        model.checkpoint_activations()
    network = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    keep_gradients = (
        world > 1 and args.grad_accum > 1
    )  # as views of DDP's buckets, or parts without sync hold a second copy
    names = [m.name for m in config.modalities]

    def over_ranks(sums):
        """{name: (total, count)} of this rank -> of all ranks, as floats."""
        table = torch.stack([*sums.values()]) if sums else torch.zeros(0, 2)
        if world > 1 and sums:
            dist.all_reduce(table)
        return dict(zip(sums, table.tolist(), strict=True))

    flops = count_flops(args, config, taught)
    peak = matmul_peak(device, torch.bfloat16 if cuda else torch.float32)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, mininterval=2, dynamic_ncols=True)
    batches = data.training_batches(source, args, step, rank, world, device)
    clock, since, in_a_row, stopping, saved = time.perf_counter(), step, 0, False, True
    while step < args.steps and not stopping:
        # Draw the batch, with depth as sparse as sensors leave it, and a noise level for each modality (Sec. 3.2). All
        # randomness follows from (seed, index of the sample), so the split over ranks and parts changes no result.
        parts, counts = [], torch.zeros(len(names) + 1, dtype=torch.long, device=device)
        for values, valid, captions, indices in itertools.islice(batches, args.grad_accum):
            draws = data.Draws(args.seed, indices, device)
            valid["depth"] = data.sparsify(valid["depth"], values["rgb"], args.sparsity, draws.rand)
            values["rgb"] = encoders.encode_image(values["rgb"])
            x0 = {m.name: m.encode(values[m.name], valid[m.name]) for m in config.modalities}
            text = encoders.encode_text(captions).to(device, non_blocking=True)
            text = text * (draws.rand() >= args.drop_caption).view(-1, *[1] * (text.ndim - 1))
            present = {m: v.flatten(1).any(1) for m, v in valid.items() if m in x0 and v is not None}
            t = draw_noise_levels(config.modalities, draws.rand, present)
            noisy = {m: corrupt(x0[m], draws.randn(*x0[m].shape[1:]), t[m], valid[m]) for m in x0}
            count = {m: scored(x0[m], t[m], valid[m]).sum((1, 2, 3)) for m in x0}
            counts[:-1] += torch.stack([count[m].sum() for m in names])
            parts.append((x0, noisy, t, valid, text, count))
        counts[-1] = len(stop_signals)  # on whichever rank: all stop after the same step
        if world > 1:
            dist.all_reduce(counts)
        divisor = dict(zip(names, counts.clamp(min=1), strict=False))

        # Predict. Losses: each modality on its valid pixels (Eq. 7), and what the teacher knows kept (Eq. 8).
        step_sums = {}
        for part in parts:
            x0, noisy, t, valid, text, count = part
            network.require_backward_grad_sync = part is parts[-1]  # as DDP.no_sync() does
            x0_hat = network(noisy, t, text)
            totals = {(m, ""): velocity_loss(x0_hat[m], x0[m], t[m], valid[m]) for m in names}
            if teacher is not None:
                with torch.no_grad():
                    target = teacher({m: noisy[m] for m in known}, {m: t[m] for m in known}, text)
                t_unknown = torch.stack([t[m] for m in names if m not in known]).mean(0)
                weight = distillation_weight(t_unknown, args.distill_lo, args.distill_hi)
                for m in known:
                    totals[m, "distill_"] = velocity_loss(x0_hat[m], target[m], t[m], valid[m], weight)
            loss = world * sum(total.sum() / divisor[m] for (m, _), total in totals.items())  # ranks are averaged
            # A loss that is not finite may have a finite gradient. With NaN in all gradients all ranks skip the step.
            loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan))
            for (m, kind), total in totals.items():
                for group, pair in breakdown(m, total.detach(), count[m], t).items():
                    step_sums[f"loss_{kind}{m}{group}"] = step_sums.get(f"loss_{kind}{m}{group}", 0) + pair

        # Step, unless the gradient is not finite: its norm is the same on all ranks. Reading it waits for the device.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        norm, stopping = torch.stack([norm, counts[-1]]).tolist()
        rate = args.lr * min((step + 1) / args.warmup, (args.steps - step) / max(1, args.steps - args.warmup))
        step += 1
        if math.isfinite(norm):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
            decay = min(args.ema, step / (9 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            sums = {name: sums.get(name, 0) + pair for name, pair in step_sums.items()}
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            bad = [name for name, (total, _) in over_ranks(step_sums).items() if not math.isfinite(total)]
            reason = f"step {step} skipped, not finite: {', '.join(bad) or 'the gradient alone'}"
            if in_a_row == args.max_skipped:
                bar.close()
                data.fail(f"{reason}; {in_a_row} in a row, so this run stops: lower --lr (now {args.lr}), check --data")
            if rank == 0:
                data.tell(reason)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=not keep_gradients)

        # Log, save, draw.
        bar.update()
        if sums and (step % args.log_every == 0 or step == args.steps):
            losses = {name: total / count for name, (total, count) in over_ranks(sums).items() if count}
            row = {"step": step, "loss": sum(losses.get(f"loss_{kind}{m}", 0) for m, kind in totals)} | losses
            speed = (step - since) * args.batch_size / (time.perf_counter() - clock)
            row |= {"grad_norm": norm, "lr": rate, "skipped": skipped, "images_per_s": speed}
            row |= {"tflops": speed * flops / 1e12, "utilization": speed * flops / peak / world}
            clock, since, sums = time.perf_counter(), step, {}
            if rank == 0:
                data.append_row(out / "metrics.jsonl", row)
                shown = ", ".join(f"{kind}{m} {losses.get(f'loss_{kind}{m}', 0):.3f}" for m, kind in totals)
                rates = f"{speed:.0f} images/s, {row['tflops']:.2f} TFLOP/s, {row['utilization']:.2f} of matmul peak"
                bar.set_postfix_str(f"{shown}, {rates}")
        ending = step == args.steps or stopping
        due = step % args.checkpoint_every == 0 or ending
        # A skipped step is saved at the end alone. Its weights are those of the step before, but may be diverging: one
        # more of the older checkpoints is kept.
        if due:
            saved = data.worth_saving(step, in_a_row > 0 and not ending, rank, model, ema)
        if due and saved:
            sums = {name: torch.tensor(pair, device=device) * (rank == 0) for name, pair in over_ranks(sums).items()}
            states = [data.whole_state(optimizer, rank) for optimizer in optimizers]
            if rank == 0:
                state = {"config": asdict(config), "settings": vars(args), "step": step, "model": model.state_dict()}
                state |= {"ema": ema.state_dict(), "optimizers": states, "sums": sums, "skipped": skipped}
                saved = data.save_checkpoint(out, state, args.keep + (in_a_row > 0))
            clock, since = time.perf_counter(), step
        if rank == 0 and (step % args.sample_every == 0 or step == args.steps):
            with data.tolerate(out / "samples"):
                picture(ema, encoders, args, device, out / "samples" / f"{step:07}.png")
            clock, since = time.perf_counter(), step
    bar.close()
    if world > 1:
        dist.barrier()  # nothing is under way any more: gloo's threads can lock up with a process that ends before them
        dist.destroy_process_group()
    if not saved and rank == 0:
        data.fail(
            f"--out {args.out}: there is no checkpoint of the last step, see above; --resume goes on from an older one"
        )
    if stopping and rank == 0:
        data.tell(f"stopped by a signal after step {step} of {args.steps}, saved; --resume goes on")
    if signal.SIGINT in stop_signals:
        raise SystemExit(130)


if __name__ == "__main__":
    record(data.run_script)(main)
