"""Draw how samples lose their noise, as an animated GIF: the frames of README's gallery.

    python tests/animate.py --prompt "a red ball in a room" --order depth,rgb --out depth-first.gif

The samples are those of sample.py with the same prompt, order and seed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
from model import JOINT, make_schedule

FRAMES = 40


def paint_noisy(m, x):
    """x_t of a modality (C, H, W) -> picture (H, W, 3)."""
    if m.encoding == "relative depth":
        return data.paint_depth(1 / (2.05 - x.clamp(0, 2)))  # brightness is linear in contracted depth
    return data.paint(m, x)


def sample_frames(network, encoders, args):
    """Generate samples. Returns x_t after every step, a list of {m: (B, C, H, W)}."""
    size = (network.config.size, network.config.size)
    names = [m.name for m in network.modalities]
    order = JOINT if args.order == "joint" else data.parse_order(args.order, names)
    rng = data.PerSampleRNG("sample", range(args.seed, args.seed + args.count))
    noise = {m.name: rng.randn(*m.shape(size)) for m in network.modalities}
    text = encoders.encode_text([args.prompt] * args.count)
    frames = []
    network.sample(make_schedule(names, args.steps, order), noise, text, guidance=args.cfg, callback=frames.append)
    return frames


def main():
    p = data.Flags(__doc__)
    p.setting("--checkpoint", data.NANO, "checkpoint of a training script")
    p.setting("--cfg", "3", "as in sample.py", data.by_modality(data.number(0, 100)))
    p.setting("--prompt", "", "what the image shows")
    p.setting("--order", "joint", "as in sample.py")
    p.setting("--count", 3, "number of samples", data.whole(1, 16))
    p.setting("--steps", 50, "sampling steps of each modality in turn", data.whole(1, 1000))
    p.setting("--seed", 0, "seed of the first sample's noise", data.SEED)
    p.setting("--out", "animation.gif", "file to write")
    args = p.parse_args()
    network, _ = data.open_network(args.checkpoint)
    encoders = data.PixelsAndBytes(network.config.text_length)

    frames = sample_frames(network, encoders, args)
    stride = -(-len(frames) // FRAMES)
    pictures = []
    for frame in [*frames[::stride], frames[-1]]:
        rows = [[paint_noisy(m, x) for x in frame[m.name]] for m in network.modalities]
        pictures.append(data.draw_grid(rows, cell=96))
    durations = [80] * (len(pictures) - 1) + [2000]  # milliseconds: the last frame stays longer
    data.write_image(args.out, pictures[0], save_all=True, append_images=pictures[1:], duration=durations, loop=0)


if __name__ == "__main__":
    data.run_script(main)
