"""Where samples come from, how they are kept on disk, and how they are drawn as pictures. One --data chooses:

    synthetic                   the built-in world: rooms and open ground, ray cast; exact depth and normals, captions
    DIR with metadata.jsonl     rows: file_name, text; depth_file_name, mask_file_name, depth_scale where there is depth
    DIR with .index.txt         MoGe's evaluation folders: DIR/<line>/image.jpg and depth.png
    'shards/{000..999}.tar'     WebDataset: key.jpg|png|webp, key.txt or .json, key.depth.png|npy|pfm

Depth may be sparse: 16-bit PNG (times depth_scale; 0 is missing), MoGe's log-coded PNG, .npy or .pfm. What is not above
0, not finite, masked out or outside --depth-min..--depth-max is missing.

    python data.py --out runs/world --count 8                     a look at the world: pictures, depth maps, captions
    python data.py --out runs/shards --count 500 --layout shards  the same as tar shards (or folder, or moge)
"""

import argparse
import atexit
import contextlib
import copy
import ctypes
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickletools
import platform
import random
import re
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
import traceback
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model import TEXT_PATCH, Config, DiT, check_numbers, check_weights

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
# x^2 + y^2 + z^2 <= 1, any, x^2 + z^2 <= 1
SHAPES = {"ball": (1.0, 1.0, 1.0), "box": (0.0, 0.0, 0.0), "pillar": (1.0, 0.0, 1.0)}
FLOORS = ("plain", "checkered", "striped")
SPLITS = {"train": 1, "val": 2}
OBJECTS = 3  # at most, in a scene
ROOM = OBJECTS  # place of the room among the solids: seen from inside, it is floor, walls and ceiling


def signed(bits):
    """The int64 that has the bits of a number from 0 to 2^64 - 1: torch multiplies and adds int64 modulo 2^64."""
    return bits - (1 << 64) if bits >> 63 else bits


GOLDEN = signed(0x9E3779B97F4A7C15)  # SplitMix64's step from one state to the next


def shift_right(z, count):
    """z >> count of an int64 tensor, with zeros coming in from the left."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def split_mix(z):
    """SplitMix64's hash of its states: int64 of any shape -> random bits, int64 of that shape, equal on any device."""
    z = (z ^ shift_right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ shift_right(z, 31)


def uniforms(split, indices, count):
    """(B, count) float64 in [0, 1), a hash of (split, index, column): a scene does not depend on its batch."""
    column = torch.arange(count)
    place = torch.tensor(indices, dtype=torch.int64)[:, None] * (2 * count) + column
    bits = split_mix((place + signed(SPLITS[split] * 0xD1B54A32D192ED03 % (1 << 64))) * GOLDEN)
    return shift_right(bits, 11).double() * 2.0**-53


def draw_scenes(split, indices):
    """Scene parameters for indices (a sequence of B ints): a dict of tensors, leading dimension B.

    Metres; y is up; the camera is above the origin and looks along +z. The solids are OBJECTS objects, left to right on
    the ground (those beyond "count" out of sight), and the room: "centre", "half" (extent), "quadric" (B, 4, 3), "turn"
    (B, 4) about y.
    """
    columns = iter(uniforms(split, indices, 64).float().unbind(1))
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
    s, width = {k: v.to(device, non_blocking=True) for k, v in s.items()}, width or height
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
    paint = torch.tensor(list(COLORS.values())).to(device, non_blocking=True)[s["color"]].movedim(-1, 0).unsqueeze(-1)
    surface = torch.where(background, room, paint.take_along_dim(which.clamp(max=ROOM - 1).expand(3, -1, -1, -1), 2))

    # Light: ambient, and a lamp or sun that objects block; sky above the fence.
    to_light = vector(s["light"]) - point
    near, far = (v[:, :ROOM] for v in span(point + 2e-3 * normal, to_light, solids))
    lit = ~((near < far) & (far > 1e-3) & (near < 1)).any(1, keepdim=True)
    lambert = (normal * unit(to_light)).sum(0).clamp(min=0)
    rgb = surface * (0.58 + 0.52 * lambert * lit)
    sky = number("outside") & background & (point[1] > number("fence"))
    blue = torch.tensor(SKY).to(device, non_blocking=True).view(3, 1, 1, 1) + 0.25 * unit(ray)[1].clamp(min=0)
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


def sparsify(valid, rgb, pattern, rand):
    """Thin a mask of known depth (B, 1, H, W) to what a sensor would have seen; returns a mask of the same shape.

    pattern: "dense" keeps all; "uniform" a random 0.5-50% of the pixels; "lidar" scan lines with dropouts; "sfm" points
    where the image rgb (B, 3, H, W) has texture; "holes" loses up to four rectangles; "mixed" chooses one of these for
    each sample; a number in (0, 1] keeps that share of the pixels at random. rand(*shape) draws (B, *shape) from
    U(0, 1) on valid's device (Draws.rand).
    """
    batch, _, height, width = valid.shape
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


# ---- Files: images and depth maps as they are published ----

MAX_BYTES = 1 << 28  # of a file: what a damaged header declares is not read into memory
MAX_PIXELS = 64_000_000  # of an image or a map: decoded, they take gigabytes
MAX_HEADER = 1 << 20  # bytes of a name in a tar file
MAX_CAPTION = 1 << 16  # bytes
MAX_SHARDS = 1_000_000
IMAGES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # of the many that Pillow would try
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs as an error, it raises as well


class BadSample(ValueError):
    """What cannot be used as a sample; the message says where it is and what is wrong."""


def refuse(message):
    raise BadSample(message)


def parse(name, reader, *args):
    """Returns reader(*args). Whatever it raises becomes a BadSample with a message that begins with name.

    All files are decoded through this function, which also keeps warnings of numpy and Pillow from the user.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(*args)
    except Exception as error:  # of a file's contents anything may be wrong
        what = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadSample(f"{name}: {what or type(error).__name__}") from None


def read_file(path, folder=None):
    """Bytes of a regular file, which must lie in the folder if one is given. Raises BadSample."""
    name = os.path.abspath(os.path.join(folder or "", str(path)))
    if folder and not name.startswith(os.path.join(os.path.abspath(folder), "")):
        refuse(f"leads out of {folder}")
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            refuse("not a regular file")
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        refuse(error.strerror)
    if len(content) > MAX_BYTES:
        refuse(f"larger than {MAX_BYTES >> 20} MiB")
    return content


def check_pixels(shape):
    """Refuse an image or a map whose header declares more than MAX_PIXELS."""
    if math.prod(shape) > MAX_PIXELS:
        refuse(f"has {math.prod(shape):,} pixels; at most {MAX_PIXELS:,} are read")


def open_image(content, formats=FORMATS):
    """Bytes of an image -> a Pillow image of at most MAX_PIXELS. Only its header is read yet. Raises BadSample."""
    image = Image.open(io.BytesIO(content), formats=formats)
    check_pixels(image.size)
    return image


def png_depth(content, scale):
    """16-bit PNG -> metres: value * scale, if text fields do not tell: scale and unit (sample.py), near and far (MoGe).

    The latter's codes: 0 unknown, 65535 infinite, else near^(1-k) far^k with k = (value - 1) / 65533.
    """
    image = open_image(content, ("PNG",))
    if not image.mode.startswith("I"):
        few = "holds 256 depths" if image.mode in ("1", "L", "LA") else "is a picture of depth, not depth"
        raise ValueError(f"a PNG of mode {image.mode} {few}; give 16-bit grey, .npy or .pfm")
    codes = np.asarray(image)
    if "near" not in image.info:
        return codes * np.float32(image.info["scale"] if {"scale", "unit"} <= image.info.keys() else scale)
    near, far, unit = (float(image.info.get(key, 1)) for key in ("near", "far", "unit"))  # unit: in early files
    metres = unit * near * (far / near) ** ((np.arange(65536, dtype=np.float32) - 1) / 65533)
    metres[[0, 65535]] = 0, np.inf
    return metres[codes]


def npy_depth(content, scale):
    """.npy array of numbers (H, W), or with axes of length one, times scale. Never unpickled."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    check_pixels(read_header(file)[0])
    depth = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(depth, np.ndarray) or depth.dtype.kind not in "fiu" or depth.squeeze().ndim != 2:
        raise ValueError(f"has shape {getattr(depth, 'shape', '?')}; one map (height, width) of numbers is needed")
    return depth.squeeze() * np.float32(scale)


def pfm_depth(content, scale):
    """One-channel PFM of either byte order, rows from the bottom up, times scale."""
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?)[\d.eE+-]+\s", content)
    if not header:
        raise ValueError("not a one-channel PFM")
    width, height, order = int(header[1]), int(header[2]), "<" if header[3] else ">"
    check_pixels((height, width))
    rows = np.frombuffer(content, order + "f4", width * height, header.end()).reshape(height, width)
    return rows[::-1].astype(np.float32) * np.float32(scale)


MAPS = {"png": png_depth, "npy": npy_depth, "pfm": pfm_depth}


def read_map(name, content, scale=1.0):
    """Bytes of a .png, .npy or .pfm map, told by name's suffix -> (H, W) float32, times scale."""
    suffix = name.rpartition(".")[2].lower()
    if suffix not in MAPS:
        refuse(f"depth is read from {', '.join(MAPS)}")
    return MAPS[suffix](content, scale).astype(np.float32, copy=False)


def read_depth(name, content, scale=1.0, mask=None, low=0.0, high=0.0):
    """read_map, and what is known of it: (depth (H, W) float32 in metres, known (H, W) bool). Raises BadSample.

    Missing is what is not above low, not finite, above high (0: no limit), or 0 in mask (bytes of an image).
    """
    depth = read_map(name, content, scale)
    known = (depth > max(low, 0)) & (depth <= (high or np.finfo(np.float32).max))  # NaN is neither
    if mask is not None:
        mask = open_image(mask)
        mask = np.asarray(mask.convert("RGB") if mask.mode in ("LA", "RGBA") else mask) > 0
        mask = mask.any(-1) if mask.ndim == 3 else mask
        if mask.shape != depth.shape:
            refuse(f"has shape {depth.shape}, its mask {mask.shape}")
        known &= mask
    if not known.any():
        refuse("no valid pixel: none is above 0, finite, in range and unmasked")
    return depth, known


# ---- Geometry: one crop for the image and its depth ----


def crop_box(shape, whole, size, place=(0.5, 0.5)):
    """(left, top, right, bottom) of the largest crop with the aspect of size (H, W), place in 0..1 of the room left.

    In pixels of a map of shape (h, w), which may have another resolution than the whole picture (h, w) that it is of,
    but not another aspect, or BadSample is raised.
    """
    y, x = shape[0] / whole[0], shape[1] / whole[1]
    if abs(x - y) > max(1, x, y) * (1 / whole[0] + 1 / whole[1]):  # more than rounding
        refuse(f"of another shape than its image, {tuple(shape)} beside {tuple(whole)}")
    scale = min(whole[0] / size[0], whole[1] / size[1])
    tall, wide = size[0] * scale, size[1] * scale
    top, left = max(whole[0] - tall, 0) * place[0], max(whole[1] - wide, 0) * place[1]
    return left * x, top * y, min((left + wide) * x, shape[1]), min((top + tall) * y, shape[0])


def nearest(values, known, size, box):
    """Crop and resize a map (h, w), known (h, w) bool -> the same at size (H, W), by nearest known pixel.

    Each pixel of the result takes, of the pixels that it covers, the known one nearest to its centre: sparse depth
    survives, and nothing is averaged across holes or edges. Where it covers none it is unknown.
    """
    (left, top, right, bottom), (height, width) = box, size
    tall, wide = (bottom - top) / height, (right - left) / width
    y, x = (top + (np.arange(height) + 0.5) * tall).astype(int), (left + (np.arange(width) + 0.5) * wide).astype(int)
    out, found = values[y[:, None], x], known[y[:, None], x]
    # Known pixels in cells whose middle is not: the one nearest to the middle wins.
    y, x = (np.arange(values.shape[0]) + 0.5 - top) / tall, (np.arange(values.shape[1]) + 0.5 - left) / wide  # in cells
    rows, columns = (slice(*np.searchsorted(v, (0, n))) for v, n in ((y, height), (x, width)))
    i, j = y[rows].astype(int), x[columns].astype(int)
    r, c = np.divmod(np.flatnonzero(known[rows, columns] & (~found).take(j, 1).take(i, 0)), len(j))
    away = (((y[rows] - i - 0.5) * tall) ** 2)[r] + (((x[columns] - j - 0.5) * wide) ** 2)[c]
    cell, closest = i[r] * width + j[c], np.full(height * width, np.inf)
    np.minimum.at(closest, cell, away)
    best = away == closest[cell]
    out.flat[cell[best]], found.flat[cell[best]] = values[rows, columns][r[best], c[best]], True
    return out, found


def load_rgb(content, size=None, place=(0.5, 0.5)):
    """Bytes of an image -> (rgb (H, W, 3) uint8, (height, width) of the whole picture), cropped and resized to size.

    Upright by EXIF, transparent parts white, antialiased. A JPEG is decoded at a reduced scale, twice size or more.
    """
    image = open_image(content)
    turned = image.getexif().get(0x0112, 1)  # orientation
    whole = image.size if turned in (5, 6, 7, 8) else image.size[::-1]
    if size:
        shrink = 2 * max(size[0] / whole[0], size[1] / whole[1])
        image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    if turned != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    elif image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))  # 16-bit grey
    image = image if image.mode == "RGB" else image.convert("RGB")
    if size:
        image = image.resize(size[::-1], Image.BICUBIC, crop_box(image.size[::-1], whole, size, place))
    return np.asarray(image), whole


# ---- Sources of samples: World, Files ----


def left_out(caption, length):
    """The words of a caption that encode_text cuts, the one that it would split among them; "" if all fit."""
    words = caption.split()
    tokens = itertools.accumulate(-(-len(word.encode()) // TEXT_PATCH) for word in words)
    return " ".join(word for word, used in zip(words, tokens, strict=True) if used > length // TEXT_PATCH)


def encode_text(captions, length):
    """Captions -> (B, length) uint8: UTF-8, each word at the start of a token of TEXT_PATCH bytes, zeros between.

    A word longer than a token goes on in the next; what does not fit in length is cut. An empty caption is all zeros.
    """
    text = np.zeros((len(captions), length // TEXT_PATCH, TEXT_PATCH), np.uint8)
    for row, line in zip(text, captions, strict=True):
        words = (word.encode() for word in line.split())
        pieces = (word[i : i + TEXT_PATCH] for word in words for i in range(0, len(word), TEXT_PATCH))
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


WINDOW = 8  # shards whose samples are shuffled together
TRIES = 10  # samples that are tried in place of one that cannot be read
CHUNK = 500  # shards whose samples are counted before that is written down


class Files(Dataset):
    """Samples of a folder or of tar shards. Item i is the sample at place i % n of epoch i // n, of n samples in all.

    An epoch has each sample once. In training its order is computed from (seed, epoch): the shards are shuffled and
    taken WINDOW at a time, then the samples of each window are shuffled; a folder is one window. So the samples of a
    step do not depend on the number of ranks, --workers or --grad-accum, and resuming reads no earlier sample.

    units: the folder, or the paths of the shards.
    index: for each unit the entries of its samples: rows of the folder, or offsets in the shard. None until the samples
        of the shards are counted; use() sets it.
    read(unit, entry): (name, where the sample is listed, load). load() returns a dict: "text", "depth_scale" (or None),
        the names of the files "image", "depth" and "mask" (or None), and "read", which maps such a name to bytes.
    """

    def __init__(self, units, index, read, args, training, size, with_depth):
        self.units, self.read, self.args = units, read, args
        self.training, self.size, self.with_depth = training, size, with_depth
        self.use(index)

    def use(self, index):
        self.index = index
        self.count = sum(map(len, index or ()))

    def locate(self, epoch, place):
        """(unit, entry) of the sample at a place of an epoch."""
        order, bounds = unit_order(self, epoch)
        if self.training:
            window = np.searchsorted(bounds[:-1:WINDOW], place, side="right") - 1
            start, shuffled = window_order(self, epoch, window)
            place = start + shuffled[place - start]
        i = np.searchsorted(bounds, place, side="right") - 1
        return self.units[order[i]], self.index[order[i]][place - bounds[i]]

    def __getitem__(self, number):
        """Returns ((rgb, depth, caption, shape, name) as decode does, None), or (a substitute, the problem) if the
        sample cannot be read.

        In training the substitute is the next sample in the order of the epoch that can be read, or a grey image if
        none of TRIES can: it does not depend on how a batch is split. Otherwise it is None.
        """
        epoch, place = divmod(number, self.count)
        problem = None
        for attempt in range(1 + TRIES if self.training else 1):
            name, where, load = self.read(*self.locate(epoch, (place + attempt) % self.count))
            try:
                return (*parse(where, self.decode, load, epoch, name), name), problem
            except BadSample as error:
                problem = problem or str(error)
        grey = np.full((*self.size, 3), 128, np.uint8), np.zeros(self.size, np.float32), "", self.size, ""
        return grey if self.training else None, problem

    def decode(self, load, epoch, name):
        """-> rgb (H, W, 3) uint8; depth (H, W) float32 in metres, 0 where missing; caption; shape of the whole picture.

        Image and depth are cropped together: at the centre, or in training at a random place, and mirrored half of the
        time, unless the caption tells left from right. That randomness follows from (seed, epoch, name) alone.
        """
        files, args, size = load(), self.args, self.size
        text, read, image, depth_name = (files[key] for key in ("text", "read", "image", "depth"))
        if text is None:
            text = ""
        if not isinstance(text, str) or len(text.encode()) > MAX_CAPTION:
            refuse(f"its caption is not text, or longer than {MAX_CAPTION} bytes")
        place, mirrored = (0.5, 0.5), False
        if self.training:
            rng = random.Random(f"{args.seed} {epoch} {name}".encode(errors="surrogatepass"))
            place = rng.random(), rng.random()
            mirrored = rng.random() < 0.5 and not re.search(r"\b(left|right)", text, re.IGNORECASE)
        rgb, whole = parse(image, lambda: load_rgb(read(image), size, place))
        depth = np.zeros(size, np.float32)

        def load_depth():
            scale = files["depth_scale"]
            if scale is None:
                scale = args.depth_scale if depth_name.lower().endswith("png") else 1.0
            if type(scale) not in (int, float) or not 0 < scale < math.inf:
                refuse(f"depth_scale {scale!r} is not a positive number")
            mask = read(files["mask"]) if files["mask"] else None
            values, known = read_depth(depth_name, read(depth_name), scale, mask, args.depth_min, args.depth_max)
            values, known = nearest(values, known, size, crop_box(values.shape, whole, size, place))
            return np.where(known, values, 0)

        if depth_name and self.with_depth:
            depth = parse(depth_name, load_depth)
        if mirrored:
            rgb, depth = rgb[:, ::-1], depth[:, ::-1]
        return rgb, depth, text, whole


@functools.lru_cache(4)
def unit_order(source, epoch):
    """(indices of the units in the order of an epoch, the place where each begins, with the end of the last)."""
    counts = np.array([len(entries) for entries in source.index])
    order = np.arange(len(counts))
    if source.training:
        order = np.random.default_rng([source.args.seed, epoch]).permutation(order)
    return order, np.concatenate([[0], np.cumsum(counts[order])])


@functools.lru_cache(4)
def window_order(source, epoch, window):
    """(first place of a window of an epoch, permutation of its places)."""
    bounds = unit_order(source, epoch)[1]
    start, stop = bounds[window * WINDOW], bounds[min((window + 1) * WINDOW, len(bounds) - 1)]
    return start, np.random.default_rng([source.args.seed, epoch, window + 1]).permutation(stop - start)


def collate(items):
    """Items of Files -> (rgb (B, H, W, 3), depth (B, H, W), captions, shapes, names), and problems."""
    samples = [sample for sample, _ in items if sample]
    problems = [problem for _, problem in items if problem]
    if not samples:
        return None, None, (), (), (), problems
    rgb, depth, captions, shapes, names = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(rgb)), torch.from_numpy(np.stack(depth)), captions, shapes, names, problems


@functools.lru_cache(4)
def read_index(folder):
    """Rows of a folder's .index.txt (MoGe) or metadata.jsonl; "problem" says why one cannot be used."""
    moge, rows = (folder / ".index.txt").exists(), {}
    path = folder / (".index.txt" if moge else "metadata.jsonl")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path} row {number}"
        try:
            name = line.decode().strip()
            row = {"file_name": f"{name}/image.jpg", "depth_file_name": f"{name}/depth.png"}
            if not moge:
                row = parse_json(line)
                name = os.path.splitext(row["file_name"])[0]
            problem = f"names {row['file_name']} again" if name in rows else None
        except (ValueError, KeyError, TypeError):
            row, name, problem = {}, where, "not UTF-8 JSON with a file_name"
        if line.strip():
            rows[where if problem else name] = row | {"name": name, "where": where, "problem": problem}
    return list(rows.values())


def read_row(folder, row):
    """(name, where, load) of a row of read_index, see Files."""

    def load():
        if row["problem"]:
            refuse(row["problem"])
        names = {key: str(row.get(f"{key}_file_name") or "") for key in ("depth", "mask")}
        read = functools.partial(read_file, folder=folder)
        text, scale = row.get("text"), row.get("depth_scale")
        return {"image": str(row["file_name"]), "text": text, "depth_scale": scale, "read": read, **names}

    return row["name"], row["where"], load


class HeaderFile(io.FileIO):
    """A tar file whose headers are read. A damaged one may declare a name of gigabytes, which raises ReadError."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def read_shard(path, start=0):
    """Yields (offset, name, where, load) for the samples of a tar file that begin at offset start or later, see Files.

    A sample is consecutive members that share a name up to its first dot. Only headers are read; load() reads the
    contents. If the file is damaged, the last sample stands for what is lost, and its load() raises BadSample.
    """
    damage, end = [], start

    def members():
        nonlocal end
        try:
            with HeaderFile(path) as file:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while member := tar.next():
                        tar.members.clear()  # it would keep every header
                        if member.size < 0 or tar.offset <= member.offset:
                            raise tarfile.ReadError("a member of negative size")
                        end = tar.offset
                        folder, _, base = member.name.rpartition("/")
                        stem, _, suffix = base.partition(".")
                        if stem and suffix and not member.isdir():
                            yield f"{folder}/{stem}" if folder else stem, suffix.lower(), member
                    file.seek(tar.offset)
                    if file.read(512) != bytes(512):
                        damage.append("cut short")
        except Exception as error:
            damage.append(error)

    name = None
    for name, found in itertools.groupby(members(), lambda member: member[0]):
        group = {suffix: member for _, suffix, member in found}
        offset = min(member.offset for member in group.values())
        yield offset, name, f"{path}: {name}", functools.partial(load_group, path, group)
    if damage or name is None:
        problem = f"damaged ({damage[0]}), what follows is lost" if damage else "holds no sample"
        yield end, str(path), path, functools.partial(refuse, problem)


def load_group(path, group):
    """load() of a sample of a tar file, see Files; group: {suffix: member}."""

    def read(suffix):
        member = group[suffix]
        if not member.isfile() or member.issparse():
            refuse(f"{member.name} is a link, a device or sparse")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            refuse(f"{member.name} is a name that leads out")
        if member.size > MAX_BYTES:
            refuse(f"declares {member.size} bytes")
        with open(path, "rb") as file:
            file.seek(member.offset_data)
            content = file.read(member.size)
        return content if len(content) == member.size else refuse("cut short")

    image = next((suffix for suffix in IMAGES if suffix in group), None)
    depth = next((f"depth.{kind}" for kind in MAPS if f"depth.{kind}" in group), None)
    mask = "mask.png" if "mask.png" in group else None
    if not image:
        refuse(f"no image ({', '.join(IMAGES)})")
    fields = parse("json", lambda: parse_json(read("json"))) if "json" in group else {}
    text = parse("txt", lambda: read("txt").decode()) if "txt" in group else fields.get("caption")
    scale = fields.get("depth_scale")
    return {"image": image, "depth": depth, "mask": mask, "text": text, "depth_scale": scale, "read": read}


def read_group(path, offset):
    """(name, where, load) of the sample of a tar file that begins at an offset, see Files."""
    return next(read_shard(path, int(offset)))[1:]


def sample_offsets(path, limit=None):
    """Offsets in a tar file of its samples, of the first limit alone if that is given."""
    return np.array([offset for offset, *_ in itertools.islice(read_shard(path), limit)])


def index_shards(paths, workers=0, limit=None):
    """sample_offsets of each shard, found by so many processes. Stops after the shards that hold limit samples."""
    count = functools.partial(sample_offsets, limit=limit)
    loader = DataLoader(paths, batch_size=None, collate_fn=count, num_workers=workers, worker_init_fn=stay_with_parent)
    index, total = [], 0
    for offsets in tqdm(loader, "counting the samples of --data", delay=5, leave=False):
        index.append(offsets)
        total += len(offsets)
        if limit is not None and total >= limit:
            break
    return index


def counted_shards(folder):
    """{key of a shard: offsets of its samples} of all that is in a run's shards/; offsets stay on disk until used."""
    known = {}
    for path in folder.glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError):  # damaged: these shards are counted again
            counts = json.loads(path.read_bytes())
            offsets = np.load(path.with_suffix(".npy"), mmap_mode="r")
            known |= zip(counts, np.split(offsets, np.cumsum([*counts.values()])[:-1]), strict=True)
    return known


def kept_index(paths, out, workers, rank, ranks):
    """index_shards, kept in the run directory: shards that changed in size or time are counted again.

    Each rank counts its share, a CHUNK at a time, and waits for the files of the others, since counting may take longer
    than --timeout allows a collective. If a rank dies, torchrun ends all, and what has been counted is kept.
    """
    folder = Path(out) / "shards"
    own = folder / str(rank)
    own.mkdir(parents=True, exist_ok=True)
    states = [os.stat(path) for path in paths]
    keys = [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in zip(paths, states, strict=True)]
    known = counted_shards(folder)
    missing = [(key, path) for key, path in list(zip(keys, paths, strict=True))[rank::ranks] if key not in known]
    if known and missing:
        tell(f"--data: {len(missing)} shards are new or changed, and are counted; the order of samples may change")
    number = len(list(own.glob("*.json")))
    for start in range(0, len(missing), CHUNK):
        chunk = dict(missing[start : start + CHUNK])
        index = index_shards(list(chunk.values()), workers)
        write_bytes(own / f"{number}.npy", to_bytes(np.save, np.concatenate(index)))
        write_json(own / f"{number}.json", dict(zip(chunk, map(len, index), strict=True)))
        number += 1
    while not counted_shards(folder).keys() >= set(keys):
        time.sleep(1)
    known = counted_shards(folder)
    return [known[key] for key in keys]


def expand(pattern):
    """'a{08..10}.tar' -> ['a08.tar', 'a09.tar', 'a10.tar'], for any number of brace ranges, of MAX_SHARDS in all."""
    first, *pieces = re.split(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    paths = [first]
    for low, high, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        numbers = range(int(low), int(high) + 1)
        if not 0 < len(numbers) * len(paths) <= MAX_SHARDS:
            limit = f"and name at most {MAX_SHARDS:,} files"
            fail(f"--data {pattern}: a range in braces must go from the lower number to the higher, {limit}")
        paths = [f"{path}{number:0{len(low)}}{text}" for path in paths for number in numbers]
    return paths


def open_source(args, split, size, device="cpu", with_depth=True):
    """The flags of source_settings -> a source of samples at size (H, W). Files are shuffled in split "train" only."""
    if args.data == "synthetic":
        return World(split, size, device)
    folder, settings = Path(args.data), (args, split == "train", size, with_depth)
    if any(os.path.isfile(folder / name) for name in (".index.txt", "metadata.jsonl")):
        rows = read_index(folder)
        if not rows:
            fail(f"--data {args.data}: lists no samples")
        return Files([folder], [rows], read_row, *settings)
    shards = expand(args.data)
    missing = next((path for path in shards if not os.path.isfile(path)), None)
    if missing is not None:
        known = "synthetic, a folder with metadata.jsonl or .index.txt, or tar shards"
        fail(f"--data {args.data}: unknown source, no file {missing}; give {known}")
    return Files(shards, None, read_group, *settings)


def training_indices(seed, step, batch_size, rank=0, world=1):
    """Global indices of the samples of one step that one rank trains on.

    Another seed sees other scenes of the built-in world, unless it is a multiple of 2^25 away.
    """
    share = batch_size // world
    start = (seed << 32) + step * batch_size + rank * share
    return range(start, start + share)


class Draws:
    """Random numbers that belong to samples: row i of a draw is a hash of (key, indices[i], number of the draw).

    So noise, noise levels and masks are the same however a batch is split over ranks and accumulation steps, and on
    every device: uniform ones to the last bit, normal ones to rounding. A draw is SplitMix64 from B starting states.
    """

    def __init__(self, key, indices, device="cpu"):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big", signed=True)
        indices = torch.tensor(indices, dtype=torch.int64).to(device, non_blocking=True)
        self.streams = split_mix(indices * GOLDEN + key)  # (B,)
        self.draws = 0

    def bits(self, *shape):
        """(B, *shape) int64, 64 random bits each. The next call gives others."""
        self.draws += 1
        start = split_mix(self.streams + self.draws)  # (B,)
        place = torch.arange(math.prod(shape), device=start.device)
        return split_mix(start[:, None] + place * GOLDEN).view(-1, *shape)

    def rand(self, *shape):
        """(B, *shape) from U[0, 1)."""
        return shift_right(self.bits(*shape), 40) * 2.0**-24  # what float32 holds exactly

    def randn(self, *shape):
        """(B, *shape) from N(0, 1), by Box and Muller's transform: 64 bits are a radius and an angle, and give two."""
        count = math.prod(shape)
        bits = self.bits((count + 1) // 2)
        radius = ((shift_right(bits, 32) + 1) * 2.0**-32).log().mul(-2).sqrt()
        angle = (bits & 0xFFFFFFFF) * (2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(-1, *shape)


def to_device(rgb, depth, device):
    """uint8 (B, H, W, 3), metres (B, H, W) -> (values, valid) as World.samples gives them."""
    rgb, depth = (x.to(device, non_blocking=True) for x in (rgb, depth[:, None]))
    return {"rgb": rgb.movedim(-1, 1).float() / 127.5 - 1, "depth": depth}, {"rgb": None, "depth": depth > 0}


def training_batches(source, args, step, rank, world, device):
    """Endless (values, valid, captions) as World.samples gives them, and their global indices: of one rank from a step
    on, each step in args.grad_accum parts.

    Samples of files that cannot be used are skipped and counted, ten of them are named, and more than 1% (of 1000 at
    least) ends the run. Shards are counted first, into args.out if there is one.
    """
    split = functools.partial(training_indices, batch_size=args.batch_size, rank=rank, world=world)
    steps = (split(args.seed, s) for s in itertools.count(step))
    part = args.batch_size // world // args.grad_accum
    if isinstance(source, World):
        for indices in steps:
            for i in range(0, len(indices), part):
                yield *source.samples(indices[i : i + part]), indices[i : i + part]
    if source.index is None and getattr(args, "out", None):
        source.use(kept_index(source.units, args.out, args.workers, rank, world))
    if source.index is None:
        source.use(index_shards(source.units, args.workers))
    tried, bad, named = 0, 0, set()
    numbers = (split(0, s) for s in itertools.count(step))
    loader = load_batches(source, numbers, args.workers, device)
    for indices, (rgb, depth, captions, *_, problems) in zip(steps, loader, strict=False):
        tried, bad = tried + len(rgb), bad + len(problems)
        for problem in problems:
            if problem not in named and len(named) < 10:
                named.add(problem)
                tell(f"skipped, {bad} of {tried} samples: {problem}")
        if bad > max(tried, 1000) / 100:
            share = f"{bad} of {tried} samples cannot be used, more than 1%"
            fail(f"--data {args.data}: {share}; the last: {problems[-1]}")
        for i in range(0, len(indices), part):
            cut = slice(i, i + part)
            yield *to_device(rgb[cut], depth[cut], device), captions[cut], indices[cut]


def in_order(source, count, batch_size, device="cpu", workers=0, strict=True):
    """(values, valid, captions, names, shapes of the whole pictures) of the first count samples, batch_size at a time.

    strict: a sample of files that cannot be used ends the program with one line; otherwise it is left out.
    """
    if isinstance(source, World):
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            yield *source.samples(indices), [f"{i:06}" for i in indices], [source.size] * len(indices)
        return
    if source.index is None:
        source = copy.copy(source)
        source.use(index_shards(source.units, limit=count))
    numbers = range(source.count)[:count]
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    for rgb, depth, captions, shapes, names, problems in load_batches(source, batches, min(workers, 1)):
        if problems and strict:
            fail(f"--data {problems[0]}")
        if names:
            yield *to_device(rgb, depth, device), captions, names, shapes


def load_batches(source, numbers, workers, device="cpu"):
    """What collate makes of the items of Files with these numbers, a list for each batch, loaded by so many workers."""
    pinned = torch.device(device).type == "cuda"
    options = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": stay_with_parent}
    return DataLoader(source, batch_sampler=numbers, collate_fn=collate, **options)


def stay_with_parent(worker):
    """Let a worker live exactly as long as its parent, the process that trains.

    Schedulers and Ctrl-C signal both, and the parent finishes its step and saves before it ends. So the worker ignores
    these signals; the system kills it when its parent has ended, in whatever way.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's workers look every five seconds
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: when the thread that started this process ends
        forked = multiprocessing.get_start_method() == "fork"
        if forked and os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)  # the parent has ended before that call


@atexit.register
def end_workers():
    """Kill the workers: multiprocessing would send SIGTERM, which they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class PixelsAndBytes:
    """No encoders. What --encoders FILE.py loads in their place has the same seven members:

    encode_image  (B, 3, H, W) in [-1, 1] -> (B, image_channels, H / image_stride, W / image_stride), of unit variance
    decode_image  the inverse
    encode_text   B captions -> (B, text_length, text_dim) float32, zeros where there is no text (here: bytes)

    image_channels, image_stride  channels of the latents, and pixels per latent, per side
    text_length, text_dim         tokens of a caption, channels of each; text_dim 0 is bytes, (B, text_length) uint8

    What they return is finite, and float32 but for bytes.
    """

    image_channels, image_stride, text_dim = 3, 1, 0

    def __init__(self, text_length):
        self.text_length = text_length

    def encode_image(self, rgb):
        return rgb

    decode_image = encode_image

    def encode_text(self, captions):
        return encode_text(captions, self.text_length)


# Of a plug-in: the range of each.
ENCODER_NUMBERS = dict(image_channels=(1, 4096), image_stride=(1, 256), text_dim=(0, 1 << 16), text_length=(1, 1 << 16))


def refuse_encoders(path, problem):
    fail(f"--encoders {path}: {problem}; README shows a file that works")


@contextlib.contextmanager
def guarded(path, name):
    """Whatever the member of a plug-in called name raises is one line and exit code 2. Also decorates a function."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        refuse_encoders(path, f"{name} raised {type(error).__name__}: {error}")


def load_encoders(path, device):
    """Run a plug-in, a Python file -> the seven members of what its load(device) returns, the functions guarded."""
    if not (path.endswith(".py") and Path(path).is_file()):
        refuse_encoders(path, "no such file, or its name does not end in .py")
    with guarded(path, "load"):
        spec = importlib.util.spec_from_file_location("encoders", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded = module.load(device)
    members = types.SimpleNamespace()
    for name in (*ENCODER_NUMBERS, "encode_image", "decode_image", "encode_text"):
        with guarded(path, name):
            member = getattr(loaded, name)
        setattr(members, name, member if name in ENCODER_NUMBERS else guarded(path, name)(member))
    try:
        check_numbers(members, **ENCODER_NUMBERS)
    except ValueError as error:
        refuse_encoders(path, error)
    if not members.text_dim and members.text_length % TEXT_PATCH:
        refuse_encoders(path, f"text_length is {members.text_length}, must be a multiple of {TEXT_PATCH} bytes")
    return members


@torch.no_grad()
def try_encoders(path, encoders, device, patch):
    """Refuse encoders whose results for a batch of two are not what PixelsAndBytes documents."""
    height = 4 * patch
    width = 6 * patch
    rgb = torch.linspace(-1, 1, 6 * height * width, device=device).view(2, 3, height, width)

    def check(name, given, *shape):
        """What the member called name returns for given, which must be a finite tensor of this shape."""
        found = getattr(encoders, name)(given)
        returned = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if returned != shape:
            refuse_encoders(path, f"{name} returned {returned}, must be a tensor of shape {shape}")
        dtype = torch.uint8 if len(shape) == 2 else torch.float32
        if found.dtype != dtype:
            refuse_encoders(path, f"{name} returned {found.dtype}, must be {dtype}")
        if not found.isfinite().all():
            refuse_encoders(path, f"{name} returned NaN or infinity for a batch of two")
        return found

    stride = encoders.image_stride
    latents = check("encode_image", rgb, 2, encoders.image_channels, height // stride, width // stride)
    check("decode_image", latents, 2, 3, height, width)
    text_dim = [encoders.text_dim] if encoders.text_dim else []
    check("encode_text", ["", "a red ball"], 2, encoders.text_length, *text_dim)


def open_encoders(path, device, config, trained_with=None):
    """--encoders -> what its load(device) returns, or PixelsAndBytes. Exit code 2 if that fails.

    trained_with: the file that a checkpoint names ("" for none); what does not fit the checkpoint's config is refused.
    """
    encoders = load_encoders(path, device) if path else PixelsAndBytes(config.text_length)
    if path:
        try_encoders(path, encoders, device, config.with_encoders(encoders).patch)
    if trained_with and path and Path(trained_with).name != Path(path).name:
        tell(f"--encoders {path}: the checkpoint was trained with {trained_with}; are they the same?")
    if trained_with is not None and config.with_encoders(encoders) != config:
        first = config.modalities[0]
        was = f"--encoders {trained_with}" if trained_with else "no --encoders"
        needs = f"{first.channels} channels at 1/{first.stride}, text {config.text_length} x {config.text_dim}"
        fail(f"--encoders {path or '(none)'}: the checkpoint was trained with {was}: {needs}; give what fits")
    return encoders


# ---- Flags ----

MAX_SIDE = 8192  # pixels


def number(low, high, above=False, kind=float):
    """Type of a flag: text -> a number from low to high, or above low. NaN and infinity are out of every range."""
    what = "a whole number" if kind is int else "a number"
    span = f"above {low}, up to {high}" if above else f"from {low} to {high}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text}: must be {what} {span}")
        return value

    return read


whole = functools.partial(number, kind=int)
SEED = whole(0, 2**31 - 1)
COUNT = whole(1, 10**9)  # of steps, samples or seconds
SIDE = whole(0, MAX_SIDE)  # 0 stands for another flag's or a network's
SHARE = number(0, 1)
POSITIVE = number(0, 10**6, above=True)


def one_of(*names):
    """Type of a flag: text that is one of names, unchanged."""

    def read(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text}: must be one of {', '.join(filter(None, names))}")
        return text

    return read


def parse_size(text, low=1):
    """ "HxW", or one side, in pixels -> (H, W). Raises argparse.ArgumentTypeError if it is neither, or out of range."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < low or max(size) > MAX_SIDE:
        span = f"pixels, {low} to {MAX_SIDE} a side"
        raise argparse.ArgumentTypeError(f"{text}: must be {span}, as one side (64) or as HxW (48x64)")
    return size


def size_text(low=1):
    """Type of a flag: text that is empty, or that parse_size reads, unchanged."""

    def read(text):
        if text:
            parse_size(text, low)
        return text

    return read


class Flags(argparse.ArgumentParser):
    """The flags of a script. Whatever is wrong with what a user gives is told in one line, with exit code 2."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def setting(self, flag, default, help, type=str, **options):
        """Declare a flag. type reads and checks its text; a default of False or None makes it a switch."""
        if default is None or default is False:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = type
        self.add_argument(flag, default=default, help=f"{help} (default: %(default)s)", **options)

    def error(self, message):
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if ": must be " in problem:  # our types' messages begin with the value, argparse's own do not
            fail(f"{flag} {problem}")
        fail(f"{message.removeprefix('argument ')}; --help lists the flags")


def source_settings(p):
    """The flags of every script that reads samples."""
    p.setting("--data", "synthetic", "synthetic, a folder (metadata.jsonl or .index.txt), or 'shards/{000..999}.tar'")
    p.setting(
        "--depth-scale",
        0.001,
        "metres per unit of a 16-bit PNG without a scale of its own (KITTI: 0.00390625)",
        POSITIVE,
    )
    p.setting("--depth-min", 0.0, "depth up to this is missing, in metres", number(0, 10**6))
    p.setting("--depth-max", 0.0, "depth beyond this is missing, in metres; 0 is no limit", number(0, 10**6))
    p.setting("--workers", 2, "processes that read files, of each rank (evaluation: one at most)", whole(0, 256))
    p.setting("--encoders", "", "FILE.py of frozen encoders, which is run, to train on latents and text embeddings")


def check_depth_range(args):
    """Refuse source_settings by which all depth is missing."""
    if 0 < args.depth_max <= args.depth_min:
        fail(f"--depth-max {args.depth_max}: must be above --depth-min, {args.depth_min}, or 0 for no limit")


def sampling_settings(p):
    """The flags of every script that samples."""
    p.setting("--checkpoint", NANO, "checkpoint of a training script; the default was trained on the built-in world")
    p.setting("--solver", "euler", "euler, or heun (second order, two evaluations a step)", one_of("euler", "heun"))
    p.setting("--cfg", 3.0, "guidance of the image; 1 is none, the released model uses 4", number(0, 100))
    p.setting("--ensemble", 1, "samples of each depth map, whose median is taken", whole(1, 1000))
    counted = "ensemble members and guided copies count, and those of one image stay together"
    p.setting("--batch-size", 16, f"samples per call of the network; {counted}", whole(1, 10**5))
    p.setting("--device", "auto", "auto, cuda, mps or cpu")


def training_settings(p, steps, out):
    """The flags that both stages of training share; steps and out are their defaults."""
    p.setting("--size", 0, "side of the images in pixels; 0 is the network's", SIDE)
    p.setting("--steps", steps, "optimizer steps", COUNT)
    p.setting("--batch-size", 32, "samples a step, over all ranks and accumulation steps together", whole(1, 1 << 20))
    p.setting("--grad-accum", 1, "parts that each rank's share of a batch is split into, to save memory", COUNT)
    p.setting("--lr", 6e-3, "peak learning rate", number(0, 1, above=True))
    p.setting("--optimizer", "muon", "muon (blocks' matrices; AdamW for the rest) or adamw", one_of("muon", "adamw"))
    p.setting("--warmup", 50, "steps of linear warm-up; then the rate falls linearly to zero", COUNT)
    p.setting("--clip", 1.0, "gradient norm is clipped to this", POSITIVE)
    p.setting("--ema", 0.99, "decay of the averaged weights, which sampling uses", SHARE)
    p.setting("--drop-caption", 0.1, "share of captions dropped, for classifier-free guidance", SHARE)
    p.setting("--seed", 0, "of weights, scenes and noise", SEED)
    p.setting("--device", "auto", "auto, cuda, mps or cpu")
    p.setting("--compile", None, "torch.compile; the default is on CUDA only")
    p.setting("--out", out, "run directory")
    p.setting("--checkpoint-activations", False, "compute blocks again in the backward pass: less memory, slower")
    p.setting("--shard", False, "split the optimizer's state over the ranks, if there are several (ZeRO, stage 1)")
    p.setting("--resume", False, "go on from the run directory's newest whole checkpoint, if any")
    p.setting("--checkpoint-every", 250, "steps between checkpoints", COUNT)
    p.setting("--keep", 2, "checkpoints that are kept, the newest ones", COUNT)
    p.setting("--log-every", 10, "steps between rows of metrics.jsonl", COUNT)
    p.setting("--sample-every", 500, "steps between picture grids", COUNT)
    p.setting("--max-skipped", 20, "skipped steps in a row (loss or gradient not finite) that end the run", COUNT)
    p.setting("--timeout", 1800, "seconds until a silent rank ends the run; allow for a checkpoint", whole(1, 10**6))
    p.setting("--dry-run", 0, "number of GPUs: print FLOPs, and the bytes on each, and stop", whole(0, 10**6))


def parse_order(text, names):
    """--order: log2(alpha), or different ones of names -> a float in -14..14, or their list. Exit code 2 otherwise."""
    try:
        order = float(text)
        if not -14 <= order <= 14:
            fail(f"--order {text}: log2(alpha) is in -14..14; rgb,depth and depth,rgb are the limits")
    except ValueError:
        order = text.replace(" ", "").split(",")
        if sorted(set(order) & set(names)) != sorted(order):
            fail(f"--order {text}: choose joint, log2(alpha), or different ones of {', '.join(names)}")
    return order


# ---- Runs on disk ----


def tell(message):
    """One line on stderr, above a progress bar. What a message quotes may be of any length: its middle is cut."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    tqdm.write(line if len(line) < 300 else f"{line[:190]} ... {line[-100:]}", file=sys.stderr)


def fail(message):
    """One clear line on stderr, exit code 2."""
    tell(message)
    raise SystemExit(2)


def pick_device(name):
    """--device auto | cuda | mps | cpu -> torch.device; of several GPUs that of this rank, unless cuda:N names one."""
    if name.split(":")[0] not in ("auto", "cuda", "mps", "cpu"):
        fail(f"--device {name}: choose auto, cuda, mps or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, AttributeError):  # the last of torch without CUDA
        fail(f"--device {name}: not available here; use --device auto")
    if device.type == "cpu" and sys.platform == "linux":
        # glibc hands every freed block over 32 MB back to the system, and faulting it in again costs more than the
        # matmul that fills it. Keep memory: M_MMAP_THRESHOLD = -3, M_TRIM_THRESHOLD = -1.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30), libc.mallopt(-1, (1 << 31) - 1)
    return device


def run_script(main):
    """Call main, a whole script. What the machine or the user's disk lacks is one line and exit code 2; Ctrl-C is 130.

    Every other exception is a bug, and keeps its traceback.
    """
    try:
        return main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}; check the path, its permissions and the space on its disk")
    except (MemoryError, RuntimeError) as error:
        texts = "can't allocate memory", "out of memory", "size calculation overflowed"  # of torch's allocators
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in texts):
            raise
        fail("out of memory; lower --batch-size or --size")


def claim_folder(path, *own, flag="--out"):
    """Make a directory to write to. It must be new, or empty, or hold a file that fits one of the patterns own.

    own: names that nobody but the script that asks would have written. So nothing of a user's is overwritten.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    holds = next(folder.iterdir(), None)
    if holds and not any(any(folder.glob(pattern)) for pattern in own):
        fail(f"{flag} {path}: already holds {holds.name}; choose a new or an empty directory")
    return folder


@contextlib.contextmanager
def tolerate(path):
    """A full disk, or a picture that takes more memory than there is, is reported and does not stop training."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:  # torch's errors, that of a full GPU too, are RuntimeErrors
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        tell(f"{path}: not written ({reason}); training goes on")
        traceback.clear_frames(error.__traceback__)  # their variables hold on to the memory
        torch.cuda.empty_cache()


def append_row(path, row):
    """Add a row to a file of JSON lines, if the disk lets it; after a line that a crash has cut, on a new one."""
    with tolerate(path), open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        file.write((b"\n" if file.read(1) not in (b"", b"\n") else b"") + json.dumps(row).encode() + b"\n")


def parse_json(text):
    """The dictionary that a JSON text, or its bytes, holds. Raises ValueError if it holds anything else."""
    try:
        found = json.loads(text)
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("not a JSON dictionary")
    return found


def read_rows(path):
    """The rows of a file of JSON lines, in order; what a crash or a full disk has cut is left out."""
    rows = []
    for line in Path(path).read_bytes().splitlines() if Path(path).is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(parse_json(line))
    return rows


def write_whole(path, write, sync=True):
    """write(file) beside the file, then renamed: if the process dies meanwhile, it is the old one or the new.

    sync: also if the machine dies. It takes milliseconds, which many small files need not.
    """
    part = Path(path).with_name("partly-written")
    part.unlink(missing_ok=True)  # not written through, should it be a link
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def to_bytes(write, *args, **options):
    """What write(file, *args, **options) writes. (On a full disk Pillow and numpy would raise errors of their own.)"""
    buffer = io.BytesIO()
    write(buffer, *args, **options)
    return buffer.getvalue()


def write_bytes(path, content, sync=True):
    """write_whole so many bytes."""
    write_whole(path, lambda file: file.write(content), sync)


def write_image(path, image, **options):
    """write_whole a Pillow image, in the format that the path's suffix names."""
    write_bytes(path, to_bytes(image.save, Path(path).suffix[1:], **options))


def write_json(path, value):
    """write_whole a value as JSON."""
    write_bytes(path, json.dumps(value, indent=1).encode() + b"\n")


def parse_run(p):
    """p.parse_args of a training script. With --resume the run's own settings, in its config.json, come before p's
    defaults: they are read as if they were flags. --out is where the user says, and a plug-in must be named again.
    """
    args = p.parse_args()
    if not (args.resume or tried_again(args.out)):
        return args
    path = Path(args.out) / "config.json"
    try:
        settings = parse_json(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        fail(f"--resume: {path} is damaged; remove it and give the run's settings as flags")
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if name in ("out", "encoders", "resume") or value == p.get_default(name):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    args, _ = p.parse_known_args(flags)
    args = p.parse_args(namespace=args)
    args.resume = True
    if settings.get("encoders") and not args.encoders:
        fail(f"--resume: this run has --encoders {settings['encoders']}, a file that is run; give the flag again")
    return args


def parent():
    """What started this process: "host:pid"."""
    return f"{platform.node()}:{os.getppid()}"


def tried_again(out):
    """Whether the torchrun that started the run's last processes has now, with --max-restarts, started this one."""
    starts = read_rows(Path(out) / "starts.jsonl")
    return "TORCHELASTIC_RUN_ID" in os.environ and bool(starts) and starts[-1].get("parent") == parent()


def git_commit():
    """The commit of this code, with -dirty if its files differ from it; "" where git knows none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def lock_run(out, resume):
    """Make the run directory, and keep it for this process until that ends, however it ends.

    A directory that holds a run is refused, unless it is to be resumed and no other process is at it.
    """
    out = Path(out)
    if list_checkpoints(out) and not resume:
        fail(f"--out {out}: already holds a run; add --resume to go on with it, or choose another --out")
    claim_folder(out, "run.lock", "starts.jsonl", "step-*.pt", "last.pt")
    file = os.open(out / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open until the process ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock of this kind is not inherited by data loaders
    except BlockingIOError:
        fail(f"--out {out}: another process is training in it; wait for its end, or choose another --out")
    except OSError as error:  # some network disks have no locks
        tell(f"--out {out}: cannot be locked ({error.strerror}); start no second run in it")


def open_run(out, settings, device, ranks, resumed=None):
    """Begin a run, or go on from step resumed: rows of metrics.jsonl past it will be written again.

    config.json gets the settings, starts.jsonl a row of what ran where.
    """
    out = Path(out)
    (out / "samples").mkdir(exist_ok=True)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv, "step": resumed or 0}
    row |= {"commit": git_commit(), "torch": torch.__version__, "device": chip, "ranks": ranks, "parent": parent()}
    rows = [row for row in read_rows(out / "metrics.jsonl") if isinstance(row.get("step"), int)]
    lines = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= (resumed or 0))
    write_bytes(out / "metrics.jsonl", lines.encode())
    write_json(out / "config.json", settings)
    append_row(out / "starts.jsonl", row)
    return out


def read_ranks():
    """(rank, ranks) of this process, as torchrun tells them in the environment; (0, 1) if it did not start it."""
    rank = os.environ.get("RANK", "0")
    ranks = os.environ.get("WORLD_SIZE", "1")
    numbers = re.fullmatch("[0-9]{1,6} [0-9]{1,6}", f"{rank} {ranks}")
    if not numbers or int(rank) >= int(ranks):
        fail(f"RANK={rank} WORLD_SIZE={ranks}: must be whole numbers, RANK the lower; use torchrun, or unset both")
    rank = int(rank)
    ranks = int(ranks)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if ranks > 1 and not os.environ.get(name):
            fail(f"WORLD_SIZE={ranks}: {name} is not set; start with torchrun, or unset WORLD_SIZE")
    return rank, ranks


def join_ranks(backend, seconds):
    """Join torchrun's ranks in a process group; all end if one is silent for so many seconds.

    torchrun shows a second try (--max-restarts) what the first has stored, addresses of the dead among it. So on one
    node every try has keys of its own; on several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each a new store.
    """
    timeout = datetime.timedelta(seconds=seconds)
    try:
        store, rank, ranks = next(dist.rendezvous("env://"))
    except (ValueError, dist.DistError) as error:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        fail(f"no other ranks at MASTER_ADDR:MASTER_PORT, {where} ({str(error).splitlines()[0]}); start with torchrun")
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def catch_signals():
    """A list that gets the number of a SIGTERM or SIGINT, for the training loop. A second one ends the process."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return caught


def list_checkpoints(out):
    """Paths of a run directory's checkpoints, oldest first; last.pt if there is nothing else."""
    paths = [path for path in Path(out).glob("step-*.pt") if re.fullmatch(r"step-[0-9]{7,}\.pt", path.name)]
    paths.sort(key=lambda path: (len(path.name), path.name))
    return paths or [path for path in [Path(out) / "last.pt"] if path.exists()]


def worth_saving(step, skipping, rank, *networks):
    """Whether a checkpoint would hold what training can go on from; if not, it says so. All ranks call it, and agree.

    It is not while steps are skipped, nor if weights of the networks are not finite.
    """
    weights = [p for network in networks for p in network.parameters()]
    finite = torch.stack([p.isfinite().all() for p in weights]).all().float()
    if dist.is_initialized():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    worth = finite.item() == 1 and not skipping
    if not worth and rank == 0:
        tell(f"step {step}: no checkpoint, since {'this step was skipped' if skipping else 'weights are not finite'}")
    return worth


def save_checkpoint(out, state, keep):
    """write_whole step-<step>.pt, let last.pt point to it, remove all but the newest keep. Returns whether it could.

    If not (a full disk, say), it says so, and the older ones stay.
    """
    path, link = out / f"step-{state['step']:07}.pt", out / "partly-written"
    try:
        write_whole(path, lambda file: torch.save(state, file))
        link.symlink_to(path.name)
        os.replace(link, out / "last.pt")
        for old in list_checkpoints(out)[:-keep]:
            old.unlink()
    except (OSError, RuntimeError) as error:
        first = error.__context__ or error  # torch hides the disk's error behind one about a position in the file
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0]
        whole = ", ".join(old.name for old in list_checkpoints(out))
        tell(f"{path}: not written ({reason}); there is {whole or 'no older one'}")
        return False
    return True


PICKLED = r"collections OrderedDict|torch._utils _rebuild_tensor_v2|torch \w+Storage"  # classes in a checkpoint


def unpack(path, check=True):
    """The dictionary that a training script has saved in a file, its tensors read from the file when used.

    check: also that the file's checksums are right. Raises OSError, and ValueError if it is no such file. It takes no
    more memory than the file has bytes, whatever the file declares, and runs no code.
    """
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's second thoughts about a damaged file
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            for code, name, _ in pickletools.genops(archive.read(pickled)):
                if code.name == "GLOBAL" and not re.fullmatch(PICKLED, name):  # torch allows bytearray too
                    raise ValueError
            if check and archive.testzip():
                raise ValueError
            older = {"sums": {}, "skipped": 0}  # what runs did not save at first
            return older | torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:  # a failing disk does not mean that the file is damaged
        error.filename = str(path)
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # nor does a lack of memory
            raise
        raise ValueError("damaged, or no checkpoint of this project; give a last.pt of a training script") from None


def read_checkpoint(path, training=False):
    """unpack, and check that all is there, fits, and is finite. training: also what resuming needs.

    Raises OSError, and ValueError that names the first thing that is wrong.
    """
    state = unpack(path)
    kinds = {"config": dict, "settings": dict, "ema": dict}
    if training:
        kinds |= {"model": dict, "optimizers": list, "step": int, "sums": dict, "skipped": int}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"it lacks {name!r}; give a last.pt of a training script")
    if training and (state["step"] < 0 or state["skipped"] < 0):
        raise ValueError(f"it counts {state['step']} steps, {state['skipped']} of them skipped")
    if not isinstance(state["settings"].get("encoders", ""), str):
        raise ValueError("its setting 'encoders' is no file name")
    try:
        config = Config(**state["config"])
        with torch.device("meta"):
            network = DiT(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its config is wrong: {error}") from None
    count = sum(p.numel() for p in network.parameters())
    if 2 * count > os.path.getsize(path):  # two bytes for each, if they are as short as can be
        raise ValueError(f"its config tells of {count} weights, more than the file holds")
    for name in kinds.keys() & {"model", "ema"}:
        check_weights(state[name], network)
    return state


NANO = os.path.relpath(Path(__file__).parent / "assets/nano.pt")  # README has the commands that trained it


def load_checkpoint(path, flag="--checkpoint"):
    """read_checkpoint, or one line and exit code 2 if the file is missing, damaged, or not what it should be."""
    if path == NANO:
        tell(f"{flag} {NANO}: the network that comes with the repository, trained on the built-in world")
    if not os.path.isfile(path):
        fail(f"{flag} {path}: no such file; train one first (train_t2i.py, then train_forcing.py) or name another")
    try:
        return read_checkpoint(path)
    except ValueError as error:
        fail(f"{flag} {path}: {error}")


def newest_checkpoint(out):
    """(path, dict) of a run directory's newest whole checkpoint, or None if it has none yet.

    Damaged ones after it are named and renamed. Exit code 2 if there is no whole one.
    """
    paths, damaged = list_checkpoints(out), {}
    for path in reversed(paths):
        try:
            state = read_checkpoint(path, training=True)
        except ValueError as error:
            damaged[path] = error
            continue
        for other, error in damaged.items():
            tell(f"--resume: {other} is damaged ({error}); going on from {path.name}")
            other.rename(f"{other}.damaged")
        return path, state
    if damaged:
        newest, error = next(iter(damaged.items()))
        fail(f"--resume: no checkpoint in {out} is whole ({newest.name}: {error}); start anew with another --out")
    tell(f"--resume: no checkpoint in {out} yet; from the beginning")


def resume(out, wanted, rank, model, ema, optimizers):
    """Load the checkpoint that rank 0 wants and finds newest, on all ranks. Returns its (step, skipped, sums)."""
    device, found = next(model.parameters()).device, newest_checkpoint(out) if rank == 0 and wanted else None
    if dist.is_initialized():
        path = [found and found[0]]
        dist.broadcast_object_list(path, device=device)
        try:
            found = found or (path[0] and (path[0], unpack(path[0], check=False)))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            fail(f"--resume: rank {rank} cannot read {path[0]} ({reason}); do all ranks share the disk?")
    if not found:
        return 0, 0, {}
    state = found[1]
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, slots in saved["state"].items():
                for value in slots.values():
                    if value.shape not in (parameters[index].shape, ()) or not value.isfinite().all():
                        raise ValueError
            optimizer.load_state_dict(saved)
        for optimizer in optimizers:
            own = getattr(optimizer, "optim", optimizer)  # a sharded one keeps its share there
            for p, slots in own.state.items():  # copied out of the file; step counts too onto the device
                slots.update({name: value.clone().to(p.device) for name, value in slots.items()})
            if own is not optimizer:
                optimizer.state.clear()  # the same once more
        sums = {name: pair.view(2).to(device) * (rank == 0) for name, pair in state["sums"].items()}
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, RuntimeError, ValueError):
        fail(f"--resume: {out} holds another network or optimizer; resume with its first settings")
    return state["step"], state["skipped"], sums


def whole_state(optimizer, rank):
    """An optimizer's state_dict; of a sharded one, put together on rank 0 from what the ranks hold. All ranks call it.

    ZeroRedundancyOptimizer's own consolidate_state_dict takes 0.1 microseconds a byte, minutes for large networks.
    """
    if not hasattr(optimizer, "consolidate_state_dict"):
        return optimizer.state_dict()
    held, merged = optimizer.optim.state, torch.optim.Optimizer.state_dict(optimizer) | {"state": {}}
    kinds = [None] * dist.get_world_size()
    slots = {name: (value.ndim, value.dtype) for slots in held.values() for name, value in slots.items()}
    dist.all_gather_object(kinds, slots)
    kinds = sorted({name: kind for some in kinds for name, kind in some.items()}.items())
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, (ndim, dtype) in kinds:
            mine = held[p][name].clone() if p in held else torch.zeros(p.shape if ndim else (), dtype=dtype)
            mine = mine.to(p.device)
            dist.reduce(mine, 0)  # the others add zeros
            if rank == 0:
                merged["state"].setdefault(index, {})[name] = mine.cpu()
    return merged


# ---- Pictures ----
# Values painted as pictures, by their encoding, and pictures laid out as a grid.

# Colours of depth, from far to near: equal distances in CIELAB, and lightness that rises throughout.
FAR_TO_NEAR = "#080628 #280d51 #671c75 #9f2d6f #c6425d #e26147 #f29247 #f9c16d #fcf0b4"
ANCHORS = np.array([ImageColor.getrgb(color) for color in FAR_TO_NEAR.split()])  # (9, 3)


def paint_rgb(rgb, valid=None):
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8. All pixels of an image are valid."""
    rgb = rgb.detach().float().cpu().clamp(-1, 1)
    return ((rgb + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def paint_normal(normal, valid=None):
    """Unit vectors (3, H, W), valid (1, H, W) -> (H, W, 3) uint8: the colour is (n + 1) / 2, black where missing."""
    if valid is None:
        valid = normal.square().sum(0, keepdim=True) > 0
    return paint_rgb(torch.where(valid, normal, -1.0))


def paint_depth(depth, valid=None):
    """Depth (1, H, W) in any unit, valid (1, H, W) -> (H, W, 3) uint8: near is bright, black where missing.

    Brightness follows inverse depth, from its 2% to its 98% percentile.
    """
    if valid is None:
        valid = (depth > 0) & depth.isfinite()
    depth = depth.detach().float().cpu().numpy()[0]
    valid = valid.cpu().numpy()[0]
    if not valid.any():
        return np.zeros((*depth.shape, 3), np.uint8)

    smallest = 1e-3 * max(np.median(depth[valid]), 1e-30)
    inverse = 1 / np.maximum(np.where(valid, depth, np.inf), smallest)
    far, near = np.percentile(inverse[valid], (2, 98))
    level = np.clip((inverse - far) / max(near - far, 1e-9 * abs(near)), 0, 1)  # (H, W)
    channels = [np.interp(level * (len(ANCHORS) - 1), range(len(ANCHORS)), channel) for channel in ANCHORS.T]
    return np.where(valid[..., None], np.stack(channels, -1), 0).astype(np.uint8)


PAINTERS = {"plain": paint_rgb, "relative depth": paint_depth, "unit vectors": paint_normal}


def paint(modality, values, valid=None):
    """Values (C, H, W) of a modality, valid (1, H, W) bool or None -> picture (H, W, 3) uint8."""
    return PAINTERS[modality.encoding](values, valid)


def enlarged(picture, side):
    """(H, W, 3) uint8 -> Image. A small picture grows by a whole factor to about side; a large one shrinks to 2 sides."""
    image = Image.fromarray(picture)
    longer = max(image.size)
    if longer > 2 * side:
        shrunk = [max(1, round(n * 2 * side / longer)) for n in image.size]
        return image.resize(shrunk, Image.LANCZOS)
    factor = max(1, round(side / longer))
    return image.resize([n * factor for n in image.size], Image.NEAREST)


def draw_caption(text, width):
    """An Image of a text, broken into lines that fit into width pixels."""
    lines = textwrap.wrap(text, max(8, width // 6))
    image = Image.new("RGB", (width, 12 * (len(lines) + 1)), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), "\n".join(lines), fill="black", font_size=11, spacing=1)
    return image


def draw_grid(rows, labels=(), cell=128):
    """Rows of pictures (H, W, 3) uint8, each with a label on its left, as an Image. A string in a row is a caption."""
    pictures = [[x if isinstance(x, str) else enlarged(x, cell) for x in row] for row in rows]
    width = 4 + max(x.width for row in pictures for x in row if not isinstance(x, str))
    cells = [[draw_caption(x, width) if isinstance(x, str) else x for x in row] for row in pictures]

    margin = 110 if labels else 0
    heights = [4 + max(image.height for image in row) for row in cells]
    canvas = Image.new("RGB", (margin + width * max(map(len, cells)), sum(heights)), "white")
    top = 0
    for i, row in enumerate(cells):
        for column, image in enumerate(row):
            canvas.paste(image, (margin + column * width, top))
        if labels:
            ImageDraw.Draw(canvas).multiline_text((4, top + 6), labels[i], fill="black", font_size=15)
        top += heights[i]
    return canvas


# ---- A look at the built-in world: python data.py ----
# Samples as pictures, and as a folder that --data reads.


def array_bytes(values, valid):
    """A map (C, H, W), valid (1, H, W) -> bytes of a .npy file that read_map reads: (H, W) or (H, W, C), 0 if missing."""
    array = torch.where(valid, values, 0.0).movedim(0, -1).squeeze(-1)
    return to_bytes(np.save, array.cpu().numpy())


def write_folder(out, batch):
    """Write a Batch as a folder: image, depth and normals of each sample, and metadata.jsonl, which lists them."""
    rows = []
    for i, name in enumerate(batch.names):
        row = {"file_name": f"{name}.jpg", "text": batch.captions[i]}
        image = Image.fromarray(paint_rgb(batch.values["rgb"][i]))
        write_bytes(out / row["file_name"], to_bytes(image.save, "JPEG", quality=100, subsampling=0), sync=False)
        for m in ("depth", "normal"):
            row[f"{m}_file_name"] = f"{name}.{m}.npy"
            content = array_bytes(batch.values[m][i], batch.valid[m][i])
            write_bytes(out / row[f"{m}_file_name"], content, sync=False)
        rows.append(json.dumps(row))
    write_bytes(out / "metadata.jsonl", "".join(f"{row}\n" for row in rows).encode())


def world_grid(batch, count=8):
    """The first samples of a Batch as an Image: image, depth and normals, and depth as a sensor would have seen it."""
    rgb = batch.values["rgb"][:count]
    depth = batch.values["depth"][:count]
    sensor = sensor_mask(rgb, "mixed", PerSampleRNG(0, range(len(rgb))).rand)
    rows = {
        "image": map(paint_rgb, rgb),
        "depth": map(paint_depth, depth, batch.valid["depth"]),
        "depth as\ntrained on": map(paint_depth, depth, batch.valid["depth"][:count] & sensor),
        "normal": map(paint_normal, batch.values["normal"][:count], batch.valid["normal"]),
    }
    return draw_grid(list(rows.values()), list(rows))


def main():
    p = Flags(__doc__)
    p.setting("--out", "runs/world", "new or empty directory to write to")
    p.setting("--split", "val", "train or val", one_of(*SPLITS))
    p.setting("--size", 32, "side in pixels", whole(1, 2048))
    p.setting("--count", 8, "number of samples", whole(1, 10**5))
    p.setting("--measured", 1.0, "share of the pixels that depth and normals keep", number(0, 1, above=True))
    args = p.parse_args()
    if args.count * args.size**2 > 1 << 24:
        fail(f"--count {args.count}: {args.size}x{args.size} pixels each are too many for memory; give fewer")
    out = claim_folder(args.out)
    size = (args.size, args.size)

    batch = SyntheticWorld(args.split, size).samples(range(args.count))
    measured = PerSampleRNG("measured", range(args.count)).rand(1, *size) < args.measured
    batch.valid = {m: measured & batch.valid[m] for m in ("depth", "normal")}
    if not batch.valid["depth"].flatten(1).any(1).all():
        fail(f"--measured {args.measured}: a scene keeps no pixel; give a larger share")

    write_folder(out, batch)
    write_image(out / "grid.png", world_grid(batch))
    print(f"{args.count} samples in {out}, for --data; see {out}/grid.png")


if __name__ == "__main__":
    run_script(main)
