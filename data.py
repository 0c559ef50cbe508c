"""Where samples come from, how they are kept on disk, and how they are drawn as pictures. --data chooses one source:

    synthetic                   the built-in world: rooms and open ground, ray cast; exact depth and normals, captions
    DIR with metadata.jsonl     rows with file_name and text, and depth_file_name, normal_file_name, mask_file_name or
                                depth_scale where they exist
    DIR with .index.txt         MoGe's evaluation folders: DIR/<line>/image.jpg and depth.png
    'shards/{000..999}.tar'     WebDataset: key.jpg|png|webp, key.txt or .json, key.depth.png|npy|pfm, key.normal.npy

Depth may be sparse: 16-bit PNG (times depth_scale; 0 is missing), MoGe's log-coded PNG, .npy or .pfm. Depth is missing
where it is not above 0, not finite, masked out, or outside of --depth-min..--depth-max.

    python data.py --out runs/world --count 8       look at the world: pictures, depth, normals, captions
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
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model import TEXT_PATCH, Config, DiT, check_numbers, check_weights

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
OBJECTS = 3  # at most, in a scene
ROOM = OBJECTS  # index of the room, which is the last solid: you see its floor, walls and ceiling from inside
COLUMNS = 64  # random numbers of a scene

PARAMETERS = {  # name: (its columns of the scene's random numbers, low, high). A list has one column per object.
    "outside": (0, 0, 1),
    "fov": (1, 46, 66),  # vertical, in degrees
    "height": (2, 0.8, 2.2),  # of the camera
    "count": (3, 0, OBJECTS),
    "shape": ([4, 5, 6], 0, len(SHAPES)),
    "floor": (7, 0, len(FLOORS)),
    "striped": (8, 0, 2),  # walls
    "relation": (9, 0, 1),  # which words the caption uses for two objects
    "pitch": (10, -0.09, 0.09),
    "color": ([11, 12, 13], 0, 1),
    "radius": ([14, 15, 16], 0.38, 0.62),
    "pillar_height": ([17, 18, 19], 0.75, 1.15),
    "distance": ([20, 21, 22], 2.1, 4.0),
    "offset": ([23, 24, 25], -0.22, 0.22),
    "left": (26, 2.8, 4.2),
    "left_outside": (27, 8, 12),
    "right": (28, 2.8, 4.2),
    "right_outside": (29, 8, 12),
    "back": (30, 1.5, 3),
    "back_outside": (31, 5, 7),
    "front": (32, 5.4, 8),
    "front_outside": (33, 9, 15),
    "ceiling": (34, 2.6, 3.6),
    "object_angle": ([35, 36, 37], 0, 1.57),
    "room_angle": (38, -0.4, 0.4),
    "fence": (39, 0.5, 1.6),  # its height; above it is the sky
    "tile": (40, 0.7, 1.3),
    "light_x": (41, -2.2, 2.2),
    "light_z": (42, 0, 2.5),
    "floor_color": (43, 0, len(MUTED)),
    "wall_color": (44, 0, len(MUTED)),
    "wall_brightness": (45, 0.8, 1.1),
}


def to_int64(bits):
    """A number from 0 to 2^64 - 1 -> the int64 of the same bits. torch multiplies and adds int64 modulo 2^64."""
    return bits - (1 << 64) if bits >> 63 else bits


GOLDEN = to_int64(0x9E3779B97F4A7C15)  # SplitMix64's step from one state to the next


def shift_right(z, count):
    """z >> count of an int64 tensor, with zeros coming in from the left."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def split_mix(z):
    """SplitMix64's hash of its states: int64 of any shape -> random bits, int64 of that shape, equal on any device."""
    z = (z ^ shift_right(z, 30)) * to_int64(0xBF58476D1CE4E5B9)
    z = (z ^ shift_right(z, 27)) * to_int64(0x94D049BB133111EB)
    return z ^ shift_right(z, 31)


def draw_parameters(split, indices):
    """{name in PARAMETERS: (B,) or (B, OBJECTS) float32} for B indices. A scene does not depend on its batch."""
    counter = torch.tensor(indices, dtype=torch.int64)[:, None] * (2 * COLUMNS) + torch.arange(COLUMNS)
    seed = to_int64(SPLITS[split] * 0xD1B54A32D192ED03 % (1 << 64))
    bits = split_mix((counter + seed) * GOLDEN)
    uniform = (shift_right(bits, 11).double() * 2.0**-53).float()  # (B, COLUMNS), in [0, 1)
    return {name: uniform[:, columns] * (high - low) + low for name, (columns, low, high) in PARAMETERS.items()}


def to_index(drawn, choices):
    """Numbers drawn from 0 to choices -> indices. float32 may round the largest number up to choices."""
    return drawn.long().clamp(max=choices - 1)


def distinct_colors(uniform):
    """(B, OBJECTS) numbers from 0 to 1 -> (B, OBJECTS) indices of COLORS, all different within a scene."""
    colors = torch.zeros_like(uniform, dtype=torch.long)
    for i in range(OBJECTS):
        choices = len(COLORS) - i
        color = to_index(uniform[:, i] * choices, choices)  # counts the colours that are not taken yet
        for taken in colors[:, :i].sort(1).values.unbind(1):
            color = color + (color >= taken)
        colors[:, i] = color
    return colors


def place_objects(drawn, shape, count, fov):
    """Centres and half extents of a scene's objects, each (B, OBJECTS, 3): they stand on the ground, left to right."""
    is_pillar = shape == list(SHAPES).index("pillar")
    half_width = torch.where(is_pillar, 0.6 * drawn["radius"], drawn["radius"])
    half_height = torch.where(is_pillar, drawn["pillar_height"], drawn["radius"])

    column = (torch.arange(OBJECTS) + 0.5) * 2 / count[:, None] - 1 + drawn["offset"]  # -1 to 1 across the picture
    z = drawn["distance"]
    x = column * 0.85 * z * (fov / 2).tan()[:, None]

    centre = torch.stack([x, half_height, z], 2)
    centre[torch.arange(OBJECTS) >= count[:, None]] = -100.0  # the others are out of sight
    return centre, torch.stack([half_width, half_height, half_width], 2)


def draw_scenes(split, indices):
    """Scenes for a sequence of B indices: a dictionary of tensors whose leading dimension is B.

    Lengths are in metres, y is up, and the camera is above the origin and looks along +z. The solids are OBJECTS
    objects and the room: "centre" and "half" (extent) are (B, 4, 3), "quadric" is (B, 4, 3), and "angle", the rotation
    about y, is (B, 4).
    """
    drawn = draw_parameters(split, indices)
    outside = drawn["outside"] < 0.35
    fov = drawn["fov"].deg2rad()
    count = to_index(drawn["count"], OBJECTS) + 1
    shape = to_index(drawn["shape"], len(SHAPES))

    def by_place(in_room, on_open_ground):
        return torch.where(outside, on_open_ground, in_room)

    centre, half = place_objects(drawn, shape, count, fov)
    left = -by_place(drawn["left"], drawn["left_outside"])
    right = by_place(drawn["right"], drawn["right_outside"])
    back = -by_place(drawn["back"], drawn["back_outside"])
    front = by_place(drawn["front"], drawn["front_outside"])
    top = by_place(drawn["ceiling"], 1000.0)
    low = torch.stack([left, torch.zeros_like(top), back], 1)
    high = torch.stack([right, top, front], 1)

    light = torch.stack([drawn["light_x"], by_place(2.5, 5.0), drawn["light_z"]], 1)
    muted = torch.tensor(MUTED)
    wall_color = muted[to_index(drawn["wall_color"], len(MUTED))]
    quadrics = torch.tensor(list(SHAPES.values()))
    room_shape = list(SHAPES).index("box")
    return {
        "outside": outside,
        "fov": fov,
        "height": drawn["height"],
        "pitch": ((drawn["height"] - 0.55) / 3).atan() + drawn["pitch"],
        "count": count,
        "shape": shape,
        "color": distinct_colors(drawn["color"]),
        "big": drawn["radius"] > 0.5,
        "relation": drawn["relation"],
        "centre": torch.cat([centre, (low + high)[:, None] / 2], 1),
        "half": torch.cat([half, (high - low)[:, None] / 2], 1),
        "quadric": quadrics[F.pad(shape, (0, 1), value=room_shape)],
        "angle": torch.cat([drawn["object_angle"], drawn["room_angle"][:, None]], 1),
        "floor": to_index(drawn["floor"], len(FLOORS)),
        "striped": to_index(drawn["striped"], 2),
        "fence": drawn["fence"],
        "tile": drawn["tile"],
        "light": light * by_place(1.0, 4.0)[:, None],
        "floor_color": muted[to_index(drawn["floor_color"], len(MUTED))],
        "wall_color": wall_color * drawn["wall_brightness"][:, None],
    }


def describe_object(scenes, i, k):
    """Object k of scene i in words, such as "a small red ball". Three objects have no size, to keep captions short."""
    shape = list(SHAPES)[scenes["shape"][i, k]]
    color = list(COLORS)[scenes["color"][i, k]]
    words = [color, shape]
    if scenes["count"][i] < OBJECTS:
        size = "big" if scenes["big"][i, k] else "small"
        words.insert(0, "tall" if shape == "pillar" else size)
    article = "an" if words[0] == "orange" else "a"
    return " ".join([article, *words])


def describe_pair(scenes, i, first, second):
    """Two objects and how they are arranged, in words. The first is left of the second."""
    relation = scenes["relation"][i]
    gap = float(scenes["centre"][i, 1, 2] - scenes["centre"][i, 0, 2])
    if relation < 0.4 and abs(gap) > 0.8:
        return f"{first} in front of {second}" if gap > 0 else f"{first} behind {second}"
    return f"{first} left of {second}" if relation < 0.7 else f"{second} right of {first}"


def caption(scenes, i):
    """What scene i of draw_scenes shows, in words: objects, how they are arranged, where, and on which floor."""
    objects = [describe_object(scenes, i, k) for k in range(scenes["count"][i])]
    if len(objects) == 1:
        content = objects[0]
    elif len(objects) == 2:
        content = describe_pair(scenes, i, *objects)
    else:
        content = f"{objects[0]} left of {objects[1]} and {objects[2]}"

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
    tan = (scenes["fov"].view(-1, 1, 1) / 2).tan()
    x = ((2 * x + 1 - width) / height).flatten() * tan  # (B, 1, P)
    y = ((height - 1 - 2 * y) / height).flatten() * tan

    pitch = scenes["pitch"].view(-1, 1, 1)
    direction = torch.stack([x, pitch.cos() * y - pitch.sin(), pitch.cos() + pitch.sin() * y])
    origin = per_scene_vector(F.pad(scenes["height"][:, None], (1, 1)))
    return origin, direction


def per_scene_vector(v):
    """(B, 3) -> (3, B, 1, 1)."""
    return v.movedim(-1, 0)[..., None, None]


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


def first_hit(origin, direction, solids):
    """Distance to the first surface on each ray, and the index of its solid: each (B, 1, P)."""
    near, far = intersect(origin, direction, solids)
    in_front = (near < far) & (near > 1e-3)
    objects = torch.where(in_front, near, torch.inf)[:, :ROOM]
    return torch.cat([objects, far[:, ROOM:]], 1).min(1, keepdim=True)  # the camera is inside the room


def surface_geometry(point, index, solids):
    """The surface at points (3, B, 1, P) of the solids with these indices.

    Returns its normals, and the points in the frame of their solid (not rotated), each (3, B, 1, P).
    """
    hit = {}
    for name, value in solids.items():
        hit[name] = value.take_along_dim(index.expand(*value.shape[:-2], *index.shape[-2:]), -2)
    local = rotate_y(point - hit["centre"], -hit["angle"]) / hit["half"]

    on_quadric = (hit["quadric"] * local * local).sum(0) > 0.998
    flat = (local.abs() == local.abs().amax(0)) * local.sign()
    gradient = torch.where(on_quadric, hit["quadric"] * local, flat) / hit["half"]
    normal = normalize(rotate_y(gradient, hit["angle"]))
    normal = torch.where(index == ROOM, -normal, normal)  # the room is seen from inside
    return normal, local * hit["half"] + hit["centre"]


def surface_colors(scenes, normal, position, depth, index):
    """Colours (3, B, 1, P) before light: a floor with its pattern, plain or striped walls, objects."""
    tile = scenes["tile"].view(-1, 1, 1)
    column = (position[0] / tile).floor()
    row = (position[2] / tile).floor()
    kind = scenes["floor"].view(-1, 1, 1)
    checkered = torch.where(kind == FLOORS.index("checkered"), (column + row) % 2, 0.5)
    pattern = torch.where(kind == FLOORS.index("striped"), column % 2, checkered) - 0.5
    fading = (-((depth / 11) ** 2)).exp()  # far tiles would be smaller than pixels
    floor_shade = 1 + 0.7 * pattern * fading

    stripes = scenes["striped"].view(-1, 1, 1) * ((position[1] * 2.5).floor() % 2 - 0.5)
    is_floor = normal[1] > 0.9
    is_wall = normal[1].abs() < 0.5
    shade = torch.where(is_wall, 1 + 0.25 * stripes, 1.1)
    shade = torch.where(is_floor, floor_shade, shade)
    floor_color = per_scene_vector(scenes["floor_color"])
    wall_color = per_scene_vector(scenes["wall_color"])
    room = torch.where(is_floor, floor_color, wall_color) * shade

    palette = torch.tensor(list(COLORS.values())).to(depth.device, non_blocking=True)
    objects = palette[scenes["color"]].movedim(-1, 0).unsqueeze(-1)  # (3, B, OBJECTS, 1)
    objects = objects.take_along_dim(index.clamp(max=ROOM - 1).expand(3, -1, -1, -1), 2)
    return torch.where(index == ROOM, room, objects)


def illumination(scenes, point, normal, solids):
    """Brightness (B, 1, P): ambient light, and a lamp or the sun, which objects block."""
    to_light = per_scene_vector(scenes["light"]) - point
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

    origin, ray = camera_rays(scenes, height, width)
    depth, index = first_hit(origin, ray, solids)
    point = origin + depth * ray
    normal, position = surface_geometry(point, index, solids)
    colors = surface_colors(scenes, normal, position, depth, index)
    rgb = colors * illumination(scenes, point, normal, solids)

    is_sky = scenes["outside"].view(-1, 1, 1) & (index == ROOM) & (point[1] > scenes["fence"].view(-1, 1, 1))
    sky = torch.tensor(SKY).to(device, non_blocking=True).view(3, 1, 1, 1)
    sky = sky + 0.25 * normalize(ray)[1].clamp(min=0)
    rgb = torch.where(is_sky, sky, rgb).clamp(0, 1) * 2 - 1

    pitch = scenes["pitch"].view(-1, 1, 1)
    up = pitch.cos() * normal[1] + pitch.sin() * normal[2]
    forward = pitch.cos() * normal[2] - pitch.sin() * normal[1]
    normal = torch.stack([normal[0], up, forward])
    maps = {"rgb": rgb, "depth": torch.where(is_sky, 0, depth)[None], "normal": torch.where(is_sky, 0, normal)}
    return {name: x.squeeze(-2).movedim(0, 1).unflatten(-1, (height, width)).contiguous() for name, x in maps.items()}


# ---- Sensors ----
# Real depth sensors leave pixels out. A mask imitates them, so that training sees maps as sparse as files hold.
# The network gets no mask: it must recognise the noise that stands in for a missing pixel.

PATTERNS = ("dense", "uniform", "lidar", "sfm", "holes")


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

    pattern: "dense" keeps all; "uniform" a random 0.5-50% of the pixels; "lidar" scan lines; "sfm" points where the
    image has texture; "holes" all but four rectangles; "mixed" chooses one of these for each sample; a number in (0, 1]
    keeps this share of the pixels at random. rand(*shape) draws (B, *shape) from U(0, 1) on the device of rgb, as
    PerSampleRNG.rand does.
    """
    batch, _, height, width = rgb.shape
    noise = rand(1, height, width)
    if pattern not in ("mixed", *PATTERNS):
        return noise < float(pattern)

    # All are drawn, whichever pattern is asked for, so that "mixed" gives a sample the mask of its pattern.
    dense = torch.ones_like(noise, dtype=torch.bool)
    uniform = noise < 0.005 * 100 ** rand(1, 1, 1)
    lidar = scan_lines(noise, rand)
    sfm = textured_points(noise, rgb)
    holes = outside_rectangles(noise, rand)
    masks = torch.cat([dense, uniform, lidar, sfm, holes], 1)  # (B, 5, H, W), in the order of PATTERNS

    if pattern == "mixed":
        choice = (rand() * len(PATTERNS)).long()
    else:
        choice = torch.full((batch,), PATTERNS.index(pattern), device=rgb.device)
    return masks.take_along_dim(choice.view(-1, 1, 1, 1), 1)


# ---- Files ----
# Images, depth maps and normals as they are published, read into arrays and cropped and resized together.
# A file may be damaged or hostile: nothing is unpickled, and nothing is read whose header declares gigabytes.

MAX_BYTES = 1 << 28  # of a file
MAX_PIXELS = 64_000_000  # of an image or a map
MAX_HEADER = 1 << 20  # bytes of a name in a tar file
MAX_CAPTION = 1 << 16  # bytes
MAX_SHARDS = 1_000_000
IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # of the many that Pillow would try
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs as an error, it raises as well


class BadSample(ValueError):
    """Raised for a sample that cannot be read. The message names the file and the problem."""


@contextlib.contextmanager
def reading(name):
    """Turn any exception of the block into a BadSample whose message begins with name, and silence warnings.

    numpy and Pillow raise exceptions of many kinds for damaged files.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        problem = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadSample(f"{name}: {problem or type(error).__name__}") from None


def read_file(path, folder=None):
    """Bytes of a regular file. With a folder, path is relative to it and must not lead out of it."""
    path = os.path.abspath(os.path.join(folder or "", str(path)))
    if folder and not path.startswith(os.path.join(os.path.abspath(folder), "")):
        raise BadSample(f"leads out of {folder}")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadSample("not a regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadSample(error.strerror) from None
    if len(content) > MAX_BYTES:
        raise BadSample(f"larger than {MAX_BYTES >> 20} MiB")
    return content


def check_pixels(shape):
    if math.prod(shape) > MAX_PIXELS:
        raise BadSample(f"has {math.prod(shape):,} pixels; at most {MAX_PIXELS:,} are read")


def open_image(content, formats=IMAGE_FORMATS):
    """Bytes of an image -> a Pillow image, of which only the header has been read yet."""
    image = Image.open(io.BytesIO(content), formats=formats)
    check_pixels(image.size)
    return image


def read_png(content, scale):
    """16-bit grey PNG (H, W) -> value * scale, unless its text fields say otherwise.

    sample.py writes the fields scale and unit. MoGe writes near and far: its codes are 0 for unknown, 65535 for
    infinite, and else near^(1-k) far^k with k = (value - 1) / 65533.
    """
    image = open_image(content, ("PNG",))
    if not image.mode.startswith("I"):
        reason = "holds 256 depths" if image.mode in ("1", "L", "LA") else "is a picture of depth, not depth"
        raise BadSample(f"a PNG of mode {image.mode} {reason}; give 16-bit grey, .npy or .pfm")
    codes = np.asarray(image)
    if "near" not in image.info:
        has_scale = "scale" in image.info and "unit" in image.info
        return codes * np.float32(image.info["scale"] if has_scale else scale)

    near, far, unit = (float(image.info.get(key, 1)) for key in ("near", "far", "unit"))  # early files have a unit
    depths = unit * near * (far / near) ** ((np.arange(65536, dtype=np.float32) - 1) / 65533)
    depths[0] = 0
    depths[65535] = np.inf
    return depths[codes]


def read_npy(content, scale=1.0):
    """.npy array of numbers, times scale."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    check_pixels(shape[:2])
    if dtype.kind not in "fiu":
        raise BadSample(f"holds {dtype}; must hold real numbers")
    return np.load(io.BytesIO(content), allow_pickle=False) * np.float32(scale)


def read_pfm(content, scale):
    """One-channel PFM of either byte order, whose rows go from the bottom up, times scale."""
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?)[\d.eE+-]+\s", content)
    if not header:
        raise BadSample("not a one-channel PFM")
    width = int(header[1])
    height = int(header[2])
    check_pixels((height, width))
    dtype = "<f4" if header[3] else ">f4"
    rows = np.frombuffer(content, dtype, width * height, header.end()).reshape(height, width)
    return rows[::-1] * np.float32(scale)


MAPS = {"png": read_png, "npy": read_npy, "pfm": read_pfm}


class DepthLimits(NamedTuple):
    """What depth files hold: metres are values of a PNG times scale. Outside of (low, high] depth is missing."""

    scale: float = 1.0
    low: float = 0.0
    high: float = 0.0
    """0 is no limit."""


ANY_DEPTH = DepthLimits()


def read_array(name, content, scale=1.0):
    """Bytes of a .png, .npy or .pfm file, as the suffix of its name says -> (H, W) float32, times scale."""
    values = MAPS[suffix_of(name)](content, scale)
    if values.squeeze().ndim != 2:
        raise BadSample(f"has shape {values.shape}; must be (height, width)")
    return values.squeeze().astype(np.float32, copy=False)


def read_depth(name, content, limits):
    depth = read_array(name, content, limits.scale)
    high = limits.high or np.finfo(np.float32).max
    valid = (depth > max(limits.low, 0)) & (depth <= high)  # False for NaN and infinity
    return depth[..., None], valid


def read_normals(name, content, limits):
    vectors = read_npy(content).astype(np.float32)
    if vectors.ndim != 3 or vectors.shape[2] != 3:
        raise BadSample(f"has shape {vectors.shape}; must be (height, width, 3)")
    length = np.linalg.norm(vectors, axis=2)
    valid = (length > 0) & np.isfinite(length)
    return vectors / np.where(valid, length, 1)[..., None], valid


def read_image(name, content, limits):
    image, whole = load_image(content)
    return image / np.float32(127.5) - 1, np.ones(whole, bool)


@dataclass(frozen=True)
class Format:
    """How files hold the values of an encoding."""

    suffixes: tuple
    read: Callable
    """(name of the file, its bytes, DepthLimits) -> values (H, W, C) float32, valid (H, W) bool."""
    mirror: tuple = (1,)
    """Factors of the channels in a picture that is mirrored left to right."""


FORMATS = {  # for each key of model.ENCODINGS
    "plain": Format(IMAGES, read_image),
    "relative depth": Format(tuple(MAPS), read_depth),
    "unit vectors": Format(("npy",), read_normals, mirror=(-1, 1, 1)),
}


def suffix_of(name):
    return name.rpartition(".")[2].lower()


def read_map(modality, name, content, mask=None, limits=ANY_DEPTH):
    """Bytes of a file of a modality -> values (H, W, C) float32, valid (H, W) bool. Raises BadSample.

    Pixels that are 0 in mask, the bytes of an image, are missing too.
    """
    format = FORMATS[modality.encoding]
    if suffix_of(name) not in format.suffixes:
        raise BadSample(f"{modality.name} is read from {', '.join(format.suffixes)}")
    values, valid = format.read(name, content, limits)
    if values.shape[2] != modality.channels:
        raise BadSample(f"has {values.shape[2]} channels; {modality.name} has {modality.channels}")
    if mask is not None:
        mask, _ = load_image(mask)
        if mask.shape[:2] != valid.shape:
            raise BadSample(f"has shape {valid.shape}, its mask {mask.shape[:2]}")
        valid = valid & (mask > 0).any(2)
    if not valid.any():
        raise BadSample("no valid pixel: none is finite, in range and unmasked")
    return values, valid


def load_image(content, size=None, position=(0.5, 0.5)):
    """Bytes of an image -> (image (H, W, 3) uint8, (height, width) of the whole picture), cropped and resized to size.

    Upright by EXIF, transparent parts white, antialiased. A JPEG is decoded at a reduced scale, twice size or more.
    """
    image = open_image(content)
    orientation = image.getexif().get(0x0112, 1)
    whole = image.size if orientation in (5, 6, 7, 8) else image.size[::-1]
    if size:
        shrink = 2 * max(size[0] / whole[0], size[1] / whole[1])
        image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    elif image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))  # 16-bit grey
    if image.mode != "RGB":
        image = image.convert("RGB")
    if size:
        image = image.resize(size[::-1], Image.BICUBIC, crop_box(image.size[::-1], whole, size, position))
    return np.asarray(image), whole


def crop_box(shape, whole, size, position=(0.5, 0.5)):
    """(left, top, right, bottom) of the largest crop that has the aspect of size (H, W).

    position: where it lies, 0 to 1 down and across the room that is left. The box is in pixels of a map of shape
    (h, w), which may have another resolution than its whole picture, but must have the same aspect.
    """
    y_scale = shape[0] / whole[0]
    x_scale = shape[1] / whole[1]
    rounding = max(1, x_scale, y_scale) * (1 / whole[0] + 1 / whole[1])
    if abs(x_scale - y_scale) > rounding:
        raise BadSample(f"has another shape than its image: {tuple(shape)} instead of {tuple(whole)}")
    scale = min(whole[0] / size[0], whole[1] / size[1])
    height = size[0] * scale
    width = size[1] * scale
    top = max(whole[0] - height, 0) * position[0]
    left = max(whole[1] - width, 0) * position[1]
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

    # First the pixel under the centre of each cell, which is the answer wherever it is valid.
    rows = (top + (np.arange(size[0]) + 0.5) * cell_height).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) * cell_width).astype(int)
    out = values[rows[:, None], columns]
    found = valid[rows[:, None], columns]

    # Where is each pixel of the box, in cells? Those that are valid, in a cell without an answer, compete for it.
    y = (np.arange(values.shape[0]) + 0.5 - top) / cell_height
    x = (np.arange(values.shape[1]) + 0.5 - left) / cell_width
    rows = slice(*np.searchsorted(y, (0, size[0])))
    columns = slice(*np.searchsorted(x, (0, size[1])))
    y = y[rows]
    x = x[columns]
    cell_row = y.astype(int)
    cell_column = x.astype(int)
    needed = ~found[cell_row[:, None], cell_column]
    r, c = np.nonzero(valid[rows, columns] & needed)

    # From far to near: of several assignments to a cell the last one stays.
    y_distance = (y - cell_row - 0.5) * cell_height
    x_distance = (x - cell_column - 0.5) * cell_width
    distance = y_distance[r] ** 2 + x_distance[c] ** 2
    order = np.argsort(-distance, kind="stable")
    r = r[order]
    c = c[order]
    out[cell_row[r], cell_column[c]] = values[rows, columns][r, c]
    found[cell_row[r], cell_column[c]] = True
    return out, found


# ---- Sources ----
# Where samples come from: the synthetic world, a folder, or tar shards. All give Batches of the wanted modalities.
# Files are shuffled by a function of (seed, epoch), so that resuming finds its place without reading.


@dataclass
class Batch:
    """B samples. What a sample lacks is masked out."""

    values: dict
    """{modality: (B, C, H, W)}: images in [-1, 1], depth in metres, normals of unit length."""
    valid: dict
    """{modality: (B, 1, H, W) bool, or None if all pixels are valid}."""
    captions: list
    indices: list
    """Global indices of the samples in training, for PerSampleRNG; positions in an evaluation."""
    names: list
    shapes: list
    """(height, width) of the whole pictures, before they were cropped and resized."""


class SyntheticWorld:
    """The synthetic world as a source: a sample for every index. It has images, depth and normals."""

    modalities = ("rgb", "depth", "normal")

    def __init__(self, split, size, device="cpu"):
        self.split = split
        self.size = size
        self.device = device

    def samples(self, indices):
        scenes = draw_scenes(self.split, indices)
        values = render(scenes, *self.size, device=self.device)
        not_sky = values["depth"] > 0
        valid = {"rgb": None, "depth": not_sky, "normal": not_sky}
        captions = [caption(scenes, i) for i in range(len(indices))]
        names = [f"{i:06}" for i in indices]
        return Batch(values, valid, captions, list(indices), names, [self.size] * len(indices))


WINDOW = 8  # shards whose samples are shuffled together
ATTEMPTS = 10  # samples that are tried in place of one that cannot be read


@dataclass
class SampleFiles:
    """The files of a sample, of which none has been decoded yet."""

    name: str
    where: str
    """What messages about the sample begin with."""
    files: dict
    """{"image", "mask" or name of a modality: name of its file}."""
    read: Callable
    """Name of a file -> its bytes."""
    text: str | None = None
    depth_scale: float | None = None


class Files(Dataset):
    """Samples of a folder or of tar shards. Item i is the sample at position i % n of epoch i // n, of n samples.

    An epoch has each sample once. In training its order is computed from (seed, epoch): the shards are shuffled and
    taken WINDOW at a time, and the samples of each window are shuffled. A folder is one window. So the samples of a
    step do not depend on the number of ranks, --workers or --grad-accum.

    units: the folder, or the paths of the shards. index: for each unit the entries of its samples, which are rows of
    the folder or offsets in the shard. It is None until the samples of the shards have been counted.
    """

    def __init__(self, units, index, args, training, size, modalities):
        self.units = units
        self.args = args
        self.training = training
        self.size = size
        self.modalities = modalities
        self.set_index(index)

    def set_index(self, index):
        self.index = index
        self.count = sum(map(len, index or ()))

    def locate(self, epoch, position):
        """(unit, entry) of the sample at a position of an epoch."""
        order, starts = unit_order(self, epoch)
        if self.training:
            window = np.searchsorted(starts[:-1:WINDOW], position, side="right") - 1
            start, shuffled = window_order(self, epoch, window)
            position = start + shuffled[position - start]
        i = np.searchsorted(starts, position, side="right") - 1
        return self.units[order[i]], self.index[order[i]][position - starts[i]]

    def __getitem__(self, number):
        """(sample, None), or (a substitute, the problem) if the sample cannot be read.

        A sample is (maps {modality: (H, W, C)}, masks {modality: (H, W)}, caption, shape, name). In training the
        substitute is the next sample of the epoch that can be read, or a grey image after ATTEMPTS. Otherwise it is
        None.
        """
        epoch, position = divmod(number, self.count)
        problem = None
        for attempt in range(1 + ATTEMPTS if self.training else 1):
            try:
                sample = self.open_sample(*self.locate(epoch, (position + attempt) % self.count))
                with reading(sample.where):
                    return self.decode(sample, epoch), problem
            except BadSample as error:
                problem = problem or str(error)
        if not self.training:
            return None, problem
        maps = {m.name: np.zeros((*self.size, m.channels), np.float32) for m in self.modalities[1:]}
        masks = {m.name: np.zeros(self.size, bool) for m in self.modalities[1:]}
        maps[self.modalities[0].name] = np.full((*self.size, 3), 128, np.uint8)
        return (maps, masks, "", self.size, ""), problem

    def decode(self, sample, epoch):
        """Decode, crop and resize a sample.

        The crop is central. In training it is random, and half of the samples are mirrored, unless the caption tells
        left from right. That randomness follows from (seed, epoch, name) alone.
        """
        text = "" if sample.text is None else sample.text
        if not isinstance(text, str) or len(text.encode()) > MAX_CAPTION:
            raise BadSample(f"its caption is not text, or longer than {MAX_CAPTION} bytes")
        position = (0.5, 0.5)
        mirrored = False
        if self.training:
            rng = random.Random(f"{self.args.seed} {epoch} {sample.name}".encode(errors="surrogatepass"))
            position = (rng.random(), rng.random())
            mirrored = rng.random() < 0.5 and not re.search(r"\b(left|right)", text, re.IGNORECASE)

        image_file = sample.files["image"]
        with reading(image_file):
            image, whole = load_image(sample.read(image_file), self.size, position)
        maps = {self.modalities[0].name: image}
        masks = {}
        for m in self.modalities[1:]:
            maps[m.name], masks[m.name] = self.load_map(sample, m, whole, position)
        if mirrored:
            factors = {m.name: np.array(FORMATS[m.encoding].mirror, maps[m.name].dtype) for m in self.modalities}
            maps = {name: values[:, ::-1] * factors[name] for name, values in maps.items()}
            masks = {name: mask[:, ::-1] for name, mask in masks.items()}
        return maps, masks, text, whole, sample.name

    def load_map(self, sample, modality, whole, position):
        """Values (H, W, C) and mask (H, W) of a modality; nothing but zeros and False if the sample lacks it."""
        file = sample.files.get(modality.name)
        if not file:
            return np.zeros((*self.size, modality.channels), np.float32), np.zeros(self.size, bool)
        with reading(file):
            scale = sample.depth_scale
            if scale is None:
                scale = self.args.depth_scale if suffix_of(file) == "png" else 1.0
            if type(scale) not in (int, float) or not 0 < scale < math.inf:
                raise BadSample(f"depth_scale {scale!r} is not a positive number")
            limits = DepthLimits(scale, self.args.depth_min, self.args.depth_max)
            mask = sample.read(sample.files["mask"]) if "mask" in sample.files else None
            values, valid = read_map(modality, file, sample.read(file), mask, limits)
            values, valid = nearest(values, valid, self.size, crop_box(valid.shape, whole, self.size, position))
        return np.where(valid[..., None], values, 0), valid


@functools.lru_cache(4)
def unit_order(source, epoch):
    """(indices of the units in the order of an epoch, the positions where they start and where the last one ends)."""
    counts = np.array([len(entries) for entries in source.index])
    order = np.arange(len(counts))
    if source.training:
        order = np.random.default_rng([source.args.seed, epoch]).permutation(order)
    return order, np.concatenate([[0], np.cumsum(counts[order])])


@functools.lru_cache(4)
def window_order(source, epoch, window):
    """(first position of a window of an epoch, permutation of its positions)."""
    _, starts = unit_order(source, epoch)
    start = starts[window * WINDOW]
    stop = starts[min((window + 1) * WINDOW, len(starts) - 1)]
    return start, np.random.default_rng([source.args.seed, epoch, window + 1]).permutation(stop - start)


class Folder(Files):
    """Samples of a folder that has metadata.jsonl, or .index.txt as MoGe's evaluation folders have."""

    def open_sample(self, folder, row):
        if row["problem"]:
            raise BadSample(f"{row['where']}: {row['problem']}")
        fields = row["fields"]
        files = {"image": str(fields["file_name"])}
        for key, value in fields.items():
            if key.endswith("_file_name") and value:
                files[key.removesuffix("_file_name")] = str(value)
        read = functools.partial(read_file, folder=folder)
        return SampleFiles(row["name"], row["where"], files, read, fields.get("text"), fields.get("depth_scale"))


@functools.lru_cache(4)
def read_index(folder):
    """Rows of a folder: {"name", "where", "fields" (of metadata.jsonl), "problem" (why it cannot be used, or None)}."""
    is_moge = (folder / ".index.txt").exists()
    path = folder / (".index.txt" if is_moge else "metadata.jsonl")
    rows = []
    names = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} row {number}"
        try:
            if is_moge:
                name = line.decode().strip()
                fields = {"file_name": f"{name}/image.jpg", "depth_file_name": f"{name}/depth.png"}
            else:
                fields = parse_json(line)
                name = os.path.splitext(fields["file_name"])[0]
            problem = f"names {fields['file_name']} again" if name in names else None
        except (ValueError, KeyError, TypeError):
            name = where
            fields = {}
            problem = "not UTF-8 JSON with a file_name"
        names.add(name)
        rows.append({"name": name, "where": where, "fields": fields, "problem": problem})
    return rows


class Shards(Files):
    """Samples of WebDataset's tar shards: members key.jpg, key.txt or key.json, key.depth.npy, key.normal.npy ..."""

    def open_sample(self, path, offset):
        _, name, members, problem = next(list_shard(path, int(offset)))
        if problem:
            raise BadSample(f"{path}: {problem}")
        where = f"{path}: {name}"

        def read(suffix):
            return read_member(path, members[suffix])

        files = {}
        for suffix in members:
            kind, _, last = suffix.rpartition(".")
            if last in (*IMAGES, *MAPS):
                files.setdefault(kind, suffix)
        with reading(where):
            image = next((suffix for suffix in IMAGES if suffix in members), None)
            if image is None:
                raise BadSample(f"no image ({', '.join(IMAGES)})")
            files["image"] = image
            fields = {}
            if "json" in members:
                with reading("json"):
                    fields = parse_json(read("json"))
            text = fields.get("caption")
            if "txt" in members:
                with reading("txt"):
                    text = read("txt").decode()
        return SampleFiles(name, where, files, read, text, fields.get("depth_scale"))


class HeaderFile(io.FileIO):
    """A tar file whose headers are read. A damaged one may declare a name of gigabytes, which raises ReadError."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def read_headers(path, start):
    """Yields (header, offset of the next one) of the members of a tar file from an offset on. Raises if damaged."""
    with HeaderFile(path) as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # it would keep every header
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.ReadError("a member of negative size")
                yield member, tar.offset
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("cut short")


def list_shard(path, start=0):
    """Yields (offset, name, members {suffix: header}, None) of the samples of a tar file from an offset on.

    A sample is consecutive members that share a name up to its first dot. Only headers are read. If the file is
    damaged, the last item stands for what is lost: (offset, None, {}, the problem).
    """
    name = None
    members = {}
    offset = end = start
    problem = None
    try:
        for header, next_offset in read_headers(path, start):
            end = next_offset
            folder, slash, base = header.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem or not suffix or header.isdir():
                continue
            if members and name != folder + slash + stem:
                yield offset, name, members, None
                members = {}
            if not members:
                name = folder + slash + stem
                offset = header.offset
            members[suffix.lower()] = header
    except Exception as error:
        problem = f"damaged ({error}), what follows is lost"
    if members:
        yield offset, name, members, None
    if name is None and problem is None:
        problem = "holds no sample"
    if problem:
        yield end, None, {}, problem


def read_member(path, member):
    """Bytes of a member of a tar file."""
    if not member.isfile() or member.issparse():
        raise BadSample(f"{member.name} is a link, a device or sparse")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise BadSample(f"{member.name} is a name that leads out")
    if member.size > MAX_BYTES:
        raise BadSample(f"declares {member.size} bytes")
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        content = file.read(member.size)
    if len(content) < member.size:
        raise BadSample("cut short")
    return content


def sample_offsets(path, limit=None):
    """Offsets of the samples of a tar file, or of its first ones up to a limit."""
    return np.array([offset for offset, *_ in itertools.islice(list_shard(path), limit)])


def index_shards(paths, workers=0, limit=None):
    """sample_offsets of each shard, read by worker processes. Stops after the shards that hold limit samples."""
    count = functools.partial(sample_offsets, limit=limit)
    loader = DataLoader(paths, batch_size=None, collate_fn=count, num_workers=workers, worker_init_fn=keep_with_parent)
    index = []
    total = 0
    for offsets in tqdm(loader, "counting the samples of --data", delay=5, leave=False):
        index.append(offsets)
        total += len(offsets)
        if limit is not None and total >= limit:
            break
    return index


def load_index(path):
    """{key of a shard: offsets of its samples} of an index file; {} if there is none, or it is damaged."""
    try:
        with np.load(path) as file:
            offsets = np.split(file["offsets"], np.cumsum(file["counts"])[:-1])
            return dict(zip(file["keys"].tolist(), offsets, strict=True))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}


def kept_index(paths, out, workers, rank):
    """index_shards, kept in a run directory. Shards that have changed in size or time are counted again.

    Rank 0 counts, and the others wait for its file: a collective would end the run after --timeout.
    """
    keys = []
    for path in paths:
        state = os.stat(path)
        keys.append(hash_int64((path, state.st_size, state.st_mtime_ns)))
    kept = Path(out) / "shards.npz"
    known = load_index(kept)
    missing = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    if rank == 0 and missing:
        if known:
            log(f"--data: {len(missing)} shards are new or changed and are counted; the order of samples may change")
        known.update(zip(missing, index_shards(list(missing.values()), workers), strict=True))
        index = [known[key] for key in keys]
        counts = [len(offsets) for offsets in index]
        write_bytes(kept, to_bytes(np.savez, keys=keys, counts=counts, offsets=np.concatenate(index)))
    while not known.keys() >= set(keys):
        time.sleep(1)
        known = load_index(kept)
    return [known[key] for key in keys]


def expand(pattern):
    """'a{08..10}.tar' -> ['a08.tar', 'a09.tar', 'a10.tar'], for any number of ranges in braces."""
    first, *pieces = re.split(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    paths = [first]
    for low, high, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        numbers = range(int(low), int(high) + 1)
        if not 0 < len(numbers) * len(paths) <= MAX_SHARDS:
            limit = f"and name at most {MAX_SHARDS:,} files"
            fail(f"--data {pattern}: a range in braces must go from the lower number to the higher, {limit}")
        paths = [f"{path}{number:0{len(low)}}{text}" for path in paths for number in numbers]
    return paths


def open_source(args, split, size, modalities, device="cpu"):
    """The source that --data names, for images of size (H, W). The first modality is the image."""
    if args.data == "synthetic":
        unknown = [m.name for m in modalities if m.name not in SyntheticWorld.modalities]
        if unknown:
            fail(f"--data synthetic: has no {unknown[0]}; it has {', '.join(SyntheticWorld.modalities)}")
        return SyntheticWorld(split, size, device)

    folder = Path(args.data)
    settings = (args, split == "train", size, modalities)
    if any(os.path.isfile(folder / name) for name in (".index.txt", "metadata.jsonl")):
        rows = read_index(folder)
        if not rows:
            fail(f"--data {args.data}: lists no samples")
        return Folder([folder], [rows], *settings)

    shards = expand(args.data)
    missing = next((path for path in shards if not os.path.isfile(path)), None)
    if missing is not None:
        known = "synthetic, a folder with metadata.jsonl or .index.txt, or tar shards"
        fail(f"--data {args.data}: unknown source, no file {missing}; give {known}")
    return Shards(shards, None, *settings)


# ---- Batches ----
# Which samples a step trains on, and the random numbers that belong to them: both follow from (seed, index), and not
# from the number of ranks, of workers or of accumulation steps.


def training_indices(seed, step, batch_size, rank=0, ranks=1):
    """Global indices of the samples of one step that one rank trains on.

    Another seed sees other scenes of the synthetic world, unless it is a multiple of 2^25 away.
    """
    share = batch_size // ranks
    start = (seed << 32) + step * batch_size + rank * share
    return range(start, start + share)


def hash_int64(key):
    """int64 that is a hash of a key, equal in all processes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class PerSampleRNG:
    """Random numbers that belong to samples: row i of a draw is a hash of (key, indices[i], number of the draw).

    So noise, noise levels and masks are the same however a batch is split over ranks and accumulation steps, and on
    every device: uniform ones to the last bit, normal ones to rounding. A draw is SplitMix64 from B starting states.
    """

    def __init__(self, key, indices, device="cpu"):
        indices = torch.tensor(indices, dtype=torch.int64).to(device, non_blocking=True)
        self.streams = split_mix(indices * GOLDEN + hash_int64(key))  # (B,)
        self.draws = 0

    def bits(self, *shape):
        """(B, *shape) int64 of 64 random bits each. Every call gives new ones."""
        self.draws += 1
        start = split_mix(self.streams + self.draws)  # (B,)
        counter = torch.arange(math.prod(shape), device=start.device)
        return split_mix(start[:, None] + counter * GOLDEN).view(-1, *shape)

    def rand(self, *shape):
        """(B, *shape) from U[0, 1)."""
        return shift_right(self.bits(*shape), 40) * 2.0**-24  # 24 bits are what float32 holds exactly

    def randn(self, *shape):
        """(B, *shape) from N(0, 1), by the Box-Muller transform: 64 bits give a radius and an angle, so two numbers."""
        count = math.prod(shape)
        bits = self.bits((count + 1) // 2)
        radius = ((shift_right(bits, 32) + 1) * 2.0**-32).log().mul(-2).sqrt()
        angle = (bits & 0xFFFFFFFF) * (2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(-1, *shape)


def training_parts(seed, args, step, rank, ranks):
    """Endless ranges of indices, from a step on: what one rank trains on, in args.grad_accum parts per step."""
    size = args.batch_size // ranks // args.grad_accum
    for number in itertools.count(step):
        indices = training_indices(seed, number, args.batch_size, rank, ranks)
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def training_batches(source, args, step, rank, ranks, device):
    """Endless Batches of one rank, from a step on, args.grad_accum of them per step.

    Samples of files that cannot be read are skipped and counted. The first ten are named, and more than 1% of them (at
    least of 1000) end the run. Shards are counted first, and the index is kept in args.out if there is one.
    """
    if isinstance(source, SyntheticWorld):
        for indices in training_parts(args.seed, args, step, rank, ranks):
            yield source.samples(indices)
    if source.index is None and getattr(args, "out", None):
        source.set_index(kept_index(source.units, args.out, args.workers, rank))
    if source.index is None:
        source.set_index(index_shards(source.units, args.workers))

    tried = 0
    bad = 0
    named = set()
    global_indices = training_parts(args.seed, args, step, rank, ranks)
    item_numbers = training_parts(0, args, step, rank, ranks)  # the seed is in the order of an epoch
    for loaded, problems in load_batches(source, item_numbers, args.workers, device):
        batch = to_batch(source, loaded, next(global_indices), device)
        tried += len(batch.names)
        bad += len(problems)
        for problem in problems:
            if problem not in named and len(named) < 10:
                named.add(problem)
                log(f"skipped, {bad} of {tried} samples: {problem}")
        if bad > max(tried, 1000) / 100:
            count = f"{bad} of {tried} samples cannot be read, more than 1%"
            fail(f"--data {args.data}: {count}; the last: {problems[-1]}")
        yield batch


def in_order(source, count, batch_size, device="cpu", workers=0, strict=True):
    """Batches of the first count samples, or of all if count is None.

    A sample of files that cannot be read ends the program with one line, or is left out if not strict.
    """
    if isinstance(source, SyntheticWorld):
        for start in range(0, count, batch_size):
            yield source.samples(range(start, min(start + batch_size, count)))
        return
    if source.index is None:
        source = copy.copy(source)
        source.set_index(index_shards(source.units, limit=count))
    numbers = range(source.count)[:count]
    parts = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    start = 0
    for loaded, problems in load_batches(source, parts, min(workers, 1)):
        if problems and strict:
            fail(f"--data {problems[0]}")
        if loaded:
            stop = start + len(loaded[2])
            yield to_batch(source, loaded, range(start, stop), device)
            start = stop


def load_batches(source, parts, workers, device="cpu"):
    """What collate makes of the items of Files whose numbers are in each of the parts, read by worker processes."""
    pinned = torch.device(device).type == "cuda"
    options = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": keep_with_parent}
    return DataLoader(source, batch_sampler=parts, collate_fn=collate, **options)


def collate(items):
    """Items of Files -> ((maps {m: (B, H, W, C)}, masks {m: (B, H, W)}, captions, shapes, names) or None, problems)."""
    samples = [sample for sample, _ in items if sample]
    problems = [problem for _, problem in items if problem]
    if not samples:
        return None, problems
    maps, masks, *rest = zip(*samples, strict=True)
    return (stack(maps), stack(masks), *rest), problems


def stack(dictionaries):
    """B dictionaries of arrays -> one dictionary of tensors whose leading dimension is B."""
    return {name: torch.from_numpy(np.stack([x[name] for x in dictionaries])) for name in dictionaries[0]}


def to_batch(source, loaded, indices, device):
    """What collate returns -> Batch on a device."""
    maps, masks, captions, shapes, names = loaded
    values = {name: x.to(device, non_blocking=True).movedim(-1, 1) for name, x in maps.items()}
    valid = {name: mask[:, None].to(device, non_blocking=True) for name, mask in masks.items()}
    image = source.modalities[0].name
    values[image] = values[image].float() / 127.5 - 1
    valid[image] = None
    return Batch(values, valid, list(captions), list(indices), list(names), list(shapes))


def keep_with_parent(worker):
    """Let a worker process live exactly as long as its parent, the process that trains.

    Schedulers and Ctrl-C signal both, and the parent finishes its step and saves before it ends. So the worker ignores
    these signals, and the system kills it when its parent has ended, in whatever way.
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


# ---- Encoders ----
# What the network sees of images and captions: pixels and bytes, or what --encoders FILE.py makes of them.
# Frozen encoders turn a small pixel model into a latent one, with text embeddings, with no other change.


def truncated_words(caption, length):
    """The words of a caption that encode_text cuts, including one that it would split; "" if all fit."""
    words = caption.split()
    tokens = itertools.accumulate(math.ceil(len(word.encode()) / TEXT_PATCH) for word in words)
    return " ".join(word for word, used in zip(words, tokens, strict=True) if used > length // TEXT_PATCH)


def encode_text(captions, length):
    """Captions -> (B, length) uint8: UTF-8, each word at the start of a token of TEXT_PATCH bytes, zeros between.

    A word longer than a token goes on in the next one. What does not fit in length is cut. An empty caption is all
    zeros.
    """
    text = np.zeros((len(captions), length // TEXT_PATCH, TEXT_PATCH), np.uint8)
    for row, line in zip(text, captions, strict=True):
        words = (word.encode() for word in line.split())
        pieces = (word[i : i + TEXT_PATCH] for word in words for i in range(0, len(word), TEXT_PATCH))
        for token, piece in zip(row, pieces, strict=False):
            token[: len(piece)] = np.frombuffer(piece, np.uint8)
    return torch.from_numpy(text.reshape(len(captions), -1))


class PixelsAndBytes:
    """No encoders. What load(device) of a plug-in returns has the same seven members:

    encode_image  (B, 3, H, W) in [-1, 1] -> (B, image_channels, H / image_stride, W / image_stride), of unit variance
    decode_image  the inverse
    encode_text   B captions -> (B, text_length, text_dim) float32, zeros where there is no text (here: bytes)

    image_channels, image_stride  channels of the latents, and pixels per latent, per side
    text_length, text_dim         tokens of a caption, channels of each; text_dim 0 is bytes, (B, text_length) uint8

    All tensors are finite, and float32 unless they are bytes.
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
def check_encoders(encoders, device, patch):
    """Raise ValueError unless encoders return what PixelsAndBytes documents, for a batch of two."""
    numbers = {"image_channels": (1, 4096), "image_stride": (1, 256), "text_dim": (0, 1 << 16)}
    check_numbers(encoders, text_length=(1, 1 << 16), **numbers)
    if not encoders.text_dim and encoders.text_length % TEXT_PATCH:
        raise ValueError(f"text_length is {encoders.text_length}; must be a multiple of {TEXT_PATCH} bytes")

    def check(name, argument, *shape):
        try:
            returned = getattr(encoders, name)(argument)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{name} raised {type(error).__name__}: {error}") from None
        found = tuple(returned.shape) if isinstance(returned, torch.Tensor) else type(returned).__name__
        if found != shape:
            raise ValueError(f"{name} returned {found}; must be a tensor of shape {shape}")
        dtype = torch.uint8 if len(shape) == 2 else torch.float32
        if returned.dtype != dtype:
            raise ValueError(f"{name} returned {returned.dtype}; must be {dtype}")
        if not returned.isfinite().all():
            raise ValueError(f"{name} returned NaN or infinity")
        return returned

    height = 4 * patch
    width = 6 * patch
    stride = encoders.image_stride
    rgb = torch.linspace(-1, 1, 6 * height * width, device=device).view(2, 3, height, width)
    latents = check("encode_image", rgb, 2, encoders.image_channels, height // stride, width // stride)
    check("decode_image", latents, 2, 3, height, width)
    text_dim = [encoders.text_dim] if encoders.text_dim else []
    check("encode_text", ["", "a red ball"], 2, encoders.text_length, *text_dim)


def load_encoders(path, device, config):
    """Run a plug-in, a Python file, and check what its load(device) returns."""
    if not (path.endswith(".py") and Path(path).is_file()):
        fail(f"--encoders {path}: no such file, or its name does not end in .py")
    try:
        spec = importlib.util.spec_from_file_location("encoders", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        encoders = module.load(device)
    except (Exception, SystemExit) as error:
        fail(f"--encoders {path}: load raised {type(error).__name__}: {error}")
    try:
        check_encoders(encoders, device, config.with_encoders(encoders).patch)
    except (AttributeError, ValueError) as error:
        fail(f"--encoders {path}: {error}; README shows a file that works")
    return encoders


def open_encoders(path, device, config, trained_with=None):
    """--encoders -> the encoders that a plug-in loads, or PixelsAndBytes if path is empty.

    trained_with: the plug-in that a checkpoint names ("" for none). Encoders that do not fit its config are refused.
    """
    encoders = load_encoders(path, device, config) if path else PixelsAndBytes(config.text_length)
    if trained_with and path and Path(trained_with).name != Path(path).name:
        log(f"--encoders {path}: the checkpoint was trained with {trained_with}; are they the same?")
    if trained_with is not None and config.with_encoders(encoders) != config:
        image = config.modalities[0]
        used = f"--encoders {trained_with}" if trained_with else "no --encoders"
        needs = f"{image.channels} channels at 1/{image.stride}, text {config.text_length} x {config.text_dim}"
        fail(f"--encoders {path or '(none)'}: the checkpoint was trained with {used}: {needs}; give what fits")
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


log = tell  # until the section on runs has its new names


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
    batch = SyntheticWorld(args.split, size).samples(range(args.count))
    values = batch.values
    valid = batch.valid
    captions = batch.captions
    values["depth"] *= PerSampleRNG("measured", range(args.count)).rand(1, *size) < args.measured
    valid["depth"] = values["depth"] > 0
    if not valid["depth"].flatten(1).any(1).all():
        fail(f"--measured {args.measured}: a scene keeps no pixel; give a larger share")
    pictures = [paint_rgb(rgb) for rgb in values["rgb"]]
    export(out, args.layout, zip(pictures, values["depth"][:, 0].numpy(), captions, scenes["fov"].numpy(), strict=True))
    mask = valid["depth"][:8]
    thinned = mask & sensor_mask(values["rgb"][:8], "mixed", PerSampleRNG(0, range(len(mask))).rand)
    paint = lambda masks: [paint_depth(d, v) for d, v in zip(values["depth"], masks, strict=False)]
    rows = {"image": pictures[:8], "depth": paint(mask), "depth as\ntrained on": paint(thinned)}
    write_image(out / "grid.png", draw_grid(list(rows.values()), list(rows)))
    print(f"{args.count} samples in {out}, for --data; see {out}/grid.png")


if __name__ == "__main__":
    run_script(main)
