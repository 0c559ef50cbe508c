"""FLUX.2 [klein] as the network of Modality Forcing (Sec. 4.3), and the frozen encoders that it was trained with.

    --backbone extras/flux2.py                             the network: --init and --checkpoint then take published weights
    --encoders extras/flux2.py:klein:FOLDER                its autoencoder and Qwen3, from a folder in diffusers' layout
    --encoders extras/flux2.py:umt5:VAE_FOLDER,UMT5_FOLDER the encoders of the paper's scaling study, for any network

Parameters have the names of the published files. The network is Black Forest Labs' text-to-image transformer with a stream
for each further modality, as in the authors' released model. docs/backbone.md has the commands.

Shapes: B batch, N tokens, n tokens of one stream, D width, E channels of a head. A stream is "txt", "img" (the first
modality), or the name of a modality.
"""

import itertools
import json
import math
import mmap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MODALITIES, RGB, Config, Network, mixed_precision, timestep_sinusoids, token_positions

PATCH = 16  # image pixels per token, per side; an image token is one latent of the autoencoder


# ---- Network ----


@dataclass(frozen=True)
class Flux2Config(Config):
    """Config.depth is the number of single blocks. A head has a quarter of its channels for each axis of the positions."""

    double_depth: int = 0  # number of double blocks

    def check_heads(self):
        if self.head % 8 or self.width % self.head:
            raise ValueError(f"head is {self.head}: must be a multiple of 8 that divides the width, {self.width}")

    def build(self):
        """A network without weights: warm_start gives it some."""
        with torch.device("meta"):
            return Flux2DiT(self)


def linear(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


class TimeEmbedder(nn.Module):
    """Noise level t (B,) in [0, 1] -> (B, D)."""

    def __init__(self, width):
        super().__init__()
        self.in_layer = linear(256, width)
        self.out_layer = linear(width, width)

    def forward(self, t):
        return self.out_layer(F.silu(self.in_layer(timestep_sinusoids(t))))


class Modulation(nn.Module):
    """Conditioning vector (B, D) -> count tensors (B, 1, D): shift, scale and gate, for two branches in double blocks."""

    def __init__(self, width, count):
        super().__init__()
        self.count = count
        self.lin = linear(width, count * width)

    def forward(self, vector):
        return self.lin(F.silu(vector))[:, None].float().chunk(self.count, -1)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Scale(nn.Module):
    """RMSNorm over a head, with a gain for each channel."""

    def __init__(self, head_dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * self.scale


class QueryKeyNorm(nn.Module):
    def __init__(self, head_dim):
        super().__init__()
        self.query_norm = Scale(head_dim)
        self.key_norm = Scale(head_dim)

    def forward(self, qkv, head_dim):
        """Split (B, n, 3 D) into q, k and v, each (B, n, heads, E); normalise q and k."""
        q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).unbind(2)
        return self.query_norm(q), self.key_norm(k), v


def rotary_angles(positions, head_dim):
    """Positions (N, 4) of (modality, row, column, text position) -> angles (N, E / 2), a quarter of them for each axis."""
    num_rates = head_dim // 8
    rates = 2000.0 ** -(torch.arange(num_rates, device=positions.device) / num_rates)
    return (positions[:, :, None] * rates).flatten(1)


def rotate_pairs(x, cos, sin):
    """Rotate the channel pairs (2i, 2i + 1) of x (B, N, heads, E): cos, sin (N, 1, E / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def attend(q, k, v, rope):
    """Attention over all tokens: (B, N, heads, E) each -> (B, N, D)."""
    q = rotate_pairs(q, *rope).to(v.dtype).transpose(1, 2)
    k = rotate_pairs(k, *rope).to(v.dtype).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    def forward(self, x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


class Attention(nn.Module):
    """The weights of one stream in the joint attention of a double block."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.qkv = linear(width, 3 * width)
        self.norm = QueryKeyNorm(head_dim)
        self.proj = linear(width, width)


class DoubleBlock(nn.Module):
    """Every stream has weights of its own. Attention is over all streams together."""

    def __init__(self, streams, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        for stream in streams:
            self.add_module(f"{stream}_attn", Attention(width, head_dim))
            mlp = nn.Sequential(linear(width, 6 * width), SwiGLU(), linear(3 * width, width))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(self, x, modulation, rope):
        """x {stream: (B, n, D)}, float32; modulation {stream: six tensors (B, 1, D)}; rope (cos, sin) of all tokens."""
        qkv = []
        for stream, tokens in x.items():
            shift, scale = modulation[stream][:2]
            attention = self.get_submodule(f"{stream}_attn")
            qkv.append(attention.norm(attention.qkv(modulate(tokens, shift, scale)), self.head_dim))
        q, k, v = (torch.cat(parts, 1) for parts in zip(*qkv, strict=True))  # (B, N, heads, E)
        attended = attend(q, k, v, rope).split([tokens.shape[1] for tokens in x.values()], 1)

        out = {}
        for (stream, tokens), stream_attended in zip(x.items(), attended, strict=True):
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation[stream]
            tokens = tokens + gate * self.get_submodule(f"{stream}_attn").proj(stream_attended)
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
        self.norm = QueryKeyNorm(head_dim)
        self.act = SwiGLU()
        self.linear2 = linear(4 * width, width)

    def forward(self, x, modulation, rope):
        """x (B, N, D), float32; modulation (shift, scale, gate), each (B, N, D) or (B, 1, D); rope (cos, sin)."""
        shift, scale, gate = modulation
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.split, -1)
        attended = attend(*self.norm(qkv, self.head_dim), rope)
        return x + gate * self.linear2(torch.cat([attended, self.act(mlp)], -1))


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


PARTS = {  # published names of the parts of a stream: the image's, and those of another modality
    "input": ("img_in", "{}_in"),
    "time": ("time_in", "time_in_{}"),
    "double": ("double_stream_modulation_img", "double_stream_modulation_{}"),
    "single": ("single_stream_modulation", "single_stream_modulation_{}"),
    "decoder_blocks": ("img_decoder_blocks", "{}_decoder_blocks"),
    "decoder_modulation": ("img_decoder_modulation", "{}_decoder_modulation"),
    "final": ("final_layer", "{}_final_layer"),
}


def part_name(part, stream):
    of_image, of_others = PARTS[part]
    return of_image if stream == "img" else of_others.format(stream)


def mixing_names(source, target):
    """Names of the timestep embedder from one stream to another, and of its scalar. Published are those of two streams."""
    embedder = f"time_in_{source}_to_{target}".replace("img_to", "rgb_to")
    if {source, target} == {"img", "depth"}:
        return embedder, f"cross_alpha_{target}"
    return embedder, embedder.replace("time_in", "cross_alpha")


class Flux2DiT(Network):
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
        self.double_stream_modulation_txt = Modulation(width, 6)
        for m in self.modalities:
            num_values = m.channels * (PATCH // m.stride) ** 2
            parts = {
                "input": linear(num_values, width),
                "time": TimeEmbedder(width),
                "double": Modulation(width, 6),
                "single": Modulation(width, 3),
                "final": FinalLayer(width, num_values),
            }
            if m.decoder_depth:
                parts["decoder_blocks"] = nn.ModuleList(SingleBlock(width, config.head) for _ in range(m.decoder_depth))
                parts["decoder_modulation"] = Modulation(width, 3)
            for part, module in parts.items():
                self.add_module(part_name(part, self.streams[m.name]), module)

        for source, target in itertools.permutations(self.streams.values(), 2):
            embedder, alpha = mixing_names(source, target)
            self.add_module(embedder, TimeEmbedder(width))
            self.register_parameter(alpha, nn.Parameter(torch.zeros(1)))

        streams = ["txt", *self.streams.values()]
        self.double_blocks = nn.ModuleList(DoubleBlock(streams, width, config.head) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(SingleBlock(width, config.head) for _ in range(config.depth))

    def part(self, part, stream):
        return self.get_submodule(part_name(part, stream))

    @mixed_precision
    def forward(self, noisy, t, text):
        """Predict the clean values of any subset of the modalities: x0_hat = g(x_t, t, text) of Sec. 3.1.

        noisy and the result are {m: (B, C, H, W)}: latents of the image, pixels of the others. t {m: (B,)} is in
        [0, 1]; text is (B, L, text_dim).
        """
        inputs = {self.streams[m.name]: m for m in self.modalities if m.name in noisy}
        first = next(iter(inputs))  # its vector also modulates the text
        vectors = self.conditioning_vectors({stream: t[m.name] for stream, m in inputs.items()})  # {stream: (B, D)}

        # Tokens, their positions, and their modulation in double blocks.
        x = {"txt": self.txt_in(text).float()}  # {stream: (B, n, D)}
        positions = [F.pad(torch.arange(text.shape[1], device=text.device)[:, None], (3, 0))]  # (n, 4) each
        modulation = {"txt": self.double_stream_modulation_txt(vectors[first])}
        grids = {}
        for stream, m in inputs.items():
            patches = F.pixel_unshuffle(noisy[m.name], PATCH // m.stride)  # (B, C * patch^2, rows, columns)
            grids[stream] = patches.shape[2:]
            x[stream] = self.part("input", stream)(patches.flatten(2).transpose(1, 2)).float()
            positions.append(token_positions(m.id, *grids[stream], text.device))
            modulation[stream] = self.part("double", stream)(vectors[stream])
        angles = rotary_angles(torch.cat(positions), self.config.head)[:, None]  # (N, 1, E / 2)
        rope = (angles.cos(), angles.sin())
        lengths = [tokens.shape[1] for tokens in x.values()]

        for block in self.double_blocks:
            x = block(x, modulation, rope)

        # In single blocks, the text has the modulation of the first modality.
        by_stream = [self.part("single", stream)(vectors[stream]) for stream in [first, *inputs]]
        expanded = [
            [tensor.expand(-1, length, -1) for tensor in tensors]
            for tensors, length in zip(by_stream, lengths, strict=True)
        ]
        modulation = [torch.cat(parts, 1) for parts in zip(*expanded, strict=True)]  # three of (B, N, D)
        x = torch.cat(list(x.values()), 1)  # (B, N, D)
        for block in self.single_blocks:
            x = block(x, modulation, rope)

        # Each modality's tokens go back to values. The text's tokens, which come first, are left out.
        x0_hat = {}
        parts = zip(inputs.items(), x.split(lengths, 1)[1:], angles.split(lengths)[1:], strict=True)
        for (stream, m), tokens, m_angles in parts:
            values = self.decode(stream, tokens, vectors[stream], (m_angles.cos(), m_angles.sin()))
            values = values.transpose(1, 2).unflatten(2, grids[stream])  # (B, C * patch^2, rows, columns)
            values = F.pixel_shuffle(values, PATCH // m.stride)  # (B, C, H, W)
            if stream == "img":  # the pretrained head predicts the velocity u = noise - x0
                values = noisy[m.name] - t[m.name].view(-1, 1, 1, 1) * values
            x0_hat[m.name] = values
        return x0_hat

    def conditioning_vectors(self, t):
        """Noise levels {stream: (B,)} -> {stream: (B, D)}, to which the other streams' levels add a learned share."""
        vectors = {}
        for stream in t:
            vector = self.part("time", stream)(t[stream])
            for other in t.keys() - {stream}:
                embedder, alpha = mixing_names(other, stream)
                vector = vector + self.get_parameter(alpha) * self.get_submodule(embedder)(t[other])
            vectors[stream] = vector
        return vectors

    def decode(self, stream, x, vector, rope):
        """Tokens (B, n, D) of one stream -> values (B, n, C * patch^2)."""
        if part_name("decoder_blocks", stream) in self._modules:
            modulation = self.part("decoder_modulation", stream)(vector)
            x = x.contiguous()  # so that all single blocks share a compiled graph
            for block in self.part("decoder_blocks", stream):
                x = block(x, modulation, rope)
        return self.part("final", stream)(x, vector)

    def copies(self, m):
        copies = {}
        for name in self.state_dict():
            for pattern in ("{}_attn.", "{}_mlp."):
                if pattern.format(f".{m.name}") in name:
                    copies[name] = name.replace(f".{m.name}_", ".img_")
        for part in ("double", "single"):
            copies[f"{part_name(part, m.name)}.lin.weight"] = f"{part_name(part, 'img')}.lin.weight"
        return copies

    def warm_start(self, weights):
        super().warm_start(weights)
        fresh = {name: fresh_value(name, p.shape) for name, p in self.named_parameters() if p.is_meta}
        self.load_state_dict(fresh, strict=False, assign=True)


def fresh_value(name, shape):
    """Random weights; but ones for gains, and zeros for mixing, the decoder's modulation and the final layer."""
    if name.endswith(".scale"):
        return torch.ones(shape)
    if "cross_alpha" in name or "_decoder_modulation" in name or "_final_layer" in name:
        return torch.zeros(shape)
    return nn.init.xavier_uniform_(torch.empty(shape))


# ---- Published files ----

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file. The tensors are mapped: memory is read when they are used."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{path.name} is cut, or not a .safetensors file")
        header = json.loads(file.read(length))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)

    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{name} is {entry['dtype']}; take weights in {', '.join(TYPES)}, not quantised ones")
        dtype = TYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        count = math.prod(entry["shape"])
        if start < 0 or end - start != count * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f"{path.name} is cut or damaged at {name}")
        tensor = torch.frombuffer(content, dtype=dtype, count=count, offset=8 + length + start)
        tensors[name] = tensor.view(entry["shape"])
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
        raise ValueError(f"must hold config.json and model.safetensors, or one .safetensors file, not {len(files)}")
    return files


def read_config(weights):
    """The Flux2Config of published weights, from their shapes."""
    if any(name.startswith("transformer_blocks.") for name in weights):
        raise ValueError("has the names of diffusers; take the original file, such as flux-2-klein-base-4b.safetensors")

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
        text_length=512,
        text_dim=weights["txt_in.weight"].shape[1],
        modalities=modalities,
    )


def read_checkpoint(path):
    """Published weights as a checkpoint of our training scripts. Raises ValueError if they are damaged or unsuitable."""
    weights = {}
    try:
        for file in list_files(Path(path)):
            for name, tensor in read_safetensors(file).items():
                weights[name.removeprefix("dit.")] = tensor
        config = asdict(read_config(weights))
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"is damaged: {error}") from None
    return {"config": config, "settings": {"encoders": "extras/flux2.py:klein:FOLDER"}, "ema": weights}


# ---- Frozen encoders ----
# They need the packages diffusers and transformers, and folders on the disk.


class Flux2Autoencoder:
    """The images of FLUX.2: 2 x 2 latents of its autoencoder become one, normalised by its channel statistics."""

    def __init__(self, device, folder):
        from diffusers import AutoencoderKLFlux2

        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options = {"torch_dtype": self.dtype, "local_files_only": True}
        self.vae = AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae", **options).to(device)
        statistics = self.vae.bn  # the layer never runs: it only stores the mean and variance of each channel
        self.mean = statistics.running_mean.float().view(-1, 1, 1)
        self.std = (statistics.running_var.float() + statistics.eps).sqrt().view(-1, 1, 1)
        self.image_channels = statistics.num_features
        self.image_stride = 2 * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_image(self, rgb):
        latents = self.vae.encode(rgb.to(self.dtype)).latent_dist.mode().float()
        return (F.pixel_unshuffle(latents, 2) - self.mean) / self.std

    @torch.no_grad()
    def decode_image(self, latents):
        latents = F.pixel_shuffle(latents * self.std + self.mean, 2)
        return self.vae.decode(latents.to(self.dtype)).sample.float().clamp(-1, 1)


class klein(Flux2Autoencoder):  # noqa: N801  its name is that of the flag
    """With Qwen3: hidden layers 9, 18 and 27 of a caption in its chat template. folder: a published FLUX.2 [klein]."""

    text_length = 512
