"""Real data: depth formats, geometry, folders and shards, and files that cannot be read."""

import argparse
import dataclasses
import itertools
import json
import os
import struct
import tarfile
import threading
import time
import zlib
from types import SimpleNamespace

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


def test_npy_may_have_an_axis_of_length_one():
    values = np.array([[1.0, 0.0], [np.nan, 3.0]])
    for array in (values, values[None], values[..., None]):
        depth, valid = read_depth("a.npy", npy(array))
        assert valid.tolist() == [[True, False], [False, True]]
        assert depth[valid].tolist() == [1, 3]


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


def cell_geometry(size, box):
    """For each cell (i, j): (its index, the coordinates of its centre, its height and width), in pixels of the map."""
    left, top, right, bottom = box
    tall = (bottom - top) / size[0]
    wide = (right - left) / size[1]
    for i, j in itertools.product(range(size[0]), range(size[1])):
        yield (i, j), (top + (i + 0.5) * tall, left + (j + 0.5) * wide), (tall, wide)


def brute_nearest(values, valid, size, box):
    """data.nearest by its definition: look at all pixels for each cell."""
    out = np.zeros(size)
    found = np.zeros(size, bool)
    for cell, (y, x), (tall, wide) in cell_geometry(size, box):
        best = np.inf
        under_centre = (int(y), int(x))
        for r, c in np.argwhere(valid):
            down = r + 0.5 - y
            across = c + 0.5 - x
            is_covered = -tall / 2 <= down < tall / 2 and -wide / 2 <= across < wide / 2
            if (is_covered or (r, c) == under_centre) and down**2 + across**2 < best:
                best = down**2 + across**2
                out[cell] = values[r, c]
                found[cell] = True
    return out, found


@pytest.mark.parametrize("share", [0.03, 0.4, 0.95])
@pytest.mark.parametrize(
    ("shape", "size"), [((23, 31), (5, 7)), ((16, 16), (16, 16)), ((9, 12), (16, 20)), ((30, 13), (4, 4))]
)
def test_nearest_valid_pixel_by_brute_force(share, shape, size):
    rng = np.random.default_rng(0)
    values = rng.permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    valid = rng.random(shape) < share
    box = data.crop_box(shape, shape, size, (0.3, 0.8))
    out, found = data.nearest(values, valid, size, box)
    expected, expected_found = brute_nearest(values, valid, size, box)
    assert (found == expected_found).all()
    for cell, centre, _ in cell_geometry(size, box):  # two valid pixels may be equally near
        if found[cell]:
            places = [np.argwhere(values == value)[0] + 0.5 for value in (out[cell], expected[cell])]
            assert np.ptp([np.hypot(*(place - centre)) for place in places]) < 1e-9

    full, all_found = data.nearest(values, np.ones(shape, bool), size, box)
    assert all_found.all() and set(full.ravel()) <= set(values.ravel())  # nothing is averaged
    stacked, same = data.nearest(np.stack([values, -values, 2 * values], 2), valid, size, box)
    assert (same == found).all()
    np.testing.assert_array_equal(stacked[found], np.stack([out, -out, 2 * out], 2)[found])


def test_sparse_depth_survives_shrinking():
    known = np.zeros((512, 512), bool)
    known[np.random.default_rng(0).integers(0, 512, (2, 200))[0], np.random.default_rng(1).integers(0, 512, 200)] = True
    _, found = data.nearest(np.ones((512, 512)), known, (64, 64), (0, 0, 512, 512))
    cells = np.zeros((64, 64), bool)
    cells[np.nonzero(known)[0] // 8, np.nonzero(known)[1] // 8] = True
    assert (found == cells).all()


def one_sample(folder, training, contents, text="", modalities=MODALITIES):
    """A source of one sample: its image is "a", maps are NAME.npy. The number of an item is its epoch."""
    files = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        kind = name.removesuffix(".npy") if name.endswith(".npy") else "image"
        files[kind] = folder / name
    sample = data.SampleFiles("a", files, text)
    return data.FileDataset(settings("x"), training, (32, 32), modalities, [sample])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0})])
def test_image_and_depth_are_cropped_together(training, down, kind, options, tmp_path):
    """A ramp along the image that is also its depth, at half the resolution: however it is cropped, they agree."""
    x, coarse = (np.broadcast_to(10 + 230 * (np.arange(n) + 0.5) / n, (n // 2, n)) for n in (400, 200))
    if down:
        x = x.T
        coarse = coarse.T
    picture = np.stack([x] * 3, -1).round().astype(np.uint8)
    files = {"a": to_bytes(picture, kind, **options), "depth.npy": npy(coarse)}
    source = one_sample(tmp_path, training, files)
    seen = set()
    for epoch in range(20 if training else 1):
        sample = source[epoch]
        depth = sample["maps"]["depth"][:, :, 0]
        error = (sample["maps"]["rgb"][:, :, 0] - depth)[1:-1, 1:-1]
        assert sample["masks"]["depth"].all()
        assert np.abs(error).max() < 2.5 and np.abs(error.mean()) < 0.5  # of 3.6 grey levels in a pixel
        seen.add((float(depth[0, 0].round()), bool(depth[0, 0] > depth[0, -1])))
    assert len(seen) == 1 if not training else len(seen) > 10
    assert {mirrored for _, mirrored in seen} == ({False, True} if training and not down else {False})


def test_normals_are_cropped_and_mirrored_with_depth_and_turn_with_the_mirror(tmp_path):
    """Normals of a tilted plane, beside depth that is a ramp: where depth is mirrored, x of the normals flips."""
    ramp = np.broadcast_to(np.linspace(1, 2, 64, dtype=np.float32), (32, 64))
    normals = np.broadcast_to(np.array([0.6, 0.0, -0.8]), (32, 64, 3)).copy()
    normals[ramp > 1.7] = 0  # missing
    files = {"a": to_bytes(np.zeros((32, 64, 3), np.uint8), "PNG"), "depth.npy": npy(ramp), "normal.npy": npy(normals)}
    source = one_sample(tmp_path, True, files, modalities=(RGB, DEPTH, NORMAL))
    flipped = set()
    for epoch in range(20):
        maps = source[epoch]["maps"]
        mirrored = maps["depth"][0, 0, 0] > maps["depth"][0, -1, 0]
        flipped.add(bool(mirrored))
        valid = source[epoch]["masks"]["normal"]
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


def test_captions_that_tell_left_from_right_are_never_mirrored(tmp_path):
    x = np.broadcast_to(np.linspace(10, 240, 32), (32, 32)).astype(np.uint8)
    for text, mirrored in (("a ball Left of a box", False), ("the right-hand door", False), ("a bright door", True)):
        source = one_sample(tmp_path, True, {"a": to_bytes(x, "PNG")}, text)
        rgb = [source[epoch]["maps"]["rgb"] for epoch in range(20)]
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
        "palette": (convert(PICTURE // 64 * 64, "P", "PNG"), None),
        "grey": (to_bytes(grey, "PNG"), np.stack([grey] * 3, -1)),
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


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own():
    orders = [data.epoch_order(30, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_training_sees_each_sample_once_in_an_epoch(layout, world, tmp_path):
    """The samples of all shards are shuffled together, however unequal the shards are."""
    path = world["folder"]
    count = 30
    if layout == "shards":
        path, count = uneven_shards(tmp_path)
    batches = itertools.islice(training_batches(path, batch_size=count), 3)
    orders = [batch.names for batch in batches]
    assert all(len(set(order)) == count for order in orders)
    assert set(orders[0]) == set(orders[1]) and orders[0] != orders[1] != orders[2]


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
def test_a_step_is_the_same_however_it_is_split(layout, world):
    """Over ranks, accumulation and workers, with a sample that cannot be read among them, and into the next epoch."""
    path = world.get(layout, "synthetic")
    if layout == "folder":
        (path / "000007.jpg").write_bytes(b"bad")
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
    read = []
    from_tarfile = tarfile.TarInfo.fromtarfile.__func__

    def counting(cls, file):
        read.append(file.name)
        return from_tarfile(cls, file)

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


def test_shards_are_counted_once_and_again_if_one_changes(tmp_path, headers):
    paths = write_three_shards(tmp_path)

    def counts(paths, workers=0):
        return np.bincount(data.saved_index(paths, tmp_path, workers, rank=0)[:, 0]).tolist()

    assert counts(paths) == [10, 10, 10]
    headers.clear()
    assert counts(paths, workers=2) == [10, 10, 10] and not headers
    write_tar(tmp_path / "1.tar", [("x.jpg", JPEG)])
    assert counts(paths) == [10, 1, 10]
    assert headers
    headers.clear()
    assert counts(paths) == [10, 1, 10] and not headers


def test_other_ranks_wait_until_rank_0_has_counted(tmp_path, headers, monkeypatch):
    barrier = threading.Barrier(2)
    ranks = SimpleNamespace(is_initialized=lambda: True, barrier=lambda: barrier.wait(10))
    monkeypatch.setattr(data, "dist", ranks)
    paths = write_three_shards(tmp_path)
    found = []
    other = threading.Thread(target=lambda: found.append(data.saved_index(paths, tmp_path, 0, rank=1)))
    other.start()
    time.sleep(0.2)
    assert not found and not headers
    index = data.saved_index(paths, tmp_path, 0, rank=0)
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


def test_brace_ranges(capsys):
    assert data.expand("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert data.expand("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert data.expand("{0..1}{0..1}.tar") == ["00.tar", "01.tar", "10.tar", "11.tar"]
    for pattern in ("x{5..3}.tar", "x{0..3}.tar"):
        assert f"--data {pattern}: unknown source, no file" in refused(capsys, open_source, pattern)


def test_names_in_shards(tmp_path):
    """Names up to the first dot of a file; suffixes in any case; directories, hidden files and others are left out."""
    members = [
        ("v1.0/a.depth.npy", npy(DEPTH_MAP)),
        ("v1.0/a.JPG", JPEG),
        ("v1.0/a.json", b"{}"),
        ("v1.0/b.webp", to_bytes(PICTURE, "WEBP")),
        ("v1.0/._b.txt", b"mac"),
        ("v1.0/b.txt", "überall".encode()),
        ("v1.0/words.txt", b"no image"),
        ("v1.0/c.jpg", JPEG),
    ]
    write_tar(tmp_path / "a.tar", members)
    values, _, captions, names = everything(open_source(tmp_path / "a.tar"))
    assert names == ["v1.0/a", "v1.0/b", "v1.0/c"] and captions == ["", "überall", ""]
    depth = values["depth"]
    np.testing.assert_array_equal(depth[0, 0], DEPTH_MAP)
    assert not depth[1:].any()


def test_rows_without_depth_and_text(tmp_path):
    for name, content in (("a.jpg", JPEG), ("b.jpg", JPEG), ("b.npy", npy(DEPTH_MAP))):
        (tmp_path / name).write_bytes(content)
    rows = [{"file_name": "a.jpg", "text": "alone"}, {"file_name": "b.jpg", "text": None, "depth_file_name": "b.npy"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    values, _, captions, _ = everything(open_source(tmp_path))
    assert captions == ["alone", ""] and not values["depth"][0].any()
    np.testing.assert_array_equal(values["depth"][1, 0], DEPTH_MAP)


# ---- Files that cannot be read: one line names the file and the problem ----


def read_all(path, **options):
    """Read all samples as an evaluation does."""
    return list(data.in_order(open_source(path), None, 7, **options))


def train_once(path):
    """Read the samples of one step as training does."""
    return next(training_batches(path))


def refused(capsys, call, *args, **options):
    """What call prints as it ends the program with exit code 2: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*args, **options)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(message.splitlines()) == 1, message
    return message


def decompression_bomb():
    """A PNG whose header says that it has 60000 x 60000 pixels."""
    content = to_bytes(PICTURE, "PNG")
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


GREY16 = to_bytes((DEPTH_MAP * 1000).astype(np.uint16), "PNG")
IMAGE_FILES = {  # name of the image file: its content, what the line says
    "cut.jpg": (JPEG[:-60], "cut.jpg: image file is truncated"),
    "cut.png": (to_bytes(PICTURE, "PNG")[:300], "cut.png"),
    "text.png": (b"not an image", "text.png: not an image"),
    "huge.png": (decompression_bomb(), "huge.png: Image size (3600000000 pixels) exceeds"),
    "empty.jpg": (b"", "empty.jpg: not an image"),
}
DEPTH_FILES = {
    "cut16.png": (GREY16[: len(GREY16) // 2], "cut16.png"),
    "eight.png": (to_bytes(PICTURE[..., 0], "PNG"), "eight.png: a PNG of mode L is a picture, not depth"),
    "colour.png": (to_bytes(PICTURE, "PNG"), "colour.png: a PNG of mode RGB is a picture, not depth"),
    "zeros.npy": (npy(DEPTH_MAP * 0), "zeros.npy: no valid pixel"),
    "nan.npy": (npy(DEPTH_MAP * np.nan), "nan.npy: no valid pixel"),
    "missing.png": (to_bytes(np.zeros((16, 16), np.uint16), "PNG"), "missing.png: no valid pixel"),
    "wide.npy": (
        npy(np.ones((16, 24), np.float32)),
        "wide.npy: has another shape than its image: (16, 24) instead of (16, 16)",
    ),
    "object.npy": (npy(np.array([{}], object)), "object.npy: Object arrays cannot be loaded"),
    "three.npy": (npy(np.ones((16, 16, 3))), "three.npy: has shape (16, 16, 3)"),
    "cut.npy": (npy(DEPTH_MAP)[:500], "cut.npy"),
    "depth.exr": (b"v/1\x01", "depth.exr: depth is read from png, npy"),
}
ROWS = {  # lines of metadata.jsonl after a good one
    '{"file_name": "a.jpg", ': "metadata.jsonl row 2: must be a JSON dictionary",
    '{"text": "no file"}': "metadata.jsonl row 2: must be a JSON dictionary with a file_name",
    '["a.jpg"]': "metadata.jsonl row 2",
    '{"file_name": 7}': "metadata.jsonl row 2",
    '{"file_name": "nowhere.jpg"}': "nowhere.jpg: No such file",
    '{"file_name": "b.jpg", "depth_file_name": 7}': "metadata.jsonl row 2",
    '{"file_name": "b.jpg", "depth_file_name": "none.npy"}': "none.npy: No such file",
    '{"file_name": "b.jpg", "text": ["b"]}': "row 2: must be a JSON dictionary with a file_name; text and",
    b'{"file_name": "b.jpg", "text": "\xff"}': "metadata.jsonl row 2",
}
SHARDS = {  # names of members and their contents, after a good sample
    "damaged image": ([("b.jpg", b"bad")], ".tar: b.jpg: not an image"),
    "not UTF-8": ([("b.jpg", JPEG), ("b.txt", b"\xff\xfe")], ".tar: b.txt: 'utf-8' codec can't decode"),
    "depth": ([("b.jpg", JPEG), ("b.depth.png", JPEG)], ".tar: b.depth.png: not an image"),
}


def folder(path, rows, files=()):
    path.mkdir()
    for name, content in (("a.jpg", JPEG), ("b.jpg", JPEG), ("d.npy", npy(DEPTH_MAP)), *files):
        (path / name).write_bytes(content)
    lines = [b'{"file_name": "a.jpg", "depth_file_name": "d.npy"}']
    lines += [row if isinstance(row, bytes) else row.encode() for row in rows]
    (path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return path


def unreadable_samples(tmp_path):
    """(name, value of --data, what the line says): each has one good sample and one that cannot be read."""
    for i, (name, (content, says)) in enumerate(IMAGE_FILES.items()):
        yield name, folder(tmp_path / f"i{i}", [json.dumps({"file_name": name})], [(name, content)]), says
    for i, (name, (content, says)) in enumerate(DEPTH_FILES.items()):
        row = json.dumps({"file_name": "b.jpg", "depth_file_name": name})
        yield name, folder(tmp_path / f"d{i}", [row], [(name, content)]), says
    for name, (members, says) in SHARDS.items():
        write_tar(tmp_path / f"{name}.tar", [("a.jpg", JPEG), *members])
        yield name, tmp_path / f"{name}.tar", says


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_ends_an_evaluation_with_one_line(workers, tmp_path, capsys):
    for name, path, says in itertools.islice(unreadable_samples(tmp_path), None if workers == 0 else 1):
        message = refused(capsys, read_all, path, workers=workers)
        assert message.startswith("--data ") and says in message, (name, message)


def test_a_sample_that_cannot_be_read_is_replaced_in_training(tmp_path, capsys):
    for name, path, says in unreadable_samples(tmp_path):
        for batch in itertools.islice(training_batches(path, batch_size=2), 3):
            assert batch.values["rgb"].shape == (2, 3, 16, 16) and batch.names == ["a", "a"], name
            assert batch.indices[1] == batch.indices[0] + 1  # its own random numbers
        lines = capsys.readouterr().err.splitlines()
        assert all(says in line and line.endswith("is replaced by the next") for line in lines), (name, lines)
        assert len(lines) == 3, (name, lines)


def test_pictures_of_a_run_replace_what_cannot_be_read(tmp_path, capsys):
    path = folder(tmp_path / "f", ['{"file_name": "none.jpg"}', '{"file_name": "b.jpg"}'])
    (batch,) = data.in_order(open_source(path), 8, 8, strict=False)
    assert batch.names == ["a", "b", "b"]
    assert "none.jpg" in capsys.readouterr().err


def test_ten_samples_in_a_row_that_cannot_be_read_end_training(tmp_path, capsys):
    for count, ends in ((9, False), (10, True)):
        members = [(f"{i}.jpg", b"bad") for i in range(count)]
        write_tar(tmp_path / f"{count}.tar", members if ends else [*members, ("good.jpg", JPEG)])
        stream = training_batches(tmp_path / f"{count}.tar", batch_size=1)
        if ends:
            with pytest.raises(SystemExit):
                next(stream)
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 10 and lines[-1].startswith("--data ") and lines[-1].endswith("not an image")
        else:
            assert all(next(stream).names == ["good"] for _ in range(30))
            capsys.readouterr()


def test_an_invalid_row_of_metadata_is_named(tmp_path, capsys):
    for i, (row, says) in enumerate(ROWS.items()):
        path = folder(tmp_path / f"{i}", [row])
        message = refused(capsys, read_all, path)
        assert says in message, (row, message)


def test_damaged_and_empty_sources_are_named(tmp_path, capsys):
    write_tar(tmp_path / "whole.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[: 1024 + len(JPEG) + 600])
    (tmp_path / "text.tar").write_text("not a tar file, " * 100)
    (tmp_path / "zero.tar").write_bytes(b"")
    write_tar(tmp_path / "words.tar", [("a.txt", b"words alone")])
    problems = {"cut": "unexpected end of data", "text": "invalid header", "zero": "empty file", "words": "no samples"}
    for name, says in problems.items():
        path = tmp_path / f"{name}.tar"
        for read in (read_all, train_once):
            message = refused(capsys, read, path)
            assert message.startswith(f"--data {path}: ") and says in message
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/metadata.jsonl").write_text("\n")
    assert "lists no samples" in refused(capsys, read_all, tmp_path / "folder")
