"""The scripts as a user runs them: train, resume, sample, evaluate."""

import argparse
import itertools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train_forcing
import train_t2i
from model import DEPTH, RGB, Config, DiT, Modality, corrupt, draw_noise_levels, noise_levels, scored, velocity_loss

ROOT = Path(__file__).parent.parent
QUICK = "--no-compile --device cpu --size 16 --batch-size 4 --log-every 1 --sample-every 100 --warmup 2"


def run(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__name__, *line.split()])
    script.main()


def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {k: v for k, v in row.items() if "loss" in k or k == "grad_norm"} for row in rows}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Two steps of each stage: (t2i checkpoint, forcing checkpoint)."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run(train_t2i, f"{QUICK} --steps 2 --out {out}/t2i", patch)
        run(train_forcing, f"{QUICK} --steps 2 --init {out}/t2i/last.pt --out {out}/forcing", patch)
    return out / "t2i/last.pt", out / "forcing/last.pt"


@pytest.mark.parametrize(
    ("stage", "source"),
    [("forcing", "synthetic"), ("t2i", "shards/{000..001}.tar"), ("forcing", "folder")],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(stage, source, trained, world, tmp_path, monkeypatch):
    script = {"t2i": train_t2i, "forcing": train_forcing}[stage]
    line = f"{QUICK} --steps 5 --checkpoint-every 2" + (f" --init {trained[0]}" if stage == "forcing" else "")
    line += f" --data {source if source == 'synthetic' else world / source}"
    monkeypatch.setattr(script, "picture", lambda *args: None)
    run(script, f"{line} --out {tmp_path}/whole", monkeypatch)
    save = data.save_checkpoint

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_checkpoint", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(script, f"{line} --out {tmp_path}/cut", patch)
    assert max(losses(tmp_path / "cut")) == 2
    run(script, f"{line} --out {tmp_path}/cut --resume", monkeypatch)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (torch.load(tmp_path / run / "last.pt", weights_only=True)["ema"] for run in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Twelve validation scenes as folder/, as shards/ and as moge/."""
    out = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        for layout in ("folder", "shards", "moge"):
            run(data, f"--out {out}/{layout} --layout {layout} --count 12 --size 16", patch)
    source = data.open_source(argparse.Namespace(data="synthetic"), "val", (16, 16))
    values, _, captions = source.samples(range(12))
    samples = list(
        zip(map(data.paint_rgb, values["rgb"]), values["depth"][:, 0].numpy(), captions, [1.0] * 12, strict=True)
    )
    data.export(out / "shards", "shards", samples, per_shard=7)  # two shards
    return out


def test_run_directory_holds_what_is_promised(trained):
    out = trained[1].parent
    rows = losses(out)
    assert set(rows) == {1, 2} and {"loss", "loss_rgb", "loss_depth", "loss_distill_rgb"} <= set(rows[1])
    assert json.loads((out / "config.json").read_text())["steps"] == 2
    assert Image.open(next((out / "samples").glob("*.png"))).width > 500


def test_first_distillation_loss_is_what_depth_tokens_alone_change(trained):
    """At step one the student is the teacher plus silent parts: it differs by its attention to depth tokens alone."""
    rows = losses(trained[1].parent)
    assert 0 <= rows[1]["loss_distill_rgb"] < 0.005 * rows[1]["loss_rgb"]


def test_training_on_rgb_only_rows(trained, tmp_path, monkeypatch):
    """Rows without any depth train the image alone: the depth head gets no gradient, and nothing is NaN."""
    samples = data.World.samples

    def without_depth(self, indices):
        values, valid, captions = samples(self, indices)
        return {**values, "depth": values["depth"] * float("nan")}, {**valid, "depth": valid["depth"] & False}, captions

    monkeypatch.setattr(data.World, "samples", without_depth)
    monkeypatch.setattr(train_forcing, "picture", lambda *args: None)
    run(train_forcing, f"{QUICK} --steps 2 --init {trained[0]} --out {tmp_path}/run", monkeypatch)
    rows = losses(tmp_path / "run")
    assert "loss_depth" not in rows[2] and 0 < rows[2]["loss_rgb"] < 10
    head = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]["decoders.depth.head.weight"]
    assert (head == 0).all()


def test_the_loop_thins_depth_masks_it_and_weighs_the_teacher(trained, tmp_path, monkeypatch):
    """What the loop hands to the method's functions: nothing between the settings and Eq. 8 is lost."""
    seen = {"corrupt": [], "velocity_loss": [], "draw_noise_levels": []}
    for name, calls in seen.items():
        original = getattr(train_forcing, name)
        spy = lambda *args, original=original, calls=calls: (calls.append(args), original(*args))[1]
        monkeypatch.setattr(train_forcing, name, spy)
    monkeypatch.setattr(train_forcing, "picture", lambda *args: None)
    line = "--steps 1 --sparsity 0.1 --p-i2d 0.3 --p-d2i 0.1 --distill-hi 0.7 --distill-lo 0.2"
    run(train_forcing, f"{QUICK} {line} --batch-size 32 --init {trained[0]} --out {tmp_path}/run", monkeypatch)
    (image, depth), (rgb_loss, depth_loss, distillation) = seen["corrupt"], seen["velocity_loss"]
    assert [m.p_clean for m in seen["draw_noise_levels"][0][0]] == [0.3, 0.1]
    assert image[3] is None and 0.03 < depth[3].float().mean() < 0.2
    assert depth_loss[3] is depth[3] and rgb_loss[2] is image[2] and depth_loss[2] is depth[2]
    torch.testing.assert_close(distillation[4], 0.7 * depth[2] + 0.2 * (1 - depth[2]))
    assert distillation[2] is image[2]


@pytest.mark.parametrize("script", [train_t2i, train_forcing, sample, evaluate, data])
def test_help_tells_the_default_of_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, "--help", monkeypatch)
    flags = capsys.readouterr().out.partition("show this help message and exit")[2]
    assert len(re.findall(r"^  --", flags, re.MULTILINE)) == flags.count("(default:") > 5


def test_resume_keeps_the_settings_of_the_run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "picture", lambda *args: None)
    run(train_t2i, f"{QUICK} --lr 1e-3 --seed 3 --steps 2 --out {tmp_path}/run", monkeypatch)
    run(train_t2i, f"--resume --steps 3 --out {tmp_path}/run", monkeypatch)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert (settings["lr"], settings["seed"], settings["size"], settings["steps"]) == (1e-3, 3, 16, 3)


def test_the_trained_size_is_the_networks(trained):
    assert Config(**torch.load(trained[1], weights_only=True)["config"]).size == 16


def test_going_on_from_a_checkpoint_of_this_stage_has_no_teacher(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_forcing, "picture", lambda *args: None)
    run(train_forcing, f"{QUICK} --steps 1 --init {trained[1]} --out {tmp_path}/run", monkeypatch)
    assert "loss_distill_rgb" not in losses(tmp_path / "run")[1]


# ---- A third modality: one entry and a data key ----


def test_surface_normals_are_one_entry_and_one_key():
    modalities = (RGB, DEPTH, Modality("normal", channels=3, decoder_depth=1, timesteps="plateau"))
    config = Config(width=64, depth=2, head=16, patch=4, size=16, text_length=160).with_modalities(*modalities)
    torch.manual_seed(0)
    model = DiT(config)
    optimizers = model.configure_optimizers(1e-2)
    values, valid, captions = data.World("train", (16, 16)).samples(range(8))
    x0 = {m.name: m.encode(values[m.name], valid[m.name]) for m in model.modalities}
    text, generator = data.encode_text(captions, config.text_length), torch.Generator().manual_seed(0)
    t = draw_noise_levels(model.modalities, lambda: torch.rand(8, generator=generator))
    noise = {m: torch.randn(x.shape, generator=generator) for m, x in x0.items()}
    history = []
    for _ in range(3):
        x0_hat = model({m: corrupt(x0[m], noise[m], t[m], valid[m]) for m in x0}, t, text)
        each = {m: (x0[m], t[m], valid[m]) for m in x0}
        loss = sum(velocity_loss(x0_hat[m], *each[m]).sum() / scored(*each[m]).sum() for m in x0)
        history.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert history[2] < history[1] < history[0]
    directions = [set(c) for n in (1, 2) for c in itertools.combinations(x0, n)]
    assert len(directions) == 6
    for given in directions:
        levels = noise_levels(list(x0), 3, strength=dict.fromkeys(given, 1.0))
        made = model.sample(levels, noise, text, {m: (values[m], valid[m]) for m in given})
        for m in x0:
            clean = corrupt(x0[m], noise[m], torch.zeros(8), valid[m])
            assert torch.equal(made[m], clean) == (m in given)
            assert made[m].isfinite().all()


# ---- Sampling and evaluation ----


def test_align_is_the_exact_minimum():
    rng = np.random.default_rng(0)
    for case in range(30):
        n = int(rng.integers(3, 60))
        g = rng.uniform(0.5, 10, n)
        p = (g - rng.normal()) / rng.uniform(0.2, 3) + rng.normal(0, 0.3, n) * (rng.random(n) < 0.5)
        p[rng.random(n) < 0.1] = rng.uniform(-20, 20)
        if case % 3 == 0:
            p, g = p.round(1), g.round(1)  # ties: many points on one line
        objective = lambda s, b, p=p, g=g: (np.abs(s * p + b - g) / g).sum()
        found = objective(*evaluate.align(torch.tensor(p), torch.tensor(g)))
        lines = [((g[i] - g[j]) / (p[i] - p[j]), i) for i in range(n) for j in range(i) if p[i] != p[j]]
        best = min((objective(s, g[i] - s * p[i]) for s, i in lines), default=found)  # every line through two points
        assert found <= best * (1 + 1e-9)


def test_scale_is_the_exact_minimum():
    """sum |s p - g| / g is convex and linear between the ratios g / p: its minimum is at one of them."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        g, p = rng.uniform(0.5, 10, 40), rng.normal(1, 1, 40)
        objective = lambda s, g=g, p=p: (np.abs(s * p - g) / g).sum()
        scale, shift = evaluate.align(torch.tensor(p), torch.tensor(g), "scale")
        assert shift == 0 and objective(scale) <= min(objective(s) for s in g / p) * (1 + 1e-12)


def test_least_squares_and_none():
    g, p = torch.rand(50) + 1, torch.rand(50)
    slope, intercept = np.polyfit(p.double().numpy(), g.double().numpy(), 1)
    assert evaluate.align(p, g, "lstsq") == pytest.approx((slope, intercept)) and evaluate.align(p, g, "none") == (1, 0)


def test_outliers_move_least_squares_alone():
    """A tenth of the target a hundred times too far: the L1 modes keep the line, the square does not."""
    g = torch.rand(1000) + 1
    p, far = (g - 0.5) / 3, g.clone()
    far[:100] *= 100
    assert evaluate.align(p, far, "affine") == pytest.approx((3, 0.5), rel=1e-3)
    assert evaluate.align(g / 3, far, "scale") == pytest.approx((3, 0), rel=1e-3)
    assert evaluate.align(p, far, "lstsq")[1] > 2


def test_large_maps_are_aligned_on_a_subsample_of_valid_pixels():
    """64 x 64 cells, each its valid pixel nearest to the middle; the result is applied everywhere."""
    target = torch.rand(1, 200, 300) + 1
    valid = torch.rand(1, 200, 300) < 0.02
    seen = []
    align = evaluate.align
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "align", lambda p, g, mode: (seen.append((mode, len(g))), align(p, g, mode))[1])
        for mode in ("affine", "lstsq"):
            aligned = evaluate.align_map((target - 1) / 2, target, valid, mode)
            torch.testing.assert_close(aligned, target, rtol=1e-4, atol=1e-4)
    cells = {(int((y + 0.5) * 64 / 200), int((x + 0.5) * 64 / 300)) for _, y, x in valid.nonzero().tolist()}
    assert seen == [("affine", len(cells)), ("lstsq", int(valid.sum()))]


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = evaluate.interval(values)
    assert low == pytest.approx(values.mean() - 1.96 / 20, abs=0.02) and high == pytest.approx(
        values.mean() + 1.96 / 20, abs=0.02
    )


def test_align_recovers_an_affine_change_exactly():
    target = torch.rand(200) + 0.5
    scale, shift = evaluate.align((target - 3) / 7, target)
    assert scale == pytest.approx(7, rel=1e-4) and shift == pytest.approx(3, rel=1e-4)
    absrel, delta1, _ = evaluate.depth_metrics(
        ((target - 3) / 7).view(1, 10, 20), target.view(1, 10, 20), torch.ones(1, 10, 20) > 0
    )
    assert absrel < 1e-5 and delta1 == 1


def test_metrics_by_hand():
    target, prediction = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0]), torch.tensor([1.0, 2.0, 4.0, 8.0, 6.0])
    absrel, delta1, _ = evaluate.depth_metrics(prediction.view(1, 1, 5), target.view(1, 1, 5), torch.ones(1, 1, 5) > 0)
    assert absrel == pytest.approx(0.2, abs=1e-6) and delta1 == pytest.approx(0.8)


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, 3.0])
    b = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * scale + shift
    closed = (shift.square() + (1 - scale) ** 2).sum().item()
    moments = [evaluate.Moments(), evaluate.Moments()]
    for m, rows in zip(moments, (a, b), strict=True):
        for part in rows.split([7, 9993, 10_000]):  # batches of any size
            m.add(part)
    torch.testing.assert_close(moments[1].mean, b.mean(0))
    torch.testing.assert_close(moments[1].covariance, torch.cov(b.T))
    assert evaluate.frechet_distance(*moments) == pytest.approx(closed, rel=0.02)
    assert evaluate.frechet_distance(moments[0], moments[0]) == pytest.approx(0, abs=1e-9)


def test_colours_of_the_real_world_are_found_and_shuffled_ones_are_not():
    values, _, captions = data.World("val", (32, 32)).samples(range(200))
    seen = [evaluate.colors_in(rgb) for rgb in values["rgb"]]
    assert evaluate.following(seen, captions) > 0.9
    assert evaluate.following(seen, captions[1:] + captions[:1]) < 0.4
    assert not evaluate.colors_in(torch.zeros(3, 32, 32))


def test_evaluation_does_not_depend_on_the_batch_size(trained, tmp_path, monkeypatch):
    results = []
    for size in (2, 6):
        line = (
            f"--checkpoint {trained[1]} --images 6 --steps 2 --size 16 --device cpu --batch-size {size} --measured 0.5"
        )
        run(evaluate, f"depth {line} --out {tmp_path}/{size}", monkeypatch)
        results.append(json.loads((tmp_path / f"{size}/results.json").read_text()))
    assert {"absrel", "delta1", "baseline_absrel", "shuffled_absrel", "steps", "images"} <= set(results[0])
    for key in ("absrel", "baseline_absrel", "shuffled_absrel", "completed_absrel", "filled_absrel"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4)
    run(evaluate, f"depth {line} --align none --out {tmp_path}/metres", monkeypatch)
    metres = json.loads((tmp_path / "metres/results.json").read_text())
    for key in ("completed_absrel", "filled_absrel"):  # never aligned
        assert metres[key] == results[1][key]
    assert metres["absrel"] != results[1]["absrel"]
    for checkpoint in trained:
        line = f"--checkpoint {checkpoint} --images 8 --steps 2 --size 16 --device cpu --out {tmp_path}/image"
        run(evaluate, f"image {line}", monkeypatch)
    assert {"frechet", "following", "shuffled_following"} <= set(
        json.loads((tmp_path / "image/results.json").read_text())
    )


# ---- Real data and benchmarks ----


def results(line, out, monkeypatch):
    run(evaluate, f"{line} --device cpu --out {out}/results", monkeypatch)
    return json.loads((out / "results/results.json").read_text())


def test_every_layout_gives_the_same_numbers(trained, world, tmp_path, monkeypatch):
    found = {
        path: results(f"depth --checkpoint {trained[1]} --size 16 --data {world / path}", tmp_path, monkeypatch)
        for path in ("folder", "shards/{000..001}.tar", "moge")
    }
    for other in found.values():
        for key in ("absrel", "delta1", "baseline_absrel"):
            assert other["images"] == 12 and other[key] == pytest.approx(found["folder"][key], abs=1e-4)


def test_saved_predictions_score_as_the_model_does(trained, world, tmp_path, monkeypatch):
    """--save-predictions, then --predictions: the same table, over two datasets and their mean, with an ensemble."""
    line = f"depth --size 16 --data {world}/folder,{world}/moge --align lstsq"
    ours = results(
        f"{line} --checkpoint {trained[1]} --ensemble 3 --save-predictions {tmp_path}/maps", tmp_path, monkeypatch
    )
    again = results(f"{line} --predictions {tmp_path}/maps", tmp_path, monkeypatch)
    for key in (f"{world}/folder", f"{world}/moge", "mean"):
        assert ours[key] == again[key]
    assert ours["mean"]["absrel"] == pytest.approx(
        np.mean([ours[f"{world}/{d}"]["absrel"] for d in ("folder", "moge")])
    )


def test_perfect_predictions_score_zero_at_any_resolution(tmp_path, monkeypatch, capsys):
    """Maps of the whole picture are cropped and resized as it is; a benchmark's name brings its size and range."""
    folder, x = tmp_path / "NYUv2", np.linspace(1, 12, 600, dtype=np.float32)
    folder.mkdir(), (tmp_path / "maps").mkdir()
    depth = np.add.outer(np.sin(np.arange(700) / 70).astype(np.float32), x) + 1
    data.export(folder, "moge", [(np.zeros((700, 600, 3), np.uint8), depth, "", 1.0)])
    line, sizes, score = (
        f"depth --data {folder} --predictions {tmp_path}/maps --align scale",
        [],
        evaluate.depth_metrics,
    )
    spy = lambda *a: (sizes.append((a[1].shape, a[1][a[2]].max().item())), score(*a))[1]
    monkeypatch.setattr(evaluate, "depth_metrics", spy)
    for shrunk, allowed in ((1, 2e-3), (4, 5e-3)):
        np.save(
            tmp_path / "maps/000000.npy", depth.reshape(700 // shrunk, shrunk, 600 // shrunk, shrunk).mean((1, 3)) * 3
        )
        found = results(line, tmp_path, monkeypatch)
        assert found["absrel"] < allowed and found["delta1"] == 1 and found["scored_at"] == [480, 640]
        assert sizes[0][0] == (1, 480, 640) and 9.9 < sizes[0][1] <= 10
    np.save(tmp_path / "maps/000000.npy", np.ones((518, 518)))
    with pytest.raises(SystemExit):
        results(line, tmp_path, monkeypatch)
    assert "000000.npy: of another shape than its image, (518, 518) beside (700, 600)" in capsys.readouterr().err


class Statistics(torch.nn.Module):
    """A feature extractor as a TorchScript file: mean and spread of each channel of uint8 images."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if images.dtype != torch.uint8 or not return_features:
            return torch.zeros(len(images), 1)
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


def test_frechet_distance_with_a_torchscript_file(trained, world, tmp_path, monkeypatch):
    torch.jit.script(Statistics()).save(tmp_path / "features.pt")
    extract = evaluate.load_features(tmp_path / "features.pt", "cpu", (8, 8))
    grey = extract(torch.zeros(3, 3, 8, 8))
    assert grey.dtype == torch.float64 and grey.tolist() == [[128, 128, 128, 0, 0, 0]] * 3
    line = (
        f"image --checkpoint {trained[0]} --size 16 --steps 2 --data {world}/folder --features {tmp_path}/features.pt"
    )
    found = [results(f"{line} --batch-size {n}", tmp_path, monkeypatch) for n in (5, 12)]
    assert (
        found[0]["images"] == 12
        and found[0]["frechet"] == pytest.approx(found[1]["frechet"], rel=1e-3)
        and found[0]["frechet"] > 0
    )


def test_missing_depth_is_noise_while_a_hint_is_followed(trained, tmp_path, monkeypatch):
    seen, missing = [], ~data.World("val", (16, 16)).samples(range(32))[1]["depth"]
    see = lambda module, given: seen.append(given[0]["depth"][:32]) if isinstance(module, evaluate.DiT) else None
    line = f"follow --images 32 --batch-size 64 --size 16 --steps 3 --strength 0.9 --judge-steps 1 --out {tmp_path}/out"
    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    run(evaluate, f"{line} --checkpoint {trained[1]}", monkeypatch)
    hook.remove()
    first, second, third = seen[:3]  # as the image is made
    assert missing.any() and all(torch.equal(first[missing], x[missing]) for x in (second, third))
    assert not (first == third)[~missing].any()


def test_depth_following(trained, world, tmp_path, monkeypatch):
    """Ours, then another estimator's maps in the same places: the same map in both is followed perfectly."""
    line = f"follow --size 16 --data {world}/folder"
    ours = results(
        f"{line} --checkpoint {trained[1]} --steps 2 --save-predictions {tmp_path}/maps", tmp_path, monkeypatch
    )
    assert ours["absrel"] == pytest.approx(ours["other_absrel"], rel=0.3)  # an untrained network follows nothing
    assert ours["absrel"] > 0 and len(list((tmp_path / "maps/generated").glob("*.png"))) == 12
    unseen = results(f"{line} --checkpoint {trained[1]} --steps 2 --strength 0", tmp_path, monkeypatch)
    assert unseen["absrel"] != ours["absrel"]
    assert results(f"{line} --predictions {tmp_path}/maps", tmp_path, monkeypatch)["absrel"] == ours["absrel"]
    for path in (tmp_path / "maps/real").glob("*.npy"):
        np.save(tmp_path / "maps/generated" / path.name, np.load(path) * 2 + 1)
    found = results(f"{line} --predictions {tmp_path}/maps", tmp_path, monkeypatch)
    assert found["absrel"] < 1e-3 and found["delta1"] == 1


def test_joint_agreement(trained, world, tmp_path, monkeypatch):
    """The depth made with an image, scored on the depth found in it: by this network, another, or another's maps."""
    line = f"joint --size 16 --data {world}/folder"
    here = f"{line} --checkpoint {trained[1]} --steps 2"
    ours = results(f"{here} --save-predictions {tmp_path}/maps", tmp_path, monkeypatch)
    assert results(f"{here} --judge {trained[1]}", tmp_path, monkeypatch)["absrel"] == ours["absrel"]
    assert results(f"{here} --judge {evaluate.data.NANO}", tmp_path, monkeypatch)["absrel"] != ours["absrel"]
    for other in ("--order -5", "--order depth,rgb", "--judge-steps 4"):
        assert results(f"{here} {other}", tmp_path, monkeypatch)["absrel"] != ours["absrel"]
    assert results(f"{line} --predictions {tmp_path}/maps", tmp_path, monkeypatch)["absrel"] == ours["absrel"]
    for path in (tmp_path / "maps/found").glob("*.npy"):  # both kinds of maps belong to the images beside these
        assert path.with_suffix(".png").is_file()
        np.save(tmp_path / "maps/made" / path.name, np.load(path) * 2 + 1)
    found = results(f"{line} --predictions {tmp_path}/maps", tmp_path, monkeypatch)
    assert found["absrel"] < 1e-3 and found["delta1"] == 1 and found["other_absrel"] > 1e-3


def test_a_map_that_any_alignment_fits_has_no_ratio_to_the_baseline(tmp_path, monkeypatch, capsys):
    """Constant depth: what is seen and what is guessed blindly are both exact, which is said, and divides nothing."""
    (tmp_path / "maps").mkdir(), (tmp_path / "world").mkdir()
    flat = [(np.zeros((16, 16, 3), np.uint8), np.full((16, 16), 2, np.float32), "", 1.0)] * 2
    data.export(tmp_path / "world", "folder", flat)
    for i in range(2):
        np.save(tmp_path / f"maps/{i:06}.npy", np.eye(16) + 1)
    line = f"depth --data {tmp_path}/world --predictions {tmp_path}/maps --size 16"
    for align in ("affine", "lstsq"):
        assert results(f"{line} --align {align}", tmp_path / "out", monkeypatch)["absrel"] < 1e-6
        assert "undefined: the baseline is exact" in capsys.readouterr().out


def test_maps_that_hold_nan_or_negative_values_are_scored_without_a_warning(world, tmp_path, monkeypatch, recwarn):
    """NaN where nothing is known; zeros, and a mean below zero, in the maps that others are scored on."""
    for kind in ("generated", "real"):
        (tmp_path / kind).mkdir()
    for path in (world / "folder").glob("*.npy"):
        depth = np.load(path)
        name = path.name.replace(".depth", "")
        np.save(tmp_path / name, np.where(depth > 0, depth, np.nan))
        np.save(tmp_path / "generated" / name, depth + 1)
        np.save(tmp_path / "real" / name, np.where(np.arange(16) < 9, -9 * (np.arange(16) < 7), depth + 1))
    line = f"--size 16 --data {world}/folder --predictions {tmp_path}"
    assert results(f"depth {line}", tmp_path / "out", monkeypatch)["absrel"] < 1e-5
    assert 0 <= results(f"follow {line}", tmp_path / "out", monkeypatch)["absrel"] < 1e-5
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_names_of_many_samples_are_compared_quickly(monkeypatch):
    """20,000 names: to look each one up among all the others would take ten seconds."""
    batches = [[f"{i:06}" for i in range(start, start + 100)] for start in range(0, 20_000, 100)]
    monkeypatch.setattr(data, "open_source", lambda *args: None)
    monkeypatch.setattr(data, "in_order", lambda *args: ((None, None, (), names, ()) for names in batches))
    settings = {"data": "folder", "images": 0, "batch_size": 100, "workers": 0, "ensemble": 1, "save_predictions": ""}
    args = argparse.Namespace(task="depth", **settings)
    start = time.perf_counter()
    indices = [i for *_, some in evaluate.samples_of(args, (16, 16), "cpu") for i in some]
    assert indices == list(range(20_000)) and time.perf_counter() - start < 1


# ---- Frozen encoders ----

TOY = f"--encoders {ROOT}/tests/toy_encoders.py"


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, world):
    """Both stages on the latents and text vectors of the toy encoders, from files."""
    out = tmp_path_factory.mktemp("encoded")
    with pytest.MonkeyPatch.context() as patch:
        run(train_t2i, f"{QUICK} {TOY} --steps 2 --data {world}/folder --out {out}/t2i", patch)
        run(
            train_forcing,
            f"{QUICK} {TOY} --steps 2 --data {world}/moge --init {out}/t2i/last.pt --out {out}/forcing",
            patch,
        )
    return out / "t2i/last.pt", out / "forcing/last.pt"


def test_toy_encoders_train_sample_and_evaluate(encoded, world, tmp_path, monkeypatch):
    assert all(np.isfinite(list(row.values())).all() for row in losses(encoded[1].parent).values())
    config = Config(**torch.load(encoded[1], weights_only=True)["config"])
    assert [m.shape((16, 16)) for m in config.modalities] == [(12, 8, 8), (1, 16, 16)]  # latents, pixels
    assert config.patch == 4 and (config.text_dim, config.text_length) == (16, 20)
    line = (
        f"{TOY} --checkpoint {encoded[1]} --count 1 --steps 2 --size 16 --device cpu --image {world}/folder/000003.jpg"
    )
    run(sample, f"{line} --out {tmp_path}/s", monkeypatch)
    made, given = (np.asarray(Image.open(path)) for path in (tmp_path / "s/000/rgb.png", world / "folder/000003.jpg"))
    assert np.abs(made.astype(int) - given).max() <= 1  # encoded, held clean, decoded
    for task in ("depth", "image", "follow"):
        line = f"{task} {TOY} --checkpoint {encoded[1]} --images 4 --steps 1 --size 16 --data {world}/folder"
        assert results(line, tmp_path, monkeypatch)["images"] == 4


def test_a_stride_that_the_patch_does_not_divide_grows_it():
    """Latents at 1/16: one latent a token; depth pixels follow with patches of 16."""
    encoders = argparse.Namespace(image_channels=128, image_stride=16, text_dim=8, text_length=3)
    config = Config(width=64, depth=1, head=16, patch=4, size=32).with_modalities(RGB, DEPTH).with_encoders(encoders)
    assert config.patch == 16 and config.with_encoders(encoders) == config
    model = DiT(config)
    noisy = {m.name: torch.randn(2, *m.shape((32, 48))) for m in config.modalities}
    assert {m: x.shape[1:] for m, x in noisy.items()} == {"rgb": (128, 2, 3), "depth": (1, 32, 48)}
    made = model(noisy, {m: torch.rand(2) for m in noisy}, torch.randn(2, 3, 8))
    assert {m: x.shape for m, x in made.items()} == {m: x.shape for m, x in noisy.items()}
