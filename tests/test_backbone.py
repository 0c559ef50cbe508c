"""Published weights in our scripts: loading, bad files, training, sharding. The toy is that of tests/tiny_flux2.py."""

import copy
import json
import os
import re
import resource
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import FLOAT64, LAUNCHER, finish, losses, start, weights
from tiny_flux2 import CONFIG, WITH_DEPTH, describe, draw_weights, join, write_layout
from toy_encoders import CoarseEncoders

import data
import evaluate
import model
import sample
import train_forcing
from extras import flux2

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TOY = f"--backbone {ROOT}/extras/flux2.py --encoders {ROOT}/tests/toy_encoders.py:CoarseEncoders --device cpu"
QUICK = f"{TOY} --no-compile --size 32 --batch-size 4 --log-every 1 --sample-every 1000 --warmup 1"


def run(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *shlex.split(line)])
    data.run_script(script.main)


def train(line, monkeypatch):
    """Run train_forcing.py without pictures. Returns its Run."""
    runs = []
    monkeypatch.setattr(data.Run, "draw", lambda run: runs.append(run))
    run(train_forcing, line, monkeypatch)
    return runs[-1]


def peak_memory():
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def t2i(tmp_path_factory):
    """A text-to-image network in one file, in bfloat16."""
    return write_layout(tmp_path_factory.mktemp("t2i"), "file", draw_weights(dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """A network of image and depth in the folder of the paper's authors."""
    return write_layout(tmp_path_factory.mktemp("authors"), "authors", draw_weights(WITH_DEPTH))


# ---- Loading ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "config"), [("file", CONFIG), ("folder", CONFIG), ("shards", CONFIG), ("authors", WITH_DEPTH)]
)
def test_tensors_and_sizes_are_read_as_written(layout, config, dtype, tmp_path):
    expected = draw_weights(config, dtype)
    state = flux2.read_checkpoint(write_layout(tmp_path, layout, expected))
    assert state["ema"].keys() == expected.keys()
    for name, tensor in state["ema"].items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name]), name

    network = flux2.Network.from_checkpoint(state)
    read = network.config
    assert (read.width, read.head, read.depth, read.double_depth, read.text_dim) == (64, 16, 2, 2, 16)
    assert read.modalities == config.modalities
    assert not any(p.requires_grad for p in network.parameters())


def test_a_large_file_opens_without_being_read(tmp_path):
    header, content = describe(draw_weights())
    end = len(content) + 4 * 2**30
    header["large"] = {"dtype": "F32", "shape": [2**15, 2**15], "data_offsets": [len(content), end]}
    path = tmp_path / "flux.safetensors"
    path.write_bytes(join(header, content))
    os.truncate(path, path.stat().st_size - len(content) + end)  # the file is sparse
    memory = peak_memory()
    large = flux2.read_checkpoint(path)["ema"]["large"]
    assert large[-1, -1] == 0 and peak_memory() - memory < 32 << 20


def test_weights_are_placed_as_copies_block_by_block(tmp_path):
    expected = draw_weights(WITH_DEPTH, torch.bfloat16)
    path = write_layout(tmp_path, "authors", expected)
    network = flux2.Network.from_checkpoint(flux2.read_checkpoint(path))
    mapped = network.state_dict()
    written = (path / "model.safetensors").read_bytes()
    sharded = []

    def shard(module):
        sharded.append(module)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        for block in network.all_blocks()[len(sharded) :]:  # these are still in the file
            assert {p.dtype for p in block.parameters()} == {torch.bfloat16}

    network.place(CPU, shard=shard)
    assert sharded == [*network.all_blocks(), network] and len(sharded) == 6
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, expected[name].float())
        parameter.data.fill_(7.0)
    assert all(torch.equal(mapped[name], expected[name]) for name in expected)
    assert (path / "model.safetensors").read_bytes() == written


# ---- Training ----


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(t2i, tmp_path, monkeypatch):
    line = f"{QUICK} --init {t2i} --steps 3 --checkpoint-every 2 --lr-new 0.01 --lr 0.001"
    train(f"{line} --out {tmp_path}/whole", monkeypatch)
    save = data.save_checkpoint

    def save_then_die(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_checkpoint", save_then_die)
        with pytest.raises(SystemExit):
            train(f"{line} --out {tmp_path}/cut", patch)
    assert max(losses(tmp_path / "cut")) == 2
    train(f"--resume {TOY} --out {tmp_path}/cut", monkeypatch)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 3
    whole = weights(tmp_path / "whole")
    cut = weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


NEW = ("depth_", "time_in_", "cross_alpha_")


@pytest.mark.parametrize(("lr_new", "rate_of_new"), [(0.01, 0.01), (0, 1e-4)])
def test_new_parts_have_a_rate_of_their_own(lr_new, rate_of_new, t2i, tmp_path, monkeypatch):
    """The first step of AdamW moves each weight by the rate, or by less where the gradient is near 0.

    Neither the file nor the teacher moves.
    """
    written = t2i.read_bytes()
    started = []
    start_run = data.Run.start

    def spy(self, network, *args):
        start_run(self, network, *args)
        started.append(copy.deepcopy(network.state_dict()))

    monkeypatch.setattr(data.Run, "start", spy)
    line = f"{QUICK} --init {t2i} --steps 1 --optimizer adamw --lr 1e-4 --lr-new {lr_new} --out {tmp_path}/run"
    ended = train(line, monkeypatch)

    moved = {name: (p - started[0][name]).abs().max().item() for name, p in ended.model.named_parameters()}
    new = {name for name in moved if name.startswith(NEW)}
    assert ended.model.new == new and len(new) == 28
    assert max(moved[name] for name in new) == pytest.approx(rate_of_new, rel=1e-3)
    assert max(moved[name] for name in moved.keys() - new) == pytest.approx(1e-4, rel=1e-2)

    expected = draw_weights(dtype=torch.bfloat16)
    taught = dict(ended.teacher.named_parameters())
    assert taught.keys() == expected.keys() and [m.name for m in ended.teacher.modalities] == ["rgb"]
    assert all(torch.equal(p, expected[name].float()) for name, p in taught.items())
    assert t2i.read_bytes() == written
    assert "loss_distill_rgb" in losses(tmp_path / "run")[1]


def test_a_run_without_an_average_holds_weights_once(t2i, tmp_path, monkeypatch):
    ended = train(f"{QUICK} --init {t2i} --steps 1 --ema 0 --out {tmp_path}/run", monkeypatch)
    assert ended.ema is ended.model
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert all(tensor.data_ptr() == state["ema"][name].data_ptr() for name, tensor in state["model"].items())

    network = f"{TOY} --checkpoint {tmp_path}/run/last.pt --size 32 --steps 2"
    run(sample, f"{network} --count 1 --out {tmp_path}/sample", monkeypatch)
    assert (tmp_path / "sample/000/depth.npy").exists()
    run(evaluate, f"depth {network} --images 2 --out {tmp_path}/results", monkeypatch)
    assert json.loads((tmp_path / "results/results.json").read_text())["images"] == 2


def test_published_networks_sample_and_are_evaluated(t2i, authors, tmp_path, monkeypatch):
    for name, path in (("t2i", t2i), ("authors", authors)):
        line = f"{TOY} --checkpoint {path} --size 32 --steps 2 --count 1 --out {tmp_path}/{name}"
        run(sample, line, monkeypatch)
        assert (tmp_path / name / "000/rgb.png").exists()
        assert (tmp_path / name / "000/depth.npy").exists() == (path == authors)
    line = f"depth {TOY} --checkpoint {authors} --size 32 --steps 1 --images 2 --out {tmp_path}/results"
    run(evaluate, line, monkeypatch)
    assert np.isfinite(json.loads((tmp_path / "results/results.json").read_text())["absrel"])


def test_training_goes_on_from_the_authors_network_without_a_teacher(authors, tmp_path, monkeypatch):
    """Every weight is the file's: none is new."""
    ended = train(f"{QUICK} --init {authors} --steps 1 --lr 1e-12 --out {tmp_path}/run", monkeypatch)
    assert ended.teacher is None and not ended.model.new
    expected = draw_weights(WITH_DEPTH)
    for name, parameter in ended.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6, msg=name)
    assert "loss_distill_rgb" not in losses(tmp_path / "run")[1]


def test_without_a_caption_the_network_reads_the_empty_captions_embedding(t2i, tmp_path, monkeypatch):
    no_text = CoarseEncoders(CPU).encode_text([""])
    assert no_text.abs().max() > 0
    texts = []
    squared_error = train_forcing.squared_error

    def spy(*args):
        frame = sys._getframe(1)
        texts.append(frame.f_locals["micro_batch"].text)
        return squared_error(*args)

    monkeypatch.setattr(train_forcing, "squared_error", spy)
    train(f"{QUICK} --init {t2i} --steps 1 --drop-caption 1 --out {tmp_path}/run", monkeypatch)
    assert texts and all(torch.equal(text, no_text.expand_as(text)) for text in texts)

    read = []
    draw = model.Denoiser.sample

    def watch(network, *args, **options):
        network.register_forward_pre_hook(lambda module, inputs: read.append(inputs[2]))
        return draw(network, *args, **options)

    monkeypatch.setattr(model.Denoiser, "sample", watch)
    line = f"{TOY} --checkpoint {t2i} --size 32 --steps 1 --count 1 --prompt ball --cfg 2 --out {tmp_path}/sample"
    run(sample, line, monkeypatch)
    text, without_text = read
    assert torch.equal(without_text, no_text) and not torch.equal(text, no_text)


# ---- Ranks ----

SHARES = """
begin = data.Run.start
end = data.Run.close
def report(self, when):
    for name in ("model", "ema", "teacher"):
        parameters = list(getattr(self, name).parameters())
        held = sum(p.to_local().nbytes for p in parameters)
        whole = sum(p.nbytes for p in parameters)
        os.write(1, f"{when}: {name} holds {held} of {whole}\\n".encode())
def start(self, *args):
    begin(self, *args)
    report(self, "start")
def close(self):
    report(self, "end")
    end(self)
data.Run.start = start
data.Run.close = close
"""


def test_two_sharded_ranks_compute_what_one_computes_and_hold_half_each(t2i, tmp_path):
    """In float64: losses, weights and EMA of three steps with a teacher and two learning rates."""
    line = f"{QUICK} --init {t2i} --steps 3 --lr 1e-3 --lr-new 1e-2"
    code, printed = finish(start("train_forcing", f"{line} --out {tmp_path}/one", FLOAT64))
    assert code == 0, printed
    code, printed = finish(start("train_forcing", f"{line} --shard --out {tmp_path}/two", FLOAT64 + SHARES, LAUNCHER))
    assert code == 0, printed

    shares = re.findall(r"(start|end): (\w+) holds (\d+) of (\d+)", printed)
    assert len(shares) == 2 * 2 * 3
    for when, name, held, whole in shares:
        assert int(held) == pytest.approx(int(whole) / 2, rel=0.01), (when, name)

    expected = losses(tmp_path / "one")
    for step, row in losses(tmp_path / "two").items():
        assert row == pytest.approx(expected[step], rel=1e-9, abs=1e-12)
    one = weights(tmp_path / "one")
    two = weights(tmp_path / "two")
    assert one.keys() == two.keys()
    largest = max((one[k] - two[k]).abs().max().item() for k in one)
    print(f"largest difference of weights {largest:.1e}")
    assert largest < 1e-9
