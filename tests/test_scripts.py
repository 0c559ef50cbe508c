"""The scripts as a user runs them: train, resume, sample, evaluate."""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, world_samples
from PIL import Image

import data
import evaluate
import sample
import train_forcing
import train_t2i
from model import DEPTH, PRESETS, RGB, Config, DiT

ROOT = Path(__file__).parent.parent
QUICK = "--no-compile --device cpu --size 16 --batch-size 4 --log-every 1 --sample-every 100 --warmup 2"
TEACHER = "--distill-hi 0.5 --distill-lo 0.05"


def run(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__name__, *line.split()])
    script.main()


def losses(out):
    """{step: what the run has computed}. A step that was taken again after resuming has its last row."""
    names = ("loss", "error", "grad_norm")
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {k: v for k, v in row.items() if k.startswith(names)} for row in rows}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Two steps of each stage: (t2i checkpoint, forcing checkpoint)."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        run(train_t2i, f"{QUICK} --steps 2 --out {out}/t2i", patch)
        run(train_forcing, f"{QUICK} {TEACHER} --steps 2 --init {out}/t2i/last.pt --out {out}/forcing", patch)
    return out / "t2i/last.pt", out / "forcing/last.pt"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Twelve scenes as folder/, as shards/ (two of them) and as moge/."""
    out = tmp_path_factory.mktemp("world")
    for layout, write in LAYOUTS.items():
        options = {"per_shard": 7} if layout == "shards" else {}
        write(out / layout, world_samples("val", (16, 16), 12), **options)
    return out


@pytest.fixture
def no_pictures(monkeypatch):
    for script in (train_t2i, train_forcing):
        monkeypatch.setattr(script, "draw_samples", lambda *args: Image.new("RGB", (1, 1)))


# ---- Recipes ----


def parse(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__name__, *line.split()])
    return script.parse()


@pytest.mark.parametrize("script", [train_t2i, train_forcing])
def test_every_preset_has_a_recipe_and_flags_come_before_it(script, monkeypatch):
    flags = "--init none" if script is train_forcing else ""
    for preset in PRESETS:
        args = vars(parse(script, f"{flags} --preset {preset} --beta2 0.5", monkeypatch))
        expected = script.RECIPES[preset] | {"beta2": 0.5, "recipe": preset}
        assert {name: args[name] for name in expected} == expected


def test_forcing_has_the_recipe_of_the_preset_that_trained_init(trained, tmp_path, monkeypatch):
    assert parse(train_forcing, f"--init {trained[0]}", monkeypatch).recipe == "nano"
    state = torch.load(trained[0], weights_only=True)
    state["settings"]["preset"] = "370m"
    del state["settings"]["recipe"]  # as an earlier version saved it
    torch.save(state, tmp_path / "370m.pt")
    args = parse(train_forcing, f"--init {tmp_path}/370m.pt", monkeypatch)
    assert (args.recipe, args.batch_size, args.distill_hi) == ("370m", 1024, 0.5)
    args = parse(train_forcing, f"--init {tmp_path}/370m.pt --backbone extras/flux2.py", monkeypatch)
    assert args.recipe == "backbone"


@pytest.mark.parametrize(("preset", "share"), [("nano", 0.3), ("370m", 0.2)])
def test_nano_alone_departs_from_the_papers_share_of_clean_samples(preset, share, monkeypatch):
    args = parse(train_forcing, f"--init none --preset {preset} --p-clean depth=0.4", monkeypatch)
    assert [m.p_clean for m in train_forcing.choose_modalities(args)] == [0.2, 0.4]
    args = parse(train_forcing, f"--init none --preset {preset}", monkeypatch)
    assert [m.p_clean for m in train_forcing.choose_modalities(args)] == [share, share]


def test_the_learning_rate_warms_up_stays_and_falls_to_zero():
    run = data.Run.__new__(data.Run)
    for cooldown, last in ((0.5, [0.75, 0.5, 0.25]), (0, [1, 1, 1])):
        run.args = argparse.Namespace(lr=0.1, warmup=2, cooldown=cooldown, steps=8)
        rates = []
        for step in range(1, 9):
            run.step = step
            rates.append(run.learning_rate() / run.args.lr)
        assert rates == pytest.approx([0.5, 1, 1, 1, 1, *last])


# ---- Training ----


@pytest.mark.parametrize(
    ("stage", "source"),
    [("forcing", "synthetic"), ("t2i", "shards/{000..001}.tar"), ("forcing", "folder")],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    stage, source, trained, world, no_pictures, tmp_path, monkeypatch
):
    script = {"t2i": train_t2i, "forcing": train_forcing}[stage]
    line = f"{QUICK} --steps 5 --checkpoint-every 2 --data {source if source == 'synthetic' else world / source}"
    if stage == "forcing":
        line += f" --init {trained[0]}"
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
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True)["ema"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_run_directory_holds_what_is_promised(trained):
    out = trained[1].parent
    rows = losses(out)
    assert set(rows) == {1, 2} and {"loss", "loss_rgb", "loss_depth", "loss_distill_rgb"} <= set(rows[1])
    assert json.loads((out / "config.json").read_text())["steps"] == 2
    assert Image.open(next((out / "samples").glob("*.png"))).width > 500


def test_a_row_adds_up(trained):
    """The loss is the sum of its terms. An error has no weight, and a loss divides it by t^2."""
    for row in losses(trained[1].parent).values():
        terms = row["loss_rgb"] + row["loss_depth"] + row["loss_distill_rgb"]
        assert row["loss"] == pytest.approx(terms)
        assert 0 < row["error_rgb"] < row["loss_rgb"] and 0 < row["error_depth"] < row["loss_depth"]


def test_first_distillation_loss_is_what_depth_tokens_alone_change(trained):
    """At step one the student is the teacher plus silent parts: it differs by its attention to depth tokens alone."""
    rows = losses(trained[1].parent)
    assert 0 <= rows[1]["loss_distill_rgb"] < 0.005 * rows[1]["loss_rgb"]


def test_training_on_rgb_only_rows(trained, no_pictures, tmp_path, monkeypatch):
    """Rows without any depth train the image alone: the depth head gets no gradient, and nothing is NaN."""
    samples = data.SyntheticWorld.samples

    def without_depth(self, indices):
        batch = samples(self, indices)
        batch.values["depth"] *= torch.nan
        batch.valid["depth"] &= False
        return batch

    monkeypatch.setattr(data.SyntheticWorld, "samples", without_depth)
    run(train_forcing, f"{QUICK} --steps 2 --init {trained[0]} --out {tmp_path}/run", monkeypatch)
    rows = losses(tmp_path / "run")
    assert "loss_depth" not in rows[2] and 0 < rows[2]["loss_rgb"] < 10
    head = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]["decoders.depth.head.weight"]
    assert (head == 0).all()


def spied(name, monkeypatch):
    """The list of the arguments of all calls of a function in train_forcing."""
    calls = []
    original = getattr(train_forcing, name)

    def spy(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(train_forcing, name, spy)
    return calls


def test_the_loop_thins_depth_masks_it_and_weighs_the_teacher(trained, no_pictures, tmp_path, monkeypatch):
    """What the loop hands to the method's functions: nothing between the settings and Eq. 8 is lost."""
    names = ("corrupt", "squared_error", "draw_noise_levels", "distillation_weight")
    calls = {name: spied(name, monkeypatch) for name in names}
    line = "--steps 1 --sparsity 0.1 --p-clean rgb=0.3,depth=0.1 --distill-hi 0.7 --distill-lo 0.2 --batch-size 32"
    run(train_forcing, f"{QUICK} {line} --init {trained[0]} --out {tmp_path}/run", monkeypatch)
    image, depth = calls["corrupt"]
    assert image[3] is None and 0.03 < depth[3].float().mean() < 0.2

    (levels,) = calls["draw_noise_levels"]
    assert [m.p_clean for m in levels[0]] == [0.3, 0.1] and levels[3] is False
    assert torch.equal(levels[2]["depth"], depth[3].flatten(1).any(1))

    image_error, depth_error, distillation = calls["squared_error"]
    for call, (_, _, t, valid) in ((image_error, image), (depth_error, depth), (distillation, image)):
        noised = t.view(-1, 1, 1, 1) > 0
        expected = noised if valid is None else noised & valid
        assert torch.equal(call[2], expected.expand_as(call[2]))
    assert image_error[1] is image[0] and depth_error[1] is depth[0] and distillation[1] is not image[0]
    assert distillation[0] is image_error[0]

    (weight,) = calls["distillation_weight"]
    assert torch.equal(weight[0], depth[2]) and weight[1:] == (0.2, 0.7)


def test_one_mask_thins_all_modalities_but_the_image(no_pictures, tmp_path, monkeypatch):
    calls = spied("corrupt", monkeypatch)
    line = "--init none --modalities rgb,normal,depth --sparsity 0.3 --steps 1"
    run(train_forcing, f"{QUICK} {line} --out {tmp_path}/run", monkeypatch)
    image, normal, depth = calls
    assert image[3] is None and torch.equal(normal[3], depth[3])  # both are missing in the sky alone


def test_what_the_teacher_lacks_sets_its_weight(trained, no_pictures, tmp_path, monkeypatch):
    """A network of image and depth that grows normals teaches both, by the noise level of the normals."""
    weights = spied("distillation_weight", monkeypatch)
    corrupted = spied("corrupt", monkeypatch)
    line = f"--init {trained[1]} --modalities rgb,depth,normal --steps 1 {TEACHER}"
    run(train_forcing, f"{QUICK} {line} --out {tmp_path}/run", monkeypatch)
    assert torch.equal(weights[0][0], corrupted[2][2])
    assert {"loss_distill_rgb", "loss_distill_depth"} <= set(losses(tmp_path / "run")[1])


@pytest.mark.parametrize("script", [train_t2i, train_forcing, sample, evaluate, data])
def test_help_tells_the_default_of_every_flag(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, "--help", monkeypatch)
    flags = capsys.readouterr().out.partition("show this help message and exit")[2]
    assert len(re.findall(r"^  --", flags, re.MULTILINE)) == flags.count("(default:") >= 5
    assert "(default: )" not in flags and "{}" not in flags and "[]" not in flags
    assert ("--depth-scale" in flags) == (script in (train_forcing, evaluate))


@pytest.mark.parametrize("script", [train_t2i, train_forcing])
def test_a_dry_run_prints_the_cost_and_writes_nothing(script, tmp_path, monkeypatch, capsys):
    run(script, f"--preset 3b --dry-run --out {tmp_path}/run", monkeypatch)
    printed = capsys.readouterr().out
    assert f"recipe of 3b: --steps {script.RECIPES['3b']['steps']} --batch-size 1024" in printed
    assert re.search(r"\d\d\d\d\.\dM parameters, .* GFLOP per training image without a teacher", printed)
    assert not (tmp_path / "run").exists()


def test_resume_keeps_the_settings_of_the_run(no_pictures, tmp_path, monkeypatch):
    run(train_t2i, f"{QUICK} --lr 1e-3 --seed 3 --steps 2 --out {tmp_path}/run", monkeypatch)
    run(train_t2i, f"--resume --steps 3 --out {tmp_path}/run", monkeypatch)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert (settings["lr"], settings["seed"], settings["size"], settings["steps"]) == (1e-3, 3, 16, 3)


def test_the_trained_size_is_the_networks(trained):
    assert Config(**torch.load(trained[1], weights_only=True)["config"]).size == 16


def test_going_on_from_a_checkpoint_of_this_stage_has_no_teacher(trained, no_pictures, tmp_path, monkeypatch):
    run(train_forcing, f"{QUICK} --steps 1 --init {trained[1]} --out {tmp_path}/run", monkeypatch)
    assert "loss_distill_rgb" not in losses(tmp_path / "run")[1]


# ---- Three modalities ----


def test_surface_normals_go_through_all_scripts(trained, world, tmp_path, monkeypatch):
    line = f"{QUICK} {TEACHER} --modalities rgb,depth,normal --init {trained[0]} --data {world}/folder --steps 3"
    run(train_forcing, f"{line} --clean-subsets --p-clean rgb=0.5,depth=0.4 --out {tmp_path}/run", monkeypatch)
    row = losses(tmp_path / "run")[3]
    assert np.isfinite(list(row.values())).all() and {"loss_normal", "error_normal", "loss_distill_rgb"} <= set(row)
    assert Image.open(tmp_path / "run/samples/0000003.png").height > 9 * 100  # rows: real, given the others, joint

    network = f"--checkpoint {tmp_path}/run/last.pt --size 16 --steps 2 --device cpu"
    run(sample, f"{network} --count 1 --image {world}/folder/000003.jpg --out {tmp_path}/sample", monkeypatch)
    normal = np.load(tmp_path / "sample/000/normal.npy")
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, rtol=1e-3)
    run(evaluate, f"normal {network} --images 4 --out {tmp_path}/results", monkeypatch)
    assert json.loads((tmp_path / "results/results.json").read_text())["images"] == 4


# ---- Frozen encoders ----

TOY = f"--encoders {ROOT}/tests/toy_encoders.py"


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, world):
    """Both stages on the latents and text vectors of the toy encoders, from files."""
    out = tmp_path_factory.mktemp("encoded")
    line = f"{QUICK} {TOY} --steps 2"
    with pytest.MonkeyPatch.context() as patch:
        run(train_t2i, f"{line} --data {world}/folder --out {out}/t2i", patch)
        run(train_forcing, f"{line} --data {world}/moge --init {out}/t2i/last.pt --out {out}/forcing", patch)
    return out / "t2i/last.pt", out / "forcing/last.pt"


def test_encoders_go_with_a_preset(encoded, trained, no_pictures, tmp_path, monkeypatch, capsys):
    """A preset has no encoders, but the checkpoint that it starts from has."""
    line = f"{QUICK} {TEACHER} {TOY} --preset nano --init {encoded[0]} --steps 1"
    run(train_forcing, f"{line} --out {tmp_path}/run", monkeypatch)
    assert "loss_distill_rgb" in losses(tmp_path / "run")[1]
    run(train_forcing, f"--dry-run --init {trained[0]} {TEACHER}", monkeypatch)
    assert "with the teacher" in capsys.readouterr().out


def test_toy_encoders_train_sample_and_evaluate(encoded, world, tmp_path, monkeypatch):
    assert all(np.isfinite(list(row.values())).all() for row in losses(encoded[1].parent).values())
    config = Config(**torch.load(encoded[1], weights_only=True)["config"])
    assert [m.shape((16, 16)) for m in config.modalities] == [(12, 8, 8), (1, 16, 16)]  # latents, pixels
    assert config.patch == 4 and (config.text_dim, config.text_length) == (16, 20)
    image = world / "folder/000003.jpg"
    line = f"{TOY} --checkpoint {encoded[1]} --count 1 --steps 2 --size 16 --device cpu --image {image}"
    run(sample, f"{line} --out {tmp_path}/s", monkeypatch)
    made, given = (np.asarray(Image.open(path)) for path in (tmp_path / "s/000/rgb.png", image))
    assert np.abs(made.astype(int) - given).max() <= 1  # encoded, held clean, decoded
    for task in ("depth", "image", "follow"):
        line = f"{task} {TOY} --checkpoint {encoded[1]} --images 4 --steps 1 --size 16 --data {world}/folder"
        run(evaluate, f"{line} --device cpu --out {tmp_path}/{task}", monkeypatch)
        assert json.loads((tmp_path / task / "results.json").read_text())["images"] == 4


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
