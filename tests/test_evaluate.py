"""Evaluation: metrics in closed form, estimates, and evaluate.py as a user runs it."""

import argparse
import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, world_samples, write_moge
from test_model import SMALL, build, close, inputs

import data
import evaluate
from model import DEPTH, NORMAL, RGB, DiT, complete_depth

# ---- Alignment ----


def absolute_error(p, g, scale, shift):
    """What the alignments minimise."""
    return (np.abs(scale * p + shift - g) / g).sum()


def test_affine_alignment_is_the_exact_minimum():
    """No line through two of the points is better, and one of these lines is a minimum."""
    rng = np.random.default_rng(0)
    for case in range(30):
        n = int(rng.integers(3, 60))
        g = rng.uniform(0.5, 10, n)
        p = (g - rng.normal()) / rng.uniform(0.2, 3) + rng.normal(0, 0.3, n) * (rng.random(n) < 0.5)
        p[rng.random(n) < 0.1] = rng.uniform(-20, 20)
        if case % 3 == 0:  # many points on one line
            p = p.round(1)
            g = g.round(1)
        found = absolute_error(p, g, *evaluate.align(torch.tensor(p), torch.tensor(g)))
        best = found
        for i, j in zip(*np.tril_indices(n, -1), strict=True):
            if p[i] != p[j]:
                scale = (g[i] - g[j]) / (p[i] - p[j])
                best = min(best, absolute_error(p, g, scale, g[i] - scale * p[i]))
        assert found <= best * (1 + 1e-9)


def test_scale_alignment_is_the_exact_minimum():
    """sum |s p - g| / g is convex and linear between the ratios g / p: its minimum is at one of them."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        g = rng.uniform(0.5, 10, 40)
        p = rng.normal(1, 1, 40)
        scale, shift = evaluate.align(torch.tensor(p), torch.tensor(g), "scale")
        best = min(absolute_error(p, g, s, 0) for s in g / p)
        assert shift == 0 and absolute_error(p, g, scale, 0) <= best * (1 + 1e-12)


def test_alignment_recovers_an_affine_change():
    target = torch.rand(1, 10, 20) + 0.5
    prediction = (target - 3) / 7
    scale, shift = evaluate.align(prediction.flatten(), target.flatten())
    assert scale == pytest.approx(7, rel=1e-4) and shift == pytest.approx(3, rel=1e-4)
    (absrel, delta1), aligned, _ = evaluate.depth_metrics(prediction, target, target > 0)
    assert absrel < 1e-5 and delta1 == 1
    close(aligned, target)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
def test_a_constant_prediction_is_aligned_to_the_weighted_median(value):
    g = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    p = torch.full((5,), value)
    scale, shift = evaluate.align(p, g)
    errors = [absolute_error(p.numpy(), g.numpy(), 0, level) for level in g.numpy()]
    assert absolute_error(p.numpy(), g.numpy(), scale, shift) == pytest.approx(min(errors))
    assert evaluate.align(p, g, "none") == (1, 0)


def test_outliers_do_not_move_an_alignment():
    g = torch.rand(1000) + 1
    far = g.clone()
    far[:100] *= 100
    assert evaluate.align((g - 0.5) / 3, far, "affine") == pytest.approx((3, 0.5), rel=1e-3)
    assert evaluate.align(g / 3, far, "scale") == pytest.approx((3, 0), rel=1e-3)


def test_large_maps_are_aligned_on_a_subsample_of_valid_pixels(monkeypatch):
    """64 x 64 cells, each its valid pixel nearest to the middle; the result is applied everywhere."""
    target = torch.rand(1, 200, 300) + 1
    valid = torch.rand(1, 200, 300) < 0.02
    counts = []
    align = evaluate.align

    def spy(p, g, mode):
        counts.append(len(g))
        return align(p, g, mode)

    monkeypatch.setattr(evaluate, "align", spy)
    close(evaluate.align_map((target - 1) / 2, target, valid), target)
    cells = {(int((y + 0.5) * 64 / 200), int((x + 0.5) * 64 / 300)) for _, y, x in valid.nonzero().tolist()}
    assert counts == [len(cells)]


# ---- Metrics ----


def test_depth_metrics_by_hand():
    target = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0]).view(1, 1, 5)
    prediction = torch.tensor([1.0, 2.0, 4.0, 8.0, 6.0]).view(1, 1, 5)
    (absrel, delta1), _, error = evaluate.depth_metrics(prediction, target, target > 0, "none")
    assert absrel == pytest.approx(0.2, abs=1e-6) and delta1 == pytest.approx(0.8)
    close(error, torch.tensor([0.0, 0, 0, 0, 2]).view(1, 1, 5))
    (absrel, delta1), _, _ = evaluate.depth_metrics(-prediction, target, target > 0, "none")
    assert absrel > 2 and delta1 == 0


def test_normal_metrics_by_hand():
    """Rotated by 0, 10, 30 and 90 degrees; a fifth pixel is not valid, and holds NaN."""
    angles = torch.tensor([0.0, 10, 30, 90, torch.nan]).deg2rad()
    target = torch.tensor([0.0, 0, 1]).view(3, 1, 1).repeat(1, 1, 5)
    prediction = torch.stack([angles.sin(), torch.zeros(5), angles.cos()])[:, None]
    valid = torch.tensor([True, True, True, True, False]).view(1, 1, 5)
    (degrees, share), _, error = evaluate.normal_metrics(prediction, target, valid)
    assert degrees == pytest.approx(32.5, abs=1e-4) and share == 0.5
    assert error.shape == (1, 1, 5) and error[0, 0, 3].item() == pytest.approx(1.5)


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = evaluate.bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 / 20, abs=0.02)


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 2.0, 0.5])
    shift = torch.tensor([0.0, 1.0, 3.0])
    a = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * scale + shift
    closed = (shift.square() + (1 - scale) ** 2).sum().item()
    assert evaluate.frechet_distance(a, b) == pytest.approx(closed, rel=0.02)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_colours_of_the_real_world_are_found_and_shuffled_ones_are_not():
    world = data.SyntheticWorld("val", (32, 32)).samples(range(200))
    found = [evaluate.colors_in(rgb) for rgb in world.values["rgb"]]
    shuffled = world.captions[1:] + world.captions[:1]
    assert evaluate.share_of_requested_colors(found, world.captions) > 0.9
    assert evaluate.share_of_requested_colors(found, shuffled) < 0.4
    assert evaluate.share_of_requested_colors([{"red"}, set()], ["a red ball", "a blue box on red"]) == 1 / 3
    assert not evaluate.colors_in(torch.zeros(3, 32, 32))


# ---- Estimates ----


def settings(**changes):
    return argparse.Namespace(**{"size": 16, "seed": 0, "ensemble": 1, **changes})


def small_model(*modalities):
    return evaluate.Model(build(*modalities), data.open_encoders("", torch.device("cpu"), SMALL))


def test_an_ensemble_is_the_median_of_its_members():
    model = small_model(RGB, DEPTH)
    rgb = inputs()[0]["rgb"].clamp(-1, 1)
    found = evaluate.estimate(model, DEPTH, rgb, [4, 5], settings(ensemble=3), 2)
    members = []
    for k in range(3):
        members.append(evaluate.estimate(model, DEPTH, rgb, [4 + (k << 32), 5 + (k << 32)], settings(), 2))
    close(found, torch.stack(members).median(0).values)


def test_the_median_of_normals_has_unit_length_at_any_size():
    model = small_model(RGB, DEPTH, NORMAL)
    rgb = torch.rand(2, 3, 24, 40) * 2 - 1
    found = evaluate.estimate(model, NORMAL, rgb, [0, 1], settings(ensemble=2), 1)
    assert found.shape == (2, 3, 24, 40)
    close(found.norm(dim=1), torch.ones(2, 24, 40))


def test_modalities_of_an_estimate_have_noise_of_their_own(monkeypatch):
    noises = []

    def spy(self, schedule, noise, *args, **options):
        noises.append(noise)
        return noise

    monkeypatch.setattr(DiT, "sample", spy)
    model = small_model(RGB, DEPTH, NORMAL)
    evaluate.estimate(model, DEPTH, torch.zeros(2, 3, 64, 64), [0, 1], settings(size=64), 1, strength=0.5)
    together = torch.cat(list(noises[0].values()), 1).flatten(2)
    for noise in together:
        assert (noise.corrcoef() - torch.eye(7)).abs().max() < 0.1


def test_an_image_of_strength_zero_tells_nothing():
    model = small_model(RGB, DEPTH)

    def find(seed, strength):
        rgb = inputs(seed=seed)[0]["rgb"]
        return evaluate.estimate(model, DEPTH, rgb, [0, 1], settings(), 2, strength)

    close(find(1, 0.0), find(2, 0.0), 0)
    assert (find(1, 1.0) - find(2, 1.0)).abs().mean() > 1e-2


def test_a_batch_counts_ensemble_members(monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *args: None)
    monkeypatch.setattr(data, "in_order", lambda source, count, batch_size, *rest: batch_size)

    def count(ensemble):
        args = settings(ensemble=ensemble, batch_size=16, images=0, map_size=(16, 16), workers=0)
        return evaluate.read_samples(args, (RGB, DEPTH), "cpu")

    assert count(1) == 16 and count(5) == 3 and count(40) == 1


def test_the_mean_map_is_the_mean_over_valid_pixels(monkeypatch):
    monkeypatch.setattr(evaluate, "MEAN_IMAGES", 40)
    batch = data.SyntheticWorld("train", (16, 16)).samples(range(40))
    args = settings(data="synthetic", map_size=(16, 16))
    normals = torch.where(batch.valid["normal"], batch.values["normal"], 0.0).sum(0)
    close(evaluate.mean_map(args, NORMAL), torch.nn.functional.normalize(normals, dim=0))
    relative = DEPTH.encode(batch.values["depth"], batch.valid["depth"])
    mean = relative.sum(0) / batch.valid["depth"].sum(0).clamp(min=1)
    close(evaluate.mean_map(args, DEPTH), DEPTH.decode(mean))


# ---- evaluate.py ----


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random networks of one, two and three modalities: {number: path}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for modalities in ((RGB,), (RGB, DEPTH), (RGB, DEPTH, NORMAL)):
        network = build(*modalities)
        path = folder / f"{len(modalities)}.pt"
        torch.save({"config": asdict(network.config), "settings": {}, "ema": network.state_dict()}, path)
        paths[len(modalities)] = path
    return paths


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve validation scenes as folder/, as shards/ (two of them) and as moge/."""
    out = tmp_path_factory.mktemp("world")
    for layout, write in LAYOUTS.items():
        options = {"per_shard": 7} if layout == "shards" else {}
        write(out / layout, world_samples("val", (16, 16), 12), **options)
    return out


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A function that runs a command line of evaluate.py and returns its results.json."""

    def run(line):
        out = tmp_path / "results"
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *line.split(), "--device", "cpu", "--out", str(out)])
        evaluate.main()
        assert (out / "grid.png").is_file()
        return json.loads((out / "results.json").read_text())

    return run


def test_depth_does_not_depend_on_the_batch_size(checkpoints, results):
    line = f"depth --checkpoint {checkpoints[2]} --images 6 --steps 2 --size 16 --measured 0.5"
    found = results(f"{line} --batch-size 2")
    again = results(f"{line} --batch-size 6")
    prefixes = ("", "baseline_", "shuffled_", "completed_", "filled_")
    for prefix in prefixes:
        assert found[f"{prefix}absrel"] == pytest.approx(again[f"{prefix}absrel"], rel=1e-4)
        assert found[f"{prefix}images"] == (5 if prefix == "shuffled_" else 6)
    unaligned = results(f"{line} --align none")
    for prefix in ("completed_", "filled_"):  # never aligned
        assert unaligned[f"{prefix}absrel"] == pytest.approx(again[f"{prefix}absrel"], rel=1e-4)
    assert unaligned["absrel"] != again["absrel"]


def test_completion_corrects_the_depth_that_is_scored(checkpoints, results, monkeypatch):
    """Completion is the map of the plain task, corrected once; its reference has the measured pixels alone."""
    calls = []

    def spy(relative, depth, valid):
        calls.append((relative, valid))
        return complete_depth(relative, depth, valid)

    monkeypatch.setattr(evaluate, "complete_depth", spy)
    line = f"depth --checkpoint {checkpoints[2]} --images 8 --batch-size 8 --steps 2 --size 16"
    found = results(f"{line} --measured 0.2")
    assert found["absrel"] == results(line)["absrel"]
    (maps, measured), (flat, same) = calls
    assert (flat == 1).all() and torch.equal(measured, same) and 0.1 < measured.float().mean() < 0.25
    rgb = data.SyntheticWorld("val", (16, 16)).samples(range(8)).values["rgb"]
    model = evaluate.Model(build(RGB, DEPTH), data.open_encoders("", torch.device("cpu"), SMALL))
    close(maps, evaluate.estimate(model, DEPTH, rgb, range(8), settings(), 2))


def test_normals_from_images(checkpoints, world, results, capsys):
    line = f"normal --checkpoint {checkpoints[3]} --images 12 --size 16 --batch-size 5"
    found = results(line)
    for prefix in ("", "baseline_", "shuffled_"):
        assert 0 < found[f"{prefix}degrees"] < 180 and 0 <= found[f"{prefix}below_11.25"] <= 1
    low, high = found["degrees_95"]
    assert low < found["degrees"] < high
    assert found["baseline_degrees"] < found["degrees"]  # a random network sees nothing
    assert "mean true map, blind to the image" in capsys.readouterr().out
    from_files = results(f"{line} --data {world}/folder")  # through a JPEG
    assert from_files["degrees"] == pytest.approx(found["degrees"], rel=0.05)


def test_every_layout_gives_the_same_numbers(checkpoints, world, results):
    line = f"depth --checkpoint {checkpoints[2]} --size 16 --data {world}"
    folder, shards, moge = (results(f"{line}/{path}") for path in ("folder", "shards/{000..001}.tar", "moge"))
    for other in (shards, moge):
        for key in ("absrel", "delta1", "baseline_absrel"):
            assert other["images"] == 12 and other[key] == pytest.approx(folder[key], abs=1e-4)


def test_predictions_score_as_the_network_that_made_them(checkpoints, world, results, tmp_path, monkeypatch):
    maps = []
    estimate = evaluate.estimate

    def spy(*args):
        maps.extend(estimate(*args))
        return torch.stack(maps[-len(args[3]) :])

    monkeypatch.setattr(evaluate, "estimate", spy)
    line = f"depth --size 16 --data {world}/folder --align scale"
    ours = results(f"{line} --checkpoint {checkpoints[2]} --ensemble 3")
    for i, depth in enumerate(maps):
        np.save(tmp_path / f"{i:06}.npy", depth[0].numpy())
    again = results(f"{line} --predictions {tmp_path}")
    assert ours["per_image"] == again["per_image"] and len(ours["per_image"]) == 12


def test_a_benchmark_brings_its_size_and_range(tmp_path, results, monkeypatch, capsys):
    """Perfect predictions of that size have no error, as .npy or as .png; those of another size are refused."""
    columns = np.linspace(1, 12, 640, dtype=np.float32)
    rows = np.sin(np.arange(480) / 70).astype(np.float32)
    depth = np.add.outer(rows, columns) + 1
    picture = evaluate.Image.fromarray(np.full((480, 640, 3), 128, np.uint8))
    sample = next(world_samples("val", (16, 16), 1))
    write_moge(tmp_path / "NYUv2", [{**sample, "depth": depth, "image": data.to_bytes(picture.save, "PNG")}])
    farthest = []

    def spy(prediction, target, valid, mode):
        farthest.append(target[valid].max().item())
        return evaluate.depth_metrics(prediction, target, valid, mode)

    metric = evaluate.METRICS["relative depth"]
    monkeypatch.setitem(evaluate.METRICS, "relative depth", metric._replace(measure=spy))
    (tmp_path / "maps").mkdir()
    line = f"depth --data {tmp_path}/NYUv2 --predictions {tmp_path}/maps --align scale"
    np.save(tmp_path / "maps/000000.npy", depth * 3)
    found = results(line)
    assert found["absrel"] < 2e-3 and found["delta1"] == 1 and found["map_size"] == [480, 640]
    assert 9.9 < farthest[0] <= 10
    (tmp_path / "maps/000000.npy").unlink()
    evaluate.Image.fromarray((depth * 1000).astype(np.uint16)).save(tmp_path / "maps/000000.png")
    assert results(f"{line} --align none")["absrel"] < 2e-3  # 16 bits, in millimetres

    np.save(tmp_path / "maps/000000.npy", np.ones((518, 518)))
    with pytest.raises(SystemExit):
        results(line)
    assert "000000.npy: has shape (518, 518)" in capsys.readouterr().err


def test_constant_depth_is_scored(world, results, tmp_path):
    """What is seen and what is guessed blindly are both exact."""
    samples = list(world_samples("val", (16, 16), 2))
    for sample in samples:
        sample["depth"] = np.full((16, 16), 2, np.float32)
        np.save(tmp_path / f"{sample['name']}.npy", np.eye(16) + 1)
    LAYOUTS["folder"](tmp_path / "flat", samples)
    found = results(f"depth --data {tmp_path}/flat --predictions {tmp_path} --size 16")
    assert found["absrel"] < 1e-6 and found["baseline_absrel"] < 1e-6


def test_predictions_may_be_nan_where_nothing_is_known(world, results, tmp_path, recwarn):
    for path in (world / "folder").glob("*.depth.npy"):
        depth = np.load(path)
        np.save(tmp_path / path.name.replace(".depth", ""), np.where(depth > 0, depth, np.nan))
    assert results(f"depth --size 16 --data {world}/folder --predictions {tmp_path}")["absrel"] < 1e-5
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


# ---- follow and joint ----


def returning(values):
    """A function that returns the next of the values at each call."""
    remaining = iter(values)

    def function(*args):
        return next(remaining)

    return function


def test_agreement_is_scored_after_alignment_and_beside_the_sample_before(checkpoints, results, monkeypatch):
    """Also where a batch ends. Pixels without a surface count nowhere."""
    real = torch.rand(6, 1, 16, 16) + 1
    real[:, :, :2] = 0.0  # no surface
    maps = {2: [real[:2] * 2 + 1, real[:2], real[2:4] * 2 + 1, real[2:4], real[4:] * 2 + 1, real[4:]]}
    maps[6] = [real * 2 + 1, real]  # in generated images, in real images
    found = {}
    for batch_size, estimates in maps.items():
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "estimate", returning(estimates))
            line = f"follow --checkpoint {checkpoints[2]} --size 16 --steps 1 --cfg 1 --images 6"
            found[batch_size] = results(f"{line} --batch-size {batch_size}")
    assert found[2]["per_image"] == found[6]["per_image"] and found[2]["other_absrel"] == found[6]["other_absrel"]
    assert found[2]["absrel"] < 1e-3 and found[2]["delta1"] == 1 and found[2]["images"] == 6
    assert found[2]["other_absrel"] > 0.05 and found[2]["other_images"] == 5


def test_missing_depth_is_noise_while_a_hint_is_followed(checkpoints, results, monkeypatch):
    inputs_of_steps = []
    forward = DiT.forward

    def spy(self, noisy, t, text):
        inputs_of_steps.append(noisy["depth"][:32])
        return forward(self, noisy, t, text)

    monkeypatch.setattr(DiT, "forward", spy)
    missing = ~data.SyntheticWorld("val", (16, 16)).samples(range(32)).valid["depth"]
    line = f"follow --checkpoint {checkpoints[2]} --images 32 --batch-size 64 --size 16 --steps 3"
    results(f"{line} --strength 0.9 --judge-steps 1")
    first, second, third = inputs_of_steps[:3]  # as the image is generated
    assert (
        missing.any() and torch.equal(first[missing], second[missing]) and torch.equal(first[missing], third[missing])
    )
    assert not (first == third)[~missing].any()


def test_depth_following(checkpoints, world, results):
    line = f"follow --size 16 --data {world}/folder --checkpoint {checkpoints[2]} --steps 2"
    found = results(line)
    assert found["images"] == 12 and found["other_images"] == 11 and found["absrel"] > 0
    for other in ("--strength 0", "--strength 0.5", "--cfg 1", "--judge-steps 4", f"--judge {data.NANO}"):
        assert results(f"{line} {other}")["absrel"] != found["absrel"]
    assert results(f"{line} --judge {checkpoints[2]}")["absrel"] == found["absrel"]


def test_joint_agreement(checkpoints, world, results):
    line = f"joint --size 16 --data {world}/folder --checkpoint {checkpoints[2]} --steps 2"
    found = results(line)
    assert results(f"{line} --judge {checkpoints[2]}")["absrel"] == found["absrel"]
    for other in ("--order -5", "--order depth,rgb", "--judge-steps 4", f"--judge {data.NANO}"):
        assert results(f"{line} {other}")["absrel"] != found["absrel"]


def test_all_tasks_evaluate_a_network_of_three_modalities(checkpoints, results):
    for task in evaluate.TASKS:
        assert results(f"{task} --checkpoint {checkpoints[3]} --images 3 --steps 1 --size 16")["images"] == 3


# ---- image ----


@pytest.mark.parametrize("number", [1, 2])
def test_images_from_captions(number, checkpoints, results):
    line = f"image --checkpoint {checkpoints[number]} --images 8 --steps 2 --size 16"
    found = results(f"{line} --batch-size 16")
    again = results(f"{line} --batch-size 3")
    for key in ("frechet", "real_frechet", "following", "shuffled_following", "real_following"):
        assert again[key] == pytest.approx(found[key], rel=1e-3)


class Statistics(torch.nn.Module):
    """A feature extractor as a TorchScript file: mean and spread of each channel of uint8 images."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if images.dtype != torch.uint8 or not return_features:
            return torch.zeros(len(images), 1)
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


def test_frechet_distance_with_a_torchscript_file(checkpoints, world, results, tmp_path):
    path = tmp_path / "features.pt"
    torch.jit.script(Statistics()).save(path)
    features = evaluate.load_features(path, "cpu")(torch.zeros(3, 3, 8, 8))
    assert features.dtype == torch.float64 and features.tolist() == [[128, 128, 128, 0, 0, 0]] * 3
    line = f"image --checkpoint {checkpoints[1]} --size 16 --steps 2 --data {world}/folder --features {path}"
    found = results(f"{line} --batch-size 5")
    assert found["images"] == 12 and found["frechet"] > 0
    assert results(f"{line} --batch-size 12")["frechet"] == pytest.approx(found["frechet"], rel=1e-3)
