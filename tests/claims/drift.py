"""Velocity drift: how far the image velocity of a Modality Forcing network is from its text-to-image teacher's.

    python drift.py --checkpoint forcing.pt --teacher t2i.pt --out DIR       beside model.py and data.py

On validation scenes, images noised to eight levels t, depth pure noise, which tells nothing: RMS of v - v_t2i over the
RMS of v_t2i (Eq. 8 without its weight); and the loss of Eq. 7 of each. Prints them and writes DIR/results.json.
"""

import argparse
import json
from pathlib import Path

import torch

import data
from model import Config, DiT, corrupt, velocity_loss


def load(path):
    state = data.load_checkpoint(path)
    model = DiT(Config(**state["config"])).requires_grad_(False)
    model.load_state_dict(state["ema"])
    return model


p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--checkpoint", required=True)
p.add_argument("--teacher", required=True)
p.add_argument("--images", type=int, default=256)
p.add_argument("--out", default="runs/drift")
args = p.parse_args()
student, teacher = load(args.checkpoint), load(args.teacher)
size = student.config.size, student.config.size
world, apart, losses = data.World("val", size), 0.0, torch.zeros(2)
length = 0.0
for start in range(0, args.images, 32):
    indices = range(start, start + 32)
    values, _, captions = world.samples(indices)[:3]
    draws, text = data.Draws((0, "drift"), indices), data.encode_text(captions, student.config.text_length)
    noise = {m.name: draws.randn(*m.shape(size)) for m in student.modalities}
    for level in (torch.arange(8) + 0.5) / 8:
        t = {m: torch.full((len(text),), level if m == "rgb" else 1.0) for m in noise}
        noisy = noise | {"rgb": corrupt(values["rgb"], noise["rgb"], t["rgb"])}
        x0_hat = student(noisy, t, text)["rgb"], teacher({"rgb": noisy["rgb"]}, {"rgb": t["rgb"]}, text)["rgb"]
        velocity = [(x - noisy["rgb"]) / level for x in x0_hat]
        apart, length = apart + (velocity[0] - velocity[1]).square().sum(), length + velocity[1].square().sum()
        losses += torch.stack([velocity_loss(x, values["rgb"], t["rgb"]).sum() for x in x0_hat])
student_loss, teacher_loss = (losses / (8 * args.images * 3 * size[0] * size[1])).tolist()
results = {"drift": (apart / length).sqrt().item(), "loss": student_loss, "teacher_loss": teacher_loss}
data.make_folder(args.out)
Path(args.out, "results.json").write_text(json.dumps(results, indent=1) + "\n")
print(results)
