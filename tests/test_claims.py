"""The claims: patches do what they say, nothing is measured twice, verdicts are right. And the checkpoint in assets."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import data
import evaluate
import model
import train_forcing
import train_t2i

ROOT = Path(__file__).parent.parent
CLAIMS = ROOT / "tests/claims"


def load(path):
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


report = load(CLAIMS / "report.py")


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """patched(name, file): a script as the patch leaves it, as a module."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def patched(name, file):
        folder = tmp_path / name
        folder.mkdir()
        for path in ROOT.glob("*.py"):
            (folder / path.name).write_bytes(path.read_bytes())
        subprocess.run(["git", "apply", CLAIMS / f"{name}.patch"], cwd=folder, check=True)
        assert any((folder / path.name).read_bytes() != path.read_bytes() for path in ROOT.glob("*.py"))
        return load(folder / file)

    return patched


# ---- Patches: each against what it says ----


def random_network(model, *modalities, **changes):
    torch.manual_seed(0)
    config = model.Config(width=64, depth=1, head=16, patch=4, size=8, decoder_depth=1, text_length=8, **changes)
    network = model.DiT(config.with_modalities(*modalities or (model.RGB, model.DEPTH)))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


def inputs(batch=2):
    """(noisy, t, text) for random_network."""
    g = torch.Generator().manual_seed(1)
    noisy = {"rgb": torch.randn(batch, 3, 8, 8, generator=g), "depth": torch.randn(batch, 1, 8, 8, generator=g)}
    t = {name: torch.rand(batch, generator=g) for name in noisy}
    return noisy, t, torch.zeros(batch, 8, dtype=torch.uint8)


def test_shared_noise_level(patched):
    model = patched("shared", "model.py")
    t = model.draw_noise_levels((model.RGB, model.DEPTH), lambda: torch.rand(1000))
    assert torch.equal(t["rgb"], t["depth"])
    assert 0 < t["rgb"].min() < 0.01
    assert 0.48 < t["rgb"].mean() < 0.52


def record_inputs(model, shared):
    """(image, its noise level, that of depth) at each step of sampling depth from an image of ones."""
    noise, _, text = inputs()
    network = random_network(model, shared=shared)
    seen = []

    def note(module, given):
        noisy, t, _ = given
        seen.append((noisy["rgb"], t["rgb"], t["depth"]))

    network.register_forward_pre_hook(note)
    image = torch.ones(2, 3, 8, 8)
    schedule = model.make_schedule(["rgb", "depth"], 4, strength={"rgb": 1.0})
    samples = network.sample(schedule, noise, text, {"rgb": (image, None)})
    assert torch.equal(samples["rgb"], image)
    assert len(seen) == 4
    return seen


def test_with_a_shared_level_what_is_given_is_noised_to_it(patched):
    model = patched("shared", "model.py")
    noise, _, _ = inputs()
    for x, t, t_depth in record_inputs(model, shared=True):
        assert torch.equal(t, t_depth)
        torch.testing.assert_close(x, model.corrupt(torch.ones_like(x), noise["rgb"], t))
    for x, t, _ in record_inputs(model, shared=False):
        assert (x == 1).all()
        assert (t == 0).all()


@pytest.mark.parametrize("name", ["shared", "filled"])
def test_the_second_stage_trains_with_the_patch(patched, name, tmp_path):
    """These patches change train_forcing.py, too."""
    script = patched(name, "train_forcing.py").__file__
    flags = ["--init", "none", "--size", "8", "--steps", "1", "--batch-size", "2", "--sparsity", "0.1"]
    subprocess.run([sys.executable, script, *flags, "--out", tmp_path / "out"], check=True, capture_output=True)
    config = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["config"]
    assert config.get("shared", False) == (name == "shared")


def test_zeros_in_missing_pixels(patched):
    model = patched("zeros", "model.py")
    x0 = torch.ones(2, 1, 4, 4)
    noise = torch.full((2, 1, 4, 4), 5.0)
    t = torch.tensor([0.25, 1.0])
    valid = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    x_t = model.corrupt(x0, noise, t, valid)
    assert (x_t[~valid] == 0).all()
    assert set(x_t[valid].tolist()) == {2.0, 5.0}


def test_holes_are_filled_by_the_nearest(patched):
    data = patched("filled", "data.py")
    depth = torch.rand(3, 1, 12, 16, generator=torch.Generator().manual_seed(0)) + 1
    valid = torch.rand(3, 1, 12, 16, generator=torch.Generator().manual_seed(1)) < 0.1
    valid[2] = False
    wanted = torch.ones_like(valid)
    wanted[1, :, :4] = False
    filled, mask = data.fill(depth, valid, wanted)
    assert torch.equal(mask[:2], wanted[:2])
    assert not mask[2].any()
    assert torch.equal(filled[valid], depth[valid])
    for i in range(2):
        positions = torch.ones(12, 16).nonzero().float()
        distance = torch.cdist(positions, valid[i, 0].nonzero().float())
        nearest = depth[i, 0][valid[i, 0]][distance.argmin(1)].view(12, 16)
        assert set(filled[i].unique().tolist()) == set(depth[i][valid[i]].tolist())
        assert (filled[i, 0] == nearest).float().mean() > 0.8  # the others are ties
    assert "data.fill(" in (Path(data.__file__).parent / "train_forcing.py").read_text()


def test_velocity_prediction_moves_from_the_noisy_depth(patched):
    noisy, t, text = inputs()
    v = random_network(model)(noisy, t, text)
    x0_hat = random_network(patched("velocity", "model.py"))(noisy, t, text)
    torch.testing.assert_close(x0_hat["depth"], noisy["depth"] + t["depth"].view(-1, 1, 1, 1) * v["depth"])
    assert torch.equal(x0_hat["rgb"], v["rgb"])


def test_without_mixing_a_modality_knows_its_own_timestep_alone(patched):
    network = random_network(patched("unmixed", "model.py"))
    noisy, t, text = inputs()
    for block in network.blocks:  # attention would carry the other's modulation
        block.fused_out.weight.data.zero_()
    moved = {**t, "depth": 1 - t["depth"]}
    assert torch.equal(network(noisy, t, text)["rgb"], network(noisy, moved, text)["rgb"])
    assert not any("cross_time" in name for name in network.state_dict())


def test_plain_logit_normal(patched):
    assert patched("logit-normal", "model.py").DEPTH.timesteps == "logit-normal"


def test_presets(patched):
    model = patched("presets", "model.py")
    networks = {name: model.PRESETS[name].with_modalities(model.RGB, model.DEPTH) for name in model.PRESETS}
    depths = {name: network.modalities[1].decoder_depth for name, network in networks.items()}
    assert [depths[name] for name in ("detokenizer-0", "nano", "detokenizer-2")] == [0, 1, 2]
    assert [networks[name].width for name in ("narrow", "nano", "wide")] == [64, 128, 192]
    for name in ("narrow", "wide", "detokenizer-0"):
        model.DiT(networks[name])


def test_rooms_are_scenes_of_the_world_with_one_object(patched):
    rooms = patched("rooms", "data.py").draw_scenes("train", range(64))
    world = data.draw_scenes("train", range(64))
    assert (rooms["count"] == 1).all()
    assert (world["count"] > 1).any()
    assert not rooms["outside"].any()
    assert world["outside"].any()
    for key in ("shape", "color", "floor", "fov", "height"):
        assert torch.equal(rooms[key], world[key])


def test_indoors_are_the_same_objects_never_on_open_ground(patched):
    indoors = patched("indoors", "data.py").draw_scenes("val", range(64))
    world = data.draw_scenes("val", range(64))
    assert not indoors["outside"].any()
    assert world["outside"].any()
    for key in ("count", "shape", "color", "floor", "fov", "height"):
        assert torch.equal(indoors[key], world[key])
    objects = slice(0, data.MAX_OBJECTS)  # the last solid is the room
    assert torch.equal(indoors["centre"][:, objects], world["centre"][:, objects])


def test_a_network_has_not_drifted_from_itself(tmp_path, monkeypatch):
    def save(name, *modalities):
        network = random_network(model, *modalities)
        state = {"config": asdict(network.config), "ema": network.state_dict(), "settings": {}, "step": 1}
        torch.save(state, tmp_path / name)

    def drift(checkpoint):
        line = f"drift.py --checkpoint {tmp_path}/{checkpoint} --teacher {tmp_path}/t2i.pt --out {tmp_path}"
        monkeypatch.setattr(sys, "argv", line.split())
        load(CLAIMS / "drift.py").main()
        return json.loads((tmp_path / "results.json").read_text())["drift"]

    save("t2i.pt", model.RGB)
    save("forcing.pt", model.RGB, model.DEPTH)
    assert drift("t2i.pt") == 0
    assert drift("forcing.pt") > 0.01


def test_there_is_a_test_for_each_patch():
    tested = set(re.findall(r'patched\("([a-z-]+)"', Path(__file__).read_text()))
    assert tested == {path.stem for path in CLAIMS.glob("*.patch")}


# ---- claims.sh ----

STUB = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
if sys.argv[1] == "-":
    exec(sys.stdin.read().replace("import json, sys", "sys.argv = sys.argv[1:]"))
else:
    def value_of(flag):
        return sys.argv[-sys.argv[::-1].index(flag)]  # the last one counts

    out = Path(value_of("--out"))
    out.mkdir(exist_ok=True)
    if "--steps" in sys.argv and "train_" in sys.argv[1] and "STOPPED" not in os.environ:
        (out / f"step-{int(value_of('--steps')):07}.pt").touch()
    (out / "results.json").write_text(json.dumps({"absrel": 0.1234567, "images": 128, "seed": 0, "order": 5.0}))
    with open(os.environ["CALLS"], "a") as calls:
        print(*sys.argv[1:], sep="|", file=calls)
"""


@pytest.fixture
def claims(tmp_path, monkeypatch):
    """claims(*words): claims.sh of a copy of the repository, whose path has a space, with a stand-in for Python.

    Returns (exit code, lines it printed, what went wrong, [script and arguments of each call of Python]).
    """
    repository = tmp_path / "a copy"
    calls = tmp_path / "calls"
    shutil.copytree(CLAIMS, repository / "tests/claims", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, repository)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("SEEDS", "7")

    def claims(*words):
        calls.write_text("")
        done = subprocess.run([repository / "tests/claims/claims.sh", *words], capture_output=True, text=True)
        called = []
        for line in calls.read_text().splitlines():
            script, *flags = line.split("|")
            called.append([Path(script).name, *flags])
        return done.returncode, done.stdout.splitlines(), done.stderr, called

    claims.repository = repository
    return claims


def test_claims_are_measured_once_and_again_when_a_command_has_changed(claims):
    code, said, _, called = claims("--list", "4")
    assert code == 0
    assert said[-1] == "0 measurements done, 3 left"
    assert len(said) == 4
    assert not called

    code, said, _, called = claims("4")
    assert code == 0
    assert said == ["3 measurements done, 0 left"]
    trained = [call for call in called if call[0].startswith("train_")]
    assert len(trained) == 5  # two text-to-image networks, three of the second stage
    assert len(called) == 8
    assert all(call[call.index("--seed") + 1] == "7" for call in trained)
    inits = {call[call.index("--init") + 1] for call in trained if "--init" in call}
    work = claims.repository / "runs/claims"
    assert inits == {"none", f"{work}/t2i.7/last.pt", f"{work}/t2i-short.7/last.pt"}
    result = claims.repository / "tests/claims/results/plain/depth.7.json"
    assert json.loads(result.read_text())["absrel"] == 0.123457
    assert json.loads(result.read_text()).keys() == {"made by", "absrel"}
    assert claims("4")[3] == []

    result.write_text(result.read_text().replace("--steps 1200", "--steps 1100"))
    assert "left: claim 3,4,5,9, seed 7, plain: evaluate.py depth --images 256" in claims("--list", "4")[1]
    assert [call[0] for call in claims("4")[3]] == ["evaluate.py"]  # the network is as it was
    (work / "short.7.recipe").write_text("another")
    (result.parent.parent / "short/depth.7.json").unlink()
    assert [call[0] for call in claims("4")[3]] == ["train_forcing.py", "evaluate.py"]


def measure_only(claims, *rows):
    """Leave only the measurements that begin with one of rows, or that are rows, in claims.sh."""
    script = claims.repository / "tests/claims/claims.sh"
    before, after = script.read_text().split('measurements="')
    table, after = after.split('"', 1)
    kept = [line for line in table.splitlines() if line.startswith(rows)] or rows
    script.write_text(before + 'measurements="\n' + "\n".join(kept) + '\n"' + after)


def test_what_an_alternative_or_a_judge_is_belongs_to_its_recipe(claims):
    def scripts_called():
        return [call[0] for call in claims()[3]]

    def left():
        return claims("--list")[1][-1]

    measure_only(claims, "9   zeros        depth ", "2   shared-long  follow-1 ")
    zeros = ["train_forcing.py", "evaluate.py"]
    shared = ["train_t2i.py", "train_forcing.py", "train_forcing.py", "evaluate.py"]
    assert scripts_called() == shared + zeros
    assert left() == "2 measurements done, 0 left"
    (claims.repository / "tests/claims/judge.pt").write_bytes(b"another judge")
    assert left() == "1 measurements done, 1 left"
    assert scripts_called() == ["evaluate.py"]

    patch = claims.repository / "tests/claims/zeros.patch"
    text = patch.read_text()
    patch.write_text("Other words.\n" + text)
    assert left() == "2 measurements done, 0 left"
    patch.write_text(text.replace("x_t, 0.0)", "x_t, 0.5)"))
    assert left() == "1 measurements done, 1 left"
    assert scripts_called() == zeros

    patch.write_text(text.replace("return", "result ="))
    code, _, wrong, called = claims()
    assert code == 2
    assert "zeros.patch does not apply" in wrong
    assert not called


def test_a_training_that_was_stopped_is_not_done(claims, monkeypatch):
    monkeypatch.setenv("STOPPED", "yes")
    code, _, wrong, _ = claims("4")
    assert code == 2 and "was stopped before step" in wrong
    monkeypatch.delenv("STOPPED")
    assert claims("4")[3][0][0] == "train_t2i.py"


@pytest.mark.slow
def test_a_claim_is_trained_and_measured(claims, monkeypatch):
    """By the scripts themselves, in a step each."""
    measure_only(claims, "4   short        depth         evaluate.py depth --images 2")
    script = claims.repository / "tests/claims/claims.sh"
    script.write_text(re.sub(r"--steps (500|1200)", "--steps 1", script.read_text()))
    monkeypatch.setenv("PYTHON", sys.executable)
    code, said, wrong, _ = claims()
    assert code == 0, wrong
    assert said == ["1 measurements done, 0 left"]
    assert json.loads((claims.repository / "tests/claims/results/short/depth.7.json").read_text())["absrel"] > 0


def table(name):
    """Rows of the networks or the measurements of claims.sh, as lists of words."""
    settings, _ = (CLAIMS / "claims.sh").read_text().split("\nfail() {")
    script = f'{settings}\necho "${name}"'
    text = subprocess.check_output(["bash", "-c", script, CLAIMS / "claims.sh"], text=True)
    return [line.split() for line in text.splitlines() if line]


def test_the_scripts_know_the_flags_of_all_commands(monkeypatch):
    for name in ("narrow", "wide", "detokenizer-0", "detokenizer-2"):  # of presets.patch
        monkeypatch.setitem(model.PRESETS, name, model.PRESETS["nano"])
    parse = {"train_t2i.py": train_t2i.parse, "train_forcing.py": train_forcing.parse, "evaluate.py": evaluate.parse}
    commands = [row[2:] for row in table("networks")] + [row[3:] for row in table("measurements")]
    for script, *flags in commands:
        if script in parse:
            monkeypatch.setattr(sys, "argv", [script, *(flag.replace("SEED", "1") for flag in flags)])
            parse[script]()
    assert {script for script, *_ in commands} == {*parse, "data.py", "drift.py"}


def test_claims_refuse_what_they_do_not_know(claims, monkeypatch):
    code, _, wrong, _ = claims("10")
    assert code == 2
    assert wrong.splitlines() == ["claims.sh: 10: give --list, or numbers of claims from 1 to 9"]
    monkeypatch.setenv("SEEDS", "1,2")
    assert claims("--list")[0] == 2


def without_keys(cells):
    """Paths network/measurement/key -> {network/measurement}."""
    return {cell.rsplit("/", 1)[0] for cell in cells}


def test_all_that_the_report_shows_is_measured():
    measured = {}  # {number of the claim: {network/measurement}}
    for claims, network, name, *_ in table("measurements"):
        for number in claims.split(","):
            measured.setdefault(int(number), set()).add(f"{network}/{name}")

    for number, claim in enumerate(report.CLAIMS, 1):
        columns = report.pairs(claim.columns).values()
        rows = report.pairs(claim.rows).values()
        shown = {row + column for row in rows for column in columns}
        compared = {word for word in (claim.comparisons + claim.reference).split() if report.is_cell(word)}
        assert without_keys(compared) <= measured[number] <= without_keys(shown | compared)
        for row in rows:
            assert without_keys(row + column for column in columns) & measured[number], row


# ---- The report ----


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(network, measurement, AbsRel of each seed)."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(network, measurement, numbers, made_by="a command"):
        (tmp_path / network).mkdir(exist_ok=True)
        for seed, number in enumerate(numbers):
            result = {"made by": made_by, "absrel": number}
            (tmp_path / network / f"{measurement}.{seed}.json").write_text(json.dumps(result))

    return write


def test_verdicts(write):
    """Paired by seed: seeds may differ more than networks do. n = 3: 2.92 standard errors."""
    write("a", "depth", [0.10, 0.20, 0.30])
    write("b", "depth", [0.11, 0.22, 0.31])  # differences 0.01, 0.02, 0.01: mean 4 standard errors
    write("c", "depth", [0.11, 0.19, 0.31])  # 0.01, -0.01, 0.01

    def verdict(relation):
        return report.compare(f"words: {relation}")[1]

    assert verdict("a/depth/absrel < b/depth/absrel") == "holds"
    assert verdict("b/depth/absrel < a/depth/absrel") == "doesn't hold here"
    assert verdict("b/depth/absrel > a/depth/absrel") == "holds"
    assert verdict("a/depth/absrel < c/depth/absrel") == "too small to tell"
    assert verdict("a/depth/absrel < none/depth/absrel") == "not measured"
    assert verdict("a/depth/absrel < 0.9 * b/depth/absrel") == "too small to tell"
    assert verdict("a/depth/absrel - b/depth/absrel < c/depth/absrel - c/depth/absrel") == "holds"
    assert report.compare("words: a/depth/absrel < b/depth/absrel")[0] == "words"
    assert "better by 0.0133 ± 0.0033, better in 3 of 3" in report.compare("x: a/depth/absrel < b/depth/absrel")[2]
    assert report.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"


def test_a_result_is_read_by_its_whole_name(write):
    write("a", "follow-0", [0.3, 0.4])
    write("a", "follow-0.95", [0.1, 0.2])
    assert report.values("a/follow-0/absrel") == {0: 0.3, 1: 0.4}
    assert report.values("a/follow-0.95/absrel") == {0: 0.1, 1: 0.2}


def test_seeds_of_different_commands_are_not_averaged(write):
    write("a", "depth", [0.3, 0.4])
    write("a", "depth", [0.2], made_by="another command")
    with pytest.raises(SystemExit, match="different commands"):
        report.values("a/depth/absrel")


def test_a_report_of_few_results_is_drawn(write, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "assets").mkdir()
    for networks in (["plain"], ["plain", "narrow", "wide"]):
        for network in networks:
            write(network, "depth", [0.1])
        text = "\n".join(report.section(5, report.CLAIMS[4]))
        assert "not measured" in text and (tmp_path / "assets/claims/5.png").is_file()
    write("plain", "depth", [0.1, 0.2])
    write("plain-scratch", "depth", [0.3])
    row = next(line for line in report.section(5, report.CLAIMS[4]) if line.startswith("| 128 "))
    assert row.endswith("| 1 |")  # the seeds that every cell of the row has


# ---- assets/nano.pt ----


@pytest.mark.slow
def test_the_checkpoint_is_as_good_as_is_said(tmp_path, monkeypatch, capsys):
    """Issue: AbsRel at most 0.3 of the input-blind baseline's, prompts followed twice as often as shuffled ones."""
    path = ROOT / data.NANO
    state = torch.load(path, weights_only=True)
    assert path.stat().st_size < 8e6 and {x.dtype for x in state["ema"].values()} == {torch.float16}

    def results(line):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *line.split(), "--device", "cpu", "--out", str(tmp_path)])
        evaluate.main()
        assert data.NANO in capsys.readouterr().out
        return json.loads((tmp_path / "results.json").read_text())

    found = results("depth --images 64 --batch-size 64")
    assert found["absrel"] / found["baseline_absrel"] <= 0.3
    found = results("image --images 64 --batch-size 64")
    assert found["following"] >= 2 * found["shuffled_following"]
