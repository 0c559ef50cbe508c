"""Modality Forcing (arXiv 2606.13676): the mathematics, the network and the sampler.

One diffusion transformer learns p(image, depth | text). Every modality has its own noise level t. At t = 0 a modality
is clean, so it conditions the others. At t = 1 it is pure noise, so it is generated. Between the two it is a hint that
is partly trusted. No code below asks which modality it is looking at: a modality is an entry in a list, and every loop
runs over the entries.

The file reads from top to bottom: flow matching, noise levels in training, noise levels in sampling, depth as pixels,
modalities, network, sampler, optimizers, cost.

References:
  Modality Forcing               https://arxiv.org/abs/2606.13676   sections and equations cited below
  x-prediction on pixels (JiT)   https://arxiv.org/abs/2511.13720
  DiT, adaLN-zero                https://arxiv.org/abs/2212.09748
  mip-NeRF 360 contraction       https://arxiv.org/abs/2111.12077

Shapes: B batch, C channels, H W image, N tokens, D width, L bytes of text. Dictionaries are keyed by modality name.
"""

import contextlib
import functools
import itertools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ---- Flow matching (Sec. 3.1, Eq. 5-7) ----
# A clean sample x0 is mixed with noise; the network predicts x0 from the mixture.

T_MIN = 0.05  # the loss divides by max(t, T_MIN), as the released code does


def per_sample(t):
    """Reshape t (B,) to (B, 1, 1, 1), so that it scales images."""
    return t.view(-1, 1, 1, 1)


def corrupt(x0, noise, t, valid=None):
    """Interpolate between clean values and noise: x_t = (1 - t) x0 + t noise (Eq. 5).

    A missing pixel is noise alone, whatever t is (Sec. 3.2). The network gets no mask: it must recognise noise. Values
    that x0 stores in missing pixels, NaN included, never reach the result.

    Args: x0, noise (B, C, H, W); t (B,) in [0, 1]; valid (B, 1, H, W) bool, or None if every pixel is known.
    Returns (B, C, H, W).
    """
    x_t = torch.lerp(x0, noise, per_sample(t))
    if valid is None:
        return x_t
    return torch.where(valid, x_t, noise)


def loss_mask(x0, t, valid=None):
    """Which values the loss is taken on, (B, C, H, W) bool.

    Missing pixels carry no loss, nor does a sample whose modality is held clean (t = 0). Arguments as in corrupt.
    """
    noised = per_sample(t > 0)
    if valid is None:
        return noised.expand_as(x0)
    return (valid & noised).expand_as(x0)


def squared_error(x0_hat, x0, mask):
    """Sum of (x0_hat - x0)^2 over the values of each sample where mask is True: (B, C, H, W) each -> (B,)."""
    difference = torch.where(mask, x0_hat.float() - x0, 0.0)
    return difference.square().sum((1, 2, 3))


def velocity_weight(t):
    """Weight that turns an error of x0 into an error of the velocity: 1 / max(t, T_MIN)^2, (B,) -> (B,).

    Eq. 7 compares velocities, || (x0_hat - x_t) / t - (x0 - noise) ||^2, which equals || x0_hat - x0 ||^2 / t^2.
    """
    return 1 / t.clamp(min=T_MIN) ** 2


LOSS_WEIGHTS = {"velocity": velocity_weight, "x0": torch.ones_like}  # Modality.loss chooses one


def distillation_weight(t, low, high):
    """Weight of Eq. 8, high * t + low * (1 - t): strongest where the teacher misses nothing.

    t (B,) is the noise level of the modalities that the teacher does not see.
    """
    return low + (high - low) * t


def split_by_mode(name, values, t):
    """Sum the values of one modality over the samples of each training mode, to log them apart.

    Args: name of the modality; values (..., B); t {m: (B,)}.
    Returns {suffix: (...)}: "" has all samples, "_given_<other>" those in which <other> is held clean, and "_joint"
    those in which no other modality is. The last two exist only if t has other modalities.
    """
    others_clean = {other: t[other] == 0 for other in t if other != name}
    modes = {"": torch.ones_like(t[name], dtype=torch.bool)}
    for other, clean in others_clean.items():
        modes[f"_given_{other}"] = clean
    if others_clean:
        modes["_joint"] = ~torch.stack(list(others_clean.values())).any(0)
    return {suffix: torch.where(mode, values, 0.0).sum(-1) for suffix, mode in modes.items()}


# ---- Noise levels in training (Sec. 3.2) ----
# Every modality draws its own t from its own distribution; sometimes one is held clean.

MU = 1.1  # shift of both distributions and of the sampling grid
SIGMA = 1.0  # spread of both


def logit_normal(u):
    """Quantile function of the shifted logit-normal: u in (0, 1) -> t = sigmoid(MU + SIGMA * PhiInv(u)), any shape."""
    return torch.sigmoid(MU + SIGMA * math.sqrt(2) * torch.erfinv(2 * u - 1))


@functools.cache
def plateau_constants():
    """Four floats of the logit-normal: its mode, the mass below the mode, the density at the mode, and the norm of the
    distribution that keeps this density from the mode up to t = 1.
    """
    low = 0.0
    high = 1.0
    for _ in range(60):  # bisection: the mode solves logit(t) - MU = SIGMA^2 (2 t - 1)
        mode = (low + high) / 2
        z = (math.log(mode / (1 - mode)) - MU) / SIGMA
        if z < SIGMA * (2 * mode - 1):
            low = mode
        else:
            high = mode

    mass = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    density = math.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * SIGMA * mode * (1 - mode))
    return mode, mass, density, mass + (1 - mode) * density


def plateau_logit_normal(u):
    """Quantile function of the logit-normal that keeps its mode's density up to t = 1: u in (0, 1) -> t, any shape."""
    mode, mass, density, norm = plateau_constants()
    u = u * norm
    on_plateau = mode + (u - mass) / density
    return torch.where(u < mass, logit_normal(u.clamp(max=mass)), on_plateau)


TIMESTEPS = {"logit-normal": logit_normal, "plateau": plateau_logit_normal}  # Modality.timesteps chooses one


def draw_noise_levels(modalities, rand, present=None, subsets=False):
    """Draw a noise level for each sample and modality: the training modes of Sec. 3.2.

    With probability m.p_clean modality m is held at t = 0. Otherwise, and for all other modalities, t is drawn from
    m.timesteps, independently. A sample never holds everything clean that it has, because it would teach nothing.

    Args:
        modalities: list of Modality.
        rand: function without arguments that draws (B,) from U(0, 1).
        present: {m: (B,) bool}, the samples in which the modality has a valid pixel. By default all have. Where it has
            none it is pure noise, t = 1.
        subsets: hold each modality clean independently, so that any number may be. By default at most one is.
    Returns {m: (B,)}.
    """
    choice = rand()
    everywhere = torch.ones_like(choice, dtype=torch.bool)
    present = {m.name: (present or {}).get(m.name, everywhere) for m in modalities}

    if subsets:
        clean = {m.name: rand() < m.p_clean for m in modalities}
    else:
        bounds = list(itertools.accumulate(m.p_clean for m in modalities))
        clean_index = torch.bucketize(choice, torch.tensor(bounds, device=choice.device), right=True)
        clean = {m.name: clean_index == i for i, m in enumerate(modalities)}
    teaches = torch.stack([present[m.name] & ~clean[m.name] for m in modalities]).any(0)

    t = {}
    for m in modalities:
        drawn = TIMESTEPS[m.timesteps](rand().clamp(1e-6, 1 - 1e-6))
        drawn = torch.where(clean[m.name] & teaches, 0.0, drawn)
        t[m.name] = torch.where(present[m.name], drawn, 1.0)
    return t


# ---- Noise levels in sampling (Sec. 4.2) ----
# A schedule is a table {m: noise levels of all steps}. The table is the task; no other code knows what the task is.

JOINT = 5.0  # log2(alpha) of the released joint trajectory: depth resolves long after the image
I2D_STEPS = 2  # depth from an image: more steps change little (RESULTS.md)


def sampling_grid(steps):
    """steps + 1 noise levels from 1 to 0, float64: linear t through t' = e^MU / (e^MU + (1/t - 1)^SIGMA) (Sec. 3.2)."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 1 / (1 + (1 / t - 1) ** SIGMA / math.exp(MU))


def warp(t, log2_alpha):
    """Trajectory of Sec. 4.2, alpha t / (1 + (alpha - 1) t): with log2_alpha > 0 it stays behind t. t in [0, 1]."""
    return t / (t + (1 - t) * 2.0**-log2_alpha)


def make_schedule(names, steps, order=JOINT, strength=None):
    """The table of noise levels that DiT.sample follows: {m: (S + 1,) float64} for the modalities called names.

    Args:
        steps: number of sampling steps; for a list of names, the number for each of them.
        order: log2(alpha), by which all generated modalities follow the first of names, if that is generated, too.
            Or a list of names, which are generated one after the other; a name that is not listed stays noise.
        strength: {m: 0 to 1} of the modalities that you give. 1 is clean and 0 is ignored. Between them a row is
            warped by log2(alpha) = 2 log2((1 - strength) / strength): the paper's -5 is 0.85, and its -14 is 0.992.
    """
    strength = strength or {}
    generated = [name for name in names if name not in strength]
    if isinstance(order, list):
        schedule = sequential_schedule(generated, steps, order)
        turns = [name for name in order if name in generated]
        lead = schedule[turns[0]] if turns else sampling_grid(steps)
    else:
        lead = sampling_grid(steps)
        schedule = {}
        for name in generated:
            follows = name != names[0] and names[0] in generated
            schedule[name] = warp(lead, order if follows else 0.0)

    for name, trust in strength.items():
        if 0 < trust < 1:
            schedule[name] = warp(lead, 2 * math.log2((1 - trust) / trust))
        else:
            schedule[name] = (lead > 0).double() * (1 - trust)
    return schedule


def sequential_schedule(generated, steps, order):
    """make_schedule for modalities that are generated one after the other: before its turn a row is 1, after it 0."""
    turns = [name for name in order if name in generated]
    length = max(1, len(turns)) * steps + 1
    schedule = {name: torch.ones(length, dtype=torch.float64) for name in generated}
    for i, name in enumerate(turns):
        start = i * steps
        schedule[name][start : start + steps + 1] = sampling_grid(steps)
        schedule[name][start + steps + 1 :] = 0.0
    return schedule


# ---- Depth as pixels (Sec. 3.2) ----
# Depth is normalised and contracted, never encoded, so that a loss can be taken on single pixels.


def contract(z):
    """mip-NeRF 360 contraction of z >= 0 into [0, 2): z up to 1, then 2 - 1/z."""
    return torch.where(z <= 1, z, 2 - 1 / z.clamp(min=1))


def uncontract(d):
    """Inverse of contract: [0, 2) -> [0, inf). Predictions outside of [0, 1.999] are clamped to it."""
    d = d.clamp(0, 1.999)
    return torch.where(d <= 1, d, 1 / (2 - d.clamp(min=1)))


def normalize_depth(depth, valid):
    """Divide depth by the mean of its valid pixels and contract it. The scale is lost: depth is relative from here on.

    Args: depth (B, 1, H, W) in any unit; valid (B, 1, H, W) bool, or None if every pixel is known.
    Returns (B, 1, H, W) in [0, 2), 0 where a pixel is missing.
    """
    if valid is None:
        valid = torch.ones_like(depth, dtype=torch.bool)
    depth = torch.where(valid, depth, 0.0)
    count = valid.sum((1, 2, 3), keepdim=True).clamp(min=1)
    mean = depth.sum((1, 2, 3), keepdim=True) / count
    return contract(depth / mean.clamp(min=1e-12))


def complete_depth(relative, depth, valid):
    """Correct predicted depth so that it equals the measured depth, in its unit. All arguments (B, 1, H, W).

    The logarithm of the prediction's error is known on valid pixels. Simple kriging interpolates it to the others, with
    a correlation that falls off as exp(-distance). Distance is over a pixel's position (the longer side is 2) and twice
    its predicted log depth, so that a correction stays on its surface.
    """
    height, width = depth.shape[2:]
    rows = torch.arange(height, device=depth.device)
    columns = torch.arange(width, device=depth.device)
    positions = torch.cartesian_prod(rows, columns) * (2 / max(height, width))  # (H * W, 2)

    completed = []
    for prediction, measured, known in zip(relative.clamp(min=1e-3), depth, valid, strict=True):
        if known.any() and not known.all():
            features = torch.cat([positions, 2 * prediction.log().view(-1, 1)], 1)  # (H * W, 3)
            error = interpolate_error((measured / prediction).log().flatten(), known.flatten(), features)
            prediction = prediction * error.exp().view_as(prediction)
        completed.append(torch.where(known, measured, prediction))
    return torch.stack(completed)


def interpolate_error(error, known, features, most=1024):
    """Simple kriging of error (P,) from at most so many of the known (P,) pixels to all; features (P, F). -> (P,)"""
    known_index = known.nonzero()[:, 0]
    spread = torch.linspace(0, len(known_index) - 1, min(len(known_index), most), device=error.device)
    known_index = known_index[spread.long()]
    anchors = features[known_index]
    anchor_error = error[known_index]

    mean = anchor_error.median()
    nugget = 1e-3 * torch.eye(len(anchors), device=error.device)  # keeps the system solvable where pixels coincide
    covariance = torch.exp(-torch.cdist(anchors, anchors)) + nugget
    weights = torch.linalg.solve(covariance, anchor_error - mean)
    parts = [torch.exp(-torch.cdist(part, anchors)) @ weights for part in features.split(1 << 14)]
    return mean + torch.cat(parts)


# ---- Modalities ----
# An entry says everything that the network, the losses and the sampler need to know of a modality.


@dataclass(frozen=True)
class Encoding:
    """How the stored values of a modality become the values that are diffused, and back. Shapes (B, C, H, W) stay."""

    encode: Callable  # (stored values, valid or None) -> values that are diffused
    decode: Callable  # its inverse; what encode discards, such as the scale of depth, stays lost
    finish: Callable  # repairs decoded values after a median or a resize has mixed them


def keep_values(x, valid=None):
    return x


def clamp_image(x):
    return x.clamp(-1, 1)


def unit_length(x):
    return F.normalize(x, dim=1)


ENCODINGS = {
    "plain": Encoding(keep_values, keep_values, clamp_image),  # values in [-1, 1], such as images
    "relative depth": Encoding(normalize_depth, uncontract, keep_values),
    "unit vectors": Encoding(keep_values, keep_values, unit_length),
}


def check_numbers(entry, **ranges):
    """Raise ValueError unless the attributes of entry named in ranges are whole numbers within their (low, high)."""
    for name, (low, high) in ranges.items():
        value = getattr(entry, name)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, must be a whole number from {low} to {high}")


@dataclass(frozen=True)
class Modality:
    """One entry of the list that the network, the losses and the sampler loop over."""

    name: str
    channels: int
    id: int  # first coordinate of its tokens' rotary positions: a trained network is tied to it, so never renumber
    stride: int = 1  # image pixels per value, per side: 1 for pixels, more for the latents of a frozen encoder
    decoder_depth: int = 0  # self-attention blocks over its tokens alone, before its final layer (Sec. 3.2)
    timesteps: str = "logit-normal"  # key of TIMESTEPS: the distribution of its training noise levels
    p_clean: float = 0.2  # probability that a training sample holds it clean, as a condition of the others
    encoding: str = "plain"  # key of ENCODINGS, and of the tables by which other files read, paint and score it
    loss: str = "velocity"  # key of LOSS_WEIGHTS
    weight: float = 1.0  # of its loss in the sum over modalities

    def __post_init__(self):
        """Raises ValueError for an entry that makes no sense; a checkpoint may bring one."""
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"modality {self.name!r}: its name must be an identifier")
        check_numbers(self, channels=(1, 4096), id=(0, 255), stride=(1, 256), decoder_depth=(0, 128))
        for field, table in (("timesteps", TIMESTEPS), ("encoding", ENCODINGS), ("loss", LOSS_WEIGHTS)):
            key = getattr(self, field)
            if not isinstance(key, str) or key not in table:
                raise ValueError(f"modality {self.name}: {field} is {key!r}, must be one of {', '.join(table)}")
        for field, high in (("p_clean", 1), ("weight", 1e6)):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not 0 <= value <= high:
                raise ValueError(f"modality {self.name}: {field} is {value!r}, must be a number from 0 to {high:g}")

    def shape(self, size):
        """Image size (H, W) in pixels -> (C, h, w) of this modality's values."""
        return self.channels, size[0] // self.stride, size[1] // self.stride

    def loss_weight(self, t):
        """Weight of this modality's squared_error at noise level t, (B,) -> (B,)."""
        return self.weight * LOSS_WEIGHTS[self.loss](t)

    def encode(self, x, valid=None):
        """Stored values (B, C, H, W), valid (B, 1, H, W) bool or None -> the values that are diffused."""
        return ENCODINGS[self.encoding].encode(x, valid)

    def decode(self, x0):
        """Inverse of encode; depth comes back relative to the mean of its map."""
        return ENCODINGS[self.encoding].decode(x0)

    def finish(self, x):
        """Decoded values (B, C, H, W) after a median or a resize -> values as they are stored."""
        return ENCODINGS[self.encoding].finish(x)


RGB = Modality("rgb", channels=3, id=0)
DEPTH = Modality("depth", channels=1, id=1, decoder_depth=4, timesteps="plateau", encoding="relative depth")
NORMAL = Modality("normal", channels=3, id=2, decoder_depth=4, timesteps="plateau", encoding="unit vectors")
MODALITIES = {m.name: m for m in (RGB, DEPTH, NORMAL)}


# ---- Network (Sec. 4.1) ----
# A flat-token DiT: one sequence [text | first modality | second modality | ...], one stack of blocks for all of it.

TEXT_PATCH = 8  # bytes in a text token: a caption is patchified as an image is


@dataclass(frozen=True)
class Config:
    """Everything needed to build a network; checkpoints hold one."""

    width: int
    depth: int  # blocks of the trunk
    head: int  # channels of an attention head: width / head query heads, a quarter as many key/value heads
    patch: int  # side of a token in image pixels: all modalities cover the image with the same grid of tokens
    size: int  # default side of the images; any height and width that the patch divides works at call time
    decoder_depth: int = 4  # the most decoder blocks that an entry gets by with_modalities
    text_length: int = 160  # bytes of a caption, TEXT_PATCH to a token; or, with text_dim, embeddings
    text_dim: int = 0  # channels of a frozen encoder's text embeddings; 0 is bytes
    modalities: tuple = (RGB,)  # the first is the image: its noise level modulates text, encoders replace its values

    def __post_init__(self):
        """Raises ValueError or TypeError for a config of which no network can be built; a checkpoint may bring one."""
        entries = list(self.modalities)
        for i, entry in enumerate(entries):
            if not isinstance(entry, Modality):
                entries[i] = Modality(**{"id": i, **entry})  # checkpoints of earlier versions have no ids
        object.__setattr__(self, "modalities", tuple(entries))

        check_numbers(self, width=(1, 1 << 16), depth=(0, 1024), head=(1, 1024), patch=(1, 1024), size=(1, 1 << 16))
        check_numbers(self, decoder_depth=(0, 128), text_length=(1, 1 << 16), text_dim=(0, 1 << 16))
        if self.head % 16 or self.width % (4 * self.head):
            raise ValueError(
                f"head is {self.head}, must be a multiple of 16, and width of 4 x head: it is {self.width}"
            )
        names = {m.name for m in self.modalities}
        ids = {m.id for m in self.modalities}
        if not 0 < len(names) == len(ids) == len(self.modalities) <= 8:
            raise ValueError("modalities must be 1 to 8, with different names and ids")
        for m in self.modalities:
            if self.patch % m.stride:
                raise ValueError(f"patch is {self.patch}, must be a multiple of the stride of {m.name}, {m.stride}")

    def with_modalities(self, *entries):
        """This network over the given entries; their decoders are at most as deep as decoder_depth."""
        entries = [replace(m, decoder_depth=min(m.decoder_depth, self.decoder_depth)) for m in entries]
        return replace(self, modalities=tuple(entries))

    def with_encoders(self, encoders):
        """This network with its image in the latents of frozen encoders and with their text embeddings.

        encoders has the attributes that data.PixelsAndBytes lists. The patch becomes a multiple of their stride, so
        that the token grids of all modalities coincide.
        """
        stride = encoders.image_stride
        image = replace(self.modalities[0], channels=encoders.image_channels, stride=stride)
        return replace(
            self,
            patch=max(1, self.patch // stride) * stride,
            modalities=(image, *self.modalities[1:]),
            text_dim=encoders.text_dim,
            text_length=encoders.text_length,
        )

    def fit(self, height, width, side):
        """The size (H, W) that keeps the aspect, is near side x side pixels in area, and is a multiple of the patch."""
        scale = side / (height * width) ** 0.5 / self.patch
        return tuple(max(1, round(n * scale)) * self.patch for n in (height, width))


PRESETS = {  # as text-to-image networks; with_modalities adds to them
    "nano": Config(width=128, depth=6, head=32, patch=4, size=32, decoder_depth=1),
    "tiny": Config(width=256, depth=10, head=64, patch=4, size=64, decoder_depth=2),
    "small": Config(width=512, depth=14, head=64, patch=8, size=128, decoder_depth=2, text_length=256),
    "370m": Config(width=1024, depth=30, head=64, patch=16, size=256, text_length=512),
    "800m": Config(width=1536, depth=30, head=64, patch=16, size=256, text_length=512),
    "3b": Config(width=3072, depth=30, head=128, patch=16, size=256, text_length=512),
}


class TimestepEmbedder(nn.Module):
    """Noise level t (B,) in [0, 1] -> (B, D), through sinusoids of 1000 t."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = 1000 * t.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def token_ids(modality_id, rows, columns, device=None):
    """Rotary positions of the tokens of an image, (rows * columns, 4): (modality id, row, column, 0)."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return F.pad(F.pad(grid, (1, 0), value=modality_id), (0, 1))


def rope_angles(ids, head):
    """Multi-axis RoPE: ids (N, 4) of (modality, row, column, text position) -> angles (N, head / 2).

    Rows and columns get three eighths of the channels each, modality and text position one eighth.
    """
    angles = []
    for axis, eighths in enumerate((1, 3, 3, 1)):
        count = head * eighths // 16
        rates = 100.0 ** -(torch.arange(count, device=ids.device) / count)
        angles.append(ids[:, axis, None] * rates)
    return torch.cat(angles, -1)


def rotate(x, cos, sin):
    """Rotate channel pairs (i, i + head / 2) of x (B, N, heads, head) by angles: cos, sin (N, 1, head / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def mixed_precision(device):
    """A context in which linear layers and attention run in bfloat16 on CUDA. On other devices it changes nothing."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


class Block(nn.Module):
    """Attention and SwiGLU in parallel on one normalised input, RMSNorm before and after, modulation from outside.

    The residual stream, norms and modulation are float32; linear layers, attention and SwiGLU follow autocast.
    """

    def __init__(self, width, head):
        super().__init__()
        self.head = head
        self.query_heads = width // head
        self.key_heads = width // head // 4  # grouped-query attention
        qk_width = (self.query_heads + self.key_heads) * head
        self.split = [qk_width, self.key_heads * head, 3 * width, 3 * width]  # q and k, v, gate, up
        self.pre_norm = nn.RMSNorm(width, eps=1e-6)
        self.fused_in = nn.Linear(width, sum(self.split), bias=False)
        self.qk_scale = nn.Parameter(torch.ones(self.query_heads + self.key_heads, head))
        self.fused_out = nn.Linear(4 * width, width, bias=False)
        self.post_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x, modulation, rope):
        """x (B, N, D); modulation (shift, scale, gate), each (B, N, D) or (B, 1, D); rope (cos, sin). -> (B, N, D).

        All are float32 and x is contiguous, so that torch.compile reuses the first block's graph for the others.
        """
        shift, scale, gate = modulation
        h = torch.addcmul(shift, self.pre_norm(x), 1 + scale)  # (B, N, D)
        qk, v, ffn_gate, ffn_up = self.fused_in(h).split(self.split, -1)

        qk = qk.unflatten(-1, (-1, self.head))  # (B, N, heads, head)
        v = v.unflatten(-1, (-1, self.head))
        qk = F.rms_norm(qk.float(), (self.head,)) * self.qk_scale
        qk = rotate(qk, *rope).to(v.dtype)
        q, k = qk.split([self.query_heads, self.key_heads], 2)
        attention = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
        )  # (B, heads, N, head)
        attention = attention.transpose(1, 2).flatten(2)  # (B, N, D)

        ffn = F.silu(ffn_gate) * ffn_up  # (B, N, 3 D)
        out = self.fused_out(torch.cat([attention, ffn], -1))
        return torch.addcmul(x, gate, self.post_norm(out.float()))


class Decoder(nn.Module):
    """Tokens of one modality -> its values: self-attention blocks (the paper's detokenizer), then an adaLN linear."""

    def __init__(self, config, modality):
        super().__init__()
        width = config.width
        self.blocks = nn.ModuleList(Block(width, config.head) for _ in range(modality.decoder_depth))
        if self.blocks:
            self.block_modulation = nn.Linear(width, 3 * width, bias=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, modality.channels * (config.patch // modality.stride) ** 2)

    def forward(self, x, vector, rope):
        """x (B, n, D), conditioning vector (B, D), rope (cos, sin) of these tokens -> (B, n, channels * patch^2)."""
        vector = F.silu(vector)[:, None]  # (B, 1, D)
        if self.blocks:
            modulation = self.block_modulation(vector).float().chunk(3, -1)
            x = x.clone(memory_format=torch.contiguous_format)  # a slice of the whole sequence is not contiguous
            for block in self.blocks:
                x = block(x, modulation, rope)
        shift, scale = self.modulation(vector).chunk(2, -1)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # bfloat16 here shows as bands
            x = F.rms_norm(x.float(), x.shape[-1:]) * (1 + scale.float()) + shift.float()
            return self.head(x)


class DiT(nn.Module):
    """Flat-token diffusion transformer over text and any number of modalities."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.modalities = config.modalities
        width = config.width
        names = [m.name for m in self.modalities]
        values_per_token = {m.name: m.channels * (config.patch // m.stride) ** 2 for m in self.modalities}
        pairs = list(itertools.permutations(names, 2))

        if not config.text_dim and config.text_length % TEXT_PATCH:
            raise ValueError(f"text_length is {config.text_length}, must be a multiple of {TEXT_PATCH} bytes")
        self.text_bytes = None if config.text_dim else nn.Embedding(256, 32)
        self.text_tokenizer = nn.Linear(config.text_dim or 32 * TEXT_PATCH, width)
        self.tokenizers = nn.ModuleDict({name: nn.Linear(values_per_token[name], width) for name in names})
        self.time_embedders = nn.ModuleDict({name: TimestepEmbedder(width) for name in names})
        self.cross_time_embedders = nn.ModuleDict({f"{a}_to_{b}": TimestepEmbedder(width) for a, b in pairs})
        self.modulations = nn.ModuleDict({name: nn.Linear(width, 3 * width, bias=False) for name in names})
        self.blocks = nn.ModuleList(Block(width, config.head) for _ in range(config.depth))
        self.decoders = nn.ModuleDict({m.name: Decoder(config, m) for m in self.modalities})
        self.initialize()

    def initialize(self):
        """Xavier everywhere, and zeros where a part must begin as no change: gates, adaLN, mixing, and final layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        silent = list(self.modulations.values())
        silent += [embedder.mlp[-1] for embedder in self.cross_time_embedders.values()]
        for name, module in self.decoders.named_modules():
            if name.endswith(("modulation", "head")):
                silent.append(module)
        for parameter in nn.ModuleList(silent).parameters():
            nn.init.zeros_(parameter)

    def forward(self, noisy, t, text):
        """Predict the clean values of any subset of the modalities: x0_hat = g(x_t, t, text) of Sec. 3.1.

        Args:
            noisy: {m: (B, C, H, W)}.
            t: {m: (B,)} in [0, 1].
            text: (B, L) uint8, or (B, L, text_dim) embeddings; zeros are no text.
        Returns {m: (B, C, H, W)}.
        """
        with mixed_precision(text.device):
            return self.predict_x0(noisy, t, text)

    def predict_x0(self, noisy, t, text):
        """forward, in the precision that the caller has chosen."""
        present = [m for m in self.modalities if m.name in noisy]
        image = present[0]
        vectors = self.conditioning_vectors(present, t)

        # One sequence [text | modality | modality | ...]. Each token is modulated by the vector of its own modality.
        text_tokens = self.embed_text(text)  # (B, N_text, D)
        tokens = [text_tokens]
        modulations = [self.modulation(image, vectors, text_tokens.shape[1])]
        text_positions = torch.arange(text_tokens.shape[1], device=text.device)
        ids = [F.pad(text_positions[:, None], (3, 0))]
        grids = {}
        for m in present:
            patches = F.pixel_unshuffle(noisy[m.name], self.config.patch // m.stride)  # (B, C * patch^2, rows, columns)
            rows, columns = patches.shape[2:]
            grids[m.name] = (rows, columns)
            tokens.append(self.tokenizers[m.name](patches.flatten(2).transpose(1, 2)))  # (B, rows * columns, D)
            modulations.append(self.modulation(m, vectors, rows * columns))
            ids.append(token_ids(m.id, rows, columns, text.device))

        # The trunk.
        lengths = [part.shape[1] for part in tokens]
        angles = rope_angles(torch.cat(ids), self.config.head)[:, None]  # (N, 1, head / 2)
        cos = angles.cos()
        sin = angles.sin()
        modulation = torch.cat(modulations, 1).float().chunk(3, -1)  # shift, scale and gate, each (B, N, D)
        x = torch.cat(tokens, 1).float()  # (B, N, D)
        for block in self.blocks:
            x = block(x, modulation, (cos, sin))

        # Each modality's tokens go back to values.
        x0_hat = {}
        parts = zip(present, x.split(lengths, 1)[1:], cos.split(lengths)[1:], sin.split(lengths)[1:], strict=True)
        for m, own_tokens, own_cos, own_sin in parts:
            values = self.decoders[m.name](own_tokens, vectors[m.name], (own_cos, own_sin))
            values = values.transpose(1, 2).unflatten(2, grids[m.name])  # (B, C * patch^2, rows, columns)
            x0_hat[m.name] = F.pixel_shuffle(values, self.config.patch // m.stride)  # (B, C, H, W)
        return x0_hat

    def conditioning_vectors(self, present, t):
        """Cross-stream mixing: c_m = e_m(t_m) + sum over other modalities o of e_om(t_o) (Sec. 3.2). {m: (B, D)}."""
        vectors = {}
        for m in present:
            vector = self.time_embedders[m.name](t[m.name])
            for other in present:
                if other is not m:
                    vector = vector + self.cross_time_embedders[f"{other.name}_to_{m.name}"](t[other.name])
            vectors[m.name] = vector
        return vectors

    def modulation(self, m, vectors, count):
        """Shift, scale and gate of all blocks for count tokens of modality m, (B, count, 3 D)."""
        return self.modulations[m.name](F.silu(vectors[m.name]))[:, None].expand(-1, count, -1)

    def embed_text(self, text):
        """Bytes (B, L) or embeddings (B, L, text_dim) -> tokens (B, N, D)."""
        if self.text_bytes is not None:
            text = self.text_bytes(text.long())  # (B, L, 32)
            text = text.unflatten(1, (-1, TEXT_PATCH)).flatten(2)  # (B, L / TEXT_PATCH, 32 * TEXT_PATCH)
        return self.text_tokenizer(text)

    # ---- Sampler (Sec. 4.2) ----

    @torch.no_grad()
    def sample(self, schedule, noise, text, given=None, guidance=None, guidance_interval=(0, 1), callback=None):
        """Generate all modalities that are not given, along a schedule of noise levels.

        Args:
            schedule: {m: S + 1 noise levels} of make_schedule. A modality that it lacks is no input of the network.
            noise: {m: (B, C, H, W)}.
            text: as in forward.
            given: {m: (encoded values (B, C, H, W), valid (B, 1, H, W) bool or None)}. At every step these are noised
                to the level of their row, as in training: missing pixels are noise.
            guidance: {m: scale} of classifier-free guidance; 1, the default, is none.
            guidance_interval: guidance acts where the noise level lies within it.
            callback: called with {m: x_t} after each step.
        Returns {m: (B, C, H, W)} for Modality.decode. Raises ValueError if the rows differ in length.
        """
        given = given or {}
        guidance = guidance or {}
        low, high = guidance_interval
        names = [m.name for m in self.modalities if m.name in schedule]
        rows = [[float(level) for level in schedule[name]] for name in names]
        levels = [dict(zip(names, column, strict=True)) for column in zip(*rows, strict=True)]

        def set_given(x, t):
            for name, (x0, valid) in given.items():
                level = torch.full((len(x0),), t[name], device=x0.device)
                x[name] = corrupt(x0, noise[name], level, valid)  # Eq. 5

        x = {name: noise[name] for name in names}
        set_given(x, levels[0])
        for t, s in itertools.pairwise(levels):
            falling = [name for name in names if s[name] < t[name] and name not in given]
            guided = [name for name in falling if guidance.get(name, 1) != 1 and low <= t[name] <= high]
            x0_hat = self.predict_guided(x, t, text, {name: guidance[name] for name in guided})
            for name in falling:  # an Euler step on the velocity that x0_hat implies
                x[name] = x0_hat[name] + s[name] / t[name] * (x[name] - x0_hat[name])
            set_given(x, s)
            if callback:
                callback(dict(x))
        return x

    def predict_guided(self, x, t, text, guidance):
        """forward at one noise level t {m: float} for the whole batch, with classifier-free guidance {m: scale}."""
        texts = torch.cat([text, torch.zeros_like(text)]) if guidance else text  # with the caption, and without
        copies = len(texts) // len(text)
        levels = {name: torch.full((len(texts),), t[name], device=text.device) for name in x}
        x0_hat = self({name: x[name].repeat(copies, 1, 1, 1) for name in x}, levels, texts)

        result = {name: x0_hat[name][: len(text)] for name in x}
        for name, scale in guidance.items():
            without_text = x0_hat[name][len(text) :]
            result[name] = torch.lerp(without_text, result[name], float(scale))
        return result

    # ---- Weights ----

    @classmethod
    def from_checkpoint(cls, state):
        """Build the averaged network of a checkpoint, {"config": dict, "ema": weights}: frozen, float32, on the CPU.

        Raises ValueError, which names the first thing that is wrong.
        """
        try:
            config = Config(**state["config"])
            with torch.device("meta"):
                network = cls(config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its config is wrong: {error}") from None

        weights = rename_weights(state["ema"])
        check_weights(weights, network)
        network.to_empty(device="cpu").load_state_dict(weights)
        return network.requires_grad_(False)

    def warm_start(self, weights):
        """Load the weights of a network of fewer modalities (Sec. 3.2); new modulations are cloned from the image's.

        Tokenizer, time embedders and decoder of a new modality keep their fresh values. Raises ValueError unless
        weights is a whole network of the first modality, or of the first and some of the others.
        """
        image, *others = self.modalities
        loaded = [image] + [m for m in others if f"modulations.{m.name}.weight" in weights]
        with torch.device("meta"):
            smaller = DiT(replace(self.config, modalities=loaded))
        try:
            check_weights(weights, smaller)
        except ValueError as error:
            raise ValueError(f"its network does not fit this one ({error}): is the preset the same?") from None
        self.load_state_dict(weights, strict=False)
        for m in others:
            if m not in loaded:
                self.modulations[m.name].load_state_dict(self.modulations[image.name].state_dict())

    # ---- Training ----

    def all_blocks(self):
        """The blocks of the trunk and of the decoders."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def checkpoint_activations(self):
        """From now on keep only each block's input, and compute the rest again in the backward pass."""
        for block in self.all_blocks():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def compile_blocks(self):
        """torch.compile every block. The trunk's share one graph, and a decoder's another."""
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two; they are small enough to overlap as is
        for block in self.all_blocks():
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)

    def matrices(self):
        """The parameters that Muon updates: the blocks' matrices."""
        return [p for block in self.all_blocks() for p in (block.fused_in.weight, block.fused_out.weight)]

    def configure_optimizers(self, lr, optimizer="muon"):
        """[AdamW, Muon for the blocks' matrices], or [AdamW] for everything. Neither decays weights."""
        matrices = self.matrices() if optimizer == "muon" else []
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in self.parameters() if id(p) not in matrix_ids]
        optimizers = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
        if matrices:
            if matrices[0].device.type == "cpu":
                use_float32_muon()
            optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        return optimizers


def rename_weights(weights):
    """Weights of a checkpoint of any version -> the same under the names that the network has now."""
    renamed = {}
    for name, weight in weights.items():
        name = re.sub("^timesteps[.]", "time_embedders.", str(name))
        name = re.sub("^mixers[.]", "cross_time_embedders.", name)
        renamed[name] = weight
    return renamed


def check_weights(weights, network):
    """Raise ValueError unless weights, {name: tensor}, are those of the network: all, of its shapes, and finite.

    The network may be on the meta device, where it takes no memory.
    """
    expected = network.state_dict()
    for name, parameter in expected.items():
        weight = weights.get(name)
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"it lacks {name}")
        if weight.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, must have {tuple(parameter.shape)}")
        if not weight.is_contiguous():  # an expanded tensor declares more than its file holds
            raise ValueError(f"{name} is not contiguous")
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is of {weight.dtype}, must be floating")
        if not weight.float().isfinite().all():  # as the network will hold it
            raise ValueError(f"{name} is not finite")
    for name in weights:
        if name not in expected:
            raise ValueError(f"it holds {name}, which its network has not")


# ---- Cost ----
# What training costs, and how fast this machine could be; none of it is the method.


def training_cost(config, size):
    """(parameters, FLOPs per image) of training on images of size (H, W): matmuls and attention, both passes.

    Counted on the meta device, where nothing is computed.
    """
    with torch.device("meta"):
        network = DiT(config)
        noisy = {m.name: torch.zeros(1, *m.shape(size)) for m in config.modalities}
        t = {m.name: torch.zeros(1) for m in config.modalities}
        text = torch.zeros(1, config.text_length, dtype=torch.uint8)
        if config.text_dim:
            text = torch.zeros(1, config.text_length, config.text_dim)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not counted
        x0_hat = network(noisy, t, text)
        sum(x.sum() for x in x0_hat.values()).backward()
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def matmul_peak(device, dtype=torch.float32, repeats=10):
    """FLOP/s of the fastest of some large square matmuls on the device: training speed is compared with it."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


# ---- Muon on a CPU ----


def use_float32_muon():
    """Let torch's Muon iterate in float32: its own bfloat16 iteration is 20 times slower on CPUs that lack bfloat16.

    This sets a private name of torch. If a later torch renames it, steps are slower, not wrong.
    """
    torch.optim._muon._zeropower_via_newtonschulz = orthogonalize


def orthogonalize(gradient, coefficients, steps, eps):
    """Muon's Newton-Schulz iteration: gradient (n, m) -> (n, m) with its singular values brought near 1.

    It iterates x <- (a + b G + c G^2) x with G = x x^T. Only G, the smaller of the matrices, and the product of the
    factors are iterated; the product is applied to x once.
    """
    if isinstance(gradient, DTensor):  # with --shard every rank iterates on the whole matrix, and keeps its part
        whole = orthogonalize(gradient.full_tensor(), coefficients, steps, eps)
        return distribute_tensor(whole, gradient.device_mesh, gradient.placements, src_data_rank=None)
    a, b, c = coefficients
    wide = gradient.shape[0] <= gradient.shape[1]
    x = gradient if wide else gradient.T
    x = x / x.norm().clamp(min=eps)
    gram = x @ x.T
    identity = torch.eye(len(x))
    product = identity
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    result = product @ x
    return result if wide else result.T
