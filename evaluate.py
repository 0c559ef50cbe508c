"""How good is a network? Depth and normals from images, image quality, and how well image and depth agree.

    python evaluate.py depth                                  depth from images of the built-in world
    python evaluate.py depth --data eval/NYUv2 --ensemble 10  on a benchmark, the median of ten samples per image
    python evaluate.py depth --data eval/NYUv2 --predictions maps/other   score maps that another model has saved
    python evaluate.py depth --measured 0.05                  also complete sparse depth, in its unit
    python evaluate.py normal --checkpoint normals.pt         surface normals from images
    python evaluate.py image                                  images from captions: Frechet distance, requested colours
    python evaluate.py image --data coco --features inception.pt       FID, by a TorchScript feature extractor
    python evaluate.py follow                                 does an image generated from depth have that depth?
    python evaluate.py joint --order -5                       do image and depth agree when generated together?

AbsRel is the mean of |p - g| / g, and delta1 the share of pixels with max(p/g, g/p) < 1.25, over the valid pixels of an
image and after alignment. Every score is a mean over images with its 95% bootstrap interval, beside references that
tell what it is worth. Each run prints a table and writes results.json and grid.png.
"""

import argparse
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from model import DEPTH, I2D_STEPS, JOINT, MODALITIES, NORMAL, RGB, complete_depth, make_schedule

# ---- Metrics: what is measured on one map ----


def weighted_median(values, weights):
    """Index of the x in values that minimises sum of weights * |x - values|. Both are 1-D arrays."""
    order = np.argsort(values, kind="stable")
    return order[np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]


def align(prediction, target, mode="affine"):
    """Scale and shift, two floats, that best map prediction p onto target g > 0. Both are 1-D, over valid pixels.

    "none" returns (1, 0). "scale" minimises the sum of |scale p - g| / g, with shift 0. "affine" minimises the sum of
    |scale p + shift - g| / g exactly, as MoGe's evaluation does.
    """
    p = np.asarray(prediction, np.float64)
    g = np.asarray(target, np.float64)
    if mode == "affine":
        return align_affine(p, g)
    nonzero = p != 0
    if mode == "none" or not nonzero.any():
        return 1.0, 0.0
    ratios = g[nonzero] / p[nonzero]
    weights = np.abs(p[nonzero]) / g[nonzero]
    return float(ratios[weighted_median(ratios, weights)]), 0.0


def align_affine(p, g):
    """(scale, shift) that minimise the sum of |scale p + shift - g| / g.

    For a fixed scale the best shift is a weighted median of g - scale p. With that shift the sum is convex in the
    scale, so bisection on its slope finds the minimum to the precision of float64.
    """
    weights = 1 / g

    def slope(scale):
        """A subgradient of the sum with respect to the scale, at the best shift."""
        residual = scale * p - g
        middle = residual[weighted_median(residual, weights)]
        signs = np.sign(residual - middle)
        on_line = residual == middle  # at the best shift these balance all others
        signs[on_line] = -(weights @ signs) / weights[on_line].sum()
        return (weights * signs) @ p

    scale = 0.0
    if np.ptp(p) > 0:
        reach = np.ptp(g) / np.ptp(p)
        while slope(-reach) > 0 or slope(reach) < 0:
            reach *= 2
        low = -reach
        high = reach
        for _ in range(64):
            scale = (low + high) / 2
            if slope(scale) > 0:
                high = scale
            else:
                low = scale

    offsets = g - scale * p
    return float(scale), float(offsets[weighted_median(offsets, weights)])


def align_map(prediction, target, valid, mode="affine"):
    """Align prediction (1, H, W) to target (1, H, W) on valid (1, H, W), or on a subsample of it if the map is large.

    The subsample has the valid pixel nearest to the centre of each of 64 x 64 cells.
    """
    height, width = valid.shape[1:]
    pixel_index = np.arange(height * width).reshape(height, width)
    cells = (min(64, height), min(64, width))
    chosen, known = data.nearest(pixel_index, valid[0].numpy(), cells, (0, 0, width, height))
    chosen = chosen[known]
    scale, shift = align(prediction.flatten()[chosen], target.flatten()[chosen], mode)
    return prediction * scale + shift


def depth_metrics(prediction, target, valid, mode="affine"):
    """Score one depth map; prediction, target and valid are (1, H, W).

    Returns ((AbsRel, delta1), aligned prediction (1, H, W), error (1, H, W) to paint). A negative prediction lies
    outside delta1.
    """
    aligned = align_map(prediction, target, valid, mode)
    p = aligned[valid].double()
    g = target[valid].double()
    absrel = ((p - g).abs() / g).mean()
    ratio = torch.maximum(p / g, g / p.clamp(min=1e-9))
    delta1 = (ratio < 1.25).double().mean()

    error = (aligned - target).abs() / target.clamp(min=1e-6)
    return (absrel.item(), delta1.item()), aligned, error / 0.5  # brightest at 50%


def normal_metrics(prediction, target, valid, mode=None):
    """Score one map of unit vectors; prediction and target (3, H, W), valid (1, H, W).

    Returns ((mean angular error in degrees, share of pixels below 11.25), prediction, error (1, H, W) to paint).
    """
    cosine = F.cosine_similarity(prediction.double(), target.double(), dim=0).clamp(-1, 1)
    degrees = cosine.acos().rad2deg()[None]  # (1, H, W)
    share = (degrees[valid] < 11.25).double().mean()
    return (degrees[valid].mean().item(), share.item()), prediction, degrees / 60  # brightest at 60 degrees


Scoring = namedtuple("Scoring", ["measure", "keys", "header"])
SCORINGS = {  # by encoding: the metric, the keys of its two scores in results.json, the header of their table
    "relative depth": Scoring(depth_metrics, ["absrel", "delta1"], "AbsRel  95% interval      delta1  95% interval"),
    "unit vectors": Scoring(
        normal_metrics, ["degrees", "below_11.25"], "degrees 95% interval      < 11.25 95% interval"
    ),
}


def coarse_features(rgb):
    """Features that need no network, (B, 3, H, W) in [-1, 1] -> (B, 80) float64: colours and edges on a coarse grid.

    They are the mean colours of 4 x 4 cells, and the mean absolute differences of grey in them, across and down.
    """
    grey = rgb.mean(1, keepdim=True)
    across = grey.diff(dim=3).abs()[:, :, 1:]
    down = grey.diff(dim=2).abs()[..., 1:]
    colors = F.adaptive_avg_pool2d(rgb, 4).flatten(1)  # (B, 48)
    edges = F.adaptive_avg_pool2d(torch.cat([across, down], 1), 4).flatten(1)  # (B, 32)
    return torch.cat([colors, edges], 1).cpu().double()


def frechet_distance(a, b):
    """Frechet distance of two Gaussians fitted to features a (N, d) and b (M, d), float64.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2); symmetric square roots keep it real.
    """
    shift = a.mean(0) - b.mean(0)
    covariance_a = torch.cov(a.T)
    covariance_b = torch.cov(b.T)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return (shift.square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross).item()


def colors_in(rgb, share=0.01):
    """Names of the object colours, by hue, that cover at least a share of the picture (3, H, W)."""

    def hue_saturation_value(picture):
        return np.asarray(Image.fromarray(picture).convert("HSV")).astype(int).reshape(-1, 3).T

    palette = (np.array([list(data.COLORS.values())]) * 255).astype(np.uint8)
    palette_hues = hue_saturation_value(palette)[0]
    hue, saturation, value = hue_saturation_value(data.paint(RGB, rgb))

    difference = np.abs(hue[:, None] - palette_hues)
    nearest = np.minimum(difference, 256 - difference).argmin(1)  # hues lie on a circle
    vivid = (saturation > 115) & (value > 40)
    counts = np.bincount(nearest[vivid], minlength=len(palette_hues))
    return {name for name, count in zip(data.COLORS, counts, strict=True) if count >= share * len(hue)}


def share_of_requested_colors(found, captions):
    """Of the colours that captions ask for, the share found in their images; found holds a set of names per image."""
    num_requested = 0
    num_found = 0
    for colors, caption in zip(found, captions, strict=True):
        for word in caption.split():
            num_requested += word in data.COLORS
            num_found += word in data.COLORS and word in colors
    return num_found / max(num_requested, 1)


def bootstrap_interval(values, draws=2000):
    """Values of n images -> [low, high], the 95% bootstrap interval of their mean."""
    values = np.asarray(values)
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.percentile(values[chosen].mean(1), (2.5, 97.5)).tolist()


# ---- Samples: those of a source, and those that a network generates ----

WORLD_IMAGES = 128  # images of the built-in world if --images is 0
Model = namedtuple("Model", ["network", "encoders"])


def open_model(path, flag, args, device):
    """Load a checkpoint's averaged network and its encoders onto the device."""
    network, state = data.open_network(path, flag)
    encoders = data.open_encoders(args.encoders, device, network.config, state["settings"].get("encoders", ""))
    names = [m.name for m in network.modalities]
    for entry in TASKS[args.task].entries:
        if entry.name not in names:
            data.fail(
                f"{flag} {path}: the network has no {entry.name}; give one trained with --modalities rgb,{entry.name}"
            )
    if args.size % network.config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size of {path}, {network.config.patch}")
    return Model(network.to(device), encoders)


def images_per_batch(args):
    """How many images fill --batch-size: an ensemble has several samples of an image, and guidance doubles them."""
    guided = args.task in ("image", "follow", "joint") and any(scale != 1 for scale in args.cfg.values())
    return max(1, args.batch_size // max(2 if guided else 1, args.ensemble))


def read_samples(args, size, entries, device):
    """Yield the batches to evaluate, at size (H, W), with the values of the modalities in entries."""
    source = data.open_source(args, "val", size, entries, device)
    count = args.images or (WORLD_IMAGES if args.data == "synthetic" else None)
    names = set()
    for batch in data.in_order(source, count, images_per_batch(args), device, args.workers):
        for name in batch.names:
            if name in names and args.task != "image":
                data.fail(f"--data {args.data}: two samples are called {name}; give them different names")
            names.add(name)
        yield batch
    if not names:
        data.fail(f"--data {args.data}: no samples")


def generate(model, captions, indices, size, key, schedule, given=None, guidance=None):
    """Sample all modalities of the network for B captions: {m: (B, C, h, w)}, to be decoded.

    The noise of a sample follows from key and its index alone, whatever batch it is in. schedule, given and guidance
    are as in DiT.sample.
    """
    device = next(model.network.parameters()).device
    rng = data.PerSampleRNG(key, indices)
    noise = {m.name: rng.randn(*m.shape(size)).to(device) for m in model.network.modalities}
    text = model.encoders.encode_text(captions).to(device)
    return model.network.sample(schedule, noise, text, given, guidance)


def estimate(model, entry, rgb, indices, args, steps, strength=1.0):
    """Generate the modality entry from images rgb (B, 3, H, W) in [-1, 1]: maps (B, C, H, W) on the CPU.

    The network sees an image at the size nearest to args.size^2 in area that keeps its aspect. A map is the median of
    args.ensemble samples; depth is relative to its mean in all of them, so they need no alignment.
    """
    full_size = tuple(rgb.shape[2:])
    size = model.network.config.fit(*full_size, args.size)
    if size != full_size:
        rgb = F.interpolate(rgb, size, mode="bicubic", antialias=True).clamp(-1, 1)
    image = model.encoders.encode_image(rgb).repeat_interleave(args.ensemble, 0)

    schedule = make_schedule([m.name for m in model.network.modalities], steps, strength={RGB.name: strength})
    members = [index + (k << 32) for index in indices for k in range(args.ensemble)]
    captions = [""] * len(members)
    x0 = generate(model, captions, members, size, args.seed, schedule, {RGB.name: (image, None)})

    maps = entry.decode(x0[entry.name]).cpu().unflatten(0, (-1, args.ensemble))  # (B, ensemble, C, h, w)
    median = torch.from_numpy(np.median(maps.numpy(), axis=1))
    return entry.finish(F.interpolate(median, full_size, mode="bilinear"))


def blind_map(entry, source, count):
    """The best guess without looking: the mean map (C, H, W) of the first count samples of a source."""
    total = 0
    num_valid = 0
    for batch in data.in_order(source, count, 16):
        valid = batch.valid[entry.name]
        x0 = entry.encode(batch.values[entry.name], valid)
        total = total + torch.where(valid, x0, 0.0).sum(0, keepdim=True)
        num_valid = num_valid + valid.sum(0, keepdim=True)
    return entry.finish(entry.decode(total / num_valid.clamp(min=1)))[0]


def load_map(args, name, picture_size):
    """Read the depth map NAME.npy, .pfm or .png of --predictions: (1, H, W) at args.scored_at.

    A map of another size shows the whole picture: it is cropped as the picture is, and resized bilinearly.
    """
    paths = [Path(f"{args.predictions}/{name}.{suffix}") for suffix in ("npy", "pfm", "png")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        data.fail(f"--predictions {args.predictions}: no map for {name} (.npy, .pfm or .png)")
    try:
        with data.reading(path):
            scale = args.depth_scale if path.suffix == ".png" else 1.0
            values = data.read_array(path.name, data.read_file(path), scale)
            if not values.size:
                raise data.BadSample("holds no pixel")
            left, top, right, bottom = data.crop_box(values.shape, picture_size, args.scored_at)
    except data.BadSample as error:
        data.fail(f"--predictions {error}")

    depth = torch.from_numpy(values)[None]  # (1, h, w)
    if values.shape == args.scored_at:
        return depth
    height, width = values.shape
    across = [(right - left) / width, 0, (left + right) / width - 1]
    down = [0, (bottom - top) / height, (top + bottom) / height - 1]
    grid = F.affine_grid(torch.tensor([[across, down]]), (1, 1, *args.scored_at), align_corners=False)
    return F.grid_sample(depth[None], grid, padding_mode="border", align_corners=False)[0]


# ---- Tables ----


def score_map(args, entry, name, prediction, target, valid, mode):
    """Call the metric of the entry's encoding on one map, or end with one line if there is nothing to score."""
    if not valid.any():
        data.fail(f"--data {args.data}: {name} has no valid {entry.name} to be scored on")
    if not prediction[valid.expand_as(prediction)].isfinite().all():
        source = args.predictions or args.judge or args.checkpoint
        data.fail(f"{source}: {entry.name} of {name} is not finite where it is scored")
    return SCORINGS[entry.encoding].measure(prediction, target, valid, mode)


def print_row(label, scoring, scores):
    """Print one line of a table from the two scores of each image. Returns its numbers for results.json."""
    row = {"images": len(scores)}
    cells = []
    for key, values in zip(scoring.keys, np.transpose(scores), strict=True):
        low, high = bootstrap_interval(values)
        row[key] = float(values.mean())
        row[f"{key}_95"] = [low, high]
        cells.append(f"{row[key]:7.4f} [{low:.4f}, {high:.4f}]")
    print(f"{label:34}{cells[0]}  {cells[1]}")
    return row


# ---- depth and normal: maps from images ----

BENCHMARKS = {  # last part of --data: the size at which it is scored (MoGe's but for ScanNet), its farthest depth in m
    "nyuv2": ((480, 640), 10.0),
    "kitti": ((375, 750), 80.0),
    "eth3d": ((1365, 2048), 0.0),
    "scannet": ((480, 640), 10.0),
    "diode": ((768, 1024), 350.0),
}
LABELS = {  # prefix of the keys in results.json: row of the table
    "": "image to {}",
    "completed_": "completed, not aligned",
    "filled_": "measured alone, not aligned",
    "baseline_": "mean {} map, input-blind",
    "shuffled_": "given another scene's image",
}
Method = namedtuple("Method", ["maps", "valid", "align"])  # maps (B, C, H, W), scored on valid (B, 1, H, W)


def complete(args, depth, valid, indices, maps):
    """{prefix: Method} that know a share of the true depth: the maps completed by it, and it alone, interpolated.

    Both are scored where depth was not measured, in its unit. All maps are (B, 1, H, W).
    """
    chance = data.PerSampleRNG((args.seed, "measured"), indices).rand(*depth.shape[1:])
    measured = valid & (chance < args.measured)
    rest = valid & ~measured
    if not measured.flatten(1).any(1).all() or not rest.flatten(1).any(1).all():
        data.fail(f"--measured {args.measured}: a sample keeps no pixel, or all of them; give another share")

    completed = complete_depth(maps, depth, measured)
    interpolated = complete_depth(torch.ones_like(depth), depth, measured)
    return {"completed_": Method(completed, rest, "none"), "filled_": Method(interpolated, rest, "none")}


def run_methods(args, entry, model, batch, blind, previous):
    """{prefix: Method}: the maps of a batch by the network and by its references.

    previous (1, 3, H, W) is the image before the batch: each image's predecessor is "another scene's image".
    """
    rgb = batch.values[RGB.name]
    target = batch.values[entry.name].cpu()
    valid = batch.valid[entry.name].cpu()

    def estimate_from(images):
        return estimate(model, entry, images, batch.indices, args, args.steps, args.strength)

    if args.predictions:
        samples = zip(batch.names, batch.shapes, strict=True)
        maps = torch.stack([load_map(args, name, shape) for name, shape in samples])
    else:
        maps = estimate_from(rgb)

    methods = {"": Method(maps, valid, args.align)}
    methods["baseline_"] = Method(blind.expand_as(maps), valid, args.align)
    if args.data == "synthetic" and not args.predictions:
        shifted = torch.cat([previous, rgb[:-1]])
        methods["shuffled_"] = Method(estimate_from(shifted), valid, args.align)
    if args.measured:
        methods.update(complete(args, target, valid, batch.indices, maps))
    return methods


def paint_scored(entry, rgb, target, aligned, error, valid):
    """A row of the grid: image, target, aligned prediction, and its error from black to orange."""
    heat = torch.where(valid, error.clamp(0, 1), 0.0)[0, :, :, None].numpy()
    maps = [data.paint(entry, x, valid) for x in (target, aligned)]
    return [data.paint(RGB, rgb), *maps, (heat * (255, 153, 77)).astype(np.uint8)]


def score_methods(args, entry, model, device):
    """Score all methods on all samples: ({prefix: {name: scores}}, [(label, pictures)] of the first six)."""
    scoring = SCORINGS[entry.encoding]
    synthetic = args.data == "synthetic"
    source = data.open_source(args, "train" if synthetic else "val", args.scored_at, (RGB, entry))
    blind = blind_map(entry, source, 2048 if synthetic else args.images or 2048)

    scores = {prefix: {} for prefix in LABELS}
    pictures = []
    previous = None
    for batch in read_samples(args, args.scored_at, (RGB, entry), device):
        rgb = batch.values[RGB.name]
        target = batch.values[entry.name].cpu()
        methods = run_methods(args, entry, model, batch, blind, rgb[:1] if previous is None else previous)
        for prefix, (maps, valid, mode) in methods.items():
            for i, name in enumerate(batch.names):
                if prefix == "shuffled_" and batch.indices[i] == 0:
                    continue  # no image comes before the first
                score, aligned, error = score_map(args, entry, name, maps[i], target[i], valid[i], mode)
                scores[prefix][name] = score
                if prefix == "" and len(pictures) < 6:
                    label = f"{scoring.keys[0]} {score[0]:.3f}"
                    pictures.append((label, paint_scored(entry, rgb[i], target[i], aligned, error, valid[i])))
        previous = rgb[-1:]
    return scores, pictures


def evaluate_maps(args, model, device):
    """depth, normal: generate the modality that the task names from images; compare the maps with the true ones."""
    entry = MODALITIES[args.task]
    scoring = SCORINGS[entry.encoding]
    scores, pictures = score_methods(args, entry, model, device)

    found_by = args.predictions or f"{args.steps} steps, {args.ensemble} sample(s) an image"
    limit = f", depth up to {args.depth_max:g} m" if args.depth_max else ""
    print(f"{found_by}; alignment: {args.align if entry is DEPTH else 'none'}")
    print(f"{'':34}{scoring.header}")
    print(f"{args.data}: {len(scores[''])} images scored at {args.scored_at[0]}x{args.scored_at[1]}{limit}")
    results = {"per_image": scores[""]}
    for prefix, label in LABELS.items():
        if scores[prefix]:
            row = print_row(f"  {label.format(entry.name)}", scoring, list(scores[prefix].values()))
            results.update({f"{prefix}{key}": value for key, value in row.items()})

    key = scoring.keys[0]
    ratio = "  undefined: the baseline is exact"  # an alignment fits a pixel or two, and constant depth, exactly
    if results[f"baseline_{key}"] >= 1e-6:
        ratio = f"{results[key] / results[f'baseline_{key}']:7.3f}"
    print(f"{'  ratio to the baseline':34}{ratio}")
    return results, pictures


# ---- follow and joint: do image and depth agree (Sec. 4.3)? ----


def find_depth(args, judge, images):
    """Find depth (B, 1, H, W) in images (B, 3, H, W)."""
    same_noise = [0] * len(images)  # so that estimates differ only because the images do
    return estimate(judge, DEPTH, images, same_noise, args, args.judge_steps)


def report_agreement(args, pairs, labels):
    """Print how maps agree with those that should equal them, and with those of the sample before, as a reference.

    pairs holds (name, prediction (1, H, W), target (1, H, W)) of each sample. Returns the numbers for results.json.
    """

    def score(name, prediction, target):
        surface = target > 0.01 * target.mean()  # nothing real is nearer than a hundredth of the mean
        return score_map(args, DEPTH, name, prediction, target, surface, args.align)[0]

    scoring = SCORINGS[DEPTH.encoding]
    found_by = f"{args.judge or args.checkpoint}, {args.judge_steps} steps"
    print(f"{len(pairs)} images at {args.size}x{args.size}, alignment: {args.align}; depth found by {found_by}")
    print(f"{'':34}{scoring.header}")
    results = print_row(labels[0], scoring, [score(*pair) for pair in pairs])
    references = [score(name, map_, target) for (name, map_, _), (_, _, target) in zip(pairs[1:], pairs, strict=False)]
    if references:
        row = print_row(labels[1], scoring, references)
        results.update({f"other_{key}": value for key, value in row.items()})
    return results


def paint_rows(names, columns):
    """A row of the grid, (label, pictures), for each sample; columns are [(entry, values (B, C, H, W))]."""
    return [(name[-14:], [data.paint(entry, x[i]) for entry, x in columns]) for i, name in enumerate(names)]


def evaluate_follow(args, model, device):
    """follow: generate images from depth; compare the depth found in them with that found in the real images."""
    judge = open_model(args.judge, "--judge", args, device) if args.judge else model
    size = (args.size, args.size)
    schedule = make_schedule(
        [m.name for m in model.network.modalities], args.steps, strength={DEPTH.name: args.strength}
    )
    pairs = []
    rows = []
    for batch in read_samples(args, size, (RGB, DEPTH), device):
        depth = batch.values[DEPTH.name]
        valid = batch.valid[DEPTH.name]
        given = {DEPTH.name: (DEPTH.encode(depth, valid), valid)}
        key = (args.seed, "follow")  # other noise than the estimates have
        x0 = generate(model, batch.captions, batch.indices, size, key, schedule, given, args.cfg)

        generated = RGB.finish(model.encoders.decode_image(x0[RGB.name]))
        real = batch.values[RGB.name]
        in_generated = find_depth(args, judge, generated)
        in_real = find_depth(args, judge, real)
        pairs += zip(batch.names, in_generated, in_real, strict=True)
        columns = [(RGB, generated), (RGB, real), (DEPTH, depth), (DEPTH, in_generated), (DEPTH, in_real)]
        rows += paint_rows(batch.names[: 8 - len(rows)], columns)
    labels = ("found in generated and real image", "the same with another real image")
    return report_agreement(args, pairs, labels), rows


def evaluate_joint(args, model, device):
    """joint: generate image and depth from captions; compare the depth with that found in the image."""
    judge = open_model(args.judge, "--judge", args, device) if args.judge else model
    size = (args.size, args.size)
    schedule = make_schedule([m.name for m in model.network.modalities], args.steps, args.order)
    pairs = []
    rows = []
    for batch in read_samples(args, size, (RGB,), device):
        key = (args.seed, "follow")
        x0 = generate(model, batch.captions, batch.indices, size, key, schedule, guidance=args.cfg)
        image = RGB.finish(model.encoders.decode_image(x0[RGB.name]))
        depth = DEPTH.decode(x0[DEPTH.name]).cpu()
        in_image = find_depth(args, judge, image)
        pairs += zip(batch.names, depth, in_image, strict=True)
        rows += paint_rows(batch.names[: 8 - len(rows)], [(RGB, image), (DEPTH, depth), (DEPTH, in_image)])
    labels = ("made with an image, found in it", "the same, found in another image")
    return report_agreement(args, pairs, labels), rows


# ---- image: images from captions ----


def load_features(path, device):
    """Load the TorchScript file of --features: a function as coarse_features. The file is code, which is run.

    It gets uint8 images (B, 3, H, W) in 0..255, as the widely used Inception file wants them, and return_features=True
    if its forward has this argument. It returns (B, d).
    """
    if not Path(path).is_file():
        data.fail(f"--features {path}: no such file")
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError:
        data.fail(f"--features {path}: not a TorchScript file")
    options = {"return_features": True} if "return_features" in str(network.forward.schema) else {}

    def extract(rgb):
        pictures = ((rgb.clamp(-1, 1) + 1) * 127.5).round().byte()
        with torch.no_grad():
            return network(pictures.to(device), **options).flatten(1).cpu().double()

    return extract


def evaluate_image(args, model, device):
    """image: generate images from captions; compare them with the real images of these captions."""
    size = (args.size, args.size)
    world = data.SyntheticWorld("val", size, device)
    extract = load_features(args.features, device) if args.features else coarse_features
    schedule = make_schedule([m.name for m in model.network.modalities], args.steps, args.order)
    captions = []
    features = defaultdict(list)
    colors = defaultdict(list)
    pictures = defaultdict(list)
    for batch in read_samples(args, size, (RGB,), device):
        x0 = generate(model, batch.captions, batch.indices, size, args.seed, schedule, guidance=args.cfg)
        images = {"real": batch.values[RGB.name], "generated": model.encoders.decode_image(x0[RGB.name])}
        if args.data == "synthetic":
            others = [index + (args.images or WORLD_IMAGES) for index in batch.indices]
            images["other real"] = world.samples(others).values[RGB.name]
        captions += batch.captions
        for kind, rgb in images.items():
            features[kind].append(extract(rgb))
            colors[kind] += [colors_in(image) for image in rgb]
            pictures[kind] += [data.paint(RGB, image) for image in rgb[: 8 - len(pictures[kind])]]
    if len(captions) < 2:
        data.fail(f"--data {args.data}: {len(captions)} image; a Frechet distance needs at least two")
    features = {kind: torch.cat(parts) for kind, parts in features.items()}
    return report_image(args, features, colors, captions), list(pictures.items())


def report_image(args, features, colors, captions):
    """Print the Frechet distance and, in the built-in world, how prompts are followed. Returns both by name."""
    print(
        f"{len(captions)} images at {args.size}x{args.size}, {args.steps} steps, guidance {args.cfg.get(RGB.name, 1.0)}"
    )
    results = {"images": len(captions), "features": args.features or "built in"}
    results["frechet"] = frechet_distance(features["generated"], features["real"])
    print(f"{'Frechet distance to the real images':50}{results['frechet']:8.4f}")
    if args.data != "synthetic":
        return results

    shuffled = captions[1:] + captions[:1]
    results["real_frechet"] = frechet_distance(features["other real"], features["real"])
    results["following"] = share_of_requested_colors(colors["generated"], captions)
    results["real_following"] = share_of_requested_colors(colors["real"], captions)
    results["shuffled_following"] = share_of_requested_colors(colors["generated"], shuffled)
    print(f"{'the same of other real images':50}{results['real_frechet']:8.4f}")
    in_real = f"(real: {results['real_following']:.3f})"
    print(f"{'requested colours that appear':50}{results['following']:8.3f}   {in_real}")
    print(f"{'the same against shuffled prompts':50}{results['shuffled_following']:8.3f}")
    return results


# ---- The command line ----

Task = namedtuple("Task", ["evaluate", "entries"])
TASKS = {  # the function, and the modalities that a network must have
    "depth": Task(evaluate_maps, [RGB, DEPTH]),
    "normal": Task(evaluate_maps, [RGB, NORMAL]),
    "image": Task(evaluate_image, [RGB]),
    "follow": Task(evaluate_follow, [RGB, DEPTH]),
    "joint": Task(evaluate_joint, [RGB, DEPTH]),
}
TASKS_OF_FLAG = {
    "align": ("depth", "follow", "joint"),
    "measured": ("depth",),
    "predictions": ("depth",),
    "strength": ("depth", "normal", "follow"),
    "order": ("image", "joint"),
    "judge": ("follow", "joint"),
    "judge_steps": ("follow", "joint"),
    "features": ("image",),
}


def parse():
    p = data.Flags(__doc__)
    p.add_argument("task", choices=tuple(TASKS))
    data.sampling_settings(p)
    data.source_settings(p)
    p.setting("--images", 0, f"number of images; 0 is all, or {WORLD_IMAGES} of the world", data.whole(0, 10**9))
    p.setting("--size", 0, "side in pixels of what the network sees, or of that area; 0 is the network's", data.SIDE)
    p.setting("--steps", 0, f"sampling steps; 0 is {I2D_STEPS} for depth and normal, else 16", data.whole(0, 10**4))
    p.setting("--measured", 0.0, "depth: also complete depth from this share of its true pixels", data.SHARE)
    p.setting("--strength", 1.0, "trust in the input, of depth, normal, follow: 1 is clean, 0 ignored", data.SHARE)
    p.setting("--order", f"{JOINT:g}", "image, joint: log2(alpha), above 0 image first; or names, such as depth,rgb")
    p.setting("--judge", "", "follow, joint: checkpoint that finds depth in images; empty is the one that made them")
    p.setting("--judge-steps", I2D_STEPS, "follow, joint: sampling steps of the judge", data.whole(1, 10**4))
    modes = ("none", "scale", "affine")
    p.setting("--align", "affine", f"alignment of depth before it is scored: {', '.join(modes)}", choices=modes)
    p.setting("--predictions", "", "depth: DIR of another model's NAME.npy, .pfm or .png, to score instead")
    p.setting("--features", "", "image: TorchScript features of the Frechet distance; the file is run, so trust it")
    p.setting("--seed", 0, "of the noise", data.SEED)
    p.setting("--out", "", "directory, new, empty or of an older evaluation; runs/evaluate-TASK if not given")
    args = p.parse_args()
    data.check_depth_range(args)
    for name, tasks in TASKS_OF_FLAG.items():
        value = getattr(args, name)
        if value != p.get_default(name) and args.task not in tasks:
            data.fail(f"--{name.replace('_', '-')} {value}: only for the task {' or '.join(tasks)}")
    if args.predictions and not Path(args.predictions).is_dir():
        data.fail(f"--predictions {args.predictions}: no such directory")
    return args


def complete_settings(args, model):
    """The settings, with the defaults that depend on the task, the network and the benchmark."""
    settings = argparse.Namespace(**vars(args))
    settings.out = args.out or f"runs/evaluate-{args.task}"
    settings.steps = args.steps or (I2D_STEPS if args.task in ("depth", "normal") else 16)
    if model is not None:
        settings.size = args.size or model.network.config.size
        settings.order = data.parse_order(args.order, [m.name for m in model.network.modalities])
        for entry in TASKS[args.task].entries:
            if isinstance(settings.order, list) and entry.name not in settings.order:
                data.fail(f"--order {args.order}: {entry.name}, which is scored, would stay noise; add it")

    size, depth_max = BENCHMARKS.get(Path(args.data).name.lower(), ((settings.size, settings.size), 0.0))
    settings.scored_at = size
    settings.depth_max = args.depth_max or depth_max
    if 0 in size:
        data.fail(f"--predictions {args.predictions}: give --size, the side at which their depth is scored")
    return settings


def main():
    args = parse()
    device = data.pick_device(args.device)
    model = None if args.predictions else open_model(args.checkpoint, "--checkpoint", args, device)
    args = complete_settings(args, model)
    out = data.claim_folder(args.out, "results.json")
    if (out / "results.json").exists() and b'"checkpoint": ' not in (out / "results.json").read_bytes():
        data.fail(f"--out {out}: holds a results.json that this script has not written; choose another directory")
    results, pictures = TASKS[args.task].evaluate(args, model, device)
    data.write_json(out / "results.json", {**vars(args), **results})
    labels, rows = zip(*pictures, strict=True)
    data.write_image(out / "grid.png", data.draw_grid(rows, labels))
    print(f"wrote {out / 'results.json'}")


if __name__ == "__main__":
    data.run_script(main)
