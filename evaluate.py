"""How good is it? Depth accuracy, image quality and prompt following on validation scenes, each beside its references.

    python evaluate.py depth                      image-to-depth: AbsRel and delta1 after affine alignment
    python evaluate.py depth --steps 1            the same with one sampling step
    python evaluate.py image                      text-to-image: Frechet distance and requested colours
    python evaluate.py image --checkpoint runs/t2i/last.pt

Each prints a table and writes results.json and a picture into --out.
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image

import data
from model import JOINT, Config, DiT, normalize_depth, sampling_grid, uncontract, warp

# ---- Depth ----


def weighted_median(values, weights):
    """argmin over x of sum w |x - v| for 1-D arrays; returns the index of the minimiser in values."""
    order = np.argsort(values, kind="stable")
    return order[np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]


def align(prediction, target):
    """Affine alignment, exactly: (scale, shift) that minimise sum |scale p + shift - g| / g (MoGe's "ROE" objective).

    prediction p and target g > 0: 1-D tensors of n valid points. Returns two floats.

    Some minimiser passes through two of the points. The best line through one point is a weighted median of slopes, and
    passes through a second point, about which one can turn next. The objective is convex and linear between the lines
    of the (scale, shift) plane on which a residual is zero, so once no point on the current line offers a better one,
    it is the minimum.
    """
    p, g = (np.asarray(x, np.float64) for x in (prediction, target))
    weights = 1 / g
    scale, shift = 0.0, g[weighted_median(g, weights)]
    best, queue, tried = np.abs(scale * p + shift - g) @ weights, [weighted_median(g, weights)], set()
    while queue:
        i = queue.pop()
        tried.add(i)
        others = np.flatnonzero(p != p[i])
        if not len(others):
            continue
        slopes = (g[others] - g[i]) / (p[others] - p[i])
        j = weighted_median(slopes, weights[others] * np.abs(p[others] - p[i]))
        slope = slopes[j]
        error = np.abs(slope * (p - p[i]) + g[i] - g) @ weights
        if error < best * (1 - 1e-12):
            best, scale, shift, tried = error, slope, g[i] - slope * p[i], {i}
        on_line = np.flatnonzero(np.abs(scale * p + shift - g) <= 1e-12 * g.max())
        queue = [k for k in {*on_line, others[j]} if k not in tried]
    return float(scale), float(shift)


def depth_metrics(prediction, target, valid):
    """(AbsRel, delta1, aligned prediction) of one map after affine alignment.

    prediction, target, valid: (1, H, W). AbsRel = mean |p - g| / g; delta1 = share of valid pixels with max(p/g, g/p) <
    1.25.
    """
    scale, shift = align(prediction[valid], target[valid])
    aligned = prediction * scale + shift
    p, g = aligned[valid].double(), target[valid].double()
    ratio = torch.maximum(p / g, g / p.clamp(min=1e-9))
    return ((p - g).abs() / g).mean().item(), (ratio < 1.25).double().mean().item(), aligned


def blind_map(source, count=2048):
    """The best guess without looking: mean normalised depth map over training scenes, (1, H, W)."""
    total, seen = 0, 0
    for start in range(0, count, 256):
        values, valid, _ = source.samples(range(start, start + 256))
        total += normalize_depth(values["depth"], valid["depth"]).sum(0)
        seen += valid["depth"].sum(0)
    return uncontract(total / seen.clamp(min=1))


def evaluate_depth(args, model, device):
    """-> (results, rows of pictures, labels). Columns: image, depth, aligned prediction, error from 0 to 50%."""
    size = (args.size, args.size)
    blind = blind_map(data.open_source(args.data, "train", size))
    source, grid = data.open_source(args.data, "val", size, device), sampling_grid(args.steps)
    found = []  # per image: metrics of the model, of the blind map, of the model given another image; and its pictures
    for start in range(0, args.images, args.batch_size):
        indices = range(start, min(start + args.batch_size, args.images))
        values, valid, _ = source.samples(indices)
        wrong = source.samples([(i + 1) % args.images for i in indices])[0]["rgb"]
        text = torch.zeros(len(indices), model.config.text_length, dtype=torch.uint8, device=device)
        noise = data.noise_like(values["depth"], args.seed, indices)
        levels = {"rgb": grid * 0, "depth": grid}
        right, wrong = (
            uncontract(model.sample(levels, {"rgb": rgb, "depth": noise}, text)["depth"]).cpu()
            for rgb in (values["rgb"], wrong)
        )
        for i in range(len(indices)):
            target, mask = values["depth"][i].cpu(), valid["depth"][i].cpu()
            scores = [depth_metrics(prediction, target, mask) for prediction in (right[i], blind, wrong[i])]
            found.append((scores, (values["rgb"][i], target, mask, scores[0][2])))
    means = np.array([[score[:2] for score in scores] for scores, _ in found]).mean(0)
    results = {"steps": args.steps, "images": args.images, "seed": args.seed, "checkpoint": args.checkpoint}
    print(f"{args.images} validation images at {args.size}x{args.size}, {args.steps} steps, affine alignment")
    print(f"{'':34}{'AbsRel':>8}{'delta1':>8}")
    rows = (
        ("", "image to depth"),
        ("baseline_", "mean depth map, input-blind"),
        ("shuffled_", "given another scene's image"),
    )
    for (key, label), (absrel, delta1) in zip(rows, means.tolist(), strict=True):
        print(f"{label:34}{absrel:8.4f}{delta1:8.4f}")
        results |= {f"{key}absrel": absrel, f"{key}delta1": delta1}
    print(f"{'ratio to the baseline':34}{means[0, 0] / means[1, 0]:8.3f}")

    found.sort(key=lambda entry: entry[0][0][0])
    middle, pictures, labels = len(found) // 2, [], []
    for name, cases in (("best", found[:2]), ("median", found[middle : middle + 2]), ("worst", found[-2:])):
        for scores, (rgb, target, mask, aligned) in cases:
            error = ((aligned - target).abs() / target.clamp(min=1e-6) / 0.5).clamp(0, 1)[0].numpy() * mask[0].numpy()
            heat = (np.stack([error, error * 0.6, error * 0.3], -1) * 255).astype(np.uint8)
            depths = [data.paint_depth(depth, mask) for depth in (target, aligned)]
            pictures.append([data.paint_rgb(rgb), *depths, heat])
            labels.append(f"{name}\nAbsRel {scores[0][0]:.3f}")
    return results, pictures, labels


# ---- Images ----


def features(rgb):
    """(B, 3, H, W) in [-1, 1] -> (B, 80) float64, in place of a network: colours and edges on a coarse grid.

    48 mean colours of a 4 x 4 grid of cells, and the 32 mean absolute horizontal and vertical differences of grey in
    the cells.
    """
    grey = rgb.mean(1, keepdim=True)
    edges = torch.cat([grey.diff(dim=3).abs()[:, :, 1:], grey.diff(dim=2).abs()[..., 1:]], 1)
    pool = torch.nn.functional.adaptive_avg_pool2d
    return torch.cat([pool(rgb, 4).flatten(1), pool(edges, 4).flatten(1)], 1).cpu().double()


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), Gaussians fitted to a (n, d) and b (m, d)."""
    root = lambda s: (lambda w, v: (v * w.clamp(min=0).sqrt()) @ v.T)(*torch.linalg.eigh(s))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    half = root(cov_a)
    cross = torch.linalg.eigvalsh(half @ cov_b @ half).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def colors_in(rgb, share=0.01):
    """Names of the world's object colours that cover at least a share of the picture (3, H, W), told by hue."""
    hsv = lambda rgb: np.asarray(Image.fromarray(rgb).convert("HSV")).astype(int)
    palette = hsv((np.array([list(data.COLORS.values())]) * 255).astype(np.uint8))[0, :, 0]
    hue, saturation, value = hsv(data.paint_rgb(rgb)).reshape(-1, 3).T
    apart = np.abs(hue[:, None] - palette)
    nearest = np.minimum(apart, 256 - apart).argmin(1)[(saturation > 115) & (value > 40)]
    counts = np.bincount(nearest, minlength=len(palette))
    return {name for name, count in zip(data.COLORS, counts, strict=True) if count >= share * len(hue)}


def following(images, captions):
    """Share of the colours that captions ask for which appear in their images."""
    asked = [
        (colors_in(rgb), word)
        for rgb, line in zip(images, captions, strict=True)
        for word in line.split()
        if word in data.COLORS
    ]
    return sum(word in seen for seen, word in asked) / len(asked)


def evaluate_image(args, model, device):
    size, grid = (args.size, args.size), sampling_grid(args.steps)
    source = data.open_source(args.data, "val", size, device)
    levels = {
        m.name: grid if i == 0 else warp(grid, JOINT) for i, m in enumerate(model.modalities)
    }  # the released trajectory
    made, real, captions = [], [], []
    for start in range(0, args.images, args.batch_size):
        indices = range(start, min(start + args.batch_size, args.images))
        values, _, lines = source.samples(indices)
        text = data.encode_text(lines, model.config.text_length).to(device)
        noise = {m: data.noise_like(values[m], args.seed, indices, stream=i) for i, m in enumerate(levels)}
        made.append(model.sample(levels, noise, text, {"rgb": args.cfg})["rgb"].cpu())
        real.append(values["rgb"].cpu())
        captions += lines
    made, real = torch.cat(made), torch.cat(real)
    others = source.samples(range(args.images, 2 * args.images))[0]["rgb"].cpu()
    shuffled = captions[1:] + captions[:1]
    results = {
        "frechet": frechet_distance(features(made), features(real)),
        "real_frechet": frechet_distance(features(others), features(real)),
        "following": following(made, captions),
        "shuffled_following": following(made, shuffled),
        "real_following": following(real, captions),
        **{
            "steps": args.steps,
            "cfg": args.cfg,
            "images": args.images,
            "seed": args.seed,
            "checkpoint": args.checkpoint,
        },
    }
    print(f"{args.images} images at {args.size}x{args.size}, {args.steps} steps, guidance {args.cfg}")
    print(
        f"{'Frechet distance to validation images':50}{results['frechet']:8.4f}   (real: {results['real_frechet']:.4f})"
    )
    print(f"{'requested colours that appear':50}{results['following']:8.3f}   (real: {results['real_following']:.3f})")
    print(f"{'the same against shuffled prompts':50}{results['shuffled_following']:8.3f}")
    rows = [[data.paint_rgb(x) for x in images[:8]] for images in (real, made)]
    return results, rows, ["real", "from its\ncaption"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=("depth", "image"))

    def setting(flag, default, help):
        p.add_argument(flag, default=default, type=type(default), help=f"{help} (default: {default})")

    setting("--checkpoint", "runs/forcing/last.pt", "what a training script wrote")
    setting("--data", "synthetic", "source of validation samples")
    setting("--images", 128, "number of validation images")
    setting("--size", 0, "side of the images in pixels; 0 is the network's")
    setting("--steps", 0, "sampling steps; 0 is 2 for depth, 16 for images")
    setting("--cfg", 3.0, "guidance of generated images")
    setting("--batch-size", 64, "images sampled at a time; changes no result")
    setting("--seed", 0, "of the noise")
    setting("--device", "auto", "auto, cuda, mps or cpu")
    setting(
        "--out",
        "",
        "directory for results.json and grid.png; empty is runs/evaluate-TASK, which a new evaluation replaces",
    )
    args = p.parse_args()
    args.steps = args.steps or {"depth": 2, "image": 16}[args.task]
    data.at_least(args, images=2, size=0, steps=1, batch_size=1)
    out = data.make_folder(args.out or f"runs/evaluate-{args.task}")
    state, device = data.load_checkpoint(args.checkpoint), data.pick_device(args.device)
    model = DiT(Config(**state["config"])).requires_grad_(False)
    model.load_state_dict(state["ema"])
    args.size = args.size or model.config.size
    if args.size % model.config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the network's patch, {model.config.patch}")
    if args.task == "depth" and "depth" not in [m.name for m in model.modalities]:
        data.fail(
            f"--checkpoint {args.checkpoint}: a text-to-image checkpoint knows no depth; give one of train_forcing.py"
        )
    results, rows, labels = {"depth": evaluate_depth, "image": evaluate_image}[args.task](
        args, model.to(device), device
    )
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    data.save_grid(out / "grid.png", rows, labels)
    print(f"wrote {out / 'results.json'} and {out / 'grid.png'}")


if __name__ == "__main__":
    main()
