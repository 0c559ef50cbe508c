"""Sampling: the sampler's mathematics, every task as a table, and sample.py as a user runs it."""

import argparse
import itertools
import json
import shlex
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import build, inputs

import data
import evaluate
import sample
from model import (
    DEPTH,
    I2D_STEPS,
    JOINT,
    RGB,
    Config,
    DiT,
    Modality,
    complete_depth,
    contract,
    corrupt,
    noise_levels,
    normalize_depth,
    restore_depth,
    sampling_grid,
    uncontract,
    warp,
)

NORMAL = Modality("normal", channels=3)
NAMES = ["rgb", "depth"]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_fill_takes_the_nearest_known_pixel():
    rng = np.random.default_rng(0)
    depth, known = rng.random((9, 14)), rng.random((9, 14)) < 0.1
    places = np.argwhere(known)
    made = evaluate.fill(depth, known)
    for y, x in np.ndindex(9, 14):
        apart = ((places - (y, x)) ** 2).sum(1)
        nearest = places[apart == apart.min()]
        assert made[y, x] in depth[nearest[:, 0], nearest[:, 1]]


def test_an_ensemble_is_the_median_of_its_members():
    network, encoders, rgb = build(RGB, DEPTH), data.PixelsAndBytes(32), torch.rand(2, 3, 16, 16) * 2 - 1
    args = argparse.Namespace(size=16, seed=0, ensemble=3, solver="euler")
    made = evaluate.estimate_depth(network, encoders, rgb, [4, 5], args, 2)
    args.ensemble = 1
    each = [evaluate.estimate_depth(network, encoders, rgb, [4 + (k << 32), 5 + (k << 32)], args, 2) for k in range(3)]
    for i in range(2):
        close(made[i], torch.stack([maps[i] for maps in each]).median(0).values)


def test_image_and_depth_of_an_estimate_have_noise_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(DiT, "sample", lambda self, levels, noise, *args, **kwargs: seen.append(noise) or noise)
    network, encoders, rgb = build(RGB, DEPTH), data.PixelsAndBytes(32), torch.zeros(2, 3, 64, 64)
    args = argparse.Namespace(size=64, seed=0, ensemble=1, solver="euler")
    evaluate.estimate_depth(network, encoders, rgb, [0, 1], args, 1, strength=0.5)
    together = torch.cat([seen[0]["rgb"], seen[0]["depth"]], 1).flatten(2)
    for sample_noise in together:
        assert (sample_noise.corrcoef() - torch.eye(4)).abs().max() < 0.1


def test_an_image_of_strength_zero_tells_nothing():
    network, encoders = build(RGB, DEPTH), data.PixelsAndBytes(32)
    args = argparse.Namespace(size=16, seed=0, ensemble=1, solver="euler")
    find = lambda seed, strength: evaluate.estimate_depth(
        network, encoders, inputs(seed=seed)[0]["rgb"], [0, 1], args, 2, strength=strength
    )
    close(find(1, 0.0)[0], find(2, 0.0)[0], 0)
    assert (find(1, 1.0)[0] - find(2, 1.0)[0]).abs().mean() > 1e-2


# ---- sample.py ----


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(of image and depth, of the image alone): random networks, so that nothing they make is trivial."""
    config, paths = Config(width=64, depth=2, head=16, patch=4, size=16, decoder_depth=1, text_length=32), []
    for modalities in ((RGB, DEPTH), (RGB,)):
        network = build(*modalities, config=config)
        if DEPTH in modalities:  # all depth above 0, which stands for missing in files
            network.decoders["depth"].head.weight.data.mul_(0.2)
            network.decoders["depth"].head.bias.data.fill_(1.0)
        paths.append(tmp_path_factory.mktemp("weights") / "last.pt")
        state = {"config": asdict(network.config), "ema": network.state_dict(), "settings": {}, "step": 1}
        torch.save(state, paths[-1])
    return paths


@pytest.fixture
def call(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(line, weights=0):
        arguments = ["sample.py", "--checkpoint", str(checkpoint[weights]), "--device", "cpu", *shlex.split(line)]
        monkeypatch.setattr(sys, "argv", arguments)
        sample.main()

    return call


def picture(path, height=16, width=16, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(path)


def test_a_sample_has_everything_and_its_command_makes_it_again(call, tmp_path):
    call('--prompt "a red ball" --prompt "it\'s blue" --count 2 --steps 3 --cfg-interval 0.1 1 --animate --out a')
    folder = tmp_path / "a/003"
    files = {"rgb.png", "depth.npy", "depth.png", "depth16.png", "cloud.ply", "metadata.json"}
    assert {p.name for p in folder.iterdir()} == files
    assert {p.name for p in (tmp_path / "a").iterdir()} == {*(f"{i:03}" for i in range(4)), "grid.png", "animation.gif"}
    told = json.loads((folder / "metadata.json").read_text())
    assert told["settings"]["prompt"] == ["it's blue"] and told["settings"]["seed"] == 3
    call(told["command"].removeprefix("python sample.py") + " --out b")
    depth = np.load(folder / "depth.npy")
    np.testing.assert_allclose(depth, np.load(tmp_path / "b/000/depth.npy"), rtol=1e-3)
    pixels = [np.asarray(Image.open(f / "rgb.png")).astype(int) for f in (folder, tmp_path / "b/000")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1 and not np.array_equal(
        pixels[0], Image.open(tmp_path / "a/002/rgb.png")
    )
    call(told["command"].removeprefix("python sample.py") + " --out c")
    for file in files - {"metadata.json"}:  # the same call, the same bits
        assert (tmp_path / "b/000" / file).read_bytes() == (tmp_path / "c/000" / file).read_bytes()
    decoded, _ = data.read_depth("depth16.png", (folder / "depth16.png").read_bytes())
    assert np.abs(decoded - depth).max() <= told["depth16_scale"] * 0.51
    header, points = (folder / "cloud.ply").read_bytes().split(b"end_header\n")
    assert len(points) == 15 * int(header.split(b"vertex ")[1].split()[0])
    assert Image.open(tmp_path / "a/animation.gif").n_frames == 3


def test_resume_makes_what_is_missing_and_nothing_else(call, checkpoint, tmp_path, capsys):
    call("--prompt a --count 3 --steps 2 --out s")
    before = {i: (tmp_path / f"s/00{i}/depth.npy").read_bytes() for i in range(3)}
    stamp = (tmp_path / "s/000/metadata.json").stat().st_mtime_ns
    (tmp_path / "s/001/metadata.json").write_text('{"settings": ')
    for line, says in (("--steps 2", "already holds samples"), ("--steps 4 --resume", "another --steps")):
        with pytest.raises(SystemExit) as stopped:
            call(f"--prompt a --count 3 --out s {line}")
        assert stopped.value.code == 2 and says in capsys.readouterr().err
    call("--prompt a --count 4 --steps 2 --out s --resume --batch-size 1")
    assert (tmp_path / "s/000/metadata.json").stat().st_mtime_ns == stamp and (tmp_path / "s/003/rgb.png").exists()
    trained_on = data.read_checkpoint(checkpoint[0]) | {"step": 2}
    torch.save(trained_on, tmp_path / "last.pt")
    told = json.loads((tmp_path / "s/000/metadata.json").read_text())
    told["settings"]["checkpoint"] = "last.pt"
    (tmp_path / "s/000/metadata.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit):
        call("--checkpoint last.pt --prompt a --count 1 --steps 2 --out s --resume")
    assert "another step" in capsys.readouterr().err
    again = np.load(tmp_path / "s/001/depth.npy")
    (tmp_path / "x.npy").write_bytes(before[1])
    np.testing.assert_allclose(again, np.load(tmp_path / "x.npy"), rtol=1e-3)


@pytest.mark.parametrize(("height", "width", "seen"), [(16, 32, (12, 24)), (40, 20, (24, 12)), (4, 400, (4, 160))])
def test_an_image_of_any_shape_gets_depth_in_its_own_pixels(height, width, seen, call, checkpoint, tmp_path):
    """The network sees the nearest size of that shape, upright, and its map comes back to every pixel of the image."""
    picture(tmp_path / "a.png", height, width)
    call("--image a.png --count 1 --steps 2 --ensemble 3 --out s")
    state = data.load_checkpoint(checkpoint[0])
    network = sample.DiT(Config(**state["config"]))
    network.load_state_dict(state["ema"])
    assert json.loads((tmp_path / "s/000/metadata.json").read_text())["network_saw"] == list(seen)
    image = torch.from_numpy(np.asarray(Image.open(tmp_path / "a.png")).copy()).movedim(-1, 0)[None] / 127.5 - 1
    image = torch.nn.functional.interpolate(image, seen, mode="bicubic", antialias=True).clamp(-1, 1).repeat(3, 1, 1, 1)
    draws = data.Draws("sample", [k << 32 for k in range(3)])
    noise = {"rgb": draws.randn(3, *seen), "depth": draws.randn(1, *seen)}
    levels = noise_levels(NAMES, 2, strength={"rgb": 1.0})
    made = uncontract(network.sample(levels, noise, torch.zeros(3, 32).byte(), {"rgb": (image, None)})["depth"])
    depth = torch.from_numpy(np.median(made, 0))[None]
    depth = torch.nn.functional.interpolate(depth, (height, width), mode="bilinear")[0, 0]
    close(torch.from_numpy(np.load(tmp_path / "s/000/depth.npy")), depth, 1e-3)
    assert np.array_equal(Image.open(tmp_path / "s/000/rgb.png"), Image.open(tmp_path / "a.png"))


def test_sparse_depth_of_more_pixels_than_the_network_sees_is_completed_in_these_pixels(call, tmp_path):
    """A plane at 8 times the network's resolution: beside measured pixels, their neighbours are right too."""
    picture(tmp_path / "a.png", 128, 128)
    y, x = np.mgrid[:128, :128] / 128
    plane = (1 / (0.5 + 0.3 * x + 0.2 * y)).astype(np.float32)
    known = np.random.default_rng(0).random((128, 128)) < 0.03
    np.save(tmp_path / "d.npy", np.where(known, plane, 0))
    call("--image a.png --depth d.npy --count 1 --steps 1 --out s")
    made = np.load(tmp_path / "s/000/depth.npy")
    assert np.array_equal(made[known], plane[known])
    beside = np.zeros_like(known)
    beside[:, 1:] = known[:, :-1]
    assert np.abs(made / plane - 1)[beside & ~known].mean() < 2e-3  # pasted in, 5e-3


def test_directories_are_paired_by_name_and_sparse_depth_is_completed_in_its_unit(call, tmp_path):
    (tmp_path / "in").mkdir(), (tmp_path / "maps").mkdir()
    rng, sparse = np.random.default_rng(0), {}
    for i, (name, shape) in enumerate({"a": (16, 16), "b": (32, 16), "c": (16, 16)}.items()):
        picture(tmp_path / f"in/{name}.jpg", *shape, seed=i)
        sparse[name] = np.where(rng.random(shape) < 0.1, 1000 * rng.random(shape) + 500, 0).astype(np.float32)
        np.save(tmp_path / f"maps/{name}.depth.npy", sparse[name])
    picture(tmp_path / "in/unpaired.png")
    call("--image in --depth maps --count 1 --steps 2 --out s")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"a-000", "b-000", "c-000", "grid.png"}
    for name, measured in sparse.items():
        depth = np.load(tmp_path / f"s/{name}-000/depth.npy")
        np.testing.assert_allclose(depth[measured > 0], measured[measured > 0], rtol=1e-3)
        assert depth.shape == measured.shape and (depth > 0).all() and 100 < np.median(depth) < 10000


def test_members_of_an_ensemble_belong_to_their_image_and_no_two_images_share_noise(call, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        picture(tmp_path / f"in/{name}.png")  # the same
    call("--image in --count 1 --steps 1 --ensemble 3 --batch-size 3 --out one")
    call("--image in --count 1 --steps 1 --ensemble 3 --batch-size 9 --out all")
    made = {out: [np.load(tmp_path / f"{out}/{name}-000/depth.npy") for name in "abc"] for out in ("one", "all")}
    np.testing.assert_allclose(made["one"], made["all"], rtol=1e-3)
    assert np.abs(made["one"][0] - made["one"][1]).max() > 1e-3


def test_depth_given_stays_as_it_is_and_refining_keeps_what_was_measured(call, tmp_path):
    depth = np.linspace(100, 500, 256, dtype=np.float32).reshape(16, 16)
    depth[:4] = 0
    np.save(tmp_path / "d.npy", depth)
    call("--depth d.npy --count 1 --steps 2 --out d2i")
    seen = []
    see = lambda module, given: seen.append(given[0]["depth"][0, 0]) if isinstance(module, sample.DiT) else None
    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    call("--depth d.npy --count 1 --steps 2 --depth-strength 0.5 --out hint")
    hook.remove()
    assert torch.equal(seen[0][:4], seen[1][:4]) and not torch.equal(seen[0][4:], seen[1][4:])
    for out in ("d2i", "hint"):  # missing stays missing
        assert np.array_equal(np.load(tmp_path / f"{out}/000/depth.npy"), depth)
    call("--depth d.npy --count 1 --steps 2 --refine depth --out again")
    refined = np.load(tmp_path / "again/000/depth.npy")
    np.testing.assert_allclose(refined[4:], depth[4:], rtol=1e-3)
    assert refined[:4].min() > 20 and refined[:4].max() < 2500  # and in its unit
    call("--depth d.npy --count 1 --steps 2 --refine depth --depth-strength 0.5 --out sketch")
    assert np.abs(np.load(tmp_path / "sketch/000/depth.npy")[4:] / depth[4:] - 1).mean() > 0.05
    units = [
        json.loads((tmp_path / out / "000/metadata.json").read_text())["depth_unit"] for out in ("again", "sketch")
    ]
    assert units == ["that of the depth given", "relative"]


def test_refining_depth_is_image_to_depth_of_the_image_made(call, tmp_path):
    call("--count 1 --steps 3 --seed 5 --refine depth --out joint")
    call("--count 1 --steps 3 --seed 5 --image joint/000/rgb.png --out i2d")
    joint, i2d = (np.load(tmp_path / f"{name}/000/depth.npy") for name in ("joint", "i2d"))
    np.testing.assert_allclose(joint, i2d, rtol=0.05, atol=0.02)  # the picture between them has 8 bits
    call("--count 1 --steps 3 --seed 5 --out unrefined")
    assert np.abs(np.load(tmp_path / "unrefined/000/depth.npy") - joint).max() > 0.05


@pytest.mark.parametrize(
    "given",
    ["", "--order depth", "--image a.png --image-strength 0.5"],
)
def test_the_image_is_made_again_from_the_depth(given, call, tmp_path):
    """It is the depth's image, then: a depth to image of the depth made, on the same noise."""
    picture(tmp_path / "a.png")
    np.save(tmp_path / "d.npy", np.linspace(1, 5, 256, dtype=np.float32).reshape(16, 16))
    call(f"{given} --refine rgb --count 1 --steps 3 --out s")
    call("--depth s/000/depth.npy --count 1 --steps 3 --out again")
    pixels = [np.asarray(Image.open(tmp_path / f"{out}/000/rgb.png")).astype(int) for out in ("s", "again")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2


def test_the_image_is_trusted_as_far_as_told(call, tmp_path):
    picture(tmp_path / "a.png", seed=0), picture(tmp_path / "b.png", seed=1)
    depths = {}
    for strength in (0, 0.5, 1):
        for name in "ab":
            call(f"--image {name}.png --image-strength {strength} --count 1 --steps 4 --out {name}{strength}")
            depths[name, strength] = np.load(tmp_path / f"{name}{strength}/000/depth.npy")
    assert np.array_equal(depths["a", 0], depths["b", 0])
    assert all(np.abs(depths["a", s] - depths["b", s]).mean() > 1e-3 for s in (0.5, 1))
    assert np.abs(depths["a", 0.5] - depths["a", 1]).mean() > 1e-3


def test_steps_that_are_not_given_are_few_from_a_clean_image_and_many_else(call, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    asked, table = [], sample.noise_levels
    monkeypatch.setattr(
        sample, "noise_levels", lambda names, steps, *rest: asked.append(steps) or table(names, 2, *rest)
    )
    for i, line in enumerate(("--image a.png", "--image a.png --image-strength 0.9", "", "--refine depth")):
        call(f"{line} --count 1 --out {i}")
    assert asked == [I2D_STEPS, 50, 50, 50, I2D_STEPS]


def test_solver_and_guidance_reach_the_sampler(call, tmp_path):
    flags = ["", "--solver heun", "--cfg-depth 2", "--cfg 1", "--cfg-interval 0 0.1", "--cfg-depth 1 --cfg 3"]
    for i, flag in enumerate(flags):
        call(f"--prompt a --count 1 --steps 3 {flag} --out {i}")
    made = [np.load(tmp_path / f"{i}/000/depth.npy") for i in range(6)]
    assert np.array_equal(made[0], made[5]) and not any(np.allclose(made[0], x, rtol=1e-5) for x in made[1:5])


def test_in_a_directory_what_cannot_be_used_is_told_and_left_out(call, tmp_path, capsys):
    """As data.py writes it, with PNG images, its own contact sheet, and a damaged file."""
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
        np.save(tmp_path / f"{i}.depth.npy", np.where(np.random.default_rng(i).random((16, 16)) < 0.2, 2, 0))
    picture(tmp_path / "grid.png", 40, 90)
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        call(f"--image {tmp_path} --depth {tmp_path} --count 2 --steps 1 --batch-size 1 --out s")
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert stopped.value.code == 2 and sum("1.png: not an image" in line for line in lines) == 1
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"0-000", "0-001", "2-000", "2-001", "grid.png"}


def test_odd_values_come_back_in_the_command(call, tmp_path):
    call("--prompt=-a --count 1 --steps 1 --cfg 1e-05 --order=-2 --out a")
    told = json.loads((tmp_path / "a/000/metadata.json").read_text())
    call(told["command"].removeprefix("python sample.py") + " --out b")
    assert (tmp_path / "a/000/depth.npy").read_bytes() == (tmp_path / "b/000/depth.npy").read_bytes()


def test_text_to_image_alone_by_order_or_by_checkpoint(call, tmp_path):
    call("--count 1 --steps 2 --order rgb --out forcing")
    call("--count 1 --steps 2 --order image-first --out first")
    call("--count 1 --steps 2 --out t2i", weights=1)
    for out in ("forcing", "t2i"):
        assert {p.name for p in (tmp_path / out / "000").iterdir()} == {"rgb.png", "metadata.json"}
    assert (tmp_path / "forcing/000/rgb.png").read_bytes() == (tmp_path / "first/000/rgb.png").read_bytes()


def test_prompts_from_a_file_and_any_size(call, tmp_path):
    (tmp_path / "p.txt").write_text("a\n\n  b b\n")
    call("--prompts p.txt --count 1 --steps 1 --size 8x24 --out s")
    assert [Image.open(tmp_path / f"s/{i:03}/rgb.png").size for i in range(2)] == [(24, 8)] * 2
    assert json.loads((tmp_path / "s/001/metadata.json").read_text())["settings"]["prompt"] == ["b b"]


def test_emoji_and_spaces_of_every_kind_are_text(call, tmp_path):
    family, heart, wide = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2764\ufe0f", "a\u00a0red\u3000ball"
    (tmp_path / "prompts.txt").write_text(f"\ufeff{heart} on the ground\n", encoding="utf-8")
    call(f"--prompt '{family}' --prompt '{wide}' --prompts prompts.txt --count 1 --steps 1 --out made")
    prompts = [
        json.loads(path.read_text())["settings"]["prompt"][0] for path in sorted(tmp_path.glob("made/*/metadata.json"))
    ]
    assert prompts == [family, wide, f"{heart} on the ground"]


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'{"settings": 3}', b"\xff", b"[" * 10**5, b'{"settings"'])
def test_a_damaged_metadata_file_tells_of_no_sample(content, tmp_path):
    (tmp_path / "metadata.json").write_bytes(content)
    assert sample.read_metadata(tmp_path) is None


def test_what_a_long_prompt_loses_is_what_the_network_would_not_read():
    for line in ("a b", "red " * 9, "a " + "ä" * 20, "x" * 33, "one two three four five"):
        cut = data.left_out(line, 32)
        kept = line.split()[: len(line.split()) - len(cut.split())]
        whole, short = data.encode_text([line], 32), data.encode_text([" ".join(kept)], 32)
        tokens = sum(-(-len(word.encode()) // 8) for word in kept)
        assert torch.equal(whole[:, : 8 * tokens], short[:, : 8 * tokens]) and tokens <= 4
        assert " ".join([*kept, cut]).strip() == " ".join(line.split()) and bool(cut) == (len(kept) < len(line.split()))


def test_pinhole_points(tmp_path):
    depth = np.full((4, 4), 2.0, np.float32)
    sample.write_ply(tmp_path / "c.ply", np.zeros((4, 4, 3), np.uint8), depth, depth > 0, 90.0)
    body = (tmp_path / "c.ply").read_bytes().split(b"end_header\n")[1]
    points = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])["xyz"]
    np.testing.assert_allclose(points[0], [-1.5, 1.5, -2])  # at 90 degrees the half-width is the depth; pixel centres


def test_edges_are_left_out_and_planes_are_not():
    y, x = np.mgrid[:16, :16] + 0.5
    floor = (1 / (0.02 * y + 0.01)).astype(np.float32)  # seen up to the horizon: depth changes by half between rows
    everywhere = np.ones((16, 16), bool)
    assert sample.on_surface(floor, everywhere).all()
    box = np.where((abs(x - 8) < 4) & (y < 12), 2.0, floor)
    edges = ~sample.on_surface(box, everywhere)
    beside = np.zeros_like(edges)
    beside[:12, [3, 4, 11, 12]] = True  # both sides of its vertical edges
    assert edges[:8][beside[:8]].all() and not edges[:11, :3].any() and not edges[:10, 6:10].any()
    holes = np.where(y < 3, 0, floor)
    assert sample.on_surface(holes, holes > 0).sum() == (holes > 0).sum()


def test_depth_colours_are_perceptually_uniform():
    """Equal steps of nearness are steps of nearly equal distance in CIELAB, and ever lighter."""
    rgb = data.paint_depth(1 / torch.linspace(1, 2, 65).view(1, 1, -1))[0] / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / (0.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)[2:-2:4]  # the ends are clipped
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert (np.diff(lab[:, 0]) > 0).all() and steps.std() / steps.mean() < 0.2


def test_the_scale_bar_is_painted_as_the_depths_that_it_names():
    """Of a map from 2 to 4, mostly: near end on top; half way in nearness, not in depth, lies in the middle."""
    depth = 1 / torch.linspace(0.5, 0.25, 101).view(1, 1, -1).repeat(1, 101, 1)
    _, (far, near), _ = data.nearness(depth)
    assert 1 / near == pytest.approx(1 / 0.495) and 1 / far == pytest.approx(1 / 0.255)  # 2% to 98%
    painted = np.asarray(data.depth_picture(depth, depth > 0)).astype(int)
    height = width = 303
    assert painted.shape == (height, width + 60, 3)
    bar = painted[8 : height - 8, width + 8]
    for share, column in ((0, 8), (0.5, 151), (1, 294)):  # the same depths in the map
        assert np.abs(bar[round(share * (len(bar) - 1))] - painted[0, column]).max() <= 12
    assert data.depth_picture(depth[:, :3], depth[:, :3] > 0).size == (363, 64)  # a flat one has room for its bar


def test_colours_depend_on_no_unit():
    depth = torch.rand(1, 20, 20) + 0.5
    assert np.array_equal(data.paint_depth(depth), data.paint_depth(depth * 1e-6))


@pytest.mark.parametrize(
    ("line", "most"),
    [
        ("--prompt a --count 5 --steps 1 --batch-size 4", 4),  # two of each: with and without the caption
        ("--prompt a --count 5 --steps 1 --batch-size 4 --cfg 1", 4),
        ("--image {image} --count 3 --ensemble 3 --batch-size 7", 6),
        ("--image {image} --count 2 --ensemble 3 --batch-size 1", 3),  # members of one ensemble are not parted
    ],
)
def test_a_batch_counts_members_and_guided_copies(line, most, call, tmp_path, monkeypatch):
    seen, forward = [], DiT.forward

    def spy(self, noisy, t, text):
        seen.append(len(text))
        return forward(self, noisy, t, text)

    monkeypatch.setattr(DiT, "forward", spy)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "image.png")
    call(line.format(image=tmp_path / "image.png"))
    assert max(seen) == most


def test_an_evaluations_batch_counts_members_and_guided_copies():
    for task, cfg, ensemble, images in (("depth", 3.0, 1, 16), ("depth", 3.0, 5, 3), ("image", 3.0, 1, 8)):
        args = argparse.Namespace(task=task, cfg=cfg, ensemble=ensemble, batch_size=16)
        assert evaluate.images_at_a_time(args) == images
    assert evaluate.images_at_a_time(argparse.Namespace(task="joint", cfg=1.0, ensemble=40, batch_size=16)) == 1


def test_seeds_of_a_directory_are_seeds_that_the_flag_takes(tmp_path):
    """So that the command in metadata.json makes the sample again. No two inputs have the same."""
    names = ("a", "b", "photo", "x" * 50)
    for name in names:
        picture(tmp_path / f"{name}.png")
    settings = {"prompt": [], "prompts": "", "depth": "", "image": str(tmp_path), "count": 2, "seed": 2**31 - 1}
    jobs = sample.list_jobs(argparse.Namespace(**settings), 0)
    assert [data.SEED(str(job.seed)) for job in jobs] == [job.seed for job in jobs]
    assert len({job.seed for job in jobs}) == len(jobs) == 8
