"""tests/gpu.sh and its parts, without a GPU: at toy size, and with what goes wrong made to go wrong."""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
# In place of python: what "tests/gpu.py PART" does is up to the environment.
[[ $2 == where ]] && echo "Some GPU | 2.11.0 | abc" && exit
echo "$*" >>"$CALLS"
echo $$ >"$CALLS.process"
echo "says $2" >&2
[[ $2 == "$FAILING" ]] && exit 1
[[ $2 == "$HANGING" ]] && exec sleep 60
exit 0
"""


@pytest.fixture
def fake(tmp_path):
    """The environment of a run in which no part measures anything."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    settings = {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "CALLS": str(tmp_path / "calls")}
    return os.environ | settings | {"FAILING": "none", "HANGING": "none"}


def run(environment, *words):
    return subprocess.run(["tests/gpu.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_part_that_fails_is_a_row_and_the_others_go_on(fake, tmp_path):
    done = run(fake | {"FAILING": "graphs"})
    rows = (tmp_path / "out" / "gpu.md").read_text()
    assert done.returncode == 1
    assert "| graphs | --preset tiny | FAIL: exit code 1; last lines in gpu.log | Some GPU | 2.11.0 | abc |" in rows
    assert rows.count("FAIL") == 1
    assert "says graphs" in done.stdout and "says suite" not in done.stdout
    calls = [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert list(dict.fromkeys(calls)) == [part.__name__ for part in gpu.PARTS]


def test_the_last_part_gets_what_is_left(fake, tmp_path):
    assert run(fake | {"MINUTES": "7"}, "training", "suite").returncode == 0
    suite, training = (tmp_path / "calls").read_text().splitlines()
    assert "--seconds" not in suite
    assert 400 < float(training.split("--seconds ")[1].split()[0]) <= 420


def test_without_time_parts_are_skipped(fake, tmp_path):
    assert run(fake | {"MINUTES": "0"}).returncode == 0
    assert not (tmp_path / "calls").exists()
    assert "skipped: no time left" in (tmp_path / "out" / "gpu.md").read_text()


def test_stopping_the_script_stops_the_part(fake, tmp_path):
    script = subprocess.Popen(["tests/gpu.sh"], cwd=ROOT, env=fake | {"HANGING": "stages"}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "calls.process").exists() or not (tmp_path / "calls.process").read_text():
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "calls.process").read_text()), 0)
    assert (tmp_path / "calls").read_text().count("\n") == 1


@pytest.mark.parametrize("words, problem", [(["nothing"], "nothing: no part"), ([], "MINUTES=1.5: give whole minutes")])
def test_bad_input_is_one_line(fake, words, problem):
    done = run(fake | {"MINUTES": "1.5"}, *words)
    assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1


def test_help_names_every_part(fake):
    text = run(fake, "--help").stdout
    assert all(part.__name__ in text for part in gpu.PARTS)


def arguments(tmp_path):
    args = argparse.Namespace(
        preset="nano", batch_size=8, eager=True, checkpoint_activations=False, turns=1, no_ema=False
    )
    args.config = gpu.NETWORKS["nano"]
    args.device = torch.device("cpu")
    return args, gpu.Report("speed", tmp_path / "gpu.md", args.device)


def test_a_call_of_training_takes_one_step_and_times_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # Training sets it
    args, _ = arguments(tmp_path)
    args.work = tmp_path
    args.config = replace(args.config, size=8)
    training = gpu.Training(args, batch_size=2, taught=True)
    training()
    training()
    assert training.step == 2
    assert {name: len(found) for name, found in training.seconds.items()} == {"data": 2, "network": 2, "optimizer": 2}
    assert not list(tmp_path.rglob("*.pt"))


def test_out_of_memory_is_a_row_and_less_is_tried(tmp_path, monkeypatch):
    tried = []

    def measure(args, batch_size, taught, planned):
        tried.append((batch_size, taught))
        if taught:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return "fast"

    monkeypatch.setattr(gpu, "measure_speed", measure)
    monkeypatch.setattr(gpu, "planned_gib", lambda *_: 90.0)
    gpu.speed(*arguments(tmp_path))
    rows = (tmp_path / "gpu.md").read_text().splitlines()
    assert tried == [(8, True), (2, True), (2, False)]
    assert ["out of memory" in row for row in rows] == [True, True, False] and "fast" in rows[2]


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    def measure(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(gpu, "measure_speed", measure)
    with pytest.raises(RuntimeError, match="shapes differ"):
        gpu.speed(*arguments(tmp_path))


@pytest.mark.parametrize(
    "losses, verdict", [((1.0, 1.0005), "PASS"), ((1.0, 1.01), "FAIL"), ((1.0, float("nan")), "FAIL")]
)
def test_losses_that_differ_fail(tmp_path, monkeypatch, losses, verdict):
    args, report = arguments(tmp_path)
    args.toy = True
    runs = dict(zip(("one", "other"), losses, strict=True))
    monkeypatch.setattr(gpu, "run_all", lambda *_: None)
    monkeypatch.setattr(gpu, "metrics", lambda args, out: [{"step": 1, "loss": runs[out], "images_per_s": 1}])
    gpu.compare_runs(args, report, "two runs", runs)
    assert verdict in (tmp_path / "gpu.md").read_text()
    assert report.failed == (verdict == "FAIL")


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path):
    last = ["stages", "ranks", "training"]  # about as long as all others, which run beside them
    others = [part.__name__ for part in gpu.PARTS if part.__name__ not in last]
    running = {}
    for i, names in enumerate((others, last)):
        environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / str(i)), "OMP_NUM_THREADS": "1"}
        words = ["tests/gpu.sh", "--toy", *names]
        running[*names] = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    for i, (names, process) in enumerate(running.items()):
        shown, _ = process.communicate()
        rows = (tmp_path / str(i) / "gpu.md").read_text()
        assert process.returncode == 0, shown
        assert rows == shown and "FAIL" not in rows
        assert all(f"| {name} |" in rows for name in names)
    names = {"gpu.md", "gpu.log", "grid.png", "metrics-t2i.jsonl", "metrics-forcing.jsonl"}
    assert {path.name for path in (tmp_path / "1").iterdir()} == names
