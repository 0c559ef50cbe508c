"""Training at any world size, and what schedulers, disks and accidents do to it."""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import world_samples, write_folder, write_shards
from PIL import Image

import data
import train_forcing
import train_t2i

ROOT = Path(__file__).parent.parent
QUICK = "--no-compile --device cpu --size 16 --batch-size 8 --log-every 1 --sample-every 1000 --warmup 2"
TEACHER = "--distill-hi 0.5 --distill-lo 0.05"
FLOAT64 = "torch.set_default_dtype(torch.float64)\ntorch.Tensor.float = torch.Tensor.double\n"
EAGER = "import functools\ntorch.compile = functools.partial(torch.compile, backend='eager')\n"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RESTARTING = [*LAUNCHER, "--max-restarts", "1"]
NO_PICTURES = "import data\ndata.Run.draw = lambda run: None\n"

averaged = []  # the EMA of each run in this process


def run(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__name__, *line.split()])
    monkeypatch.setattr(data.Run, "draw", lambda run: averaged.append(run.ema))
    script.main()


def start(script, line, changes="", launcher=(sys.executable,), after=NO_PICTURES):
    """Start the script in a process of its own, or in two under LAUNCHER, after some lines of Python."""
    code = f"import os, runpy, signal, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport data, model\n{changes}\n"
    code += f"{after.format(script)}\nimport {script}\n{script}.main()\n"
    out = re.search(r"--out (\S+)", line)[1]
    Path(f"{out}.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, f"{out}.py", *line.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def in_step(number, what, rank=None):
    """Lines that do something in the backward pass of a step, on one rank or on all."""
    condition = f"self.step == {number - 1}"
    if rank is not None:
        condition += f" and self.rank == {rank}"
    return f"""
import multiprocessing
whole = data.Run.backward
def backward(self, loss):
    if {condition}:
        {what}
    whole(self, loss)
data.Run.backward = backward
"""


def finish(process):
    """(exit code, what was printed)."""
    printed, _ = process.communicate(timeout=200)
    return process.returncode, printed


def rows(out):
    """{step: row of metrics.jsonl}. No step has two."""
    path = Path(out) / "metrics.jsonl"
    if not path.exists():
        return {}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_step = {row["step"]: row for row in found}
    assert len(by_step) == len(found)
    return by_step


def starts(printed):
    """(number of ranks, first step) of each start that was printed."""
    return [(int(ranks), int(step)) for ranks, step in re.findall(r"(\d+) x cpu, from step (\d+)", printed)]


def losses(out):
    """All that a run computes, without what it measures."""
    timed = ("images_per_s", "tflops", "utilization")
    return {step: {k: v for k, v in row.items() if k not in timed} for step, row in rows(out).items()}


def weights(out, step="last"):
    name = "last.pt" if step == "last" else f"step-{step:07}.pt"
    state = torch.load(Path(out) / name, weights_only=True)
    return {f"{part} {k}": v for part in ("model", "ema") for k, v in state[part].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def t2i(tmp_path_factory):
    out = tmp_path_factory.mktemp("t2i")
    with pytest.MonkeyPatch.context() as patch:
        run(train_t2i, f"{QUICK} --steps 3 --out {out}/t2i", patch)
    return out / "t2i/last.pt"


# ---- Correct at any world size ----


@pytest.mark.parametrize(("stage", "flags"), [("train_t2i", ""), ("train_forcing", "--shard --checkpoint-activations")])
def test_a_batch_may_be_split_in_any_way(stage, flags, t2i, tmp_path, monkeypatch):
    """In float64, with uneven sparse masks: the same losses and weights after three steps, EMA, clipping, teacher and
    all, from one rank, from parts that checkpoint activations, and from the parts of two ranks, plain or sharded. The
    first stage trains on tar shards, with other workers in each, the second on the built-in world.
    """
    line = f"{QUICK} --steps 3"
    if stage == "train_forcing":
        line += f" --init {t2i}"
    else:
        write_shards(tmp_path / "files", world_samples("train", (16, 16), 150))
        line += f" --data {tmp_path}/files/{{000..001}}.tar --workers 0"
        flags = "--workers 1"
    line_of_two = f"{line} --grad-accum 2 {flags} --out {tmp_path}/ranks"
    code, printed = finish(start(stage, line_of_two, FLOAT64, LAUNCHER))
    assert code == 0, printed
    script = {"train_t2i": train_t2i, "train_forcing": train_forcing}[stage]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        run(script, f"{line} --out {tmp_path}/one", monkeypatch)
        run(script, f"{line} --grad-accum 4 --checkpoint-activations --out {tmp_path}/parts", monkeypatch)
    finally:
        torch.set_default_dtype(torch.float32)
    one = losses(tmp_path / "one")
    expected = weights(tmp_path / "one")
    for other in ("parts", "ranks"):
        found = losses(tmp_path / other)
        for step in (1, 2, 3):
            assert found[step] == pytest.approx(one[step], rel=1e-9, abs=1e-12), other
        for k, v in weights(tmp_path / other).items():
            torch.testing.assert_close(v, expected[k], rtol=0, atol=1e-9, msg=f"{other}: {k}")


def test_ranks_exchange_gradients_once_a_step_and_hold_them_once(tmp_path):
    """However many parts a batch has: one reduction of each bucket a step, and from the second on no copies beside."""
    count = """
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
begin, clip, loss = DistributedDataParallel.__init__, torch.nn.utils.clip_grad_norm_, model.squared_error
parameters, reduced, beside = [], [], []
def hook(group, bucket):
    reduced.append(bucket.index())
    return allreduce_hook(group, bucket)
def wrap(network, module, **options):
    begin(network, module, **options)
    network.register_comm_hook(None, hook)
    parameters.extend(module.parameters())
def part(*args):
    beside.append(sum(p.grad is not None and p.grad._base is None for p in parameters))
    return loss(*args)
def step(*args):
    os.write(1, f"reduced {reduced.count(0)} beside {beside}\\n".encode())
    reduced.clear(), beside.clear()
    return clip(*args)
DistributedDataParallel.__init__, torch.nn.utils.clip_grad_norm_, model.squared_error = wrap, step, part
"""
    code, printed = finish(start("train_t2i", f"{QUICK} --steps 3 --grad-accum 4 --out {tmp_path}/a", count, LAUNCHER))
    assert code == 0, printed
    found = re.findall(r"reduced (\d+) beside (.*)", printed)
    assert len(found) == 6 and {times for times, _ in found} == {"1"}
    assert {beside for _, beside in found[2:]} == {"[0, 0, 0, 0]"}


@pytest.mark.slow
def test_ranks_stop_together_and_go_on_sharded_and_then_as_one(tmp_path, monkeypatch, capfd):
    """Rank 1 alone is signalled in step 3: both stop after it. That checkpoint is damaged, so both continue from step
    2, with sharded weights; after step 4 one rank continues with whole ones. All as if one had taken the five steps.
    """
    signalled = "os.kill(os.getpid(), signal.SIGTERM)"
    line = f"{QUICK} --steps 5 --checkpoint-every 1 --keep 9"
    code, printed = finish(start("train_t2i", f"{line} --out {tmp_path}/a", in_step(3, signalled, rank=1), LAUNCHER))
    assert code == 0 and "stopped by a signal after step 3 of 5" in printed, printed
    assert starts(printed) == [(2, 0)]
    damaged = tmp_path / "a/step-0000003.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    again = start("train_t2i", f"--resume --shard --out {tmp_path}/a", in_step(4, signalled, rank=1), LAUNCHER)
    code, printed = finish(again)
    assert code == 0 and "step-0000003.pt is passed over" in printed and "after step 4 of 5" in printed, printed
    assert starts(printed) == [(2, 2)]
    run(train_t2i, f"--resume --no-shard --out {tmp_path}/a", monkeypatch)
    assert starts(capfd.readouterr().out) == [(1, 4)]
    run(train_t2i, f"{line} --out {tmp_path}/one", monkeypatch)
    for step, row in losses(tmp_path / "one").items():
        assert losses(tmp_path / "a")[step] == pytest.approx(row, rel=1e-3, abs=1e-4)
    one = weights(tmp_path / "one")
    other = weights(tmp_path / "a")
    before = weights(tmp_path / "one", 1)
    for k in one:
        assert (one[k] - other[k]).norm() <= 0.02 * (one[k] - before[k]).norm() + 1e-7, k


@pytest.mark.slow
def test_sharded_ranks_compute_what_one_computes_and_each_goes_on_where_the_other_stopped(t2i, tmp_path):
    """In float64: two steps of two sharded ranks, two of one rank, two of two sharded ranks, against six of one."""
    line = f"{QUICK} --init {t2i} --steps 6 --checkpoint-every 1 --keep 9"  # AdamW and Muon
    stop = "self.caught_signals.append(signal.SIGTERM)"
    out = f"--out {tmp_path}/a"
    legs = [
        start("train_forcing", f"{line} --out {tmp_path}/one", FLOAT64),
        start("train_forcing", f"{line} --shard {out}", FLOAT64 + in_step(2, stop), LAUNCHER),
    ]
    ended = [finish(leg) for leg in legs]
    ended.append(finish(start("train_forcing", f"--resume --no-shard {out}", FLOAT64 + in_step(4, stop))))
    ended.append(finish(start("train_forcing", f"--resume --shard {out}", FLOAT64, LAUNCHER)))
    assert [code for code, _ in ended] == [0, 0, 0, 0], ended
    assert [starts(printed) for _, printed in ended] == [[(1, 0)], [(2, 0)], [(1, 2)], [(2, 4)]]
    expected = losses(tmp_path / "one")
    for step, row in losses(tmp_path / "a").items():
        assert row == pytest.approx(expected[step], rel=1e-9, abs=1e-12)
    for step in (3, "last"):
        expected = weights(tmp_path / "one", step)
        for k, v in weights(tmp_path / "a", step).items():
            torch.testing.assert_close(v, expected[k], rtol=0, atol=1e-9, msg=k)


@pytest.mark.slow
def test_sharded_ranks_compile_and_draw_pictures_together(t2i, tmp_path):
    """After a picture the averaged weights are parts again: the next step moves them, and the next picture shows it."""
    line = f"{QUICK} --init {t2i} --steps 2 --sample-every 1"
    pictures = {}
    for name, flags, launcher in (("one", "", [sys.executable]), ("two", "--shard --compile", LAUNCHER)):
        code, printed = finish(start("train_forcing", f"{line} {flags} --out {tmp_path}/{name}", EAGER, launcher, ""))
        assert code == 0 and "not written" not in printed, printed
        samples = tmp_path / name / "samples"
        pictures[name] = [np.asarray(Image.open(samples / f"{step:07}.png")).astype(int) for step in (1, 2)]
    for one, two in zip(pictures["one"], pictures["two"], strict=True):
        assert np.abs(one - two).max() <= 8
    assert np.abs(pictures["two"][0] - pictures["two"][1]).max() > 8


# ---- Hard to kill ----


def forcing(out, t2i, steps=4, more=""):
    return f"{QUICK} {TEACHER} --steps {steps} --init {t2i} --checkpoint-every 1 --keep 99 --out {out} {more}"


def broken(calls):
    """Lines that make squared_error infinite in the calls of these numbers, on rank 1 of two."""
    return f"""
import itertools
counter, whole = itertools.count(1), model.squared_error
def squared_error(x0_hat, x0, mask):
    total = whole(x0_hat, x0, mask)
    bad = next(counter) in {calls} and int(os.environ.get("RANK", 1)) == 1
    return torch.where(mask.flatten(1).any(1), torch.inf, total) if bad else total
model.squared_error = squared_error
"""


def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(t2i, tmp_path):
    """Of three losses a step, calls 4 and 8 are rgb's in step 2 and depth's in step 3; weights stay those of step 1."""
    two = start("train_forcing", forcing(tmp_path / "a", t2i, 4), broken((4, 8)), LAUNCHER)
    code, printed = finish(two)
    assert code == 0 and len(re.findall(r"step \d+ skipped", printed)) == 2
    assert re.search(r"step 2 skipped, not finite: loss_rgb, ", printed)
    assert re.search(r"step 3 skipped, not finite: loss_depth, .*loss_depth_joint", printed)
    assert [row.get("skipped") for row in rows(tmp_path / "a").values()] == [0, 2]
    assert same(weights(tmp_path / "a", 3), weights(tmp_path / "a", 1))
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    steps = {slots["step"].item() for slots in state["optimizer"]["state"].values() if "step" in slots}
    assert state["step"] == 4 and steps == {2}  # those skipped left no trace
    assert all(v.isfinite().all() for v in weights(tmp_path / "a").values())


def test_a_run_stops_after_some_steps_in_a_row_that_are_not_finite(t2i, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(torch.nan))
    with pytest.raises(SystemExit) as stopped:
        run(train_forcing, forcing(tmp_path / "a", t2i, 9, "--max-skipped 3"), monkeypatch)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "--lr" in last
    assert "step 3 skipped, not finite: the gradient alone; 3 in a row" in last


def wait_for_step(out, step, process):
    for _ in range(1200):
        if process.poll() is not None or max(rows(out), default=0) >= step:
            return
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_end_the_run(number, code, tmp_path, monkeypatch):
    """Sent to all its processes, as schedulers and Ctrl-C do: those that load data too."""
    write_folder(tmp_path / "files", world_samples("train", (16, 16), 8))
    line = f"{QUICK} --steps 4000 --data {tmp_path}/files --workers 1 --out {tmp_path}/a"
    process = start("train_t2i", line)
    wait_for_step(tmp_path / "a", 3, process)
    os.killpg(process.pid, number)
    found, printed = finish(process)
    assert found == code and "Traceback" not in printed
    step = int(re.search(r"stopped by a signal after step (\d+) of 4000", printed)[1])
    assert step == max(rows(tmp_path / "a")) == torch.load(tmp_path / "a/last.pt", weights_only=True)["step"] < 4000


def test_a_checkpoint_ends_a_row(tmp_path, monkeypatch):
    """Stopped between two rows of metrics.jsonl, a run writes what it has, and goes on with a new row."""
    line = f"{QUICK} --steps 6 --log-every 3"
    run(train_t2i, f"{line} --out {tmp_path}/whole", monkeypatch)
    original = train_t2i.loss_mask
    calls = itertools.count(1)

    def loss_mask(*args):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_t2i, "loss_mask", loss_mask)
        run(train_t2i, f"{line} --out {tmp_path}/cut", patch)
    assert list(rows(tmp_path / "cut")) == [2] and torch.load(tmp_path / "cut/last.pt", weights_only=True)["step"] == 2
    run(train_t2i, f"--resume --out {tmp_path}/cut", monkeypatch)
    assert list(rows(tmp_path / "cut")) == [2, 3, 6] and list(rows(tmp_path / "whole")) == [3, 6]
    assert losses(tmp_path / "cut")[6] == losses(tmp_path / "whole")[6]
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def alive(group):
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def ends_with_all_its_workers(process, seconds):
    """Its exit code; fails if it, or a process of its group, is alive after so many seconds."""
    try:
        code = process.wait(seconds)
        for _ in range(300):  # torch's workers look every five seconds whether their parent lives
            if not alive(process.pid):
                return code
            time.sleep(0.05)
        raise AssertionError(f"alive: {alive(process.pid)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)


ENDS = {  # what happens in the second step
    "an exception": "raise RuntimeError('out of memory')",
    "a worker killed": "multiprocessing.active_children()[0].kill()",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ENDS)
def test_processes_that_load_data_end_with_the_one_that_trains(end, tmp_path, monkeypatch):
    write_folder(tmp_path / "files", world_samples("train", (16, 16), 8))
    line = f"{QUICK} --steps 4000 --data {tmp_path}/files --workers 2 --out {tmp_path}/a"
    assert ends_with_all_its_workers(start("train_t2i", line, in_step(2, ENDS[end])), 40) != 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_rank_waits_no_longer_than_it_should_for_one_that_stopped(tmp_path, monkeypatch):
    write_folder(tmp_path / "files", world_samples("train", (16, 16), 8))
    line = f"{QUICK} --steps 4000 --data {tmp_path}/files --workers 2 --timeout 4 --out {tmp_path}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    ranks = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        stop = in_step(2, "os.kill(os.getpid(), signal.SIGSTOP)") if rank == "1" else ""
        ranks.append(start("train_t2i", f"{line}/{rank}", stop))
    try:
        assert ends_with_all_its_workers(ranks[0], 40) not in (0, None)
    finally:
        ranks[1].kill()
    assert ends_with_all_its_workers(ranks[1], 10) == -signal.SIGKILL


@contextlib.contextmanager
def full_disk():
    """No file grows beyond 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_and_survived(tmp_path, monkeypatch, capsys):
    """A checkpoint and a row are lost; training continues, the next checkpoint is whole, and at the end all is well."""
    save = data.save_checkpoint
    write_row = data.Run.write_row
    out = tmp_path / "a"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/metrics.jsonl").symlink_to("/dev/full")

    def save_where_it_is_full(out, state, keep):
        with full_disk() if state["step"] == 2 else contextlib.nullcontext():
            save(out, state, keep)

    def write_row_where_it_is_full(self, norm):
        self.out = tmp_path / "full" if self.step == 2 else out
        write_row(self, norm)
        self.out = out

    monkeypatch.setattr(data, "save_checkpoint", save_where_it_is_full)
    monkeypatch.setattr(data.Run, "write_row", write_row_where_it_is_full)
    run(train_t2i, f"{QUICK} --steps 3 --checkpoint-every 1 --keep 9 --out {out}", monkeypatch)
    said = [line for line in capsys.readouterr().err.splitlines() if "not written" in line]
    assert len(said) == 2 and all("training continues" in line for line in said)
    assert "metrics.jsonl" in said[0] and "No space left on device" in said[0]
    assert "checkpoint of step 2" in said[1] and "File too large" in said[1]
    assert sorted(rows(out)) == [1, 3]
    assert [path.name for path in data.list_checkpoints(out)] == ["step-0000001.pt", "step-0000003.pt"]
    assert not (out / "partly-written").exists()


def test_a_run_whose_last_checkpoint_fails_says_so(tmp_path, monkeypatch, capsys):
    save = data.save_checkpoint
    out = tmp_path / "a"

    def save_where_it_is_full(out, state, keep):
        with full_disk() if state["step"] == 2 else contextlib.nullcontext():
            save(out, state, keep)

    monkeypatch.setattr(data, "save_checkpoint", save_where_it_is_full)
    with pytest.raises(SystemExit) as stopped:
        run(train_t2i, f"{QUICK} --steps 2 --checkpoint-every 1 --out {out}", monkeypatch)
    assert stopped.value.code == 2 and "no checkpoint of the last step" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 1


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down_and_torchrun_starts_it_again(tmp_path, monkeypatch):
    """Killed in its third step, rank 1 ends the job; the second try continues from step 2, as one rank would."""
    first_try = 'if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": os.kill(os.getpid(), signal.SIGKILL)'
    die = in_step(3, first_try, rank=1)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/gpu-node.md
    line = f"{QUICK} --steps 4 --checkpoint-every 1 --shard --resume"
    code, printed = finish(start("train_t2i", f"{line} --out {tmp_path}/a", die, RESTARTING))
    assert code == 0 and starts(printed) == [(2, 0), (2, 2)], printed
    code, printed = finish(start("train_t2i", f"{line} --out {tmp_path}/b", die, LAUNCHER))
    assert code != 0 and re.search(r"rank\s*: 1", printed) and "SIGKILL" in printed  # and long before --timeout
    run(train_t2i, f"{line} --out {tmp_path}/one", monkeypatch)
    assert losses(tmp_path / "a")[4]["loss"] == pytest.approx(losses(tmp_path / "one")[4]["loss"], rel=1e-4)


def test_a_run_whose_checkpoints_are_all_damaged_is_never_begun_anew(tmp_path, monkeypatch, capsys):
    run(train_t2i, f"{QUICK} --steps 1 --out {tmp_path}/a", monkeypatch)
    (tmp_path / "a/step-0000001.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run(train_t2i, f"--resume --out {tmp_path}/a", monkeypatch)
        assert stopped.value.code == 2 and "no checkpoint in" in capsys.readouterr().err.splitlines()[-1]
    assert list(rows(tmp_path / "a")) == [1]


def test_the_average_is_no_part_of_the_graph(tmp_path, monkeypatch):
    """It would hold on to every step that has been."""
    for script in (train_t2i, train_forcing):
        run(
            script,
            f"{QUICK} --steps 2 {'--init none' if script is train_forcing else ''} --out {tmp_path}/a",
            monkeypatch,
        )
        assert all(p.is_leaf and not p.requires_grad for p in averaged[-1].parameters())
        shutil.rmtree(tmp_path / "a")


@pytest.mark.slow
def test_killed_at_any_moment(t2i, tmp_path):
    """kill -9 at random times, twice or KILLS times: in the end every number is that of a run left alone."""
    rng = random.Random(0)
    kills = int(os.environ.get("KILLS", 2))
    out = tmp_path / "cut"
    line = f"{QUICK} --init {t2i} --steps {10 + 10 * kills} --checkpoint-every 1"
    code, printed = finish(start("train_forcing", f"{line} --out {tmp_path}/whole"))  # as many threads as the others
    assert code == 0, printed
    steps = []
    for _ in range(kills):
        process = start("train_forcing", f"{line} --resume --out {out}")
        steps += starts(process.stdout.readline())
        if rng.random() < 0.75:  # not before it has taken a step
            wait_for_step(out, max(rows(out), default=0) + 1, process)
        time.sleep(rng.uniform(0, 0.6))
        assert process.poll() is None, finish(process)
        process.kill()
        steps += starts(finish(process)[1])
    code, printed = finish(start("train_forcing", f"{line} --resume --out {out}"))
    assert code == 0, printed
    steps += starts(printed)
    print("started at", steps)
    assert len(steps) == kills + 1 and len(set(steps)) > kills / 2
    assert losses(out) == losses(tmp_path / "whole")
    assert same(weights(out), weights(tmp_path / "whole"))
    assert not (out / "partly-written").exists()


# ---- Fast ----


@pytest.mark.slow
def test_blocks_compile_without_breaks_and_once(t2i, tmp_path, monkeypatch):
    """One graph of the trunk, one of the detokenizer, one of the teacher, all in the first step."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiler(*args, **kwargs, backend=backend))
    line = f"{QUICK.replace('--no-compile', '--compile')} {TEACHER} --steps 3 --init {t2i}"
    run(train_forcing, f"{line} --checkpoint-activations --out {tmp_path}/a", monkeypatch)
    assert len(graphs) == 3
    monkeypatch.setattr(torch, "compile", compiler)
    run(train_forcing, f"{QUICK} {TEACHER} --steps 3 --init {t2i} --out {tmp_path}/b", monkeypatch)
    for step, row in losses(tmp_path / "b").items():
        assert losses(tmp_path / "a")[step] == pytest.approx(row, rel=1e-4, abs=1e-5)
