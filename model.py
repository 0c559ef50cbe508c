"""Modality Forcing (arXiv 2606.13676): the mathematics, the network, the sampler and the optimizers.

One diffusion transformer learns p(image, depth | text). Every modality has its own noise level t. At t = 0 a modality
is clean, so it conditions the others. At t = 1 it is pure noise, and sampling lowers t to 0 to generate it. Between the
two it is a hint that is partly trusted.

A modality is an entry in a list, and every loop runs over the entries. Only the first entry, the image, has roles of
its own: its conditioning vector also modulates the text tokens, a new modality starts with copies of its weights, and
in sampling the other noise levels may follow its noise level.

References:
  Modality Forcing               https://arxiv.org/abs/2606.13676   sections and equations cited below
  x-prediction on pixels (JiT)   https://arxiv.org/abs/2511.13720
  DiT, adaLN-zero                https://arxiv.org/abs/2212.09748
  mip-NeRF 360 contraction       https://arxiv.org/abs/2111.12077

Shapes: B batch, C channels, H W image, N tokens, D width, L text length. Dictionaries are keyed by modality name.
"""

import functools
import itertools
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ---- Flow matching (Sec. 3.1, Eq. 5-7) ----
# A clean sample x0 is mixed with noise, and the network predicts x0 from the mixture. The network gets no mask channel:
# missing pixels are noise, and it must recognise them. Errors are sums here. The training scripts divide them by the
# number of values that carry a loss in the whole batch.

T_MIN = 0.05  # the weight of the loss is 1 / max(t, T_MIN)^2, as in the released code


def corrupt(x0, noise, t, valid=None):
    """Interpolate between clean values and noise: x_t = (1 - t) x0 + t noise (Eq. 5).

    A missing pixel is noise alone, whatever t is and whatever x0 stores there, NaN included (Sec. 3.2).

    x0, noise and the result are (B, C, H, W); t is (B,) in [0, 1]; valid is (B, 1, H, W) bool, or None if all are.
    """
    x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
    if valid is None:
        return x_t
    return torch.where(valid, x_t, noise)


def loss_mask(x0, t, valid=None):
    """Which values carry a loss, (B, C, H, W) bool: those of valid pixels with t > 0. Arguments as in corrupt."""
    mask = (t > 0).view(-1, 1, 1, 1).expand_as(x0)
    if valid is not None:
        mask = mask & valid
    return mask


def squared_error(x0_hat, x0, mask):
    """Sum of (x0_hat - x0)^2 over the values of each sample where mask is True: (B, C, H, W) each -> (B,)."""
    difference = torch.where(mask, x0_hat.float() - x0, 0.0)
    return difference.square().sum((1, 2, 3))


def velocity_weight(t):
    """Weight that turns an error of x0 into an error of the velocity: 1 / max(t, T_MIN)^2, (B,) -> (B,).

    Eq. 7 compares velocities, || (x0_hat - x_t) / t - (x0 - noise) ||^2, which equals || x0_hat - x0 ||^2 / t^2.
    """
    return 1 / t.clamp(min=T_MIN) ** 2


LOSS_WEIGHTS = {"velocity": velocity_weight, "x0": torch.ones_like}  # keys of Modality.loss: what the loss compares


def distillation_weight(t, low, high):
    """Weight of Eq. 8: low at t = 0, high at t = 1, and linear between them. (B,) -> (B,)

    t is the noise level of the modalities that the teacher cannot see. The less noise they have, the more the student
    knows that the teacher does not, so the less it should imitate the teacher.
    """
    return low + (high - low) * t


def split_by_mode(name, values, t):
    """Sum the values (..., B) of one modality over the samples of each training mode, for the logs.

    Returns {mode: (...)}. Mode "" has all samples. If other modalities are in t {m: (B,)}, "_given_<other>" has the
    samples where that one is held clean, and "_joint" has the samples where no other one is.
    """
    others_clean = {f"_given_{other}": t[other] == 0 for other in t if other != name}
    modes = {"": torch.ones_like(t[name], dtype=torch.bool)}
    modes.update(others_clean)
    if others_clean:
        modes["_joint"] = ~torch.stack(list(others_clean.values())).any(0)
    return {mode: torch.where(mask, values, 0.0).sum(-1) for mode, mask in modes.items()}


# ---- Noise levels in training (Sec. 3.2) ----
# Every modality draws its own t from its own distribution; sometimes one is held clean.

MU = 1.1  # mean of logit(t) (Sec. 3.2); the same shift warps the grid of the sampler
SIGMA = 1.0  # standard deviation of logit(t)


def logit_normal(u):
    """Quantile function of the shifted logit-normal: u in (0, 1) -> t = sigmoid(MU + SIGMA * PhiInv(u)), any shape."""
    return torch.sigmoid(MU + SIGMA * math.sqrt(2) * torch.erfinv(2 * u - 1))


def plateau_logit_normal(u):
    """Quantile function of the logit-normal density up to its mode, constant from there to t = 1. u in (0, 1) -> t."""
    mode = 0.5
    for _ in range(100):  # the mode, 0.86, solves logit(mode) = MU + SIGMA^2 (2 mode - 1)
        mode = 1 / (1 + math.exp(-MU - SIGMA**2 * (2 * mode - 1)))
    z = SIGMA * (2 * mode - 1)  # (logit(mode) - MU) / SIGMA, a value of the standard normal distribution
    mass = NormalDist().cdf(z)  # of the logit-normal, below its mode
    height = NormalDist().pdf(z) / (SIGMA * mode * (1 - mode))  # of its density, at the mode
    norm = mass + (1 - mode) * height

    u = u * norm
    on_plateau = mode + (u - mass) / height
    return torch.where(u < mass, logit_normal(u.clamp(max=mass)), on_plateau)


TIMESTEPS = {"logit-normal": logit_normal, "plateau": plateau_logit_normal}  # keys of Modality.timesteps


def draw_noise_levels(modalities, rand, has_pixels=None, subsets=False, uniform=0.0):
    """Draw a noise level for each sample and modality, {m: (B,)}: the training modes of Sec. 3.2.

    Each modality m draws t from m.timesteps, independently of the others. With probability m.p_clean it is then held
    clean, at t = 0, unless that would leave the sample without a loss.

    Args:
        rand: function without arguments that draws (B,) from U(0, 1).
        has_pixels: {m: (B,) bool}, where the modality has a valid pixel; elsewhere t = 1. By default it always has.
        subsets: hold each modality clean independently, so that any number may be. By default at most one is.
        uniform: share of the levels that is drawn from U(0, 1) instead.
    """
    choice = rand()
    always = {m.name: torch.ones_like(choice, dtype=torch.bool) for m in modalities}
    has_pixels = {**always, **(has_pixels or {})}

    clean = {}
    low = 0.0
    for m in modalities:
        if subsets:
            clean[m.name] = rand() < m.p_clean
        else:  # each modality has an interval of length p_clean, and choice lies in at most one of them
            clean[m.name] = (choice >= low) & (choice < low + m.p_clean)
            low += m.p_clean
    carries_loss = torch.stack([has_pixels[m.name] & ~clean[m.name] for m in modalities]).any(0)

    t = {}
    for m in modalities:
        u = rand().clamp(1e-6, 1 - 1e-6)  # so that t is neither 0 nor 1
        drawn = TIMESTEPS[m.timesteps](u)
        if uniform:
            drawn = torch.where(rand() < uniform, u, drawn)
        drawn = torch.where(clean[m.name] & carries_loss, 0.0, drawn)
        t[m.name] = torch.where(has_pixels[m.name], drawn, 1.0)
    return t


# ---- Noise levels in sampling (Sec. 4.2) ----
# A schedule is a table {m: noise levels of all steps}. A task is a schedule and the values that you give.

JOINT = 5.0  # log2(alpha) in the released code's joint generation: depth resolves long after the image
GUIDANCE = 2.0  # scale of classifier-free guidance of the image (Sec. 4.3 has 4, with FLUX.2)
SAMPLING_STEPS = 25  # with 50, some noise levels would be so low that training hardly draws them: grain (RESULTS.md)
I2D_STEPS = 2  # sampling steps from an image to depth or normals: more are not better (RESULTS.md)


def sampling_grid(steps):
    """steps + 1 noise levels from 1 to 0, float64: linear t through t' = e^MU / (e^MU + (1/t - 1)^SIGMA) (Sec. 3.2)."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 1 / (1 + (1 / t - 1) ** SIGMA / math.exp(MU))


def warp(t, log2_alpha):
    """Trajectory of Sec. 4.2, alpha t / (1 + (alpha - 1) t): with log2_alpha > 0 it stays above t. t in [0, 1]."""
    return t / (t + (1 - t) * 2.0**-log2_alpha)


def make_schedule(names, steps, order=JOINT, strength=None):
    """The table of noise levels that Denoiser.sample follows: {m: (S + 1,) float64} for the modalities called names.

    Args:
        steps: number of sampling steps; if order is a list, the number for each generated name in it.
        order: a number is log2(alpha), which warps the rows of all generated modalities but the first of names. It has
            no effect if that one is given. A list of names generates them one after the other; others stay noise.
        strength: {m: 0 to 1} of the modalities that you give. 1 is clean and 0 is ignored. Between them a row is
            warped by log2(alpha) = 2 log2((1 - strength) / strength). 0.85 is the paper's -5, and 0.992 its -14.
            If order is a list, such a row falls to 0 while the first name is generated.
    """
    strength = strength or {}
    generated = [name for name in names if name not in strength]
    grid = sampling_grid(steps)

    if isinstance(order, list):
        turns = [name for name in order if name in generated]
        waiting = max(0, len(turns) - 1) * steps  # steps of a modality before and after its turn
        base = torch.cat([grid, torch.zeros(waiting)])  # the row of the first turn
        schedule = {name: torch.ones_like(base) for name in generated}
        for turn, name in enumerate(turns):
            before = turn * steps
            schedule[name] = torch.cat([torch.ones(before), grid, torch.zeros(waiting - before)])
    else:
        base = grid
        schedule = dict.fromkeys(generated, base)
        if names[0] in generated:
            for name in generated[1:]:
                schedule[name] = warp(base, order)

    for name, trust in strength.items():
        if trust == 1:
            schedule[name] = torch.zeros_like(base)
        elif trust == 0:
            schedule[name] = torch.ones_like(base)
            schedule[name][-1] = 0.0  # the last step ends with the given values
        else:
            schedule[name] = warp(base, 2 * math.log2((1 - trust) / trust))
    return schedule


# ---- Depth as pixels (Sec. 3.2) ----
# Depth is normalised and contracted, but no learned encoder mixes its pixels, so that single ones can carry a loss.


def contract(z):
    """mip-NeRF 360 contraction of z >= 0 into [0, 2): z up to 1, then 2 - 1/z."""
    return torch.where(z <= 1, z, 2 - 1 / z.clamp(min=1))


def uncontract(d):
    """Inverse of contract: [0, 2) -> [0, inf). Predictions outside of [0, 1.999] are clamped to it."""
    d = d.clamp(0, 1.999)
    return torch.where(d <= 1, d, 1 / (2 - d.clamp(min=1)))


def normalize_depth(depth, valid):
    """Divide depth by the mean of its valid pixels and contract it. The scale is lost: depth is relative from here on.

    Args: depth (B, 1, H, W) in any unit; valid (B, 1, H, W) bool, or None if no pixel is missing.
    Returns (B, 1, H, W) in [0, 2), 0 where a pixel is missing.
    """
    if valid is None:
        valid = torch.ones_like(depth, dtype=torch.bool)
    depth = torch.where(valid, depth, 0.0)
    count = valid.sum((1, 2, 3), keepdim=True).clamp(min=1)
    mean = depth.sum((1, 2, 3), keepdim=True) / count
    return contract(depth / mean.clamp(min=1e-12))


def complete_depth(relative, depth, valid, max_anchors=1024):
    """Correct predicted relative depth by the valid pixels of depth, and return it in the unit of depth.

    Where depth is valid, the result equals it. Elsewhere log(depth / relative) is interpolated from at most max_anchors
    valid pixels. Pixels are compared by (row, column, 2 log depth), where the longer side of the image is 2, so a
    correction does not spread across the edges of objects. This is ours, not the paper's. All arguments
    and the result: (B, 1, H, W).
    """
    positions = torch.ones_like(depth[0, 0]).nonzero() * (2 / max(depth.shape[2:]))  # (H * W, 2): row and column

    completed = []
    for prediction, truth, mask in zip(relative.clamp(min=1e-3), depth, valid, strict=True):
        index = mask.flatten().nonzero()[:, 0]
        if len(index):
            evenly = torch.linspace(0, len(index) - 1, min(len(index), max_anchors), device=depth.device)
            index = index[evenly.long()]
            points = torch.cat([positions, 2 * prediction.log().view(-1, 1)], 1)  # (H * W, 3)
            anchors = points[index]  # (A, 3)
            log_ratio = (truth / prediction).log().flatten()[index]  # (A,)

            # Simple kriging with covariance exp(-distance). The nugget keeps it solvable where anchors coincide.
            nugget = 1e-3 * torch.eye(len(anchors), device=depth.device)
            covariance = torch.exp(-torch.cdist(anchors, anchors)) + nugget
            center = log_ratio.median()
            coefficients = torch.linalg.solve(covariance, log_ratio - center)
            parts = [torch.exp(-torch.cdist(part, anchors)) @ coefficients for part in points.split(1 << 14)]
            prediction = prediction * (center + torch.cat(parts)).exp().view_as(prediction)
        completed.append(torch.where(mask, truth, prediction))
    return torch.stack(completed)


# ---- Modalities ----
# An entry says everything that the network, the losses and the sampler need to know of a modality.

# Modality.encode, decode and finish call the functions of these names. center is the middle of the encoded values.
Codec = namedtuple("Codec", "encode decode finish center")


def keep_values(x, valid=None):
    return x


ENCODINGS = {  # keys of Modality.encoding
    "plain": Codec(keep_values, keep_values, functools.partial(torch.clamp, min=-1, max=1), 0.0),  # such as images
    "relative depth": Codec(normalize_depth, uncontract, keep_values, 1.0),
    "unit vectors": Codec(keep_values, keep_values, F.normalize, 0.0),  # F.normalize: to length 1 over the channels
}


@dataclass(frozen=True)
class Modality:
    """One entry of the list that the network, the losses and the sampler loop over. Values are (B, C, H, W)."""

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
        for field, table in (("timesteps", TIMESTEPS), ("encoding", ENCODINGS), ("loss", LOSS_WEIGHTS)):
            key = getattr(self, field)
            if key not in table:
                raise ValueError(f"modality {self.name}: {field} is {key!r}, must be one of {', '.join(table)}")
        if not 0 <= self.p_clean <= 1:
            raise ValueError(f"modality {self.name}: p_clean is {self.p_clean}, must be from 0 to 1")

    def shape(self, size):
        """Image size (H, W) in pixels -> (C, h, w) of this modality's values."""
        return self.channels, size[0] // self.stride, size[1] // self.stride

    def loss_weight(self, t):
        """Weight of this modality's squared_error at noise level t, (B,) -> (B,)."""
        return self.weight * LOSS_WEIGHTS[self.loss](t)

    def encode(self, x, valid=None):
        """Stored values, valid (B, 1, H, W) bool or None -> the values that are diffused."""
        return ENCODINGS[self.encoding].encode(x, valid)

    def decode(self, x0):
        """Inverse of encode. What encode discards, such as the scale of depth, stays lost."""
        return ENCODINGS[self.encoding].decode(x0)

    def finish(self, x):
        """Turn decoded values into legal ones: clamp images to [-1, 1], scale normals to length 1."""
        return ENCODINGS[self.encoding].finish(x)


RGB = Modality("rgb", channels=3, id=0)
DEPTH = Modality("depth", channels=1, id=1, decoder_depth=4, timesteps="plateau", encoding="relative depth")
NORMAL = Modality("normal", channels=3, id=2, decoder_depth=4, timesteps="plateau", encoding="unit vectors")
MODALITIES = {m.name: m for m in (RGB, DEPTH, NORMAL)}


# ---- Configurations ----
# The sizes and modalities of a network.

TEXT_PATCH = 8  # bytes in a text token: a caption is patchified as an image is


@dataclass(frozen=True)
class Config:
    """Everything needed to build a network; checkpoints hold one. Raises ValueError if values do not fit together."""

    width: int
    depth: int  # blocks of the trunk
    head: int  # channels of an attention head: width / head query heads, a quarter as many key/value heads
    patch: int  # side of a token in image pixels: all modalities cover the image with the same grid of tokens
    size: int  # default side of the images; any height and width that the patch divides works at call time
    decoder_depth: int = 4  # with_modalities reduces the decoder_depth of an entry to this, if it is larger
    text_length: int = 160  # bytes of a caption, TEXT_PATCH to a token; or, with text_dim, embeddings
    text_dim: int = 0  # channels of a frozen encoder's text embeddings; 0 is bytes
    modalities: tuple = (RGB,)  # the first is the image

    def __post_init__(self):
        # A checkpoint holds dictionaries.
        entries = [entry if isinstance(entry, Modality) else Modality(**entry) for entry in self.modalities]
        object.__setattr__(self, "modalities", tuple(entries))

        self.check_heads()
        if not self.text_dim and self.text_length % TEXT_PATCH:
            raise ValueError(f"text_length is {self.text_length}, must be a multiple of {TEXT_PATCH} bytes")
        for m in entries:
            if self.patch % m.stride:
                raise ValueError(f"patch is {self.patch}, must be a multiple of the stride of {m.name}, {m.stride}")
        if len({m.name for m in entries}) < len(entries) or len({m.id for m in entries}) < len(entries):
            raise ValueError("modalities must have different names and ids")

    def check_heads(self):
        if self.head % 16:
            raise ValueError(f"head is {self.head}, must be a multiple of 16")
        if self.width % (4 * self.head):
            raise ValueError(f"width is {self.width}, must be a multiple of 4 x head, {4 * self.head}")

    def build(self):
        """A new network with random weights."""
        return DiT(self)

    def with_modalities(self, *entries):
        """This config with the given entries; their decoders are at most as deep as decoder_depth."""
        entries = [replace(m, decoder_depth=min(m.decoder_depth, self.decoder_depth)) for m in entries]
        return replace(self, modalities=tuple(entries))

    def with_encoders(self, encoders):
        """This config with the image latents and text embeddings of frozen encoders (data.PixelsAndBytes)."""
        stride = encoders.image_stride
        patch = max(1, self.patch // stride) * stride  # rounded, so that the token grids of all modalities coincide
        image = replace(self.modalities[0], channels=encoders.image_channels, stride=stride)
        config = replace(self, patch=patch, modalities=(image, *self.modalities[1:]))
        return replace(config, text_dim=encoders.text_dim, text_length=encoders.text_length)

    def fit(self, height, width, side):
        """The size (H, W) that keeps the aspect, is near side x side pixels in area, and is a multiple of the patch."""
        scale = side / (height * width) ** 0.5 / self.patch
        return tuple(max(1, round(n * scale)) * self.patch for n in (height, width))


PRESETS = {  # text-to-image networks; with_modalities replaces their list of modalities
    "nano": Config(width=128, depth=6, head=32, patch=4, size=32, decoder_depth=1),
    "tiny": Config(width=256, depth=10, head=64, patch=4, size=64, decoder_depth=2),
    "small": Config(width=512, depth=14, head=64, patch=8, size=128, decoder_depth=2, text_length=256),
    "370m": Config(width=1024, depth=30, head=64, patch=16, size=256, text_length=512),
    "800m": Config(width=1536, depth=30, head=64, patch=16, size=256, text_length=512),
    "3b": Config(width=3072, depth=30, head=128, patch=16, size=256, text_length=512),
}


# ---- Sampler, checkpoints and optimizers ----


class Denoiser(nn.Module):
    """What all networks share. DiT, below, is ours; extras/flux2.py has another.

    A network has these members beside those here:
        config_type, block_types  its type of config, and the types of its blocks
        config, modalities        set by __init__(config)
        forward(noisy, t, text)   predicts x0_hat, as DiT.forward
        copies(m)                 {parameter of a new modality m: parameter of the image that it is copied from}
    """

    fresh_names = frozenset()  # of the parameters that warm_start did not load

    @torch.no_grad()
    def sample(
        self, schedule, noise, text, given=None, guidance=None, guidance_interval=(0, 1), callback=None, no_text=None
    ):
        """Generate all modalities that are not given, along a schedule of noise levels.

        Args:
            schedule: {m: S + 1 noise levels}, as from make_schedule. Its keys are the inputs of the network.
            noise: {m: (B, C, H, W)} from N(0, 1).
            text: as in forward.
            given: {m: (encoded values (B, C, H, W), valid (B, 1, H, W) bool or None)}. Before every step they are
                noised to the level in their row, as in training: missing pixels are noise.
            guidance: {m: scale} of classifier-free guidance at noise levels in guidance_interval. 1 is no guidance.
            callback: called with {m: x_t} after each step.
            no_text: text of the guidance's second prediction, (1, L) or (1, L, text_dim); by default zeros.
        Returns {m: encoded values (B, C, H, W)}.
        """
        given = given or {}
        guidance = guidance or {}
        low, high = guidance_interval
        no_text = torch.zeros_like(text[:1]) if no_text is None else no_text
        names = [m.name for m in self.modalities if m.name in schedule]
        table = torch.stack([torch.as_tensor(schedule[name], dtype=torch.float64) for name in names], 1)  # (S + 1, M)
        levels = [dict(zip(names, row, strict=True)) for row in table.tolist()]

        def batch_level(t):
            return torch.full((len(text),), t, device=text.device)

        def noised(t):
            """The given values at noise levels t (Eq. 5)."""
            return {name: corrupt(x0, noise[name], batch_level(t[name]), valid) for name, (x0, valid) in given.items()}

        x = {name: noise[name] for name in names}
        x.update(noised(levels[0]))
        for t, s in itertools.pairwise(levels):  # a step from noise levels t to s
            t_batch = {name: batch_level(t[name]) for name in names}
            x0_hat = self(x, t_batch, text)
            moving = [name for name in names if name not in given and s[name] < t[name]]
            guided = [name for name in moving if guidance.get(name, 1) != 1 and low <= t[name] <= high]
            if guided:
                without_text = self(x, t_batch, no_text.expand_as(text))
                for name in guided:
                    x0_hat[name] = torch.lerp(without_text[name], x0_hat[name], float(guidance[name]))
            x = dict(x)  # a copy, since callback may have kept the last x
            for name in moving:  # Euler's step on the velocity that x0_hat implies
                x[name] = x0_hat[name] + s[name] / t[name] * (x[name] - x0_hat[name])
            x.update(noised(s))
            if callback:
                callback(x)
        return x

    @classmethod
    def from_checkpoint(cls, state):
        """Build the averaged network of a checkpoint, frozen. Raises ValueError if the checkpoint is wrong.

        Its weights stay where state has them, and keep their type. Call place before you run the network.
        """
        try:
            with torch.device("meta"):
                network = cls(cls.config_type(**state["config"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"its config is wrong: {error}") from None

        check_weights(state["ema"], network)
        for name, weight in state["ema"].items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is not finite")
        network.load_state_dict(state["ema"], assign=True)
        return network.requires_grad_(False)

    def warm_start(self, weights):
        """Load the weights of a network of fewer modalities (Sec. 3.2).

        Parameters of a new modality that copies and tokenize_as_image return start from the image's weights. The others
        stay as they are, and self.fresh_names lists them. The network shares the tensors in weights until place copies
        them. Raises ValueError if weights do not fit.
        """
        added = [m for m in self.modalities[1:] if not self.copies(m).keys() <= weights.keys()]
        with torch.device("meta"):
            smaller = replace(self.config, modalities=[m for m in self.modalities if m not in added]).build()
        try:
            check_weights(weights, smaller)
        except ValueError as error:
            raise ValueError(f"its network does not fit this one ({error})") from None
        weights = dict(weights)
        for m in added:
            for name, source in self.copies(m).items():
                weights[name] = weights[source]
            weights.update(self.tokenize_as_image(m, weights))
        self.fresh_names = self.state_dict().keys() - weights.keys()
        self.load_state_dict(weights, strict=False, assign=True)

    def tokenize_as_image(self, m, weights):
        """{parameter: first value} of the tokenizer of a new modality. By default it starts at random."""
        return {}

    def place(self, device, frozen=False, shard=None):
        """Copy the weights to a device, in the default type. Frozen networks have bfloat16 matrices in blocks on CUDA.

        With shard (FSDP2's fully_shard), each block is moved and sharded before the next one, so that a GPU never holds
        the whole network.
        """
        half_ids = {id(p) for p in self.matrices()} if frozen and device.type == "cuda" else ()
        modules = [*self.all_blocks(), self] if shard else [self]
        for module in modules:
            for parameter in module.parameters():
                if not isinstance(parameter, DTensor):  # those of the blocks are sharded already
                    dtype = torch.bfloat16 if id(parameter) in half_ids else torch.get_default_dtype()
                    parameter.data = parameter.data.to(device, dtype, copy=True)
            if shard:
                shard(module)
        return self

    def all_blocks(self):
        """The blocks of the trunk and of the decoders."""
        return [module for module in self.modules() if isinstance(module, self.block_types)]

    def checkpoint_activations(self):
        """From now on keep only each block's input, and compute the rest again in the backward pass."""
        for block in self.all_blocks():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def compile_blocks(self):
        """torch.compile every block. Blocks of one kind share a graph, and those of a decoder have another."""
        torch._dynamo.config.optimize_ddp = False  # do not split a block's graph at the gradient buckets of DDP
        for block in self.all_blocks():
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)

    def matrices(self):
        """The parameters that Muon updates: the blocks' matrices."""
        layers = [module for block in self.all_blocks() for module in block.modules() if isinstance(module, nn.Linear)]
        return [layer.weight for layer in layers]

    def configure_optimizers(self, lr, optimizer, beta2, weight_decay):
        """[AdamW, Muon for the blocks' matrices], or [AdamW] for everything. beta2 is AdamW's.

        Only Muon's matrices decay. Without it, the matrices of queries and keys grow. Queries and keys are normalised,
        so growth does not change what the network computes, but makes each update relatively smaller.

        The parameters in self.fresh_names have groups of their own, marked by the key "fresh".
        """
        matrices = self.matrices() if optimizer == "muon" else []
        matrix_ids = {id(p) for p in matrices}
        rest = [p for p in self.parameters() if id(p) not in matrix_ids]
        fresh_ids = {id(p) for name, p in self.named_parameters() if name in self.fresh_names}

        def groups(parameters):
            pretrained = [p for p in parameters if id(p) not in fresh_ids]
            fresh = [p for p in parameters if id(p) in fresh_ids]
            return [{"params": params, "fresh": params is fresh} for params in (pretrained, fresh) if params]

        optimizers = [torch.optim.AdamW(groups(rest), lr=lr, betas=(0.9, beta2), weight_decay=0.0, fused=True)]
        if matrices:
            if matrices[0].device.type == "cpu":  # private to torch; if torch renames it, steps are slower, not wrong
                torch.optim._muon._zeropower_via_newtonschulz = orthogonalize
            muon = torch.optim.Muon(groups(matrices), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            optimizers.append(muon)
        return optimizers


# ---- Network (Sec. 4.1) ----
# A flat-token DiT: one sequence [text | first modality | second modality | ...], one stack of blocks for all of it.


def timestep_sinusoids(t):
    """Noise levels t (B,) in [0, 1] -> (B, 256): cosines, then sines, of 1000 t at 128 rates from 1 down to 1/10000."""
    rates = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angles = 1000 * t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimestepEmbedder(nn.Module):
    """Noise level t (B,) in [0, 1] -> (B, D)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(timestep_sinusoids(t))


def token_positions(modality_id, rows, columns, device=None):
    """Rotary positions of the tokens of an image, (rows * columns, 4): (modality id, row, column, 0)."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return F.pad(F.pad(grid, (1, 0), value=modality_id), (0, 1))


def rope_angles(positions, head_dim):
    """Multi-axis RoPE: positions (N, 4) of (modality, row, column, text position) -> angles (N, head_dim / 2)."""
    angles = []
    for axis, eighths in enumerate((1, 3, 3, 1)):  # the share of the channels that turn with the axis
        num_rates = head_dim // 2 * eighths // 8
        rates = 100.0 ** -(torch.arange(num_rates, device=positions.device) / num_rates)
        angles.append(positions[:, axis, None] * rates)
    return torch.cat(angles, -1)


def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + E / 2) of x (B, N, heads, E = head_dim) by angles: cos, sin (N, 1, E / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """Attention and SwiGLU in parallel on one normalised input, RMSNorm before and after.

    The residual stream, norms and modulation are float32; linear layers, attention and SwiGLU follow autocast.
    """

    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.query_heads = width // head_dim
        self.key_heads = width // head_dim // 4  # grouped-query attention
        qk_width = (self.query_heads + self.key_heads) * head_dim
        self.split = [qk_width, self.key_heads * head_dim, 3 * width, 3 * width]  # q and k, v, gate, up
        self.pre_norm = nn.RMSNorm(width, eps=1e-6)
        self.fused_in = nn.Linear(width, sum(self.split), bias=False)
        self.qk_scale = nn.Parameter(torch.ones(self.query_heads + self.key_heads, head_dim))
        self.fused_out = nn.Linear(4 * width, width, bias=False)
        self.post_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, x, modulation, rope):
        """x (B, N, D); modulation (shift, scale, gate), each (B, N, D) or (B, 1, D); rope (cos, sin). -> (B, N, D).

        All are float32 and x is contiguous, so that torch.compile reuses the first block's graph for the others.
        """
        shift, scale, gate = modulation
        h = torch.addcmul(shift, self.pre_norm(x), 1 + scale)  # (B, N, D)
        qk, v, ffn_gate, ffn_up = self.fused_in(h).split(self.split, -1)

        qk = qk.unflatten(-1, (-1, self.head_dim))  # (B, N, heads, head_dim)
        v = v.unflatten(-1, (-1, self.head_dim))
        qk = F.rms_norm(qk.float(), (self.head_dim,)) * self.qk_scale
        qk = rotate(qk, *rope).to(v.dtype).transpose(1, 2)  # (B, heads, N, head_dim)
        q, k = qk.split([self.query_heads, self.key_heads], 1)
        attention = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), enable_gqa=True)
        attention = attention.transpose(1, 2).flatten(2)  # (B, N, D)

        ffn = F.silu(ffn_gate) * ffn_up  # (B, N, 3 D)
        out = self.fused_out(torch.cat([attention, ffn], -1))
        return torch.addcmul(x, gate, self.post_norm(out.float()))


class Decoder(nn.Module):
    """Tokens of one modality -> its values: self-attention blocks (the paper's detokenizer), then an adaLN linear."""

    def __init__(self, config, modality):
        super().__init__()
        width = config.width
        num_values = modality.channels * (config.patch // modality.stride) ** 2
        self.blocks = nn.ModuleList(Block(width, config.head) for _ in range(modality.decoder_depth))
        if self.blocks:
            self.block_modulation = nn.Linear(width, 3 * width, bias=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, num_values)

    def forward(self, x, vector, rope):
        """x (B, n, D), conditioning vector (B, D), rope (cos, sin) of these tokens -> (B, n, C * patch^2)."""
        vector = F.silu(vector)[:, None]  # (B, 1, D)
        if self.blocks:
            modulation = self.block_modulation(vector).float().chunk(3, -1)
            x = x.clone(memory_format=torch.contiguous_format)  # a slice of the whole sequence is not contiguous
            for block in self.blocks:
                x = block(x, modulation, rope)
        shift, scale = self.modulation(vector).chunk(2, -1)
        device = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        with torch.autocast(device, enabled=False):  # bfloat16 here shows as bands
            x = F.rms_norm(x.float(), x.shape[-1:]) * (1 + scale.float()) + shift.float()
            return self.head(x)


# On CUDA, linear layers and attention run in bfloat16; other devices stay in float32. Autocast's cache is off: it would
# keep bfloat16 copies of all weights until the end of the forward pass.
mixed_precision = torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available(), cache_enabled=False)


class DiT(Denoiser):
    """Flat-token diffusion transformer over text and any number of modalities."""

    config_type = Config
    block_types = (Block,)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.modalities = config.modalities
        width = config.width
        names = [m.name for m in self.modalities]
        num_values = {m.name: m.channels * (config.patch // m.stride) ** 2 for m in self.modalities}
        pairs = [f"{a}_to_{b}" for a, b in itertools.permutations(names, 2)]

        self.text_bytes = None if config.text_dim else nn.Embedding(256, 32)
        self.text_tokenizer = nn.Linear(config.text_dim or 32 * TEXT_PATCH, width)
        self.tokenizers = nn.ModuleDict({name: nn.Linear(num_values[name], width) for name in names})
        self.time_embedders = nn.ModuleDict({name: TimestepEmbedder(width) for name in names})
        self.cross_time_embedders = nn.ModuleDict({pair: TimestepEmbedder(width) for pair in pairs})
        self.modulations = nn.ModuleDict({name: nn.Linear(width, 3 * width, bias=False) for name in names})
        self.blocks = nn.ModuleList(Block(width, config.head) for _ in range(config.depth))
        self.decoders = nn.ModuleDict({m.name: Decoder(config, m) for m in self.modalities})
        self.initialize()

    def initialize(self):
        """Set linear layers to Xavier weights and zero biases, but modulations, mixing and final layers to zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        zeroed = list(self.modulations.values())
        zeroed += [embedder.mlp[-1] for embedder in self.cross_time_embedders.values()]
        for decoder in self.decoders.values():
            zeroed += [module for module in decoder.children() if isinstance(module, nn.Linear)]
        for parameter in nn.ModuleList(zeroed).parameters():
            nn.init.zeros_(parameter)

    @mixed_precision
    def forward(self, noisy, t, text):
        """Predict the clean values of any subset of the modalities: x0_hat = g(x_t, t, text) of Sec. 3.1.

        noisy and the result are {m: (B, C, H, W)}; t {m: (B,)} is in [0, 1]; text is bytes (B, L) uint8, or embeddings
        (B, L, text_dim).
        """
        inputs = [m for m in self.modalities if m.name in noisy]
        vectors = self.conditioning_vectors(inputs, t)  # {m: (B, D)}

        # One sequence of tokens: [text | modality | modality | ...].
        if self.text_bytes is not None:
            text = self.text_bytes(text.long())  # (B, L, 32)
            text = text.unflatten(1, (-1, TEXT_PATCH)).flatten(2)  # (B, N_text, 32 * TEXT_PATCH)
        tokens = [self.text_tokenizer(text)]  # (B, N_text, D)
        text_positions = torch.arange(tokens[0].shape[1], device=text.device)
        positions = [F.pad(text_positions[:, None], (3, 0))]  # (N_text, 4): (0, 0, 0, text position)
        grids = {}
        for m in inputs:
            patches = F.pixel_unshuffle(noisy[m.name], self.config.patch // m.stride)  # (B, C * patch^2, rows, columns)
            grids[m.name] = patches.shape[2:]
            tokens.append(self.tokenizers[m.name](patches.flatten(2).transpose(1, 2)))  # (B, rows * columns, D)
            positions.append(token_positions(m.id, *grids[m.name], text.device))  # (rows * columns, 4)
        lengths = [part.shape[1] for part in tokens]

        # The vector of a modality modulates its tokens. The vector of the first input also modulates the text.
        modulations = []
        for m, length in zip([inputs[0], *inputs], lengths, strict=True):
            modulation = self.modulations[m.name](F.silu(vectors[m.name]))  # (B, 3 D)
            modulations.append(modulation[:, None].expand(-1, length, -1))
        modulation = torch.cat(modulations, 1).float().chunk(3, -1)  # shift, scale and gate, each (B, N, D)

        # The trunk: all its blocks share the modulation.
        x = torch.cat(tokens, 1).float()  # (B, N, D)
        angles = rope_angles(torch.cat(positions), self.config.head)[:, None]  # (N, 1, head_dim / 2)
        rope = (angles.cos(), angles.sin())
        for block in self.blocks:
            x = block(x, modulation, rope)

        # Each modality's tokens go back to values. The text's tokens, which come first, are left out.
        x0_hat = {}
        for m, m_tokens, m_angles in zip(inputs, x.split(lengths, 1)[1:], angles.split(lengths)[1:], strict=True):
            m_rope = (m_angles.cos(), m_angles.sin())
            values = self.decoders[m.name](m_tokens, vectors[m.name], m_rope)  # (B, rows * columns, C * patch^2)
            values = values.transpose(1, 2).unflatten(2, grids[m.name])  # (B, C * patch^2, rows, columns)
            x0_hat[m.name] = F.pixel_shuffle(values, self.config.patch // m.stride)  # (B, C, H, W)
        return x0_hat

    def conditioning_vectors(self, inputs, t):
        """Cross-stream mixing: c_m = e_m(t_m) + sum over other modalities o of e_om(t_o) (Sec. 3.2). {m: (B, D)}."""
        vectors = {}
        for m in inputs:
            vector = self.time_embedders[m.name](t[m.name])
            for other in inputs:
                if other is not m:
                    vector = vector + self.cross_time_embedders[f"{other.name}_to_{m.name}"](t[other.name])
            vectors[m.name] = vector
        return vectors

    def copies(self, m):
        """Modulation and timestep embedder of m -> those of the image, by names of parameters."""
        image = self.modalities[0]
        embedder = [f"time_embedders.{m.name}.{name}" for name, _ in self.time_embedders[m.name].named_parameters()]
        names = [f"modulations.{m.name}.weight", *embedder]
        return {name: name.replace(f".{m.name}.", f".{image.name}.") for name in names}

    def tokenize_as_image(self, m, weights):
        """A tokenizer that treats a clean map of m as a grey image, or as an image if it has as many channels.

        The middle of its values is mid-grey. The blocks know such tokens, so they use a new modality from the start and
        learn images from depth early (RESULTS.md). With another stride, the tokenizer starts at random.
        """
        image = self.modalities[0]
        if m.stride != image.stride:
            return {}
        weight = weights[f"tokenizers.{image.name}.weight"]  # (D, C * patch^2)
        bias = weights[f"tokenizers.{image.name}.bias"]
        if m.channels != image.channels:
            grey = weight.unflatten(1, (image.channels, -1)).sum(1)  # (D, patch^2)
            weight = grey.repeat(1, m.channels) / m.channels
        bias = bias - ENCODINGS[m.encoding].center * weight.sum(1)
        return {f"tokenizers.{m.name}.weight": weight, f"tokenizers.{m.name}.bias": bias}


def check_weights(weights, network):
    """Raise ValueError unless weights {name: tensor} have all names and shapes of the network."""
    expected = network.state_dict()

    def listed(names):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return ", ".join(sorted(names)[:5]) + more

    missing = expected.keys() - weights.keys()
    unknown = weights.keys() - expected.keys()
    if missing:
        raise ValueError(f"it lacks {listed(missing)}")
    if unknown:
        raise ValueError(f"it holds {listed(unknown)}, which the network does not have")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, must have {tuple(expected[name].shape)}")


def training_cost(config, size):
    """(parameters, FLOPs per image) of training on images of size (H, W): matmuls and attention, both passes."""
    with torch.device("meta"):  # nothing is computed
        network = config.build()
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


def orthogonalize(gradient, coefficients, steps, eps):
    """Muon's iteration x <- (a + b G + c G^2) x with G = x x^T, which brings the singular values of x (n, m) near 1.

    torch's own is in bfloat16, which is 20 times slower on most CPUs. This one iterates G and multiplies x at the end.
    """
    if isinstance(gradient, DTensor):  # with --shard every rank iterates on the whole matrix, and keeps its part
        whole = orthogonalize(gradient.full_tensor(), coefficients, steps, eps)
        return distribute_tensor(whole, gradient.device_mesh, gradient.placements, src_data_rank=None)
    if gradient.shape[0] > gradient.shape[1]:
        return orthogonalize(gradient.T, coefficients, steps, eps).T
    a, b, c = coefficients
    x = gradient / gradient.norm().clamp(min=eps)
    gram = x @ x.T
    identity = torch.eye(len(x))
    product = identity
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x
