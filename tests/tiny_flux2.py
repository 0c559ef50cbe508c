"""A tiny FLUX.2 with random weights, and a writer of the layouts in which the large ones are published.

    python tests/tiny_flux2.py --out FILE.safetensors      writes one to train from scratch on the built-in world

The tests use CONFIG and WITH_DEPTH, which are smaller.
"""

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from extras import flux2
from model import DEPTH, RGB

CONFIG = flux2.Flux2Config(
    width=64,
    depth=2,
    double_depth=2,
    head=16,
    patch=16,
    size=32,
    text_dim=16,
    modalities=[replace(RGB, channels=48, stride=16)],
)
WITH_DEPTH = replace(CONFIG, modalities=[*CONFIG.modalities, replace(DEPTH, decoder_depth=1)])
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def draw_weights(config=CONFIG, dtype=torch.float32):
    """{name: tensor} of a network: gains near 1, and matrices that keep the variance."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in config.build().named_parameters():
        values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        weights[name] = (1 + values if name.endswith(".scale") else values).to(dtype)
    return weights


def describe(weights):
    """(header, content) of a .safetensors file."""
    header = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, tensor in weights.items():
        values = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(content), len(content) + len(values)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        content += values
    return header, content


def join(header, content):
    """The bytes of a .safetensors file. header is of any type, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def write_file(path, weights):
    path.write_bytes(join(*describe(weights)))


def write_layout(folder, layout, weights):
    """Write weights in a layout: file, folder, shards or authors. Returns the path that --init takes."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "authors":
        (folder / "config.json").write_text(json.dumps({"variant": "flux_rgbd_9b_v2"}))
        write_file(folder / "ae.safetensors", {"encoder.conv_in.weight": torch.zeros(1)})
        write_file(folder / "model.safetensors", {f"dit.{name}": tensor for name, tensor in weights.items()})
    elif layout == "shards":
        weight_map = {}
        for i, name in enumerate(weights):
            weight_map[name] = f"flux-0000{1 + i % 2}-of-00002.safetensors"
        for shard in set(weight_map.values()):
            write_file(folder / shard, {name: weights[name] for name in weights if weight_map[name] == shard})
        (folder / "flux.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        write_file(folder / "flux.safetensors", weights)
    return folder / "flux.safetensors" if layout == "file" else folder


def main():
    """Write a network to train from scratch. Its modulations and final layer are zero, so it predicts x_t at first."""
    p = data.Flags(__doc__)
    p.setting("--out", "runs/flux2/start.safetensors", "file to write")
    path = Path(p.parse_args().out)
    config = replace(CONFIG, width=128, head=32, depth=4)
    torch.manual_seed(0)
    weights = {}
    for name, parameter in config.build().named_parameters():
        weights[name] = flux2.fresh_weights(name, parameter.shape)
        if "modulation" in name or "final_layer" in name:
            weights[name].zero_()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, weights)


if __name__ == "__main__":
    main()
