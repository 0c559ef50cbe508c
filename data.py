"""Samples and pictures; also flags, checkpoints and data.Run: ranks, clipping, learning rate, EMA, metrics.

--data chooses where samples come from:

    synthetic                   the built-in world: rooms and open ground, ray cast; exact depth and normals, captions
    DIR with metadata.jsonl     rows with file_name and text, and depth_file_name or normal_file_name where they exist
    DIR with .index.txt         MoGe's evaluation folders: DIR/<line>/image.jpg and depth.png
    'shards/{000..999}.tar'     WebDataset: key.jpg|png|webp, key.txt, key.depth.png|npy, key.normal.npy

Depth is a 16-bit PNG (times --depth-scale), MoGe's log-coded PNG, or .npy in any unit. It may be sparse: depth is
missing where it is not above 0, not finite, or outside of --depth-min..--depth-max.

    python data.py --out runs/world --count 8       look at the world: pictures, depth, normals, captions
"""

import argparse
import atexit
import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import sys
import tarfile
import textwrap
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps, UnidentifiedImageError
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model import GUIDANCE, JOINT, MODALITIES, TEXT_PATCH, DiT, split_by_mode, training_cost

# ---- The synthetic world ----
# Endless captioned scenes with exact depth and normals, so that you can train both stages without any download.
# A scene is a set of numbers drawn from a hash of (split, index). Ray casting turns it into pictures.

COLORS = {  # of objects: saturated, so that a colour word can be checked in a picture
    "red": (0.86, 0.12, 0.12),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.93, 0.86, 0.12),
    "green": (0.15, 0.68, 0.20),
    "cyan": (0.12, 0.78, 0.80),
    "blue": (0.12, 0.24, 0.88),
    "purple": (0.52, 0.16, 0.80),
    "pink": (0.95, 0.35, 0.66),
}
MUTED = (  # of floors and walls
    (0.62, 0.58, 0.52),
    (0.52, 0.55, 0.60),
    (0.70, 0.66, 0.62),
    (0.45, 0.43, 0.42),
    (0.58, 0.62, 0.55),
    (0.75, 0.75, 0.74),
)
SKY = (0.66, 0.78, 0.90)
SHAPES = {  # weights w of the quadric w_x x^2 + w_y y^2 + w_z z^2 <= 1 that is cut with the cube [-1, 1]^3
    "ball": (1.0, 1.0, 1.0),
    "box": (0.0, 0.0, 0.0),
    "pillar": (1.0, 0.0, 1.0),
}
FLOORS = ("plain", "checkered", "striped")
SPLITS = {"train": 1, "val": 2}
MAX_OBJECTS = 3  # in a scene
ROOM = MAX_OBJECTS  # the room is the solid after the objects: you see its floor, walls and ceiling from inside
NUM_COLUMNS = 64  # a scene has so many random numbers

# What is random in a scene, by name. Columns are positions among the scene's random numbers. A list of three columns
# has one for each object, a list of two has one for a scene inside a room and one for a scene outside.
CHOICES = {  # columns, number of choices
    "count": (3, MAX_OBJECTS),
    "shape": ([4, 5, 6], len(SHAPES)),
    "floor": (7, len(FLOORS)),
    "striped": (8, 2),  # walls
    "color": ([11, 12, 13], [8, 7, 6]),  # each among the colours that are left
    "floor_color": (43, len(MUTED)),
    "wall_color": (44, len(MUTED)),
}
RANGES = {  # columns, low, high
    "outside": (0, 0, 1),
    "fov": (1, 46, 66),  # vertical, in degrees
    "height": (2, 0.8, 2.2),  # of the camera
    "relation": (9, 0, 1),  # chooses the caption's words for two objects
    "pitch": (10, -0.09, 0.09),
    "radius": ([14, 15, 16], 0.38, 0.62),
    "pillar_height": ([17, 18, 19], 0.75, 1.15),
    "distance": ([20, 21, 22], 2.1, 4.0),
    "offset": ([23, 24, 25], -0.22, 0.22),
    "left": ([26, 27], [2.8, 8], [4.2, 12]),  # where the walls of a room are, or how far you see outside
    "right": ([28, 29], [2.8, 8], [4.2, 12]),
    "back": ([30, 31], [1.5, 5], [3, 7]),
    "front": ([32, 33], [5.4, 9], [8, 15]),
    "top": ([34, 34], [2.6, 1000], [3.6, 1000]),
    "angle": ([35, 36, 37, 38], [0, 0, 0, -0.4], [1.57, 1.57, 1.57, 0.4]),  # of the objects and the room
    "fence": (39, 0.5, 1.6),  # its height; above it is the sky
    "tile": (40, 0.7, 1.3),
    "light_x": (41, -2.2, 2.2),
    "light_z": (42, 0, 2.5),
    "wall_brightness": (45, 0.8, 1.1),
}


# Random numbers are hashes of 64-bit states by SplitMix64, equal on every device. torch computes int64 modulo 2^64, so
# constants that are too large for int64 are written minus 2^64.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the step from one state to the next


def shift_right(z, count):
    """z >> count of an int64 tensor, with zeros coming in from the left."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def split_mix(z):
    """SplitMix64's hash of states: int64 of any shape -> int64 of that shape, each of 64 random bits."""
    z = (z ^ shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ shift_right(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ shift_right(z, 31)


def draw_numbers(split, indices):
    """Draw {name: (B,), or (B, columns)} of CHOICES, int64, and RANGES, float32. Each scene has its own numbers."""
    first = torch.tensor(indices, dtype=torch.int64)[:, None] * (2 * NUM_COLUMNS)  # half of the states stay unused
    counter = first + torch.arange(NUM_COLUMNS)  # (B, NUM_COLUMNS)
    seed = SPLITS[split] * (0xD1B54A32D192ED03 - (1 << 64))
    bits = split_mix((counter + seed) * GOLDEN)
    uniform = (shift_right(bits, 11).double() * 2.0**-53).float()  # (B, NUM_COLUMNS), in [0, 1]

    drawn = {}
    for name, (columns, num_choices) in CHOICES.items():
        num_choices = torch.tensor(num_choices)
        drawn[name] = (uniform[:, columns] * num_choices).long().minimum(num_choices - 1)
    for name, (columns, low, high) in RANGES.items():
        width = torch.tensor(np.subtract(high, low)).float()
        drawn[name] = uniform[:, columns] * width + torch.tensor(low).float()
    return drawn


def distinct_colors(choices):
    """(B, MAX_OBJECTS) choices, each among the colours that are left -> (B, MAX_OBJECTS) indices of COLORS."""
    colors = torch.zeros_like(choices)
    for i in range(MAX_OBJECTS):
        color = choices[:, i]
        for taken in colors[:, :i].sort(1).values.unbind(1):
            color = color + (color >= taken)
        colors[:, i] = color
    return colors


def place_objects(scenes):
    """Centres and half extents of the objects, each (B, MAX_OBJECTS, 3): they stand on the ground, left to right."""
    is_pillar = scenes["shape"] == list(SHAPES).index("pillar")
    half_width = torch.where(is_pillar, 0.6 * scenes["radius"], scenes["radius"])
    half_height = torch.where(is_pillar, scenes["pillar_height"], scenes["radius"])

    count = scenes["count"][:, None]
    column = (torch.arange(MAX_OBJECTS) + 0.5) * 2 / count - 1 + scenes["offset"]  # -1 to 1 across the picture
    z = scenes["distance"]
    x = column * 0.85 * z * (scenes["fov"] / 2).tan()[:, None]
    centre = torch.stack([x, half_height, z], 2)
    centre[torch.arange(MAX_OBJECTS) >= count] = -100.0  # out of sight
    return centre, torch.stack([half_width, half_height, half_width], 2)


def draw_scenes(split, indices):
    """Scenes for a sequence of B indices: a dictionary of tensors whose leading dimension is B.

    Lengths are in metres, y is up, and the camera is above the origin and looks along +z. The solids are MAX_OBJECTS
    objects and the room: "centre", "half" (extent) and "quadric" are (B, 4, 3), "angle" (about y) is (B, 4).
    """
    scenes = draw_numbers(split, indices)
    scenes["outside"] = scenes["outside"] < 0.35
    scenes["fov"] = scenes["fov"].deg2rad()
    scenes["pitch"] = ((scenes["height"] - 0.55) / 3).atan() + scenes["pitch"]
    scenes["count"] = scenes["count"] + 1
    scenes["big"] = scenes["radius"] > 0.5
    scenes["color"] = distinct_colors(scenes["color"])
    muted = torch.tensor(MUTED)
    scenes["floor_color"] = muted[scenes["floor_color"]]
    scenes["wall_color"] = muted[scenes["wall_color"]] * scenes["wall_brightness"][:, None]

    outside = scenes["outside"].long()[:, None]
    sides = ("left", "right", "back", "front", "top")
    left, right, back, front, top = (scenes.pop(name).gather(1, outside)[:, 0] for name in sides)
    low = torch.stack([-left, 0 * top, -back], 1)
    high = torch.stack([right, top, front], 1)
    centre, half = place_objects(scenes)
    scenes["centre"] = torch.cat([centre, (low + high)[:, None] / 2], 1)
    scenes["half"] = torch.cat([half, (high - low)[:, None] / 2], 1)
    shape = F.pad(scenes["shape"], (0, 1), value=list(SHAPES).index("box"))  # of the room too
    scenes["quadric"] = torch.tensor(list(SHAPES.values()))[shape]

    lamp = torch.stack([scenes["light_x"], torch.full_like(top, 2.5), scenes["light_z"]], 1)
    sun = 4 * torch.stack([scenes["light_x"], torch.full_like(top, 5.0), scenes["light_z"]], 1)
    scenes["light"] = torch.where(scenes["outside"][:, None], sun, lamp)
    return scenes


def describe_object(scenes, i, k):
    """Object k of scene i in words, such as "a small red ball". Three objects have no size, to keep captions short."""
    shape = list(SHAPES)[scenes["shape"][i, k]]
    color = list(COLORS)[scenes["color"][i, k]]
    words = [color, shape]
    if scenes["count"][i] < MAX_OBJECTS:
        size = "big" if scenes["big"][i, k] else "small"
        words.insert(0, "tall" if shape == "pillar" else size)
    article = "an" if words[0] == "orange" else "a"
    return " ".join([article, *words])


def arrange_objects(scenes, i, objects):
    """How the objects of scene i are arranged, in words. objects are their descriptions, from left to right."""
    if len(objects) == 1:
        return objects[0]
    if len(objects) == 3:
        return f"{objects[0]} left of {objects[1]} and {objects[2]}"

    first, second = objects
    relation = scenes["relation"][i]
    gap = float(scenes["centre"][i, 1, 2] - scenes["centre"][i, 0, 2])
    if relation < 0.4 and abs(gap) > 0.8:
        return f"{first} in front of {second}" if gap > 0 else f"{first} behind {second}"
    return f"{first} left of {second}" if relation < 0.7 else f"{second} right of {first}"


def caption(scenes, i):
    """What scene i of draw_scenes shows, in words: objects, how they are arranged, where, and on which floor."""
    objects = [describe_object(scenes, i, k) for k in range(scenes["count"][i])]
    content = arrange_objects(scenes, i, objects)
    floor = FLOORS[scenes["floor"][i]]
    if scenes["outside"][i]:
        return f"{content} on open ground" if floor == "plain" else f"{content} on open {floor} ground"
    return f"{content} in a room" if floor == "plain" else f"{content} in a room with a {floor} floor"


# Ray casting. Vectors have their component first: (3, B, K, P) for K solids and the P pixels of a picture.


def normalize(v):
    """v (3, ...) divided by its length. (F.normalize is several times slower over a leading dimension.)"""
    return v / v.square().sum(0).sqrt()


def rotate_y(v, angle):
    """Rotate vectors v (3, ...) about the vertical axis by angle, which broadcasts."""
    cos = angle.cos()
    sin = angle.sin()
    x = cos * v[0] + sin * v[2]
    z = cos * v[2] - sin * v[0]
    return torch.stack(torch.broadcast_tensors(x, v[1], z))


def camera_rays(scenes, height, width):
    """Origins (3, B, 1, 1) and directions (3, B, 1, P) of the rays through all pixels, one unit along the optical axis.

    So the distance along a ray, in units of its direction, is z-depth.
    """
    device = scenes["fov"].device
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    tan = (scenes["fov"] / 2).tan()
    x = ((2 * x + 1 - width) / height).flatten() * tan  # (B, 1, P)
    y = ((height - 1 - 2 * y) / height).flatten() * tan

    cos = scenes["pitch"].cos()
    sin = scenes["pitch"].sin()
    zero = torch.zeros_like(cos)
    return torch.stack([zero, scenes["height"], zero]), torch.stack([x, cos * y - sin, cos + sin * y])


def intersect(origin, direction, solids):
    """Where rays (3, B, 1, P) enter and leave each solid: (near, far), each (B, K, P), in units of direction.

    A solid is the cube [-1, 1]^3 cut with a quadric, in its own frame. near >= far, or NaN, is a miss.
    """
    o = rotate_y(origin - solids["centre"], -solids["angle"]) / solids["half"]  # (3, B, K, P)
    d = rotate_y(direction, -solids["angle"]) / solids["half"]

    low_side = (-1 - o) / d
    high_side = (1 - o) / d
    near = torch.minimum(low_side, high_side).amax(0)  # (B, K, P)
    far = torch.maximum(low_side, high_side).amin(0)

    # Roots of a s^2 + 2 b s + c = 0, where the ray meets the quadric. No root is NaN: a miss.
    w = solids["quadric"]
    a = (w * d * d).sum(0)
    b = (w * o * d).sum(0)
    c = (w * o * o).sum(0) - 1
    curved = a > 1e-9  # a ray along a pillar, or through a box, meets no curved surface
    root = (b * b - a * c).sqrt()
    a = a.clamp(min=1e-9)
    near = torch.where(curved, torch.maximum(near, (-b - root) / a), near)
    far = torch.where(curved, torch.minimum(far, (-b + root) / a), far)
    return near, far


def surface_geometry(point, index, solids):
    """The surface at points (3, B, 1, P) of the solids with these indices.

    Returns its normals, and the points in the frame of their solid (not rotated), each (3, B, 1, P).
    """
    hit = {}
    for name, value in solids.items():
        hit[name] = value.take_along_dim(index.expand(*value.shape[:-2], 1, -1), -2)
    local = rotate_y(point - hit["centre"], -hit["angle"]) / hit["half"]

    on_quadric = (hit["quadric"] * local * local).sum(0) > 0.998
    flat = (local.abs() == local.abs().amax(0)) * local.sign()
    gradient = torch.where(on_quadric, hit["quadric"] * local, flat) / hit["half"]
    normal = normalize(rotate_y(gradient, hit["angle"]))
    normal = torch.where(index == ROOM, -normal, normal)  # the room is seen from inside
    return normal, local * hit["half"] + hit["centre"]


def surface_colors(scenes, normal, position, depth, index):
    """Colours (3, B, 1, P) before light: a floor with its pattern, plain or striped walls, objects."""
    column = (position[0] / scenes["tile"]).floor()
    row = (position[2] / scenes["tile"]).floor()
    checkered = torch.where(scenes["floor"] == FLOORS.index("checkered"), (column + row) % 2, 0.5)
    pattern = torch.where(scenes["floor"] == FLOORS.index("striped"), column % 2, checkered) - 0.5
    fading = (-((depth / 11) ** 2)).exp()  # far tiles would be smaller than pixels
    floor_shade = 1 + 0.7 * pattern * fading

    stripes = scenes["striped"] * ((position[1] * 2.5).floor() % 2 - 0.5)
    is_floor = normal[1] > 0.9
    is_wall = normal[1].abs() < 0.5
    shade = torch.where(is_wall, 1 + 0.25 * stripes, 1.1)
    shade = torch.where(is_floor, floor_shade, shade)
    room = torch.where(is_floor, scenes["floor_color"], scenes["wall_color"]) * shade

    palette = torch.tensor(list(COLORS.values())).to(depth.device, non_blocking=True)
    objects = palette[scenes["color"][..., 0]].permute(3, 1, 0, 2)  # (3, B, MAX_OBJECTS, 1)
    objects = objects.take_along_dim(index.clamp(max=ROOM - 1).expand(3, -1, -1, -1), 2)
    return torch.where(index == ROOM, room, objects)


def illumination(scenes, point, normal, solids):
    """Brightness (B, 1, P): ambient light, and a lamp or the sun, which objects block."""
    to_light = scenes["light"] - point
    near, far = intersect(point + 2e-3 * normal, to_light, solids)
    blocked = (near < far) & (far > 1e-3) & (near < 1)
    in_light = ~blocked[:, :ROOM].any(1, keepdim=True)
    lambert = (normal * normalize(to_light)).sum(0).clamp(min=0)
    return 0.58 + 0.52 * lambert * in_light


def render(scenes, height, width=None, device="cpu"):
    """Render scenes of draw_scenes on a device.

    Returns float32 tensors {"rgb" (B, 3, H, W) in [-1, 1]; "depth" (B, 1, H, W), z-depth in metres; "normal"
    (B, 3, H, W), unit vectors in camera axes (right, up, forward)}. Depth and normals are 0 in the sky.
    """
    width = width or height
    scenes = {name: value.to(device, non_blocking=True) for name, value in scenes.items()}
    solids = {name: scenes[name].movedim(-1, 0).unsqueeze(-1) for name in ("centre", "half", "quadric")}
    solids["angle"] = scenes["angle"].unsqueeze(-1)
    scenes = {name: value.movedim(0, -1)[..., None, None] for name, value in scenes.items()}  # (..., B, 1, 1)

    # Depth and solid of the first surface on each ray, (B, 1, P). The camera is inside the room.
    origin, ray = camera_rays(scenes, height, width)
    near, far = intersect(origin, ray, solids)
    near = torch.where((near < far) & (near > 1e-3), near, torch.inf)
    depth, index = torch.cat([near[:, :ROOM], far[:, ROOM:]], 1).min(1, keepdim=True)

    point = origin + depth * ray
    normal, position = surface_geometry(point, index, solids)
    colors = surface_colors(scenes, normal, position, depth, index)
    rgb = colors * illumination(scenes, point, normal, solids)

    is_sky = scenes["outside"] & (index == ROOM) & (point[1] > scenes["fence"])
    sky = torch.tensor(SKY).to(device, non_blocking=True).view(3, 1, 1, 1)
    sky = sky + 0.25 * normalize(ray)[1].clamp(min=0)
    rgb = torch.where(is_sky, sky, rgb).clamp(0, 1) * 2 - 1

    cos = scenes["pitch"].cos()
    sin = scenes["pitch"].sin()
    normal = torch.stack([normal[0], cos * normal[1] + sin * normal[2], cos * normal[2] - sin * normal[1]])
    maps = {"rgb": rgb, "depth": torch.where(is_sky, 0, depth)[None], "normal": torch.where(is_sky, 0, normal)}
    return {name: x.squeeze(-2).movedim(0, 1).unflatten(-1, (height, width)).contiguous() for name, x in maps.items()}


# ---- Sensors ----
# Real depth sensors leave pixels out. These masks imitate that, so dense maps teach the network to use sparse ones.
# The network gets no mask: it must recognise the noise that stands in for a missing pixel.

PATTERNS = {"dense": 0.5, "uniform": 0.125, "lidar": 0.125, "sfm": 0.125, "holes": 0.125}  # shares in "mixed"


def scan_lines(noise, rand):
    """Rows that a lidar scans, at a random spacing, with 10% of their pixels missing."""
    height = noise.shape[2]
    rows = torch.arange(height, device=noise.device)[:, None]
    spacing = 2 + (rand(1, 1, 1) * height / 5).long()
    first = (rand(1, 1, 1) * spacing).long()
    return ((rows + first) % spacing == 0) & (noise < 0.9)


def textured_points(noise, rgb):
    """Points at which structure from motion finds features: the more texture, the more likely."""
    height, width = rgb.shape[2:]
    grey = F.pad(rgb.mean(1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    texture = grey.diff(dim=2)[..., :width].abs() + grey.diff(dim=3)[:, :, :height].abs()
    mean = texture.mean((2, 3), keepdim=True).clamp(min=1e-6)
    return noise < texture / mean * 0.15 * (texture > 0.05)


def outside_rectangles(noise, rand):
    """All pixels but those in four random rectangles, which may lie partly outside of the picture."""
    height, width = noise.shape[2:]
    rows = torch.arange(height, device=noise.device)[:, None]
    columns = torch.arange(width, device=noise.device)
    y = rand(4, 1, 1) * height
    x = rand(4, 1, 1) * width
    tall = rand(4, 1, 1) * (height * 0.6)
    wide = rand(4, 1, 1) * (width * 0.6)
    in_rows = (rows >= y - tall / 2) & (rows < y + tall / 2)
    in_columns = (columns >= x - wide / 2) & (columns < x + wide / 2)
    return ~(in_rows & in_columns).any(1, keepdim=True)


def sensor_mask(rgb, pattern, rand):
    """The pixels that a sensor would measure in images rgb (B, 3, H, W): a mask (B, 1, H, W).

    pattern: one of PATTERNS (all pixels, a random 0.5-50% of them, scan lines, points where the image has texture, all
    but four rectangles); "mixed", one of these for each sample, as often as PATTERNS says; or a number in (0, 1], a
    share that is kept at random.
    rand(*shape) draws (B, *shape) from U(0, 1) on the device of rgb, as PerSampleRNG.rand does.
    """
    batch, _, height, width = rgb.shape
    noise = rand(1, height, width)
    if pattern not in ("mixed", *PATTERNS):
        return noise < float(pattern)

    # All are drawn, so that the mask of a pattern is the same under its own name and under "mixed".
    dense = torch.ones_like(noise, dtype=torch.bool)
    uniform = noise < 0.005 * 100 ** rand(1, 1, 1)
    lidar = scan_lines(noise, rand)
    sfm = textured_points(noise, rgb)
    holes = outside_rectangles(noise, rand)
    masks = torch.cat([dense, uniform, lidar, sfm, holes], 1)  # (B, 5, H, W), in the order of PATTERNS
    if pattern == "mixed":
        u = rand()
        choice = torch.zeros_like(u, dtype=torch.long)
        for end in itertools.accumulate(list(PATTERNS.values())[:-1]):
            choice += u >= end
    else:
        choice = torch.full((batch,), list(PATTERNS).index(pattern), device=rgb.device)
    return masks.take_along_dim(choice.view(-1, 1, 1, 1), 1)


# ---- Files ----
# Images, depth maps and normals as they are published, read into arrays, and cropped and resized together.

IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # of the many that Pillow would try


class BadSample(ValueError):
    """Raised for a sample that cannot be read. The message names the file and the problem."""


@contextlib.contextmanager
def reading(name):
    """Turn any exception of the block into a BadSample whose message begins with name.

    numpy, Pillow and tarfile raise exceptions of many kinds for damaged files.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise BadSample(f"{name}: not an image") from None
    except Exception as error:
        problem = getattr(error, "strerror", None) or error  # OSError has the name of the file in its text
        raise BadSample(f"{name}: {problem}") from None


def read_png(content, scale):
    """Bytes of a 16-bit grey PNG -> depth (H, W): its values times scale, or what MoGe's text fields say.

    The fields near and far mean that a value v is near^(1-k) far^k with k = (v - 1) / 65533. 0 is unknown, and 65535 is
    infinite. Early files of MoGe also have a field unit, in metres.
    """
    image = Image.open(io.BytesIO(content), formats=["PNG"])
    if not image.mode.startswith("I"):
        raise BadSample(f"a PNG of mode {image.mode} is a picture, not depth; give 16-bit grey or .npy")
    codes = np.asarray(image)
    if "near" not in image.info:
        return codes * np.float32(scale)

    near, far, unit = (float(image.info.get(key, 1)) for key in ("near", "far", "unit"))
    depths = unit * near * (far / near) ** ((np.arange(65536, dtype=np.float32) - 1) / 65533)
    depths[0] = 0
    depths[65535] = np.inf
    return depths[codes]


def read_image(name, content, **_):
    image, shape = load_image(content)
    return image / np.float32(127.5) - 1, np.ones(shape, bool)


def read_depth(name, content, scale=1.0, low=0.0, high=math.inf):
    """Bytes of a .png or .npy file -> depth (H, W, 1), valid (H, W).

    A 16-bit PNG is multiplied by scale. sample.py has no --depth-scale: it keeps the unit of the file.
    """
    if name.lower().endswith(".png"):
        depth = read_png(content, scale)
    else:
        depth = np.load(io.BytesIO(content), allow_pickle=False)
    if depth.ndim == 3:
        depth = depth.squeeze()  # (1, H, W) or (H, W, 1)
    if depth.ndim != 2:
        raise BadSample(f"has shape {depth.shape}; must be (height, width)")
    depth = depth.astype(np.float32)
    valid = (depth > max(low, 0)) & (depth <= high) & np.isfinite(depth)
    return depth[..., None], valid


def read_normals(name, content, **_):
    vectors = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)
    if vectors.ndim != 3 or vectors.shape[2] != 3:
        raise BadSample(f"has shape {vectors.shape}; must be (height, width, 3)")
    length = np.linalg.norm(vectors, axis=2)
    valid = (length > 0) & np.isfinite(length)
    return vectors / np.where(valid, length, 1)[..., None], valid


Format = namedtuple("Format", ["suffixes", "read", "mirror"])  # mirror: factors of the channels of a mirrored map
FORMATS = {  # how files hold the values of each of model.ENCODINGS; read returns values (H, W, C), valid (H, W)
    "plain": Format(IMAGES, read_image, (1,)),
    "relative depth": Format(("png", "npy"), read_depth, (1,)),
    "unit vectors": Format(("npy",), read_normals, (-1, 1, 1)),
}


def read_map(modality, name, content, **depth_options):
    """Bytes of a modality's file -> values (H, W, C) float32, valid (H, W) bool.

    depth_options: the scale of a PNG, and the range from low to high outside of which depth is missing.
    """
    file_format = FORMATS[modality.encoding]
    if Path(name).suffix[1:].lower() not in file_format.suffixes:
        raise BadSample(f"{modality.name} is read from {', '.join(file_format.suffixes)}")
    values, valid = file_format.read(name, content, **depth_options)
    if not valid.any():
        raise BadSample("no valid pixel: none is above 0, finite and in range")
    return values, valid


def load_image(content, size=None, position=(0.5, 0.5)):
    """Bytes of an image -> (image (H, W, 3) uint8, cropped and resized to size; (height, width) of the whole image).

    The image is upright by EXIF, antialiased, and white where it is transparent. position is that of crop_box, central
    by default. A JPEG is decoded at a reduced scale, twice size or more.
    """
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientation, by a quarter
    shape = image.size if is_turned else image.size[::-1]
    if size:
        shrink = 2 * max(size[0] / shape[0], size[1] / shape[1])
        image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))

    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if size:
        image = image.resize(size[::-1], Image.BICUBIC, crop_box(image.size[::-1], shape, size, position))
    return np.array(image), shape


def crop_box(shape, image_shape, size, position=(0.5, 0.5)):
    """(left, top, right, bottom) of the largest crop that has the aspect of size (H, W).

    position (down, across): (0, 0) is the top left crop, (0.5, 0.5) the central one. The box is in pixels of a map of
    shape (h, w). The map may have another resolution than its image, of image_shape, but must have the same aspect.
    """
    y_scale = shape[0] / image_shape[0]
    x_scale = shape[1] / image_shape[1]
    rounding = max(1, x_scale, y_scale) * (1 / image_shape[0] + 1 / image_shape[1])
    if abs(x_scale - y_scale) > rounding:
        raise BadSample(f"has another shape than its image: {tuple(shape)} instead of {tuple(image_shape)}")
    scale = min(image_shape[0] / size[0], image_shape[1] / size[1])
    height = size[0] * scale
    width = size[1] * scale
    top = max(image_shape[0] - height, 0) * position[0]
    left = max(image_shape[1] - width, 0) * position[1]
    right = min((left + width) * x_scale, shape[1])
    bottom = min((top + height) * y_scale, shape[0])
    return left * x_scale, top * y_scale, right, bottom


def nearest(values, valid, size, box):
    """Crop and resize a map (h, w) or (h, w, C), valid (h, w) bool -> the same at size (H, W), by nearest valid pixel.

    A cell of the result takes, of the pixels whose centres it covers, the valid one nearest to its own centre. So
    sparse maps survive, and nothing is averaged across holes or edges. A cell that covers no valid pixel is missing.
    """
    left, top, right, bottom = box
    cell_height = (bottom - top) / size[0]
    cell_width = (right - left) / size[1]

    # A cell takes the pixel under its centre if that is valid.
    rows = (top + (np.arange(size[0]) + 0.5) * cell_height).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) * cell_width).astype(int)
    out = values[rows[:, None], columns]
    found = valid[rows[:, None], columns]

    # Where the pixels of the box are, in cells. The valid ones compete for the cells that have no value yet.
    y = (np.arange(values.shape[0]) + 0.5 - top) / cell_height
    x = (np.arange(values.shape[1]) + 0.5 - left) / cell_width
    rows = slice(*np.searchsorted(y, (0, size[0])))
    columns = slice(*np.searchsorted(x, (0, size[1])))
    cell_row = y[rows].astype(int)
    cell_column = x[columns].astype(int)
    r, c = np.nonzero(valid[rows, columns] & ~found[cell_row[:, None], cell_column])

    # From far to near: of several assignments to a cell the last one stays.
    y_distance = (y[rows] - cell_row - 0.5) * cell_height
    x_distance = (x[columns] - cell_column - 0.5) * cell_width
    order = np.argsort(-(y_distance[r] ** 2 + x_distance[c] ** 2), kind="stable")
    r = r[order]
    c = c[order]
    out[cell_row[r], cell_column[c]] = values[rows, columns][r, c]
    found[cell_row[r], cell_column[c]] = True
    return out, found


# ---- Sources ----
# Where samples come from: the synthetic world, a folder, or tar shards. All give Batches of the wanted modalities.

ATTEMPTS = 10  # a training run ends after so many samples in a row that cannot be read


@dataclass
class Batch:
    """B samples. What a sample lacks is masked out."""

    values: dict  # {modality: (B, C, H, W)}: images in [-1, 1], depth in its files' unit, normals of unit length
    valid: dict  # {modality: (B, 1, H, W) bool, or None if all pixels are valid}
    captions: list
    indices: list  # of the samples, for PerSampleRNG; in training those of training_indices
    names: list


@dataclass
class SyntheticWorld:
    """The synthetic world as a source: it has a sample for every index."""

    split: str
    size: tuple  # (H, W)
    device: str = "cpu"

    modalities = ("rgb", "depth", "normal")
    listing = range(1 << 32)
    shards = ()

    def samples(self, indices):
        """A Batch of the scenes with these indices."""
        scenes = draw_scenes(self.split, indices)
        values = render(scenes, *self.size, device=self.device)
        not_sky = values["depth"] > 0
        valid = {"rgb": None, "depth": not_sky, "normal": not_sky}
        captions = [caption(scenes, i) for i in range(len(indices))]
        return Batch(values, valid, captions, list(indices), [f"{i:06}" for i in indices])

    def load(self, index_batches, workers, device):
        """Iterate over a Batch for each sequence of indices."""
        return map(self.samples, index_batches)


@dataclass
class TarMember:
    """A file in a tar file. It is read as a Path is."""

    tar: str
    name: str
    start: int
    size: int

    def __str__(self):
        return f"{self.tar}: {self.name}"

    def read_bytes(self):
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass
class SampleFiles:
    """The files of a sample. None of them has been read yet."""

    name: str
    files: dict  # {"image", "txt" or a modality: Path or TarMember}
    text: str = ""  # the caption, unless a file "txt" holds it


@dataclass
class FileDataset(Dataset):
    """The n samples of a folder or of tar shards. With j = i % SEED_STEP, item i is sample j % n of epoch j // n.

    So the samples of a step do not depend on the number of ranks, --workers or --grad-accum.
    """

    args: argparse.Namespace
    training: bool
    size: tuple  # (H, W)
    modalities: tuple
    listing: list = ()  # SampleFiles of a folder; of shards an array (n, 2): the shard and the offset of each sample
    shards: list = ()
    attempts: int = ATTEMPTS

    def sample_files(self, number):
        """The SampleFiles of a sample, by its number in the listing."""
        if not self.shards:
            return self.listing[number]
        shard, offset = self.listing[number].tolist()
        with reading(self.shards[shard]):
            return next(list_shard(self.shards[shard], offset))[1]

    def __getitem__(self, index):
        """Read a sample. If it cannot be read, the next one of the epoch replaces it.

        Raises BadSample if self.attempts samples in a row cannot be read.
        """
        count = len(self.listing)
        epoch, position = divmod(index % SEED_STEP, count)  # each seed counts from 0
        order = epoch_order(count, self.args.seed, epoch) if self.training else range(count)
        for attempt in range(self.attempts):
            try:
                sample = self.sample_files(order[(position + attempt) % count])
                return {"index": index, **self.read_sample(sample, epoch)}
            except BadSample as error:
                if attempt + 1 == self.attempts:
                    raise
                log(f"{error}; this sample is replaced by the next")

    def read_sample(self, sample, epoch):
        """Read the image and the maps, and crop, resize and mirror them together: {"maps", "masks", "caption", "name"}.

        The crop is central. In training it is random, and half of the samples are mirrored, unless the caption tells
        left from right. That randomness follows from (seed, epoch, name) alone.
        """
        caption = sample.text
        if "txt" in sample.files:
            with reading(sample.files["txt"]):
                caption = sample.files["txt"].read_bytes().decode()
        position = (0.5, 0.5)
        is_mirrored = False
        if self.training:
            rng = random.Random(f"{self.args.seed} {epoch} {sample.name}")
            position = (rng.random(), rng.random())
            is_mirrored = rng.random() < 0.5 and not re.search(r"\b(left|right)", caption, re.IGNORECASE)

        image, *others = self.modalities
        maps = {}
        masks = {}
        with reading(sample.files["image"]):
            maps[image.name], shape = load_image(sample.files["image"].read_bytes(), self.size, position)
        for m in others:
            maps[m.name], masks[m.name] = self.load_map(m, sample.files.get(m.name), shape, position)
        if is_mirrored:
            for m in self.modalities:
                factors = np.array(FORMATS[m.encoding].mirror, maps[m.name].dtype)
                maps[m.name] = maps[m.name][:, ::-1] * factors
            masks = {name: mask[:, ::-1].copy() for name, mask in masks.items()}
        return {"maps": maps, "masks": masks, "caption": caption, "name": sample.name}

    def load_map(self, modality, file, shape, position):
        """Values (H, W, C) and mask (H, W) of a modality, which is missing if the sample has no file of it."""
        if file is None:
            return np.zeros((*self.size, modality.channels), np.float32), np.zeros(self.size, bool)
        high = self.args.depth_max or math.inf  # 0 is no limit
        depth_options = {"scale": self.args.depth_scale, "low": self.args.depth_min, "high": high}
        with reading(file):
            values, valid = read_map(modality, str(file), file.read_bytes(), **depth_options)
            values, valid = nearest(values, valid, self.size, crop_box(valid.shape, shape, self.size, position))
        return np.where(valid[..., None], values, 0), valid

    def load(self, index_batches, workers, device):
        """Iterate over a Batch for each sequence of indices."""
        if not len(self.listing):
            fail(f"--data {self.args.data}: lists no samples (images are {', '.join(IMAGES)})")
        pinned = torch.device(device).type == "cuda"
        for loaded in load_parallel(self, workers, batch_sampler=index_batches, pin_memory=pinned):
            values = {name: x.to(device, non_blocking=True).movedim(-1, 1) for name, x in loaded["maps"].items()}
            valid = {name: mask[:, None].to(device, non_blocking=True) for name, mask in loaded["masks"].items()}
            image = self.modalities[0].name
            values[image] = values[image].float() / 127.5 - 1
            valid[image] = None
            yield Batch(values, valid, loaded["caption"], loaded["index"].tolist(), loaded["name"])


def load_parallel(dataset, workers, **options):
    """Iterate over a DataLoader. A BadSample ends the program with one line."""
    try:
        yield from DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, **options)
    except BadSample as error:
        problem = str(error).rpartition("BadSample: ")[2]  # a traceback comes before it, if it is of a worker
        fail(f"--data {problem}")


@functools.lru_cache(2)
def epoch_order(count, seed, epoch):
    """Numbers of count samples in the order of an epoch of training."""
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


@functools.lru_cache(4)
def list_folder(folder):
    """SampleFiles of a folder that has metadata.jsonl, or .index.txt as MoGe's evaluation folders have."""
    samples = []
    index = folder / ".index.txt"
    if index.is_file():
        for name in filter(None, index.read_text().splitlines()):
            files = {"image": folder / name / "image.jpg", "depth": folder / name / "depth.png"}
            samples.append(SampleFiles(name, files))
        return samples

    path = folder / "metadata.jsonl"
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            samples.append(read_row(folder, line, f"{path} row {number}"))
    return samples


def read_row(folder, line, where):
    """A line of metadata.jsonl -> SampleFiles. where is its name in a message."""
    try:
        row = json.loads(line)
        files = {"image": folder / row["file_name"]}
        text = row.get("text") or ""
        if not isinstance(text, str):
            raise TypeError
        for key, value in row.items():
            name = key.rpartition("_file_name")[0]
            if name not in ("", *MODALITIES):
                fail(f"--data {where}: {key} is not read; modalities are {', '.join(MODALITIES)}")
            if name and value:
                files[name] = folder / value
    except (ValueError, KeyError, TypeError):
        fail(f"--data {where}: must be a JSON dictionary with a file_name; text and file names must be strings")
    return SampleFiles(os.path.splitext(row["file_name"])[0], files, text)


# The name of a tar member: the key of its sample, up to the first dot after the last slash, and what the file is.
MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")


def list_shard(path, start=0):
    """Yields (offset, SampleFiles) of a tar file's samples from an offset on. Only headers are read.

    A sample is consecutive members with the same key: key.jpg, key.txt, key.depth.npy ... It must have an image.
    """
    with open(path, "rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = (member for member in tar if member.isfile() and MEMBER.fullmatch(member.name))
            for key, group in itertools.groupby(members, lambda member: MEMBER.fullmatch(member.name)[1]):
                group = list(group)
                files = {}
                for member in group:
                    kind, _, suffix = MEMBER.fullmatch(member.name)[2].lower().rpartition(".")
                    kind = kind or ("image" if suffix in IMAGES else suffix)
                    files.setdefault(kind, TarMember(path, member.name, member.offset_data, member.size))
                if "image" in files:
                    yield group[0].offset, SampleFiles(key, files)


def sample_offsets(path, limit=None):
    """Offsets of the samples of a tar file, of at most limit."""
    with reading(path):
        return [offset for offset, _ in itertools.islice(list_shard(path), limit)]


def index_shards(paths, workers=0, limit=None):
    """(N, 2) int64: the shard and the offset of each sample. Reads no more shards than hold limit samples."""
    read_offsets = functools.partial(sample_offsets, limit=limit)  # as collate_fn, it runs in the workers
    offsets_of_shards = load_parallel(paths, workers, batch_size=None, collate_fn=read_offsets)
    index = []
    progress = tqdm(offsets_of_shards, "counting the samples of --data", leave=False, disable=None)  # in a terminal
    for shard, offsets in enumerate(progress):
        index += [(shard, offset) for offset in offsets]
        if limit is not None and len(index) >= limit:
            break
    return np.array(index)


def saved_index(paths, out, workers, rank):
    """index_shards, saved by rank 0 in a run directory. If a shard changes in size or time, all are counted again."""
    states = [os.stat(path) for path in paths]
    key = hash_int64([(path, s.st_size, s.st_mtime_ns) for path, s in zip(paths, states, strict=True)])
    saved = Path(out) / f"shards{key}.npy"
    if rank == 0 and not saved.exists():
        write_bytes(saved, to_bytes(np.save, index_shards(paths, workers)))
    if dist.is_initialized():
        dist.barrier()
    return np.load(saved, mmap_mode="r")


def expand(pattern):
    """'a{08..10}.tar' -> ['a08.tar', 'a09.tar', 'a10.tar'], for any number of ranges in braces."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high = match.groups()
    numbers = [f"{number:0{len(low)}}" for number in range(int(low), int(high) + 1)]
    return [path for number in numbers for path in expand(pattern.replace(match[0], number, 1))]


def open_source(args, split, size, modalities, device="cpu"):
    """The source that --data names, for images of size (H, W). The first modality is the image."""
    if args.data == "synthetic":
        for m in modalities:
            if m.name not in SyntheticWorld.modalities:
                fail(f"--data synthetic: has no {m.name}; it has {', '.join(SyntheticWorld.modalities)}")
        return SyntheticWorld(split, size, device)

    folder = Path(args.data)
    if (folder / ".index.txt").is_file() or (folder / "metadata.jsonl").is_file():
        return FileDataset(args, split == "train", size, modalities, list_folder(folder))
    shards = expand(args.data) or [args.data]
    missing = [path for path in shards if not os.path.isfile(path)]
    if missing:
        known = "synthetic, a folder with metadata.jsonl or .index.txt, or tar shards"
        fail(f"--data {args.data}: unknown source, no file {missing[0]}; must be {known}")
    return FileDataset(args, split == "train", size, modalities, shards=shards)


# ---- Batches ----
# Which samples a step trains on, and the random numbers that belong to them: both follow from (seed, index), and not
# from the number of ranks, of workers or of accumulation steps.

SEED_STEP = 1 << 32  # between the first indices of two seeds


def training_indices(seed, step, batch_size, rank=0, ranks=1):
    """Indices of the samples of one step that one rank trains on. Runs with different seeds share no index."""
    share = batch_size // ranks
    start = seed * SEED_STEP + step * batch_size + rank * share
    return range(start, start + share)


def hash_int64(key):
    """A hash of a key: an int64, equal in all processes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class PerSampleRNG:
    """Random numbers that belong to samples: row i of a draw is a hash of (key, indices[i], number of the draw).

    So noise, noise levels and masks do not depend on how a batch is split over ranks and accumulation steps. Uniform
    numbers are equal on every device to the last bit, normal ones to rounding.
    """

    def __init__(self, key, indices, device="cpu"):
        indices = torch.tensor(indices, dtype=torch.int64).to(device, non_blocking=True)
        self.states = split_mix(indices * GOLDEN + hash_int64(key))  # (B,)
        self.num_draws = 0

    def random_bits(self, *shape):
        """(B, *shape) int64, each of 64 random bits. Every call gives new ones."""
        self.num_draws += 1
        start = split_mix(self.states + self.num_draws)  # (B,)
        counter = torch.arange(math.prod(shape), device=start.device)
        return split_mix(start[:, None] + counter * GOLDEN).view(-1, *shape)

    def rand(self, *shape):
        """(B, *shape) from U[0, 1)."""
        return shift_right(self.random_bits(*shape), 40) * 2.0**-24  # 24 bits are what float32 holds exactly

    def randn(self, *shape):
        """(B, *shape) from N(0, 1), by the Box-Muller transform: 64 bits give a radius and an angle, so two numbers."""
        count = math.prod(shape)
        bits = self.random_bits((count + 1) // 2)
        radius = ((shift_right(bits, 32) + 1) * 2.0**-32).log().mul(-2).sqrt()
        angle = (bits & 0xFFFFFFFF) * (2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(-1, *shape)


def training_batches(source, args, step, rank, ranks, device):
    """Endless Batches of one rank, from a step on, args.grad_accum of them per step. Shards are counted first."""
    if source.shards:
        source.listing = saved_index(source.shards, args.out, args.workers, rank)
    size = args.batch_size // ranks // args.grad_accum
    steps = (training_indices(args.seed, i, args.batch_size, rank, ranks) for i in itertools.count(step))
    index_batches = (indices[start : start + size] for indices in steps for start in range(0, len(indices), size))
    return source.load(index_batches, args.workers, device)


def in_order(source, count, batch_size, device="cpu", workers=0, strict=True):
    """Batches of the first count samples, or of all if count is None.

    A sample that cannot be read ends the program or, if not strict, is replaced by the next one, as in training.
    """
    if source.shards:
        source.listing = index_shards(source.shards, limit=count)
    source.attempts = 1 if strict else ATTEMPTS
    indices = range(len(source.listing))[:count]
    index_batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return source.load(index_batches, min(workers, 1), device)


def ignore_signals(worker):
    """Let a worker ignore what schedulers and Ctrl-C send to all processes: training needs it to finish a step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Kill the workers: multiprocessing would send SIGTERM, which they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
    for worker in multiprocessing.active_children():
        worker.kill()


# ---- Encoders ----
# What the network sees of images and captions: pixels and bytes, or what --encoders FILE.py makes of them. Frozen
# encoders turn the pixel model into a latent one that reads text embeddings. Nothing else changes.


def truncated_words(caption, length):
    """The words of a caption that encode_text would cut or split, joined by spaces; "" if all fit."""
    words = caption.split()
    tokens = itertools.accumulate(math.ceil(len(word.encode()) / TEXT_PATCH) for word in words)
    return " ".join(word for word, used in zip(words, tokens, strict=True) if used > length // TEXT_PATCH)


def encode_text(captions, length):
    """Captions -> (B, length) uint8: UTF-8, each word at the start of a token of TEXT_PATCH bytes, zeros between.

    A word longer than a token continues in the next one. What does not fit in length is cut.
    """
    text = np.zeros((len(captions), length // TEXT_PATCH, TEXT_PATCH), np.uint8)
    for row, caption in zip(text, captions, strict=True):
        words = (word.encode() for word in caption.split())
        pieces = (word[i : i + TEXT_PATCH] for word in words for i in range(0, len(word), TEXT_PATCH))
        for token, piece in zip(row, pieces, strict=False):
            token[: len(piece)] = np.frombuffer(piece, np.uint8)
    return torch.from_numpy(text.reshape(len(captions), -1))


class PixelsAndBytes:
    """The network sees pixels and bytes. An object that a function of a --encoders file returns has these members:

                    without encoders             with --encoders
    image_channels  3                            channels C of a latent
    image_stride    1                            pixels S per latent, per side
    encode_image    (B, 3, H, W) in [-1, 1]      the same -> (B, C, H / S, W / S) float32, finite, of unit variance
    decode_image    its inverse                  its inverse
    text_length     bytes L of a caption         tokens L of a caption
    text_dim        0                            channels D of a token
    encode_text     captions -> (B, L) uint8     captions -> (B, L, D) float32, finite

    open_encoders adds no_text, the encoded empty caption: (1, L) or (1, L, D).
    """

    image_channels = 3
    image_stride = 1
    text_dim = 0

    def __init__(self, text_length):
        self.text_length = text_length

    def encode_image(self, rgb):
        return rgb

    decode_image = encode_image

    def encode_text(self, captions):
        return encode_text(captions, self.text_length)


@torch.no_grad()
def check_encoders(encoders, device, config):
    """Raise ValueError unless encoders return what PixelsAndBytes documents, for a batch of two."""
    config = config.with_encoders(encoders)
    rgb = torch.zeros(2, 3, 4 * config.patch, 6 * config.patch, device=device)
    latents = encoders.encode_image(rgb)
    text_shape = (2, encoders.text_length, encoders.text_dim)
    expected = {
        "encode_image": (latents, (2, *config.modalities[0].shape(rgb.shape[2:]))),
        "decode_image": (encoders.decode_image(latents), tuple(rgb.shape)),
        "encode_text": (encoders.encode_text(["", "a red ball"]), text_shape if encoders.text_dim else text_shape[:2]),
    }
    for name, (returned, shape) in expected.items():
        if tuple(returned.shape) != shape or not returned.isfinite().all():
            raise ValueError(f"{name} returned a tensor of shape {tuple(returned.shape)}; must be {shape}, finite")


def run_file(path):
    """Run the Python file that a flag names, and return its module."""
    name = f"file_{Path(path).stem}"  # such as file_model, which does not replace our model
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError("must be the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile and dataclasses look it up
    spec.loader.exec_module(module)
    return module


def open_encoders(flag, device, config, trained_with=None):
    """--encoders FILE.py[:FUNCTION[:ARGUMENT,...]] -> the encoders that FUNCTION(device, ARGUMENT, ...) returns.

    FUNCTION is load by default. An empty flag is PixelsAndBytes. Exit code 2 if the encoders do not fit.
    trained_with: the --encoders of the checkpoint that config belongs to ("" for none), or None for a new network.
    """
    encoders = PixelsAndBytes(config.text_length)
    encoders.no_text = encoders.encode_text([""]).to(device)
    if flag:
        path, _, call = flag.partition(":")
        function, _, arguments = call.partition(":")
        try:
            make = getattr(run_file(path), function or "load")
            encoders = make(device, *arguments.split(",")) if arguments else make(device)
            check_encoders(encoders, device, config)
            encoders.no_text = encoders.encode_text([""]).to(device)
        except Exception as error:
            fail(f"--encoders {flag}: {type(error).__name__}: {error}; extras/encoders.py is a file that works")
    image = config.modalities[0]
    found = (encoders.image_channels, encoders.image_stride, encoders.text_dim)  # any text_length will do
    fits = trained_with is None or found == (image.channels, image.stride, config.text_dim)
    if not fits or (trained_with and not flag):
        fail(f"--encoders {flag or '(none)'}: the checkpoint was trained with --encoders {trained_with or '(none)'}")
    return encoders


# ---- Flags ----
# The command lines of all scripts: types, which check a value, and the settings that several scripts share.


def number(low, high, above=False, kind=float, other=""):
    """Type of a flag: a number from low to high; above excludes low itself. other ends the error message."""
    what = "a whole number" if kind is int else "a number"
    span = f"above {low}, up to {high}" if above else f"from {low} to {high}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text}: must be {what} {span}{other}")
        return value

    return read


whole = functools.partial(number, kind=int)
SEED = whole(0, 2**31 - 1)
COUNT = whole(1, 10**9)  # of steps, samples or seconds
SIDE = whole(0, 9999)  # pixels; 0 stands for the value of another flag or of the network
SHARE = number(0, 1)
POSITIVE = number(0, 10**6, above=True)
NANO = os.path.relpath(Path(__file__).parent / "assets/nano.pt")  # README has the commands that trained it


def by_modality(read_number, unnamed=""):
    """Type of a flag: "rgb=0.25,depth=0.5" -> {"rgb": 0.25, "depth": 0.5}. A number alone is for unnamed."""

    def read(text):
        numbers = {}
        entries = text.split(",")
        for entry in entries:
            name, _, value = entry.rpartition("=")
            numbers[name or unnamed] = read_number(value)
        if len(numbers) < len(entries) or not numbers.keys() <= MODALITIES.keys():
            raise argparse.ArgumentTypeError(f"{text}: must be such as rgb=0.5,depth=0.8; of {', '.join(MODALITIES)}")
        return numbers

    return read


def parse_size(text):
    """--size: pixels, one side ("64") or "HxW" -> (H, W). Else exit code 2."""
    match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if not match:
        fail(f"--size {text}: must be pixels, 1 to 9999 a side, such as 64 or 48x64")
    return int(match[1]), int(match[2] or match[1])


def parse_order(text, names):
    """--order: joint or log2(alpha) -> float, or names with commas between -> list. Else exit code 2."""
    order = text.split(",")
    if set(order) <= set(names) and len(set(order)) == len(order):
        return order
    try:
        return JOINT if text == "joint" else number(-14, 14)(text)
    except argparse.ArgumentTypeError:
        fail(f"--order {text}: must be joint, log2(alpha) from -14 to 14, or different ones of {', '.join(names)}")


class Flags(argparse.ArgumentParser):
    """The flags of a script. A mistake on the command line is one line on stderr and exit code 2."""

    def __init__(self, description):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False)

    def setting(self, flag, default, help, type=str, **options):
        """Declare a flag, whose help ends with its default. type reads its text. False or None makes it a switch."""

        def read(text):
            try:
                return type(text)
            except argparse.ArgumentTypeError as error:
                fail(f"{flag} {error}")

        if default is None or default is False:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = read
        if "(default: " not in help:
            help += " (default: none)" if default in ("", []) else " (default: %(default)s)"
        self.add_argument(flag, default=default, help=help, **options)

    def error(self, message):
        """Print argparse's message without its usage."""
        fail(f"{message.removeprefix('argument ')}; --help lists the flags")


def source_settings(p, maps=True):
    """The flags of scripts that read samples. maps: the samples have more than images and captions."""
    p.setting("--data", "synthetic", "synthetic, a folder (metadata.jsonl or .index.txt), or 'shards/{000..999}.tar'")
    if maps:
        p.setting("--depth-scale", 0.001, "metres per unit of a 16-bit PNG (KITTI: 0.00390625)", POSITIVE)
        unit = "in metres, or in the unit of .npy files"
        p.setting("--depth-min", 0.0, f"depth up to this is missing, {unit}", number(0, 10**6))
        p.setting("--depth-max", 0.0, f"depth beyond this is missing, {unit}; 0 is no limit", number(0, 10**6))
    p.setting("--workers", 2, "processes that read files, for each rank (evaluation: at most one)", whole(0, 256))
    encoders_setting(p)


def encoders_setting(p):
    p.setting("--encoders", "", "FILE.py[:FUNCTION[:ARGUMENT,...]] of frozen encoders; the file is run")


def backbone_setting(p):
    p.setting("--backbone", "", "extras/flux2.py, to use FLUX.2 in place of our network; the file is run")


def sampling_settings(p):
    """The flags of scripts that sample."""
    backbone_setting(p)
    p.setting("--checkpoint", NANO, "of a training script (the default knows the built-in world), or published weights")
    guidance = by_modality(number(0, 100), unnamed="rgb")
    scales = f"guidance scale of the image (3) or by name (rgb=3,depth=2); 1 is none (default: {GUIDANCE:g})"
    p.setting("--cfg", {"rgb": GUIDANCE}, scales, guidance)
    p.setting("--ensemble", 1, "samples of each map, of which the median is taken", whole(1, 1000))
    p.setting("--batch-size", 16, "samples in each call of the network", whole(1, 10**5))
    p.setting("--device", "auto", "auto, cuda, mps or cpu")


def training_settings(p, recipe, out):
    """The flags that both training scripts share. recipe {name: value}, nano's, and out are defaults."""
    by_preset = "(default: by preset; nano has %(default)s)"
    p.setting("--size", 0, "side of the images in pixels; 0 is the network's own", SIDE)
    p.setting("--steps", recipe["steps"], f"optimizer steps {by_preset}", COUNT)
    samples = f"samples in a step, over all ranks and accumulation steps {by_preset}"
    p.setting("--batch-size", recipe["batch_size"], samples, whole(1, 1 << 20))
    p.setting("--grad-accum", 1, "micro-batches into which each rank splits its samples, to save memory", COUNT)
    p.setting("--lr", recipe["lr"], f"peak learning rate {by_preset}", number(0, 1, above=True))
    p.setting("--optimizer", "muon", "muon (blocks' matrices; AdamW for the rest) or adamw", choices=["muon", "adamw"])
    average = f"decay of AdamW's average of squared gradients; small batches need a high one {by_preset}"
    p.setting("--beta2", recipe["beta2"], average, number(0, 0.999999))
    p.setting("--weight-decay", 0.1, "of the blocks' matrices, by Muon; AdamW decays nothing", SHARE)
    p.setting("--warmup", recipe["warmup"], f"steps of linear warm-up {by_preset}", COUNT)
    p.setting("--cooldown", 0.5, "share of the steps, at the end, in which the rate falls linearly to zero", SHARE)
    p.setting("--clip", 1.0, "norm to which the gradient is clipped", POSITIVE)
    average = f"decay of the averaged weights, which sampling uses; 0 keeps no average {by_preset}"
    p.setting("--ema", recipe["ema"], average, SHARE)
    p.setting("--drop-caption", 0.1, "share of captions that is dropped, for classifier-free guidance", SHARE)
    p.setting("--seed", 0, "seed of weights, scenes and noise", SEED)
    p.setting("--device", "auto", "auto, cuda, mps or cpu")
    p.setting("--compile", None, "torch.compile the blocks (default: on CUDA only)")
    p.setting("--checkpoint-activations", False, "compute blocks again in the backward pass: less memory, slower")
    p.setting("--shard", False, "split weights, gradients, EMA and optimizer state over the ranks (FSDP2)")
    p.setting("--out", out, "run directory")
    p.setting("--resume", False, "continue from the newest checkpoint of the run directory, if there is one")
    p.setting("--checkpoint-every", 250, "steps between checkpoints", COUNT)
    p.setting("--keep", 2, "number of checkpoints to keep, the newest ones", COUNT)
    p.setting("--log-every", 10, "steps between rows of metrics.jsonl", COUNT)
    p.setting("--sample-every", 500, "steps between sample pictures", COUNT)
    p.setting("--max-skipped", 20, "skipped steps in a row (loss or gradient not finite) that end the run", COUNT)
    p.setting("--timeout", 1800, "seconds until a silent rank ends the run; allow for counting shards", whole(1, 10**6))
    p.setting("--dry-run", False, "print the recipe, the number of parameters and the FLOPs, and stop")


def find_recipe(args):
    """The name of a recipe: --preset if given, else backbone with --backbone, else that of --init, else nano."""
    if args.preset:
        return args.preset
    if args.backbone:
        return "backbone"
    try:
        settings = read_checkpoint(args.init, ["settings"])["settings"]
    except (OSError, ValueError):  # --init none, or a file that is refused later
        return "nano"
    return settings.get("recipe") or settings.get("preset") or "nano"


def parse_run(p, recipes):
    """Parse the flags of a training script. recipes has the defaults of some flags, {recipe: {name of a flag: value}}.

    A preset that recipes lacks has nano's. With --resume, the settings in the run's config.json are the defaults.
    """
    args = p.parse_args()  # again below: with the defaults of the recipe, then of the run
    recipe = find_recipe(args)
    if recipe not in recipes:
        recipe = "nano"
    p.set_defaults(recipe=recipe, **recipes[recipe])
    args = p.parse_args()
    path = Path(args.out) / "config.json"
    if not args.resume or not path.is_file():
        return args

    settings = json.loads(path.read_bytes())
    if "recipe" not in settings:
        fail("--resume: the run is of an earlier version, whose defaults were others; go on with that version")
    # --out may have moved, and --encoders and --backbone are code, which you must name to run it.
    for name in vars(args).keys() & settings.keys() - {"out", "encoders", "backbone"}:
        p.set_defaults(**{name: settings[name]})
    args = p.parse_args()
    for name in ("preset", "modalities", "optimizer", "beta2", "weight_decay"):
        if getattr(args, name, None) != settings.get(name):
            flag = name.replace("_", "-")
            fail(f"--resume: --{flag} must be that of the run, {settings.get(name)}; is it a run of this script?")
    if settings["encoders"] and not args.encoders:
        fail(f"--resume: this run has --encoders {settings['encoders']}, a file that is run; give the flag again")
    return args


# ---- Runs ----
# Messages, devices, files that survive accidents, checkpoints, and what both training scripts do around their losses.


def log(message):
    """Print one line on stderr, above a progress bar."""
    tqdm.write(" ".join(message.split()), file=sys.stderr)


def fail(message):
    """Print one line on stderr and exit with code 2."""
    log(message)
    raise SystemExit(2)


def pick_device(name):
    """--device -> torch.device. auto is the GPU if there is one; cuda without a number is the GPU of this rank."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        fail(f"--device {name}: not available here; use --device auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def run_script(main):
    """Call main. A full disk or memory is one line and exit code 2, Ctrl-C exit code 130; a bug keeps its traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        fail(f"{error}; check the path, its permissions and the space on its disk")
    except (MemoryError, torch.OutOfMemoryError):
        fail("out of memory; lower --batch-size or --size")


def claim_folder(path, *own):
    """Make a directory to write to: new, empty, or with one of the files called own, which only this script writes."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not any((folder / name).exists() for name in own):
        fail(f"--out {path}: holds other files; choose a new or an empty directory")
    return folder


@contextlib.contextmanager
def report_unwritten(what):
    """Let training continue if the disk or memory is full in this block: print that a file was not written."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:  # the disk's error is the context of torch's
        log(f"{what}: not written ({error.__context__ or error}); training continues")


@contextlib.contextmanager
def atomic_write(path):
    """Give a temporary path to write to, and rename it to path at the end: a crash leaves the old or the new file."""
    part = Path(path).with_name("partly-written")
    part.unlink(missing_ok=True)  # it may be a link to a checkpoint, which must not be written
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_bytes(write, *args, **options):
    """What write(file, *args, **options) writes. (Pillow and numpy would hide the error of a full disk.)"""
    buffer = io.BytesIO()
    write(buffer, *args, **options)
    return buffer.getvalue()


def write_bytes(path, content):
    with atomic_write(path) as part:
        part.write_bytes(content)


def write_image(path, image, **options):
    """Write a Pillow image in the format that the suffix of path names."""
    write_bytes(path, to_bytes(image.save, Path(path).suffix[1:], **options))


def write_json(path, value):
    write_bytes(path, json.dumps(value, indent=1).encode() + b"\n")


def list_checkpoints(out):
    """Paths of the checkpoints step-N.pt in a run directory, oldest first."""
    paths = [path for path in Path(out).glob("step-*.pt") if path.stem[5:].isdigit()]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def save_checkpoint(out, state, keep):
    """Write step-N.pt, point last.pt to it, and remove all but the newest checkpoints."""
    path = out / f"step-{state['step']:07}.pt"
    with atomic_write(path) as part, open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # it must be on the disk before older ones are removed
    with atomic_write(out / "last.pt") as link:
        link.symlink_to(path.name)
    paths = list_checkpoints(out)
    paths = paths[: paths.index(path) + 1]  # --resume may have passed over a damaged one of a later step
    for old in paths[:-keep]:
        old.unlink()


def read_checkpoint(path, keys=("config", "settings", "ema")):
    """The dictionary that a training script saved. Raises ValueError if it is damaged or lacks one of the keys."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError):
        raise ValueError("cut, damaged, or not a checkpoint; give a last.pt of a training script") from None
    for key in keys:
        if key not in state:
            raise ValueError(f"it lacks {key!r}; give a last.pt of a training script")
    return state


def open_network(path, flag="--checkpoint", backbone=""):
    """Checkpoint -> (its averaged network, frozen, on the CPU; its dictionary). Else one line and exit code 2.

    backbone: a file with a class Network, which replaces DiT, and read_checkpoint(path), which reads published weights.
    """
    if not os.path.exists(path):
        fail(f"{flag} {path}: no such file; train one first (train_t2i.py, then train_forcing.py) or name another")
    published = os.path.isdir(path) or Path(path).suffix == ".safetensors"
    if published and not backbone:
        fail(f"{flag} {path}: not a checkpoint of a training script; published weights need --backbone")
    if path == NANO:
        log(f"{flag} {path}: the network that comes with the repository, trained on the built-in world")
    network_type = DiT
    read = read_checkpoint
    if backbone:
        try:
            module = run_file(backbone)
            network_type = module.Network
            read = module.read_checkpoint if published else read_checkpoint
        except Exception as error:
            fail(f"--backbone {backbone}: {type(error).__name__}: {error}; name extras/flux2.py, or a file like it")
    try:
        state = read(path)
        trained_with = state["settings"].get("backbone", "")
        if bool(trained_with) != bool(backbone):
            raise ValueError(f"was trained with --backbone {trained_with}" if trained_with else "leave out --backbone")
        return network_type.from_checkpoint(state), state
    except ValueError as error:
        fail(f"{flag} {path}: {error}")


def newest_checkpoint(out):
    """The newest checkpoint of a run that can be read; {} if there is none. Exit code 2 if all are damaged."""
    paths = list_checkpoints(out)
    for path in reversed(paths):
        try:
            return read_checkpoint(path, ("config", "settings", "step", "skipped", "model", "ema", "optimizer"))
        except ValueError as error:
            log(f"--resume: {path.name} is passed over ({error})")
    if paths:
        fail(f"--resume: no checkpoint in {out} can be read; start a new run with another --out")
    return {}


def lock_run(out, resume):
    """Make the run directory and lock it until this process ends. A directory that holds a run needs --resume."""
    if list_checkpoints(out) and not resume:
        fail(f"--out {out}: already holds a run; add --resume to continue it, or choose another --out")
    lock = claim_folder(out, "run.lock") / "run.lock"
    try:
        fcntl.lockf(os.open(lock, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {out}: another process is training in it; wait for its end, or choose another --out")
    except OSError as error:  # some network disks have no locks
        log(f"--out {out}: cannot be locked ({error}); start no second run in it")


def training_flops(config, size, teacher_config=None):
    """FLOPs of training per image of size (H, W); the teacher's forward pass is a third of its training."""
    flops = training_cost(config, size)[1]
    if teacher_config:
        flops += training_cost(teacher_config, size)[1] / 3
    return flops


def print_cost(args, recipe, config, teacher_config=None):
    """Print what --dry-run promises: the settings of the recipe, and the cost of training with the teacher."""
    settings = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in recipe]
    print(f"recipe of {args.recipe}: {' '.join(settings)}")
    size = (args.size, args.size)
    parameters = training_cost(config, size)[0] / 1e6
    flops = training_flops(config, size, teacher_config) / 1e9
    modalities = ", ".join(m.name for m in config.modalities)
    teacher = "with the teacher" if teacher_config else "without a teacher"
    cost = f"{parameters:.1f}M parameters, {flops:.2f} GFLOP per training image {teacher}"
    print(f"{modalities} at {size[0]}x{size[1]}: {cost}")


def matmul_peak(device, dtype=torch.float32, repeats=10):
    """FLOP/s of the fastest of some large square matmuls on the device: training speed is compared with it."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


@dataclass
class MicroBatch:
    """Inputs, targets and masks of one forward pass; with --grad-accum a step has several. Keys are modality names."""

    x0: dict  # (B, C, H, W)
    noisy: dict  # (B, C, H, W)
    t: dict  # (B,)
    mask: dict  # (B, C, H, W) bool, the values that the loss is taken on
    text: torch.Tensor  # (B, L) or (B, L, text_dim)


def validation_batch(args, modalities, device, count=8):
    """A Batch of the first validation samples, to draw pictures of."""
    source = open_source(args, "val", (args.size, args.size), modalities, device)
    return next(in_order(source, count, count, device, strict=False))


class Run:
    """A training run: ranks (DDP, or FSDP2 with --shard), clipping, learning rate, EMA, checkpoints and metrics.

    main and train of a script call its methods in order. self.model is the network that is trained and saved.
    self.network, which predicts in training, is the model or DDP around it.
    """

    def __init__(self, args, device):
        self.args = args
        self.device = device
        self.cuda = device.type == "cuda"
        self.out = Path(args.out)
        self.rank = int(os.environ.get("RANK", 0))  # torchrun sets both
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self.sharded = args.shard and self.ranks > 1
        num_micro_batches = self.ranks * args.grad_accum
        if args.batch_size % num_micro_batches:
            fail(f"--batch-size {args.batch_size}: must be a multiple of ranks x --grad-accum, {num_micro_batches}")

        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.saved = True
        self.stopping = False
        self.caught_signals = []
        self.metrics = []  # the names that record was called with
        self.step_sums = {}  # {name: (2,), total and count} of this rank, in this step
        self.row_sums = {}  # the same, since the last row of metrics.jsonl
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.cuda else "gloo", timeout=datetime.timedelta(seconds=args.timeout))
        if self.rank == 0:
            lock_run(self.out, args.resume)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch_signal)

    def start(self, network, draw_samples, teacher=None, lr_new=0.0):
        """Prepare a network for training, and its frozen teacher. draw_samples(network) returns a picture.

        lr_new: learning rate of the parameters in network.fresh_names; 0 is --lr.
        """
        args = self.args
        self.draw_samples = draw_samples
        # With --shard, the weights of a block are gathered when it runs, and freed after it.
        shard = functools.partial(fully_shard, reshard_after_forward=True) if self.sharded else None
        self.model = network
        self.ema = network
        self.teacher = teacher
        networks = [network]  # those that training runs
        if args.ema > 0:
            with torch.device("meta"):
                self.ema = network.config.build().requires_grad_(False)
            self.ema.load_state_dict(network.state_dict(), assign=True)
            self.ema.place(self.device, shard=shard)
        network.place(self.device, shard=shard)
        if teacher is not None:
            networks.append(teacher)
            teacher.place(self.device, frozen=True, shard=shard)
        self.optimizers = self.model.configure_optimizers(args.lr, args.optimizer, args.beta2, args.weight_decay)
        self.fresh_factor = (lr_new or args.lr) / args.lr  # of the learning rate of fresh parameters
        if args.resume:
            self.resume()
        if self.rank == 0:
            self.prepare_folder()
        self.network = self.wrap(networks)

        self.flops = training_flops(network.config, (args.size, args.size), teacher and teacher.config)
        self.peak = self.ranks * matmul_peak(self.device, torch.bfloat16 if self.cuda else torch.float32)
        if self.rank == 0:
            parameters = sum(p.numel() for p in network.parameters()) / 1e6
            print(f"{parameters:.2f}M parameters, {self.ranks} x {self.device}, from step {self.step}", flush=True)
        self.bar = tqdm(total=args.steps, initial=self.step, disable=self.rank > 0, mininterval=2, dynamic_ncols=True)
        self.clock = time.perf_counter()
        self.clock_step = self.step

    def goes_on(self):
        """Whether there is a step left, and no signal has stopped the run."""
        return self.step < self.args.steps and not self.stopping

    def sum_over_ranks(self, values):
        """{name: tensor} of this rank -> the sums over all ranks. The tensors have one shape and type."""
        table = torch.stack(list(values.values()))
        if self.ranks > 1:
            dist.all_reduce(table)
        return dict(zip(values, table, strict=True))

    def count_scored(self, micro_batches):
        """{modality: number of values that carry loss, in all micro-batches and on all ranks; at least 1}."""
        counts = {}
        for name in micro_batches[0].mask:
            counts[name] = sum(micro_batch.mask[name].sum() for micro_batch in micro_batches)
        return {name: count.clamp(min=1) for name, count in self.sum_over_ranks(counts).items()}

    def accumulate(self, micro_batches):
        """Iterate over micro-batches. DDP synchronises gradients in the last backward pass alone, FSDP in each."""
        for micro_batch in micro_batches:
            is_last = micro_batch is micro_batches[-1]
            self.network.require_backward_grad_sync = is_last  # as DDP.no_sync does; other modules ignore it
            yield micro_batch

    def record(self, metric, modality, sums, micro_batch):
        """Add to the mean of a metric, over all samples and by training mode. sums (B,): over the modality's mask."""
        if metric not in self.metrics:
            self.metrics.append(metric)
        counts = micro_batch.mask[modality].sum((1, 2, 3))  # (B,)
        by_mode = split_by_mode(modality, torch.stack([sums.detach(), counts]), micro_batch.t)
        for mode, pair in by_mode.items():
            self.step_sums[metric + mode] = self.step_sums.get(metric + mode, 0) + pair

    def backward(self, loss):
        """Add the gradient of loss: a sum over the samples of this rank, divided by counts over all ranks."""
        loss = loss * self.ranks  # DDP and FSDP average gradients over the ranks, and the sum is wanted
        # A loss that is not finite may have a finite gradient. NaN in every gradient makes all ranks skip the step.
        loss.backward(torch.where(loss.isfinite(), 1.0, torch.nan))

    def end_step(self):
        """Update the weights, or skip the step; then log, save and draw when it is time."""
        args = self.args
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        if self.sharded:
            norm = norm.full_tensor()
        signals = torch.full_like(norm, len(self.caught_signals))
        if self.ranks > 1:
            dist.all_reduce(signals)  # if one rank is told to stop, all stop after the same step
        norm, signals = torch.stack([norm, signals]).tolist()  # waits for the device once
        self.stopping = signals > 0
        self.step += 1
        if math.isfinite(norm):
            self.update_weights()
        else:
            self.skip_step()
        for optimizer in self.optimizers:
            # With --grad-accum gradients stay, as views of DDP's buckets: new ones would take their memory again.
            optimizer.zero_grad(set_to_none=self.ranks == 1 or args.grad_accum == 1)
        self.step_sums = {}
        self.bar.update()

        saving = self.stopping or self.step == args.steps or self.step % args.checkpoint_every == 0
        logging = saving or self.step % args.log_every == 0  # no row spans a checkpoint
        drawing = self.step == args.steps or self.step % args.sample_every == 0
        if logging and self.row_sums:
            self.write_row(norm)
        if saving:
            self.save()
        if drawing:
            self.draw()
        if logging or drawing:  # the time that this took is no part of the training speed
            self.clock = time.perf_counter()
            self.clock_step = self.step

    def close(self):
        """End the run: exit code 2 if there is no checkpoint of the last step, 130 after Ctrl-C."""
        self.bar.close()
        if self.ranks > 1:
            dist.barrier()
            # A thread of gloo needs Python to free what the barrier used. If Python ends first, the thread aborts all.
            time.sleep(0 if self.cuda else 0.5)
            dist.destroy_process_group()
        if not self.saved and self.rank == 0:
            fail(f"--out {self.out}: no checkpoint of the last step, see above; --resume continues from an older one")
        if self.stopping and self.rank == 0:
            log(f"stopped by a signal after step {self.step} of {self.args.steps}, saved; --resume continues")
        if signal.SIGINT in self.caught_signals:
            raise SystemExit(130)

    def catch_signal(self, number, frame):
        """Note a signal, so that the run stops after this step. A second one ends the process at once."""
        self.caught_signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def wrap(self, networks):
        """Compile the networks if wanted. Returns the model, or DDP around it."""
        args = self.args
        if args.compile or (args.compile is None and self.cuda):
            for network in networks:
                network.compile_blocks()
        if args.checkpoint_activations:
            self.model.checkpoint_activations()
        if self.ranks > 1 and not self.sharded:
            return DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        return self.model

    def prepare_folder(self):
        """Write config.json, make samples/, and remove rows of metrics.jsonl of later steps: these come again."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):  # a full disk may have cut a row
                if json.loads(line)["step"] <= self.step:
                    rows.append(f"{line}\n")
        write_bytes(path, "".join(rows).encode())
        (self.out / "samples").mkdir(exist_ok=True)
        write_json(self.out / "config.json", vars(self.args))

    def resume(self):
        """Load the newest checkpoint. Rank 0 reads it and sends it to the other ranks."""
        state = newest_checkpoint(self.out) if self.rank == 0 else {}
        progress = [state.get("step", 0), state.get("skipped", 0)]
        if self.ranks > 1:
            dist.broadcast_object_list(progress, device=self.device)
        self.step, self.skipped = progress
        if self.step == 0:
            return

        options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.ranks > 1)
        dcp.set_model_state_dict(self.model, state.get("model", {}), options=options)
        if self.ema is not self.model:
            dcp.set_model_state_dict(self.ema, state.get("ema", {}), options=options)
        dcp.set_optimizer_state_dict(self.model, self.optimizers, state.get("optimizer", {}), options=options)

    def learning_rate(self):
        """The rate of this step: linear warm-up, then constant, then a linear decline towards zero."""
        args = self.args
        steps_left = args.steps - self.step + 1
        cooldown = max(1, args.cooldown * args.steps)
        return args.lr * min(self.step / args.warmup, 1.0, steps_left / cooldown)

    def update_weights(self):
        """Take a step of the optimizers, move the averaged weights, and count the step in the next row of metrics."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
                if group.get("fresh"):
                    group["lr"] *= self.fresh_factor
            optimizer.step()
        if self.ema is not self.model:
            decay = min(self.args.ema, self.step / (9 + self.step))  # a young average forgets faster
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
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
        """Add a row to metrics.jsonl: mean losses and speed since the last row; norm and rate of this step."""
        sums = {name: pair.tolist() for name, pair in self.sum_over_ranks(self.row_sums).items()}
        means = {name: total / count for name, (total, count) in sums.items() if count}
        losses = {name: means[name] for name in self.metrics if name.startswith("loss_") and name in means}
        speed = (self.step - self.clock_step) * self.args.batch_size / (time.perf_counter() - self.clock)
        row = {"step": self.step, "loss": sum(losses.values()), **means, "grad_norm": norm, "lr": self.learning_rate()}
        row.update(skipped=self.skipped, images_per_s=speed)
        row.update(tflops=speed * self.flops / 1e12, utilization=speed * self.flops / self.peak)
        self.row_sums = {}
        if self.rank == 0:
            path = self.out / "metrics.jsonl"
            with report_unwritten(path), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            shown = ", ".join(f"{name.removeprefix('loss_')} {loss:.3f}" for name, loss in losses.items())
            self.bar.set_postfix_str(f"{shown}, {speed:.0f} images/s, {row['utilization']:.2f} of matmul peak")

    def save(self):
        """Write a checkpoint if all weights are finite."""
        self.saved = False
        norm = torch.nn.utils.get_total_norm([*self.model.parameters(), *self.ema.parameters()])
        if self.sharded:
            norm = norm.full_tensor()
        if not norm.isfinite():
            if self.rank == 0:
                log(f"step {self.step}: no checkpoint, since weights are not finite")
            return

        options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, on rank 0
        weights = dcp.get_model_state_dict(self.model, options=options)
        ema = dict(weights)  # a dictionary of its own, because loading changes it
        if self.ema is not self.model:
            ema = dcp.get_model_state_dict(self.ema, options=options)
        state = {
            "config": asdict(self.model.config),
            "settings": vars(self.args),
            "step": self.step,
            "skipped": self.skipped,
            "model": weights,
            "ema": ema,
            "optimizer": dcp.get_optimizer_state_dict(self.model, self.optimizers, options=options),
        }
        if self.rank == 0:
            with report_unwritten(f"checkpoint of step {self.step}"):
                save_checkpoint(self.out, state, self.args.keep)
                self.saved = True

    def draw(self):
        """Write a picture of samples. All ranks take part if the network is split over them."""
        if self.rank == 0 or self.sharded:
            path = self.out / "samples" / f"{self.step:07}.png"
            with contextlib.nullcontext() if self.sharded else report_unwritten(path):  # one rank must not leave others
                picture = self.draw_samples(self.ema)
                if self.rank == 0:
                    write_image(path, picture)


# ---- Pictures ----
# Values painted as pictures, by their encoding, and pictures laid out as a grid.

# Colours of depth, from far to near: equal distances in CIELAB, and lightness that rises throughout.
FAR_TO_NEAR = "#080628 #280d51 #671c75 #9f2d6f #c6425d #e26147 #f29247 #f9c16d #fcf0b4"
DEPTH_COLORS = np.array([ImageColor.getrgb(color) for color in FAR_TO_NEAR.split()])  # (9, 3)


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
    level = np.clip((inverse - far) / max(near - far, 1e-9 * abs(near)), 0, 1) * (len(DEPTH_COLORS) - 1)  # (H, W)
    channels = [np.interp(level, range(len(DEPTH_COLORS)), channel) for channel in DEPTH_COLORS.T]
    return np.where(valid[..., None], np.stack(channels, -1), 0).astype(np.uint8)


PAINTERS = {"plain": paint_rgb, "relative depth": paint_depth, "unit vectors": paint_normal}


def paint(modality, values, valid=None):
    """Values (C, H, W) of a modality, valid (1, H, W) bool or None -> picture (H, W, 3) uint8."""
    return PAINTERS[modality.encoding](values, valid)


def resize_picture(picture, side):
    """(H, W, 3) uint8 -> Image: a small picture is enlarged by a whole factor to about side, a large one shrunk."""
    image = Image.fromarray(picture)
    if max(image.size) > 2 * side:
        image.thumbnail((2 * side, 2 * side), Image.LANCZOS)
        return image
    factor = max(1, round(side / max(image.size)))
    return image.resize([n * factor for n in image.size], Image.NEAREST)


def draw_caption(text, width):
    """An Image of a text, broken into lines that fit into width pixels."""
    lines = textwrap.wrap(text, max(8, width // 6))
    image = Image.new("RGB", (width, 12 * (len(lines) + 1)), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), "\n".join(lines), fill="black", font_size=11, spacing=1)
    return image


def draw_grid(rows, labels=(), cell=128):
    """Rows of pictures (H, W, 3) uint8, each with a label on its left, as an Image. A string in a row is a caption."""
    rows = [[x if isinstance(x, str) else resize_picture(x, cell) for x in row] for row in rows]
    width = 4 + max(x.width for row in rows for x in row if not isinstance(x, str))
    rows = [[draw_caption(x, width) if isinstance(x, str) else x for x in row] for row in rows]

    margin = 110 if labels else 0
    heights = [4 + max(image.height for image in row) for row in rows]
    canvas = Image.new("RGB", (margin + width * max(map(len, rows)), sum(heights)), "white")
    for i, row in enumerate(rows):
        top = sum(heights[:i])
        for column, image in enumerate(row):
            canvas.paste(image, (margin + column * width, top))
        if labels:
            ImageDraw.Draw(canvas).multiline_text((4, top + 6), labels[i], fill="black", font_size=15)
    return canvas


# ---- A look at the built-in world: python data.py ----
# Samples as pictures, and as a folder that --data reads.


def array_bytes(values, valid):
    """A map (C, H, W), valid (1, H, W) -> bytes of a .npy file for read_map: (H, W) or (H, W, C), 0 where missing."""
    array = torch.where(valid, values, 0.0).movedim(0, -1).squeeze(-1)
    return to_bytes(np.save, array.cpu().numpy())


def write_folder(out, batch):
    """Write a Batch as a folder: image, depth and normals of each sample, and metadata.jsonl, which lists them."""
    rows = []
    for i, name in enumerate(batch.names):
        row = {"file_name": f"{name}.jpg", "text": batch.captions[i]}
        image = Image.fromarray(paint_rgb(batch.values["rgb"][i]))
        write_bytes(out / row["file_name"], to_bytes(image.save, "JPEG", quality=100, subsampling=0))
        for m in ("depth", "normal"):
            row[f"{m}_file_name"] = f"{name}.{m}.npy"
            content = array_bytes(batch.values[m][i], batch.valid[m][i])
            write_bytes(out / row[f"{m}_file_name"], content)
        rows.append(json.dumps(row) + "\n")
    write_bytes(out / "metadata.jsonl", "".join(rows).encode())


def world_grid(batch, count=8):
    """The first samples of a Batch as an Image: image, depth and normals, and depth as a sensor would have seen it."""
    rgb = batch.values["rgb"][:count]
    depth = batch.values["depth"]
    valid = batch.valid["depth"][:count]
    sensor = sensor_mask(rgb, "mixed", PerSampleRNG(0, range(len(rgb))).rand)
    rows = {
        "image": map(paint_rgb, rgb),
        "depth": map(paint_depth, depth, valid),
        "depth as\ntrained on": map(paint_depth, depth, valid & sensor),
        "normal": map(paint_normal, batch.values["normal"], batch.valid["normal"][:count]),
    }
    return draw_grid(list(rows.values()), list(rows))


def main():
    p = Flags(__doc__)
    p.setting("--out", "runs/world", "new or empty directory to write to")
    p.setting("--split", "val", "train or val", choices=SPLITS)
    p.setting("--size", 32, "side in pixels", whole(1, 2048))
    p.setting("--count", 8, "number of samples", whole(1, 10**5))
    p.setting("--measured", 1.0, "share of the pixels that depth and normals keep", number(0, 1, above=True))
    args = p.parse_args()
    out = claim_folder(args.out)

    size = (args.size, args.size)
    batch = SyntheticWorld(args.split, size).samples(range(args.count))
    kept = PerSampleRNG("measured", range(args.count)).rand(1, *size) < args.measured
    batch.valid = {m: kept & batch.valid[m] for m in ("depth", "normal")}

    write_folder(out, batch)
    write_image(out / "grid.png", world_grid(batch))
    print(f"{args.count} samples in {out}, for --data; see {out}/grid.png")


if __name__ == "__main__":
    run_script(main)
