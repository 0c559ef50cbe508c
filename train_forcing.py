"""Stage 2: Modality Forcing. A text-to-image checkpoint learns p(image, depth | text) from sparse depth (Sec. 3.2-3.3).

    python train_forcing.py                 from runs/t2i/last.pt, on the built-in world; minutes on two CPU cores
    python train_forcing.py --init none     from scratch, without image pretraining
    python train_forcing.py --data DIR --sparsity dense      your own images and depth, not thinned out (docs/data.md)
    python train_forcing.py --modalities rgb,depth,normal    surface normals, too
    python train_forcing.py --resume        continue after an interruption
    python train_forcing.py --backbone extras/flux2.py --init FOLDER ...     from FLUX.2 [klein] (docs/backbone.md)
    torchrun --nproc-per-node 8 train_forcing.py --init t2i.pt --grad-accum 4 --resume

The preset that trained --init sets the defaults of steps, batch size, learning rate and so on; --dry-run prints them.

A step reads: draw a batch -> thin out depth -> draw noise levels -> corrupt -> predict -> loss -> step. Every modality
draws its own noise level. One that is held clean (t = 0) conditions the others and carries no loss. Missing pixels are
noise and carry no loss either. The network gets no mask channel: it must recognise noise. If a run adds a modality, a
second loss (Eq. 8) keeps the other predictions near those of --init, the frozen teacher; nano has none by default.
data.Run has what both stages share: clipping, the learning rate, the averaged weights (EMA), ranks, checkpoints and
metrics.

The run directory (--out) gets config.json, metrics.jsonl (losses by modality and training mode, speed), samples/ and
the last checkpoints. Give its last.pt to sample.py and evaluate.py.
"""

import functools
import itertools
from dataclasses import asdict, replace

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data
from model import (
    GUIDANCE,
    I2D_STEPS,
    MODALITIES,
    PRESETS,
    SAMPLING_STEPS,
    corrupt,
    distillation_weight,
    draw_noise_levels,
    loss_mask,
    make_schedule,
    squared_error,
)

# Defaults of flags by preset. Those of nano come from a search (RESULTS.md, "The speedrun"); the others are untested.
# The paper gives no distillation weights; these are ours. The text-to-image training of nano is not worth preserving.
TEACHER = {"distill_hi": 0.5, "distill_lo": 0.05}
NO_TEACHER = {"distill_hi": 0.0, "distill_lo": 0.0}
NANO = {"steps": 2000, "batch_size": 8, "lr": 3e-3, "beta2": 0.99, "warmup": 50, "ema": 0.99, **NO_TEACHER}
MEDIUM = {"steps": 20_000, "batch_size": 64, "lr": 2e-3, "beta2": 0.95, "warmup": 200, "ema": 0.999, **TEACHER}
LARGE = {"steps": 100_000, "batch_size": 1024, "lr": 1e-4, "beta2": 0.95, "warmup": 2000, "ema": 0.9999, **TEACHER}
BACKBONE = {"steps": 20_000, "batch_size": 64, "lr": 1e-5, "beta2": 0.95, "warmup": 1000, "ema": 0.9999, **TEACHER}
RECIPES = {
    "nano": NANO,
    "tiny": MEDIUM,
    "small": MEDIUM,
    "370m": LARGE,
    "800m": LARGE,
    "3b": LARGE,
    "backbone": {**BACKBONE, "optimizer": "adamw", "lr_new": 1e-4},
}
# The chance to hold a modality clean is the paper's, 0.2 (Sec. 3.2), but for these.
P_CLEAN = {"nano": {"rgb": 0.3, "depth": 0.3}}


def check_sparsity(text):
    """Type of --sparsity: returns text if it is a pattern of data.sensor_mask or a share above 0, up to 1."""
    if text not in ("mixed", *data.PATTERNS):
        check_share = data.number(0, 1, above=True, other=f", or one of mixed, {', '.join(data.PATTERNS)}")
        check_share(text)
    return text


def parse():
    p = data.Flags(__doc__)
    p.setting("--init", "runs/t2i/last.pt", "checkpoint to start from, the teacher of new modalities; or none")
    data.backbone_setting(p)
    p.setting("--preset", "", "network, which must fit --init (default: that of --init, else nano)", choices=PRESETS)
    new = "peak learning rate of what is not from --init; 0 is --lr (default: 0; with --backbone 1e-4)"
    p.setting("--lr-new", 0.0, new, data.number(0, 1))
    p.setting("--modalities", "rgb,depth", f"what to train: rgb, then others of {', '.join(MODALITIES)}")
    data.source_settings(p)
    patterns = ", ".join(data.PATTERNS)
    p.setting("--sparsity", "mixed", f"pixels that keep depth: mixed, {patterns} or a share", check_sparsity)
    shares = data.by_modality(data.SHARE)
    clean = "chance to hold modalities clean, as rgb=0.25; 0.2 if not named (default: nano has rgb=0.3,depth=0.3)"
    p.setting("--p-clean", {}, clean, shares)
    p.setting("--clean-subsets", False, "hold each modality clean independently, instead of at most one per sample")
    levels = "share of the noise levels that is drawn uniformly; otherwise levels near 0 are hardly trained"
    p.setting("--uniform", 0.0, levels, data.number(0, 0.99))
    weight = data.number(0, 1000)
    high = "distillation weight lambda_hi of Eq. 8, at t = 1 of the new modalities (default: 0.5; nano has 0)"
    low = "distillation weight lambda_lo, at their t = 0; both 0: no teacher (default: 0.05; nano has 0)"
    p.setting("--distill-hi", NO_TEACHER["distill_hi"], high, weight)
    p.setting("--distill-lo", NO_TEACHER["distill_lo"], low, weight)
    data.training_settings(p, RECIPES["nano"], out="runs/forcing")
    args = data.parse_run(p, RECIPES)
    if args.backbone and (args.preset or args.init == "none"):
        data.fail(f"--backbone {args.backbone}: takes its network from --init; leave out --preset and --init none")
    if args.lr_new and args.init == "none":
        data.fail(f"--lr-new {args.lr_new}: needs --init; without it everything is new, so give --lr")
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
    shares = args.p_clean or P_CLEAN.get(args.recipe, {})
    modalities = [replace(MODALITIES[name], p_clean=shares.get(name, MODALITIES[name].p_clean)) for name in names]
    total = sum(m.p_clean for m in modalities)
    if total > 1 and not args.clean_subsets:
        data.fail(f"--p-clean: the sum of the probabilities is {total:g}; must be at most 1 without --clean-subsets")
    return modalities


def load_init(args):
    """Load --init. Returns its network and its --encoders, or (None, None) if no weights are needed."""
    if args.init == "none" or (args.dry_run and args.preset):
        return None, None
    network, state = data.open_network(args.init, "--init", args.backbone)
    return network, state["settings"].get("encoders", "")


def choose_network(args, modalities, init, init_encoders, device):
    """(Config of the network, encoders). Sets args.size if it is left to the network."""
    base = PRESETS[args.preset or "nano"]
    if init is not None and not args.preset:
        base = init.config
    trained_with = None if args.preset else init_encoders  # a preset has no encoders to compare with
    encoders = data.open_encoders(args.encoders, device, base, trained_with)
    config = base.with_modalities(*modalities).with_encoders(encoders)
    if init is not None:
        check_init(args.init, init.modalities, config.modalities)
    args.size = args.size or config.size
    if args.size % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size of the network, {config.patch}")
    return replace(config, size=args.size), encoders


def check_init(path, found, wanted):
    """Refuse a checkpoint with a modality that this run lacks or changes; p_clean may differ."""
    wanted = {m.name: m for m in wanted}
    for m in found:
        if m.name not in wanted:
            data.fail(f"--init {path}: has {m.name}; add it to --modalities")
        ours = asdict(wanted[m.name])
        changed = [field for field, value in asdict(m).items() if value != ours[field] and field != "p_clean"]
        if changed:
            data.fail(f"--init {path}: its {m.name} differs from that of this run in {', '.join(changed)}")


def choose_teacher(args, init, config):
    """--init teaches a run that adds modalities to it. None if the run adds none, or if both weights are 0."""
    if init is None or args.distill_lo == args.distill_hi == 0:
        return None
    lacking = {m.name for m in config.modalities} - {m.name for m in init.modalities}
    return init if lacking else None


def corrupt_batch(run, batch, encoders, args):
    """Thin out, encode and corrupt a data.Batch, each modality to a noise level of its own: a data.MicroBatch."""
    image, *others = run.model.modalities
    # Random numbers follow from the seed and the samples' indices, however a batch is split over ranks.
    rng = data.PerSampleRNG(args.seed, batch.indices, run.device)
    x0 = {image.name: encoders.encode_image(batch.values[image.name])}
    valid = {image.name: None}

    # Thin out the other modalities as sensors do; some see only textured points. Depth is normalised by the mean of
    # the pixels that are left.
    sensor_mask = data.sensor_mask(batch.values[image.name], args.sparsity, rng.rand)
    for m in others:
        valid[m.name] = batch.valid[m.name] & sensor_mask
        x0[m.name] = m.encode(batch.values[m.name], valid[m.name])
    text = encoders.encode_text(batch.captions).to(run.device, non_blocking=True, copy=True)  # the next line changes it
    text[rng.rand() < args.drop_caption] = encoders.no_text  # for classifier-free guidance

    # Draw noise levels, one for each modality (Sec. 3.2), and corrupt to them.
    has_pixels = {m.name: valid[m.name].flatten(1).any(1) for m in others}
    t = draw_noise_levels(run.model.modalities, rng.rand, has_pixels, args.clean_subsets, args.uniform)
    noisy = {}
    mask = {}
    for name, x in x0.items():
        noisy[name] = corrupt(x, rng.randn(*x.shape[1:]), t[name], valid[name])  # Eq. 5
        mask[name] = loss_mask(x, t[name], valid[name])
    return data.MicroBatch(x0, noisy, t, mask, text)


def distill(run, micro_batch, x0_hat, num_scored, args):
    """Self-distillation (Eq. 8): the loss that keeps x0_hat near the teacher's predictions from the same noisy values.

    Its weight grows with the noise level of the modalities that the teacher does not see. At t = 1 they carry no
    information, so both networks should agree. We take the mean t of several such modalities; the paper has one.
    """
    seen = [m.name for m in run.teacher.modalities]
    unseen = [m.name for m in run.model.modalities if m.name not in seen]
    with torch.no_grad():
        noisy = {name: micro_batch.noisy[name] for name in seen}
        target = run.teacher(noisy, micro_batch.t, micro_batch.text)  # it reads only the t of its modalities
    t_unseen = torch.stack([micro_batch.t[name] for name in unseen]).mean(0)  # (B,)
    distill_weight = distillation_weight(t_unseen, args.distill_lo, args.distill_hi)  # (B,)
    total = 0.0
    for m in run.teacher.modalities:
        error = squared_error(x0_hat[m.name], target[m.name], micro_batch.mask[m.name])  # (B,)
        loss = distill_weight * m.loss_weight(micro_batch.t[m.name]) * error  # (B,)
        total = total + loss.sum() / num_scored[m.name]
        run.record(f"loss_distill_{m.name}", m.name, loss, micro_batch)
    return total


def train(run, batches, encoders, args):
    while run.goes_on():
        pieces = itertools.islice(batches, args.grad_accum)
        micro_batches = [corrupt_batch(run, batch, encoders, args) for batch in pieces]
        # A modality's loss is a mean over its values in the whole batch: divide by their number in all micro-batches
        # and on all ranks. Otherwise a micro-batch with little depth would weigh as much as one with a lot.
        num_scored = run.count_scored(micro_batches)

        for micro_batch in run.accumulate(micro_batches):
            x0_hat = run.network(micro_batch.noisy, micro_batch.t, micro_batch.text)
            total = 0.0  # the sum over modalities; Modality.weight is 1 for each
            for m in run.model.modalities:
                error = squared_error(x0_hat[m.name], micro_batch.x0[m.name], micro_batch.mask[m.name])  # (B,)
                loss = m.loss_weight(micro_batch.t[m.name]) * error  # (B,), Eq. 7
                total = total + loss.sum() / num_scored[m.name]
                run.record(f"loss_{m.name}", m.name, loss, micro_batch)
                run.record(f"error_{m.name}", m.name, error, micro_batch)
            if run.teacher is not None:
                total = total + distill(run, micro_batch, x0_hat, num_scored, args)
            run.backward(total)
        run.end_step()


@torch.no_grad()
def draw_samples(encoders, batch, args, device, network):
    """Draw validation samples, and what the network generates: each modality from the others, and all from captions."""
    image = network.modalities[0]
    text = encoders.encode_text(batch.captions).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = {}
    inputs = {}
    rows = {"caption": batch.captions}
    for m in network.modalities:
        noise[m.name] = torch.randn(len(text), *m.shape((args.size, args.size)), generator=generator).to(device)
        values = batch.values[m.name]
        valid = batch.valid[m.name]
        x0 = encoders.encode_image(values) if m is image else m.encode(values, valid)
        inputs[m.name] = (x0, valid)
        rows[m.name] = [data.paint(m, x, None if valid is None else valid[i]) for i, x in enumerate(values)]

    def sample(given):
        steps = I2D_STEPS if image.name in given else SAMPLING_STEPS
        schedule = make_schedule(list(noise), steps, strength=dict.fromkeys(given, 1.0))
        return network.sample(schedule, noise, text, given, guidance={image.name: GUIDANCE}, no_text=encoders.no_text)

    def paint(m, samples):
        values = encoders.decode_image(samples[m.name]) if m is image else m.decode(samples[m.name])
        return [data.paint(m, x) for x in m.finish(values)]

    for m in reversed(network.modalities):  # the last one first, so that it stands below its true map
        others = {name: x0_and_valid for name, x0_and_valid in inputs.items() if name != m.name}
        rows[f"{m.name}\nfrom {', '.join(others)}"] = paint(m, sample(others))
    samples = sample({})
    for m in network.modalities:
        rows[f"joint:\n{m.name}"] = paint(m, samples)
    return data.draw_grid(list(rows.values()), list(rows))


def main():
    args = parse()
    modalities = choose_modalities(args)
    device = data.pick_device("cpu" if args.dry_run else args.device)
    init, init_encoders = load_init(args)
    config, encoders = choose_network(args, modalities, init, init_encoders, device)
    teacher = choose_teacher(args, init, config)
    if args.dry_run:
        data.print_cost(args, RECIPES[args.recipe], config, teacher and teacher.config)
        return

    source = data.open_source(args, "train", (args.size, args.size), config.modalities, device)
    validation = data.validation_batch(args, config.modalities, device)
    torch.manual_seed(args.seed)
    network = config.build()
    if init is not None:
        try:
            network.warm_start(init.state_dict())
        except ValueError as error:
            data.fail(f"--init {args.init}: {error}")
    run = data.Run(args, device)
    run.start(network, functools.partial(draw_samples, encoders, validation, args, device), teacher, args.lr_new)
    batches = data.training_batches(source, args, run.step, run.rank, run.ranks, device)
    train(run, batches, encoders, args)
    run.close()


if __name__ == "__main__":
    record(data.run_script)(main)  # torchrun then shows the error of the rank that failed first
