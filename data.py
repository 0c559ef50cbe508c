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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model import (
    MODALITIES,
    TEXT_PATCH,
    DiT,
    check_numbers,
    check_weights,
    matmul_peak,
    rename_weights,
    split_by_mode,
    training_cost,
)

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
# The command lines of all scripts: types, which check a value, and the settings that several scripts share.

MAX_SIDE = 8192  # pixels


def number(low, high, above=False, kind=float):
    """Type of a flag: a number from low to high, or above low. NaN is in no range."""
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
SIDE = whole(0, MAX_SIDE)  # 0 stands for the value of another flag or of the network
SHARE = number(0, 1)
POSITIVE = number(0, 10**6, above=True)


def one_of(*names):
    """Type of a flag: one of the names, unchanged."""

    def read(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text}: must be one of {', '.join(filter(None, names))}")
        return text

    return read


def by_modality(read_number):
    """Type of a flag: "rgb=0.25,depth=0.5" -> {"rgb": 0.25, "depth": 0.5}. A lone number is for the image."""

    def read(text):
        numbers = {}
        for entry in filter(None, text.split(",")):
            name, _, value = entry.rpartition("=")
            name = name or "rgb"
            if name not in MODALITIES or name in numbers:
                known = ", ".join(MODALITIES)
                raise argparse.ArgumentTypeError(f"{text}: must be such as 0.5 or rgb=0.5,depth=0.2, of {known}")
            numbers[name] = read_number(value)
        return numbers

    return read


def modality_list(text):
    """Type of a flag: different modalities, the image first, joined by commas, unchanged."""
    names = text.split(",")
    if names[0] != "rgb" or len(set(names)) < len(names) or not set(names) <= set(MODALITIES):
        raise argparse.ArgumentTypeError(f"{text}: must be rgb, then different ones of {', '.join(MODALITIES)}")
    return text


def parse_size(text, low=1):
    """Size in pixels, one side ("64") or "HxW" -> (H, W). Raises argparse.ArgumentTypeError if it is out of range."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < low or max(size) > MAX_SIDE:
        span = f"pixels, {low} to {MAX_SIDE} a side"
        raise argparse.ArgumentTypeError(f"{text}: must be {span}, as one side (64) or as HxW (48x64)")
    return size


def size_text(low=1):
    """Type of a flag: a text that parse_size reads, or an empty one, unchanged."""

    def read(text):
        if text:
            parse_size(text, low)
        return text

    return read


def parse_order(text, names):
    """--order: log2(alpha) from -14 to 14, or different ones of names -> a float, or their list. Else exit code 2."""
    try:
        order = float(text)
    except ValueError:
        order = text.replace(" ", "").split(",")
        if sorted(set(order) & set(names)) != sorted(order):
            fail(f"--order {text}: must be joint, log2(alpha), or different ones of {', '.join(names)}")
        return order
    if not -14 <= order <= 14:
        fail(f"--order {text}: log2(alpha) must be from -14 to 14; rgb,depth and depth,rgb are its limits")
    return order


class Flags(argparse.ArgumentParser):
    """The flags of a script. A mistake on the command line is one line on stderr and exit code 2."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def setting(self, flag, default, help, type=str, **options):
        """Declare a flag. type reads and checks its text. A default of False or None makes the flag a switch."""
        if default is None or default is False:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = type
        self.add_argument(flag, default=default, help=f"{help} (default: %(default)s)", **options)

    def error(self, message):
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if ": must be " in problem:  # our types' messages begin with the value, those of argparse do not
            fail(f"{flag} {problem}")
        fail(f"{message.removeprefix('argument ')}; --help lists the flags")


def source_settings(p, maps=True):
    """The flags of scripts that read samples; maps: not images and captions alone."""
    p.setting("--data", "synthetic", "synthetic, a folder (metadata.jsonl or .index.txt), or 'shards/{000..999}.tar'")
    if maps:
        unit = "metres per unit of a 16-bit PNG that has no scale of its own (KITTI: 0.00390625)"
        p.setting("--depth-scale", 0.001, unit, POSITIVE)
        p.setting("--depth-min", 0.0, "depth up to this is missing, in metres", number(0, 10**6))
        p.setting("--depth-max", 0.0, "depth beyond this is missing, in metres; 0 is no limit", number(0, 10**6))
    p.setting("--workers", 2, "processes that read files, for each rank (evaluation: at most one)", whole(0, 256))
    p.setting("--encoders", "", "FILE.py of frozen encoders, which is run, to train on latents and text embeddings")


def check_depth_range(args):
    """Refuse settings that leave no depth."""
    if 0 < args.depth_max <= args.depth_min:
        fail(f"--depth-max {args.depth_max}: must be above --depth-min, {args.depth_min}, or 0 for no limit")


def sampling_settings(p):
    """The flags of scripts that sample."""
    p.setting("--checkpoint", NANO, "checkpoint of a training script; the default was trained on the built-in world")
    scale = "scale of classifier-free guidance, for the image (3) or by name (rgb=3,depth=2); 1 is none"
    p.setting("--cfg", "3", f"{scale}; the released model uses 4", by_modality(number(0, 100)))
    p.setting("--ensemble", 1, "samples of each depth map, of which the median is taken", whole(1, 1000))
    counted = "ensemble members and guided copies count; the members of one image stay together"
    p.setting("--batch-size", 16, f"samples in each call of the network; {counted}", whole(1, 10**5))
    p.setting("--device", "auto", "auto, cuda, mps or cpu")


def training_settings(p, steps, out):
    """The flags that both training scripts share; steps and out are their defaults."""
    p.setting("--size", 0, "side of the images in pixels; 0 is the network's own", SIDE)
    p.setting("--steps", steps, "optimizer steps", COUNT)
    p.setting("--batch-size", 32, "samples in a step, over all ranks and accumulation steps", whole(1, 1 << 20))
    p.setting("--grad-accum", 1, "parts into which each rank splits its share of a batch, to save memory", COUNT)
    p.setting("--lr", 6e-3, "peak learning rate", number(0, 1, above=True))
    p.setting("--optimizer", "muon", "muon (blocks' matrices; AdamW for the rest) or adamw", one_of("muon", "adamw"))
    p.setting("--warmup", 50, "steps of linear warm-up, before the rate falls linearly to zero", COUNT)
    p.setting("--clip", 1.0, "norm to which the gradient is clipped", POSITIVE)
    p.setting("--ema", 0.99, "decay of the averaged weights, which sampling uses", SHARE)
    p.setting("--drop-caption", 0.1, "share of captions that is dropped, for classifier-free guidance", SHARE)
    p.setting("--seed", 0, "seed of weights, scenes and noise", SEED)
    p.setting("--device", "auto", "auto, cuda, mps or cpu")
    p.setting("--compile", None, "torch.compile the blocks; the default is on CUDA only")
    p.setting("--checkpoint-activations", False, "compute blocks again in the backward pass: less memory, slower")
    p.setting("--shard", False, "split weights, gradients, EMA and optimizer state over the ranks (FSDP2)")
    p.setting("--out", out, "run directory")
    p.setting("--resume", False, "go on from the newest whole checkpoint of the run directory, if there is one")
    p.setting("--checkpoint-every", 250, "steps between checkpoints", COUNT)
    p.setting("--keep", 2, "number of checkpoints to keep, the newest ones", COUNT)
    p.setting("--log-every", 10, "steps between rows of metrics.jsonl", COUNT)
    p.setting("--sample-every", 500, "steps between sample pictures", COUNT)
    p.setting("--max-skipped", 20, "skipped steps in a row (loss or gradient not finite) that end the run", COUNT)
    p.setting("--timeout", 1800, "seconds until a silent rank ends the run; allow for a checkpoint", whole(1, 10**6))
    p.setting("--dry-run", False, "print the number of parameters and the FLOPs, and stop")


def parse_run(p):
    """Parse the flags of a training script. With --resume, the run's config.json replaces p's defaults.

    Its settings are read as if they were flags, but for --out, since a run may have been copied, and for the plug-in of
    --encoders, which must be named again, since it is code that is run.
    """
    args = p.parse_args()
    path = Path(args.out) / "config.json"
    if not args.resume or not path.is_file():
        return args
    try:
        settings = parse_json(path.read_bytes())
    except ValueError:
        fail(f"--resume: {path} is damaged; remove it and give the settings of the run as flags")
    if "p_i2d" in settings:  # a run of an earlier version
        settings["p_clean"] = {"rgb": settings["p_i2d"], "depth": settings.get("p_d2i")}

    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if name in ("out", "encoders", "resume") or value == p.get_default(name):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        if isinstance(value, dict):  # of by_modality
            value = ",".join(f"{key}={number}" for key, number in value.items())
        flags.append(f"--{flag}={value}")
    args, _ = p.parse_known_args(flags)  # settings of other versions are ignored
    args = p.parse_args(namespace=args)
    if settings.get("encoders") and not args.encoders:
        fail(f"--resume: this run has --encoders {settings['encoders']}, a file that is run; give the flag again")
    return args


# ---- Runs ----
# Messages, devices, files that survive accidents, checkpoints, and what both training scripts do around their loops.


def log(message):
    """Print one line on stderr, above a progress bar. A long message, which may quote anything, loses its middle."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > 300:
        line = f"{line[:190]} ... {line[-100:]}"
    tqdm.write(line, file=sys.stderr)


def fail(message):
    """Print one line on stderr and exit with code 2."""
    log(message)
    raise SystemExit(2)


def reason(error):
    """The first line of what an exception says."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


def pick_device(name):
    """--device auto | cuda | mps | cpu -> torch.device; cuda without a number is the GPU of this rank."""
    if name.split(":")[0] not in ("auto", "cuda", "mps", "cpu"):
        fail(f"--device {name}: must be auto, cuda, mps or cpu")
    if name == "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind, found in available.items() if found)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, AttributeError):  # a torch without CUDA raises AttributeError
        fail(f"--device {name}: not available here; use --device auto")
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Tell glibc to keep freed blocks. To get one from the system again costs more than the matmul that fills it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def run_script(main):
    """Call the main function of a script. A problem of the machine or the disk is one line and exit code 2.

    Ctrl-C is exit code 130. Any other exception is a bug and keeps its traceback.
    """
    try:
        return main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{reason(error)}; check the path, its permissions and the space on its disk")
    except (MemoryError, RuntimeError) as error:
        texts = ("can't allocate memory", "out of memory", "size calculation overflowed")  # of torch's allocators
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in texts):
            raise
        fail("out of memory; lower --batch-size or --size")


def claim_folder(path, *own, flag="--out"):
    """Make a directory to write to. It must be new, or empty, or hold a file that fits one of the patterns own.

    These are names that only the calling script would have written, so that no file of yours is overwritten.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(folder.iterdir(), None)
    if first and not any(any(folder.glob(pattern)) for pattern in own):
        fail(f"{flag} {path}: already holds {first.name}; choose a new or an empty directory")
    return folder


@contextlib.contextmanager
def tolerate(path):
    """Report a full disk, or a picture that needs more memory than there is, and go on training."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:  # torch reports a full GPU as a RuntimeError
        log(f"{path}: not written ({reason(error)}); training goes on")
        traceback.clear_frames(error.__traceback__)  # their variables hold on to the memory
        torch.cuda.empty_cache()


def append_row(path, row):
    """Add a row to a file of JSON lines, if the disk permits."""
    with tolerate(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def parse_json(text):
    """Read a dictionary from JSON text or bytes. Raises ValueError if it holds anything else."""
    try:
        found = json.loads(text)
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("not a JSON dictionary")
    return found


def read_rows(path):
    """The rows of a file of JSON lines, without those that a crash or a full disk has cut."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(parse_json(line))
    return rows


def write_whole(path, write, sync=True):
    """Call write(file) on a temporary file and rename it, so that a crash leaves the old file or the new one.

    With sync this also holds if the machine crashes. It takes milliseconds, too long for many small files.
    """
    part = Path(path).with_name("partly-written")
    part.unlink(missing_ok=True)  # if it is a link, what it points to must not be written
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
    """What write(file, *args, **options) writes. (Pillow and numpy would hide the error of a full disk.)"""
    buffer = io.BytesIO()
    write(buffer, *args, **options)
    return buffer.getvalue()


def write_bytes(path, content, sync=True):
    write_whole(path, lambda file: file.write(content), sync)


def write_image(path, image, **options):
    """Write a Pillow image in the format that the suffix of path names."""
    write_bytes(path, to_bytes(image.save, Path(path).suffix[1:], **options))


def write_json(path, value):
    write_bytes(path, json.dumps(value, indent=1).encode() + b"\n")


def git_commit():
    """The commit of this code, with -dirty if files differ from it, or "" if there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def list_checkpoints(out):
    """Paths of the checkpoints in a run directory, oldest first; last.pt if there is nothing else."""
    paths = [path for path in Path(out).glob("step-*.pt") if re.fullmatch(r"step-[0-9]{7,}\.pt", path.name)]
    paths.sort(key=lambda path: (len(path.name), path.name))
    return paths or [path for path in [Path(out) / "last.pt"] if path.exists()]


def save_checkpoint(out, state, keep):
    """Write step-<step>.pt, point last.pt to it, and remove all but the newest checkpoints. Returns whether it could.

    If it could not, for example because the disk is full, it says so, and the older checkpoints stay.
    """
    path = out / f"step-{state['step']:07}.pt"
    link = out / "partly-written"
    try:
        write_whole(path, lambda file: torch.save(state, file))
        link.symlink_to(path.name)
        os.replace(link, out / "last.pt")
        for old in list_checkpoints(out)[:-keep]:
            old.unlink()
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # torch raises another error while it handles that of the disk
        names = ", ".join(old.name for old in list_checkpoints(out))
        log(f"{path}: not written ({reason(cause)}); there is {names or 'no older one'}")
        return False
    return True


NANO = os.path.relpath(Path(__file__).parent / "assets/nano.pt")  # README has the commands that trained it
PICKLED = r"collections OrderedDict|torch._utils _rebuild_tensor_v2|torch \w+Storage"  # classes in a checkpoint
INFERENCE_KEYS = {"config": dict, "settings": dict, "ema": dict}
TRAINING_KEYS = {**INFERENCE_KEYS, "model": dict, "step": int}


def unpack(path):
    """Read the dictionary that a training script saved. Its tensors are read from the file when they are used.

    This runs no code and takes no more memory than the file has bytes, whatever the file declares. Raises OSError, and
    ValueError if the file is damaged or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about some damaged files before it refuses them
            if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                raise ValueError
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            for code, name, _ in pickletools.genops(archive.read(pickled)):
                if code.name == "GLOBAL" and not re.fullmatch(PICKLED, name):  # torch allows bytearray, too
                    raise ValueError
            if archive.testzip():
                raise ValueError
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except OSError as error:  # a disk that fails does not mean that the file is damaged
        error.filename = str(path)
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "memory" in str(error):  # nor does a lack of memory
            raise
        raise ValueError("damaged, or no checkpoint of this project; give a last.pt of a training script") from None


def read_checkpoint(path, keys=INFERENCE_KEYS):
    """unpack a checkpoint that must hold these keys. Raises OSError, and ValueError that names what is wrong."""
    state = unpack(path)
    for key, kind in keys.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"it lacks {key!r}; give a last.pt of a training script")
    if not isinstance(state["settings"].get("encoders", ""), str):
        raise ValueError("its setting 'encoders' is not a file name")
    return state


def open_network(path, flag="--checkpoint"):
    """Checkpoint file -> (its averaged DiT, frozen, on the CPU; its dictionary). Else one line and exit code 2."""
    if path == NANO:
        log(f"{flag} {NANO}: the network that comes with the repository, trained on the built-in world")
    if not os.path.isfile(path):
        fail(f"{flag} {path}: no such file; train one first (train_t2i.py, then train_forcing.py) or name another")
    try:
        state = read_checkpoint(path)
        return DiT.from_checkpoint(state), state
    except ValueError as error:
        fail(f"{flag} {path}: {error}")


def newest_checkpoint(out):
    """The newest whole checkpoint of a run directory, as a dictionary, or None if it holds none yet.

    Names the damaged ones that it passes over. Exit code 2 if all are damaged.
    """
    damaged = []
    for path in reversed(list_checkpoints(out)):
        try:
            state = read_checkpoint(path, TRAINING_KEYS)
        except ValueError as error:
            damaged.append(f"{path.name} is damaged ({error})")
            continue
        if damaged:
            log(f"--resume: {'; '.join(damaged)}; going on from {path.name}")
        return state
    if damaged:
        fail(f"--resume: no checkpoint in {out} is whole ({damaged[0]}); start anew with another --out")
    log(f"--resume: no checkpoint in {out} yet; from the beginning")
    return None


def read_ranks():
    """(rank, number of ranks) of this process, as torchrun puts them into the environment; (0, 1) without torchrun."""
    rank = os.environ.get("RANK", "0")
    ranks = os.environ.get("WORLD_SIZE", "1")
    numbers = re.fullmatch("[0-9]{1,6} [0-9]{1,6}", f"{rank} {ranks}")
    if not numbers or int(rank) >= int(ranks):
        fail(f"RANK={rank} WORLD_SIZE={ranks}: must be whole numbers, RANK the lower; use torchrun, or unset both")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if int(ranks) > 1 and not os.environ.get(name):
            fail(f"WORLD_SIZE={ranks}: {name} is not set; start with torchrun, or unset WORLD_SIZE")
    return int(rank), int(ranks)


def join_ranks(backend, seconds):
    """Join the ranks of torchrun in a process group. All end if one is silent for so many seconds.

    torchrun shows a second try (--max-restarts) what the first has stored, such as addresses of dead processes. So on
    one node every try has its own keys; on several nodes, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives it a new store.
    """
    try:
        store, rank, ranks = next(dist.rendezvous("env://"))
    except (ValueError, dist.DistError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        fail(f"no other ranks at MASTER_ADDR:MASTER_PORT, {address} ({reason(error)}); start with torchrun")
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def catch_signals():
    """A list that gets the number of a SIGTERM or SIGINT when one arrives. A second one ends the process."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return caught


def lock_run(out, resume):
    """Make the run directory and lock it until this process ends, however it ends.

    A directory that holds a run is refused, unless you resume it and no other process trains in it.
    """
    out = Path(out)
    if list_checkpoints(out) and not resume:
        fail(f"--out {out}: already holds a run; add --resume to go on with it, or choose another --out")
    claim_folder(out, "run.lock", "starts.jsonl", "step-*.pt", "last.pt")
    file = os.open(out / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)  # stays open until the process ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data loaders do not inherit a lock of this kind
    except BlockingIOError:
        fail(f"--out {out}: another process is training in it; wait for its end, or choose another --out")
    except OSError as error:  # some network disks have no locks
        log(f"--out {out}: cannot be locked ({error.strerror}); start no second run in it")


def training_flops(config, size, teacher_config=None):
    """FLOPs of a training step per image of size (H, W); the teacher's forward pass is a third of its training."""
    flops = training_cost(config, size)[1]
    if teacher_config:
        flops += training_cost(teacher_config, size)[1] / 3
    return flops


def shard(network):
    """Split the weights of a network over the ranks. Each gathers a block's weights when it runs that block."""
    for block in network.all_blocks():
        fully_shard(block)
    fully_shard(network, reshard_after_forward=True)


def local_parts(network):
    """What this rank holds of the network's parameters, which may be sharded."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]


def check_optimizer_state(state, optimizers, parameters):
    """Optimizer state of a checkpoint, {"state": {name: {slot: tensor}}, "param_groups": list}, copied from the file.

    Raises an exception unless it fits parameters {name: Parameter}. Earlier versions saved a list of states, one for
    each optimizer, with the index of each parameter in the place of its name.
    """
    if isinstance(state, list):
        names = {p: name for name, p in parameters.items()}
        renamed = {"state": {}, "param_groups": []}
        for saved, optimizer in zip(state, optimizers, strict=True):
            (group,) = saved["param_groups"]
            group = {**group, "params": [names[p] for p in optimizer.param_groups[0]["params"]]}
            renamed["param_groups"].append(group)
            renamed["state"].update({group["params"][index]: slots for index, slots in saved["state"].items()})
        state = renamed
    for name, slots in state["state"].items():
        for slot, value in slots.items():
            if value.shape not in (parameters[name].shape, ()) or not value.isfinite().all():
                raise ValueError(f"{slot} of {name}")
            slots[slot] = value.clone()
    return state


@dataclass
class Part:
    """What one forward pass needs; with --grad-accum a step has several. Dictionaries are keyed by modality name."""

    x0: dict  # (B, C, H, W)
    noisy: dict  # (B, C, H, W)
    t: dict  # (B,)
    mask: dict  # (B, C, H, W) bool, the values that the loss is taken on
    text: torch.Tensor  # (B, L) or (B, L, text_dim)


def drop_captions(text, dropped):
    """Set the text (B, L) or (B, L, text_dim) of samples to zero, which is no text; dropped (B,) bool."""
    return torch.where(dropped.view(-1, *[1] * (text.ndim - 1)), 0, text)


class Run:
    """A training run: all that both stages do around the loss. The methods are called in this order:

    run = Run(args, device)               join the other ranks, claim the run directory
    run.start(network, draw_samples)      average, shard, resume, compile
    while run.goes_on():
        run.sum_over_ranks(counts)        by which the losses are divided
        for part in run.each(parts):
            run.record(...)               what metrics.jsonl reports
            run.backward(loss)
        run.end_step()                    update the weights; log, save and draw when it is time
    run.close()
    """

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.cuda = device.type == "cuda"
        self.out = Path(args.out)
        self.rank, self.ranks = read_ranks()
        parts = self.ranks * args.grad_accum
        if args.batch_size % parts:
            fail(f"--batch-size {args.batch_size}: must be a multiple of ranks x --grad-accum, {parts}")

        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.saved = True
        self.stopping = False
        self.caught_signals = catch_signals()
        self.terms = []  # the names that record was called with
        self.row_sums = {}  # {name: total and count} of this rank, since the last row of metrics.jsonl
        if self.ranks > 1:
            join_ranks("nccl" if self.cuda else "gloo", args.timeout)
        if self.rank == 0:
            lock_run(self.out, args.resume)

    def start(self, network, draw_samples, teacher=None):
        """Prepare a DiT for training, and its frozen teacher. draw_samples(network) returns a picture, or None."""
        args = self.args
        self.draw_samples = draw_samples
        self.model = network.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.teacher = teacher
        networks = [self.model, self.ema]
        if teacher is not None:
            networks.append(teacher.to(self.device))
            for matrix in teacher.matrices() if self.cuda else []:
                matrix.data = matrix.data.bfloat16()  # autocast would convert it at each use

        self.sharded = args.shard and self.ranks > 1
        for each in networks if self.sharded else []:
            shard(each)
        self.optimizers = self.model.configure_optimizers(args.lr, args.optimizer)
        if args.resume:
            self.resume()
        if self.rank == 0:
            self.write_start()

        networks.remove(self.ema)
        for each in networks if args.compile or (args.compile is None and self.cuda) else []:
            each.compile_blocks()
        if args.checkpoint_activations:
            self.model.checkpoint_activations()
        self.network = self.model
        if self.ranks > 1 and not self.sharded:
            self.network = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

        self.flops = training_flops(network.config, (args.size, args.size), teacher and teacher.config)
        self.peak = self.ranks * matmul_peak(self.device, torch.bfloat16 if self.cuda else torch.float32)
        if self.rank == 0:
            print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters on {self.device}", flush=True)
        options = {"disable": self.rank > 0, "mininterval": 2, "dynamic_ncols": True}
        self.bar = tqdm(total=args.steps, initial=self.step, **options)
        self.reset_clock()

    def goes_on(self):
        """Whether there is another step to take."""
        self.step_sums = {}  # like row_sums, in this step
        return self.step < self.args.steps and not self.stopping

    def sum_over_ranks(self, values):
        """{name: tensor} of this rank -> the sums over all ranks. The tensors have one shape and type.

        A count of signals travels with them, so that all ranks stop after the same step.
        """
        table = torch.stack(list(values.values()))
        table = torch.cat([table, torch.full_like(table[:1], len(self.caught_signals))])
        if self.ranks > 1:
            dist.all_reduce(table)
        self.signal_count = table[-1].max()
        return dict(zip(values, table[:-1], strict=True))

    def each(self, parts):
        """Iterate over the parts of a batch. DDP sums gradients over the ranks after the last part alone.

        FSDP does so after each part, since a rank has no room for a whole gradient.
        """
        for part in parts:
            self.network.require_backward_grad_sync = part is parts[-1]  # as DDP.no_sync does
            yield part

    def record(self, term, name, values, part):
        """Note values (B,), sums over the mask of modality name, for a mean in metrics.jsonl called term."""
        if term not in self.terms:
            self.terms.append(term)
        counts = part.mask[name].sum((1, 2, 3))  # (B,)
        for mode, sums in split_by_mode(name, torch.stack([values.detach(), counts]), part.t).items():
            self.step_sums[term + mode] = self.step_sums.get(term + mode, 0) + sums

    def backward(self, loss):
        """Add the gradient of loss: a sum over the samples of this rank, divided by counts over all ranks."""
        loss = loss * self.ranks  # DDP and FSDP average gradients over the ranks
        # A loss that is not finite may have a finite gradient. NaN in every gradient makes all ranks skip the step.
        loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan))

    def end_step(self):
        """Update the weights, or skip the step; then log, save and draw when it is time."""
        args = self.args
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        norm, signals = torch.stack([norm, self.signal_count]).tolist()  # waits for the device once
        self.stopping = signals > 0
        self.step += 1
        if math.isfinite(norm):
            self.update_weights()
        else:
            self.skip_step()
        # With --grad-accum gradients stay, as views of DDP's buckets: new ones would take their memory again.
        keep_gradients = self.ranks > 1 and args.grad_accum > 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not keep_gradients)
        self.bar.update()

        ending = self.stopping or self.step == args.steps
        saving = ending or self.step % args.checkpoint_every == 0
        if self.row_sums and (saving or self.step % args.log_every == 0):  # no row spans a checkpoint
            self.write_row(norm)
        if saving:
            self.save(ending)
        if self.step == args.steps or self.step % args.sample_every == 0:
            self.draw()

    def close(self):
        """End the run: exit code 2 if there is no checkpoint of the last step, 130 after Ctrl-C."""
        self.bar.close()
        if self.ranks > 1:
            dist.barrier()  # a process that ends while gloo's threads are at work may hang
            dist.destroy_process_group()
        if not self.saved and self.rank == 0:
            problem = "there is no checkpoint of the last step, see above; --resume goes on from an older one"
            fail(f"--out {self.out}: {problem}")
        if self.stopping and self.rank == 0:
            log(f"stopped by a signal after step {self.step} of {self.args.steps}, saved; --resume goes on")
        if signal.SIGINT in self.caught_signals:
            raise SystemExit(130)

    # The steps of start and end_step.

    def write_start(self):
        """Write config.json and a row of starts.jsonl. Rows of metrics.jsonl after this step will be written again."""
        chip = torch.cuda.get_device_name(self.device) if self.cuda else f"{platform.machine()} {self.device.type}"
        start = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv, "step": self.step}
        start.update(commit=git_commit(), torch=torch.__version__, device=chip, ranks=self.ranks)
        rows = [row for row in read_rows(self.out / "metrics.jsonl") if isinstance(row.get("step"), int)]
        lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.step]
        (self.out / "samples").mkdir(exist_ok=True)
        write_bytes(self.out / "metrics.jsonl", "".join(lines).encode())
        write_json(self.out / "config.json", vars(self.args))
        append_row(self.out / "starts.jsonl", start)

    def resume(self):
        """Load the newest checkpoint that rank 0 finds into all ranks."""
        state = newest_checkpoint(self.out) if self.rank == 0 else None
        progress = [state and (state["step"], state.get("skipped", 0))]
        if self.ranks > 1:
            dist.broadcast_object_list(progress, device=self.device)
        if progress[0] is None:
            return
        self.step, self.skipped = progress[0]
        model, ema, optimizer = {}, {}, {}  # ranks but the first receive theirs
        try:
            if self.rank == 0:
                model = rename_weights(state["model"])
                ema = rename_weights(state["ema"])
                for weights in (model, ema):
                    check_weights(weights, self.model)
                saved = state.get("optimizer") or state["optimizers"]
                optimizer = check_optimizer_state(saved, self.optimizers, dict(self.model.named_parameters()))
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.ranks > 1)
            set_model_state_dict(self.model, model, options=options)
            set_model_state_dict(self.ema, ema, options=options)
            set_optimizer_state_dict(self.model, self.optimizers, optimizer, options=options)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, TypeError, RuntimeError, ValueError):
            fail(f"--resume: {self.out} holds another network or optimizer; resume with its first settings")

    def learning_rate(self):
        """The rate of this step: linear warm-up, then linear decline to zero."""
        warmup = self.args.warmup
        steps_left = self.args.steps - self.step + 1
        return self.args.lr * min(self.step / warmup, steps_left / max(1, self.args.steps - warmup))

    def update_weights(self):
        """Take a step of the optimizers, and move the averaged weights."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            optimizer.step()
        decay = min(self.args.ema, self.step / (9 + self.step))  # a young average forgets faster
        with torch.no_grad():
            torch._foreach_lerp_(local_parts(self.ema), local_parts(self.model), 1 - decay)
        for name, sums in self.step_sums.items():
            self.row_sums[name] = self.row_sums.get(name, 0) + sums
        self.skipped_in_a_row = 0

    def skip_step(self):
        """Leave the weights as they are. Many skipped steps in a row end the run."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        sums = self.sum_over_ranks(self.step_sums)
        bad = [name for name, (total, _) in sums.items() if not total.isfinite()]
        message = f"step {self.step} skipped, not finite: {', '.join(bad) or 'the gradient alone'}"
        if self.skipped_in_a_row == self.args.max_skipped:
            self.bar.close()
            fail(f"{message}; {self.skipped_in_a_row} in a row: lower --lr (now {self.args.lr}), check --data")
        if self.rank == 0:
            log(message)

    def write_row(self, norm):
        """Add a row to metrics.jsonl: means since the last one, and the speed."""
        sums = {name: pair.tolist() for name, pair in self.sum_over_ranks(self.row_sums).items()}
        means = {name: total / count for name, (total, count) in sums.items() if count}
        losses = {term: means.get(term, 0.0) for term in self.terms if term.startswith("loss_")}
        speed = (self.step - self.clock_step) * self.args.batch_size / (time.perf_counter() - self.clock)
        row = {"step": self.step, "loss": sum(losses.values()), **means, "grad_norm": norm}
        row.update(lr=self.learning_rate(), skipped=self.skipped, images_per_s=speed)
        row.update(tflops=speed * self.flops / 1e12, utilization=speed * self.flops / self.peak)
        self.row_sums = {}
        self.reset_clock()
        if self.rank == 0:
            append_row(self.out / "metrics.jsonl", row)
            shown = ", ".join(f"{term.removeprefix('loss_')} {loss:.3f}" for term, loss in losses.items())
            rates = f"{speed:.0f} images/s, {row['tflops']:.2f} TFLOP/s, {row['utilization']:.2f} of matmul peak"
            self.bar.set_postfix_str(f"{shown}, {rates}")

    def reset_clock(self):
        """Begin to measure speed; what is written between two steps does not count."""
        self.clock = time.perf_counter()
        self.clock_step = self.step

    def save(self, ending):
        """Write a checkpoint, unless weights are not finite or this step was skipped.

        After a skipped step the weights are those of the step before, but they may be diverging. So they are saved only
        if the run ends, and then one more of the older checkpoints stays.
        """
        bad = torch.stack([~p.isfinite().all() for p in local_parts(self.model) + local_parts(self.ema)]).sum()
        bad = self.sum_over_ranks({"weights": bad})["weights"].item()
        skipping = self.skipped_in_a_row > 0
        self.saved = not bad and (ending or not skipping)
        if not self.saved:
            problem = "weights are not finite" if bad else "this step was skipped"
            if self.rank == 0:
                log(f"step {self.step}: no checkpoint, since {problem}")
            return

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, on rank 0
        state = {"config": asdict(self.model.config), "settings": vars(self.args)}
        state.update(step=self.step, skipped=self.skipped)
        state["model"] = get_model_state_dict(self.model, options=options)
        state["ema"] = get_model_state_dict(self.ema, options=options)
        state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizers, options=options)
        if self.rank == 0:
            self.saved = save_checkpoint(self.out, state, self.args.keep + skipping)
        self.reset_clock()

    def draw(self):
        """Write a picture of samples. All ranks take part if the network is split over them."""
        if self.rank == 0 or self.sharded:
            path = self.out / "samples" / f"{self.step:07}.png"
            with tolerate(path.parent):
                picture = self.draw_samples(self.ema)
                if picture is not None and self.rank == 0:
                    write_image(path, picture)
        self.reset_clock()


# ---- Pictures ----


# Of the depth colours, far to near: equal distances in CIELAB, lightness rising throughout.
FAR_TO_NEAR = "#080628 #280d51 #671c75 #9f2d6f #c6425d #e26147 #f29247 #f9c16d #fcf0b4"
ANCHORS = np.array([ImageColor.getrgb(color) for color in FAR_TO_NEAR.split()])


def paint_rgb(rgb):
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return ((rgb.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()


def nearness(depth, valid=None):
    """Depth (1, H, W) in any unit -> (1 / depth (H, W), its 2% and 98% percentiles over valid pixels, valid (H, W))."""
    depth = depth.detach().float().cpu().numpy()[0]
    valid = (depth > 0) & np.isfinite(depth) if valid is None else valid.cpu().numpy()[0]
    if not valid.any():
        return np.zeros_like(depth), (0.0, 1.0), valid
    near = 1 / np.maximum(np.where(valid, depth, np.inf), 1e-3 * max(np.median(depth[valid]), 1e-30))
    return near, np.percentile(near[valid], (2, 98)), valid


def paint_nearness(near, ends):
    """(H, W) -> (H, W, 3) uint8, from the first of ends to the second."""
    level = np.clip((near - ends[0]) / max(ends[1] - ends[0], 1e-9 * abs(ends[1])), 0, 1) * (len(ANCHORS) - 1)
    return np.stack([np.interp(level, range(len(ANCHORS)), channel) for channel in ANCHORS.T], -1).astype(np.uint8)


def paint_depth(depth, valid=None):
    """Depth (1, H, W) in any unit -> (H, W, 3) uint8, near is bright, black where missing; 2-98% of inverse depth."""
    near, ends, valid = nearness(depth, valid)
    return np.where(valid[..., None], paint_nearness(near, ends), 0).astype(np.uint8)


def enlarged(picture, side):
    """(H, W, 3) uint8 -> Image: a small one times a whole number, to near side; a large one shrunk to 2 sides."""
    picture = Image.fromarray(picture)
    longer = max(picture.size)
    if longer > 2 * side:
        return picture.resize([max(1, round(n * 2 * side / longer)) for n in picture.size], Image.LANCZOS)
    return picture.resize([n * max(1, round(side / longer)) for n in picture.size], Image.NEAREST)


def depth_picture(depth, valid, side=256):
    """paint_depth of (1, H, W) as an Image, with a scale bar beside it: the depths that its brightness stands for."""
    painted, (_, (far, near), _) = enlarged(paint_depth(depth, valid), side), nearness(depth, valid)
    canvas = Image.new("RGB", (painted.width + 60, max(painted.height, 64)), "white")
    canvas.paste(painted)
    length, left = canvas.height - 16, painted.width + 6
    bar = np.linspace(near, far, length)[:, None].repeat(10, 1)
    canvas.paste(Image.fromarray(paint_nearness(bar, (far, near))), (left, 8))
    for share in (0, 0.5, 1):
        number = f"{1 / max(near + share * (far - near), 1e-30):.3g}"
        ImageDraw.Draw(canvas).text((left + 14, 8 + share * length), number, fill="black", font_size=12, anchor="lm")
    return canvas


def draw_grid(rows, labels=(), cell=128):
    """Image of rows of (H, W, 3) uint8 pictures, labels on the left; a row of strings stands under pictures."""
    margin = 110 if labels else 0
    wrap = lambda text, width: "\n".join(textwrap.wrap(text, max(8, width // 6)))
    rows = [[x if isinstance(x, str) else enlarged(x, cell) for x in row] for row in rows]
    width = 4 + max(x.width for row in rows for x in row if not isinstance(x, str))
    rows = [[wrap(x, width) if isinstance(x, str) else x for x in row] for row in rows]
    heights = [4 + max(12 * (x.count("\n") + 1) if isinstance(x, str) else x.height for x in row) for row in rows]
    canvas = Image.new("RGB", (margin + max(map(len, rows)) * width, sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for c, x in enumerate(row):
            if isinstance(x, str):
                draw.multiline_text((margin + c * width, top), x, fill="black", font_size=11, spacing=1)
            else:
                canvas.paste(x, (margin + c * width, top))
        if labels:
            draw.multiline_text((4, top + 6), labels[i], fill="black", font_size=15)
        top += height
    return canvas


# ---- python data.py: the world as pictures, and in each layout that --data reads ----


def depth_png(depth):
    """Depth (H, W) in metres, 0 where infinite -> bytes of MoGe's log-coded PNG."""
    near, far = depth[depth > 0].min(), depth.max() * 1.001
    codes = 1 + np.round(65533 * np.log(np.maximum(depth, near) / near) / np.log(far / near))
    text = PngImagePlugin.PngInfo()
    text.add_text("near", repr(float(near))), text.add_text("far", repr(float(far)))
    picture = Image.fromarray(np.where(depth > 0, codes, 65535).astype(np.uint16))
    return to_bytes(picture.save, "PNG", pnginfo=text)


def export(out, layout, samples, per_shard=100):
    """Write samples, (rgb (H, W, 3) uint8, depth (H, W) metres, caption, vertical fov in radians), in a layout."""
    groups = {}
    rows = []
    for i, (rgb, depth, line, fov) in enumerate(samples):
        name = f"{i:06}"
        image = to_bytes(Image.fromarray(rgb).save, "JPEG", quality=100, subsampling=0)
        if layout == "moge":
            focal = float(0.5 / np.tan(fov / 2))  # in heights
            matrix = [[focal * rgb.shape[0] / rgb.shape[1], 0, 0.5], [0, focal, 0.5], [0, 0, 1]]
            meta = json.dumps({"intrinsics": matrix}).encode()
            groups[name] = {"/image.jpg": image, "/depth.png": depth_png(depth), "/meta.json": meta}
            rows.append(name)
        else:
            groups[name] = {".jpg": image, ".txt": line.encode(), ".depth.npy": to_bytes(np.save, depth)}
            rows.append(json.dumps({"file_name": f"{name}.jpg", "text": line, "depth_file_name": f"{name}.depth.npy"}))
    files = [(f"{name}{suffix}", content) for name, group in groups.items() for suffix, content in group.items()]
    if layout == "shards":
        count = 3 * per_shard  # a sample has three files
        for number, start in enumerate(range(0, len(files), count)):
            write_whole(out / f"{number:03}.tar", functools.partial(write_tar, files[start : start + count]))
        return
    for name, content in files:
        (out / name).parent.mkdir(exist_ok=True)
        write_bytes(out / name, content, sync=False)
    index = {"moge": ".index.txt", "folder": "metadata.jsonl"}[layout]
    write_bytes(out / index, "".join(f"{row}\n" for row in rows).encode())


def write_tar(files, target):
    """Write files, (name, content), into an open file as tar."""
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def main():
    p = Flags(__doc__)
    p.setting("--out", "runs/world", "new or empty directory to write to")
    p.setting("--split", "val", "train or val", one_of(*SPLITS))
    p.setting("--size", 32, "side in pixels", whole(1, 2048))
    p.setting("--count", 8, "number of samples", whole(1, 10**5))
    p.setting("--layout", "folder", "of the files: folder, shards or moge", one_of("folder", "shards", "moge"))
    p.setting("--measured", 1.0, "share of depth pixels to keep, to try completion on", number(0, 1, above=True))
    args = p.parse_args()
    if args.measured < 1 and args.layout == "moge":
        fail(f"--measured {args.measured}: below 1 for the layouts folder and shards alone; leave it out")
    if args.count * args.size**2 > 1 << 24:
        fail(f"--count {args.count}: {args.size}x{args.size} pixels each are too many for memory; give fewer")
    out, size = claim_folder(args.out), (args.size, args.size)
    scenes = draw_scenes(args.split, range(args.count))
    values, valid, captions = World(args.split, size).samples(range(args.count))
    values["depth"] *= Draws("measured", range(args.count)).rand(1, *size) < args.measured
    valid["depth"] = values["depth"] > 0
    if not valid["depth"].flatten(1).any(1).all():
        fail(f"--measured {args.measured}: a scene keeps no pixel; give a larger share")
    pictures = [paint_rgb(rgb) for rgb in values["rgb"]]
    export(out, args.layout, zip(pictures, values["depth"][:, 0].numpy(), captions, scenes["fov"].numpy(), strict=True))
    mask = valid["depth"][:8]
    thinned = sparsify(mask, values["rgb"][:8], "mixed", Draws(0, range(len(mask))).rand)
    paint = lambda masks: [paint_depth(d, v) for d, v in zip(values["depth"], masks, strict=False)]
    rows = {"image": pictures[:8], "depth": paint(mask), "depth as\ntrained on": paint(thinned)}
    write_image(out / "grid.png", draw_grid(list(rows.values()), list(rows)))
    print(f"{args.count} samples in {out}, for --data; see {out}/grid.png")


if __name__ == "__main__":
    run_script(main)
