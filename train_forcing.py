"""Stage 2: Modality Forcing. A text-to-image checkpoint learns p(image, depth | text) from sparse depth (Sec. 3.2-3.3).

    python train_forcing.py                 from runs/t2i/last.pt, on the built-in world; minutes on two CPU cores
    python train_forcing.py --init none     from scratch, with no image pretraining and no teacher
    python train_forcing.py --data DIR      your own images and depth, of any sparsity; docs/data.md lists the layouts
    python train_forcing.py --modalities rgb,depth,normal    surface normals, too
    python train_forcing.py --resume        continue after an interruption
    torchrun --nproc-per-node 8 train_forcing.py --init t2i.pt --resume \
        --batch-size 1024 --grad-accum 4 --steps 100000 --lr 1e-4 --warmup 2000 --ema 0.9999

The method is in the functions train and distill below. Every modality draws its own noise level, is corrupted to it,
and is predicted. A modality that is held clean (t = 0) conditions the others and carries no loss. Missing pixels are
noise and carry no loss either. The network gets no mask channel: it must recognise noise. The image prediction also
stays near that of the frozen text-to-image network, the teacher (Eq. 8). data.Run has what both stages share: clipping,
the learning rate, the averaged weights (EMA), ranks, checkpoints and metrics.

The run directory (--out) gets config.json, metrics.jsonl (losses by modality and training mode, speed), samples/ and
the last checkpoints. Give its last.pt to sample.py and evaluate.py.
"""

import itertools
from dataclasses import replace

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data
from model import (
    MODALITIES,
    PRESETS,
    DiT,
    corrupt,
    distillation_weight,
    draw_noise_levels,
    loss_mask,
    make_schedule,
    squared_error,
)


def sparsity(text):
    """Type of --sparsity: a pattern of data.sensor_mask or a share, unchanged."""
    if text not in ("mixed", *data.PATTERNS):
        data.number(0, 1, above=True, other=f", or one of mixed, {', '.join(data.PATTERNS)}")(text)
    return text


def parse():
    p = data.Flags(__doc__)
    p.setting("--init", "runs/t2i/last.pt", "checkpoint to start from, which may also be the teacher, or none")
    p.setting("--preset", "", "network; the default is that of --init, or nano without it", choices=PRESETS)
    p.setting("--modalities", "rgb,depth", f"what to train: rgb, then others of {', '.join(MODALITIES)}")
    data.source_settings(p)
    patterns = ", ".join(data.PATTERNS)
    p.setting("--sparsity", "mixed", f"pixels that keep depth: mixed, {patterns}, or a share such as 0.1", sparsity)
    shares = data.by_modality(data.SHARE)
    p.setting("--p-clean", {}, "probability of holding a modality clean, such as rgb=0.25,depth=0.5; else 0.2", shares)
    p.setting("--clean-subsets", False, "hold any number of modalities clean, each with its probability, not just one")
    # The paper names no distillation weights. These are ours.
    weight = data.number(0, 1000)
    p.setting("--distill-hi", 0.5, "lambda_hi of Eq. 8, where what the teacher does not see is noise", weight)
    p.setting("--distill-lo", 0.05, "lambda_lo of Eq. 8, where it is clean; both 0: no teacher", weight)
    data.training_settings(p, steps=540, out="runs/forcing")
    args = data.parse_run(p)
    data.check_depth_range(args)
    if args.distill_hi < args.distill_lo:
        data.fail(f"--distill-hi {args.distill_hi}: must be at least --distill-lo, {args.distill_lo}")
    return args


def choose_modalities(args):
    """The entries of --modalities with the probabilities of --p-clean."""
    names = args.modalities.split(",")
    if names[0] != "rgb" or len(set(names)) < len(names) or not set(names) <= set(MODALITIES):
        data.fail(f"--modalities {args.modalities}: must be rgb, then different ones of {', '.join(MODALITIES)}")
    for name, share in args.p_clean.items():
        if name not in names:
            data.fail(f"--p-clean {name}={share}: {name} is not in --modalities, {args.modalities}")
    modalities = [replace(MODALITIES[name], p_clean=args.p_clean.get(name, 0.2)) for name in names]
    total = sum(m.p_clean for m in modalities)
    if total > 1 and not args.clean_subsets:
        data.fail(f"--p-clean: the sum of the probabilities is {total:g}; must be at most 1 without --clean-subsets")
    return modalities


def load_init(args):
    """--init -> (network or None, the --encoders that it was trained with, or None)."""
    only_cost = args.dry_run and args.preset  # needs no weights
    if args.init == "none" or only_cost:
        return None, None
    network, state = data.open_network(args.init, "--init")
    return network, state["settings"].get("encoders", "")


def choose_network(args, modalities, init, init_encoders, device):
    """(Config of the network, encoders). Sets args.size if it is left to the network."""
    base = PRESETS[args.preset or "nano"]
    if init is not None and not args.preset:
        base = init.config
    encoders = data.open_encoders(args.encoders, device, base, init_encoders)
    config = base.with_modalities(*modalities).with_encoders(encoders)
    if init is not None:
        check_init(args.init, init.modalities, config.modalities)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size of the network, {config.patch}")
    return replace(config, size=args.size), encoders


def check_init(path, found, wanted):
    """Refuse a checkpoint of modalities that this run does not train; p_clean may differ. The first is the image."""
    found = [replace(m, p_clean=0) for m in found]
    wanted = [replace(m, p_clean=0) for m in wanted]
    if found[0] != wanted[0] or any(m not in wanted for m in found):
        names = ", ".join(m.name for m in found)
        data.fail(f"--init {path}: its modalities are {names}; must be among those of --modalities, and alike")


def choose_teacher(args, init, config):
    """The network of --init if it lacks a modality of this run; else None, or if both weights of Eq. 8 are zero."""
    if init is None or args.distill_lo == args.distill_hi == 0:
        return None
    lacking = {m.name for m in config.modalities} - {m.name for m in init.modalities}
    return init if lacking else None


@torch.no_grad()
def draw_samples(network, encoders, args, device):
    """Draw validation samples, and what the network generates: each modality from the others, and all from captions."""
    image = network.modalities[0]
    batch = data.validation_batch(args, network.modalities, device)
    text = encoders.encode_text(batch.captions).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = {}
    inputs = {}
    rows = {}
    for m in network.modalities:
        noise[m.name] = torch.randn(len(text), *m.shape((args.size, args.size)), generator=generator).to(device)
        values = batch.values[m.name]
        valid = batch.valid[m.name]
        rows[m.name] = [data.paint(m, x, None if valid is None else valid[i]) for i, x in enumerate(values)]
        if m is image:
            values = encoders.encode_image(values)
        inputs[m.name] = (m.encode(values, valid), valid)

    def sample(given):
        schedule = make_schedule(list(noise), 25, strength=dict.fromkeys(given, 1.0))
        return network.sample(schedule, noise, text, given, guidance={image.name: 3.0})

    def paint(m, samples):
        x0 = samples[m.name]
        values = encoders.decode_image(x0) if m is image else m.decode(x0)
        return [data.paint(m, x) for x in m.finish(values)]

    for m in network.modalities:
        others = {name: values for name, values in inputs.items() if name != m.name}
        rows[f"{m.name}\nfrom {', '.join(others)}"] = paint(m, sample(others))
    samples = sample({})
    for m in network.modalities:
        rows[f"joint:\n{m.name}"] = paint(m, samples)
    return data.draw_grid(list(rows.values()), list(rows))


def distill(run, part, x0_hat, num_scored, args):
    """Self-distillation (Eq. 8): the loss that keeps x0_hat near the teacher's predictions from the same noisy values.

    Its weight grows with the noise level of the modalities that the teacher does not see: at t = 1 they tell nothing,
    so both networks know the same. The mean over several such modalities is our choice; the paper has one.
    """
    seen = [m.name for m in run.teacher.modalities]
    unseen = [m.name for m in run.model.modalities if m.name not in seen]
    with torch.no_grad():
        target = run.teacher({name: part.noisy[name] for name in seen}, part.t, part.text)
    t_unseen = torch.stack([part.t[name] for name in unseen]).mean(0)  # (B,)
    distill_weight = distillation_weight(t_unseen, args.distill_lo, args.distill_hi)  # (B,)
    total = 0.0
    for m in run.teacher.modalities:
        error = squared_error(x0_hat[m.name], target[m.name], part.mask[m.name])  # (B,)
        loss = distill_weight * m.loss_weight(part.t[m.name]) * error  # (B,)
        total = total + loss.sum() / num_scored[m.name].clamp(min=1)
        run.record(f"loss_distill_{m.name}", m.name, loss, part)
    return total


def train(run, batches, encoders, args):
    modalities = run.model.modalities
    image, *others = modalities
    while run.goes_on():
        parts = []
        for batch in itertools.islice(batches, args.grad_accum):
            # Random numbers follow from the seed and the indices of the samples. So they do not depend on how a batch
            # is split over ranks and parts.
            rng = data.PerSampleRNG(args.seed, batch.indices, run.device)
            x0 = {image.name: encoders.encode_image(batch.values[image.name])}
            valid = {image.name: None}

            # Thin out the other modalities as sensors do. Depth is normalised by the mean of the pixels that are left.
            sensor_mask = data.sensor_mask(batch.values[image.name], args.sparsity, rng.rand)
            for m in others:
                valid[m.name] = batch.valid[m.name] & sensor_mask
                x0[m.name] = m.encode(batch.values[m.name], valid[m.name])
            text = encoders.encode_text(batch.captions).to(run.device, non_blocking=True, copy=True)
            text[rng.rand() < args.drop_caption] = 0  # no text, for classifier-free guidance

            # Draw noise levels, one for each modality (Sec. 3.2), and corrupt to them.
            has_pixels = {m.name: valid[m.name].flatten(1).any(1) for m in others}
            t = draw_noise_levels(modalities, rng.rand, has_pixels, args.clean_subsets)
            noisy = {}
            mask = {}
            for name, x in x0.items():
                noisy[name] = corrupt(x, rng.randn(*x.shape[1:]), t[name], valid[name])  # Eq. 5
                mask[name] = loss_mask(x, t[name], valid[name])
            parts.append(data.Part(x0, noisy, t, mask, text))

        # A modality's loss is a mean over its values in the whole batch: divide by their number in all parts and on all
        # ranks. A mean of means would differ where sparse depth leaves one part with more pixels than another.
        num_scored = run.sum_over_ranks({m.name: sum(part.mask[m.name].sum() for part in parts) for m in modalities})

        for part in run.each(parts):
            # Predict. The losses of the modalities are weighted 1:1 by default (Modality.weight).
            x0_hat = run.network(part.noisy, part.t, part.text)
            total = 0.0
            for m in modalities:
                error = squared_error(x0_hat[m.name], part.x0[m.name], part.mask[m.name])  # (B,)
                loss = m.loss_weight(part.t[m.name]) * error  # (B,), Eq. 7
                total = total + loss.sum() / num_scored[m.name].clamp(min=1)
                run.record(f"loss_{m.name}", m.name, loss, part)
                run.record(f"error_{m.name}", m.name, error, part)
            if run.teacher is not None:
                total = total + distill(run, part, x0_hat, num_scored, args)
            run.backward(total)
        run.end_step()


def main():
    args = parse()
    modalities = choose_modalities(args)
    device = data.pick_device("cpu" if args.dry_run else args.device)
    init, init_encoders = load_init(args)
    config, encoders = choose_network(args, modalities, init, init_encoders, device)
    teacher = choose_teacher(args, init, config)
    if args.dry_run:
        data.print_cost(config, (args.size, args.size), teacher and teacher.config)
        return

    source = data.open_source(args, "train", (args.size, args.size), config.modalities, device)
    torch.manual_seed(args.seed)
    network = DiT(config)
    if init is not None:
        try:
            network.warm_start(init.state_dict())
        except ValueError as error:
            data.fail(f"--init {args.init}: {error}")

    def draw(network):
        return draw_samples(network, encoders, args, device)

    run = data.Run(args, device)
    run.start(network, draw, teacher)
    batches = data.training_batches(source, args, run.step, run.rank, run.ranks, device)
    train(run, batches, encoders, args)
    run.close()


if __name__ == "__main__":
    record(data.run_script)(main)
