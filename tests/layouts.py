"""Writers of the layouts that --data reads, for tests and benchmarks.

python tests/layouts.py --layout shards --out runs/shards --count 500     the synthetic world as tar shards
"""

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(Path(__file__).parent.parent))
import data


def world_samples(split, size, count):
    """{"name", "image" (bytes), "text", "depth" (H, W), "normal" (H, W, 3), "fov"} of the first scenes of the world."""
    batch = data.SyntheticWorld(split, size).samples(range(count))
    fov = data.draw_scenes(split, range(count))["fov"].tolist()
    for i, name in enumerate(batch.names):
        picture = Image.fromarray(data.paint_rgb(batch.values["rgb"][i]))
        yield {
            "name": name,
            "image": data.to_bytes(picture.save, "JPEG", quality=100, subsampling=0),
            "text": batch.captions[i],
            "depth": batch.values["depth"][i, 0].numpy(),
            "normal": batch.values["normal"][i].movedim(0, -1).numpy(),
            "fov": fov[i],
        }


def npy(array):
    return data.to_bytes(np.save, array)


def write_folder(folder, samples):
    folder.mkdir()
    rows = []
    for sample in samples:
        name = sample["name"]
        row = {"file_name": f"{name}.jpg", "text": sample["text"]}
        (folder / row["file_name"]).write_bytes(sample["image"])
        for kind in ("depth", "normal"):
            row[f"{kind}_file_name"] = f"{name}.{kind}.npy"
            (folder / f"{name}.{kind}.npy").write_bytes(npy(sample[kind]))
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def write_shards(folder, samples, per_shard=100):
    """000.tar, 001.tar, ... with key.jpg, key.txt, key.depth.npy and key.normal.npy."""
    folder.mkdir()
    samples = list(samples)
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        members = []
        for sample in samples[start : start + per_shard]:
            name = sample["name"]
            members.append((f"{name}.jpg", sample["image"]))
            members.append((f"{name}.txt", sample["text"].encode()))
            members.append((f"{name}.depth.npy", npy(sample["depth"])))
            members.append((f"{name}.normal.npy", npy(sample["normal"])))
        write_tar(folder / f"{shard:03}.tar", members)


def write_tar(path, members):
    """members: (name, bytes). A TarInfo or a bytearray in place of the bytes is written as it is."""
    with tarfile.open(path, "w") as file:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content = bytearray(content.tobuf(tarfile.GNU_FORMAT))
            if isinstance(content, bytearray):
                file.fileobj.write(content)
                file.offset += len(content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def write_moge(folder, samples):
    """MoGe's evaluation layout: .index.txt, and NAME/image.jpg, depth.png, meta.json. It has no captions."""
    folder.mkdir()
    names = []
    for sample in samples:
        names.append(sample["name"])
        own = folder / sample["name"]
        own.mkdir()
        height, width = sample["depth"].shape
        focal = 0.5 / np.tan(sample["fov"] / 2)  # in heights
        matrix = [[focal * height / width, 0, 0.5], [0, focal, 0.5], [0, 0, 1]]
        (own / "image.jpg").write_bytes(sample["image"])
        (own / "depth.png").write_bytes(log_coded_png(sample["depth"]))
        (own / "meta.json").write_text(json.dumps({"intrinsics": matrix}))
    (folder / ".index.txt").write_text("\n".join(names))


def log_coded_png(depth):
    """Depth (H, W) in metres, 0 where infinite -> bytes of MoGe's log-coded PNG."""
    near = depth[depth > 0].min()
    far = depth.max() * 1.001
    codes = 1 + np.round(65533 * np.log(np.maximum(depth, near) / near) / np.log(far / near))
    text = PngImagePlugin.PngInfo()
    text.add_text("near", repr(float(near)))
    text.add_text("far", repr(float(far)))
    picture = Image.fromarray(np.where(depth > 0, codes, 65535).astype(np.uint16))
    return data.to_bytes(picture.save, "PNG", pnginfo=text)


LAYOUTS = {"folder": write_folder, "shards": write_shards, "moge": write_moge}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layout", choices=LAYOUTS, default="shards")
    p.add_argument("--out", required=True, help="new directory")
    p.add_argument("--count", type=int, default=8)
    p.add_argument("--split", choices=data.SPLITS, default="val")
    p.add_argument("--size", type=int, default=32)
    args = p.parse_args()
    LAYOUTS[args.layout](Path(args.out), world_samples(args.split, (args.size, args.size), args.count))


if __name__ == "__main__":
    main()
