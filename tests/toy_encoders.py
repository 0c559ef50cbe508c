"""Frozen encoders without weights, for tests: an orthonormal transform of 2x2 pixels, a vector for every word."""

import zlib

import torch
import torch.nn.functional as F

HADAMARD = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
MATRIX = torch.block_diag(*[HADAMARD] * 3)  # of the four pixels of each colour


class Encoders:
    image_channels = 12
    image_stride = 2
    text_dim = 16
    text_length = 20

    def __init__(self, device):
        self.matrix = MATRIX.to(device)

    def encode_image(self, rgb):
        return torch.einsum("oc,bchw->bohw", self.matrix, F.pixel_unshuffle(rgb, 2))

    def decode_image(self, latents):
        return F.pixel_shuffle(torch.einsum("oc,bohw->bchw", self.matrix, latents), 2)

    @torch.inference_mode()  # as an encoder may do: nothing may change its result in place
    def encode_text(self, captions):
        text = torch.zeros(len(captions), self.text_length, self.text_dim)
        for row, line in zip(text, captions, strict=True):
            for token, word in zip(row, line.split(), strict=False):
                generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                token.copy_(torch.randn(self.text_dim, generator=generator))
        return text


class CoarseEncoders(Encoders):
    """For tests/tiny_flux2.py: a latent of 48 channels for 16 x 16 pixels, and "nothing" where there is no caption."""

    image_channels = 48
    image_stride = 16

    def encode_image(self, rgb):
        return F.pixel_unshuffle(F.avg_pool2d(rgb, 4), 4)

    def decode_image(self, latents):
        return F.interpolate(F.pixel_shuffle(latents, 4), scale_factor=4)

    def encode_text(self, captions):
        return super().encode_text([caption or "nothing" for caption in captions])


load = Encoders
