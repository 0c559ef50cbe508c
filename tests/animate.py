"""Draw how samples lose their noise in each order, as a GIF: the image above, its depth below.

python tests/animate.py --prompt "a red ball in a room" --order rgb,depth --out runs/rgb-first.gif
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from model import GUIDANCE, SAMPLING_STEPS, make_schedule

MAX_FRAMES = 40
FRAME_TIME = 80  # milliseconds
LAST_FRAME_TIME = 2000


def parse():
    p = data.Flags(__doc__)
    p.setting("--checkpoint", data.NANO, "checkpoint of train_forcing.py")
    p.setting("--prompt", "a small red ball left of a tall blue pillar in a room", "what the image shows")
    p.setting("--order", "joint", "joint, log2(alpha), or names such as depth,rgb")
    p.setting("--count", 3, "number of samples, side by side", data.whole(1, 16))
    p.setting("--out", "runs/animation.gif", "file to write")
    return p.parse_args()


def draw_frame(network, x):
    """A picture of the values x {m: (B, C, H, W)} in the middle of sampling."""
    rows = []
    for m in network.modalities:
        shown = x[m.name]
        if m.encoding == "relative depth":
            shown = 1 / (2.05 - shown.clamp(0, 2))  # brightness is then linear in contracted depth
        rows.append([data.paint(m, values) for values in shown])
    return data.draw_grid(rows, cell=96)


def main():
    args = parse()
    network, _ = data.open_network(args.checkpoint, "--checkpoint")
    network.place(torch.device("cpu"))
    names = [m.name for m in network.modalities]
    order = data.parse_order(args.order, names)
    size = (network.config.size, network.config.size)

    rng = data.PerSampleRNG("sample", range(args.count))  # as sample.py, so the samples are the same
    noise = {m.name: rng.randn(*m.shape(size)) for m in network.modalities}
    text = data.PixelsAndBytes(network.config.text_length).encode_text([args.prompt] * args.count)
    schedule = make_schedule(names, SAMPLING_STEPS, order)
    guidance = {names[0]: GUIDANCE}
    frames = []
    network.sample(schedule, noise, text, guidance=guidance, callback=frames.append)

    step = math.ceil(len(frames) / MAX_FRAMES)
    pictures = [draw_frame(network, x) for x in [*frames[::step], frames[-1]]]
    times = [FRAME_TIME] * (len(pictures) - 1) + [LAST_FRAME_TIME]
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    data.write_image(out, pictures[0], **options)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    data.run_script(main)
