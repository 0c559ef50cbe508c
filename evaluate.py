"""How good is it? Depth accuracy, image quality, and how image and depth agree, each beside its references.

    python evaluate.py depth                                  image-to-depth on the built-in world
    python evaluate.py depth --data eval/NYUv2,eval/DIODE     on benchmarks, as MoGe's evaluation folders have them
    python evaluate.py depth --data eval/NYUv2 --ensemble 10  the median of ten samples an image
    python evaluate.py depth --data eval/NYUv2 --predictions maps/other   another model's saved maps
    python evaluate.py depth --measured 0.05                  and sparse depth completed, in its unit
    python evaluate.py image                                  text-to-image: Frechet distance and requested colours
    python evaluate.py image --data coco --features inception.pt       FID by a TorchScript feature extractor
    python evaluate.py follow                                 depth-to-image: does the image have the given depth?
    python evaluate.py joint --order -5                       image and depth made together: do they agree?

AbsRel = mean |p - g| / g and delta1 = share with max(p/g, g/p) < 1.25, over the valid pixels of an image, after
alignment; then the mean over images, with its 95% bootstrap interval. A call prints a table and writes results.json and
grid.png.
"""

import argparse
import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from model import I2D_STEPS, JOINT, Config, DiT, complete_depth, noise_levels, normalize_depth, uncontract

BENCHMARKS = {  # last part of --data: (size at which depth is scored, MoGe's but for ScanNet; depth kept up to, metres)
    "nyuv2": ((480, 640), 10.0),
    "kitti": ((375, 750), 80.0),
    "eth3d": ((1365, 2048), 0.0),
    "scannet": ((480, 640), 10.0),
    "diode": ((768, 1024), 350.0),
}


def benchmark(name):
    """The entry of BENCHMARKS for a --data folder, or None."""
    return BENCHMARKS.get(Path(name).name.lower())


def images_at_a_time(args):
    """How many images make --batch-size samples for the network: one image is several in an ensemble, or guided."""
    copies = 1 if args.task == "depth" or args.cfg == 1 else 2
    return max(1, args.batch_size // max(copies, args.ensemble))


def samples_of(args, size, device, with_depth=True):
    """(values, valid, captions, names, shapes, indices) of the samples to evaluate; no name may come twice."""
    source = data.open_source(args, "val", size, device, with_depth)
    seen, start = set(), 0
    count = args.images or (128 if args.data == "synthetic" else None)
    batches = data.in_order(source, count, images_at_a_time(args), device, args.workers)
    for values, valid, captions, names, shapes in batches:
        for name in names:
            if name in seen and args.task != "image":
                data.fail(f"--data {args.data}: two samples are called {name}, so their maps cannot be told apart")
            if args.save_predictions and ".." in Path(name).parts:
                data.fail(f"--save-predictions {args.save_predictions}: sample {name} leads out of it; rename that")
            seen.add(name)
        yield values, valid, captions, names, shapes, range(start, start + len(names))
        start += len(names)
    if not seen:
        data.fail(f"--data {args.data}: no samples")


# ---- Depth ----

I2D, BLIND, OTHER = "image to depth", "mean depth map, input-blind", "given another scene's image"
COMPLETED, FILLED = "completed, not aligned", "nearest measured, not aligned"
KEYS = {"": I2D, "completed_": COMPLETED, "filled_": FILLED, "baseline_": BLIND, "shuffled_": OTHER}


def weighted_median(values, weights):
    """argmin over x of sum w |x - v| for 1-D arrays; returns the index of the minimiser in values."""
    order = np.argsort(values, kind="stable")
    return order[np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]


def align(prediction, target, mode="affine"):
    """(scale, shift), two floats, that best map prediction p on target g > 0: 1-D tensors of n valid points.

    mode "none"    (1, 0)
         "scale"   minimises sum |scale p - g| / g, shift = 0
         "affine"  minimises sum |scale p + shift - g| / g, exactly (MoGe's "ROE" objective)
         "lstsq"   minimises sum (scale p + shift - g)^2, as Marigold's evaluation does
    """
    p, g = (np.asarray(x, np.float64) for x in (prediction, target))
    if mode == "none":
        return 1.0, 0.0
    if mode == "scale":
        p, g = p[p != 0], g[p != 0]
        return (float((g / p)[weighted_median(g / p, np.abs(p) / g)]) if len(p) else 1.0), 0.0
    if mode == "lstsq":
        scale, shift = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), g, rcond=None)[0]
        return float(scale), float(shift)
    # Some minimiser passes through two of the points. The best line through one point is a weighted median of slopes,
    # and passes through a second point, about which one can turn next. The objective is convex and linear between the
    # lines of the (scale, shift) plane on which a residual is zero, so once no point on the current line offers a
    # better one, it is the minimum. Turning about a point pays only if the points off the line pull more than those on
    # it hold.
    weights, tried, rounding = 1 / g, set(), 1e-12 * g.max()
    scale, shift = 0.0, g[weighted_median(g, weights)]
    residual = shift - g
    queue = list(np.flatnonzero(np.abs(residual) <= rounding))
    while queue:
        i = queue.pop()
        tried.add(i)
        on_line, arm = np.abs(residual) <= rounding, p - p[i]
        pull, hold = weights * ~on_line * np.sign(residual) @ arm, weights * on_line @ np.abs(arm)
        others = np.flatnonzero(arm)
        if not len(others) or (on_line[i] and abs(pull) < hold * (1 - 1e-9)):
            continue
        slopes = (g[others] - g[i]) / arm[others]
        j = weighted_median(slopes, weights[others] * np.abs(arm[others]))
        turned = slopes[j] * arm + g[i] - g
        if np.abs(turned) @ weights < np.abs(residual) @ weights * (1 - 1e-12):
            scale, shift, residual, tried = slopes[j], g[i] - slopes[j] * p[i], turned, {i}
            on_line = np.abs(residual) <= rounding
        queue = [k for k in {*np.flatnonzero(on_line), others[j]} if k not in tried]
    return float(scale), float(shift)


def align_map(prediction, target, valid, mode="affine"):
    """prediction (1, H, W) aligned to target (1, H, W) on valid; L1 modes see 64 x 64 nearest-valid points of it."""
    points = valid
    if mode in ("scale", "affine"):
        height, width = valid.shape[1:]
        pixels = np.arange(height * width).reshape(height, width)
        grid = min(64, height), min(64, width)
        chosen, known = data.nearest(pixels, valid[0].numpy(), grid, (0, 0, width, height))
        points = torch.zeros_like(valid).view(-1).index_fill(0, torch.from_numpy(chosen[known]), True).view(valid.shape)
    scale, shift = align(prediction[points], target[points], mode)
    return prediction * scale + shift


def depth_metrics(prediction, target, valid, mode="affine"):
    """(AbsRel, delta1, aligned prediction) of one map; prediction, target, valid (1, H, W).

    AbsRel = mean |p - g| / g; delta1 = share of valid pixels with max(p/g, g/p) < 1.25, a negative p being outside.
    """
    aligned = align_map(prediction, target, valid, mode)
    p, g = aligned[valid].double(), target[valid].double()
    ratio = torch.maximum(p / g, g / p.clamp(min=1e-9))
    return ((p - g).abs() / g).mean().item(), (ratio < 1.25).double().mean().item(), aligned


def estimate_depth(model, encoders, rgb, indices, args, steps, measured=None, strength=1.0):
    """Image to depth: rgb (B, 3, H, W) in [-1, 1] -> list of relative depth (1, H, W) on the CPU.

    The network sees the image at the size nearest to args.size^2 in area that keeps its aspect. The noise of sample k
    of image i follows from (seed, indices[i], k), whatever the batch; all members are relative to their mean, so their
    median needs no alignment. measured: (depth, valid), each (B, 1, H, W), of sparse depth, which is completed, in its
    own unit. strength: how far the image is trusted.
    """
    size, shape = model.config.fit(*rgb.shape[2:], args.size), tuple(rgb.shape[2:])
    image = rgb if size == shape else F.interpolate(rgb, size, mode="bicubic", antialias=True).clamp(-1, 1)
    repeat, (first, depth, *_) = lambda x: x.repeat_interleave(args.ensemble, 0).to(rgb.device), model.modalities
    known = {first.name: (repeat(encoders.encode_image(image)), None)}
    if measured:
        box = 0, 0, shape[1], shape[0]
        seen = [data.nearest(x[0].numpy(), k[0].numpy(), size, box) for x, k in zip(*measured, strict=True)]
        known[depth.name] = [repeat(torch.from_numpy(np.stack(part))[:, None]) for part in zip(*seen, strict=True)]
    members = [i + (k << 32) for i in indices for k in range(args.ensemble)]
    draws = data.Draws(args.seed, members)  # one for all modalities: their noise is independent
    noise = {m.name: draws.randn(*m.shape(size)).to(rgb.device) for m in model.modalities}
    text = encoders.encode_text([""] * len(members)).to(rgb.device)
    levels = noise_levels([m.name for m in model.modalities], steps, strength={first.name: strength})
    made = model.sample(levels, noise, text, known, solver=args.solver)[depth.name]
    maps = F.interpolate(depth.decode(made, *known.get(depth.name, ())), shape, mode="bilinear").cpu()
    maps = [torch.from_numpy(np.median(members, 0)) for members in maps.split(args.ensemble)]
    return list(complete_depth(torch.stack(maps), *measured)) if measured else maps


def fill(depth, known):
    """Every pixel gets the depth of the nearest known one: depth, known (H, W) -> (H, W)."""
    (height, width), far = depth.shape, 1 << 20
    rows, columns = np.arange(height)[:, None], np.arange(width)
    above = np.maximum.accumulate(np.where(known, rows, -far))
    below = np.minimum.accumulate(np.where(known, rows, far)[::-1])[::-1]
    row = np.where(rows - above < below - rows, above, below)  # of the nearest known one of each column
    apart = (columns[:, None] - columns) ** 2
    column = np.stack([(apart + down).argmin(1) for down in (row - rows) ** 2])
    return depth[row[rows, column], column]


def saved_map(args, folder, name, size, whole):
    """Map NAME.npy, .pfm or .png of a folder -> (1, H, W). Of another size it is of the whole picture (h, w): it is
    cropped as that is, and resized bilinearly, as our own maps are.
    """
    found = [path for s in ("npy", "pfm", "png") if (path := Path(f"{folder}/{name}.{s}")).is_file()]
    if not found:
        data.fail(f"--predictions {folder}: no map for {name} (.npy, .pfm or .png)")
    try:
        scale = args.depth_scale if found[0].suffix == ".png" else 1.0
        values = data.parse(found[0], lambda: data.read_map(str(found[0]), data.read_file(found[0]), scale))
        if not values.size:
            data.refuse(f"{found[0]}: holds no pixel")
        if values.shape == tuple(size):
            return torch.from_numpy(values)[None]
        left, top, right, bottom = data.parse(found[0], data.crop_box, values.shape, whole, size)
    except data.BadSample as error:
        data.fail(f"--predictions {error}")
    axis = lambda low, high, n, length: (2 * (low + (torch.arange(n) + 0.5) * (high - low) / n) / length - 1).float()
    y, x = axis(top, bottom, size[0], values.shape[0]), axis(left, right, size[1], values.shape[1])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    return F.grid_sample(torch.from_numpy(values)[None, None], grid, padding_mode="border", align_corners=False)[0]


def save_map(folder, name, depth):
    """Write depth (1, H, W) as NAME.npy."""
    path = Path(f"{folder}/{name}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(path, data.to_bytes(np.save, depth[0].numpy()))


def blind_map(source, count):
    """The best guess without looking: mean normalised depth map of the first count samples of a source, (1, H, W)."""
    total, seen = 0, 0
    for values, valid, *_ in data.in_order(source, count, 16):
        total += normalize_depth(values["depth"], valid["depth"]).sum(0)
        seen += valid["depth"].sum(0)
    return uncontract(total / seen.clamp(min=1))


def interval(values, draws=2000):
    """Values of n images -> (low, high): 95% bootstrap interval of their mean."""
    values = np.asarray(values)
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return np.percentile(values[chosen].mean(1), (2.5, 97.5)).tolist()


def print_row(label, scores):
    """One line of a table, from (AbsRel, delta1) of each image; returns its numbers."""
    absrel, delta1 = np.array(list(scores)).reshape(-1, 2).T
    row = {"absrel": float(np.mean(absrel)), "delta1": float(np.mean(delta1)), "images": len(absrel)}
    row |= {"absrel_95": interval(absrel), "delta1_95": interval(delta1)}
    spans = [f"{row[key]:7.4f} [{row[f'{key}_95'][0]:.4f}, {row[f'{key}_95'][1]:.4f}]" for key in ("absrel", "delta1")]
    print(f"{label:34}{spans[0]}  {spans[1]}")
    return row


def check_score(score, args, name):
    """Refuse a score that is not finite: values so close together, or so large, that an alignment overflows."""
    if not np.isfinite(score[0]):
        whose = args.predictions or args.judge or args.checkpoint
        data.fail(f"{whose}: depth of {name} cannot be aligned, its values are too close together or too large")


def score_depth(args, model, encoders, device):
    """One dataset -> ({method: {image: (AbsRel, delta1)}}, pictures of the first six images, their labels, size)."""
    synthetic, (size, high) = args.data == "synthetic", benchmark(args.data) or ((args.size, args.size), 0.0)
    size = data.parse_size(args.score_size) if args.score_size else size
    args.depth_max = args.depth_max or high
    source = data.open_source(args, "train" if synthetic else "val", size)
    blind = blind_map(source, 2048 if synthetic else args.images or 2048)
    scores, previous, pictures, labels = {}, None, [], []
    for values, valid, _, names, shapes, indices in samples_of(args, size, device):
        rgb, maps = values["rgb"], {BLIND: [blind] * len(names)}
        if args.predictions:
            maps[I2D] = [saved_map(args, args.predictions, n, size, s) for n, s in zip(names, shapes, strict=True)]
        else:
            given = {"indices": indices, "args": args, "steps": args.steps, "strength": args.strength}
            maps[I2D] = estimate_depth(model, encoders, rgb, **given)
            if synthetic:
                shifted = torch.cat([rgb[:1] if previous is None else previous, rgb[:-1]])
                maps[OTHER] = estimate_depth(model, encoders, shifted, **given)
                previous = rgb[-1:]
        if args.measured:
            chance = data.Draws((args.seed, "measured"), indices).rand(1, *size)
            sparse = values["depth"].cpu(), valid["depth"].cpu() & (chance < args.measured)
            for n, k, whole in zip(names, sparse[1], valid["depth"].cpu(), strict=True):
                if not k.any() or not (whole & ~k).any():
                    data.fail(f"--measured {args.measured}: of {n} it is no pixel, or all; give another share")
            maps[COMPLETED] = estimate_depth(model, encoders, rgb, **given, measured=sparse)
            filled = [fill(x[0].numpy(), k[0].numpy()) for x, k in zip(*sparse, strict=True)]
            maps[FILLED] = [torch.from_numpy(x)[None] for x in filled]
        for i, (index, n) in enumerate(zip(indices, names, strict=True)):
            target, mask, prediction = values["depth"][i].cpu(), valid["depth"][i].cpu(), maps[I2D][i]
            if not mask.any():
                data.fail(f"--data {args.data}: {n} has no valid depth at {size[0]}x{size[1]}, nothing to be scored on")
            if not prediction[mask].isfinite().all():
                data.fail(f"{args.predictions or args.checkpoint}: depth of {n} is not finite where it is known")
            if args.save_predictions:
                save_map(args.save_predictions, n, prediction)
            for method in maps:
                if method != OTHER or index > 0:  # nothing comes before the first image
                    if method in (COMPLETED, FILLED):  # where nothing was measured
                        *score, aligned = depth_metrics(maps[method][i], target, mask & ~sparse[1][i], "none")
                    else:
                        *score, aligned = depth_metrics(maps[method][i], target, mask, args.align)
                    check_score(score, args, n)
                    scores.setdefault(method, {})[n] = score
                    if method == I2D and index < 6:
                        error = ((aligned - target).abs() / target.clamp(min=1e-6) / 0.5).clamp(0, 1)
                        error = torch.where(mask, error, 0.0)  # elsewhere a map may hold NaN
                        heat = (error[0, :, :, None].numpy() * (255, 153, 77)).astype(np.uint8)
                        depths = [data.paint_depth(depth, mask) for depth in (target, aligned)]
                        pictures.append([data.paint_rgb(rgb[i]), *depths, heat])
                        labels.append(f"AbsRel {score[0]:.3f}")
    return scores, pictures, labels, size


def evaluate_depth(args, model, encoders, device):
    """-> (results, {dataset: (rows, labels)}). Columns: image, depth, aligned prediction, error from 0 to 50%."""
    how = args.predictions or f"{args.steps} steps, {args.ensemble} sample(s) an image"
    print(f"{how}; alignment: {args.align}\n{'':34}AbsRel  95% interval      delta1  95% interval")
    results, grids, ours = {}, {}, []
    datasets = args.data.split(",")
    for name in datasets:
        folder = f"/{Path(name).name}" if len(datasets) > 1 else ""
        if folder in grids:
            data.fail(f"--data {args.data}: two folders are called {Path(name).name}; score them one by one")
        options = argparse.Namespace(**vars(args) | {"data": name})
        for key in ("predictions", "save_predictions"):
            setattr(options, key, getattr(args, key) and getattr(args, key) + folder)
        scores, pictures, grid_labels, size = score_depth(options, model, encoders, device)
        limit = f", depth up to {options.depth_max:g} m" if options.depth_max else ""
        print(f"{name}: {len(scores[I2D])} images scored at {size[0]}x{size[1]}{limit}")
        found = {key: print_row(f"  {m}", scores[m].values()) for key, m in KEYS.items() if m in scores}
        ours_error, blind_error = found[""]["absrel"], found["baseline_"]["absrel"]
        undefined = blind_error < 1e-6  # of a pixel or two, or constant depth, which an alignment fits exactly
        ratio = "  undefined: the baseline is exact" if undefined else f"{ours_error / blind_error:7.3f}"
        print(f"{'  ratio to the baseline':34}{ratio}")
        results[name] = {f"{key}{k}": v for key, row in found.items() for k, v in row.items()}
        results[name] |= {"scored_at": size, "depth_max": options.depth_max, "per_image": scores[I2D]}
        ours.append(found[""])
        grids[folder] = pictures, grid_labels
    if len(ours) == 1:
        return results[name], grids
    results["mean"] = {key: float(np.mean([row[key] for row in ours])) for key in ("absrel", "delta1")}
    print(f"{'mean of the datasets':34}{results['mean']['absrel']:7.4f}{'':19}{results['mean']['delta1']:7.4f}")
    return results, grids


AGREEMENT = {  # task: ((maps that are scored, maps they are scored on), title of the row, title of its reference)
    "follow": (("generated", "real"), "found in generated and real image", "the same with another real image"),
    "joint": (("made", "found"), "made with an image, found in it", "the same, found in another image"),
}


def evaluate_agreement(args, model, encoders, device):
    """Do image and depth agree (Sec. 4.3)? follow: the image is made from depth; AbsRel of the depth found in it,
    against that found in the real image. joint: both are made from the caption; AbsRel of the depth, against that found
    in the image. --judge finds it, or the network itself.

    --save-predictions DIR: DIR/generated and DIR/real (made, found) get the maps as NAME.npy, and the images they were
    found in as NAME.png. --predictions DIR: the maps in these places, by whatever estimator, are compared instead.
    """
    kinds, *titles = AGREEMENT[args.task]
    judge, eyes = open_network(args.judge, "--judge", args, device) if args.judge else (model, encoders)
    size, scores, rows, previous = (args.size, args.size), {"": [], "other": []}, [], None
    for values, valid, captions, names, _, indices in samples_of(args, size, device):
        if args.predictions:
            load = lambda kind: [saved_map(args, f"{args.predictions}/{kind}", n, size, size) for n in names]  # noqa: B023
            maps = {kind: load(kind) for kind in kinds}
        else:
            first, depth, *_ = model.modalities
            known = {depth.name: (values[depth.name], valid[depth.name])} if args.task == "follow" else {}
            if known and not valid[depth.name].flatten(1).any(1).all():
                data.fail(f"--data {args.data}: a sample of {names[0]} .. {names[-1]} has no depth to follow")
            draws = data.Draws((args.seed, "follow"), indices)  # other noise than the estimates'
            noise = {m.name: draws.randn(*m.shape(size)).to(device) for m in (first, depth)}
            levels = noise_levels([first.name, depth.name], args.steps, args.order, dict.fromkeys(known, args.strength))
            text = encoders.encode_text(captions).to(device)
            guidance = {first.name: args.cfg}
            made = model.sample(levels, noise, text, known, guidance, solver=args.solver, hints=known)
            image = encoders.decode_image(made[first.name]).clamp(-1, 1)
            pictures = {"generated": image, "real": values["rgb"]} if known else {"found": image}
            maps = {} if known else {"made": list(depth.decode(made[depth.name]).cpu())}
            one = [0] * len(names)  # one noise for all estimates: what they share tells the images' difference alone
            maps |= {k: estimate_depth(judge, eyes, x, one, args, args.judge_steps) for k, x in pictures.items()}
            for i in range(min(len(names), 8 - len(rows))):
                given = [data.paint_depth(values["depth"][i], valid["depth"][i])] if known else []
                depths = [data.paint_depth(d[i]) for d in maps.values()]
                rows.append([*(data.paint_rgb(x[i]) for x in pictures.values()), *given, *depths])
        scored, scored_on = (maps[kind] for kind in kinds)
        for i, n in enumerate(names):
            if not all(m[i].isfinite().all() for m in maps.values()) or not (scored_on[i] > 0).any():
                whose = args.predictions or args.judge or args.checkpoint
                data.fail(f"{whose}: depth of {n} is not finite, or nowhere above 0")
            for kind in maps if args.save_predictions else ():
                save_map(f"{args.save_predictions}/{kind}", n, maps[kind][i])
                if kind in pictures:
                    picture = Image.fromarray(data.paint_rgb(pictures[kind][i]))
                    data.write_image(f"{args.save_predictions}/{kind}/{n}.png", picture)
            for key, target in (("", scored_on[i]), ("other", previous)):
                if target is not None:  # nearer than a hundredth of the mean is no surface
                    surface = target > 0.01 * target.clamp(min=0).mean()
                    score = depth_metrics(scored[i], target, surface, args.align)[:2]
                    check_score(score, args, n)
                    scores[key].append(score)
            previous = scored_on[i]
    finder = args.predictions or f"{args.judge or args.checkpoint}, {args.judge_steps} steps"
    print(f"{len(scores[''])} images at {size[0]}x{size[1]}, alignment: {args.align}; depth found by {finder}")
    print(f"{'':34}AbsRel  95% interval      delta1  95% interval")
    results = print_row(titles[0], scores[""])
    if scores["other"]:
        results |= {f"other_{key}": value for key, value in print_row(titles[1], scores["other"]).items()}
    return results, {"": (rows, [str(i + 1) for i in range(len(rows))])}


# ---- Images ----


def features(rgb):
    """(B, 3, H, W) in [-1, 1] -> (B, 80) float64, in place of a network: colours and edges on a coarse grid.

    48 mean colours of a 4 x 4 grid of cells, and the 32 mean absolute horizontal and vertical differences of grey in
    the cells.
    """
    grey = rgb.mean(1, keepdim=True)
    edges = torch.cat([grey.diff(dim=3).abs()[:, :, 1:], grey.diff(dim=2).abs()[..., 1:]], 1)
    pool = F.adaptive_avg_pool2d
    return torch.cat([pool(rgb, 4).flatten(1), pool(edges, 4).flatten(1)], 1).cpu().double()


def load_features(path, device, size):
    """--features: a TorchScript file -> its features as a function like `features`, tried on two images of size.

    It gets uint8 images (B, 3, H, W) in 0..255, as the widely used Inception file wants them, and return_features=True
    if its forward has this argument; it returns (B, d), floating and finite, d up to 8192. It is code, which is run.
    """
    if not Path(path).is_file():
        data.fail(f"--features {path}: no such file")

    def extract(rgb):
        pictures = ((rgb.clamp(-1, 1) + 1) * 127.5).round().byte()
        with torch.no_grad():
            return network(pictures.to(device), **options).flatten(1).cpu().double()

    try:
        network = torch.jit.load(path, map_location=device).eval()
        options = {"return_features": True} if "return_features" in str(network.forward.schema) else {}
        found = extract(torch.linspace(-1, 1, 6).view(2, 3, 1, 1).expand(2, 3, *size))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        data.fail(f"--features {path}: not a TorchScript file of features ({type(error).__name__}: {error})")
    if len(found) != 2 or not 1 <= found.shape[1] <= 8192 or not found.isfinite().all():
        shape = tuple(found.shape)
        data.fail(f"--features {path}: returned {shape} for two images; must be (2, d), finite, d from 1 to 8192")
    return extract


class Moments:
    """Mean (d,) and covariance (d, d) of rows that come in batches, in float64, by Chan's update."""

    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, x):
        n, mean = self.n + len(x), x.mean(0)
        shift, centred = mean - self.mean, x - mean
        self.scatter = self.scatter + centred.T @ centred + torch.outer(shift, shift) * (self.n * len(x) / n)
        self.mean, self.n = self.mean + shift * (len(x) / n), n

    @property
    def covariance(self):
        return self.scatter / (self.n - 1)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) of two Moments; symmetric roots, so it is real."""
    values, vectors = torch.linalg.eigh(a.covariance)
    half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(half @ b.covariance @ half).clamp(min=0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def colors_in(rgb, share=0.01):
    """Names of the world's object colours that cover at least a share of the picture (3, H, W), told by hue."""
    hsv = lambda rgb: np.asarray(Image.fromarray(rgb).convert("HSV")).astype(int)
    palette = hsv((np.array([list(data.COLORS.values())]) * 255).astype(np.uint8))[0, :, 0]
    hue, saturation, value = hsv(data.paint_rgb(rgb)).reshape(-1, 3).T
    apart = np.abs(hue[:, None] - palette)
    nearest = np.minimum(apart, 256 - apart).argmin(1)[(saturation > 115) & (value > 40)]
    counts = np.bincount(nearest, minlength=len(palette))
    return {name for name, count in zip(data.COLORS, counts, strict=True) if count >= share * len(hue)}


def following(seen, captions):
    """Share of the colours that captions ask for which are among those seen: a set of names per image."""
    asked = [(s, word) for s, line in zip(seen, captions, strict=True) for word in line.split() if word in data.COLORS]
    return sum(word in colors for colors, word in asked) / max(len(asked), 1)


def evaluate_image(args, model, encoders, device):
    """Images from the captions of samples, beside their own images."""
    size, synthetic = (args.size, args.size), args.data == "synthetic"
    extract = load_features(args.features, device, size) if args.features else features
    first, world = model.modalities[0].name, data.World("val", size, device)
    levels = noise_levels([m.name for m in model.modalities], args.steps, args.order)
    made, real, other = Moments(), Moments(), Moments()
    colors, real_colors, asked, rows = [], [], [], [[], []]
    for values, _, captions, _, _, indices in samples_of(args, size, device, with_depth=False):
        text = encoders.encode_text(captions).to(device)
        draws = data.Draws(args.seed, indices)
        noise = {m.name: draws.randn(*m.shape(size)).to(device) for m in model.modalities}
        created = model.sample(levels, noise, text, None, {first: args.cfg}, solver=args.solver)[first]
        created = encoders.decode_image(created)
        made.add(extract(created)), real.add(extract(values["rgb"]))
        if synthetic:
            other.add(extract(world.samples([i + (args.images or 128) for i in indices])[0]["rgb"]))
            colors += [colors_in(x) for x in created]
            real_colors += [colors_in(x) for x in values["rgb"]]
        for row, pictures in zip(rows, (values["rgb"], created), strict=True):
            row += [data.paint_rgb(x) for x in pictures[: 8 - len(row)]]
        asked += captions
    results = {"images": len(asked), "cfg": args.cfg, "features": args.features or "built in"}
    if min(made.n, real.n) < 2:
        data.fail(f"--data {args.data}: {made.n} images; a Frechet distance needs two at least")
    print(f"{len(asked)} images at {args.size}x{args.size}, {args.steps} steps, guidance {args.cfg}")
    results["frechet"] = frechet_distance(made, real)
    print(f"{'Frechet distance to the real images':50}{results['frechet']:8.4f}")
    if synthetic:
        results |= {"real_frechet": frechet_distance(other, real), "following": following(colors, asked)}
        results["shuffled_following"] = following(colors, asked[1:] + asked[:1])
        results["real_following"] = following(real_colors, asked)
        print(f"{'the same of other real images':50}{results['real_frechet']:8.4f}")
        in_real = f"(real: {results['real_following']:.3f})"
        print(f"{'requested colours that appear':50}{results['following']:8.3f}   {in_real}")
        print(f"{'the same against shuffled prompts':50}{results['shuffled_following']:8.3f}")
    return results, {"": (rows, ["real", "from its\ncaption"])}


def open_network(path, flag, args, device):
    """Checkpoint -> (its averaged network, its encoders), on the device. args.size, if 0, becomes its own."""
    state = data.load_checkpoint(path, flag)
    model = DiT(Config(**state["config"])).requires_grad_(False)
    model.load_state_dict(state["ema"])
    encoders = data.open_encoders(args.encoders, device, model.config, state["settings"].get("encoders", ""))
    args.size = args.size or model.config.size
    if args.size % model.config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the patch of {path}, {model.config.patch}")
    if args.task != "image" and "depth" not in [m.name for m in model.modalities]:
        data.fail(f"{flag} {path}: a text-to-image checkpoint knows no depth; give one of train_forcing.py")
    return model.to(device), encoders


def claim_out(path):
    """Make --out. It must be new, or empty, or hold the results.json of an older evaluation."""
    out = data.claim_folder(path, "results.json")
    results = out / "results.json"
    ours = not results.exists()
    with contextlib.suppress(ValueError):
        ours = ours or {"task", "checkpoint"} <= data.parse_json(results.read_bytes()).keys()
    if not ours:
        data.fail(f"--out {path}: holds a results.json that this script has not written; choose another directory")
    return out


def parse():
    p = data.Flags(__doc__)
    p.add_argument("task", choices=("depth", "image", "follow", "joint"))
    data.sampling_settings(p)
    data.source_settings(p)
    p.setting("--images", 0, "number of images; 0 is all, or 128 of the synthetic world", data.whole(0, 10**9))
    p.setting("--size", 0, "side in pixels of what the network sees, or of that area; 0 is the network's", data.SIDE)
    size = "HxW at which depth is scored; empty is a benchmark's own, or --size squared"
    p.setting("--score-size", "", size, data.size_text(2))
    p.setting("--steps", 0, f"sampling steps; 0 is {I2D_STEPS} for depth, 16 for images", data.whole(0, 10**4))
    measured = "depth: also complete this share of the true pixels, and score the others in their unit"
    p.setting("--measured", 0.0, measured, data.SHARE)
    p.setting("--strength", 1.0, "depth, follow: how far what is given is trusted: 1 is clean, 0 ignored", data.SHARE)
    p.setting("--order", f"{JOINT:g}", "image, joint: log2(alpha), above 0 image first; or rgb,depth or depth,rgb")
    p.setting("--judge", "", "follow, joint: checkpoint that finds depth in images; empty is the one that made them")
    steps = "follow, joint: sampling steps of the depth that is found"
    p.setting("--judge-steps", I2D_STEPS, steps, data.whole(1, 10**4))
    modes = "none", "scale", "affine", "lstsq"
    p.setting("--align", "affine", f"of depth, before it is scored: {', '.join(modes)}", data.one_of(*modes))
    p.setting("--predictions", "", "DIR of another model's depth, NAME.npy, .pfm or .png, to score instead")
    p.setting("--save-predictions", "", "new or empty DIR to write unaligned depth to; NAME.npy has --data's NAME")
    p.setting("--features", "", "TorchScript features of the Frechet distance, a file of code that is run: trust it")
    p.setting("--seed", 0, "of the noise", data.SEED)
    out = "new, empty or an older evaluation's directory, whose files are replaced; runs/evaluate-TASK if not given"
    p.setting("--out", "", out)
    args = p.parse_args()
    data.check_depth_range(args)
    args.steps = args.steps or (I2D_STEPS if args.task == "depth" else 16)
    uses = dict.fromkeys(("judge", "judge_steps"), AGREEMENT)
    uses |= {"measured": ["depth"], "strength": ["depth", "follow"], "order": ["image", "joint"]}
    for flag, tasks in uses.items():
        given = getattr(args, flag)
        if given != p.get_default(flag) and (args.task not in tasks or args.predictions):
            name = flag.replace("_", "-")
            data.fail(f"--{name} {given}: for {' and '.join(tasks)}, and without --predictions; leave it out")
    if args.predictions and (args.save_predictions or args.task == "image"):
        data.fail("--predictions: cannot go with --save-predictions, nor with image")
    return args


def check_predictions(args):
    """Refuse saved maps that are not there, or whose size is not known."""
    if not Path(args.predictions).is_dir():
        data.fail(f"--predictions {args.predictions}: no such directory")
    own_size = args.task == "depth" and (args.score_size or all(map(benchmark, args.data.split(","))))
    if not args.size and not own_size:
        data.fail(f"--predictions {args.predictions}: give --size, the side at which their depth is scored")


def check_order(args, model):
    """Refuse an order by which a modality that is scored stays pure noise."""
    scored = [m.name for m in model.modalities[: 1 if args.task == "image" else 2]]
    if isinstance(args.order, list) and args.task in ("image", "joint"):
        for name in scored:
            if name not in args.order:
                data.fail(f"--order {','.join(args.order)}: {name}, which is scored, would stay noise; add it")


def main():
    args = parse()
    device = data.pick_device(args.device)
    model = encoders = None
    if args.predictions:
        check_predictions(args)
    else:
        model, encoders = open_network(args.checkpoint, "--checkpoint", args, device)
        args.order = data.parse_order(args.order, [m.name for m in model.modalities])
        check_order(args, model)
    out = claim_out(args.out or f"runs/evaluate-{args.task}")
    if args.save_predictions:
        data.claim_folder(args.save_predictions, flag="--save-predictions")
    tasks = {"depth": evaluate_depth, "image": evaluate_image} | dict.fromkeys(AGREEMENT, evaluate_agreement)
    results, grids = tasks[args.task](args, model, encoders, device)
    data.write_json(out / "results.json", {**vars(args), **results})
    for name, (rows, labels) in grids.items():
        if rows:
            data.write_image(out / f"grid{name.replace('/', '-')}.png", data.draw_grid(rows, labels))
    print(f"wrote {out / 'results.json'}")


if __name__ == "__main__":
    data.run_script(main)
