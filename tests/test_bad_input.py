"""Bad input of every kind: one line that says what is wrong, exit code 2, nothing lost. One row an input, one check.

A row is (script, command line, what the line on stderr must say). Names in braces are filled in from the fixture files.
"""

import contextlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
import evaluate
import sample
import train_forcing
import train_t2i
from model import DEPTH, RGB, Config, DiT

ROOT = Path(__file__).parent.parent
TASK = {evaluate: "depth "}  # what comes before the flags


# ---- Numbers and choices: for each flag the values that it must refuse ----

NUMBERS = {
    train_t2i: {
        "--lr": "0 -1 1.5 nan inf fast",
        "--clip": "-1 0 nan inf",
        "--ema": "-0.1 1.1 nan",
        "--drop-caption": "-0.1 2 nan",
        "--seed": "-1 2147483648 0.5 nan",
        "--size": "-4 65536 1e2 wide",
        "--steps": "0 -1 2.5 100000000000 many",
        "--batch-size": "0 -1 1000000000 nan",
        "--grad-accum": "0 -2",
        "--warmup": "0 1.5",
        "--beta2": "1 -0.1",
        "--keep": "0 -1",
        "--workers": "-1 100000",
        "--checkpoint-every": "0",
        "--log-every": "0",
        "--sample-every": "0 inf",
        "--max-skipped": "0",
        "--timeout": "0 1e9 nan",
        "--preset": "huge",
        "--optimizer": "sgd",
    },
    train_forcing: {
        "--p-clean": "0.3 rgb=2 sound=0.5 depth=",
        "--modalities": "depth depth,rgb rgb,rgb rgb,sound rgb,",
        "--depth-scale": "0 -1 nan inf",
        "--depth-min": "-1 nan inf",
        "--depth-max": "-1 nan inf",
        "--distill-hi": "-1 nan inf",
        "--distill-lo": "-1 nan inf",
        "--sparsity": "thin 0 nan 1.5 -0.5",
        "--preset": "huge",
        "--lr": "nan",
    },
    sample: {
        "--strength": "0.5 rgb=1.5 rgb=-0.1 rgb=nan depth= sound=0.5",
        "--cfg": "nan inf -1 1e9 3,4 depth:2",
        "--count": "0 -1 100000000000",
        "--ensemble": "0 1e6",
        "--steps": "-1 1000000",
        "--batch-size": "0 1000000000",
        "--seed": "-1 2147483648",
    },
    evaluate: {
        "--images": "-1 0.5",
        "--size": "-1 65536",
        "--steps": "-1",
        "--judge-steps": "0",
        "--measured": "2 -0.1 nan",
        "--strength": "-0.1 nan",
        "--cfg": "nan -1",
        "--ensemble": "0",
        "--batch-size": "0 1000000000",
        "--seed": "-1",
        "--workers": "-1",
        "--depth-scale": "nan",
        "--align": "best lstsq",
    },
    data: {
        "--count": "0 -1 nan 1000000000",
        "--size": "0 65536",
        "--measured": "0 1.5 nan",
        "--split": "test",
    },
}

# ---- Flags that do not go together, or are none ----

FLAGS = [
    *[(script, TASK.get(script, "") + "--nonsense 3", "unrecognized arguments: --nonsense") for script in NUMBERS],
    *[(script, TASK.get(script, "") + "--siz 16", "unrecognized arguments: --siz") for script in NUMBERS],
    (train_t2i, "--lr", "--lr: expected one argument"),
    (train_t2i, "--lr --steps 3", "--lr: expected one argument"),
    (train_t2i, "now", "unrecognized arguments: now"),
    (train_t2i, "--compile yes", "unrecognized arguments: yes"),
    (train_t2i, "--no-compile=1", "explicit argument"),
    (train_t2i, "--batch-size 30 --grad-accum 4 --out {tmp}/x", "--batch-size 30"),
    (train_t2i, "--dry-run 8", "unrecognized arguments: 8"),
    (train_t2i, "--depth-scale 0.01", "unrecognized arguments: --depth-scale"),
    (train_t2i, "--size 30 --out {tmp}/x", "--size 30"),
    (train_t2i, "--data nowhere --out {tmp}/x", "--data nowhere: unknown source"),
    (train_t2i, "--data {tmp}/{{0..3}}.tar --out {tmp}/x", "no file {tmp}/0.tar"),
    (train_t2i, "--device warp --out {tmp}/x", "--device warp"),
    (train_t2i, "--out {tmp}/text.png", "text.png"),
    (train_t2i, "--out {tmp}/text.png/deeper", "text.png"),
    (train_t2i, "--out /proc/none", "/proc/none"),
    (train_forcing, "--p-clean rgb=0.9,depth=0.9 --init none", "--p-clean: the sum of the probabilities is 1.8"),
    (train_forcing, "--p-clean normal=0.1 --init none", "--p-clean normal=0.1: normal is not in --modalities"),
    (train_forcing, "--distill-hi 0.1 --distill-lo 0.5", "--distill-hi 0.1: must be at least --distill-lo, 0.5"),
    (train_forcing, "--init {t2i} --out {run}", "already holds a run"),
    (train_forcing, "--init {t2i} --preset tiny --out {tmp}/x", "--init"),
    (train_forcing, "--init {forcing} --modalities rgb --out {tmp}/x", "has depth; add it to --modalities"),
    (train_forcing, "--init {t2i} --preset nano --encoders {toy} --out {tmp}/x", "its rgb differs"),
    (sample, "--checkpoint {t2i} --image {tmp}/good.png", "nothing is left to generate"),
    (sample, "--checkpoint {t2i} --depth {tmp}/wide.npy", "has no depth"),
    (sample, "--checkpoint {t2i} --order rgb,depth", "--order rgb,depth"),
    (sample, "--checkpoint {t2i} --refine depth", "has no depth"),
    (sample, "--checkpoint {forcing} --normal {tmp}/n.npy", "has no normal"),
    (sample, "--checkpoint {forcing} --refine light", "has no light"),
    (sample, "--checkpoint {forcing} --size wide", "--size wide"),
    (sample, "--checkpoint {forcing} --size 65536", "--size 65536"),
    (sample, "--checkpoint {forcing} --size 16x0", "--size 16x0"),
    (sample, "--checkpoint {forcing} --size 30", "--size 30"),
    (sample, "--checkpoint {forcing} --size 16x30", "--size 16x30"),
    (sample, "--checkpoint {forcing} --order sideways", "--order"),
    (sample, "--checkpoint {forcing} --order 99", "--order"),
    (sample, "--checkpoint {forcing} --order nan", "--order"),
    (sample, "--checkpoint {forcing} --order ,", "--order"),
    (sample, "--checkpoint {forcing} --order=", "--order"),
    (sample, "--checkpoint {forcing} --order rgb,normal", "--order rgb,normal"),
    (sample, "--checkpoint {forcing} --order rgb,rgb", "--order rgb,rgb"),
    (sample, "--checkpoint {forcing} --order rgb --image {tmp}/good.png", "nothing is left to generate"),
    (sample, "--strength rgb=2", "--strength 2: must be"),
    (sample, "--cfg rgb=3,depth=nan", "--cfg nan: must be"),
    (sample, "--checkpoint {forcing} --strength rgb=0.5", "--strength rgb: the network is not given it, only noise"),
    (sample, "--checkpoint {forcing} --image {tmp}/good.png --depth {tmp}/d.npy --strength depth=0.5", "only rgb"),
    (sample, "--checkpoint {forcing} --ensemble 3", "--ensemble 3"),
    (sample, "--cfg-interval 0.8 0.2", "--cfg-interval"),
    (sample, "--cfg-interval 0.8", "--cfg-interval: expected 2 arguments"),
    (sample, "--cfg-interval nan 1", "--cfg-interval nan: must be"),
    (sample, "--checkpoint {forcing} --device meta", "--device"),
    (sample, "--checkpoint {forcing} --device cpu:x", "--device"),
    (sample, "--checkpoint {forcing} --device cuda:99", "--device"),
    (sample, "--checkpoint {forcing} --steps 1 --count 1 --out {tmp}/text.png", "text.png"),
    (evaluate, "", "required: task"),
    (evaluate, "colour", "invalid choice: 'colour'"),
    (evaluate, "depth --checkpoint {forcing} --data {folder} --depth-min 3 --depth-max 2", "no valid pixel"),
    (evaluate, "image --checkpoint {forcing} --strength 0.5", "--strength: the task image does not use it"),
    (evaluate, "image --ensemble 3", "--ensemble: the task image does not use it"),
    (evaluate, "depth --judge-steps 4", "--judge-steps: the task depth does not use it"),
    (evaluate, "normal --cfg 3", "--cfg: the task normal does not use it"),
    (evaluate, "joint --checkpoint {forcing} --strength 0.5", "--strength: the task joint does not use it"),
    (evaluate, "follow --checkpoint {forcing} --order 0", "--order: the task follow does not use it"),
    (evaluate, "joint --checkpoint {forcing} --order depth", "--order depth: must name depth and rgb"),
    (evaluate, "joint --checkpoint {forcing} --order 99", "--order 99"),
    (evaluate, "joint --checkpoint {forcing} --order rgb,normal", "--order rgb,normal"),
    (evaluate, "image --checkpoint {t2i} --order rgb,depth", "--order rgb,depth"),
    (evaluate, "joint --checkpoint {forcing} --order=", "--order"),
    (evaluate, "follow --checkpoint {forcing} --judge {t2i}", "no depth"),
    (evaluate, "follow --checkpoint {t2i}", "no depth"),
    (evaluate, "depth --checkpoint {t2i}", "no depth"),
    (evaluate, "depth --checkpoint {forcing} --judge {forcing}", "--judge"),
    (evaluate, "follow --checkpoint {forcing} --measured 0.5", "--measured"),
    (evaluate, "depth --checkpoint {forcing} --images 4 --measured 1e-9", "keeps no pixel"),
    (evaluate, "normal --checkpoint {forcing}", "no normal"),
    (evaluate, "normal --checkpoint {forcing} --align none", "--align"),
    (evaluate, "depth --checkpoint {forcing} --features {tmp}/features.pt", "the task depth does not use it"),
    (evaluate, "depth --checkpoint {forcing} --size 30", "--size 30"),
    (evaluate, "depth --checkpoint {forcing} --data nowhere", "nowhere: unknown source"),
    (evaluate, "depth --checkpoint {forcing} --data {folder},{folder}", "unknown source"),
    (evaluate, "depth --checkpoint {forcing} --out {tmp}/text.png", "text.png"),
    (evaluate, "image --checkpoint {forcing} --images 1 --steps 1", "at least two"),
    (data, "--out {tmp}/text.png", "text.png"),
]

# ---- Prompts ----

PROMPTS = [
    (sample, "--checkpoint {forcing} --prompt " + "redder" * 30, "does not read"),
]

# ---- Plug-ins: what is added to tests/toy_encoders.py, and what the line must say ----

PLUG_INS = [
    ("raise ValueError('first\\nsecond')", "ValueError: first second; extras/encoders.py is a file that works"),
    ("def", "SyntaxError"),
    ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ("del load", "has no attribute 'load'"),
    ("load = lambda device: None", "AttributeError"),
    ("Encoders.image_channels = 13", "encode_image returned a tensor of shape (2, 12,"),
    ("del Encoders.image_stride", "image_stride"),
    ("del Encoders.encode_text", "encode_text"),
    ("load = lambda device: data.PixelsAndBytes(32, 3)", "NameError"),
    ("Encoders.encode_image = lambda self, rgb: F.pixel_unshuffle(rgb, 2) * torch.nan", "encode_image returned"),
    ("Encoders.decode_image = lambda self, latents: latents", "decode_image returned a tensor of shape (2, 12,"),
    ("Encoders.decode_image = lambda self, latents: 1 / 0", "ZeroDivisionError"),
    ("Encoders.encode_text = lambda self, captions: torch.zeros(1, 20, 16)", "encode_text returned"),
]
ENCODERS = [
    *[(train_t2i, f"--encoders {{tmp}}/plug-in{i}.py --out {{tmp}}/x", says) for i, (_, says) in enumerate(PLUG_INS)],
    (train_t2i, "--encoders {tmp}/missing.py --out {tmp}/x", "missing.py"),
    (train_t2i, "--encoders {tmp}/text.png --out {tmp}/x", "text.png"),
    (train_forcing, "--init {encoded} --out {tmp}/x", "was trained with --encoders toy_encoders.py"),
    (train_forcing, "--init {t2i} --encoders {toy} --out {tmp}/x", "was trained with --encoders (none)"),
    (sample, "--checkpoint {encoded}", "was trained with --encoders toy_encoders.py"),
    (sample, "--checkpoint {encoded} --encoders {tmp}/plug-in11.py", "ZeroDivisionError"),
    (evaluate, "depth --checkpoint {encoded}", "was trained with --encoders toy_encoders.py"),
    (evaluate, "image --checkpoint {forcing} --features {tmp}/text.png", "--features {tmp}/text.png"),
    (evaluate, "image --checkpoint {forcing} --features {tmp}/missing.pt", "missing.pt: no such file"),
    (evaluate, "image --checkpoint {forcing} --features {tmp}", "--features {tmp}: no such file"),
    (evaluate, "image --checkpoint {forcing} --features {tmp}/good.png", "not a TorchScript file"),
]

# ---- Saved predictions ----

PREDICTED = "depth --data {folder} --size 16 --predictions {tmp}/maps-"
PREDICTIONS = [
    (evaluate, "depth --predictions {tmp}/maps-empty --data {folder}", "requires --size"),
    (evaluate, "follow --predictions {tmp}/maps-empty", "the task follow does not use it"),
    (evaluate, "image --predictions {tmp}/maps-empty", "the task image does not use it"),
    (evaluate, "depth --predictions {tmp}/nowhere --size 16", "nowhere/000000.png: No such file"),
    (evaluate, "depth --predictions {tmp}/maps-empty --size 16", "000000.png: No such file"),
    *[
        (evaluate, PREDICTED + kind, says)
        for kind, says in {
            "empty": "000000.png: No such file",
            "no-byte": "000000.npy",
            "no-pixel": "000000.npy",
            "no-row": "000000.npy",
            "one-pixel": "has shape (1, 1)",
            "colour": "000000.npy",
            "words": "000000.npy",
            "nan": "000000.npy",
            "wide": "has shape (16, 24)",
            "text": "000000.npy",
        }.items()
    ],
]

# ---- Images and depth maps ----

IMAGE = "--checkpoint {forcing} --steps 1 --image {tmp}/"
MAP = "--checkpoint {forcing} --steps 1 --depth {tmp}/"
IMAGES = [
    (sample, IMAGE + "missing.png", "missing.png"),
    (sample, IMAGE + "text.png", "text.png"),
    (sample, IMAGE + "nothing.png", "nothing.png"),
    (sample, IMAGE + "cut.png", "cut.png"),
    (sample, IMAGE + "cut.jpg", "cut.jpg"),
    (sample, IMAGE + "bomb.png", "bomb.png"),
    (sample, IMAGE + "moving.gif", "moving.gif"),
    (sample, IMAGE + "maps-empty", "no file"),
    (sample, IMAGE + "loop.png", "loop.png"),
    (sample, IMAGE + "d.npy", "d.npy"),
    (sample, "--checkpoint {forcing} --image {tmp}/pictures --depth {tmp}/d.npy", "must be files"),
    (sample, IMAGE + "good.png --depth {tmp}/wide.npy", "shape"),
    (sample, MAP + "missing.npy", "missing.npy"),
    (sample, MAP + "text.png", "text.png"),
    (sample, MAP + "empty.npy", "no valid pixel"),
    (sample, MAP + "negative.npy", "no valid pixel"),
    (sample, MAP + "nan.npy", "no valid pixel"),
    (sample, MAP + "colour.npy", "shape"),
    (sample, MAP + "line.npy", "shape"),
    (sample, MAP + "objects.npy", "objects.npy"),
    (sample, MAP + "words.npy", "words.npy"),
    (sample, MAP + "no-row.npy", "no-row.npy"),
    (sample, MAP + "cut.npy", "cut.npy"),
    (sample, MAP + "several.npz", "several.npz"),
    (sample, MAP + "grey.png", "grey.png: a PNG of mode L"),
    (sample, MAP + "good.png", "good.png: a PNG of mode RGB"),
    (sample, MAP + "zeros.png", "no valid pixel"),
    (sample, MAP + "cut16.png", "cut16.png"),
    (sample, MAP + "loop.npy", "loop.npy"),
    (sample, MAP + "near-word.png", "near-word.png"),
    (sample, MAP + "near-zero.png", "near-zero.png"),
    (sample, MAP + "near-nan.png", "near-nan.png"),
]

# ---- Folders and tar files ----

FOLDER = "image --checkpoint {forcing} --steps 1 --data {tmp}/"
SOURCES = [
    (evaluate, FOLDER + "folder-empty", "lists no samples"),
    (evaluate, FOLDER + "folder-words", "row 1: must be a JSON dictionary"),
    (evaluate, FOLDER + "folder-list", "row 1: must be a JSON dictionary"),
    (evaluate, FOLDER + "folder-nameless", "row 1: must be a JSON dictionary"),
    (evaluate, FOLDER + "folder-missing", "none.png"),
    (evaluate, FOLDER + "folder-caption", "row 1: must be a JSON dictionary"),
    (evaluate, "depth" + FOLDER[5:] + "folder-aspect", "another shape"),
    (evaluate, "depth" + FOLDER[5:] + "folder-no-depth", "no valid depth"),
    (evaluate, FOLDER + "folder-mask", "row 1: mask_file_name is not read"),
    (evaluate, FOLDER + "maps-empty", "unknown source"),
    (evaluate, FOLDER + "good.png", "good.png"),
    (evaluate, FOLDER + "text.tar", "text.tar"),
    (evaluate, FOLDER + "nothing.tar", "nothing.tar"),
    (evaluate, FOLDER + "bare.tar", "lists no samples"),
    (evaluate, FOLDER + "cut.tar", "cut.tar"),
    (train_t2i, "--data {tmp}/x{{5..2}}.tar --out {tmp}/x", "--data"),
]

# ---- Checkpoints, as they are refused already ----

CHECKPOINTS = [
    (sample, "--checkpoint {tmp}/none.pt", "none.pt"),
    (sample, "--checkpoint {tmp}/bad.pt", "bad.pt"),
    (sample, "--checkpoint {tmp}/other.pt", "other.pt"),
    (sample, "--checkpoint {tmp}/nothing.pt", "nothing.pt"),
    (sample, "--checkpoint {tmp}/cut.pt", "cut.pt"),
    (sample, "--checkpoint {tmp}/evil.pt", "evil.pt"),
    (sample, "--checkpoint {tmp}", "--checkpoint {tmp}"),
    (evaluate, "depth --checkpoint {tmp}/none.pt", "none.pt"),
    (evaluate, "follow --checkpoint {forcing} --judge {tmp}/bad.pt", "--judge"),
    (train_forcing, "--init {tmp}/none.pt --out {tmp}/x", "--init"),
    (train_forcing, "--init {tmp}/bad.pt --out {tmp}/x", "--init"),
]

# ---- Crafted checkpoints, run directories ----

FIRST = "text_tokenizer.weight"
CRAFTED = {  # what is changed in a checkpoint of image and depth -> what the line must say (more are in test_runs.py)
    "no-config": (lambda state: state.pop("config"), "config"),
    "unknown": (lambda state: state["config"].update(layers=3), "layers"),
    "missing": (lambda state: state["ema"].pop(FIRST), FIRST),
    "nan": (lambda state: state["ema"][FIRST].fill_(torch.nan), FIRST),
}

TRAIN = "--no-compile --device cpu --size 16 --batch-size 4 --warmup 2 --steps 3 "

RUN_DIRECTORIES = [  # one loader of checkpoints, --out
    *[(sample, f"--checkpoint {{tmp}}/crafted-{name}.pt", says) for name, (_, says) in CRAFTED.items()],
    (evaluate, "follow --checkpoint {forcing} --judge {tmp}/crafted-nan.pt", "--judge"),
    (train_forcing, "--init {tmp}/crafted-nan.pt --out {tmp}/x", "--init"),
    (train_forcing, "--init {tmp}/crafted-missing.pt --out {tmp}/x", "--init"),
    (train_t2i, TRAIN + "--resume --optimizer adamw --out {run}", "--resume"),
    (train_t2i, TRAIN + "--resume --preset tiny --out {run}", "--resume"),
    (train_t2i, TRAIN + "--out {tmp}/pictures", "--out {tmp}/pictures"),
    (data, "--out {tmp}/pictures", "--out {tmp}/pictures"),
    (data, "--out {tmp}/folder-missing", "--out {tmp}/folder-missing"),
]

ROWS = [
    *[
        (script, f"{TASK.get(script, '')}{flag}={value}", flag)
        for script, flags in NUMBERS.items()
        for flag, values in flags.items()
        for value in values.split()
    ],
    *FLAGS,
    *PROMPTS,
    *ENCODERS,
    *PREDICTIONS,
    *IMAGES,
    *SOURCES,
    *CHECKPOINTS,
    *RUN_DIRECTORIES,
]


# ---- What the rows name ----


def png_header(width, height):
    """A PNG that declares a size and holds no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_images(tmp):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(tmp / "cut.png"), noise.save(tmp / "cut.jpg")
    for name in ("cut.png", "cut.jpg"):
        (tmp / name).write_bytes((tmp / name).read_bytes()[:400])
    Image.new("RGB", (16, 16)).save(tmp / "good.png")
    Image.new("RGB", (3, 2)).save(tmp / "dot.png")
    Image.new("L", (16, 16)).save(tmp / "moving.gif")
    Image.new("L", (16, 16), 9).save(tmp / "grey.png")
    (tmp / "pictures").mkdir(), Image.new("RGB", (16, 16)).save(tmp / "pictures/a.png")
    (tmp / "text.png").write_text("not an image"), (tmp / "nothing.png").touch()
    (tmp / "bomb.png").write_bytes(png_header(60000, 60000))
    for name in ("loop.png", "loop.npy"):
        (tmp / name).symlink_to(name)
    os.mkfifo(tmp / "fifo")


def write_maps(tmp):
    maps = {
        "d": np.ones((16, 16)),
        "wide": np.ones((16, 24)),
        "empty": np.zeros((16, 16)),
        "negative": -np.ones((16, 16)),
        "nan": np.full((16, 16), np.nan),
        "colour": np.ones((16, 16, 3)),
        "line": np.ones(16),
        "words": np.full((16, 16), "far"),
        "no-row": np.ones((0, 16)),
        "objects": np.array([{}], dtype=object),
    }
    for name, values in maps.items():
        np.save(tmp / f"{name}.npy", values)
    np.savez(tmp / "several.npz", a=maps["d"])
    whole = (tmp / "d.npy").read_bytes()
    (tmp / "cut.npy").write_bytes(whole[:300])
    codes = np.random.default_rng(0).integers(1, 65535, (64, 64)).astype(np.uint16)
    Image.fromarray(codes).save(tmp / "cut16.png")
    (tmp / "cut16.png").write_bytes((tmp / "cut16.png").read_bytes()[:400])
    Image.fromarray(codes * 0).save(tmp / "zeros.png")
    for name, near in {"word": "close", "zero": "0", "nan": "nan"}.items():
        text = PngImagePlugin.PngInfo()
        text.add_text("near", near)
        text.add_text("far", "10")
        Image.fromarray(codes).save(tmp / f"near-{name}.png", pnginfo=text)


def write_sources(tmp):
    row = {"file_name": "a.png", "text": "a ball", "depth_file_name": "a.npy"}
    rows = {
        "empty": b"",
        "words": b"not json",
        "list": b"[1]",
        "nameless": b'{"text": "a ball"}',
        "missing": json.dumps(row | {"file_name": "none.png"}).encode(),
        "caption": json.dumps(row | {"text": ["a ball"]}).encode(),
        "aspect": json.dumps(row | {"depth_file_name": "wide.npy"}).encode(),
        "mask": json.dumps(row | {"mask_file_name": "a.png"}).encode(),
        "no-depth": json.dumps(row | {"depth_file_name": None}).encode(),
    }
    for name, content in rows.items():
        folder = tmp / f"folder-{name}"
        folder.mkdir()
        (folder / "metadata.jsonl").write_bytes(content + b"\n")
        shutil.copy(tmp / "good.png", folder / "a.png")
        shutil.copy(tmp / "d.npy", folder / "a.npy")
        shutil.copy(tmp / "wide.npy", folder)
    image = (tmp / "good.png").read_bytes()

    def write_tar(name, *members):
        with tarfile.open(tmp / name, "w") as tar:
            for member, content in members:
                member = tarfile.TarInfo(member) if isinstance(member, str) else member
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    write_tar("bare.tar", ("a.txt", b"a ball"))
    write_tar("cut.tar", ("a.png", image * 20))
    (tmp / "cut.tar").write_bytes((tmp / "cut.tar").read_bytes()[:700])
    (tmp / "text.tar").write_text("no tar file" * 100), (tmp / "nothing.tar").touch()


def write_predictions(tmp):
    kinds = {
        "no-pixel": np.ones((0, 0)),
        "no-row": np.ones((0, 16)),
        "one-pixel": np.ones((1, 1)),
        "colour": np.ones((16, 16, 3)),
        "words": np.full((16, 16), "far"),
        "nan": np.full((16, 16), np.nan),
        "wide": np.ones((16, 24)),
    }
    for kind, values in kinds.items():
        (tmp / f"maps-{kind}").mkdir()
        for i in range(4):
            np.save(tmp / f"maps-{kind}/{i:06}.npy", values)
    (tmp / "maps-empty").mkdir(), (tmp / "maps-no-byte").mkdir(), (tmp / "maps-text").mkdir()
    (tmp / "maps-no-byte/000000.npy").touch(), (tmp / "maps-text/000000.npy").write_text("far away")


class Evil:
    """What a malicious pickle would do."""

    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def checkpoint_state(*modalities, **options):
    """A checkpoint of a small random network."""
    config = Config(width=64, depth=1, head=16, patch=4, size=16, decoder_depth=1, text_length=32, **options)
    config = config.with_modalities(*modalities)
    torch.manual_seed(0)
    ema = {name: tensor.clone() for name, tensor in DiT(config).state_dict().items()}
    return {"config": asdict(config), "ema": ema, "settings": {}, "step": 1}


def write_checkpoints(tmp):
    torch.save(checkpoint_state(RGB), tmp / "t2i.pt")
    torch.save(checkpoint_state(RGB, DEPTH), tmp / "forcing.pt")
    import toy_encoders

    config = Config(**checkpoint_state(RGB, DEPTH)["config"]).with_encoders(toy_encoders.Encoders)
    state = {"config": asdict(config), "ema": DiT(config).state_dict(), "step": 1}
    torch.save(state | {"settings": {"encoders": "toy_encoders.py"}}, tmp / "encoded.pt")
    for name, (change, _) in CRAFTED.items():
        state = checkpoint_state(RGB, DEPTH)
        state["config"]["modalities"] = [dict(m) for m in state["config"]["modalities"]]
        change(state)
        torch.save(state, tmp / f"crafted-{name}.pt")
    torch.save({"weights": 1}, tmp / "other.pt"), torch.save({"config": Evil()}, tmp / "evil.pt")
    (tmp / "bad.pt").write_bytes(b"\x80garbage"), (tmp / "nothing.pt").touch()
    (tmp / "cut.pt").write_bytes((tmp / "forcing.pt").read_bytes()[:-1000])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Names to fill into the command lines."""
    tmp = tmp_path_factory.mktemp("bad")
    write_images(tmp), write_maps(tmp), write_sources(tmp), write_predictions(tmp), write_checkpoints(tmp)
    for i, (change, _) in enumerate(PLUG_INS):
        (tmp / f"plug-in{i}.py").write_text((ROOT / "tests/toy_encoders.py").read_text() + change + "\n")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        patch.setattr(train_t2i, "draw_samples", lambda *args: Image.new("RGB", (1, 1)))
        call(train_t2i, f"{TRAIN} --steps 2 --out {tmp}/run", patch)
        call(data, f"--out {tmp}/folder --count 4 --size 16", patch)
    names = {name: tmp / f"{name}.pt" for name in ("t2i", "forcing", "encoded")}
    return names | {"tmp": tmp, "run": tmp / "run", "folder": tmp / "folder", "toy": ROOT / "tests/toy_encoders.py"}


# ---- The check ----


class TooLong(BaseException):
    """Raised in a row after 30 seconds; no `except Exception` catches it."""


def call(script, line, patch):
    """Run a script's main in this process."""
    patch.setattr(sys, "argv", [f"{script.__name__}.py", *shlex.split(line)])
    data.run_script(script.main)


def snapshot(folder):
    """{path: (size, time of the last change)} of all files; an empty directory is no loss."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            status = path.lstat()
            found[path] = status.st_size, status.st_mtime_ns
    return found


def peak_memory(who=resource.RUSAGE_SELF):
    """Bytes."""
    return resource.getrusage(who).ru_maxrss * 1024


def give_up(*_):
    raise TooLong


@pytest.mark.parametrize(
    ("script", "line", "says"), ROWS, ids=[f"{s.__name__} {ascii(line)[1:90]}" for s, line, _ in ROWS]
)
def test_bad_input_is_one_line_and_exit_code_2(script, line, says, files, monkeypatch, capsys):
    monkeypatch.chdir(files["tmp"])
    before = snapshot(files["tmp"])
    memory = peak_memory()
    capsys.readouterr()
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as stopped:
            warnings.simplefilter("default")
            call(script, line.format(**files), monkeypatch)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(message.splitlines()) == 1 and len(message) < 300 and message.endswith("\n")
    assert says.format(**files) in message
    assert not [w for w in warned if not issubclass(w.category, DeprecationWarning)]
    assert peak_memory() - memory < 2 << 30
    assert snapshot(files["tmp"]) == before


@pytest.mark.parametrize(
    ("script", "flags"), [("train_t2i", ["--lr", "nan"]), ("evaluate", ["depth", "--size", b"\xff"])]
)
def test_bad_input_prints_nothing_else_to_stderr(script, flags, tmp_path):
    """Nothing else reaches stderr: no warning, no message of torch's launcher."""
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and not run.stdout
    assert not list(tmp_path.iterdir())


def test_rows_are_unique_and_at_least_150():
    assert len(set(ROWS)) == len(ROWS) >= 150
