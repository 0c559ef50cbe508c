"""Sample. What you give is held clean, what you don't give is generated, and --order says which comes first.

    python sample.py --prompt "a small red ball left of a tall blue pillar in a room"     an image and its depth
    python sample.py --image photo.png                                                  depth from the image
    python sample.py --depth depth.npy --prompt "a big green box in a room"             an image that has this depth
    python sample.py --prompt "..." --order depth-first                                 the depth is settled first

Each sample gets a folder NNN in --out with rgb.png, depth.npy (relative, 0 where missing), depth.png (near is bright),
cloud.ply (coloured points, metres only up to a scale) and metadata.json; grid.png shows them all.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from model import JOINT, Config, DiT, corrupt, sampling_grid, warp

ORDERS = {
    "joint": JOINT,
    "image-first": float("inf"),
    "depth-first": float("-inf"),
}  # log2(alpha)


def noise_levels(order, steps, given):
    """The table that the sampler follows: {"rgb", "depth": noise levels per step} (Sec. 4.2).

    order: log2(alpha) of the trajectory t_depth = f_alpha(t_rgb); an infinite one is one modality after the other, in
    twice the steps. given: names of the modalities held clean; with one of them given, there is no order left to
    choose.
    """
    grid = sampling_grid(steps)
    if given:
        return {m: grid * 0 if m in given else grid for m in ("rgb", "depth")}
    if abs(order) == float("inf"):
        first, second = torch.cat([grid, grid[1:] * 0]), torch.cat([grid[1:] * 0 + 1, grid])
        return {"rgb": first, "depth": second} if order > 0 else {"rgb": second, "depth": first}
    return {"rgb": grid, "depth": warp(grid, order)}


def write_ply(path, rgb, depth, valid, fov):
    """Coloured points of a pinhole camera as PLY: rgb (H, W, 3) uint8, depth, valid (H, W), vertical fov in degrees."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width]
    focal = height / 2 / np.tan(np.radians(fov) / 2)
    points = np.empty((height, width), [(c, "<f4") for c in "xyz"] + [(c, "u1") for c in ("red", "green", "blue")])
    points["x"], points["y"], points["z"] = (
        (x + 0.5 - width / 2) / focal * depth,
        (height / 2 - y - 0.5) / focal * depth,
        -depth,
    )
    points["red"], points["green"], points["blue"] = np.moveaxis(rgb, -1, 0)
    points = points[valid]
    properties = "".join(f"property {'float' if c in 'xyz' else 'uchar'} {c}\n" for c in points.dtype.names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
    Path(path).write_bytes(header.encode() + points.tobytes())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def setting(flag, default, help):
        p.add_argument(flag, default=default, type=type(default), help=f"{help} (default: {default})")

    setting("--checkpoint", "runs/forcing/last.pt", "what train_forcing.py wrote")
    p.add_argument("--prompt", default="", help="what the picture shows")
    p.add_argument("--image", help="image file to hold clean: its depth is generated")
    p.add_argument(
        "--depth",
        help="depth map to hold clean, .npy, .pfm or 16-bit .png (any unit; missing is 0, negative or not finite)",
    )
    setting(
        "--order",
        "joint",
        "joint (depth a little behind the image), image-first, depth-first, or log2(alpha) of Sec. 4.2, -14 to 14",
    )
    setting("--count", 4, "number of samples")
    setting(
        "--size", 0, "side in pixels; 0 is the network's. An --image or --depth keeps its shape, in about this area"
    )
    setting("--steps", 50, "sampling steps")
    setting(
        "--cfg",
        3.0,
        "classifier-free guidance of a generated image; 1 is none. The released model uses 4, this size wants less",
    )
    setting("--fov", 55.0, "vertical field of view of cloud.ply, in degrees")
    setting("--seed", 0, "of the noise")
    setting("--device", "auto", "auto, cuda, mps or cpu")
    setting("--encoders", "", "FILE.py of the frozen encoders that the checkpoint was trained with")
    setting("--out", "runs/samples", "directory to write to")
    args = p.parse_args()

    try:
        order = ORDERS[args.order] if args.order in ORDERS else float(args.order)
    except ValueError:
        data.fail(f"--order {args.order}: choose joint, image-first, depth-first or a number, log2(alpha)")
    if not -14 <= order <= 14 and args.order not in ORDERS:
        data.fail(f"--order {args.order}: log2(alpha) must be in -14..14; image-first and depth-first are the limits")
    data.at_least(args, steps=1, count=1, size=0)
    if not 0 < args.fov < 180:
        data.fail(f"--fov {args.fov}: an angle between 0 and 180 degrees")
    if (Path(args.out) / "grid.png").exists():
        data.fail(f"--out {args.out}: already holds samples; choose another --out")
    state, device = data.load_checkpoint(args.checkpoint), data.pick_device(args.device)
    model = DiT(Config(**state["config"])).requires_grad_(False)
    model.load_state_dict(state["ema"])
    model.to(device)
    config, names = model.config, [m.name for m in model.modalities]
    encoders = data.open_encoders(args.encoders, device, config, state["settings"].get("encoders", ""))
    if "depth" not in names:
        data.fail(
            f"--checkpoint {args.checkpoint}: a text-to-image checkpoint knows no depth; give one of train_forcing.py"
        )
    side = args.size or config.size
    if side % config.patch:
        data.fail(f"--size {args.size}: must be a multiple of the network's patch, {config.patch}")

    # What is given, at a size that the patch divides: {modality: (stored values (C, H, W), valid (1, H, W) or None)}.
    given, size = {}, (side, side)
    try:
        if args.image:
            rgb, _ = data.parse(args.image, lambda: data.load_rgb(data.read_file(args.image)))
            given["rgb"] = torch.from_numpy(rgb.copy()).movedim(-1, 0) / 127.5 - 1, None
        if args.depth:
            depth = data.parse(args.depth, lambda: data.read_depth(args.depth, data.read_file(args.depth)))
            given["depth"] = tuple(torch.from_numpy(x)[None] for x in depth)
    except data.BadSample as error:
        data.fail(f"{'--depth' if 'rgb' in given or not args.image else '--image'}: {error}")
    shapes = {tuple(values.shape[1:]) for values, _ in given.values()}
    if len(shapes) > 1:
        data.fail(
            f"--depth {args.depth}: its shape differs from --image's: {' and '.join(f'{h}x{w}' for h, w in shapes)}"
        )
    if len(given) == len(names):
        data.fail("--image and --depth: with both given there is nothing to generate; leave one out")
    if shapes:
        size = config.fit(*shapes.pop(), side)
    start, draws = {}, data.Draws(args.seed, range(args.count))
    for m in model.modalities:
        start[m.name] = draws.randn(*m.shape(size))
        if m.name in given:
            values, valid = given[m.name]
            if valid is None:
                values = F.interpolate(values[None], size, mode="bicubic", antialias=True).clamp(-1, 1)
                values = encoders.encode_image(values.to(device)).cpu()
            else:
                values, valid = (F.interpolate(v[None].float(), size, mode="nearest-exact") for v in (values, valid))
                valid = valid > 0
                if not valid.any():
                    data.fail(
                        f"--depth {args.depth}: no valid pixel is left at {size[0]}x{size[1]}; give a larger --size"
                    )
            clean = m.encode(values, valid).expand(args.count, -1, -1, -1)
            start[m.name] = corrupt(clean, start[m.name], torch.zeros(args.count), valid)
            given[m.name] = values, valid
    start = {m: x.to(device) for m, x in start.items()}

    text = encoders.encode_text([args.prompt] * args.count).to(device)
    made = model.sample(noise_levels(order, args.steps, given), start, text, {"rgb": args.cfg})
    made = {m.name: m.decode(made[m.name]) for m in model.modalities}
    made = {m: x.cpu() for m, x in made.items()} | {"rgb": encoders.decode_image(made["rgb"]).cpu()}
    valid = torch.ones(size, dtype=torch.bool) if "depth" not in given else given["depth"][1][0, 0]

    pictures = {"rgb": [], "depth": []}
    for i in range(args.count):
        folder = data.make_folder(f"{args.out}/{i:03}")
        rgb, depth = data.paint_rgb(made["rgb"][i]), torch.where(valid, made["depth"][i], 0)
        pictures["rgb"].append(rgb)
        pictures["depth"].append(data.paint_depth(depth))
        Image.fromarray(rgb).save(folder / "rgb.png")
        Image.fromarray(pictures["depth"][-1]).save(folder / "depth.png")
        np.save(folder / "depth.npy", depth[0].numpy())
        write_ply(folder / "cloud.ply", rgb, depth[0].numpy(), valid.numpy() & (depth[0].numpy() > 0), args.fov)
        (folder / "metadata.json").write_text(
            json.dumps({**vars(args), "sample": i, "height": size[0], "width": size[1]}, indent=1)
        )
    labels = [f"{'image' if m == 'rgb' else m}\n({'given' if m in given else 'made'})" for m in pictures]
    data.save_grid(Path(args.out) / "grid.png", list(pictures.values()), labels)
    print(f"{args.count} samples in {args.out}; see {args.out}/grid.png")


if __name__ == "__main__":
    main()
