"""Velocity drift: how far the image velocity of a Modality Forcing network is from its text-to-image teacher's.

    python drift.py --checkpoint forcing.pt --teacher t2i.pt --out DIR       (run by claims.sh, beside model.py)

The images of validation scenes are noised to eight levels t, and depth is pure noise, which tells nothing. The drift is
the RMS of v - v_teacher divided by the RMS of v_teacher: Eq. 8 without its weight. The script prints it and writes
DIR/results.json.
"""

import argparse
import json
from pathlib import Path

import torch

import data
from model import corrupt

SCENES = 256


@torch.no_grad()
def drift(student, teacher):
    size = (student.config.size, student.config.size)
    batch = data.SyntheticWorld("val", size).samples(range(SCENES))
    text = data.encode_text(batch.captions, student.config.text_length)
    rng = data.PerSampleRNG((0, "drift"), range(SCENES))
    noise = {m.name: rng.randn(*m.shape(size)) for m in student.modalities}

    difference = 0.0
    length = 0.0
    for level in (torch.arange(8) + 0.5) / 8:
        t = {name: torch.ones(SCENES) for name in noise}
        t["rgb"] = level.expand(SCENES)
        noisy = {**noise, "rgb": corrupt(batch.values["rgb"], noise["rgb"], t["rgb"])}
        x0_hat = student(noisy, t, text)["rgb"]
        target = teacher(noisy, t, text)["rgb"]
        difference += ((x0_hat - target) / level).square().sum()  # x_t cancels in the difference of two velocities
        length += ((noisy["rgb"] - target) / level).square().sum()
    return (difference / length).sqrt().item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--teacher", required=True)
    p.add_argument("--out", required=True)
    args = p.parse_args()
    student, _ = data.open_network(args.checkpoint)
    teacher, _ = data.open_network(args.teacher, "--teacher")
    for network in (student, teacher):
        network.place(torch.device("cpu"))
    results = {"drift": drift(student, teacher)}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.out, "results.json").write_text(json.dumps(results) + "\n")
    print(results)


if __name__ == "__main__":
    main()
