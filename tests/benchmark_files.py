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
from model import DEPTH, RGB

SIZE = 256
COUNT = 24


def write(folder):
    """Scenes of the built-in world with the grain of a photograph, depth with holes."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(COUNT):
        batch = data.SyntheticWorld("val", (1024, 1024)).samples([i])  # one at a time: rendering takes memory
        grain = rng.normal(0, 6, (1024, 1024, 3)) + data.paint_rgb(batch.values["rgb"][0])
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        depth = batch.values["depth"][0, 0].numpy() * rng.normal(1, 0.002, (1024, 1024)) * 1000
        depth[rng.random((1024, 1024)) < 0.05] = 0
        Image.fromarray(depth.clip(0, 65535).astype(np.uint16)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.jpg", "text": batch.captions[0], "depth_file_name": f"{i}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def pillow(folder):
    """The least that any loader does: read, decode (JPEG at half scale), resize the image, sample the depth."""
    for i in range(COUNT):
        image = Image.open(io.BytesIO((folder / f"{i}.jpg").read_bytes()))
        image.draft(None, (2 * SIZE, 2 * SIZE))
        image.resize((SIZE, SIZE), Image.BICUBIC)
        Image.open(io.BytesIO((folder / f"{i}.png").read_bytes())).resize((SIZE, SIZE), Image.NEAREST)


def ours(folder):
    args = argparse.Namespace(data=str(folder), depth_scale=0.001, depth_min=0.0, depth_max=0.0, seed=0)
    source = data.open_source(args, "train", (SIZE, SIZE), (RGB, DEPTH))
    parts = [range(start, start + 8) for start in range(0, COUNT, 8)]
    for _ in source.load(parts, workers=0, device="cpu"):
        pass


def main():
    torch.set_num_threads(1)
    speeds = {pillow: [], ours: []}
    with TemporaryDirectory() as folder:
        write(Path(folder))
        for _ in range(7):  # in turn, since the machine's speed changes from minute to minute
            for loader, found in speeds.items():
                start = time.perf_counter()
                loader(Path(folder))
                found.append(COUNT / (time.perf_counter() - start))
    ratios = [ours_speed / pillow_speed for ours_speed, pillow_speed in zip(speeds[ours], speeds[pillow], strict=True)]
    ratio = np.median(ratios)
    print(f"Pillow alone {max(speeds[pillow]):.1f} images/s, data.py {max(speeds[ours]):.1f}; median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
