"""Images/s of one core: 1024-pixel JPEG and 16-bit depth decoded, cropped and resized to 256, against Pillow alone.

python tests/benchmark_files.py
"""

import argparse
import io
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data

SIZE, COUNT = 256, 24
ARGS = argparse.Namespace(depth_scale=0.001, depth_min=0.0, depth_max=0.0, seed=0)


def write(folder):
    """Scenes of the built-in world with the grain of a photograph, depth with holes."""
    rng, rows = np.random.default_rng(0), []
    for i in range(COUNT):
        values, _, captions = data.World("val", (1024, 1024)).samples([i])  # one at a time: rendering takes memory
        grain = rng.normal(0, 6, (1024, 1024, 3)) + data.paint_rgb(values["rgb"][0])
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        depth = values["depth"][0, 0].numpy() * rng.normal(1, 0.002, (1024, 1024)) * 1000
        depth[rng.random((1024, 1024)) < 0.05] = 0
        Image.fromarray(depth.clip(0, 65535).astype(np.uint16)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.jpg", "text": captions[0], "depth_file_name": f"{i}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def pillow(folder):
    """The least that any loader does: read, decode (JPEG at half scale), resize the image, sample the depth."""
    for i in range(COUNT):
        image = Image.open(io.BytesIO((folder / f"{i}.jpg").read_bytes()))
        image.draft(None, (2 * SIZE, 2 * SIZE))
        image.resize((SIZE, SIZE), Image.BICUBIC)
        Image.open(io.BytesIO((folder / f"{i}.png").read_bytes())).resize((SIZE, SIZE), Image.NEAREST)


def ours(folder):
    args = argparse.Namespace(**vars(ARGS), data=str(folder))
    source = data.open_source(args, "train", (SIZE, SIZE))
    for start in range(0, COUNT, 8):
        data.collate([source[i] for i in range(start, start + 8)])


torch.set_num_threads(1)
with TemporaryDirectory() as folder:
    write(Path(folder))
    speeds = {pillow: [], ours: []}
    for _ in range(7):  # in turn, since the machine's speed changes from minute to minute
        for loader, found in speeds.items():
            start = time.perf_counter()
            loader(Path(folder))
            found.append(COUNT / (time.perf_counter() - start))
best = {loader.__name__: max(found) for loader, found in speeds.items()}
ratios = sorted(o / p for o, p in zip(speeds[ours], speeds[pillow], strict=True))
print(f"Pillow alone {best['pillow']:.1f} images/s, data.py {best['ours']:.1f}; ratio, median of 7: {ratios[3]:.2f}")
