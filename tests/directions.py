"""Draw what a network generates in every direction, for the first scenes of the world's validation split.

python tests/directions.py --checkpoint runs/forcing/last.pt --out runs/directions.png
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train_forcing


def parse():
    p = data.Flags(__doc__)
    p.setting("--checkpoint", data.NANO, "checkpoint of train_forcing.py")
    p.setting("--count", 6, "number of scenes, from the first on", data.whole(1, 64))
    p.setting("--out", "runs/directions.png", "file to write")
    return p.parse_args()


def main():
    args = parse()
    network, state = data.open_network(args.checkpoint, "--checkpoint")
    device = torch.device("cpu")
    network.place(device)
    args.size = network.config.size
    batch = data.SyntheticWorld("val", (args.size, args.size)).samples(range(args.count))
    encoders = data.open_encoders("", device, network.config, state["settings"].get("encoders", ""))
    picture = train_forcing.draw_samples(encoders, batch, args, device, network)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    data.write_image(out, picture)


if __name__ == "__main__":
    data.run_script(main)
