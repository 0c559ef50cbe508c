"""The scripts as a user runs them: train, resume, sample, evaluate."""

import argparse
import itertools
import json
import re
import sys
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


# ---- Real data and benchmarks ----


def results(line, out, monkeypatch):
    run(evaluate, f"{line} --device cpu --out {out}/results", monkeypatch)
    return json.loads((out / "results/results.json").read_text())


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
