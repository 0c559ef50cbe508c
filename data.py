"""Where samples come from, how they are kept on disk, and how they are drawn as pictures.

The built-in world is a ray caster over random rooms and open ground: colour, exact z-depth, exact surface normals and a
caption, as many as one likes, the same for the same (split, index). Depth is thinned to the patterns of real sensors
(`sparsify`).

    python data.py --out runs/world --count 8        a look at the world: pictures, depth maps, captions
"""

import argparse
import ctypes
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from model import TEXT_PATCH

# ---- The synthetic world: scenes as numbers, from a hash of (split, index) ----

COLORS = {  # saturated; floors, walls and sky are muted, so that a colour word can be checked in a picture
    "red": (0.86, 0.12, 0.12),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.93, 0.86, 0.12),
    "green": (0.15, 0.68, 0.20),
    "cyan": (0.12, 0.78, 0.80),
    "blue": (0.12, 0.24, 0.88),
    "purple": (0.52, 0.16, 0.80),
    "pink": (0.95, 0.35, 0.66),
}
MUTED = (
    (0.62, 0.58, 0.52),
    (0.52, 0.55, 0.60),
    (0.70, 0.66, 0.62),
    (0.45, 0.43, 0.42),
    (0.58, 0.62, 0.55),
    (0.75, 0.75, 0.74),
)
SKY = (0.66, 0.78, 0.90)
SHAPES = {
    "ball": (1.0, 1.0, 1.0),
    "box": (0.0, 0.0, 0.0),
    "pillar": (1.0, 0.0, 1.0),
}  # x^2 + y^2 + z^2 <= 1, any, x^2 + z^2 <= 1
FLOORS = ("plain", "checkered", "striped")
SPLITS = {"train": 1, "val": 2}
OBJECTS = 3  # at most, in a scene
ROOM = OBJECTS  # place of the room among the solids: seen from inside, it is floor, walls and ceiling


def uniforms(split, indices, count):
    """(B, count) float64 in [0, 1): SplitMix64 of (split, index, column): a scene does not depend on its batch."""
    with np.errstate(over="ignore"):
        key = np.asarray(indices, np.uint64)[:, None] * np.uint64(2 * count) + np.arange(count, dtype=np.uint64)
        z = (key + np.uint64(SPLITS[split]) * np.uint64(0xD1B54A32D192ED03)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def draw_scenes(split, indices):
    """Scene parameters for indices (a sequence of B ints): a dict of tensors, leading dimension B.

    Metres; y is up; the camera is above the origin and looks along +z. The solids are OBJECTS objects, left to right on
    the ground (those beyond "count" out of sight), and the room: "centre", "half" (extent), "quadric" (B, 4, 3), "turn"
    (B, 4) about y.
    """
    columns = iter(torch.from_numpy(uniforms(split, indices, 64)).float().unbind(1))
    draw = lambda low, high: next(columns) * (high - low) + low
    pick = lambda choices: draw(0, choices).long().clamp(max=choices - 1)
    each = lambda fn, *args: torch.stack([fn(*args) for _ in range(OBJECTS)], 1)

    s = {"outside": draw(0, 1) < 0.35, "fov": draw(46, 66).deg2rad(), "height": draw(0.8, 2.2)}
    s |= {
        "count": pick(OBJECTS) + 1,
        "shape": each(pick, 3),
        "floor": pick(3),
        "striped": pick(2),
        "relation": draw(0, 1),
    }
    s["pitch"] = ((s["height"] - 0.55) / 3).atan() + draw(-0.09, 0.09)
    s["color"] = torch.stack([pick(len(COLORS) - i) for i in range(OBJECTS)], 1)
    for i in range(1, OBJECTS):  # distinct: the i-th pick counts among the colours not taken yet
        for taken in s["color"][:, :i].sort(1).values.unbind(1):
            s["color"][:, i] += s["color"][:, i] >= taken

    pillar, radius, tall = s["shape"] == 2, each(draw, 0.38, 0.62), each(draw, 0.75, 1.15)
    wide, tall = torch.where(pillar, 0.6 * radius, radius), torch.where(pillar, tall, radius)
    z = each(draw, 2.1, 4.0)
    slot = (torch.arange(OBJECTS) + 0.5) * 2 / s["count"][:, None] - 1 + each(draw, -0.22, 0.22)
    centre = torch.stack([slot * 0.85 * z * (s["fov"] / 2).tan()[:, None], tall, z], 2)
    centre[torch.arange(OBJECTS) >= s["count"][:, None]] = -100.0
    either = lambda inside, outside: torch.where(s["outside"], outside, inside)
    left, right = -either(draw(2.8, 4.2), draw(8, 12)), either(draw(2.8, 4.2), draw(8, 12))
    back, front, top = (
        -either(draw(1.5, 3), draw(5, 7)),
        either(draw(5.4, 8), draw(9, 15)),
        either(draw(2.6, 3.6), 1000.0),
    )
    low, high = torch.stack([left, 0 * top, back], 1), torch.stack([right, top, front], 1)
    s["centre"] = torch.cat([centre, (low + high)[:, None] / 2], 1)
    s["half"] = torch.cat([torch.stack([wide, tall, wide], 2), (high - low)[:, None] / 2], 1)
    s["quadric"] = torch.tensor([*SHAPES.values(), SHAPES["box"]])[F.pad(s["shape"], (0, 1), value=1)]
    s["turn"] = torch.cat([each(draw, 0, 1.57), draw(-0.4, 0.4)[:, None]], 1)
    s["big"] = radius > 0.5
    s |= {"fence": draw(0.5, 1.6), "tile": draw(0.7, 1.3)}
    s["light"] = torch.stack([draw(-2.2, 2.2), either(2.5, 5.0), draw(0, 2.5)], 1) * either(1.0, 4.0)[:, None]
    s["floor_color"] = torch.tensor(MUTED)[pick(len(MUTED))]
    s["wall_color"] = torch.tensor(MUTED)[pick(len(MUTED))] * draw(0.8, 1.1)[:, None]
    return s


def caption(s, i):
    """What scene i of draw_scenes shows, in words: objects, how they are arranged, where, on which floor."""
    count, things = int(s["count"][i]), []
    for shape, color, big in zip(s["shape"][i, :count], s["color"][i, :count], s["big"][i], strict=False):
        shape, color = list(SHAPES)[shape], list(COLORS)[color]
        size = "" if count == OBJECTS else "tall " if shape == "pillar" else "big " if big else "small "
        things.append(f"{'an' if (size + color)[0] == 'o' else 'a'} {size}{color} {shape}")
    if count == 2:
        gap, choice = float(s["centre"][i, 1, 2] - s["centre"][i, 0, 2]), s["relation"][i]
        if choice < 0.4 and abs(gap) > 0.8:
            things = [(" in front of " if gap > 0 else " behind ").join(things)]
        else:
            things = [" left of ".join(things) if choice < 0.7 else " right of ".join(things[::-1])]
    elif count == 3:
        things = [f"{things[0]} left of {things[1]} and {things[2]}"]
    floor = "" if s["floor"][i] == 0 else FLOORS[s["floor"][i]] + " "
    if s["outside"][i]:
        return f"{things[0]} on open {floor}ground"
    return f"{things[0]} in a room" + (f" with a {floor}floor" if floor else "")


# ---- Ray casting: vectors have their component first, (3, B, K solids, P pixels) ----


def unit(v):
    """v (3, ...) / its length. (F.normalize is several times slower over a leading dimension.)"""
    return v / v.square().sum(0).sqrt()


def turn_y(v, angle):
    """Rotate vectors v (3, ...) about the vertical axis by angle (broadcasts)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(torch.broadcast_tensors(cos * v[0] + sin * v[2], v[1], cos * v[2] - sin * v[0]))


def span(origin, direction, solid):
    """Where rays enter and leave solids: each is the cube [-1, 1]^3 intersected with a quadric, in its own frame.

    origin, direction (3, B, 1, P); solid {"centre", "half", "quadric" (3, B, K, 1), "turn" (B, K, 1)}.
    Returns (near, far), each (B, K, P) in units of direction; near >= far is a miss.
    """
    o = turn_y(origin - solid["centre"], -solid["turn"]) / solid["half"]
    d = turn_y(direction, -solid["turn"]) / solid["half"]
    a, b = (-1 - o) / d, (1 - o) / d
    near, far = torch.minimum(a, b).amax(0), torch.maximum(a, b).amin(0)
    w = solid["quadric"]
    qa, qb, qc = (w * d * d).sum(0), (w * o * d).sum(0), (w * o * o).sum(0) - 1
    round_ = qa > 1e-9  # a ray along a pillar, or a box, meets no curved surface
    root, qa = (qb * qb - qa * qc).sqrt(), qa.clamp(min=1e-9)  # NaN, so no hit, where the quadric is missed
    near = torch.where(round_, torch.maximum(near, (-qb - root) / qa), near)
    far = torch.where(round_, torch.minimum(far, (-qb + root) / qa), far)
    return near, far


def render(s, height, width=None, device="cpu"):
    """Scenes of draw_scenes -> {"rgb" (B, 3, H, W) in [-1, 1]; "depth" (B, 1, H, W), z-depth in metres; "normal"
    (B, 3, H, W), unit vectors in camera axes (right, up, forward)}, float32, on device. Both are 0 in the sky.
    """
    s, width = {k: v.to(device) for k, v in s.items()}, width or height
    solids = {k: s[k].movedim(-1, 0).unsqueeze(-1) for k in ("centre", "half", "quadric")} | {
        "turn": s["turn"].unsqueeze(-1)
    }
    number = lambda key: s[key].view(-1, 1, 1)  # (B,) -> (B, 1, 1)
    vector = lambda v: v.movedim(-1, 0)[..., None, None]  # (B, 3) -> (3, B, 1, 1)

    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    tan, cos, sin = (number("fov") / 2).tan(), number("pitch").cos(), number("pitch").sin()
    x, y = (
        ((2 * x + 1 - width) / height).flatten() * tan,
        ((height - 1 - 2 * y) / height).flatten() * tan,
    )  # vertical fov
    ray = torch.stack([x, cos * y - sin, cos + sin * y])  # one unit along the optical axis: distances are z-depth
    camera = vector(F.pad(s["height"][:, None], (1, 1)))
    near, far = span(camera, ray, solids)
    ahead = torch.where((near < far) & (near > 1e-3), near, torch.inf)
    depth, which = torch.cat([ahead[:, :ROOM], far[:, ROOM:]], 1).min(1, keepdim=True)  # (B, 1, P)
    point, background = camera + depth * ray, which == ROOM

    # Normals, in the frame of the solid that was hit.
    hit = {k: v.take_along_dim(which.expand(*v.shape[:-2], *which.shape[-2:]), -2) for k, v in solids.items()}
    local = turn_y(point - hit["centre"], -hit["turn"]) / hit["half"]
    on_quadric = (hit["quadric"] * local * local).sum(0) > 0.998
    flat = (local.abs() == local.abs().amax(0)) * local.sign()
    normal = unit(turn_y(torch.where(on_quadric, hit["quadric"] * local, flat) / hit["half"], hit["turn"]))
    normal = torch.where(background, -normal, normal)

    # Surfaces: a floor with its pattern, fading with distance; walls plain or striped; objects in their colours.
    place = local * hit["half"] + hit["centre"]
    column, row = (place[0] / number("tile")).floor(), (place[2] / number("tile")).floor()
    kind, floor, wall = number("floor"), normal[1] > 0.9, normal[1].abs() < 0.5
    pattern = torch.where(kind == 1, (column + row) % 2, torch.where(kind == 2, column % 2, 0.5)) - 0.5
    stripes = number("striped") * ((place[1] * 2.5).floor() % 2 - 0.5)
    shade = torch.where(
        floor, 1 + 0.7 * pattern * (-((depth / 11) ** 2)).exp(), torch.where(wall, 1 + 0.25 * stripes, 1.1)
    )
    room = torch.where(floor, vector(s["floor_color"]), vector(s["wall_color"])) * shade
    paint = torch.tensor(list(COLORS.values()), device=device)[s["color"]].movedim(-1, 0).unsqueeze(-1)
    surface = torch.where(background, room, paint.take_along_dim(which.clamp(max=ROOM - 1).expand(3, -1, -1, -1), 2))

    # Light: ambient, and a lamp or sun that objects block; sky above the fence.
    to_light = vector(s["light"]) - point
    near, far = (v[:, :ROOM] for v in span(point + 2e-3 * normal, to_light, solids))
    lit = ~((near < far) & (far > 1e-3) & (near < 1)).any(1, keepdim=True)
    lambert = (normal * unit(to_light)).sum(0).clamp(min=0)
    rgb = surface * (0.58 + 0.52 * lambert * lit)
    sky = number("outside") & background & (point[1] > number("fence"))
    blue = torch.tensor(SKY, device=device).view(3, 1, 1, 1) + 0.25 * unit(ray)[1].clamp(min=0)
    rgb = torch.where(sky, blue, rgb).clamp(0, 1) * 2 - 1

    seen = torch.stack([normal[0], cos * normal[1] + sin * normal[2], cos * normal[2] - sin * normal[1]])
    image = lambda v: v.squeeze(-2).movedim(0, 1).unflatten(-1, (height, width)).contiguous()
    return {
        "rgb": image(rgb),
        "depth": image(torch.where(sky, 0, depth)[None]),
        "normal": image(torch.where(sky, 0, seen)),
    }


# ---- Sparse depth: what real sensors leave out ----

PATTERNS = ("dense", "uniform", "lidar", "sfm", "holes")


def sparsify(valid, rgb, pattern="mixed", generator=None):
    """Thin a mask of known depth (B, 1, H, W) to what a sensor would have seen; returns a mask of the same shape.

    pattern: "dense" keeps all; "uniform" a random 0.5-50% of the pixels; "lidar" scan lines with dropouts; "sfm" points
    where the image rgb (B, 3, H, W) has texture; "holes" loses up to four rectangles; "mixed" chooses one of these for
    each sample; a number in (0, 1] keeps that share of the pixels at random. Randomness from generator, on valid's
    device.
    """
    batch, _, height, width = valid.shape
    rand = lambda *shape: torch.rand(batch, *shape, generator=generator, device=valid.device)
    noise = rand(1, height, width)
    if pattern not in ("mixed", *PATTERNS):
        return valid & (noise < float(pattern))
    rows, columns = torch.arange(height, device=valid.device)[:, None], torch.arange(width, device=valid.device)
    uniform = noise < 0.005 * 100 ** rand(1, 1, 1)
    gap = 2 + (rand(1, 1, 1) * height / 5).long()  # rows between two scan lines
    lidar = ((rows + (rand(1, 1, 1) * gap).long()) % gap == 0) & (noise < 0.9)
    grey = F.pad(rgb.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    texture = grey.diff(dim=2)[..., :width].abs() + grey.diff(dim=3)[:, :, :height].abs()
    sfm = noise < texture / texture.mean((2, 3), keepdim=True).clamp(min=1e-6) * 0.15 * (texture > 0.05)
    top, left, tall, wide = (rand(4, 1, 1) * scale for scale in (height, width, height * 0.6, width * 0.6))
    inside = (
        (rows >= top - tall / 2) & (rows < top + tall / 2) & (columns >= left - wide / 2) & (columns < left + wide / 2)
    )
    masks = torch.cat([torch.ones_like(uniform), uniform, lidar, sfm, ~inside.any(1, keepdim=True)], 1)
    if pattern == "mixed":
        choice = (rand() * len(PATTERNS)).long()
    else:
        choice = torch.full((batch,), PATTERNS.index(pattern), device=valid.device)
    return valid & masks.take_along_dim(choice.view(-1, 1, 1, 1), 1)


# ---- Batches ----


def encode_text(captions, length):
    """Captions -> (B, length) uint8: UTF-8, each word at the start of a token of TEXT_PATCH bytes, zeros between.

    A word longer than a token goes on in the next; what does not fit in length is cut. An empty caption is all zeros.
    """
    text = np.zeros((len(captions), length // TEXT_PATCH, TEXT_PATCH), np.uint8)
    for row, line in zip(text, captions, strict=True):
        words = (word.encode() for word in line.split())
        pieces = [word[i : i + TEXT_PATCH] for word in words for i in range(0, len(word), TEXT_PATCH)]
        for token, piece in zip(row, pieces, strict=False):
            token[: len(piece)] = np.frombuffer(piece, np.uint8)
    return torch.from_numpy(text.reshape(len(captions), -1))


class World:
    """The synthetic world as a source of samples: any index, no end."""

    def __init__(self, split, size, device="cpu"):
        self.split, self.size, self.device = split, size, device

    def samples(self, indices):
        """-> (values {"rgb", "depth", "normal": (B, C, H, W)}, valid {m: (B, 1, H, W) bool or None}, captions)."""
        scenes = draw_scenes(self.split, indices)
        values = render(scenes, *self.size, device=self.device)
        seen = values["depth"] > 0
        return values, {"rgb": None, "depth": seen, "normal": seen}, [caption(scenes, i) for i in range(len(indices))]


def open_source(data, split, size, device="cpu"):
    """The value of --data -> a source of samples; size (H, W)."""
    if data != "synthetic":
        fail(f"--data {data}: unknown source; 'synthetic' is the one there is")
    return World(split, size, device)


def training_indices(seed, step, batch_size, rank=0, world=1):
    """The samples of one step that one rank trains on. Another seed sees other scenes."""
    share = batch_size // world
    start = (seed << 32) + step * batch_size + rank * share
    return range(start, start + share)


def noise_like(x, seed, indices, stream=0):
    """Gaussian noise of the shape of x (B, C, H, W), each row from (seed, stream, its index), whatever the batch."""
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) * 16 + stream)
        rows.append(torch.randn(x.shape[1:], generator=generator))
    return torch.stack(rows).to(x.device)


# ---- Runs on disk ----


def fail(message):
    """One clear line on stderr, exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def at_least(args, **lows):
    """Refuse settings below their lowest meaningful value."""
    for name, low in lows.items():
        if getattr(args, name) < low:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")


def pick_device(name):
    """--device auto | cuda | mps | cpu -> torch.device."""
    if name.split(":")[0] not in ("auto", "cuda", "mps", "cpu"):
        fail(f"--device {name}: choose auto, cuda, mps or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {name}: not available here; use --device auto")
    if device.type == "cpu" and sys.platform == "linux":
        # glibc hands every freed block over 32 MB back to the system, and faulting it in again costs more than the
        # matmul that fills it. Keep memory: M_MMAP_THRESHOLD = -3, M_TRIM_THRESHOLD = -1.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30), libc.mallopt(-1, (1 << 31) - 1)
    return device


def make_folder(path):
    """Path of a directory that exists from now on."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: cannot make the directory {path}: {error.strerror}; choose another")
    return Path(path)


def open_run(out, settings, resumed=None):
    """Make the run directory and write config.json. Refuses one that holds a run, unless resumed is given, the step to
    go on from: rows of metrics.jsonl past it are dropped, since the run will write them again.
    """
    out = Path(out)
    if (out / "last.pt").exists() and resumed is None:
        fail(f"--out {out}: already holds a run; add --resume to go on with it, or choose another --out")
    make_folder(out / "samples")
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        rows = metrics.read_text().splitlines(keepends=True)
        metrics.write_text(
            "".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= (resumed or 0))
        )
    return out


def save_checkpoint(path, state):
    """Write beside the old file, then rename, so that a crash leaves one whole checkpoint."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, flag="--checkpoint"):
    """A checkpoint's dict, on the CPU, with weights_only=True; one line and exit code 2 if it is missing or corrupt."""
    if not Path(path).is_file():
        fail(f"{flag} {path}: no such file; train one first (train_t2i.py, then train_forcing.py) or name another")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's second thoughts about a damaged file
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not (state["config"]["modalities"] and state["ema"]):
            raise ValueError
        return state
    except Exception:
        fail(f"{flag} {path}: damaged, or no checkpoint of this project; give a last.pt of a training script")


# ---- Images and depth on disk, and as pictures ----


def read_image(path):
    """Image file -> (3, H, W) float32 in [-1, 1]."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError):
        fail(f"--image {path}: not an image that can be read")
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1


def read_depth(path):
    """.npy depth (H, W) in any unit, not finite or not above 0 where missing -> (depth, valid), each (1, H, W)."""
    try:
        depth = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32)).squeeze()
    except (OSError, EOFError, ValueError, TypeError, AttributeError):
        fail(f"--depth {path}: not a .npy array of numbers")
    if depth.ndim != 2:
        fail(f"--depth {path}: has shape {tuple(depth.shape)}; one depth map (height, width) is needed")
    valid = depth.isfinite() & (depth > 0)
    if not valid.any():
        fail(f"--depth {path}: has no valid pixel (finite and above 0)")
    return torch.where(valid, depth, 0)[None], valid[None]


ANCHORS = np.array(
    [[8, 6, 40], [62, 18, 110], [128, 34, 122], [190, 56, 100], [232, 104, 66], [248, 170, 74], [252, 240, 180]]
)


def paint_rgb(rgb):
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return ((rgb.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def paint_depth(depth, valid=None):
    """Depth (1, H, W) in any unit -> (H, W, 3) uint8, near is bright, black where missing; 2-98% of inverse depth."""
    depth = depth.detach().float().cpu().numpy()[0]
    valid = depth > 0 if valid is None else valid.cpu().numpy()[0]
    nearness = 1 / np.maximum(depth, 1e-3)
    low, high = np.percentile(nearness[valid], (2, 98)) if valid.any() else (0, 1)
    level = np.clip((nearness - low) / max(high - low, 1e-9), 0, 1) * (len(ANCHORS) - 1)
    color = np.stack([np.interp(level, range(len(ANCHORS)), channel) for channel in ANCHORS.T], -1)
    return np.where(valid[..., None], color, 0).astype(np.uint8)


def save_grid(path, rows, labels=(), cell=128):
    """Picture of rows of (H, W, 3) uint8 images, enlarged to whole multiples near cell pixels, labels on the left."""
    height, width = rows[0][0].shape[:2]
    scale = max(1, round(cell / max(height, width)))
    margin = 110 if labels else 0
    canvas = Image.new("RGB", (margin + len(rows[0]) * (width * scale + 4), len(rows) * (height * scale + 4)), "white")
    for r, row in enumerate(rows):
        top = r * (height * scale + 4)
        for c, picture in enumerate(row):
            enlarged = Image.fromarray(picture).resize((width * scale, height * scale), Image.NEAREST)
            canvas.paste(enlarged, (margin + c * (width * scale + 4), top))
        if labels:
            ImageDraw.Draw(canvas).multiline_text((4, top + 6), labels[r], fill="black", font_size=15)
    canvas.save(path)


def main():
    parser = argparse.ArgumentParser(
        description="Write samples of the built-in world: NNN.png, NNN.npy (metres), captions.txt, grid.png."
    )
    parser.add_argument("--out", default="runs/world", help="directory to write to (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="val", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default: %(default)s)")
    parser.add_argument("--count", type=int, default=8, help="number of samples (default: %(default)s)")
    args = parser.parse_args()
    at_least(args, size=1, count=1)
    out = make_folder(args.out)
    values, valid, captions = World(args.split, (args.size, args.size)).samples(range(args.count))
    pictures = [paint_rgb(rgb) for rgb in values["rgb"]]
    for i, (picture, depth) in enumerate(zip(pictures, values["depth"], strict=True)):
        Image.fromarray(picture).save(out / f"{i:03}.png")
        np.save(out / f"{i:03}.npy", depth[0].numpy())
    (out / "captions.txt").write_text("\n".join(captions) + "\n")
    thinned = sparsify(valid["depth"], values["rgb"], "mixed", torch.Generator().manual_seed(0))
    dense, sparse = (
        [paint_depth(d, v) for d, v in zip(values["depth"], mask, strict=True)] for mask in (valid["depth"], thinned)
    )
    save_grid(out / "grid.png", [pictures, dense, sparse], ["image", "depth", "depth as\ntrained on"])
    print(f"{args.count} samples in {out}")


if __name__ == "__main__":
    main()
