"""Modality Forcing (arXiv 2606.13676): the mathematics, the network and the sampler.

One diffusion transformer learns p(image, depth | text). Every modality has its own noise level t: t = 0 is clean, so it
conditions; t = 1 is pure noise, so it is generated; anything between is a partly trusted hint. Nothing below asks which
modality it is looking at: a modality is an entry in a list, and everything loops over the entries.

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
import time
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ---- Flow matching (Sec. 3.1, Eq. 5-7): t = 0 is clean, t = 1 is noise ----

MU, SIGMA = 1.1, 1.0  # shift and spread of both timestep distributions and of the sampling grid (Sec. 3.2)
T_MIN = 0.05  # the loss divides by max(t, T_MIN), as the released code does


def per_sample(t):
    """(B,) -> (B, 1, 1, 1), to scale images."""
    return t.view(-1, 1, 1, 1)


def corrupt(x0, noise, t, valid=None):
    """Interpolant of Eq. 5, x_t = (1 - t) x0 + t noise; noise alone where a pixel is missing, whatever t is (Sec. 3.2).

    x0, noise (B, C, H, W); t (B,) in [0, 1]; valid (B, 1, H, W) bool or None when every pixel is known.
    Returns (B, C, H, W). What x0 holds in missing pixels (NaN included) never reaches the result.
    """
    x_t = torch.lerp(x0, noise, per_sample(t))
    return x_t if valid is None else torch.where(valid, x_t, noise)


def scored(x0, t, valid=None):
    """Which values the loss is taken on, (B, C, H, W) bool: none of a sample held clean (t = 0) or a missing pixel."""
    known = per_sample(t > 0) if valid is None else valid & per_sample(t > 0)
    return known.expand_as(x0)


def velocity_loss(x0_hat, x0, t, valid=None, weight=None):
    """Eq. 7: || (x0_hat - x_t) / t - (x0 - noise) ||^2, which is || x0_hat - x0 ||^2 / t^2, with t clamped at T_MIN.

    x0_hat, x0 (B, C, H, W); t (B,); valid (B, 1, H, W) bool or None; weight (B,) or None scales each sample (Eq. 8).
    Returns (B,), each sample's sum over its scored values. A modality's loss is the sum of these over the number of
    scored values, both over the whole batch: all ranks, all accumulation steps. A mean of means would be another loss
    where sparse depth leaves one part of a batch with more pixels than another.
    """
    error = torch.where(scored(x0, t, valid), x0_hat.float() - x0, 0.0).square() / per_sample(t.clamp(min=T_MIN)) ** 2
    return (error if weight is None else error * per_sample(weight)).sum((1, 2, 3))


def distillation_weight(t, low, high):
    """lambda_hi t + lambda_lo (1 - t) of Eq. 8, t (B,) the noise level of what the teacher does not see."""
    return low + (high - low) * t


def breakdown(m, totals, counts, t):
    """One modality's loss by training mode and quarter of t, for debugging. Sums, which add up over batches and ranks.

    totals, counts (B,) of modality m's loss and scored values; t {m: (B,)}. Returns {group: (2,) total and count}:
    "" is all; with others in t, "_given_<other>" where that is held clean, "_joint" where none is; "_t0-0.25" ...
    """
    held = {other: t[other] == 0 for other in t if other != m}
    groups = {"": torch.ones_like(t[m], dtype=torch.bool)} | {f"_given_{other}": is_ for other, is_ in held.items()}
    if held:
        groups["_joint"] = ~torch.stack([*held.values()]).any(0)
    groups |= {f"_t{q / 4:g}-{(q + 1) / 4:g}": (t[m] > q / 4) & (t[m] <= (q + 1) / 4) for q in range(4)}
    sums = torch.stack([totals, counts])[:, None].where(torch.stack([*groups.values()]), 0.0).sum(-1)
    return dict(zip(groups, sums.T, strict=True))


# ---- Noise levels (Sec. 3.2) ----


def logit_normal(u):
    """Quantile function of the shifted logit-normal: u in (0, 1) -> t = sigmoid(MU + SIGMA * PhiInv(u)), any shape."""
    return torch.sigmoid(MU + SIGMA * math.sqrt(2) * torch.erfinv(2 * u - 1))


def plateau_constants():
    """Mode t*, its mass F = CDF(t*), its density p = pdf(t*), and the norm Z of the plateau logit-normal, as floats."""
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection on logit(t) - MU = SIGMA^2 (2 t - 1)
        mode = (low + high) / 2
        below = math.log(mode / (1 - mode)) - MU < SIGMA**2 * (2 * mode - 1)
        low, high = (mode, high) if below else (low, mode)
    z = (math.log(mode / (1 - mode)) - MU) / SIGMA
    mass = 0.5 * (1 + math.erf(z / math.sqrt(2)))
    density = math.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * SIGMA * mode * (1 - mode))
    return mode, mass, density, mass + (1 - mode) * density


def plateau_logit_normal(u):
    """Quantile function of the logit-normal that keeps its mode's density up to t = 1: u in (0, 1) -> t, any shape."""
    mode, mass, density, norm = plateau_constants()
    u = u * norm
    return torch.where(u < mass, logit_normal(u.clamp(max=mass)), mode + (u - mass) / density)


TIMESTEPS = {"logit-normal": logit_normal, "plateau": plateau_logit_normal}


def draw_noise_levels(modalities, rand, present=None):
    """One noise level per sample and modality, {m: (B,)}: the training modes of Sec. 3.2.

    With probability m.p_clean modality m is held at t = 0 (it conditions); otherwise, and for every other modality, t
    is drawn from m.timesteps, independently. rand() draws (B,) from U(0, 1). present {m: (B,) bool} tells the samples
    in which a modality has any valid pixel (default: all): where it has none it is pure noise, t = 1. The only present
    modality of a sample is never held clean.
    """
    choice, held = rand(), 0  # an index, or past the last: none
    for bound in itertools.accumulate(m.p_clean for m in modalities):
        held = held + (choice >= bound)
    everywhere = torch.ones_like(choice, dtype=torch.bool)
    present = {m.name: (present or {}).get(m.name, everywhere) for m in modalities}
    can_learn = torch.stack([present[m.name] & (held != i) for i, m in enumerate(modalities)]).any(0)
    t = {}
    for i, m in enumerate(modalities):
        drawn = TIMESTEPS[m.timesteps](rand().clamp(1e-6, 1 - 1e-6))
        t[m.name] = torch.where(present[m.name], torch.where(can_learn & (held == i), 0.0, drawn), 1.0)
    return t


# ---- Tables of noise levels: a task is a table (Sec. 4.2) ----

JOINT = 5.0  # log2(alpha) of the released joint trajectory: depth far behind the image
I2D_STEPS = 2  # depth from an image: more change little (RESULTS.md)


def sampling_grid(steps):
    """steps + 1 noise levels from 1 to 0, float64: linear t through t' = e^MU / (e^MU + (1/t - 1)^SIGMA) (Sec. 3.2)."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 1 / (1 + (1 / t - 1) ** SIGMA / math.exp(MU))


def warp(t, log2_alpha):
    """Trajectory of Sec. 4.2: f_alpha(t) = alpha t / (1 + (alpha - 1) t). t in [0, 1]; log2_alpha > 0 lags behind t."""
    return t / (t + (1 - t) * 2.0**-log2_alpha)


def noise_levels(names, steps, order=JOINT, strength=None):
    """The table that DiT.sample follows: {m: noise levels, float64}, for the modalities called names.

    order: log2(alpha): the first generated modality runs through the grid, the others through f_alpha of it, behind if
    it is > 0. Or a list of names, generated in turn, each in steps; a name not listed stays noise, t = 1.
    strength {m: 0..1} of what is given: 1 is clean, 0 ignored; between, its row is f_alpha of the first generated
    one's, log2(alpha) = 2 log2((1 - strength) / strength): the paper's -5 is 0.85, -14 is 0.992.
    """
    grid = sampling_grid(steps)
    strength = strength or {}
    generated = [m for m in names if m not in strength]
    if isinstance(order, list):
        turns = [m for m in order if m in generated]
        length = max(1, len(turns)) * steps + 1
        rows = {m: torch.ones(length, dtype=grid.dtype) for m in generated}
        for i, m in enumerate(turns):
            before = torch.ones_like(grid[1:]).repeat(i)
            after = torch.zeros_like(grid[1:]).repeat(len(turns) - 1 - i)
            rows[m] = torch.cat([before, grid, after])
        first = rows[turns[0]] if turns else grid
    else:
        rows = {m: warp(grid, order * (m != generated[0])) for m in generated}
        first = grid
    for m, s in strength.items():
        if 0 < s < 1:
            rows[m] = warp(first, 2 * math.log2((1 - s) / s))
        else:
            rows[m] = (first > 0).to(grid.dtype) * (1 - s)
    return rows


# ---- Depth as pixels (Sec. 3.2) ----


def contract(z):
    """mip-NeRF 360 contraction of z >= 0 into [0, 2): z up to 1, then 2 - 1/z."""
    return torch.where(z <= 1, z, 2 - 1 / z.clamp(min=1))


def uncontract(d):
    """Inverse of contract: [0, 2) -> [0, inf). A prediction outside that range is clamped to [0, 1.999]."""
    d = d.clamp(0, 1.999)
    return torch.where(d <= 1, d, 1 / (2 - d.clamp(min=1)))


def normalize_depth(depth, valid, like=None):
    """Depth in any unit (B, 1, H, W), valid (B, 1, H, W) bool -> divided by the mean over its valid pixels, contracted.

    Missing pixels become 0, and so does a wholly missing map. The scale is gone: what a model predicts is relative.
    like (B, 1, H, W), a prediction of the result: it fills missing pixels and sets the scale.
    """
    depth = torch.where(valid, depth, 0.0)
    scale = depth.sum((1, 2, 3), keepdim=True) / valid.sum((1, 2, 3), keepdim=True).clamp(min=1)
    if like is not None:
        whole = valid.flatten(1).all(1).view(-1, 1, 1, 1)
        scale = torch.where(whole, scale, depth_scale(uncontract(like), depth, valid))
        depth = complete_depth(uncontract(like), depth, valid)
    return contract(depth / scale.clamp(min=1e-12))


def restore_depth(d, depth=None, valid=None):
    """Contracted relative depth (B, 1, H, W) -> relative depth; in the unit of depth, if that is known on valid."""
    relative = uncontract(d)
    if depth is None:
        return relative
    return relative * depth_scale(relative, depth, torch.ones_like(depth) > 0 if valid is None else valid)


def depth_scale(relative, depth, valid):
    """Median of depth / relative over the valid pixels, (B, 1, 1, 1); 1 where there is none. All (B, 1, H, W)."""
    ratio = torch.where(valid, depth / relative.clamp(min=1e-3), torch.nan)
    return ratio.flatten(1).nanmedian(1).values.nan_to_num(1.0).view(-1, 1, 1, 1)


def complete_depth(relative, depth, valid):
    """Relative depth corrected to equal the depth measured on valid, in its unit. All (B, 1, H, W).

    The logarithm of its error is interpolated between (at most 1024) measured pixels by simple kriging, around its
    median, with a correlation that falls off as exp(-distance), over the pixel's place (longer side 2) and twice its
    predicted log depth, so that a correction stays on its surface.
    """
    made, (rows, columns) = [], (torch.arange(n, device=depth.device) for n in depth.shape[2:])
    place = torch.cartesian_prod(rows, columns) * (2 / max(depth.shape[2:]))
    for r, z, known in zip(relative.clamp(min=1e-3), depth, valid, strict=True):
        at = known.flatten().nonzero()[:, 0]
        if 0 < len(at) < known.numel():
            at = at[torch.linspace(0, len(at) - 1, min(len(at), 1024), device=at.device).long()]
            features = torch.cat([place, 2 * r.log().view(-1, 1)], 1)
            covariance = lambda part: torch.exp(-torch.cdist(part, features[at]))  # noqa: B023
            error = (z / r).log().flatten()[at]
            nugget, mean = 1e-3 * torch.eye(len(at), device=at.device), error.median()
            weights = torch.linalg.solve(covariance(features[at]) + nugget, error - mean)
            error = mean + torch.cat([covariance(part) @ weights for part in features.split(1 << 14)])
            r = r * error.exp().view_as(r)
        made.append(torch.where(known, z, r))
    return torch.stack(made)


ENCODINGS = {  # how stored values become diffused ones, and back
    "plain": (lambda x, valid, like: x if like is None else torch.where(valid, x, like), lambda x0, *known: x0),
    "relative depth": (normalize_depth, restore_depth),
}


def check_numbers(entry, **ranges):
    """Raise ValueError unless the attributes of entry named in ranges are whole numbers between their (low, high)."""
    for name, (low, high) in ranges.items():
        value = getattr(entry, name)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, must be a whole number from {low} to {high}")


@dataclass(frozen=True)
class Modality:
    """One entry of the list that the network, the losses and the sampler loop over. The first is the pretrained one."""

    name: str
    channels: int
    stride: int = 1
    """Image pixels per value of this modality, per side: 1 is pixels, more the latents of a frozen encoder."""
    decoder_depth: int = 0
    """Self-attention blocks over this modality's tokens alone, before its final layer (the detokenizer of Sec. 3.2)."""
    timesteps: str = "logit-normal"
    """Key of TIMESTEPS: the distribution of its training noise levels."""
    p_clean: float = 0.2
    """Probability that a training sample holds this modality clean, as the condition of the others."""
    encoding: str = "plain"
    """Key of ENCODINGS."""

    def __post_init__(self):
        """Raises ValueError where an entry, which a checkpoint may bring, makes no sense."""
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"modality {self.name!r}: its name must be an identifier")
        check_numbers(self, channels=(1, 4096), stride=(1, 256), decoder_depth=(0, 128))
        for key, known in ((self.timesteps, TIMESTEPS), (self.encoding, ENCODINGS)):
            if key not in tuple(known):
                raise ValueError(f"modality {self.name}: {key!r} is none of {', '.join(known)}")
        if not isinstance(self.p_clean, (int, float)) or not 0 <= self.p_clean <= 1:
            raise ValueError(f"modality {self.name}: p_clean is {self.p_clean!r}, must be a number from 0 to 1")

    def shape(self, size):
        """Image size (H, W) in pixels -> (C, h, w) of this modality's values."""
        return self.channels, size[0] // self.stride, size[1] // self.stride

    def encode(self, x, valid=None, like=None):
        """Stored values (B, C, H, W), valid (B, 1, H, W) bool or None -> values the network diffuses, same shape.

        like (B, C, H, W), a prediction of the result: it fills what is missing.
        """
        return ENCODINGS[self.encoding][0](x, valid, like)

    def decode(self, x0, known=None, valid=None):
        """Inverse of encode; what that discards (depth: its scale) comes back if stored values are known on valid."""
        return ENCODINGS[self.encoding][1](x0, known, valid)


RGB = Modality("rgb", channels=3)
DEPTH = Modality("depth", channels=1, decoder_depth=4, timesteps="plateau", encoding="relative depth")


# ---- Network (Sec. 4.1) ----


@dataclass(frozen=True)
class Config:
    """Everything needed to rebuild a network; travels inside checkpoints."""

    width: int
    depth: int
    head: int
    """Channels of an attention head; width / head query heads, a quarter as many key/value heads."""
    patch: int
    """Side of a token in image pixels: all modalities cover the image with the same grid of tokens."""
    size: int
    """Default side of the images in pixels. Any height and width that the patch divides works at call time."""
    decoder_depth: int = 4
    text_length: int = 160
    """Bytes of caption, TEXT_PATCH to a token; or, with text_dim, embeddings."""
    text_dim: int = 0
    """Channels of a frozen encoder's text embeddings; 0 is bytes."""
    modalities: tuple = (RGB,)

    def __post_init__(self):
        """Raises ValueError or TypeError for what a checkpoint may bring and no network can be built from."""
        entries = (m if isinstance(m, Modality) else Modality(**m) for m in self.modalities)
        object.__setattr__(self, "modalities", tuple(entries))
        check_numbers(self, width=(1, 1 << 16), depth=(0, 1024), head=(1, 1024), patch=(1, 1024), size=(1, 1 << 16))
        check_numbers(self, decoder_depth=(0, 128), text_length=(1, 1 << 16), text_dim=(0, 1 << 16))
        if self.head % 16 or self.width % (4 * self.head):
            raise ValueError(
                f"width {self.width} must be a multiple of 4 x head, {self.head}, and head a multiple of 16"
            )
        names = {m.name for m in self.modalities}
        if not 0 < len(names) == len(self.modalities) <= 8:
            raise ValueError("modalities must be 1 to 8, of different names")
        for m in self.modalities:
            if self.patch % m.stride:
                raise ValueError(f"patch {self.patch} must be a multiple of the stride of {m.name}, {m.stride}")

    def with_modalities(self, *entries):
        """This network over the given entries, their detokenizer at most as deep as the preset's."""
        fit = [replace(m, decoder_depth=min(m.decoder_depth, self.decoder_depth)) for m in entries]
        return replace(self, modalities=tuple(fit))

    def fit(self, height, width, side):
        """The size (H, W) nearest to side x side pixels in area that keeps the aspect and that the patch divides."""
        scale = side / (height * width) ** 0.5 / self.patch
        return tuple(max(1, round(n * scale)) * self.patch for n in (height, width))

    def with_encoders(self, encoders):
        """This network with its first modality in the encoders' latents and their text embeddings (data.PixelsAndBytes
        lists the attributes). A token's side becomes a multiple of their stride, so that token grids coincide.
        """
        stride, (first, *others) = encoders.image_stride, self.modalities
        latents = replace(first, channels=encoders.image_channels, stride=stride)
        text = {"text_dim": encoders.text_dim, "text_length": encoders.text_length}
        return replace(self, patch=max(1, self.patch // stride) * stride, modalities=(latents, *others), **text)


PRESETS = {  # as text-to-image networks; with_modalities adds more
    "nano": Config(width=128, depth=6, head=32, patch=4, size=32, decoder_depth=1),
    "tiny": Config(width=256, depth=10, head=64, patch=4, size=64, decoder_depth=2),
    "small": Config(width=512, depth=14, head=64, patch=8, size=128, decoder_depth=2, text_length=256),
    "370m": Config(width=1024, depth=30, head=64, patch=16, size=256, text_length=512),
    "800m": Config(width=1536, depth=30, head=64, patch=16, size=256, text_length=512),
    "3b": Config(width=3072, depth=30, head=128, patch=16, size=256, text_length=512),
}
TEXT_PATCH = 8  # bytes in a text token: a caption is patchified as an image is


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D), through sinusoids of 1000 t."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = 1000 * t.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


def token_ids(modality, rows, columns, device=None):
    """RoPE ids (rows * columns, 4) of an image's tokens: (modality, row, column, 0)."""
    place = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return F.pad(F.pad(place, (1, 0), value=modality), (0, 1))


def rope_angles(ids, head):
    """Multi-axis RoPE: ids (N, 4) of (modality, row, column, text position) -> angles (N, head / 2).

    Rows and columns get three eighths of the channels each, modality and text position one eighth.
    """
    angles = []
    for axis, share in enumerate((1, 3, 3, 1)):
        n = head * share // 16
        rates = 100.0 ** -(torch.arange(n, device=ids.device) / n)
        angles.append(ids[:, axis, None] * rates)
    return torch.cat(angles, -1)


def rotate(x, cos, sin):
    """Rotate channel pairs (i, i + head/2) of x (B, N, heads, head); cos, sin (N, 1, head), sin negated in half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def mixed_precision(device):
    """A context in which linear layers and attention run in bfloat16 on CUDA. On other devices it changes nothing."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class Block(nn.Module):
    """Attention and SwiGLU in parallel on one normalised input, RMSNorm before and after, modulation from outside.

    The residual stream, norms and modulation are float32; linear layers, attention and SwiGLU follow autocast.
    """

    def __init__(self, width, head):
        super().__init__()
        self.head, self.heads = head, [width // head, width // head // 4]  # query heads, key/value heads
        self.split = [width + width // 4, width // 4, 3 * width, 3 * width]  # q and k, v, gate, up: FFN is three widths
        self.pre_norm = nn.RMSNorm(width, eps=1e-6)
        self.fused_in = nn.Linear(width, sum(self.split), bias=False)
        self.qk_scale = nn.Parameter(torch.ones(sum(self.heads), head))
        self.fused_out = nn.Linear(4 * width, width, bias=False)
        self.post_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x, modulation, rope):
        """x (B, N, D); modulation (shift, scale, gate), each (B, N, D) or (B, 1, D); rope (cos, sin). -> (B, N, D).

        All are float32 and x is contiguous, so that torch.compile reuses the first block's graph for the others.
        """
        shift, scale, gate = modulation
        h = torch.addcmul(shift, self.pre_norm(x), 1 + scale)
        qk, v, ffn_gate, ffn_up = self.fused_in(h).split(self.split, -1)
        qk, v = qk.unflatten(-1, (-1, self.head)), v.unflatten(-1, (-1, self.head))
        qk = rotate(F.rms_norm(qk.float(), (self.head,)) * self.qk_scale, *rope).to(v.dtype)
        q, k, v = (y.transpose(1, 2) for y in (*qk.split(self.heads, 2), v))
        attention = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        out = self.fused_out(torch.cat([attention, F.silu(ffn_gate) * ffn_up], -1))
        return torch.addcmul(x, gate, self.post_norm(out.float()))


class Decoder(nn.Module):
    """Tokens of one modality -> its values: self-attention blocks, then an adaLN linear layer kept in float32."""

    def __init__(self, config, modality):
        super().__init__()
        width = config.width
        self.blocks = nn.ModuleList(Block(width, config.head) for _ in range(modality.decoder_depth))
        if self.blocks:
            self.block_modulation = nn.Linear(width, 3 * width, bias=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, modality.channels * (config.patch // modality.stride) ** 2)

    def forward(self, x, vector, rope):
        """x (B, n, D) and conditioning vector (B, D) -> (B, n, channels * patch^2)."""
        vector = F.silu(vector)[:, None]
        if self.blocks:
            modulation = self.block_modulation(vector).float().chunk(3, -1)
            x = x.clone(
                memory_format=torch.contiguous_format
            )  # x is a slice of the whole sequence; blocks need contiguous input
            for block in self.blocks:
                x = block(x, modulation, rope)
        shift, scale = self.modulation(vector).chunk(2, -1)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # bfloat16 here shows as bands
            x = F.rms_norm(x.float(), x.shape[-1:]) * (1 + scale.float()) + shift.float()
            return self.head(x)


class DiT(nn.Module):
    """Flat-token diffusion transformer over [text | first modality | second modality | ...] (Sec. 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.modalities = config, config.modalities
        names, width = [m.name for m in self.modalities], config.width
        by_name = lambda make: nn.ModuleDict({m.name: make(m) for m in self.modalities})
        if not config.text_dim and config.text_length % TEXT_PATCH:
            raise ValueError(f"text_length {config.text_length} must be a multiple of {TEXT_PATCH} bytes")
        self.text_bytes = None if config.text_dim else nn.Embedding(256, 32)
        self.text_tokenizer = nn.Linear(config.text_dim or 32 * TEXT_PATCH, width)
        self.tokenizers = by_name(lambda m: nn.Linear(m.channels * (config.patch // m.stride) ** 2, width))
        self.timesteps = by_name(lambda m: TimestepEmbedder(width))
        self.mixers = nn.ModuleDict({f"{a}_to_{b}": TimestepEmbedder(width) for a in names for b in names if a != b})
        self.modulations = by_name(lambda m: nn.Linear(width, 3 * width, bias=False))
        self.blocks = nn.ModuleList(Block(width, config.head) for _ in range(config.depth))
        self.decoders = by_name(lambda m: Decoder(config, m))
        self.initialize()

    def initialize(self):
        """Xavier everywhere; zeros where a part must begin as no change: gates, adaLN, mixers, and the final layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        silent = [*self.modulations.values(), *(mixer.mlp[-1] for mixer in self.mixers.values())]
        for name, module in self.decoders.named_modules():
            if name.endswith(("modulation", "head")):
                silent.append(module)
        for parameter in nn.ModuleList(silent).parameters():
            nn.init.zeros_(parameter)

    def forward(self, noisy, t, text):
        """Clean-sample predictions g(x_t, t) of Sec. 3.1, for any subset of the modalities.

        noisy {m: (B, C, H, W)}; t {m: (B,)} in [0, 1]; text (B, L) uint8, or (B, L, text_dim) embeddings, zeros where
        there is none. Returns {m: (B, C, H, W)}.
        """
        with mixed_precision(text.device):
            return self.predict_x0(noisy, t, text)

    def predict_x0(self, noisy, t, text):
        """forward, without choosing the precision."""
        present = [m for m in self.modalities if m.name in noisy]
        names, first = [m.name for m in self.modalities], present[0]
        vectors = {}
        for m in present:
            mixed = (self.mixers[f"{o.name}_to_{m.name}"](t[o.name]) for o in present if o is not m)
            vectors[m.name] = sum(mixed, self.timesteps[m.name](t[m.name]))

        if self.text_bytes is not None:
            text = self.text_bytes(text.long()).unflatten(1, (-1, TEXT_PATCH)).flatten(2)
        text_tokens = self.text_tokenizer(text)
        modulate = lambda m, n: self.modulations[m.name](F.silu(vectors[m.name]))[:, None].expand(-1, n, -1)
        tokens, modulations = [text_tokens], [modulate(first, text_tokens.shape[1])]
        ids = [F.pad(torch.arange(text_tokens.shape[1], device=text.device)[:, None], (3, 0))]
        grids = {}
        for m in present:
            patches = F.pixel_unshuffle(noisy[m.name], self.config.patch // m.stride)
            rows, columns = grids[m.name] = patches.shape[-2:]
            tokens.append(self.tokenizers[m.name](patches.flatten(2).transpose(1, 2)))
            ids.append(token_ids(names.index(m.name), rows, columns, text.device))
            modulations.append(modulate(m, rows * columns))

        lengths = [part.shape[1] for part in tokens]
        angles = rope_angles(torch.cat(ids), self.config.head)[:, None]
        rope = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
        modulation = torch.cat(modulations, 1).float().chunk(3, -1)
        x = torch.cat(tokens, 1).float()
        for block in self.blocks:
            x = block(x, modulation, rope)

        x0_hat = {}
        parts = zip(present, x.split(lengths, 1)[1:], *(r.split(lengths)[1:] for r in rope), strict=True)
        for m, part, *own_rope in parts:
            values = self.decoders[m.name](part, vectors[m.name], own_rope)
            values = values.transpose(1, 2).unflatten(2, grids[m.name])
            x0_hat[m.name] = F.pixel_shuffle(values, self.config.patch // m.stride)
        return x0_hat

    @torch.no_grad()
    def sample(
        self, levels, noise, text, known=None, guidance=None, interval=(0, 1), solver="euler", watch=None, hints=()
    ):
        """Generate by the table levels {m: S + 1 noise levels}, which is the whole task (Sec. 4.2): from 1 down to 0
        for what is generated, zeros for what is given, ones for what stays noise. A modality that is not in the table
        is left out of the network's input.

        noise {m: (B, C, H, W)}; text as in forward. known {m: (stored values (B, C, H, W), valid (B, 1, H, W) bool, or
        None for everywhere)}: at every step these values are set to (1 - t) x0 + t noise, at their row's t. So a row of
        zeros conditions, a row that falls early is a hint, and sparse values are completed, in their own units; but in
        modalities among hints missing values stay noise, as in training (Sec. 3.2).
        guidance {m: scale} of classifier-free guidance, while interval[0] <= t <= interval[1]; 1 is none. solver
        "euler" is x_s = x0_hat + (s/t) (x_t - x0_hat); "heun", of second order, predicts twice in all steps but the
        last. watch(x) is called after each step. Returns {m: (B, C, H, W)}, for Modality.decode. Raises ValueError if
        the rows differ in length.
        """
        modalities = {m.name: m for m in self.modalities if m.name in levels}
        columns = zip(*(levels[m] for m in modalities), strict=True)
        steps = [dict(zip(modalities, map(float, column), strict=True)) for column in columns]
        everywhere = lambda values: torch.ones_like(values[:, :1], dtype=torch.bool)
        known = {m: (x, everywhere(x) if valid is None else valid) for m, (x, valid) in (known or {}).items()}
        clean = {m: modalities[m].encode(*known[m]) for m in known}
        still = {m for m in known if m in hints or known[m][1].all()}
        both, guidance = torch.cat([text, torch.zeros_like(text)]), guidance or {}  # with the caption, and without

        def hold(x, t):
            return x | {m: torch.where(known[m][1], torch.lerp(clean[m], noise[m], t[m]), x[m]) for m in known}

        def predict(x, t, moving):
            guided = [m for m in moving if guidance.get(m, 1) != 1 and interval[0] <= t[m] <= interval[1]]
            copies, texts = (2, both) if guided else (1, text)
            at = {m: torch.full((len(texts),), t[m], device=text.device) for m in x}
            x0_hat = self({m: x[m].repeat(copies, 1, 1, 1) for m in x}, at, texts)
            split = {m: x0_hat[m].chunk(copies) for m in moving}
            made = {m: torch.lerp(v[-1], v[0], float(guidance[m]) if m in guided else 1.0) for m, v in split.items()}
            for m in known.keys() & moving:
                made[m] = clean[m] = modalities[m].encode(*known[m], like=made[m])
            return made

        x = hold({m: noise[m] for m in modalities}, steps[0])
        for t, s in itertools.pairwise(steps):
            moving = [m for m in x if s[m] < t[m] and m not in still]
            x0_hat = predict(x, t, moving)
            euler = lambda: x | {m: x0_hat[m] + s[m] / t[m] * (x[m] - x0_hat[m]) for m in moving}  # noqa: B023
            if solver == "heun":
                inner, there = [m for m in moving if s[m] > 0], hold(euler(), s)
                ahead = predict(there, s, inner) if inner else {}
                for m in ahead:  # to this an Euler step takes the mean of both slopes
                    x0_hat[m] = (x0_hat[m] + x[m] - t[m] / s[m] * (there[m] - ahead[m])) / 2
            x = hold(euler(), s)
            if watch:
                watch(x)
        return x

    def warm_start(self, state):
        """Load weights of fewer modalities (Sec. 3.2): all parts as they are, new modulations cloned from the first's.

        Tokenizer, timestep embedder, mixers and detokenizer of new modalities keep their fresh values.
        Raises ValueError unless state is a whole network of the first modality, or of the first and some others.
        """
        first, *others = self.modalities
        known = [first] + [m for m in others if f"modulations.{m.name}.weight" in state]
        with torch.device("meta"):
            smaller = DiT(replace(self.config, modalities=known))
        try:
            check_weights(state, smaller)
        except ValueError as error:
            raise ValueError(f"its network does not fit this one ({error}): is the preset the same?") from None
        self.load_state_dict(state, strict=False)
        for m in others:
            if m not in known:
                self.modulations[m.name].load_state_dict(self.modulations[first.name].state_dict())

    def checkpoint_activations(self):
        """From now on keep only each block's input, and recompute the rest in the backward pass."""
        for block in self.all_blocks():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def compile_blocks(self):
        """torch.compile each block, for its shapes: one graph for all of the trunk, one for a detokenizer's."""
        torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two; they are small enough to overlap as is
        for block in self.all_blocks():
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)

    def all_blocks(self):
        return [module for module in self.modules() if isinstance(module, Block)]

    def matrices(self):
        """What Muon updates: the blocks' matrices."""
        return [p for block in self.all_blocks() for p in (block.fused_in.weight, block.fused_out.weight)]

    def configure_optimizers(self, lr, optimizer="muon", shard=False):
        """[AdamW for all but the blocks' matrices, Muon for these], or [AdamW for all]. Neither decays weights.

        shard: every rank keeps the state of, and updates, its own share of the parameters, whole ones (ZeRO, stage 1).
        """
        matrices = self.matrices() if optimizer == "muon" else []
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters() if id(p) not in chosen]
        make = lambda kind, parameters, **settings: kind(parameters, lr=lr, weight_decay=0.0, **settings)
        if shard:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # takes seconds, which few need

            make = lambda kind, parameters, **settings: ZeroRedundancyOptimizer(
                parameters, kind, lr=lr, weight_decay=0.0, **settings
            )
        optimizers = [make(torch.optim.AdamW, rest, betas=(0.9, 0.95), fused=True)]
        if matrices:
            if matrices[0].device.type == "cpu":  # a private name: should torch change it, steps are slower, not wrong
                torch.optim._muon._zeropower_via_newtonschulz = orthogonalize
            optimizers.append(make(torch.optim.Muon, matrices, adjust_lr_fn="match_rms_adamw"))
        return optimizers


def check_weights(state, network):
    """Raise ValueError unless state, {name: tensor}, holds the network's weights: all, of its shapes, and finite.

    The network may be on the meta device, where it takes no memory.
    """
    expected = network.state_dict()
    for name, weight in expected.items():
        value = state.get(name)
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"it lacks {name}")
        if value.shape != weight.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must have {tuple(weight.shape)}")
        if value.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is of {value.dtype}, must be floating")
        if not value.float().isfinite().all():  # as the network will hold it
            raise ValueError(f"{name} is not finite")
    for name in state:
        if name not in expected:
            raise ValueError(f"it holds {name}, which its network has not")


def orthogonalize(gradient, coefficients, steps, eps):
    """Muon's Newton-Schulz iteration in float32. torch's is fixed to bfloat16, 20 times slower on CPUs without it.

    gradient (n, m) -> (n, m), its singular values brought near 1. x <- (a + b G + c G^2) x with G = x x^T, iterated on
    the small matrix G and the product of the factors alone.
    """
    a, b, c = coefficients
    x = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    x = x / x.norm().clamp(min=eps)
    gram, eye = x @ x.T, torch.eye(len(x))
    product = eye
    for _ in range(steps):
        factor = a * eye + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    return product @ x if gradient.shape[0] <= gradient.shape[1] else (product @ x).T


# ---- Cost ----


def matmul_peak(device, dtype=torch.float32, repeats=10):
    """FLOP/s of the best of repeated large square matmuls on the device: what utilisation is measured against."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    synchronize = getattr(torch, device.type).synchronize if device.type != "cpu" else lambda: None
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def example(config, size, batch=1):
    """(model, inputs of its forward): images of size (H, W) and zeros for all that is given."""
    noisy = {m.name: torch.zeros(batch, *m.shape(size)) for m in config.modalities}
    text = torch.zeros(batch, config.text_length, config.text_dim or 1)
    text = text if config.text_dim else text[..., 0].byte()
    return DiT(config), (noisy, {m: torch.zeros(batch) for m in noisy}, text)


def training_cost(config, size):
    """(parameters, FLOPs per image) of training, counted on the meta device: matmuls and attention, both passes."""
    with torch.device("meta"):
        model, inputs = example(config, size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel is not counted
        sum(x.sum() for x in model(*inputs).values()).backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def activation_bytes(config, size, batch, half, checkpointing=False):
    """Bytes that a forward pass keeps for its backward pass, counted on fake tensors, uncompiled.

    half: under bfloat16 autocast; its copies of the weights are among them. checkpointing: see checkpoint_activations.
    """
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # holding it, so that no other gets its address
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model, inputs = example(config, size, batch)
        if checkpointing:
            model.checkpoint_activations()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*inputs)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def memory_plan(config, size, images, gpus, optimizer="muon", taught=None, half=True):
    """Estimated peak bytes on each of the GPUs in training, {(shard, checkpointing): {part: bytes}}, for each choice.

    images: that a GPU takes at a time. taught: Config of the frozen teacher, or None. Weights, gradients and EMA are
    float32; with half, weights include autocast's bfloat16 copies, and the teacher is bfloat16. Not in it: CUDA's
    context, NCCL's buffers, fragmentation, and what torch.compile saves by fusion.
    """
    with torch.device("meta"):
        model, teacher = DiT(config), DiT(taught) if taught else None
    count = lambda parameters: sum(p.numel() for p in parameters)
    parameters, frozen = count(model.parameters()), count(teacher.parameters()) if taught else 0
    states = 2 * parameters - (count(model.matrices()) if optimizer == "muon" else 0)  # AdamW keeps two, Muon one
    one, two, one_again, two_again = (
        activation_bytes(config, size, batch, half, again) for again in (False, True) for batch in (1, 2)
    )
    copies, each, each_again = 2 * one - two, two - one, two_again - one_again
    each_again += (each - each_again) / len(model.all_blocks())  # one block's, computed again
    plans = {}
    for shard, again in itertools.product((False, True), repeat=2):
        parts = {"weights": 4 * parameters + copies, "gradients": 4 * parameters}
        parts |= {"optimizer": 4 * states / (gpus if shard else 1), "EMA": 4 * parameters}
        parts |= {"teacher": (2 if half else 4) * frozen, "activations": images * (each_again if again else each)}
        plans[shard, again] = parts
    return plans


def format_plan(plans):
    """memory_plan as a table in GiB, for --dry-run."""
    lines = [["", *next(iter(plans.values())), "total"]]
    for (shard, again), parts in plans.items():
        flags = [flag for flag, on in (("--shard", shard), ("--checkpoint-activations", again)) if on]
        sizes = [f"{n / 2**30:.2f}" for n in (*parts.values(), sum(parts.values()))]
        lines.append([" ".join(flags) or "without either", *sizes])
    return "\n".join(f"{first:34}" + "".join(f"{cell:>13}" for cell in cells) for first, *cells in lines)
