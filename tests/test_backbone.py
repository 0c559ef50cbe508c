"""Published weights in our scripts: loading, bad files, training, sharding. The toy is that of tests/tiny_flux2.py."""

import copy
import json
import os
import re
import resource
import shlex
import shutil
import sys
from dataclasses import asdict
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
    """Run train_forcing.py without pictures, and without measuring its speed. Returns its Run."""
    runs = []
    monkeypatch.setattr(data, "training_flops", lambda *args: 1.0)
    monkeypatch.setattr(data, "matmul_peak", lambda *args: 1.0)
    monkeypatch.setattr(data.Run, "draw", lambda run: runs.append(run))
    run(train_forcing, line, monkeypatch)
    return runs[-1]


def evaluate_depth(line, monkeypatch):
    """The results of evaluate.py depth on two images."""
    monkeypatch.setattr(evaluate, "MEAN_IMAGES", 16)  # of the baseline
    out = re.search(r"--out (\S+)", line)[1]
    run(evaluate, f"depth {line} --size 32 --images 2", monkeypatch)
    results = json.loads(Path(out, "results.json").read_text())
    assert results["images"] == 2
    return results


def peak_memory():
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def t2i(tmp_path_factory):
    """A text-to-image network in one file."""
    return write_layout(tmp_path_factory.mktemp("t2i"), "file", draw_weights())


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """A network of image and depth in the folder of the paper's authors, in bfloat16."""
    return write_layout(tmp_path_factory.mktemp("authors"), "authors", draw_weights(WITH_DEPTH, torch.bfloat16))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_placed_as_copies_block_by_block(dtype, tmp_path):
    expected = draw_weights(WITH_DEPTH, dtype)
    path = write_layout(tmp_path, "authors", expected)
    network = flux2.Network.from_checkpoint(flux2.read_checkpoint(path))
    mapped = network.state_dict()
    in_file = {tensor.data_ptr() for tensor in mapped.values()}
    sharded = []

    def shard(module):
        sharded.append(module)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert in_file.isdisjoint(p.data_ptr() for p in module.parameters())
        for block in network.all_blocks()[len(sharded) :]:
            assert in_file.issuperset(p.data_ptr() for p in block.parameters())

    network.place(CPU, shard=shard)
    assert sharded == [*network.all_blocks(), network] and len(sharded) == 6
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, expected[name].float())
        parameter.data.fill_(7.0)
    assert all(torch.equal(mapped[name], expected[name]) for name in expected)


def test_a_plug_in_replaces_no_module_of_ours(tmp_path):
    (tmp_path / "model.py").write_text("value = 1")
    assert data.run_file(tmp_path / "model.py").value == 1
    assert sys.modules["model"] is model


def test_encoders_are_not_forgotten_even_if_pixels_have_their_shape(capsys):
    with pytest.raises(SystemExit) as stopped:
        data.open_encoders("", CPU, model.PRESETS["nano"], trained_with="pixels.py")
    assert stopped.value.code == 2 and "was trained with --encoders pixels.py" in capsys.readouterr().err


# ---- Bad files and flags: one line that says what is wrong and what to take, exit code 2 ----

QKV = "double_blocks.0.img_attn.qkv.weight"  # (192, 64), float32
SIZE = 4 * 192 * 64
ADVICE = "take the original file, such as flux-2-klein-base-4b.safetensors, not diffusers' or a quantised one"


def says(**changes):
    """A header that says something else of one tensor."""
    return lambda header: {**header, QKV: {**header[QKV], **changes}}


def without(part):
    """A header without the tensors that have part in their names."""
    return lambda header: {name: entry for name, entry in header.items() if part not in name}


HEADERS = {  # what becomes of the header of a published file, and what the line must say
    "float64": (says(dtype="F64"), f"{QKV} is F64, must be one of F32, F16, BF16; {ADVICE}"),
    "int8": (says(dtype="I8"), f"{QKV} is I8, must be"),
    "fp8": (says(dtype="F8_E4M3"), f"{QKV} is F8_E4M3, must be"),
    "list-type": (says(dtype=["F32"]), ADVICE),
    "beyond": (says(data_offsets=[2**40, 2**40 + SIZE]), f"is cut or damaged at {QKV}; {ADVICE}"),
    "negative": (says(data_offsets=[-SIZE, 0]), f"is cut or damaged at {QKV}"),
    "short": (says(data_offsets=[0, 4]), f"is cut or damaged at {QKV}"),
    "backwards": (says(shape=[-192, 64], data_offsets=[SIZE, 0]), ADVICE),
    "two-negative": (says(shape=[-192, -64]), ADVICE),
    "huge": (says(shape=[2**40, 2**40]), ADVICE),
    "larger": (says(shape=[10**30]), ADVICE),
    "no-values": (says(shape=[0, 64], data_offsets=[0, 0]), ADVICE),
    "words": (says(shape=["192", "64"]), ADVICE),
    "fractions": (says(shape=[192.0, 64.0]), ADVICE),
    "offset-words": (says(data_offsets=["0", str(SIZE)]), ADVICE),
    "three-offsets": (says(data_offsets=[0, 1, 2]), ADVICE),
    "no-offsets": (says(data_offsets=None), ADVICE),
    "no-entry": (lambda header: {**header, QKV: [1]}, ADVICE),
    "list": (lambda header: [header], ADVICE),
    "number": (lambda header: 3, ADVICE),
    "no-json": (lambda header: b"{'img_in.weight': 1}", ADVICE),
    "no-text": (lambda header: b"\xff\xfe\xfd", ADVICE),
    "nested": (lambda header: b"[" * 10**5, ADVICE),
    "no-names": (lambda header: {}, f"it lacks 'img_in.weight'; {ADVICE}"),
    "no-text-input": (without("txt_in"), "it lacks 'txt_in.weight'"),
    "one-missing": (without(QKV), f"it lacks {QKV}"),
    "many-missing": (without(".1.img_mlp."), "it lacks double_blocks.1.img_mlp.0.weight, double_blocks.1.img_mlp.2"),
    "block-missing": (without("single_blocks.0."), "single_blocks.0.norm.query_norm.scale"),
    "stream-missing": (without(".txt_attn."), "double_blocks.1.txt_attn.norm.key_norm.scale and 3 more"),
    "extra": (lambda header: {**header, "extra": header[QKV]}, "it holds extra, which the network does not have"),
    "shape": (says(shape=[64, 192]), f"{QKV} has shape (64, 192), must have (192, 64)"),
}
FILES = [
    *[(f"{name}.safetensors", line) for name, (_, line) in HEADERS.items()],
    ("cut.safetensors", f"cut.safetensors is cut or damaged at single_blocks.1.linear2.weight; {ADVICE}"),
    ("nothing.safetensors", f"is cut or damaged in its header; {ADVICE}"),
    ("long.safetensors", "is cut or damaged in its header"),
    ("sparse.safetensors", "is cut or damaged in its header"),
    ("nan.safetensors", f"{QKV} is not finite"),
    ("pickle.safetensors", ADVICE),
    ("missing.safetensors", "missing.safetensors: no such file"),
    ("empty", f"holds 0 .safetensors files without an index; {ADVICE}"),
    ("several", f"holds 2 .safetensors files without an index; {ADVICE}"),
    ("no-model", "no-model/model.safetensors"),
    ("config-words", ADVICE),
    ("config-number", ADVICE),
    ("no-shard", "flux-00002-of-00002.safetensors"),
    ("index-list", ADVICE),
    ("index-number", ADVICE),
    ("index-empty", "it lacks 'weight_map'"),
    ("diffusers", ADVICE),
    ("diffusers/transformer", f"it lacks 'img_in.weight'; {ADVICE}"),
    ("dit.pt", "leave out --backbone"),
    ("damaged.pt", "cut, damaged, or not a checkpoint"),
]
LOAD = "--backbone {flux2} --init {t2i} "
ENCODE = LOAD + "--encoders {toy}"
FLAGS = [
    (train_forcing, LOAD + "--preset nano", "--backbone {flux2}: takes its network from --init; leave out --preset"),
    (train_forcing, "--backbone {flux2} --init none", "leave out --preset and --init none"),
    (train_forcing, "--init {t2i}", "--init {t2i}: not a checkpoint of a training script; published weights need"),
    (train_forcing, "--init {authors}", "--init {authors}: not a checkpoint of a training script; published weights"),
    (train_forcing, "--init {own}", "--init {own}: was trained with --backbone {flux2}"),
    (train_forcing, "--init {t2i} --backbone {tmp}/none.py", "--backbone {tmp}/none.py: FileNotFoundError"),
    (train_forcing, "--init {t2i} --backbone {toy}", "has no attribute 'Network'; name extras/flux2.py, or a file"),
    (train_forcing, "--init {t2i} --backbone {tmp}/syntax.py", "SyntaxError"),
    (train_forcing, "--init {t2i} --backbone {tmp}/import.py", "No module named 'no_such_package'"),
    (train_forcing, "--init {t2i} --backbone {tmp}", "--backbone {tmp}: "),
    (train_forcing, "--init {t2i} --backbone {t2i}", "--backbone {t2i}: "),
    (train_forcing, LOAD, "--encoders (none): the checkpoint was trained with --encoders extras/encoders.py:Klein"),
    (train_forcing, ENCODE, "--encoders {toy}: the checkpoint was trained with"),
    (train_forcing, ENCODE + ":Narrow", "--encoders {toy}:Narrow: the checkpoint was trained with"),
    (train_forcing, ENCODE + ":None", "no attribute 'None'"),
    (train_forcing, ENCODE + ":CoarseEncoders:a,b", "TypeError"),
    (train_forcing, ENCODE + ":CoarseEncoders --size 40", "--size 40: must be a multiple of the patch size"),
    (train_forcing, "--init {authors} {with_toy} --modalities rgb", "has depth; add it to --modalities"),
    (sample, "--checkpoint {t2i}", "--checkpoint {t2i}: not a checkpoint of a training script; published weights"),
    (sample, "--checkpoint {own}", "--checkpoint {own}: was trained with --backbone {flux2}"),
    (sample, "--checkpoint {t2i} {with_toy} --size 40", "--size 40: must be a multiple of the patch size, 16"),
    (sample, "--checkpoint {t2i} {with_toy} --order rgb,depth", "--order rgb,depth"),
    (sample, "--backbone {flux2} --checkpoint {tmp}/dit.pt", "leave out --backbone"),
    (evaluate, "depth --checkpoint {t2i} {with_toy}", "has no depth"),
    (evaluate, "depth --checkpoint {authors} {with_toy} --size 40", "--size 40: must be a multiple of the patch size"),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory, t2i, authors):
    """Names to fill into the command lines."""
    tmp = tmp_path_factory.mktemp("bad")
    header, content = describe(draw_weights())
    for name, (change, _) in HEADERS.items():
        (tmp / f"{name}.safetensors").write_bytes(join(change(header), content))
    whole = join(header, content)
    (tmp / "cut.safetensors").write_bytes(whole[:-1000])
    (tmp / "nothing.safetensors").touch()
    (tmp / "long.safetensors").write_bytes(b"\xff" * 8 + whole[8:])
    (tmp / "sparse.safetensors").write_bytes((2**36).to_bytes(8, "little"))
    os.truncate(tmp / "sparse.safetensors", 2**37)
    torch.save({}, tmp / "pickle.safetensors")
    weights = draw_weights()
    weights[QKV][0, 0] = torch.nan
    write_layout(tmp, "file", weights).rename(tmp / "nan.safetensors")

    def folder(name, files):
        (tmp / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp / name / file).write_bytes(content)

    index = "flux.safetensors.index.json"
    folder("empty", {})
    folder("several", {"a.safetensors": whole, "b.safetensors": whole})
    folder("no-model", {"config.json": b'{"variant": "flux_rgbd_9b_v2"}', "ae.safetensors": whole})
    folder("config-words", {"config.json": b"variant", "model.safetensors": whole})
    folder("config-number", {"config.json": b"3", "model.safetensors": whole})
    (write_layout(tmp / "no-shard", "shards", draw_weights()) / "flux-00002-of-00002.safetensors").unlink()
    folder("index-list", {index: b'{"weight_map": ["flux.safetensors"]}', "flux.safetensors": whole})
    folder("index-number", {index: b'{"weight_map": {"img_in.weight": 3}}', "flux.safetensors": whole})
    folder("index-empty", {index: b"{}", "flux.safetensors": whole})
    names = {"x_embedder.weight": torch.zeros(64, 48), "transformer_blocks.0.attn.to_q.weight": torch.zeros(64, 64)}
    parts = {"config.json": b'{"_class_name": "Flux2Transformer2DModel"}'}
    parts["diffusion_pytorch_model.safetensors"] = join(*describe(names))
    folder("diffusers", {"model_index.json": b'{"_class_name": "Flux2KleinPipeline"}'})
    folder("diffusers/transformer", parts)

    (tmp / "damaged.pt").write_bytes(b"\x80")
    (tmp / "syntax.py").write_text("class Network")
    (tmp / "import.py").write_text("import no_such_package")
    toy = tmp / "toy.py"
    narrow = "class Narrow(CoarseEncoders):\n    text_dim = 8\n"
    toy.write_text((ROOT / "tests/toy_encoders.py").read_text() + narrow)
    paths = {"tmp": tmp, "t2i": t2i, "authors": authors, "toy": toy, "flux2": ROOT / "extras/flux2.py"}
    dit = model.Config(width=64, depth=1, head=16, patch=4, size=16)
    torch.save({"config": asdict(dit), "ema": dit.build().state_dict(), "settings": {}}, tmp / "dit.pt")
    state = {"config": asdict(CONFIG), "ema": draw_weights(), "settings": {"backbone": str(paths["flux2"])}}
    torch.save(state, tmp / "own.pt")
    return paths | {"own": tmp / "own.pt", "with_toy": TOY}


ROWS = [(train_forcing, "--backbone {flux2} --init {tmp}/" + name, line) for name, line in FILES] + FLAGS


@pytest.mark.parametrize(("script", "line", "expected"), ROWS, ids=[f"{s.__name__} {line}" for s, line, _ in ROWS])
def test_bad_input_is_one_line_and_exit_code_2(script, line, expected, bad, monkeypatch, capsys):
    memory = peak_memory()
    before = sorted(bad["tmp"].rglob("*"))
    monkeypatch.chdir(bad["tmp"])
    with pytest.raises(SystemExit) as stopped:
        run(script, line.format(**bad), monkeypatch)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message.splitlines()) == 1 and len(message) < 500, message
    assert expected.format(**bad) in message
    assert sorted(bad["tmp"].rglob("*")) == before and peak_memory() - memory < 1 << 30


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
    assert ended.model.fresh_names == new and len(new) == 28
    assert max(moved[name] for name in new) == pytest.approx(rate_of_new, rel=1e-3)
    assert max(moved[name] for name in moved.keys() - new) == pytest.approx(1e-4, rel=1e-2)

    expected = draw_weights()
    taught = dict(ended.teacher.named_parameters())
    assert taught.keys() == expected.keys() and [m.name for m in ended.teacher.modalities] == ["rgb"]
    assert all(torch.equal(p, expected[name]) for name, p in taught.items())
    assert t2i.read_bytes() == written
    assert "loss_distill_rgb" in losses(tmp_path / "run")[1]

    resumed = train(f"--resume {TOY} --steps 2 --lr 1e-3 --lr-new 0.003 --out {tmp_path}/run", monkeypatch)
    (optimizer,) = resumed.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 0.003])


def test_a_run_without_an_average_holds_weights_once(t2i, tmp_path, monkeypatch):
    ended = train(f"{QUICK} --init {t2i} --steps 1 --ema 0 --out {tmp_path}/run", monkeypatch)
    assert ended.ema is ended.model
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert all(tensor.data_ptr() == state["ema"][name].data_ptr() for name, tensor in state["model"].items())

    network = f"{TOY} --checkpoint {tmp_path}/run/last.pt --steps 1"
    run(sample, f"{network} --size 32 --count 1 --out {tmp_path}/sample", monkeypatch)
    assert (tmp_path / "sample/000/depth.npy").exists()
    assert np.isfinite(evaluate_depth(f"{network} --out {tmp_path}/results", monkeypatch)["absrel"])


def test_a_run_that_drops_its_average_goes_on_from_the_trained_weights(t2i, tmp_path, monkeypatch):
    train(f"{QUICK} --init {t2i} --steps 2 --lr 0.01 --out {tmp_path}/run", monkeypatch)
    before = torch.load(tmp_path / "run/last.pt", weights_only=True)
    ended = train(f"--resume {TOY} --steps 3 --lr 1e-12 --lr-new 1e-12 --ema 0 --out {tmp_path}/run", monkeypatch)
    moved = [(p - before["model"][name]).abs().max() for name, p in ended.model.named_parameters()]
    apart = [(before["ema"][name] - weight).abs().max() for name, weight in before["model"].items()]
    assert max(moved) < 1e-6 < 1e-3 < max(apart)


def test_published_networks_sample_and_are_evaluated(t2i, authors, tmp_path, monkeypatch):
    for name, path in (("t2i", t2i), ("authors", authors)):
        line = f"{TOY} --checkpoint {path} --size 32 --steps 1 --count 1 --out {tmp_path}/{name}"
        run(sample, line, monkeypatch)
        assert (tmp_path / name / "000/rgb.png").exists()
        assert (tmp_path / name / "000/depth.npy").exists() == (path == authors)
    line = f"{TOY} --checkpoint {authors} --steps 1 --out {tmp_path}/results"
    assert np.isfinite(evaluate_depth(line, monkeypatch)["absrel"])


def test_training_goes_on_from_the_authors_network_without_a_teacher(authors, tmp_path, monkeypatch):
    """Every weight is the file's: none is new."""
    ended = train(f"{QUICK} --init {authors} --steps 1 --lr 1e-12 --out {tmp_path}/run", monkeypatch)
    assert ended.teacher is None and not ended.model.fresh_names
    expected = draw_weights(WITH_DEPTH, torch.bfloat16)
    for name, parameter in ended.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].float(), rtol=0, atol=1e-6, msg=name)
    assert "loss_distill_rgb" not in losses(tmp_path / "run")[1]


def test_without_a_caption_the_network_reads_the_empty_captions_embedding(t2i, tmp_path, monkeypatch):
    no_text = CoarseEncoders(CPU).encode_text([""])
    assert no_text.abs().max() > 0
    batches = []
    corrupt_batch = train_forcing.corrupt_batch

    def spy(*args):
        batches.append(corrupt_batch(*args))
        return batches[-1]

    monkeypatch.setattr(train_forcing, "corrupt_batch", spy)
    train(f"{QUICK} --init {t2i} --steps 1 --drop-caption 1 --out {tmp_path}/run", monkeypatch)
    (batch,) = batches
    assert torch.equal(batch.text, no_text.expand_as(batch.text))

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


@pytest.mark.slow
def test_two_sharded_ranks_compute_what_one_computes_and_hold_half_each(t2i, tmp_path, monkeypatch):
    """In float64: losses, weights and EMA of three steps with a teacher and two learning rates."""
    line = f"{QUICK} --init {t2i} --steps 3 --lr 1e-3 --lr-new 1e-2"
    two = start("train_forcing", f"{line} --shard --out {tmp_path}/two", FLOAT64 + SHARES, LAUNCHER)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        train(f"{line} --out {tmp_path}/one", monkeypatch)
    finally:
        torch.set_default_dtype(torch.float32)
    code, printed = finish(two)
    assert code == 0, printed

    shares = re.findall(r"(start|end): (\w+) holds (\d+) of (\d+)", printed)
    print(*shares, sep="\n")
    assert len(shares) == 2 * 2 * 3
    for when, name, held, whole in shares:
        assert int(held) == pytest.approx(int(whole) / 2, rel=0.01), (when, name)

    expected = losses(tmp_path / "one")
    found = losses(tmp_path / "two")
    for step in (1, 2, 3):
        assert found[step] == pytest.approx(expected[step], rel=1e-9, abs=1e-12)
        difference = max(abs(value / (expected[step][name] or 1) - 1) for name, value in found[step].items() if value)
        print(f"step {step}: largest relative difference of {len(found[step])} losses {difference:.1e}")
    one = weights(tmp_path / "one")
    two = weights(tmp_path / "two")
    assert one.keys() == two.keys() and {v.dtype for v in one.values()} == {torch.float64}
    difference = max((one[k] - two[k]).abs().max().item() for k in one)
    print(f"largest difference of weights {difference:.1e}")
    assert difference < 1e-9


@pytest.mark.slow
def test_sharded_ranks_without_an_average_go_on(t2i, tmp_path):
    """Interrupted after two steps, three steps give the weights of a run left alone, also if they keep an average."""
    line = f"{QUICK} --init {t2i} --shard --ema 0 --lr 1e-3 --steps 3"

    def train_sharded(more):
        code, printed = finish(start("train_forcing", f"{line} {more}", launcher=LAUNCHER))
        assert code == 0, printed
        return printed

    train_sharded(f"--checkpoint-every 2 --out {tmp_path}/alone")
    expected = torch.load(tmp_path / "alone/last.pt", weights_only=True)["model"]
    for name, more in (("stopped", ""), ("averaged", "--ema 0.9")):
        out = tmp_path / name
        shutil.copytree(tmp_path / "alone", out)
        (out / "step-0000003.pt").unlink()
        assert "from step 2" in train_sharded(f"{more} --out {out} --resume")
        found = torch.load(out / "last.pt", weights_only=True)["model"]
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
