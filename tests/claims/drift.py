"""Velocity drift: how far the image velocity of a Modality Forcing network is from its text-to-image teacher's.

    python drift.py --checkpoint forcing.pt --teacher t2i.pt --out DIR       (run by claims.sh, beside model.py)

On validation scenes, images noised to eight levels t, depth pure noise, which tells nothing: RMS of v - v_t2i over the
RMS of v_t2i (Eq. 8 without its weight). Prints it and writes DIR/results.json.
"""

import argparse
import json
from pathlib import Path

import torch

import data
from model import Config, DiT, corrupt


def load(path, flag):
    state = data.load_checkpoint(path, flag)
    model = DiT(Config(**state["config"])).requires_grad_(False)
    model.load_state_dict(state["ema"])
    return model


p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--checkpoint", required=True)
p.add_argument("--teacher", required=True)
p.add_argument("--out", default="runs/drift")
args = p.parse_args()
student, teacher = load(args.checkpoint, "--checkpoint"), load(args.teacher, "--teacher")
size = student.config.size, student.config.size
world, apart, length = data.World("val", size), 0.0, 0.0
for start in range(0, 256, 32):
    indices = range(start, start + 32)
    values, _, captions = world.samples(indices)[:3]
    draws, text = data.Draws((0, "drift"), indices), data.encode_text(captions, student.config.text_length)
    noise = {m.name: draws.randn(*m.shape(size)) for m in student.modalities}
    for level in (torch.arange(8) + 0.5) / 8:
        t = {m: torch.full((len(text),), level if m == "rgb" else 1.0) for m in noise}
        noisy = noise | {"rgb": corrupt(values["rgb"], noise["rgb"], t["rgb"])}
        x0_hat = student(noisy, t, text)["rgb"], teacher({"rgb": noisy["rgb"]}, {"rgb": t["rgb"]}, text)["rgb"]
        ours, theirs = ((x - noisy["rgb"]) / level for x in x0_hat)
        apart, length = apart + (ours - theirs).square().sum(), length + theirs.square().sum()
results = {"drift": (apart / length).sqrt().item()}
Path(args.out).mkdir(parents=True, exist_ok=True)
Path(args.out, "results.json").write_text(json.dumps(results) + "\n")
print(results)
