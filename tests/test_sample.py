"""sample.py as a user runs it: what it generates, keeps, completes and writes. And the pictures of data.py."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

import animate
import directions
import numpy as np
import pytest
import torch
from PIL import Image
from test_model import build, close

import data
import sample
from model import DEPTH, I2D_STEPS, NORMAL, RGB, Config, DiT, corrupt, make_schedule, normalize_depth, uncontract

NAMES = ["rgb", "depth"]
CONFIG = Config(width=64, depth=2, head=16, patch=4, size=16, decoder_depth=1, text_length=32)
NETWORKS = {"rgb": (RGB,), "rgbd": (RGB, DEPTH), "all": (RGB, DEPTH, NORMAL)}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{name in NETWORKS: checkpoint} of random networks, so that nothing they generate is trivial."""
    paths = {}
    for name, modalities in NETWORKS.items():
        network = build(*modalities, config=CONFIG)
        if DEPTH in modalities:  # all depth is above 0, which stands for missing in files
            network.decoders["depth"].head.weight.data.mul_(0.2)
            network.decoders["depth"].head.bias.data.fill_(1.0)
        paths[name] = tmp_path_factory.mktemp("weights") / f"{name}.pt"
        state = {"config": asdict(network.config), "ema": network.state_dict(), "settings": {}, "step": 1}
        torch.save(state, paths[name])
    return paths


@pytest.fixture
def call(checkpoints, tmp_path, monkeypatch):
    """Run sample.py with a command line, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(line, network="rgbd"):
        words = ["sample.py", "--checkpoint", str(checkpoints[network]), "--device", "cpu", *shlex.split(line)]
        monkeypatch.setattr(sys, "argv", words)
        sample.main()

    return call


@pytest.fixture
def forwards(monkeypatch):
    """A list that gets (noisy, t, text) of every forward pass."""
    seen = []
    forward = DiT.forward

    def spy(self, noisy, t, text):
        seen.append((noisy, t, text))
        return forward(self, noisy, t, text)

    monkeypatch.setattr(DiT, "forward", spy)
    return seen


def picture(path, height=16, width=16, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(path)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())


def random_normals(shape, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# ---- What a sample is ----


def test_a_sample_has_all_its_files_and_can_be_made_again_by_its_prompt_and_seed(call, tmp_path):
    call('--prompt "a red ball" --prompt "it\'s blue" --count 2 --steps 3 --cfg-interval 0.1 1 --out a')
    folder = tmp_path / "a/003"
    files = {"rgb.png", "depth.npy", "depth.png", "cloud.ply", "metadata.json"}
    assert {p.name for p in folder.iterdir()} == files
    assert {p.name for p in (tmp_path / "a").iterdir()} == {*(f"{i:03}" for i in range(4)), "grid.png"}

    found = metadata(folder)
    assert found["prompt"] == "it's blue" and found["seed"] == 3 and found["generated"] == NAMES
    assert found["settings"]["steps"] == 3 and found["checkpoint_step"] == 1
    again = '--prompt "it\'s blue" --seed 3 --count 1 --steps 3 --cfg-interval 0.1 1'
    call(f"{again} --out b")
    depth = np.load(folder / "depth.npy")
    np.testing.assert_allclose(depth, np.load(tmp_path / "b/000/depth.npy"), rtol=1e-3)
    assert np.abs(pixels(folder / "rgb.png") - pixels(tmp_path / "b/000/rgb.png")).max() <= 1
    assert not np.array_equal(pixels(folder / "rgb.png"), pixels(tmp_path / "a/002/rgb.png"))
    call(f"{again} --out c")
    for file in files - {"metadata.json"}:  # the same call, the same bits
        assert (tmp_path / "b/000" / file).read_bytes() == (tmp_path / "c/000" / file).read_bytes()


def test_the_cloud_holds_as_many_points_as_it_declares(call, tmp_path):
    call("--count 1 --steps 2 --out a")
    header, points = (tmp_path / "a/000/cloud.ply").read_bytes().split(b"end_header\n")
    assert len(points) == 15 * int(header.split(b"vertex ")[1].split()[0]) > 0


def test_a_directory_that_holds_samples_is_refused(call, tmp_path, capsys):
    call("--count 1 --steps 1 --out s")
    before = (tmp_path / "s/000/depth.npy").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        call("--count 1 --steps 2 --out s")
    assert stopped.value.code == 2 and "--out s: holds other files" in capsys.readouterr().err
    assert (tmp_path / "s/000/depth.npy").read_bytes() == before


def test_seeds_of_a_directory_are_seeds_that_the_flag_takes():
    """So that any sample can be made again. No two inputs have the same."""
    args = argparse.Namespace(count=2, seed=2**31 - 1, prompt=[""])
    stems = ["a", "b", "photo", "x" * 50]
    jobs = [job for stem in stems for job in sample.list_jobs(stem, {}, args)]
    assert [data.SEED(str(job.seed)) for job in jobs] == [job.seed for job in jobs]
    assert len({job.seed for job in jobs}) == len({job.name for job in jobs}) == 8


# ---- Depth from an image ----


@pytest.mark.parametrize(("height", "width", "seen"), [(16, 32, (12, 24)), (40, 20, (24, 12)), (4, 400, (4, 160))])
def test_an_image_of_any_shape_gets_depth_in_its_own_pixels(height, width, seen, call, checkpoints, tmp_path):
    """The network sees the nearest size of that shape, and its map comes back to every pixel of the image."""
    picture(tmp_path / "a.png", height, width)
    call("--image a.png --count 1 --steps 2 --ensemble 3 --out s")
    assert metadata(tmp_path / "s/000")["network_size"] == list(seen)

    network, _ = data.open_network(checkpoints["rgbd"])
    image = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).movedim(-1, 0)[None] / 127.5 - 1
    image = torch.nn.functional.interpolate(image, seen, mode="bicubic", antialias=True).clamp(-1, 1).repeat(3, 1, 1, 1)
    rng = data.PerSampleRNG("sample", [k << 32 for k in range(3)])
    noise = {"rgb": rng.randn(3, *seen), "depth": rng.randn(1, *seen)}
    schedule = make_schedule(NAMES, 2, strength={"rgb": 1.0})
    made = network.sample(schedule, noise, torch.zeros(3, 32).byte(), {"rgb": (image, None)})
    depth = torch.from_numpy(np.median(uncontract(made["depth"]), 0))[None]
    depth = torch.nn.functional.interpolate(depth, (height, width), mode="bilinear")[0, 0]
    close(torch.from_numpy(np.load(tmp_path / "s/000/depth.npy")), depth, 1e-3)
    assert np.array_equal(pixels(tmp_path / "s/000/rgb.png"), pixels(tmp_path / "a.png"))


def test_members_of_an_ensemble_belong_to_their_image_and_no_two_images_share_noise(call, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        picture(tmp_path / f"in/{name}.png")  # the same
    call("--image in --count 2 --steps 1 --ensemble 3 --batch-size 3 --out one")
    call("--image in --count 2 --steps 1 --ensemble 3 --batch-size 6 --out all")
    samples = [f"{name}-00{i}" for name in "abc" for i in range(2)]
    one = [np.load(tmp_path / f"one/{name}/depth.npy") for name in samples]
    together = [np.load(tmp_path / f"all/{name}/depth.npy") for name in samples]
    np.testing.assert_allclose(one, together, rtol=1e-3)
    assert min(np.abs(a - b).max() for i, a in enumerate(one) for b in one[:i]) > 1e-3


def test_an_image_is_trusted_as_far_as_its_strength_says(call, tmp_path):
    picture(tmp_path / "a.png", seed=0)
    picture(tmp_path / "b.png", seed=1)
    depths = {}
    for strength in (0, 0.5, 1):
        for name in "ab":
            call(f"--image {name}.png --strength rgb={strength} --count 1 --steps 4 --out {name}{strength}")
            depths[name, strength] = np.load(tmp_path / f"{name}{strength}/000/depth.npy")
    assert np.array_equal(depths["a", 0], depths["b", 0])
    assert all(np.abs(depths["a", s] - depths["b", s]).mean() > 1e-3 for s in (0.5, 1))
    assert np.abs(depths["a", 0.5] - depths["a", 1]).mean() > 1e-3


# ---- Sparse depth, completed ----


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


def test_measured_depth_is_no_input_of_the_network(call, tmp_path, forwards):
    picture(tmp_path / "a.png")
    np.save(tmp_path / "d.npy", np.eye(16, dtype=np.float32))
    call("--image a.png --count 1 --steps 2 --out without")
    call("--image a.png --depth d.npy --count 1 --steps 2 --out with")
    assert len(forwards) == 4
    for without, measured in zip(forwards[:2], forwards[2:], strict=True):
        assert torch.equal(without[0]["depth"], measured[0]["depth"])


def test_directories_are_paired_by_name_and_sparse_depth_is_completed_in_its_unit(call, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "maps").mkdir()
    rng = np.random.default_rng(0)
    sparse = {}
    for i, (name, shape) in enumerate({"a": (16, 16), "b": (32, 16), "c": (16, 16)}.items()):
        picture(tmp_path / f"in/{name}.jpg", *shape, seed=i)
        sparse[name] = np.where(rng.random(shape) < 0.1, 1000 * rng.random(shape) + 500, 0).astype(np.float32)
        np.save(tmp_path / f"maps/{name}.depth.npy", sparse[name])
    call("--image in --depth maps --count 1 --steps 2 --out s")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"a-000", "b-000", "c-000", "grid.png"}
    for name, measured in sparse.items():
        depth = np.load(tmp_path / f"s/{name}-000/depth.npy")
        np.testing.assert_allclose(depth[measured > 0], measured[measured > 0], rtol=1e-3)
        assert depth.shape == measured.shape and (depth > 0).all() and 100 < np.median(depth) < 10000

    picture(tmp_path / "in/unpaired.png")
    with pytest.raises(SystemExit):
        call("--image in --depth maps --count 1 --steps 2 --out again")
    assert "equal names; in/unpaired.png has no partner" in capsys.readouterr().err


def test_a_directory_may_mix_images_and_maps(call, tmp_path):
    """As data.py writes it, with PNG images and a grid."""
    for i in range(2):
        picture(tmp_path / f"{i}.png", seed=i)
        np.save(tmp_path / f"{i}.depth.npy", np.eye(16) * 2)
        np.save(tmp_path / f"{i}.normal.npy", random_normals((16, 16)))
    picture(tmp_path / "grid.png", 40, 90)
    call(f"--image {tmp_path} --depth {tmp_path} --count 2 --steps 1 --out s")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"0-000", "0-001", "1-000", "1-001", "grid.png"}
    assert (np.load(tmp_path / "s/1-000/depth.npy").diagonal() == 2).all()


def test_the_first_file_that_cannot_be_read_ends_the_program(call, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        picture(tmp_path / f"in/{i}.png", seed=i)
    (tmp_path / "in/1.png").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        call("--image in --count 1 --steps 1 --out s")
    assert stopped.value.code == 2 and "in/1.png: not an image" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"0-000"}


# ---- An image from depth, and hints ----


def test_given_depth_stays_as_it_is_and_what_it_lacks_is_noise_at_every_strength(call, tmp_path, forwards):
    depth = np.linspace(100, 500, 256, dtype=np.float32).reshape(16, 16)
    depth[:4] = 0
    np.save(tmp_path / "d.npy", depth)
    for strength in (1, 0.5):
        call(f"--depth d.npy --count 1 --steps 2 --strength depth={strength} --out {strength}")
        assert np.array_equal(np.load(tmp_path / f"{strength}/000/depth.npy"), depth)  # missing stays missing

    rng = data.PerSampleRNG("sample", [0])
    rng.randn(3, 16, 16)
    noise = rng.randn(1, 16, 16)
    valid = torch.from_numpy(depth > 0)[None, None]
    clean = normalize_depth(torch.from_numpy(depth)[None, None], valid)
    assert len(forwards) == 8  # two runs of two steps, each with the caption and without
    assert 0 < forwards[-1][1]["depth"][0] < 1
    for noisy, t, _ in forwards:
        close(noisy["depth"][:1], corrupt(clean, noise, t["depth"][:1], valid), 1e-5)


def test_a_sketch_can_be_refined(call, tmp_path):
    depth = np.linspace(100, 500, 256, dtype=np.float32).reshape(16, 16)
    np.save(tmp_path / "d.npy", depth)
    call("--depth d.npy --count 1 --steps 2 --strength depth=0.5 --refine depth --out sketch")
    refined = np.load(tmp_path / "sketch/000/depth.npy")
    assert np.abs(refined / refined.mean() - depth / depth.mean()).mean() > 0.05
    assert metadata(tmp_path / "sketch/000")["generated"] == NAMES


def test_refining_depth_is_image_to_depth_of_the_image_made(call, tmp_path):
    call("--count 1 --steps 3 --seed 5 --refine depth --out joint")
    call("--count 1 --steps 3 --seed 5 --image joint/000/rgb.png --out i2d")
    joint = np.load(tmp_path / "joint/000/depth.npy")
    i2d = np.load(tmp_path / "i2d/000/depth.npy")
    np.testing.assert_allclose(joint, i2d, rtol=0.05, atol=0.02)  # the picture between them has 8 bits
    call("--count 1 --steps 3 --seed 5 --out unrefined")
    assert np.abs(np.load(tmp_path / "unrefined/000/depth.npy") - joint).max() > 0.05


@pytest.mark.parametrize("given", ["", "--order depth", "--image a.png --strength rgb=0.5"])
def test_a_refined_image_is_made_from_the_depth(given, call, tmp_path):
    """It is what depth to image makes of the depth, on the same noise."""
    picture(tmp_path / "a.png")
    call(f"{given} --refine rgb --count 1 --steps 3 --out s")
    call("--depth s/000/depth.npy --count 1 --steps 3 --out again")
    assert np.abs(pixels(tmp_path / "s/000/rgb.png") - pixels(tmp_path / "again/000/rgb.png")).max() <= 2


# ---- Flags that reach the sampler ----


def test_the_default_number_of_steps_is_small_from_a_clean_image_and_25_else(call, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    asked = []

    def short_schedule(names, steps, *rest):
        asked.append(steps)
        return make_schedule(names, 2, *rest)

    monkeypatch.setattr(sample, "make_schedule", short_schedule)
    for i, line in enumerate(("--image a.png", "--image a.png --strength rgb=0.9", "", "--refine depth")):
        call(f"{line} --count 1 --out {i}")
    assert asked == [I2D_STEPS, 25, 25, 25, I2D_STEPS]


def test_guidance_reaches_the_sampler(call, tmp_path):
    flags = ["", "--cfg rgb=2,depth=2", "--cfg 1", "--cfg-interval 0 0.1", "--cfg depth=1,rgb=2"]
    for i, flag in enumerate(flags):
        call(f"--prompt a --count 1 --steps 3 {flag} --out {i}")
    made = [np.load(tmp_path / f"{i}/000/depth.npy") for i in range(len(flags))]
    assert np.array_equal(made[0], made[4])
    assert not any(np.allclose(made[0], depth, rtol=1e-5) for depth in made[1:4])


@pytest.mark.parametrize(
    ("line", "most"),
    [
        ("--prompt a --count 5 --steps 1 --batch-size 4", 4),
        ("--image image.png --count 3 --ensemble 3 --batch-size 7", 6),
        ("--image image.png --count 2 --ensemble 3 --batch-size 1", 3),  # the members of one ensemble stay together
    ],
)
def test_a_batch_counts_ensemble_members(line, most, call, tmp_path, forwards):
    picture(tmp_path / "image.png")
    call(line)
    assert max(len(text) for _, _, text in forwards) == most


def test_text_to_image_alone_by_order_or_by_checkpoint(call, tmp_path):
    call("--count 1 --steps 2 --order rgb --out forcing")
    call("--count 1 --steps 2 --out t2i", network="rgb")
    for out in ("forcing", "t2i"):
        assert {p.name for p in (tmp_path / out / "000").iterdir()} == {"rgb.png", "metadata.json"}


# ---- Three modalities ----


def test_normals_come_from_a_prompt_an_image_or_depth_and_have_unit_length(call, tmp_path):
    picture(tmp_path / "a.png", 40, 24)
    np.save(tmp_path / "d.npy", np.linspace(1, 5, 40 * 24, dtype=np.float32).reshape(40, 24))
    for i, line in enumerate(("--prompt a", "--image a.png --ensemble 2", "--depth d.npy", "--order normal,rgb")):
        call(f"{line} --count 1 --steps 2 --out {i}", network="all")
        normals = np.load(tmp_path / f"{i}/000/normal.npy")
        assert normals.shape == ((16, 16, 3) if i in (0, 3) else (40, 24, 3))
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, rtol=1e-4)
        painted = pixels(tmp_path / f"{i}/000/normal.png")
        assert np.abs(painted - (normals + 1) * 127.5).max() <= 1
    assert not (tmp_path / "3/000/depth.npy").exists()  # it is not in the --order


def test_normals_are_an_input_and_what_they_lack_stays_missing(call, tmp_path, forwards):
    normals = random_normals((16, 16))
    normals[:4] = 0
    normals[4, 0] = np.nan
    np.save(tmp_path / "n.npy", normals * 7)
    call("--normal n.npy --count 1 --steps 2 --cfg 1 --out s", network="all")
    made = np.load(tmp_path / "s/000/normal.npy")
    np.testing.assert_allclose(made[5:], normals[5:], rtol=1e-4, atol=1e-6)
    assert not made[:4].any() and not made[4, 0].any()
    assert not pixels(tmp_path / "s/000/normal.png")[:4].any()
    assert metadata(tmp_path / "s/000")["generated"] == NAMES
    for noisy, _, _ in forwards:  # given, clean; and noise where missing
        close(noisy["normal"][0, :, 5:], torch.from_numpy(normals[5:]).movedim(-1, 0))
        assert noisy["normal"].isfinite().all()


def test_any_subset_can_be_given(call, tmp_path):
    picture(tmp_path / "a.png")
    np.save(tmp_path / "n.npy", random_normals((16, 16)))
    np.save(tmp_path / "d.npy", np.eye(16, dtype=np.float32) * 50)
    call("--image a.png --normal n.npy --count 1 --steps 2 --out depth", network="all")
    assert metadata(tmp_path / "depth/000")["generated"] == ["depth"]
    call("--image a.png --normal n.npy --depth d.npy --count 1 --steps 2 --out completed", network="all")
    assert (np.load(tmp_path / "completed/000/depth.npy").diagonal() == 50).all()
    call(
        "--normal n.npy --depth d.npy --strength normal=0.7 --count 1 --steps 2 --refine normal --out r", network="all"
    )
    assert metadata(tmp_path / "r/000")["generated"] == ["rgb", "normal"]
    assert np.array_equal(np.load(tmp_path / "r/000/depth.npy"), np.eye(16) * 50)


# ---- Prompts ----


def test_any_size(call, tmp_path):
    call("--prompt a --prompt 'b b' --count 1 --steps 1 --size 8x24 --out s")
    assert [Image.open(tmp_path / f"s/{i:03}/rgb.png").size for i in range(2)] == [(24, 8)] * 2
    assert metadata(tmp_path / "s/001")["prompt"] == "b b"


def test_emoji_and_spaces_of_every_kind_are_text(call, tmp_path):
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    wide = "a\u00a0red\u3000ball"
    call(f"--prompt '{family}' --prompt '{wide}' --count 1 --steps 1 --out s")
    assert [metadata(folder)["prompt"] for folder in sorted(tmp_path.glob("s/0*"))] == [family, wide]


def test_what_a_long_prompt_loses_is_what_the_network_would_not_read():
    for line in ("a b", "red " * 9, "a " + "ä" * 20, "x" * 33, "one two three four five"):
        lost = data.truncated_words(line, 32)
        words = line.split()
        kept = words[: len(words) - len(lost.split())]
        num_tokens = sum(-(-len(word.encode()) // 8) for word in kept)
        whole = data.encode_text([line], 32)
        short = data.encode_text([" ".join(kept)], 32)
        assert torch.equal(whole[:, : 8 * num_tokens], short[:, : 8 * num_tokens]) and num_tokens <= 4
        assert " ".join([*kept, lost]).strip() == " ".join(words) and bool(lost) == (len(kept) < len(words))


# ---- Points ----


def test_pinhole_points(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "FIELD_OF_VIEW", 90.0)
    depth = np.full((4, 4), 2.0, np.float32)
    rgb = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    sample.write_ply(tmp_path / "c.ply", rgb, depth, depth > 0)
    body = (tmp_path / "c.ply").read_bytes().split(b"end_header\n")[1]
    points = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    assert np.array_equal(points["rgb"], rgb.reshape(-1, 3))
    np.testing.assert_allclose(points["xyz"][0], [-1.5, 1.5, -2])  # at 90 degrees the half-width is the depth


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


# ---- Pictures ----


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


def test_depth_colours_depend_on_no_unit_and_missing_depth_is_black():
    depth = torch.rand(1, 20, 20) + 0.5
    valid = torch.rand(1, 20, 20) < 0.5
    painted = data.paint_depth(torch.where(valid, depth, torch.nan), valid)
    assert np.array_equal(painted, data.paint_depth(depth * 1e-6, valid))
    assert np.array_equal(painted, data.paint_depth(torch.where(valid, depth, 0)))
    assert not painted[~valid[0]].any() and not data.paint_depth(depth, valid & False).any()


def test_every_encoding_is_painted():
    axis = torch.eye(3)[:, None]  # (3, 1, 3): three pixels, right, up and forward
    valid = torch.tensor([True, True, False]).view(1, 1, 3)
    painted = data.paint(NORMAL, axis, valid)
    assert painted.tolist() == [[[255, 128, 128], [128, 255, 128], [0, 0, 0]]]
    assert data.paint(RGB, axis).tolist() == [[[255, 128, 128], [128, 255, 128], [128, 128, 255]]]
    assert np.array_equal(data.paint(DEPTH, axis[:1], valid), data.paint_depth(axis[:1], valid))


def test_a_grid_has_its_pictures_and_captions_at_their_places():
    white = np.full((8, 8, 3), 255, np.uint8)
    red = white * np.array([1, 0, 0], np.uint8)
    grid = np.asarray(data.draw_grid([[red, white], ["under it", ""], [white, red]], ["a", "", "b"], cell=32))
    is_red = (grid == (255, 0, 0)).all(-1)
    assert is_red[:32, 110:142].all() and is_red[-36:-4, 146:178].all() and is_red.sum() == 2 * 32 * 32
    assert (grid[36:-36, 110:146] < 128).any() and not (grid[36:-36, 146:] < 128).any()


def test_an_animation_ends_with_the_sample(call, checkpoints, tmp_path, monkeypatch):
    call("--prompt a --count 1 --steps 25 --out s")
    line = f"animate.py --checkpoint {checkpoints['rgbd']} --prompt a --count 1 --out a.gif"
    monkeypatch.setattr(sys, "argv", line.split())
    animate.main()
    with Image.open("a.gif") as animation:
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB")).astype(int)[:96:6, :96:6]
    assert np.abs(last - pixels(tmp_path / "s/000/rgb.png")).mean() < 10  # a GIF has 256 colours


def test_the_picture_of_all_directions_has_the_scenes(checkpoints, tmp_path, monkeypatch):
    line = f"directions.py --checkpoint {checkpoints['rgbd']} --count 2 --out {tmp_path}/a.png"
    monkeypatch.setattr(sys, "argv", line.split())
    directions.main()
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    side = data.open_network(checkpoints["rgbd"])[0].config.size
    scenes = data.SyntheticWorld("val", (side, side)).samples([0, 1])
    rows = [[data.paint_rgb(x) for x in scenes.values["rgb"]], [data.paint_depth(x) for x in scenes.values["depth"]]]
    real = np.asarray(data.draw_grid([scenes.captions, *rows], ["caption", "rgb", "depth"]))
    assert np.array_equal(picture[: len(real), 110:], real[:, 110:])
    generated = picture[len(real) :]
    assert len(generated) == 4 * (side * (128 // side) + 4)  # each from the other, and both
