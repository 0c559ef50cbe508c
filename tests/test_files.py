"""Real data: depth formats, geometry, folders and shards, and what cannot be used."""

import argparse
import dataclasses
import itertools
import json
import os
import struct
import tarfile
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from layouts import log_coded_png, npy, world_samples, write_folder, write_moge, write_shards, write_tar
from PIL import Image, PngImagePlugin

import data
from model import DEPTH, NORMAL, RGB

MODALITIES = (RGB, DEPTH)


def settings(path, **changed):
    run = {"data": str(path), "workers": 0, "seed": 0, "batch_size": 8, "grad_accum": 1}
    run |= {"depth_scale": 0.001, "depth_min": 0.0, "depth_max": 0.0, "out": f"{path}.run"}
    return argparse.Namespace(**run | changed)


def to_bytes(array, kind, **options):
    return data.to_bytes(Image.fromarray(array).save, kind, **options)


def open_source(path, split="val", size=(16, 16), modalities=MODALITIES, **changed):
    return data.open_source(settings(path, **changed), split, size, modalities)


def training_batches(path, size=(16, 16), step=0, rank=0, ranks=1, modalities=MODALITIES, **changed):
    args = settings(path, **changed)
    if args.data != "synthetic":
        os.makedirs(args.out, exist_ok=True)
    source = data.open_source(args, "train", size, modalities)
    return data.training_batches(source, args, step, rank, ranks, "cpu")


PICTURE = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
JPEG = to_bytes(PICTURE, "JPEG")
DEPTH_MAP = np.linspace(1, 5, 256, dtype=np.float32).reshape(16, 16)


@pytest.fixture
def world(tmp_path):
    """30 scenes of the world in every layout: {layout: value of --data}."""
    samples = list(world_samples("val", (32, 32), 30))
    write_folder(tmp_path / "folder", samples)
    write_shards(tmp_path / "shards", samples, per_shard=13)
    write_moge(tmp_path / "moge", samples)
    return {"folder": tmp_path / "folder", "shards": f"{tmp_path}/shards/{{000..002}}.tar", "moge": tmp_path / "moge"}


# ---- Formats ----


def read_depth(name, content, **options):
    values, valid = data.read_map(DEPTH, name, content, **options)
    return values[..., 0], valid


def test_sixteen_bit_png_is_scaled_and_zero_is_missing():
    codes = np.array([[0, 1, 256], [1000, 65535, 2560]], np.uint16)
    depth, valid = read_depth("a.png", to_bytes(codes, "PNG"), scale=1 / 256)
    np.testing.assert_allclose(depth, codes / 256)
    assert (valid == (codes > 0)).all()
    _, valid = read_depth("a.png", to_bytes(codes, "PNG"), scale=1 / 256, low=0.5, high=10.0)
    assert valid.tolist() == [[False, False, True], [True, False, True]]  # a range keeps its upper end


def test_log_coded_png():
    """near at 1, far at 65534, geometric between; 0 unknown, 65535 infinite."""
    text = PngImagePlugin.PngInfo()
    text.add_text("near", "0.5")
    text.add_text("far", "50")
    codes = np.array([[1, 65534, 0, 65535, 32767, 12345]], np.uint16)
    depth, valid = read_depth("depth.png", to_bytes(codes, "PNG", pnginfo=text), scale=123.0)
    k = (codes[0, [4, 5]] - 1.0) / 65533
    np.testing.assert_allclose(depth[0, [0, 1, 4, 5]], [0.5, 50, *(0.5 ** (1 - k) * 50**k)], rtol=1e-5)
    assert valid.tolist() == [[True, True, False, False, True, True]]


def test_log_coded_png_round_trip():
    depth = np.where(DEPTH_MAP > 4.5, 0, DEPTH_MAP)
    read, valid = read_depth("depth.png", log_coded_png(depth))
    assert (valid == (depth > 0)).all()
    np.testing.assert_allclose(read[valid], depth[valid], rtol=3e-5)


@pytest.mark.parametrize("order", "<>")
def test_pfm_of_both_byte_orders_is_bottom_up(order):
    values = np.array([[1.5, 2, -1], [np.inf, np.nan, 4]], np.float32)
    content = f"Pf\n3 2\n{'-' if order == '<' else ''}1.0\n".encode() + values[::-1].astype(order + "f4").tobytes()
    depth, valid = read_depth("a.pfm", content)
    assert valid.tolist() == [[True, True, False], [False, False, True]] and depth[valid].tolist() == [1.5, 2, 4]


def test_npy_and_mask():
    values = np.array([[1.0, 0.0], [np.nan, 3.0]])
    assert read_depth("a.npy", npy(values[None]))[1].tolist() == [[True, False], [False, True]]
    mask = to_bytes(np.array([[255, 255], [255, 0]], np.uint8), "PNG")
    assert read_depth("a.npy", npy(values), mask=mask)[1].tolist() == [[True, False], [False, False]]
    opaque = np.array([[[9, 9, 9, 255], [0, 0, 0, 255]]] * 2, np.uint8)  # what is black is masked out, alpha or not
    masked = read_depth("a.npy", npy(values), mask=to_bytes(opaque, "PNG"))[1]
    assert masked.tolist() == [[True, False], [False, False]]
    with pytest.raises(data.BadSample, match="its mask"):
        read_depth("a.npy", npy(values), mask=to_bytes(PICTURE, "PNG"))


def test_normals_have_unit_length_and_may_be_missing():
    vectors = np.array([[[0, 0, -2], [3, 4, 0], [0, 0, 0], [np.nan, 0, 1], [0, np.inf, 0]]], np.float64)
    values, valid = data.read_map(NORMAL, "a.npy", npy(vectors))
    assert valid.tolist() == [[True, True, False, False, False]]
    np.testing.assert_allclose(values[0, :2], [[0, 0, -1], [0.6, 0.8, 0]], rtol=1e-6)
    for name, content in (("a.npy", npy(DEPTH_MAP)), ("a.png", to_bytes(PICTURE, "PNG"))):
        with pytest.raises(data.BadSample):
            data.read_map(NORMAL, name, content)


def test_images_are_a_map_too():
    values, valid = data.read_map(RGB, "a.png", to_bytes(PICTURE, "PNG"))
    np.testing.assert_allclose(values, PICTURE / 127.5 - 1, atol=1e-6)
    assert valid.all() and valid.shape == (16, 16)


# ---- Geometry ----


def whole_box(shape, size, position):
    return data.crop_box(shape, shape, size, position)


def brute_nearest(values, known, size, box):
    left, top, right, bottom = box
    tall, wide = (bottom - top) / size[0], (right - left) / size[1]
    out, found = np.zeros(size), np.zeros(size, bool)
    for i, j in itertools.product(range(size[0]), range(size[1])):
        y, x = top + (i + 0.5) * tall, left + (j + 0.5) * wide
        best = np.inf
        own = int(y), int(x)
        for r, c in itertools.product(range(values.shape[0]), range(values.shape[1])):
            inside = (
                top + i * tall <= r + 0.5 < top + (i + 1) * tall and left + j * wide <= c + 0.5 < left + (j + 1) * wide
            )
            away = (r + 0.5 - y) ** 2 + (c + 0.5 - x) ** 2
            if known[r, c] and (inside or (r, c) == own) and away < best:
                best, out[i, j], found[i, j] = away, values[r, c], True
    return out, found


@pytest.mark.parametrize("share", [0.03, 0.4, 0.95])
@pytest.mark.parametrize(
    ("shape", "size"), [((23, 31), (5, 7)), ((16, 16), (16, 16)), ((9, 12), (16, 20)), ((30, 13), (4, 4))]
)
def test_nearest_known_pixel_by_brute_force(share, shape, size):
    rng = np.random.default_rng(0)
    values, known = rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32), rng.random(shape) < share
    box = whole_box(shape, size, (0.3, 0.8))
    (out, found), (expected, expected_found) = (
        data.nearest(values, known, size, box),
        brute_nearest(values, known, size, box),
    )
    assert (found == expected_found).all()
    tall, wide = (box[3] - box[1]) / size[0], (box[2] - box[0]) / size[1]
    for i, j in np.argwhere(found & (out != expected)):  # ties: two known pixels, equally near
        y, x = box[1] + (i + 0.5) * tall, box[0] + (j + 0.5) * wide
        places = [np.argwhere(values == v)[0] + 0.5 for v in (out[i, j], expected[i, j])]
        assert np.ptp([np.hypot(*(place - (y, x))) for place in places]) < 1e-9
    full, all_found = data.nearest(values, known | True, size, box)
    assert all_found.all() and set(full.ravel()) <= set(values.ravel())  # nothing is averaged
    stacked, same = data.nearest(np.stack([values, -values, 2 * values], 2), known, size, box)
    assert (same == found).all()
    np.testing.assert_array_equal(stacked[found], np.stack([out, -out, 2 * out], 2)[found])


def test_sparse_depth_survives_shrinking():
    known = np.zeros((512, 512), bool)
    known[np.random.default_rng(0).integers(0, 512, (2, 200))[0], np.random.default_rng(1).integers(0, 512, 200)] = True
    _, found = data.nearest(np.ones((512, 512)), known, (64, 64), (0, 0, 512, 512))
    cells = np.zeros((64, 64), bool)
    cells[np.nonzero(known)[0] // 8, np.nonzero(known)[1] // 8] = True
    assert (found == cells).all()


def one_sample(training, contents, text="", modalities=MODALITIES):
    """A source of one sample: its image is "a", maps are NAME.npy. The number of an item is its epoch."""
    files = {"image": "a"} | {name.partition(".")[0]: name for name in contents if name.endswith(".npy")}
    sample = data.SampleFiles("a", "row", files=files, read=contents.get, row={"text": text})
    return data.Files(settings("x"), training, (32, 32), modalities, [sample])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0})])
def test_image_and_depth_are_cropped_together(training, down, kind, options):
    """A ramp along the image that is also its depth, at half the resolution: however it is cropped, they agree."""
    x, coarse = (np.broadcast_to(10 + 230 * (np.arange(n) + 0.5) / n, (n // 2, n)) for n in (400, 200))
    if down:
        x = x.T
        coarse = coarse.T
    picture = np.stack([x] * 3, -1).round().astype(np.uint8)
    files = {"a": to_bytes(picture, kind, **options), "depth.npy": npy(coarse)}
    source = one_sample(training, files)
    seen = set()
    for epoch in range(20 if training else 1):
        (maps, masks, *_), problems = data.collate([source[epoch]])
        depth = maps["depth"][0, :, :, 0]
        error = (maps["rgb"][0, :, :, 0] - depth)[1:-1, 1:-1]
        assert not problems and masks["depth"].all()
        assert error.abs().max() < 2.5 and error.mean().abs() < 0.5  # of 3.6 grey levels in a pixel
        first, last = depth[0, 0], depth[0, -1]
        seen.add((float(first.round()), bool(first > last)))
    assert len(seen) == 1 if not training else len(seen) > 10
    assert {mirrored for _, mirrored in seen} == ({False, True} if training and not down else {False})


def test_normals_are_cropped_and_mirrored_with_depth_and_turn_with_the_mirror():
    """Normals of a tilted plane, beside depth that is a ramp: where depth is mirrored, x of the normals flips."""
    ramp = np.broadcast_to(np.linspace(1, 2, 64, dtype=np.float32), (32, 64))
    normals = np.broadcast_to(np.array([0.6, 0.0, -0.8]), (32, 64, 3)).copy()
    normals[ramp > 1.7] = 0  # missing
    files = {"a": to_bytes(np.zeros((32, 64, 3), np.uint8), "PNG"), "depth.npy": npy(ramp), "normal.npy": npy(normals)}
    source = one_sample(True, files, modalities=(RGB, DEPTH, NORMAL))
    flipped = set()
    for epoch in range(20):
        (maps, masks, *_), _ = source[epoch]
        mirrored = maps["depth"][0, 0, 0] > maps["depth"][0, -1, 0]
        flipped.add(bool(mirrored))
        valid = masks["normal"]
        assert (valid == (maps["depth"][..., 0] <= 1.7)).all() and (maps["normal"][~valid] == 0).all()
        np.testing.assert_allclose(maps["normal"][valid] - [-0.6 if mirrored else 0.6, 0, -0.8], 0, atol=1e-6)
    assert flipped == {False, True}


def test_rounded_shapes_are_the_same_aspect():
    """KITTI at half its resolution has 187.5 rows; a square map of a wide picture is another thing."""
    assert data.crop_box((188, 621), (375, 1242), (375, 1242)) == (0, 0, 621, 188)
    assert data.crop_box((4000, 6000), (341, 512), (341, 512)) == (0, 0, 6000, 4000)
    assert all(
        min(data.crop_box((n, 741), (n, 741), (480, 640))) >= 0 for n in range(300, 741)
    )  # whatever the rounding
    with pytest.raises(data.BadSample, match="another shape"):
        data.crop_box((518, 518), (480, 640), (32, 32))


def test_captions_that_tell_left_from_right_are_never_mirrored():
    x = np.broadcast_to(np.linspace(10, 240, 32), (32, 32)).astype(np.uint8)
    for text, mirrored in (("a ball Left of a box", False), ("the right-hand door", False), ("a bright door", True)):
        source = one_sample(True, {"a": to_bytes(x, "PNG")}, text)
        rgb = [source[epoch][0][0]["rgb"] for epoch in range(20)]
        assert any((r[0, 0] > r[0, -1]).any() for r in rgb) == mirrored


def test_antialiased():
    """Stripes of one pixel become grey, from PNG and from JPEG's reduced scale, instead of a pattern."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for kind in ("PNG", "JPEG"):
        rgb, _ = data.load_image(to_bytes(stripes, kind), (64, 64))
        assert np.abs(rgb[4:-4, 4:-4].astype(int) - 127).max() <= 4


def exif(picture, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return data.to_bytes(Image.fromarray(picture).save, "PNG", exif=tags)


def convert(picture, mode, kind):
    return data.to_bytes(Image.fromarray(picture).convert(mode).save, kind)


def test_every_kind_of_picture_is_rgb():
    grey = PICTURE.mean(2).astype(np.uint8)
    same = {
        "CMYK": (convert(PICTURE, "CMYK", "TIFF"), PICTURE),
        "palette": (convert(PICTURE // 64 * 64, "P", "PNG"), None),
        "grey": (to_bytes(grey, "PNG"), np.stack([grey] * 3, -1)),
        "16-bit grey": (to_bytes(grey.astype(np.uint16) * 257, "PNG"), np.stack([grey] * 3, -1)),
        "exif": (exif(np.rot90(PICTURE, 1), 6), PICTURE),
    }
    for name, (content, expected) in same.items():
        rgb, whole = data.load_image(content)
        assert rgb.shape == (16, 16, 3) and whole == (16, 16), name
        assert expected is None or np.abs(rgb.astype(int) - expected).max() <= 1, name
    turned, whole = data.load_image(exif(np.rot90(PICTURE[:8], 1), 6), (4, 6))
    assert whole == (8, 16) and (turned == data.load_image(to_bytes(PICTURE[:8], "PNG"), (4, 6))[0]).all()
    assert data.load_image(exif(PICTURE[:8], 9))[1] == (8, 16)  # no such orientation
    clear = np.dstack([PICTURE, np.zeros((16, 16), np.uint8)])
    assert (data.load_image(to_bytes(clear, "PNG"))[0] == 255).all()  # what is transparent is white
    assert data.load_image(convert(PICTURE, "CMYK", "JPEG"), (8, 8))[0].shape == (8, 8, 3)


# ---- Sources ----


def everything(source, count=1000):
    """(values, valid, captions, names) of a source's samples."""
    batches = list(data.in_order(source, count, 7))
    values = {m: torch.cat([b.values[m] for b in batches]) for m in batches[0].values}
    valid = {m: torch.cat([b.valid[m] for b in batches]) for m in values if batches[0].valid[m] is not None}
    return values, valid, [c for b in batches for c in b.captions], [n for b in batches for n in b.names]


def test_the_world_is_the_same_in_every_layout(world):
    original, original_valid, captions, names = everything(data.SyntheticWorld("val", (32, 32)), 30)
    for layout, path in world.items():
        modalities = (RGB, DEPTH) if layout == "moge" else (RGB, DEPTH, NORMAL)
        values, valid, lines, found = everything(open_source(path, size=(32, 32), modalities=modalities))
        assert found == names and (lines == captions or layout == "moge")
        assert (values["rgb"] - original["rgb"]).abs().max() < 0.04  # JPEG
        for m in modalities[1:]:
            torch.testing.assert_close(values[m.name], original[m.name], rtol=3e-5, atol=1e-6)
            assert torch.equal(valid[m.name], original_valid[m.name])


def test_a_missing_modality_is_masked_out(world):
    values, valid, *_ = everything(open_source(world["moge"], modalities=(RGB, DEPTH, NORMAL)))
    assert valid["depth"].any() and not valid["normal"].any() and not values["normal"].any()
    assert values["normal"].shape == (30, 3, 16, 16) and valid["normal"].shape == (30, 1, 16, 16)


def test_the_world_refuses_a_modality_that_it_lacks(capsys):
    with pytest.raises(SystemExit):
        open_source("synthetic", modalities=(RGB, dataclasses.replace(NORMAL, name="albedo")))
    assert "--data synthetic: has no albedo" in capsys.readouterr().err


def test_training_sees_the_same_samples_in_every_layout(world):
    """One step over everything: the same crops, mirrored alike; without captions all may be mirrored."""
    step = {}
    for layout, path in world.items():
        batch = next(training_batches(path, (24, 24), batch_size=30))
        pictures = [tuple(values.flatten()[:200].tolist()) for values in batch.values["rgb"]]
        step[layout] = dict(zip(pictures, batch.captions, strict=True))
        assert len(step[layout]) == 30
    assert step["folder"] == step["shards"]
    free = {key for key, line in step["folder"].items() if "left" not in line and "right" not in line}
    assert len(free) > 8 and free <= set(step["moge"])


def uneven_shards(folder):
    """Seven shards of 1, 4, 9, ... samples with names 0, 1, 2, ..."""
    names = map(str, itertools.count())
    for shard, count in enumerate((1, 4, 9, 2, 30, 3, 12)):
        write_tar(folder / f"{shard}.tar", [(f"{next(names)}.jpg", JPEG) for _ in range(count)])
    return f"{folder}/{{0..6}}.tar", 61


def order_of(source, epoch):
    """Names of an epoch's samples, in order."""
    return [source.open_sample(epoch, position).name for position in range(len(source.entries))]


def counted(path):
    source = open_source(path, "train")
    if source.entries is None:
        source.entries = data.index_shards(source.shards)
    return source


@pytest.mark.parametrize("layout", ["folder", "shards"])
@pytest.mark.parametrize("window", [1, 2, 8])
def test_an_epoch_has_each_sample_once_in_an_order_of_its_own(layout, window, world, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", window)
    source = counted(uneven_shards(tmp_path)[0] if layout == "shards" else world["folder"])
    orders = [order_of(source, epoch) for epoch in range(3)]
    assert all(len(set(order)) == len(order) == len(source.entries) for order in orders)
    assert set(orders[0]) == set(orders[1]) and orders[0] != orders[1] != orders[2]
    again = counted(source.args.data)
    assert [order_of(again, epoch) for epoch in range(3)] == orders


def test_samples_are_shuffled_within_a_window_of_shards(tmp_path, monkeypatch):
    """Four shards of ten, two at a time: each half of the epoch has the samples of two whole shards, mixed."""
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [(f"{10 * shard + i}.jpg", JPEG) for i in range(10)])
    monkeypatch.setattr(data, "WINDOW", 2)
    order = [int(name) for name in order_of(counted(f"{tmp_path}/{{0..3}}.tar"), 0)]
    for half in (order[:20], order[20:]):
        shards = [i // 10 for i in half]
        assert sorted(shards.count(shard) for shard in set(shards)) == [10, 10]
        assert sum(a != b for a, b in itertools.pairwise(shards)) > 3


def batches_of(path, step, count, ranks=1, **changed):
    """For each of some steps (values, valid, captions, indices, names) of all ranks and parts of the batch together."""
    args = settings(path, **changed)
    streams = [training_batches(path, step=step, rank=rank, ranks=ranks, **changed) for rank in range(ranks)]
    steps = []
    for _ in range(count):
        parts = [next(stream) for stream in streams for _ in range(args.grad_accum)]
        assert all(len(part.indices) == args.batch_size // ranks // args.grad_accum for part in parts)
        values = {m: torch.cat([part.values[m] for part in parts]) for m in ("rgb", "depth")}
        valid = torch.cat([part.valid["depth"] for part in parts])
        lists = [
            [value for part in parts for value in getattr(part, name)] for name in ("captions", "indices", "names")
        ]
        steps.append((values, valid, *lists))
    return steps


def assert_same(steps, others, **tolerance):
    for (values, valid, *lists), (other_values, other_valid, *other_lists) in zip(steps, others, strict=True):
        for m in values:
            torch.testing.assert_close(values[m], other_values[m], **tolerance or {"rtol": 0, "atol": 0})
        assert torch.equal(valid, other_valid) and lists == other_lists


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_order_follows_from_the_seed_and_resumes(layout, world):
    whole = batches_of(world[layout], 0, 12, batch_size=4)
    others = batches_of(world[layout], 0, 12, batch_size=4, seed=1)
    assert not torch.equal(whole[0][0]["rgb"], others[0][0]["rgb"])
    for step in (1, 2, 9):  # 30 samples: into the second epoch
        assert_same(batches_of(world[layout], step, 12 - step, batch_size=4, workers=2), whole[step:])


@pytest.mark.parametrize("layout", ["folder", "shards", "synthetic"])
def test_a_step_is_the_same_however_it_is_split(layout, world, monkeypatch):
    """Over ranks, accumulation and workers, with a sample that cannot be read among them, and into the next epoch."""
    path = world.get(layout, "synthetic")
    if layout == "folder":
        (path / "000007.jpg").write_bytes(b"bad")
    monkeypatch.setattr(data, "WINDOW", 2)
    whole = batches_of(path, 2, 6)
    assert [indices for *_, indices, _ in whole] == [list(range(8 * step, 8 * step + 8)) for step in range(2, 8)]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if layout == "synthetic" else {}
    for split in ({"grad_accum": 4}, {"ranks": 2}, {"ranks": 2, "grad_accum": 2, "workers": 1}, {"workers": 2}):
        assert_same(batches_of(path, 2, 6, **split), whole, **tolerance)


def test_indices_in_training_are_global(world):
    """Another seed has other random numbers for its samples, in files as in the world."""
    for path in ("synthetic", world["folder"], world["shards"]):
        ((*_, indices, _),) = batches_of(path, 3, 1, seed=2)
        assert indices == list(data.training_indices(2, 3, 8))


@pytest.fixture
def headers(monkeypatch):
    """A list that gets the path of a tar file for each header that is read from it."""
    read, whole = [], tarfile.TarInfo.fromtarfile.__func__

    def counting(cls, file):
        read.append(file.name)
        return whole(cls, file)

    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(counting))
    return read


def test_resuming_reads_the_headers_of_its_own_samples(tmp_path, headers):
    """After 10,000 samples, 10 epochs: of each sample two headers, and of no other one."""
    for shard in range(10):
        write_tar(tmp_path / f"{shard}.tar", [(f"{100 * shard + i}.jpg", JPEG) for i in range(100)])
    path = f"{tmp_path}/{{0..9}}.tar"
    batches_of(path, step=0, count=1)
    assert len(headers) > 1000
    headers.clear()
    resumed = batches_of(path, step=1250, count=1)
    assert len(headers) <= 2 * 8
    assert_same(batches_of(path, 1250, 1, out=str(tmp_path / "other")), resumed)


def write_three_shards(folder):
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", [(f"{10 * shard + i}.jpg", JPEG) for i in range(10)])
    return [f"{folder}/{shard}.tar" for shard in range(3)]


def test_shards_are_counted_once_and_again_if_one_changes(tmp_path, headers, capsys):
    paths = write_three_shards(tmp_path)

    def counts(paths, workers=0):
        return np.bincount(data.kept_index(paths, tmp_path, workers, rank=0)[:, 0]).tolist()

    assert counts(paths) == [10, 10, 10]
    headers.clear()
    assert counts(paths, workers=2) == [10, 10, 10] and not headers
    assert not capsys.readouterr().err
    write_tar(tmp_path / "1.tar", [("x.jpg", JPEG)])
    assert counts(paths) == [10, 1, 10]
    assert headers and "changed" in capsys.readouterr().err
    headers.clear()
    assert counts(paths) == [10, 1, 10] and not headers


def test_other_ranks_wait_until_rank_0_has_counted(tmp_path, headers):
    paths = write_three_shards(tmp_path)
    found = []
    other = threading.Thread(target=lambda: found.append(data.kept_index(paths, tmp_path, 0, rank=1)))
    other.start()
    time.sleep(0.2)
    assert not found and not headers
    index = data.kept_index(paths, tmp_path, 0, rank=0)
    other.join(10)
    assert np.array_equal(found[0], index) and len(index) == 30


def test_an_evaluation_of_few_samples_reads_few_shards(tmp_path, headers):
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", JPEG) for i in range(10)])
    for shard in range(1, 20):
        os.link(tmp_path / "0.tar", tmp_path / f"{shard}.tar")
    source = open_source(f"{tmp_path}/{{0..19}}.tar")
    found = [name for batch in data.in_order(source, 8, 4) for name in batch.names]
    assert found == [str(i) for i in range(8)] and set(headers) == {f"{tmp_path}/0.tar"}
    assert sum(len(batch.names) for batch in data.in_order(source, 15, 4, workers=1)) == 15
    assert sum(len(batch.names) for batch in data.in_order(source, None, 50)) == 200


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_few_samples_and_many_workers(tmp_path):
    """One picture and four workers: everyone gets a turn."""
    write_tar(tmp_path / "one.tar", [("a.jpg", JPEG)])
    stream = training_batches(tmp_path / "one.tar", workers=4, batch_size=2)
    assert all(next(stream).values["rgb"].shape == (2, 3, 16, 16) for _ in range(6))


def test_a_bad_batch_keeps_later_samples_in_place(tmp_path):
    """A batch without any usable sample is still a batch: later ones keep their place."""
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG if i != 3 else b"bad") for i in range(7)])

    def sums(step):
        stream = training_batches(tmp_path / "a.tar", step=step, batch_size=1)
        return [batch.values["rgb"].sum().item() for batch in itertools.islice(stream, 20 - step)]

    assert sums(0)[11:] == sums(11)


def test_an_evaluation_reads_no_further_than_it_has_to(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG if i < 3 else b"bad") for i in range(7)])
    for batch_size in (1, 2, 7):
        source = open_source(tmp_path / "a.tar")
        assert sum(len(batch.names) for batch in data.in_order(source, 3, batch_size)) == 3


def test_file_names_cannot_leave_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path / "f", ['{"file_name": "../f/b.jpg"}', '{"file_name": "../secret.jpg"}']))
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    source = open_source(".")
    (*_, names, _), problems = data.collate([source[i] for i in range(len(source.entries))])
    assert names == ("a", "../f/b") and len(problems) == 1 and "../secret.jpg: leads out" in problems[0]


def test_brace_ranges(capsys):
    for pattern in (
        "x{5..3}.tar",
        "x{0..99999999999}.tar",
        f"x{{0..{'9' * 5000}}}.tar",
        "x{0..1999}{0..1999}.tar",
        "{0..0}" * 2000,
        "x" * 5000,
    ):
        start = time.perf_counter()
        with pytest.raises(SystemExit) as stopped:
            open_source(pattern, "train")
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and len(message.splitlines()) == 1 and len(message) < 600, message
        assert time.perf_counter() - start < 1
    assert data.expand("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert data.expand("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]


def test_metadata_of_shards(tmp_path):
    """img2dataset's .json caption, a .txt that goes before it, a scale and a mask; names up to the first dot."""
    codes, mask = np.full((16, 16), 512, np.uint16), np.full((16, 16), 255, np.uint8)
    mask[0] = 0
    group = {
        "json": json.dumps({"caption": "from json", "depth_scale": 1 / 256}).encode(),
        "depth.png": to_bytes(codes, "PNG"),
    }
    group |= {"mask.png": to_bytes(mask, "PNG"), "JPG": JPEG}
    members = [(f"v1.0/a.{suffix}", content) for suffix, content in group.items()]
    members += [("v1.0/b.webp", to_bytes(PICTURE, "WEBP")), ("v1.0/b.txt", "überall".encode()), ("v1.0/b.json", b"{}")]
    write_tar(
        tmp_path / "a.tar",
        [*members, ("v1.0/._a.jpg", b"mac"), ("v1.0/c.jpg", JPEG), ("v1.0/c.json", b'{"caption": null}')],
    )
    values, _, captions, names = everything(open_source(tmp_path / "a.tar"))
    assert names == ["v1.0/a", "v1.0/b", "v1.0/c"] and captions == ["from json", "überall", ""]
    depth = values["depth"]
    assert (depth[0, 0, 1:] == 2).all() and not depth[0, 0, 0].any() and not depth[1:].any()


def test_rows_without_depth_and_text(tmp_path):
    for name, content in (("a.jpg", JPEG), ("b.jpg", JPEG), ("b.npy", npy(DEPTH_MAP))):
        (tmp_path / name).write_bytes(content)
    rows = [{"file_name": "a.jpg", "text": "alone"}, {"file_name": "b.jpg", "text": None, "depth_file_name": "b.npy"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    values, _, captions, _ = everything(open_source(tmp_path))
    assert captions == ["alone", ""] and not values["depth"][0].any()
    np.testing.assert_array_equal(values["depth"][1, 0], DEPTH_MAP)


# ---- What cannot be used: one line that names it ----


def huge(side, depth=False):
    """A PNG, of a picture or of depth, whose header says that it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, *((16, 0) if depth else (8, 2)), 0, 0, 0)
    content = to_bytes(PICTURE, "PNG")
    chunk = b"IHDR" + header
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def declared(name, **fields):
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def header_of_npy(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header


def sparse(name, size):
    """The header of a GNU sparse member of 512 bytes that says how large the file is that it stands for."""
    header = bytearray(declared(name, size=512, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512  # the first piece that is not a hole: where, and how long
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return header + bytes(512)


def zipped():
    return data.to_bytes(np.savez, a=DEPTH_MAP)


GREY16 = to_bytes((DEPTH_MAP * 1000).astype(np.uint16), "PNG")
IMAGE_FILES = {  # name of the image file: its content, what the line says
    "cut.jpg": (JPEG[:-60], "cut.jpg: image file is truncated"),
    "cut.png": (to_bytes(PICTURE, "PNG")[:300], "cut.png"),
    "zip.png": (zipped(), "zip.png: not an image"),
    "huge.png": (huge(60000), "huge.png: Image size (3600000000 pixels) exceeds"),
    "large.png": (huge(8001), "large.png: has 64,016,001 pixels; at most 64,000,000 are read"),
    "warned.png": (huge(9500), "warned.png: has 90,250,000 pixels"),  # where Pillow warns
    "empty.jpg": (b"", "empty.jpg: not an image"),
}
DEPTH_FILES = {
    "cut16.png": (GREY16[: len(GREY16) // 2], "cut16.png"),
    "eight.png": (to_bytes(PICTURE[..., 0], "PNG"), "holds 256 depths"),
    "colour.png": (to_bytes(PICTURE, "PNG"), "is a picture of depth"),
    "zeros.npy": (npy(DEPTH_MAP * 0), "no valid pixel"),
    "nan.npy": (npy(DEPTH_MAP * np.nan), "no valid pixel"),
    "missing.png": (to_bytes(np.zeros((16, 16), np.uint16), "PNG"), "no valid pixel"),
    "wide.npy": (
        npy(np.ones((16, 24), np.float32)),
        "wide.npy: has another shape than its image: (16, 24) instead of (16, 16)",
    ),
    "object.npy": (npy(np.array([{}], object)), "object.npy: holds object; must hold real numbers"),
    "three.npy": (npy(np.ones((16, 16, 3))), "three.npy: has shape (16, 16, 3)"),
    "cut.npy": (npy(DEPTH_MAP)[:500], "cut.npy"),
    "zip.npy": (zipped(), "zip.npy"),
    "cut.pfm": (b"Pf\n16 16\n-1.0\n" + bytes(100), "cut.pfm"),
    "colour.pfm": (b"PF\n16 16\n-1.0\n" + bytes(3072), "colour.pfm: not a one-channel PFM"),
    "large16.png": (huge(8001, depth=True), "large16.png: has 64,016,001 pixels"),
    "large.npy": (header_of_npy("(8001, 8001)"), "large.npy: has 64,016,001 pixels"),
    "large.pfm": (b"Pf\n8001 8001\n-1.0\n" + bytes(100), "large.pfm: has 64,016,001 pixels"),
    "endless.pfm": (b"Pf\n" + b"9" * 5000 + b" 8001\n-1.0\n", "endless.pfm: "),
    "wordy.npy": (header_of_npy("(" + "1, " * 100_000 + ")"), "wordy.npy: "),
    "overflow.npy": (npy(np.full((16, 16), 1e300)), "no valid pixel"),
    "depth.exr": (b"v/1\x01", "depth is read from png, npy, pfm"),
}
ROWS = {  # lines of metadata.jsonl after a good one
    '{"file_name": "a.jpg", ': "metadata.jsonl row 2: not UTF-8 JSON",
    '{"text": "no file"}': "metadata.jsonl row 2: not UTF-8 JSON with a file_name",
    '["a.jpg"]': "metadata.jsonl row 2",
    '{"file_name": "nowhere.jpg"}': "metadata.jsonl row 2: nowhere.jpg: No such file",
    '{"file_name": "../secret.jpg"}': "metadata.jsonl row 2: ../secret.jpg: leads out",
    '{"file_name": "/etc/passwd"}': "metadata.jsonl row 2: /etc/passwd: leads out",
    '{"file_name": "a.jpg", "depth_file_name": "../secret.npy"}': "metadata.jsonl row 2: names a.jpg again",
    '{"file_name": "b.jpg", "depth_file_name": "../secret.npy"}': "metadata.jsonl row 2: ../secret.npy: leads out",
    '{"file_name": "b.jpg", "text": 7}': "row 2: its caption is not text",
    '{"file_name": "b.jpg", "depth_file_name": 7}': "metadata.jsonl row 2: 7: No such file",
    '{"file_name": "b.jpg", "text": false}': "row 2: its caption is not text",
    '{"file_name": "b.jpg", "text": ["b"]}': "row 2: its caption is not text",
    '{"file_name": "\\u0000.jpg"}': "metadata.jsonl row 2: \\x00.jpg: embedded null byte",
    json.dumps({"file_name": "long" * 100_000}): ": File name too long",
    '{"file_name": "a\\nb.jpg"}': "metadata.jsonl row 2: a b.jpg: No such file",
    '{"file_name": "\\ud800.jpg"}': "metadata.jsonl row 2: ",
    '{"file_name": "b.jpg", "text": "\\ud800"}': "row 2: 'utf-8' codec can't encode",
    json.dumps({"file_name": "b.jpg", "text": "word " * 200_000}): "row 2: its caption is not text, or longer than",
    b'{"file_name": "b.jpg", "text": "\xff"}': "metadata.jsonl row 2: not UTF-8",
}
ROWS |= {
    json.dumps(
        {"file_name": "b.jpg", "depth_file_name": "d.npy", "depth_scale": scale}
    ): f"depth_scale {scale!r} is not"
    for scale in (0, -1, "0.001", [1], True, float("nan"), float("inf"))
}
SHARDS = {
    "link": ([("b.jpg", declared("b.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"))], "b.jpg is a link"),
    "absolute": ([("/outside/b.jpg", JPEG)], "/outside/b.jpg is a name that leads out"),
    "dots": ([("../b.jpg", JPEG)], "../b.jpg is a name that leads out"),
    "negative": ([("b.jpg", declared("b.jpg", size=-512))], "damaged ("),
    "negative, large": ([("b.jpg", declared("b.jpg", size=-(1 << 40)))], "damaged ("),
    "slightly negative": ([("b.jpg", declared("b.jpg", size=-1))], "damaged ("),
    "long name": ([("b", declared("b", size=8 << 30, type=tarfile.GNUTYPE_LONGNAME))], "a header of 8589934592 bytes"),
    "negative name": ([("b", declared("b", size=-512, type=tarfile.GNUTYPE_LONGNAME))], "a header of -512 bytes"),
    "sparse": ([("b.jpg", sparse("b.jpg", 1 << 20))], "b.jpg is a link, a device or sparse"),
    "negative, sparse": ([("b.jpg", sparse("b.jpg", -1))], "damaged ("),
    "scale": (
        [("b.jpg", JPEG), ("b.depth.npy", npy(DEPTH_MAP)), ("b.json", b'{"depth_scale": "1"}')],
        "depth_scale '1'",
    ),
    "long": ([(f"{'b' * 5000}.jpg", b"")], "bbb: jpg: not an image"),
    "empty member": ([("b.jpg", b"")], "b: jpg: not an image"),
    "many gigabytes": ([("b.jpg", declared("b.jpg", size=8 << 30))], "b: jpg: declares 8589934592 bytes"),
    "no image": ([("b.txt", b"words alone")], "b: no image"),
    "not UTF-8": ([("b.jpg", JPEG), ("b.txt", b"\xff\xfe")], "b: txt: 'utf-8' codec can't decode"),
    "megabyte": ([("b.jpg", JPEG), ("b.txt", b"word " * 200_000)], "b: its caption is not text, or longer than"),
    "json": ([("b.jpg", JPEG), ("b.json", b"[1")], "b: json: Expecting"),
}


def folder(path, rows, files=()):
    path.mkdir()
    for name, content in (("a.jpg", JPEG), ("b.jpg", JPEG), ("d.npy", npy(DEPTH_MAP)), *files):
        (path / name).write_bytes(content)
    lines = [
        b'{"file_name": "a.jpg", "depth_file_name": "d.npy"}',
        *(r if isinstance(r, bytes) else r.encode() for r in rows),
    ]
    (path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return path


def bad_sources(tmp_path):
    """(name, value of --data, what the line says): each holds one good sample and a bad one."""
    for i, (name, (content, says)) in enumerate(IMAGE_FILES.items()):
        yield name, folder(tmp_path / f"i{i}", [json.dumps({"file_name": name})], [(name, content)]), says
    for i, (name, (content, says)) in enumerate(DEPTH_FILES.items()):
        row = json.dumps({"file_name": "b.jpg", "depth_file_name": name})
        yield name, folder(tmp_path / f"d{i}", [row], [(name, content)]), says
    for i, (row, says) in enumerate(ROWS.items()):
        yield str(row)[:60], folder(tmp_path / f"r{i}", [row]), says
    for i, (name, (members, says)) in enumerate(SHARDS.items()):
        write_tar(tmp_path / f"s{i}.tar", [("a.jpg", JPEG), *members])
        yield name, tmp_path / f"s{i}.tar", says
    write_tar(tmp_path / "whole.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    whole = (tmp_path / "whole.tar").read_bytes()
    for name, cut in (("in a member", 1024 + 1000), ("between members", 1024 + 512), ("within a header", 1024 + 700)):
        (tmp_path / f"cut {name}.tar").write_bytes(whole[:cut])
        yield f"cut {name}", tmp_path / f"cut {name}.tar", f"cut {name}.tar: "
    (tmp_path / "text.tar").write_text("not a tar file, " * 100)
    yield "text.tar", tmp_path / "text.tar", "text.tar: damaged"
    (tmp_path / "zero.tar").write_bytes(b"")
    yield "zero.tar", tmp_path / "zero.tar", "zero.tar: damaged"
    write_tar(tmp_path / "hollow.tar", [])
    yield "hollow.tar", tmp_path / "hollow.tar", "hollow.tar: holds no sample"


def test_bad_samples_end_an_evaluation_with_one_line(tmp_path, capsys):
    for name, path, says in bad_sources(tmp_path):
        with pytest.raises(SystemExit) as stopped:
            everything(open_source(path))
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and len(message.splitlines()) == 1 and says in message, (name, message)
        assert len(message) < len(str(path)) + 260, (name, message)


def test_warnings_of_libraries_do_not_reach_the_user(tmp_path):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for content in (npy(np.full((16, 16), 1e300)), huge(9500)):
            with pytest.raises(data.BadSample), data.reading("a"):
                data.read_map(DEPTH, "a.npy" if content[:1] == b"\x93" else "a.png", content)
    assert not warned


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "zero", tmp_path, "/dev/zero"):
        with pytest.raises(data.BadSample, match="not a regular file"):
            data.read_file(path)


def test_no_more_of_a_file_is_read_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    (tmp_path / "a").write_bytes(bytes(1000))
    assert data.read_file(tmp_path / "a") == bytes(1000)
    (tmp_path / "b").write_bytes(bytes(1001))
    with pytest.raises(data.BadSample, match="larger than"):
        data.read_file(tmp_path / "b")


def test_bad_samples_are_skipped_in_training(tmp_path, capsys):
    for name, path, says in bad_sources(tmp_path):
        if "cut" in name or name.endswith(".tar"):
            continue
        for batch in itertools.islice(training_batches(path, batch_size=2), 3):
            assert batch.values["rgb"].shape == (2, 3, 16, 16), name  # the good one stands in
        message = capsys.readouterr().err
        assert says in message and all(line.startswith("skipped, ") for line in message.splitlines()), (name, message)


def test_more_than_one_percent_stops_training(tmp_path, capsys):
    source = folder(tmp_path / "f", [json.dumps({"file_name": f"{i}.jpg"}) for i in range(20)])
    with pytest.raises(SystemExit) as stopped:
        for _ in training_batches(source, batch_size=7):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 11 and all(line.startswith("skipped, ") for line in lines[:10])
    assert "more than 1%" in lines[-1] and ".jpg: No such file" in lines[-1]


def test_one_bad_sample_in_many_is_tolerated(tmp_path, capsys):
    """0.5% of the samples: named once, and training goes on for 4,000 samples."""
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG if i else b"bad") for i in range(200)])
    stream = training_batches(tmp_path / "a.tar", batch_size=100)
    for _ in range(40):
        next(stream)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_damaged_shard_gives_what_comes_before_the_damage(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", JPEG) for i in range(5)])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: 3 * (512 + 1024) + 600])
    path = tmp_path / "a.tar"
    *whole, cut, damage = [next(data.list_shard(path, offset))[1] for offset in data.sample_offsets(path)]
    assert [sample.name for sample in whole] == ["0", "1", "2"]
    assert all(sample.read(sample.files["image"]) == JPEG for sample in whole)
    with pytest.raises(data.BadSample, match="cut short"):
        cut.read("jpg")
    assert "damaged" in damage.problem
    path.write_bytes(content[: 3 * (512 + 1024)] + b"x" * 2048)  # no header where one should be
    assert [sample.name for _, sample in data.list_shard(path)][:-1] == ["0", "1", "2"]
