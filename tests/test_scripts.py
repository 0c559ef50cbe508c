"""The scripts as a user runs them: train, resume, sample, evaluate, and what they say to bad input."""

import functools
import itertools
import json
import os
import subprocess
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
from model import DEPTH, RGB, Config, DiT, Modality, corrupt, draw_noise_levels, sampling_grid, velocity_loss

ROOT = Path(__file__).parent.parent
QUICK = "--device cpu --size 16 --batch-size 4 --log-every 1 --sample-every 100 --warmup 2"


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


@pytest.mark.parametrize("stage", ["t2i", "forcing"])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(stage, trained, tmp_path, monkeypatch):
    script = {"t2i": train_t2i, "forcing": train_forcing}[stage]
    line = f"{QUICK} --steps 5 --checkpoint-every 2" + (f" --init {trained[0]}" if stage == "forcing" else "")
    monkeypatch.setattr(script, "picture", lambda *args: None)
    run(script, f"{line} --out {tmp_path}/whole", monkeypatch)
    save = data.save_checkpoint

    def save_then_die(path, state):
        save(path, state)
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
    assert rows[2]["loss_depth"] == 0 and 0 < rows[2]["loss_rgb"] < 10
    head = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]["decoders.depth.head.weight"]
    assert (head == 0).all()


def test_two_ranks_train_together(trained, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for script, extra in (("train_t2i.py", ""), ("train_forcing.py", f"--init {trained[0]}")):
        line = f"{QUICK} --steps 2 --out {tmp_path}/{script} {extra}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, script, *line.split()]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        rows = losses(tmp_path / script)
        assert set(rows) == {1, 2} and all(np.isfinite(list(row.values())).all() for row in rows.values())


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


def test_compiled_training_with_a_teacher(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    monkeypatch.setattr(train_forcing, "picture", lambda *args: None)
    run(train_forcing, f"{QUICK} --steps 2 --compile --init {trained[0]} --out {tmp_path}/run", monkeypatch)
    assert losses(tmp_path / "run")[1]["loss"] == pytest.approx(losses(trained[1].parent)[1]["loss"], rel=1e-4)


def test_resume_keeps_the_settings_of_the_run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "picture", lambda *args: None)
    run(train_t2i, f"{QUICK} --lr 1e-3 --seed 3 --steps 2 --out {tmp_path}/run", monkeypatch)
    run(train_t2i, f"--resume --steps 3 --out {tmp_path}/run", monkeypatch)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert (settings["lr"], settings["seed"], settings["size"], settings["steps"]) == (1e-3, 3, 16, 3)


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
    t = draw_noise_levels(model.modalities, 8, generator)
    noise = {m: torch.randn(x.shape, generator=generator) for m, x in x0.items()}
    history = []
    for _ in range(3):
        x0_hat = model({m: corrupt(x0[m], noise[m], t[m], valid[m]) for m in x0}, t, text)
        totals = {m: velocity_loss(x0_hat[m], x0[m], t[m], valid[m]) for m in x0}
        loss = sum(total.sum() / count.sum() for total, count in totals.values())
        history.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert history[2] < history[1] < history[0]
    grid = sampling_grid(3)
    directions = [set(c) for n in (1, 2) for c in itertools.combinations(x0, n)]
    assert len(directions) == 6
    for given in directions:
        start = {m: corrupt(x0[m], noise[m], torch.zeros(8), valid[m]) if m in given else noise[m] for m in x0}
        made = model.sample({m: grid * 0 if m in given else grid for m in x0}, start, text)
        for m in x0:
            assert torch.equal(made[m], start[m]) == (m in given)
            assert made[m].isfinite().all()


# ---- Sampling and evaluation ----


def test_sample_writes_everything_and_repeats_itself(trained, tmp_path, monkeypatch):
    line = f"--checkpoint {trained[1]} --count 2 --steps 3 --device cpu --size 16"
    for out in ("a", "b"):
        run(sample, f"{line} --prompt ball --out {tmp_path}/{out}", monkeypatch)
    a, b = tmp_path / "a/001", tmp_path / "b/001"
    assert {p.name for p in a.iterdir()} == {"rgb.png", "depth.npy", "depth.png", "cloud.ply", "metadata.json"}
    assert (a / "rgb.png").read_bytes() == (b / "rgb.png").read_bytes()
    assert json.loads((a / "metadata.json").read_text())["prompt"] == "ball"
    header, points = (a / "cloud.ply").read_bytes().split(b"end_header\n")
    assert len(points) == 15 * int(header.split(b"vertex ")[1].split()[0]) > 0
    run(sample, f"{line} --image {a}/rgb.png --out {tmp_path}/i2d", monkeypatch)
    assert (
        np.abs(np.asarray(Image.open(tmp_path / "i2d/000/rgb.png")).astype(int) - Image.open(a / "rgb.png")).max() <= 1
    )
    depth = np.linspace(1, 5, 256, dtype=np.float32).reshape(16, 16)
    depth[:4] = 0
    np.save(tmp_path / "d.npy", depth)
    run(sample, f"{line} --depth {tmp_path}/d.npy --out {tmp_path}/d2i", monkeypatch)
    relative = np.load(tmp_path / "d2i/000/depth.npy")
    assert (relative[:4] == 0).all() and np.allclose(relative[4:] * depth[4:].mean(), depth[4:], rtol=1e-3)


def test_orders_are_tables():
    grid = sampling_grid(4)
    table = sample.noise_levels(float("inf"), 4, {})
    assert table["rgb"].tolist() == [*grid.tolist(), 0, 0, 0, 0] and table["depth"].tolist() == [
        1,
        1,
        1,
        1,
        *grid.tolist(),
    ]
    table = sample.noise_levels(float("-inf"), 4, {})
    assert table["depth"].tolist() == [*grid.tolist(), 0, 0, 0, 0]
    torch.testing.assert_close(sample.noise_levels(0.0, 4, {})["depth"], grid)
    assert (sample.noise_levels(0.0, 4, {"depth": None})["depth"] == 0).all()


def test_pinhole_points(tmp_path):
    depth = np.full((4, 4), 2.0, np.float32)
    sample.write_ply(tmp_path / "c.ply", np.zeros((4, 4, 3), np.uint8), depth, depth > 0, 90.0)
    body = (tmp_path / "c.ply").read_bytes().split(b"end_header\n")[1]
    points = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])["xyz"]
    np.testing.assert_allclose(points[0], [-1.5, 1.5, -2])  # at 90 degrees the half-width is the depth; pixel centres


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
        line = f"--checkpoint {trained[1]} --images 6 --steps 2 --size 16 --device cpu --batch-size {size}"
        run(evaluate, f"depth {line} --out {tmp_path}/{size}", monkeypatch)
        results.append(json.loads((tmp_path / f"{size}/results.json").read_text()))
    assert {"absrel", "delta1", "baseline_absrel", "shuffled_absrel", "steps", "images"} <= set(results[0])
    for key in ("absrel", "baseline_absrel", "shuffled_absrel"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4)
    for checkpoint in trained:
        line = f"--checkpoint {checkpoint} --images 8 --steps 2 --size 16 --device cpu --out {tmp_path}/image"
        run(evaluate, f"image {line}", monkeypatch)
    assert {"frechet", "following", "shuffled_following"} <= set(
        json.loads((tmp_path / "image/results.json").read_text())
    )


# ---- Bad input: one line, exit code 2, nothing lost ----


@pytest.fixture
def files(tmp_path, trained):
    """Names to fill into the command lines below."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("not an image")
    np.save(tmp_path / "wide.npy", np.ones((16, 24)))
    np.save(tmp_path / "empty.npy", np.zeros((16, 16)))
    np.save(tmp_path / "colour.npy", np.ones((16, 16, 3)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "bad.pt").write_bytes(b"\x80garbage")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    return {"tmp": tmp_path, "t2i": trained[0], "forcing": trained[1], "run": trained[1].parent}


BAD = [
    (sample, "--checkpoint {tmp}/none.pt", "none.pt"),
    (sample, "--checkpoint {tmp}/bad.pt", "bad.pt"),
    (sample, "--checkpoint {tmp}/other.pt", "other.pt"),
    (sample, "--checkpoint {t2i}", "no depth"),
    (sample, "--checkpoint {forcing} --image {tmp}/text.png", "text.png"),
    (sample, "--checkpoint {forcing} --image {tmp}/missing.png", "missing.png"),
    (sample, "--checkpoint {forcing} --depth {tmp}/text.png", "text.png"),
    (sample, "--checkpoint {forcing} --depth {tmp}/empty.npy", "no valid pixel"),
    (sample, "--checkpoint {forcing} --depth {tmp}/colour.npy", "shape"),
    (sample, "--checkpoint {forcing} --depth {tmp}/objects.npy", "objects.npy"),
    (sample, "--checkpoint {forcing} --image {tmp}/good.png --depth {tmp}/wide.npy", "shape"),
    (sample, "--checkpoint {forcing} --size 30", "--size 30"),
    (sample, "--checkpoint {forcing} --order sideways", "--order"),
    (sample, "--checkpoint {forcing} --order 99", "--order"),
    (sample, "--checkpoint {forcing} --steps 0", "--steps"),
    (sample, "--checkpoint {forcing} --device warp", "--device"),
    (sample, "--checkpoint {forcing} --device meta", "--device"),
    (evaluate, "depth --checkpoint {forcing} --steps -1", "--steps"),
    (evaluate, "image --checkpoint {forcing} --images 1", "--images"),
    (train_t2i, "--warmup 0 --out {tmp}/x", "--warmup"),
    (train_t2i, "--log-every 0 --out {tmp}/x", "--log-every"),
    (train_t2i, "--batch-size 0 --out {tmp}/x", "--batch-size"),
    (train_t2i, "--seed -1 --out {tmp}/x", "--seed"),
    (train_t2i, "--out {tmp}/text.png", "text.png"),
    (sample, "--checkpoint {forcing} --steps 1 --count 1 --out {tmp}/text.png", "text.png"),
    (sample, "--checkpoint {forcing} --fov 180", "--fov"),
    (evaluate, "depth --checkpoint {forcing} --out {tmp}/text.png", "text.png"),
    (data, "--count 0", "--count"),
    (evaluate, "depth --checkpoint {tmp}/none.pt", "none.pt"),
    (evaluate, "depth --checkpoint {t2i}", "no depth"),
    (evaluate, "depth --checkpoint {forcing} --size 30", "--size 30"),
    (train_t2i, "--preset huge --out {tmp}/x", "--preset huge"),
    (train_t2i, "--size 30 --out {tmp}/x", "--size 30"),
    (train_t2i, "--data nowhere --out {tmp}/x", "--data nowhere"),
    (train_t2i, "--resume --out {tmp}/x", "--resume"),
    (train_forcing, "--init {tmp}/none.pt --out {tmp}/x", "--init"),
    (train_forcing, "--init {tmp}/bad.pt --out {tmp}/x", "--init"),
    (train_forcing, "--init {t2i} --preset tiny --out {tmp}/x", "--init"),
    (train_forcing, "--init {t2i} --out {run}", "already holds a run"),
    (train_forcing, "--init {t2i} --sparsity thin --out {tmp}/x", "--sparsity thin"),
    (train_forcing, "--init {t2i} --p-i2d 0.9 --p-d2i 0.9 --out {tmp}/x", "--p-i2d"),
]


@pytest.mark.parametrize(("script", "line", "says"), BAD, ids=[f"{s.__name__} {line}" for s, line, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(script, line, says, files, monkeypatch, capsys, tmp_path):
    before = (files["run"] / "last.pt").read_bytes()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(script, line.format(**files), monkeypatch)
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(message.splitlines()) == 1 and says in message
    assert (files["run"] / "last.pt").read_bytes() == before
    assert not (tmp_path / "x/config.json").exists()


def test_samples_are_never_overwritten(trained, tmp_path, monkeypatch, capsys):
    line = f"--checkpoint {trained[1]} --count 1 --steps 1 --size 16 --device cpu --out {tmp_path}/s"
    run(sample, line, monkeypatch)
    with pytest.raises(SystemExit):
        run(sample, line, monkeypatch)
    assert "already holds" in capsys.readouterr().err
