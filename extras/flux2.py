"""FLUX.2 [klein] as the network of Modality Forcing (Sec. 4.3): `--backbone extras/flux2.py`.

With this flag, --init of train_forcing.py and --checkpoint of sample.py and evaluate.py take published weights: those
of Black Forest Labs' text-to-image network, or the authors' released model, which adds a stream for depth. Parameters
are named as in these files. docs/backbone.md has the commands. Checkpoints of our own training need the flag, too.

Shapes: B batch, N tokens, n tokens of one stream, D width, E channels of a head. A stream is the text ("txt"), the
image ("img") or another modality, which has its own name.
"""

import itertools
import json
import mmap
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import DEPTH, MODALITIES, RGB, Config, Denoiser, mixed_precision, timestep_sinusoids, token_positions

PATCH = 16  # side of a token in image pixels, in published weights, and stride of the latents: one is an image token


# ---- Blocks ----


def linear(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


def timestep_embedder(width):
    """timestep_sinusoids of a noise level (B, 256) -> (B, D)."""
    layers = {"in_layer": linear(256, width), "silu": nn.SiLU(), "out_layer": linear(width, width)}
    return nn.Sequential(OrderedDict(layers))


def modulation_layer(width, count):
    """Vector (B, D) -> (B, count * D): (shift, scale, gate), twice in double blocks: of attention, then of the MLP."""
    return nn.Sequential(OrderedDict({"silu": nn.SiLU(), "lin": linear(width, count * width)}))


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class HeadNorm(nn.Module):
    """RMSNorm over the channels of a head."""

    def __init__(self, head_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * self.scale


def query_key_norm(head_dim):
    return nn.ModuleDict({"query_norm": HeadNorm(head_dim), "key_norm": HeadNorm(head_dim)})


def queries_keys_values(qkv, norm, head_dim):
    """(B, n, 3 D) -> normalised q and k, and v, each (B, n, heads, E)."""
    q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).unbind(2)
    return norm["query_norm"](q), norm["key_norm"](k), v


def rotary_angles(positions, head_dim):
    """Positions (N, 4) of (modality, row, column, text position) -> angles (N, E / 2), a quarter for each axis."""
    num_rates = head_dim // 8
    rates = 2000.0 ** -(torch.arange(num_rates, device=positions.device) / num_rates)
    return (positions[:, :, None] * rates).flatten(1)


def rotate(x, cos, sin):
    """Rotate the channel pairs (2i, 2i + 1) of x (B, N, heads, E): cos, sin (N, 1, E / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def attend(q, k, v, rope):
    """Attention over all tokens: (B, N, heads, E) each -> (B, N, D)."""
    q = rotate(q, *rope).to(v.dtype).transpose(1, 2)  # (B, heads, N, E)
    k = rotate(k, *rope).to(v.dtype).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    def forward(self, x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


class DoubleBlock(nn.Module):
    """Attention over all streams together, then an MLP. Every stream has its own weights for both."""

    def __init__(self, streams, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        for stream in streams:
            attention = {
                "qkv": linear(width, 3 * width),
                "norm": query_key_norm(head_dim),
                "proj": linear(width, width),
            }
            mlp = [linear(width, 6 * width), SwiGLU(), linear(3 * width, width)]
            self.add_module(f"{stream}_attn", nn.ModuleDict(attention))
            self.add_module(f"{stream}_mlp", nn.Sequential(*mlp))

    def forward(self, x, modulation, rope):
        """x {stream: (B, n, D)}, float32; modulation {stream: (B, 1, 6 D)}; rope (cos, sin) of all tokens in a row."""
        heads = []
        for stream, tokens in x.items():
            shift, scale = modulation[stream].chunk(6, -1)[:2]
            attention = self.get_submodule(f"{stream}_attn")
            qkv = attention["qkv"](modulate(tokens, shift, scale))
            heads.append(queries_keys_values(qkv, attention["norm"], self.head_dim))
        q, k, v = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))  # (B, N, heads, E)
        attended = attend(q, k, v, rope).split([tokens.shape[1] for tokens in x.values()], 1)

        out = {}
        for (stream, tokens), attended_tokens in zip(x.items(), attended, strict=True):
            gate, mlp_shift, mlp_scale, mlp_gate = modulation[stream].chunk(6, -1)[2:]
            tokens = tokens + gate * self.get_submodule(f"{stream}_attn")["proj"](attended_tokens)
            mlp = self.get_submodule(f"{stream}_mlp")
            out[stream] = tokens + mlp_gate * mlp(modulate(tokens, mlp_shift, mlp_scale))
        return out


class SingleBlock(nn.Module):
    """Attention and MLP in parallel, with the same weights for all tokens."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.split = [3 * width, 6 * width]
        self.linear1 = linear(width, sum(self.split))
        self.norm = query_key_norm(head_dim)
        self.mlp_act = SwiGLU()
        self.linear2 = linear(4 * width, width)

    def forward(self, x, modulation, rope):
        """x (B, N, D), float32; modulation (B, N, 3 D) or (B, 1, 3 D); rope (cos, sin)."""
        shift, scale, gate = modulation.chunk(3, -1)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.split, -1)
        attended = attend(*queries_keys_values(qkv, self.norm, self.head_dim), rope)
        return x + gate * self.linear2(torch.cat([attended, self.mlp_act(mlp)], -1))


class FinalLayer(nn.Module):
    def __init__(self, width, num_values):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width))
        self.linear = linear(width, num_values)

    def forward(self, x, vector):
        """Tokens (B, n, D), vector (B, D) -> values (B, n, C * patch^2), in float32: bfloat16 here shows as bands."""
        device = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        with torch.autocast(device, enabled=False):
            shift, scale = self.adaLN_modulation(vector.float())[:, None].chunk(2, -1)
            return self.linear(modulate(x.float(), shift, scale))


# ---- Network ----


@dataclass(frozen=True)
class Flux2Config(Config):
    """Config.depth is the number of single blocks."""

    double_depth: int = 0  # number of double blocks

    def check_heads(self):
        if self.head % 8 or self.width % self.head:
            raise ValueError(f"head is {self.head}, must be a multiple of 8 that divides the width, {self.width}")

    def build(self):
        """A network on the meta device; warm_start loads its weights."""
        with torch.device("meta"):
            return Flux2DiT(self)


IMAGE_NAMES = {  # the published names of these parts of the image do not name their stream
    "time_in_img": "time_in",
    "single_stream_modulation_img": "single_stream_modulation",
    "img_final_layer": "final_layer",
}


def mixing_names(source, target):
    """Names of the embedder that brings the timestep of one stream to another, and of its factor."""
    embedder = f"time_in_{source}_to_{target}".replace("img_to", "rgb_to")
    if {source, target} == {"img", "depth"}:
        return embedder, f"cross_alpha_{target}"
    return embedder, embedder.replace("time_in", "cross_alpha")


class Flux2DiT(Denoiser):
    """Double blocks, then single blocks, over [text | image | other modalities]; then a decoder for each modality."""

    config_type = Flux2Config
    block_types = (DoubleBlock, SingleBlock)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.modalities = config.modalities
        width = config.width
        self.streams = {m.name: m.name for m in self.modalities}
        self.streams[self.modalities[0].name] = "img"

        self.txt_in = linear(config.text_dim, width)
        self.double_stream_modulation_txt = modulation_layer(width, 6)
        for m in self.modalities:
            stream = self.streams[m.name]
            num_values = m.channels * (config.patch // m.stride) ** 2
            parts = {
                f"{stream}_in": linear(num_values, width),
                f"time_in_{stream}": timestep_embedder(width),
                f"double_stream_modulation_{stream}": modulation_layer(width, 6),
                f"single_stream_modulation_{stream}": modulation_layer(width, 3),
                f"{stream}_final_layer": FinalLayer(width, num_values),
            }
            if m.decoder_depth:
                blocks = [SingleBlock(width, config.head) for _ in range(m.decoder_depth)]
                parts[f"{stream}_decoder_blocks"] = nn.ModuleList(blocks)
                parts[f"{stream}_decoder_modulation"] = modulation_layer(width, 3)
            for name, module in parts.items():
                self.add_module(IMAGE_NAMES.get(name, name), module)

        for source, target in itertools.permutations(self.streams.values(), 2):
            embedder, factor = mixing_names(source, target)
            self.add_module(embedder, timestep_embedder(width))
            self.register_parameter(factor, nn.Parameter(torch.zeros(1)))

        streams = ["txt", *self.streams.values()]
        self.double_blocks = nn.ModuleList(DoubleBlock(streams, width, config.head) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(SingleBlock(width, config.head) for _ in range(config.depth))

    def part(self, name):
        return self.get_submodule(IMAGE_NAMES.get(name, name))

    def modulation(self, name, vector):
        return self.part(name)(vector)[:, None].float()

    @mixed_precision
    def forward(self, noisy, t, text):
        """Predict the clean values of any subset of the modalities: x0_hat = g(x_t, t, text) of Sec. 3.1.

        noisy and the result are {m: (B, C, H, W)}: latents of the image, pixels of the others. t {m: (B,)} is in
        [0, 1]; text is (B, L, text_dim).
        """
        inputs = {self.streams[m.name]: m for m in self.modalities if m.name in noisy}
        vectors = self.conditioning_vectors({stream: t[m.name] for stream, m in inputs.items()})  # {stream: (B, D)}

        # The tokens of every stream and their positions.
        x = {"txt": self.txt_in(text).float()}  # {stream: (B, n, D)}
        text_positions = torch.arange(text.shape[1], device=text.device)
        positions = [F.pad(text_positions[:, None], (3, 0))]  # (n, 4) each
        grids = {}
        for stream, m in inputs.items():
            patches = F.pixel_unshuffle(noisy[m.name], self.config.patch // m.stride)  # (B, C * patch^2, rows, columns)
            grids[stream] = patches.shape[2:]
            x[stream] = self.part(f"{stream}_in")(patches.flatten(2).transpose(1, 2)).float()
            positions.append(token_positions(m.id, *grids[stream], text.device))
        lengths = [tokens.shape[1] for tokens in x.values()]
        angles = rotary_angles(torch.cat(positions), self.config.head)[:, None]  # (N, 1, E / 2)
        rope = (angles.cos(), angles.sin())

        modulation = {}  # {stream: (B, 1, 6 D)}
        for stream in x:
            modulation[stream] = self.modulation(f"double_stream_modulation_{stream}", vectors[stream])
        for block in self.double_blocks:
            x = block(x, modulation, rope)

        modulations = []  # (B, n, 3 D) each
        for stream, length in zip(x, lengths, strict=True):
            name = "img" if stream == "txt" else stream
            single = self.modulation(f"single_stream_modulation_{name}", vectors[stream])
            modulations.append(single.expand(-1, length, -1))
        modulation = torch.cat(modulations, 1)  # (B, N, 3 D)
        x = torch.cat(list(x.values()), 1)  # (B, N, D)
        for block in self.single_blocks:
            x = block(x, modulation, rope)

        # Each modality's tokens go back to values. The text's tokens, which come first, are left out.
        x0_hat = {}
        streams = zip(inputs.items(), x.split(lengths, 1)[1:], angles.split(lengths)[1:], strict=True)
        for (stream, m), tokens, token_angles in streams:
            if m.decoder_depth:
                modulation = self.modulation(f"{stream}_decoder_modulation", vectors[stream])  # (B, 1, 3 D)
                tokens = tokens.contiguous()  # the first block's, too, so that all share a compiled graph
                for block in self.part(f"{stream}_decoder_blocks"):
                    tokens = block(tokens, modulation, (token_angles.cos(), token_angles.sin()))
            values = self.part(f"{stream}_final_layer")(tokens, vectors[stream])  # (B, n, C * patch^2)
            values = values.transpose(1, 2).unflatten(2, grids[stream])  # (B, C * patch^2, rows, columns)
            x0_hat[m.name] = F.pixel_shuffle(values, self.config.patch // m.stride)  # (B, C, H, W)
            if stream == "img":  # the pretrained head predicts the velocity u = noise - x0
                x0_hat[m.name] = noisy[m.name] - t[m.name].view(-1, 1, 1, 1) * x0_hat[m.name]
        return x0_hat

    def conditioning_vectors(self, t):
        """Noise levels {stream: (B,)} -> {stream: (B, D)}; the levels of the other streams are mixed in (Sec. 3.2)."""
        sinusoids = {stream: timestep_sinusoids(levels) for stream, levels in t.items()}  # {stream: (B, 256)}
        vectors = {stream: self.part(f"time_in_{stream}")(sinusoids[stream]) for stream in t}
        for source, target in itertools.permutations(t, 2):
            embedder, factor = mixing_names(source, target)
            mixed_in = self.get_parameter(factor) * self.get_submodule(embedder)(sinusoids[source])
            vectors[target] = vectors[target] + mixed_in
        vectors["txt"] = next(iter(vectors.values()))  # the text takes the vector of the first input
        return vectors

    def copies(self, m):
        copies = {}
        for name in self.state_dict():
            for part in (f".{m.name}_attn.", f".{m.name}_mlp.", f"_stream_modulation_{m.name}."):
                if part in name:
                    image_part = part.replace(m.name, "img")
                    image_name = name.replace(part, image_part)
                    copies[name] = image_name.replace("single_stream_modulation_img", "single_stream_modulation")
        return copies

    def warm_start(self, weights):
        super().warm_start(weights)
        fresh = {name: fresh_weights(name, p.shape) for name, p in self.named_parameters() if name in self.fresh_names}
        self.load_state_dict(fresh, strict=False, assign=True)


def fresh_weights(name, shape):
    """Random weights; but ones for gains, and zeros for mixing, for decoders' modulation and for final layers."""
    if name.endswith(".scale"):
        return torch.ones(shape)
    if "cross_alpha" in name or "_decoder_modulation" in name or "_final_layer" in name:
        return torch.zeros(shape)
    return nn.init.xavier_uniform_(torch.empty(shape))


# ---- Published files ----

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 10**8  # bytes
ADVICE = "take the original file, such as flux-2-klein-base-4b.safetensors, not diffusers' or a quantised one"


def read_safetensors(path):
    """{name: tensor} of a .safetensors file. The tensors are mapped: memory is read when they are used."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{path.name} is cut or damaged in its header")
        header = json.loads(file.read(length))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)

    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{name} is {entry['dtype']}, must be one of {', '.join(TYPES)}")
        dtype = TYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        shape = torch.Size(entry["shape"])
        if start < 0 or end - start != shape.numel() * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{path.name} is cut or damaged at {name}")
        tensor = torch.frombuffer(content, dtype=dtype, count=shape.numel(), offset=8 + length + start)
        tensors[name] = tensor.view(shape)
    return tensors


def list_files(path):
    """The .safetensors files of a checkpoint: a file, or a folder of Black Forest Labs or of the paper's authors."""
    if path.is_file():
        return [path]
    config = path / "config.json"
    if config.exists() and "variant" in json.loads(config.read_bytes()):
        return [path / "model.safetensors"]  # of the authors; the other files are an autoencoder's
    for index in path.glob("*.safetensors.index.json"):
        return [path / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    files = list(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"holds {len(files)} .safetensors files without an index")
    return files


def read_config(weights):
    """The Flux2Config of published weights, from their shapes."""

    def count_blocks(prefix):
        return len({name.split(".")[1] for name in weights if name.startswith(f"{prefix}.")})

    width, num_values = weights["img_in.weight"].shape
    modalities = [replace(RGB, channels=num_values, stride=PATCH)]
    for m in MODALITIES.values():
        if f"{m.name}_in.weight" in weights:
            modalities.append(replace(m, decoder_depth=count_blocks(f"{m.name}_decoder_blocks")))
    return Flux2Config(
        width=width,
        depth=count_blocks("single_blocks"),
        double_depth=count_blocks("double_blocks"),
        head=len(weights["double_blocks.0.img_attn.norm.query_norm.scale"]),
        patch=PATCH,
        size=512,
        # New modalities get decoders as deep as these.
        decoder_depth=max((m.decoder_depth for m in modalities[1:]), default=DEPTH.decoder_depth),
        text_length=512,
        text_dim=weights["txt_in.weight"].shape[1],
        modalities=modalities,
    )


def read_checkpoint(path):
    """Published weights as a checkpoint of our training scripts. Raises ValueError if they are damaged or unknown."""
    weights = {}
    try:
        for file in list_files(Path(path)):
            for name, tensor in read_safetensors(file).items():
                weights[name.removeprefix("dit.")] = tensor
        config = asdict(read_config(weights))
    except Exception as error:  # a damaged header can fail in any way
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"cannot be read: {reason}; {ADVICE}") from None
    # The settings are shown if --backbone or --encoders do not fit.
    settings = {"backbone": "extras/flux2.py", "encoders": "extras/encoders.py:Klein:FOLDER"}
    return {"config": config, "settings": settings, "ema": weights}


Network = Flux2DiT  # what --backbone looks up, beside read_checkpoint
