"""Measure a network: depth and normals from images, image quality, and how well image and depth agree.

    python evaluate.py depth                                  depth from images of the built-in world
    python evaluate.py depth --data eval/NYUv2 --ensemble 10  on a benchmark, the median of ten samples per image
    python evaluate.py depth --data eval/NYUv2 --predictions maps/other   depth maps that another model has saved
    python evaluate.py depth --measured 0.05                  also complete sparse depth, in its unit
    python evaluate.py normal --checkpoint normals.pt         surface normals from images
    python evaluate.py image                                  images from captions: Frechet distance, requested colours
    python evaluate.py image --data coco --features inception.pt       FID, by a TorchScript feature extractor
    python evaluate.py follow                                 do images generated from depth have the real ones' depth?
    python evaluate.py joint --order -5                       do image and depth agree when generated together?

AbsRel is the mean of |p - g| / g, and delta1 the share of pixels with max(p/g, g/p) < 1.25, over the valid pixels of an
image and after alignment. A table has the mean over images and its 95% bootstrap interval, of the model and of
references. Each run prints a table and writes results.json and grid.png.
"""

from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from model import DEPTH, I2D_STEPS, MODALITIES, NORMAL, RGB, complete_depth, make_schedule

# ---- Metrics ----


def weighted_median_index(values, weights):
    """Index of the value x that minimises the sum of weights * |x - values|. Both are 1-D arrays."""
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
    return float(ratios[weighted_median_index(ratios, weights)]), 0.0


def align_affine(p, g):
    """(scale, shift) that minimise the sum of |scale p + shift - g| / g.

    For a fixed scale the best shift is a weighted median of g - scale p. With that shift the sum is convex in the
    scale, so bisection on its slope finds the minimum to the precision of float64.
    """
    weights = 1 / g

    def slope(scale):
        """A subgradient of the sum with respect to the scale, at the best shift."""
        residual = scale * p - g
        middle = residual[weighted_median_index(residual, weights)]
        signs = np.sign(residual - middle)
        on_line = residual == middle  # at the best shift these balance all others
        signs[on_line] = -(weights @ signs) / weights[on_line].sum()
        return (weights * signs) @ p

    scale = 0.0
    if np.ptp(p) > 0:
        high = np.ptp(g) / np.ptp(p)
        while slope(-high) > 0 or slope(high) < 0:
            high *= 2
        low = -high
        for _ in range(64):
            scale = (low + high) / 2
            if slope(scale) > 0:
                high = scale
            else:
                low = scale

    offsets = g - scale * p
    return float(scale), float(offsets[weighted_median_index(offsets, weights)])


def align_map(prediction, target, valid, mode="affine"):
    """Align prediction (1, H, W) to target (1, H, W) on valid (1, H, W), or on a subsample of it if the map is large.

    The subsample has the valid pixel nearest to the centre of each of 64 x 64 cells.
    """
    height, width = valid.shape[1:]
    pixel_index = np.arange(height * width).reshape(height, width)
    cells = (min(64, height), min(64, width))
    chosen, has_pixel = data.nearest(pixel_index, valid[0].numpy(), cells, (0, 0, width, height))
    chosen = chosen[has_pixel]
    scale, shift = align(prediction.flatten()[chosen], target.flatten()[chosen], mode)
    return prediction * scale + shift


def depth_metrics(prediction, target, valid, mode="affine"):
    """Score one depth map; prediction, target and valid are (1, H, W).

    Returns ((AbsRel, delta1), aligned prediction (1, H, W), error (1, H, W) to paint).
    """
    aligned = align_map(prediction, target, valid, mode)
    p = aligned[valid].double()
    g = target[valid].double()
    absrel = ((p - g).abs() / g).mean()
    ratio = torch.maximum(p / g, g / p.clamp(min=1e-9))  # large where p is negative
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


Metric = namedtuple("Metric", ["measure", "keys"])
METRICS = {  # by encoding: the function, and the keys of its two scores in results.json
    "relative depth": Metric(depth_metrics, ["absrel", "delta1"]),
    "unit vectors": Metric(normal_metrics, ["degrees", "below_11.25"]),
}


def coarse_features(rgb):
    """Mean colours of 4 x 4 cells and mean absolute differences of grey in them: (B, 3, H, W) -> (B, 80) float64."""
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
    is_found = []
    for colors, caption in zip(found, captions, strict=True):
        is_found += [word in colors for word in caption.split() if word in data.COLORS]
    return sum(is_found) / max(len(is_found), 1)


def bootstrap_interval(values, draws=2000):
    """Values of n images -> [low, high], the 95% bootstrap interval of their mean."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.percentile(values[chosen].mean(1), (2.5, 97.5)).tolist()


# ---- Networks and samples ----

WORLD_IMAGES = 128  # images of the built-in world if --images is 0
MEAN_IMAGES = 2048  # at most, in the mean map
GENERATION_STEPS = 16  # sampling steps if images are generated; pictures have more (model.SAMPLING_STEPS)
Model = namedtuple("Model", ["network", "encoders"])


def open_model(path, flag, args, device):
    """Load a checkpoint's averaged network and its encoders onto the device. Exit code 2 if it cannot do the task."""
    network, state = data.open_network(path, flag, args.backbone)
    encoders = data.open_encoders(args.encoders, device, network.config, state["settings"].get("encoders", ""))
    for modality in TASKS[args.task].modalities:
        if modality.name not in [m.name for m in network.modalities]:
            data.fail(f"{flag} {path}: has no {modality.name}; train it with --modalities rgb,{modality.name}")
    if args.size % network.config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch size of {path}, {network.config.patch}")
    return Model(network.place(device, frozen=True), encoders)


def read_samples(args, modalities, device):
    """Iterate over the batches to evaluate, at args.map_size, with the values of some modalities."""
    source = data.open_source(args, "val", args.map_size, modalities, device)
    images_per_batch = max(1, args.batch_size // args.ensemble)
    return data.in_order(source, args.images or None, images_per_batch, device, args.workers)


def generate(model, captions, indices, size, key, schedule, given=None, guidance=None):
    """Sample all modalities for B captions: {m: (B, C, h, w)}, to be decoded. (key, index) seeds a sample's noise."""
    device = next(model.network.parameters()).device
    rng = data.PerSampleRNG(key, indices)
    noise = {m.name: rng.randn(*m.shape(size)).to(device) for m in model.network.modalities}
    text = model.encoders.encode_text(captions).to(device)
    return model.network.sample(schedule, noise, text, given, guidance, no_text=model.encoders.no_text)


def estimate(model, modality, rgb, indices, args, steps, strength=1.0):
    """Generate a modality from images rgb (B, 3, H, W) in [-1, 1]: maps (B, C, H, W) on the CPU.

    The network sees an image at the size nearest to args.size^2 in area that keeps its aspect. A map is the median of
    args.ensemble samples; depth is divided by its mean, so they need no alignment.
    """
    full_size = tuple(rgb.shape[2:])
    size = model.network.config.fit(*full_size, args.size)
    if size != full_size:
        rgb = F.interpolate(rgb, size, mode="bicubic", antialias=True).clamp(-1, 1)
    image = model.encoders.encode_image(rgb).repeat_interleave(args.ensemble, 0)

    schedule = make_schedule([m.name for m in model.network.modalities], steps, strength={RGB.name: strength})
    members = [index + (k << 32) for index in indices for k in range(args.ensemble)]
    x0 = generate(model, [""] * len(members), members, size, args.seed, schedule, {RGB.name: (image, None)})

    maps = modality.decode(x0[modality.name]).cpu().unflatten(0, (-1, args.ensemble))  # (B, ensemble, C, h, w)
    median = torch.from_numpy(np.median(maps.numpy(), axis=1))
    return modality.finish(F.interpolate(median, full_size, mode="bilinear"))


# ---- depth, normal, follow, joint: scores of maps ----

BENCHMARKS = {  # last part of --data: size of its maps (MoGe's, except for ScanNet), largest depth in metres or 0
    "nyuv2": ((480, 640), 10.0),
    "kitti": ((375, 750), 80.0),
    "eth3d": ((1365, 2048), 0.0),
    "scannet": ((480, 640), 10.0),
    "diode": ((768, 1024), 350.0),
}
LABELS = {  # prefix of the keys in results.json: row of the table
    "": "this model",
    "completed_": "completed by it, not aligned",
    "filled_": "measured alone, not aligned",
    "baseline_": "mean true map, blind to the image",
    "shuffled_": "from the image of another sample",
    "other_": "against another sample",
}
Prediction = namedtuple("Prediction", ["maps", "target", "valid", "mode"])  # three (B, C, H, W); mode of align


def mean_map(args, modality):
    """The best guess blind to the image, (C, H, W): the mean true map of these images, or of the world's training."""
    split = "train" if args.data == "synthetic" else "val"
    count = MEAN_IMAGES if args.data == "synthetic" else args.images or MEAN_IMAGES
    source = data.open_source(args, split, args.map_size, (RGB, modality))
    total = 0
    num_valid = 0
    for batch in data.in_order(source, count, 16):
        valid = batch.valid[modality.name]
        x0 = modality.encode(batch.values[modality.name], valid)
        total = total + torch.where(valid, x0, 0.0).sum(0, keepdim=True)
        num_valid = num_valid + valid.sum(0, keepdim=True)
    return modality.finish(modality.decode(total / num_valid.clamp(min=1)))[0]


def load_map(args, name):
    """Read the depth map NAME.npy or NAME.png of --predictions, of the size that is scored: (1, H, W)."""
    path = Path(args.predictions, f"{name}.npy")
    if not path.is_file():
        path = path.with_suffix(".png")
    scale = args.depth_scale if path.suffix == ".png" else 1.0
    try:
        with data.reading(path):
            depth, _ = data.read_map(DEPTH, path.name, path.read_bytes(), scale=scale)
            if depth.shape[:2] != args.map_size:
                raise data.BadSample(f"has shape {depth.shape[:2]}; must have that of the true map, {args.map_size}")
    except data.BadSample as error:
        data.fail(f"--predictions {error}")
    return torch.from_numpy(depth).movedim(-1, 0)


def complete(args, maps, target, valid, indices):
    """Complete depth (B, 1, H, W) from a share of its pixels: by the estimated maps, and by interpolation alone.

    Returns {prefix: Prediction}, in the unit of the target, to be scored where it was not measured.
    """
    chance = data.PerSampleRNG((args.seed, "measured"), indices).rand(*target.shape[1:])
    measured = valid & (chance < args.measured)
    rest = valid & ~measured
    if not measured.flatten(1).any(1).all() or not rest.flatten(1).any(1).all():
        data.fail(f"--measured {args.measured}: a sample keeps no pixel, or all of them; give another share")

    relative = {"completed_": maps, "filled_": torch.ones_like(target)}
    return {key: Prediction(complete_depth(x, target, measured), target, rest, "none") for key, x in relative.items()}


def predict_from_images(args, model, device):
    """depth, normal: estimate maps of images. Yields (batch, images, {prefix: Prediction})."""
    modality = MODALITIES[args.task]
    world = data.SyntheticWorld("val", args.map_size, device)
    mean = mean_map(args, modality)
    for batch in read_samples(args, (RGB, modality), device):
        rgb = batch.values[RGB.name]
        target = batch.values[modality.name].cpu()
        valid = batch.valid[modality.name].cpu()
        if args.predictions:
            maps = torch.stack([load_map(args, name) for name in batch.names])
        else:
            maps = estimate(model, modality, rgb, batch.indices, args, args.steps, args.strength)

        predictions = {"": Prediction(maps, target, valid, args.align)}
        predictions["baseline_"] = Prediction(mean.expand_as(maps), target, valid, args.align)
        if args.data == "synthetic" and not args.predictions:
            other_rgb = world.samples([max(i - 1, 0) for i in batch.indices]).values[RGB.name]
            maps_of_others = estimate(model, modality, other_rgb, batch.indices, args, args.steps, args.strength)
            predictions["shuffled_"] = Prediction(maps_of_others, target, valid, args.align)
        if args.measured:
            predictions.update(complete(args, maps, target, valid, batch.indices))
        yield batch, rgb, predictions


def predict_agreement(args, model, device):
    """follow, joint: let the judge estimate depth in generated images (Sec. 4.3). Yields as predict_from_images does.

    follow generates images from depth: the judge should estimate the same depth in them as in the real images. joint
    generates images and depth from captions: the judge should estimate this depth in the images.
    """
    judge = open_model(args.judge, "--judge", args, device) if args.judge else model
    strength = {DEPTH.name: args.strength} if args.task == "follow" else {}
    schedule = make_schedule([m.name for m in model.network.modalities], args.steps, args.order, strength)
    key = (args.seed, "follow")  # other noise than the estimates have

    def estimate_depth(images):
        same_noise = [0] * len(images)  # so that estimates differ only because the images do
        return estimate(judge, DEPTH, images, same_noise, args, args.judge_steps)

    last_target = torch.zeros(1, 1, *args.map_size)
    for batch in read_samples(args, (RGB, DEPTH), device):
        given = {}
        if args.task == "follow":
            valid = batch.valid[DEPTH.name]
            given[DEPTH.name] = (DEPTH.encode(batch.values[DEPTH.name], valid), valid)
        x0 = generate(model, batch.captions, batch.indices, args.map_size, key, schedule, given, args.cfg)

        image = RGB.finish(model.encoders.decode_image(x0[RGB.name]))
        estimated = estimate_depth(image)
        if args.task == "follow":
            depth = estimated
            target = estimate_depth(batch.values[RGB.name])
        else:
            depth = DEPTH.decode(x0[DEPTH.name]).cpu()
            target = estimated

        other_target = torch.cat([last_target, target[:-1]])
        last_target = target[-1:]
        predictions = {}
        for prefix, truth in {"": target, "other_": other_target}.items():
            surface = truth > 0.01 * truth.mean((1, 2, 3), keepdim=True)  # skips pixels of almost no depth
            predictions[prefix] = Prediction(depth, truth, surface, args.align)
        yield batch, image, predictions


def score_map(args, modality, name, prediction, target, valid, mode):
    """Call the metric of a modality on the map of one sample. Exit code 2 if there is no finite score."""
    if not valid.any():
        data.fail(f"--data {args.data}: {name} has no valid {modality.name}; leave it out")
    scores, aligned, error = METRICS[modality.encoding].measure(prediction, target, valid, mode)
    if not np.isfinite(scores).all():
        data.fail(f"{modality.name} of {name} has no finite score; check --predictions or --checkpoint")
    return scores, aligned, error


def evaluate_maps(args, model, device):
    """depth, normal, follow, joint: score the maps that the task predicts."""
    task = TASKS[args.task]
    modality = task.modalities[1]  # the first is the image
    scores = defaultdict(list)  # {prefix: [two scores of each image]}
    per_image = {}
    pictures = {}
    for batch, images, predictions in task.predict(args, model, device):
        for prefix, (maps, target, valid, mode) in predictions.items():
            for i, name in enumerate(batch.names):
                if batch.indices[i] == 0 and prefix in ("shuffled_", "other_"):
                    continue  # they use the sample before, and the first has none
                score, aligned, error = score_map(args, modality, name, maps[i], target[i], valid[i], mode)
                scores[prefix].append(score)
                if prefix == "":
                    per_image[name] = score
                if prefix == "" and len(pictures) < 6:
                    label = f"{name[-14:]}\n{score[0]:.3f}"
                    pictures[label] = paint_row(modality, images[i], target[i], aligned, error, valid[i])

    print(f"{args.data}: {len(scores[''])} images of size {args.map_size}; {args.predictions or args.checkpoint}")
    results = print_table(METRICS[modality.encoding].keys, scores)
    results["per_image"] = per_image
    return results, pictures


def paint_row(modality, rgb, target, aligned, error, valid):
    """Pictures of image, target, aligned prediction, and its error from black to orange."""
    heat = torch.where(valid, error.clamp(0, 1), 0.0)[0, :, :, None].numpy()
    maps = [data.paint(modality, x, valid) for x in (target, aligned)]
    return [data.paint(RGB, rgb), *maps, (heat * (255, 153, 77)).astype(np.uint8)]


def print_table(keys, scores):
    """Print means and intervals of scores {prefix: [two scores of each image]}. Returns {prefix + key: number}."""
    print(f"{'':34}" + "".join(f"{key + '  95% interval':26}" for key in keys))
    results = {}
    for prefix, scores_of_images in scores.items():
        results[f"{prefix}images"] = len(scores_of_images)
        line = f"{LABELS[prefix]:34}"
        for key, values in zip(keys, np.transpose(scores_of_images), strict=True):
            low, high = bootstrap_interval(values)
            results[f"{prefix}{key}"] = float(values.mean())
            results[f"{prefix}{key}_95"] = [low, high]
            line += f"{values.mean():7.4f} [{low:.4f}, {high:.4f}]  "
        print(line)
    return results


# ---- image: images from captions ----


def load_features(path, device):
    """Load the TorchScript file of --features: a function from images (B, 3, H, W) in [-1, 1] to features (B, d).

    The file, which is run, takes uint8 images and return_features=True, as the widely used Inception file does.
    """
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError):
        data.fail(f"--features {path}: no such file, or not a TorchScript file")

    @torch.no_grad()
    def extract(rgb):
        pictures = ((rgb.clamp(-1, 1) + 1) * 127.5).round().byte()
        return network(pictures.to(device), return_features=True).flatten(1).cpu().double()

    return extract


def evaluate_image(args, model, device):
    """image: generate images from captions; compare them with the real images of these captions."""
    world = data.SyntheticWorld("val", args.map_size, device)
    extract = load_features(args.features, device) if args.features else coarse_features
    schedule = make_schedule([m.name for m in model.network.modalities], args.steps, args.order)
    captions = []
    features = defaultdict(list)
    colors = defaultdict(list)
    pictures = defaultdict(list)
    for batch in read_samples(args, (RGB,), device):
        x0 = generate(model, batch.captions, batch.indices, args.map_size, args.seed, schedule, guidance=args.cfg)
        images = {"real": batch.values[RGB.name], "generated": model.encoders.decode_image(x0[RGB.name])}
        if args.data == "synthetic":
            images["other real"] = world.samples([i + args.images for i in batch.indices]).values[RGB.name]
        captions += batch.captions
        for kind, rgb in images.items():
            features[kind].append(extract(rgb))
            colors[kind] += [colors_in(image) for image in rgb]
            pictures[kind] += [data.paint(RGB, image) for image in rgb[: 8 - len(pictures[kind])]]
    if len(captions) < 2:
        data.fail(f"--images {args.images}: {len(captions)} is too few; a Frechet distance needs at least two")
    features = {kind: torch.cat(parts) for kind, parts in features.items()}
    return report_image(args, features, colors, captions), pictures


def report_image(args, features, colors, captions):
    """Print and return scores of images {kind: of each image}: Frechet distances and, in the world, colours.

    "following" is the share of the requested colours that appear, "shuffled_" of those that another caption requests,
    and "real_" a score of real images.
    """
    scores = {"frechet": frechet_distance(features["generated"], features["real"])}
    if args.data == "synthetic":
        scores["real_frechet"] = frechet_distance(features["other real"], features["real"])
        scores["following"] = share_of_requested_colors(colors["generated"], captions)
        scores["shuffled_following"] = share_of_requested_colors(colors["generated"], captions[1:] + captions[:1])
        scores["real_following"] = share_of_requested_colors(colors["real"], captions)
    print(f"{args.data}: {len(captions)} images; {args.checkpoint}")
    for key, score in scores.items():
        print(f"{key:34}{score:7.4f}")
    scores["images"] = len(captions)
    return scores


# ---- The command line ----

Task = namedtuple("Task", ["evaluate", "predict", "modalities", "flags"])
ESTIMATE = {"ensemble", "strength"}  # flags of tasks that estimate maps, and of those with a judge
JUDGE = {"align", "cfg", "judge", "judge_steps"}
TASKS = {  # two functions, the modalities that a network must have, and the flags that other tasks refuse
    "depth": Task(evaluate_maps, predict_from_images, [RGB, DEPTH], {*ESTIMATE, "align", "measured", "predictions"}),
    "normal": Task(evaluate_maps, predict_from_images, [RGB, NORMAL], ESTIMATE),
    "image": Task(evaluate_image, None, [RGB], {"cfg", "features", "order"}),
    "follow": Task(evaluate_maps, predict_agreement, [RGB, DEPTH], {*ESTIMATE, *JUDGE}),
    "joint": Task(evaluate_maps, predict_agreement, [RGB, DEPTH], {"ensemble", "order", *JUDGE}),
}


def parse():
    p = data.Flags(__doc__)
    p.add_argument("task", choices=tuple(TASKS))
    data.sampling_settings(p)
    data.source_settings(p)
    p.setting("--images", 0, f"number of images; 0 is all, or {WORLD_IMAGES} of the world", data.whole(0, 10**9))
    p.setting("--size", 0, "side in pixels of what the network sees, or of that area; 0 is the network's", data.SIDE)
    steps = f"sampling steps; 0 is {I2D_STEPS} for depth and normal, else {GENERATION_STEPS}"
    p.setting("--steps", 0, steps, data.whole(0, 10**4))
    p.setting("--measured", 0.0, "depth: also complete depth from this share of its true pixels", data.SHARE)
    p.setting("--strength", 1.0, "depth, normal, follow: trust in the input; 1 is full, 0 is none", data.SHARE)
    p.setting("--order", "joint", "image, joint: 'joint', log2(alpha) (above 0 image first), or names as depth,rgb")
    p.setting("--judge", "", "follow, joint: checkpoint of this kind that estimates depth (default: --checkpoint)")
    p.setting("--judge-steps", I2D_STEPS, "follow, joint: sampling steps of the judge", data.whole(1, 10**4))
    p.setting("--align", "affine", "alignment of depth: none, scale or affine", choices=("none", "scale", "affine"))
    p.setting("--predictions", "", "depth: DIR with NAME.npy or NAME.png of another model, to score instead")
    p.setting("--features", "", "image: TorchScript features of the Frechet distance; the file is run, so trust it")
    p.setting("--seed", 0, "seed of the noise", data.SEED)
    p.setting("--out", "", "directory, new, empty or of an older evaluation (default: runs/evaluate-TASK)")
    args = p.parse_args()
    for task in TASKS.values():
        for name in task.flags - TASKS[args.task].flags:
            if getattr(args, name) != p.get_default(name):
                data.fail(f"--{name.replace('_', '-')}: the task {args.task} does not use it; leave it out")
    return args


def resolve_settings(args, model):
    """Replace the settings that are left to the task, the network or the benchmark, and set args.map_size."""
    args.out = args.out or f"runs/evaluate-{args.task}"
    args.steps = args.steps or (I2D_STEPS if args.task in ("depth", "normal") else GENERATION_STEPS)
    if args.data == "synthetic":
        args.images = args.images or WORLD_IMAGES
    if model:
        args.size = args.size or model.network.config.size
        args.order = data.parse_order(args.order, [m.name for m in model.network.modalities])
        scored = {m.name for m in TASKS[args.task].modalities}
        if isinstance(args.order, list) and not scored <= set(args.order):
            data.fail(f"--order {','.join(args.order)}: must name {' and '.join(sorted(scored))}, which are scored")

    own_size = (args.size, args.size)
    map_size, depth_max = BENCHMARKS.get(Path(args.data).name.lower(), (own_size, 0.0))
    args.map_size = map_size if args.task in ("depth", "normal") else own_size
    args.depth_max = args.depth_max or depth_max
    if 0 in args.map_size:
        data.fail(f"--predictions {args.predictions}: requires --size, the side of the maps")


def main():
    args = parse()
    device = data.pick_device(args.device)
    model = None if args.predictions else open_model(args.checkpoint, "--checkpoint", args, device)
    resolve_settings(args, model)
    out = data.claim_folder(args.out, "results.json")

    scores, pictures = TASKS[args.task].evaluate(args, model, device)
    results = vars(args) | scores
    data.write_json(out / "results.json", results)
    data.write_image(out / "grid.png", data.draw_grid(list(pictures.values()), list(pictures)))
    print(f"wrote {out / 'results.json'}; look at {out / 'grid.png'}")


if __name__ == "__main__":
    data.run_script(main)
