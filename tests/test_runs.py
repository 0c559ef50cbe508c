"""Checkpoints and run directories: damaged or foreign ones are refused in one line, and no file is lost."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train_forcing
import train_t2i
from model import DEPTH, NORMAL, RGB, Config, DiT, Modality

ROOT = Path(__file__).parent.parent
QUICK = "--no-compile --device cpu --size 16 --batch-size 4 --log-every 1 --sample-every 1000 --warmup 2"
SMALL = Config(width=64, depth=1, head=16, patch=4, size=16, decoder_depth=1, text_length=8)


def run(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__name__, *line.split()])
    if hasattr(script, "draw_samples"):
        monkeypatch.setattr(script, "draw_samples", lambda *args: Image.new("RGB", (1, 1)))
    data.run_script(script.main)


def refused(capsys, says, call, *args):
    """call(*args) ends with exit code 2 and one line that says so."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(*args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # a bar
    assert stopped.value.code == 2 and len(lines) == 1 and says in lines[0], lines


def written(folder):
    """{path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- Checkpoints: one loader ----


def checkpoint(config=SMALL, step=3):
    torch.manual_seed(0)
    network = DiT(config)
    state = {"config": asdict(config), "settings": {}, "step": step, "skipped": 0, "optimizer": {}}
    return state | {"model": network.state_dict(), "ema": dict(network.state_dict())}


def with_weight(change):
    """Change one weight of a checkpoint."""

    def edit(state):
        state["ema"]["text_tokenizer.bias"] = change(state["ema"]["text_tokenizer.bias"])

    return edit


def with_config(**changes):
    return lambda state: state["config"].update(changes)


def with_entry(**changes):
    return lambda state: state["config"].update(modalities=[asdict(RGB) | changes])


def poisoned(value):
    """A change of a tensor's last element."""

    def change(weight):
        weight = weight.clone()
        weight[-1] = value
        return weight

    return change


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


STATES = {  # what is done to a checkpoint: what the line says
    "missing tensor": (lambda state: state["ema"].pop("text_tokenizer.bias"), "lacks text_tokenizer.bias"),
    "extra tensor": (lambda state: state["ema"].update(more=torch.zeros(1)), "holds more"),
    "wrong shape": (with_weight(lambda w: w[1:]), "text_tokenizer.bias has shape (63,)"),
    "nan": (with_weight(poisoned(torch.nan)), "text_tokenizer.bias is not finite"),
    "infinite": (with_weight(poisoned(torch.inf)), "text_tokenizer.bias is not finite"),
    "no ema": (lambda state: state.pop("ema"), "lacks 'ema'"),
    "no config": (lambda state: state.pop("config"), "lacks 'config'"),
    "no settings": (lambda state: state.pop("settings"), "lacks 'settings'"),
    "config key missing": (lambda state: state["config"].pop("width"), "width"),
    "config key unknown": (with_config(experts=8), "experts"),
    "wider than its weights": (with_config(width=1 << 16, head=64), "has shape"),
    "deeper than its weights": (with_config(depth=900), "lacks blocks.1"),
    "width without heads": (with_config(width=96), "of 4 x head"),
    "text cut": (with_config(text_length=9), "text_length is 9"),
    "modalities a number": (with_config(modalities=3), "config"),
    "twice the same": (with_config(modalities=[asdict(RGB)] * 2), "different names"),
    "name taken": (with_entry(name="keys"), "keys"),
    "encoding unknown": (with_entry(encoding="jpeg"), "'jpeg'"),
    "stride beside the patch": (with_entry(stride=3), "stride of rgb"),
    "entry key unknown": (with_entry(color="red"), "color"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_wrong_checkpoint_is_refused_in_one_line(case, tmp_path, capsys):
    change, says = STATES[case]
    state = checkpoint()
    change(state)
    torch.save(state, tmp_path / "last.pt")
    refused(capsys, says, data.open_network, tmp_path / "last.pt", "--init")


def cut(path):
    torch.save(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:-1000])


FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "a directory": lambda path: path.mkdir(),
    "cut": cut,
    "code": lambda path: torch.save({"config": Evil()}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "weights alone": lambda path: torch.save(checkpoint()["ema"], path),
    "old format": lambda path: torch.save(checkpoint(), path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FILES[case](tmp_path / "last.pt")
    refused(capsys, "last.pt", data.open_network, tmp_path / "last.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_the_network_of_the_repository_loads():
    network, state = data.open_network(data.NANO)
    network.place(torch.device("cpu"))
    assert state["ema"]["text_tokenizer.bias"].dtype == torch.float16
    assert network.text_tokenizer.bias.dtype == torch.float32 and not network.text_tokenizer.bias.requires_grad


# ---- --init ----

INITS = {
    "first not rgb": ([Modality("grey", 3, id=0)], "has grey; add it to --modalities"),
    "a third": ([RGB, DEPTH, NORMAL], "has normal; add it to --modalities"),
    "another second": ([RGB, Modality("normal", 1, id=2)], "has normal"),
    "depth of another encoding": ([RGB, Modality("depth", 1, id=1, decoder_depth=1)], "its depth differs"),
}


@pytest.mark.parametrize("case", INITS)
def test_init_with_other_modalities_is_refused(case, tmp_path, monkeypatch, capsys):
    modalities, says = INITS[case]
    torch.save(checkpoint(SMALL.with_modalities(*modalities)), tmp_path / "init.pt")
    line = f"{QUICK} --init {tmp_path}/init.pt --out {tmp_path}/run"
    refused(capsys, says, run, train_forcing, line, monkeypatch)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lost", ["text_tokenizer.bias", "tokenizers.rgb.weight", "modulations.rgb.weight"])
def test_warm_start_misses_no_weight_of_the_network_taken_over(lost):
    state = DiT(SMALL).state_dict()
    del state[lost]
    with pytest.raises(ValueError, match=lost):
        DiT(SMALL.with_modalities(RGB, DEPTH)).warm_start(state)


def test_warm_start_takes_over_all_modalities_or_the_first():
    both = SMALL.with_modalities(RGB, DEPTH)
    whole = DiT(both)
    grown = DiT(both)
    grown.warm_start(whole.state_dict())
    assert all(torch.equal(value, grown.state_dict()[name]) for name, value in whole.state_dict().items())
    part = {
        name: value
        for name, value in whole.state_dict().items()
        if name != "cross_time_embedders.rgb_to_depth.mlp.0.weight"
    }
    with pytest.raises(ValueError, match="rgb_to_depth"):
        grown.warm_start(part)


# ---- Resuming ----


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of two steps, which no test changes."""
    out = tmp_path_factory.mktemp("ran") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run(train_t2i, f"{QUICK} --steps 2 --out {out}", patch)
    return out


def copy_run(ran, out):
    """A run directory that was copied, as cp -r does."""
    subprocess.run(["cp", "-r", ran, out], check=True)
    return out


TRAINING = ("model", "optimizer", "step")  # an optimizer is lacking in checkpoints of early versions


@pytest.mark.parametrize("key", TRAINING)
def test_a_checkpoint_that_cannot_be_resumed_is_refused(key, ran, tmp_path, monkeypatch, capsys):
    out = copy_run(ran, tmp_path / "run")
    state = torch.load(ran / "last.pt", weights_only=True)
    del state[key]
    torch.save(state, out / "step-0000002.pt")
    with pytest.raises(SystemExit) as stopped:
        run(train_t2i, f"--resume --steps 3 --out {out}", monkeypatch)
    passed_over, refusal = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "no checkpoint" in refusal
    assert f"step-0000002.pt is passed over (it lacks '{key}'" in passed_over


@pytest.mark.parametrize("flag", ["--preset tiny", "--optimizer adamw", "--beta2 0.5", "--weight-decay 0"])
def test_another_network_or_optimizer_is_refused_on_resuming(flag, ran, monkeypatch, capsys):
    says = f"{flag.split()[0]} must be that of the run"
    refused(capsys, says, run, train_t2i, f"--resume {flag} --out {ran}", monkeypatch)


def test_encoders_must_be_named_again_on_resuming(ran, tmp_path, monkeypatch, capsys):
    out = copy_run(ran, tmp_path / "run")
    settings = json.loads((out / "config.json").read_text())
    data.write_json(out / "config.json", settings | {"encoders": "code.py"})
    refused(capsys, "--encoders code.py", run, train_t2i, f"--resume --out {out}", monkeypatch)


def test_a_run_of_an_earlier_version_is_refused_on_resuming(ran, tmp_path, monkeypatch, capsys):
    """Its learning rate had another schedule, whose flags its config.json lacks."""
    out = copy_run(ran, tmp_path / "run")
    settings = json.loads((out / "config.json").read_text())
    del settings["recipe"]
    data.write_json(out / "config.json", settings)
    refused(capsys, "earlier version", run, train_t2i, f"--resume --steps 3 --out {out}", monkeypatch)


def test_settings_of_a_run_come_before_defaults_and_after_flags(tmp_path, monkeypatch):
    settings = {"lr": 1e-5, "steps": 7, "shard": True, "compile": False, "data": "a b", "out": "elsewhere", "old": 1}
    settings |= {"preset": "nano", "recipe": "nano", "optimizer": "muon", "encoders": "plug-in.py"}
    settings |= {"beta2": 0.99, "weight_decay": 0.1}
    data.write_json(tmp_path / "config.json", settings)
    line = ["train_t2i.py", "--resume", "--steps", "9", "--encoders", "other.py", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    args = train_t2i.parse()
    assert (args.lr, args.steps, args.shard, args.compile, args.data) == (1e-5, 9, True, False, "a b")
    assert (args.out, args.encoders, args.resume, args.batch_size) == (str(tmp_path), "other.py", True, 8)
    assert "old" not in vars(args)


def test_settings_by_modality_survive_resuming(tmp_path, monkeypatch):
    line = ["train_forcing.py", "--p-clean", "rgb=0.25,depth=0.5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    data.write_json(tmp_path / "config.json", vars(train_forcing.parse()))
    monkeypatch.setattr(sys, "argv", ["train_forcing.py", "--resume", "--out", str(tmp_path)])
    assert train_forcing.parse().p_clean == {"rgb": 0.25, "depth": 0.5}
    monkeypatch.setattr(sys, "argv", ["train_forcing.py", "--resume", "--p-clean", "depth=0.1", "--out", str(tmp_path)])
    assert train_forcing.parse().p_clean == {"depth": 0.1}


def test_a_copied_run_leaves_the_original_alone(ran, tmp_path, monkeypatch):
    """Even if it is where runs are by default, so that no --out is given: its config.json names the original's."""
    before = written(ran)
    (tmp_path / "runs").mkdir()
    out = copy_run(ran, tmp_path / "runs/t2i")
    monkeypatch.chdir(tmp_path)
    run(train_t2i, "--resume --steps 3", monkeypatch)
    assert written(ran) == before and torch.load(out / "last.pt", weights_only=True)["step"] == 3


# ---- What is saved, and what is removed ----


def test_no_checkpoint_is_written_once_weights_diverge(ran, tmp_path, monkeypatch, capsys):
    """The good one stays, though just one is kept."""
    out = copy_run(ran, tmp_path / "run")
    load = data.Run.resume

    def resume(self):
        load(self)
        with torch.no_grad():
            self.model.text_tokenizer.weight.fill_(torch.inf)

    monkeypatch.setattr(data.Run, "resume", resume)
    with pytest.raises(SystemExit) as stopped:
        run(train_t2i, f"--resume --steps 8 --checkpoint-every 1 --keep 1 --out {out}", monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "no checkpoint of the last step" in lines[-1]
    assert any("step 8: no checkpoint, since weights are not finite" in line for line in lines)
    assert [path.name for path in data.list_checkpoints(out)] == ["step-0000002.pt"]
    assert data.newest_checkpoint(out)["step"] == 2


def test_a_skipped_last_step_saves_the_weights_of_the_step_before(tmp_path, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    norms = iter([1.0, 1.0, 1.0, torch.nan])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * next(norms))
    run(train_t2i, f"{QUICK} --steps 4 --checkpoint-every 2 --out {tmp_path}/run", monkeypatch)
    state = data.newest_checkpoint(tmp_path / "run")
    assert (state["step"], state["skipped"]) == (4, 1)
    assert state["optimizer"]["state"]["text_tokenizer.bias"]["step"] == 3


def test_an_average_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, capsys):
    """Nor is a model that is not: see above."""
    update = data.Run.update_weights

    def update_weights(self):
        update(self)
        self.ema.text_tokenizer.bias.data[3] = torch.nan

    monkeypatch.setattr(data.Run, "update_weights", update_weights)
    with pytest.raises(SystemExit):
        run(train_t2i, f"{QUICK} --steps 1 --out {tmp_path}/run", monkeypatch)
    assert "step 1: no checkpoint, since weights are not finite" in capsys.readouterr().err
    assert not data.list_checkpoints(tmp_path / "run")


def test_the_newest_checkpoints_are_kept_and_last_is_one_of_them(tmp_path):
    for step in (9, 10, 10_000_000, 10_000_001):
        data.save_checkpoint(tmp_path, checkpoint(step=step), keep=2)
        assert data.open_network(tmp_path / "last.pt")[1]["step"] == step
    names = ["step-10000000.pt", "step-10000001.pt"]
    assert [path.name for path in data.list_checkpoints(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", *names]


def test_a_damaged_checkpoint_of_a_later_step_displaces_no_new_one(tmp_path):
    (tmp_path / "step-0000008.pt").write_bytes(b"damaged")
    for step in (4, 6):
        data.save_checkpoint(tmp_path, checkpoint(step=step), keep=1)
        assert data.open_network(tmp_path / "last.pt")[1]["step"] == step
    names = ["step-0000006.pt", "step-0000008.pt"]
    assert [path.name for path in data.list_checkpoints(tmp_path)] == names


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, tmp_path, capsys):
    for step in (1, 2):
        data.save_checkpoint(tmp_path, checkpoint(step=step), keep=2)
    path = tmp_path / "step-0000002.pt"
    path.write_bytes({"cut": path.read_bytes()[:-100], "empty": b"", "text": b"hello"}[damage])
    refused(capsys, "last.pt: cut, damaged", data.open_network, tmp_path / "last.pt")
    assert data.newest_checkpoint(tmp_path)["step"] == 1
    assert "step-0000002.pt is passed over" in capsys.readouterr().err
    (tmp_path / "step-0000001.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        data.newest_checkpoint(tmp_path)
    assert stopped.value.code == 2 and "can be read" in capsys.readouterr().err.splitlines()[-1]
    assert data.newest_checkpoint(tmp_path / "nothing here") == {}


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(tmp_path, monkeypatch):
    data.save_checkpoint(tmp_path, checkpoint(step=1), keep=1)
    before = (tmp_path / "last.pt").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        data.save_checkpoint(tmp_path, checkpoint(step=2), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step-0000001.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_crash_between_a_checkpoint_and_last_pt_harms_neither(tmp_path):
    """It may leave the temporary file as a link to the checkpoint, which the next one must not write through."""
    data.save_checkpoint(tmp_path, checkpoint(step=1), keep=2)
    (tmp_path / "partly-written").symlink_to("step-0000001.pt")
    before = (tmp_path / "step-0000001.pt").read_bytes()
    data.save_checkpoint(tmp_path, checkpoint(step=2), keep=2)
    assert (tmp_path / "step-0000001.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step-0000001.pt", "step-0000002.pt"]


def test_only_checkpoints_of_a_run_are_counted_and_removed(tmp_path):
    (tmp_path / "step-best.pt").write_bytes(b"mine")
    (tmp_path / "step-0000001-copy.pt").write_bytes(b"mine")
    for step in (1, 2, 3):
        data.save_checkpoint(tmp_path, checkpoint(step=step), keep=1)
    names = {"last.pt", "step-0000001-copy.pt", "step-0000003.pt", "step-best.pt"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_two_processes_do_not_share_a_run(tmp_path, capsys):
    """The lock is gone with the process that holds it, even if that is killed."""
    out = tmp_path / "run"
    out.mkdir()
    hold = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint(flush=True)\ninput()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, out / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        refused(capsys, "another process is training in it", data.lock_run, out, True)
        refused(capsys, "another process is training in it", data.lock_run, out, False)
    finally:
        other.kill()
        other.communicate()
    data.lock_run(out, True)
    data.lock_run(out, True)


# ---- Directories and disks ----


def command(script, out, checkpoint):
    """A command line of a few seconds that writes to out."""
    if script is sample:
        return f"--checkpoint {checkpoint} --device cpu --count 1 --steps 1 --size 16 --out {out}"
    if script is evaluate:
        return f"depth --checkpoint {checkpoint} --device cpu --images 2 --steps 1 --size 16 --out {out}"
    if script is data:
        return f"--count 2 --size 16 --out {out}"
    return f"{QUICK} --steps 1 --out {out}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of image and depth."""
    path = tmp_path_factory.mktemp("weights") / "last.pt"
    torch.save(checkpoint(SMALL.with_modalities(RGB, DEPTH)), path)
    return path


@pytest.mark.parametrize("script", [data, evaluate, sample, train_t2i])
def test_a_folder_of_other_files_is_refused_and_left_as_it_is(script, weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mine"
    (out / "samples").mkdir(parents=True)
    for name in ("metadata.jsonl", "config.json", "grid.png", "metrics.jsonl", "samples/a.png", "000000.jpg"):
        (out / name).write_text("mine")
    before = written(out)
    refused(capsys, "choose a new or an empty directory", run, script, command(script, out, weights), monkeypatch)
    assert written(out) == before


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("script", [data, evaluate, sample])
def test_a_full_disk_is_one_line_and_leaves_older_files(script, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "mean_map", lambda *args: torch.ones(1, 16, 16))
    if script is evaluate:
        run(evaluate, command(evaluate, tmp_path, weights), monkeypatch)
    before = written(tmp_path)
    with full_disk(50):
        refused(capsys, "File too large", run, script, command(script, tmp_path, weights), monkeypatch)
    assert written(tmp_path) == before


def test_a_layout_on_a_disk_that_fills_up_has_no_index(tmp_path, monkeypatch, capsys):
    with full_disk(1000):
        refused(capsys, "File too large", run, data, command(data, tmp_path / "x", ""), monkeypatch)
    assert not (tmp_path / "x/metadata.jsonl").exists()


# ---- Errors of a script ----


def failing(error):
    def main():
        raise error

    return main


def test_a_full_disk_or_memory_is_one_line(capsys):
    full = OSError(28, "No space left on device", "runs/grid.png")
    refused(capsys, "No space left on device: 'runs/grid.png'", data.run_script, failing(full))
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")):
        refused(capsys, "lower --batch-size or --size", data.run_script, failing(error))


def test_bugs_keep_their_traceback_and_ctrl_c_is_130():
    for bug in (RuntimeError("shapes"), ValueError(), KeyError("a")):
        with pytest.raises(type(bug)):
            data.run_script(failing(bug))
    with pytest.raises(SystemExit) as stopped:
        data.run_script(failing(KeyboardInterrupt()))
    assert stopped.value.code == 130


def test_ctrl_c_ends_a_script_without_a_traceback(weights, tmp_path):
    line = f"--checkpoint {weights} --device cpu --count 1 --steps 9000 --out {tmp_path}/s"
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *line.split()], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "s").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed


# ---- The loop ----


def test_pictures_that_cannot_be_drawn_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_t2i", *f"{QUICK} --steps 2 --sample-every 1 --out {tmp_path}/run".split()])
    problems = iter([torch.OutOfMemoryError("CUDA out of memory.\nmore"), RuntimeError("cuDNN error")])

    def picture(*args):
        raise next(problems)

    monkeypatch.setattr(train_t2i, "draw_samples", picture)
    train_t2i.main()
    said = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert len(said) == 2 and "CUDA out of memory. more); training continues" in said[0] and "cuDNN" in said[1]
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 2
