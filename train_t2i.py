"""Stage 1: text-to-image pretraining. Flow matching on pixels with x-prediction (Sec. 3.1, Eq. 5-7).

    python train_t2i.py                          the built-in world on what this machine has; minutes on two CPU cores
    python train_t2i.py --resume                 go on after an interruption
    python train_t2i.py --data 'shards/{000..999}.tar'    your own images; data.py tells the layouts
    python train_t2i.py --preset 3b --dry-run 8  FLOPs, and the memory of each of 8 GPUs, without training
    torchrun --nproc-per-node 8 train_t2i.py --preset 370m \
        --batch-size 1024 --grad-accum 4 --steps 500000 --lr 3e-4 --warmup 2000 --ema 0.9999
    (two nodes, Slurm, and what can go wrong: README, "On a GPU node")

The run directory (--out) gets config.json, starts.jsonl (what ran where), metrics.jsonl (losses by range of t, speed),
samples/ and the last checkpoints; train_forcing.py starts from last.pt, the newest. A step reads: draw a batch -> draw
noise levels -> predict -> loss -> step.
"""

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
    PRESETS,
    RGB,
    DiT,
    breakdown,
    corrupt,
    draw_noise_levels,
    format_plan,
    matmul_peak,
    memory_plan,
    sampling_grid,
    scored,
    training_cost,
    velocity_loss,
)


def parse():
    p = data.Flags(__doc__)
    p.setting("--preset", "nano", f"network: {', '.join(PRESETS)}", data.one_of(*PRESETS))
    data.source_settings(p)
    data.training_settings(p, steps=650, out="runs/t2i")
    args = data.parse_run(p)
    data.check_depth_range(args)
    return args


def dry_run(args, config):
    images, half = args.batch_size / args.dry_run / args.grad_accum, args.device in ("auto", "cuda")
    size = args.size, args.size
    parameters, flops = training_cost(config, size)
    print(f"{args.preset} at {args.size}x{args.size}, text-to-image: {parameters / 1e6:.1f}M parameters")
    print(f"training FLOPs per image (matmuls and attention): {flops / 1e9:.2f} GFLOP")
    gpus = f"each of {args.dry_run} GPUs, {images:g} images at a time"
    print(f"estimated GiB on {gpus}, before torch.compile saves some:")
    print(format_plan(memory_plan(config, size, images, args.dry_run, args.optimizer, half=half)))


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
    made = model.sample({"rgb": sampling_grid(25)}, {"rgb": noise}, text, guidance={"rgb": 3.0})["rgb"]
    rows = [[data.paint_rgb(x) for x in images] for images in (values["rgb"], encoders.decode_image(made))]
    data.write_image(path, data.draw_grid(rows, ["real", "from its\ncaption"]))


def main():
    args = parse()
    rank, world = data.read_ranks()
    device = data.pick_device("cpu" if args.dry_run else args.device)
    cuda = device.type == "cuda"
    config = PRESETS[args.preset].with_modalities(RGB)
    encoders = data.open_encoders(args.encoders, device, config)
    config = config.with_encoders(encoders)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch of {args.preset}, {config.patch}")
    config = replace(config, size=args.size)
    parts = (args.dry_run or world) * args.grad_accum
    if args.batch_size % parts:
        data.fail(f"--batch-size {args.batch_size}: must be a multiple of ranks x --grad-accum, {parts}")
    if args.dry_run:
        return dry_run(args, config)
    stop_signals = data.catch_signals()
    if world > 1:
        data.join_ranks("nccl" if cuda else "gloo", args.timeout)

    source = data.open_source(args, "train", (args.size, args.size), device, with_depth=False)

    # Network, averaged copy, optimizers.
    torch.manual_seed(args.seed)
    model = DiT(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = model.configure_optimizers(args.lr, args.optimizer, args.shard and world > 1)
    if rank == 0:
        data.lock_run(args.out, args.resume)
    # sums {name of a loss: (total, count)} are those since the last row of metrics.jsonl.
    step, skipped, sums = data.resume(args.out, args.resume, rank, model, ema, optimizers)
    out = data.open_run(args.out, vars(args), device, world, step if args.resume else None) if rank == 0 else None
    if args.compile or (args.compile is None and cuda):
        model.compile_blocks()
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

    flops = training_cost(config, (args.size, args.size))[1]
    peak = matmul_peak(device, torch.bfloat16 if cuda else torch.float32)
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}", flush=True)
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, mininterval=2, dynamic_ncols=True)
    batches = data.training_batches(source, args, step, rank, world, device)
    clock, since, in_a_row, stopping, saved = time.perf_counter(), step, 0, False, True
    while step < args.steps and not stopping:
        # Draw the batch, noise levels and noise. All randomness follows from (seed, index of the sample): the
        # result does not depend on how ranks and parts split a batch.
        parts, counts = [], torch.zeros(len(names) + 1, dtype=torch.long, device=device)
        for values, _, captions, indices in itertools.islice(batches, args.grad_accum):
            draws = data.Draws(args.seed, indices, device)
            values["rgb"] = encoders.encode_image(values["rgb"])
            x0 = {m.name: m.encode(values[m.name]) for m in config.modalities}
            text = encoders.encode_text(captions).to(device, non_blocking=True)
            text = text * (draws.rand() >= args.drop_caption).view(-1, *[1] * (text.ndim - 1))
            t = draw_noise_levels(config.modalities, draws.rand)
            noisy = {m: corrupt(x0[m], draws.randn(*x0[m].shape[1:]), t[m]) for m in x0}
            count = {m: scored(x0[m], t[m]).sum((1, 2, 3)) for m in x0}
            counts[:-1] += torch.stack([count[m].sum() for m in names])
            parts.append((x0, noisy, t, text, count))
        counts[-1] = len(stop_signals)  # on whichever rank: all stop after the same step
        if world > 1:
            dist.all_reduce(counts)
        divisor = dict(zip(names, counts.clamp(min=1), strict=False))

        # Predict, loss.
        step_sums = {}
        for part in parts:
            x0, noisy, t, text, count = part
            network.require_backward_grad_sync = part is parts[-1]  # as DDP.no_sync() does
            x0_hat = network(noisy, t, text)
            totals = {(m, ""): velocity_loss(x0_hat[m], x0[m], t[m]) for m in names}
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
