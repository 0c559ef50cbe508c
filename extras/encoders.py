"""Frozen encoders: images become latents, and captions become embeddings. They need diffusers and transformers.

    --encoders extras/encoders.py:Klein:FOLDER         the autoencoder and the Qwen3 of FLUX.2 [klein]
    --encoders extras/encoders.py:Klein:FOLDER,CACHE   the same; embeddings are kept in the folder CACHE
    --encoders extras/encoders.py:UMT5:FOLDER,T5       the autoencoder, and UMT5 from the folder T5

FOLDER is a published FLUX.2 [klein], with vae/, text_encoder/ and tokenizer/. Nothing is downloaded. docs/backbone.md
has the commands, and what a cache takes on the disk. data.PixelsAndBytes documents the members of an encoder.
"""

import hashlib
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F


class Flux2Autoencoder:
    """Images as latents of FLUX.2's autoencoder: 2 x 2 become one, normalised by the statistics stored with it."""

    def __init__(self, device, folder):
        from diffusers import AutoencoderKLFlux2

        self.device = device
        # Only the text encoder runs in bfloat16; images need float32.
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        vae = AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae", local_files_only=True).float()
        self.vae = vae.to(device).requires_grad_(False)
        statistics = vae.bn  # the layer never runs: it only stores the mean and variance of each channel
        self.mean = statistics.running_mean.view(-1, 1, 1)
        self.std = (statistics.running_var + statistics.eps).sqrt().view(-1, 1, 1)
        self.image_channels = statistics.num_features
        self.image_stride = 2 * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode_image(self, rgb):
        latents = self.vae.encode(rgb).latent_dist.mode()
        return (F.pixel_unshuffle(latents, 2) - self.mean) / self.std

    def decode_image(self, latents):
        latents = F.pixel_shuffle(latents * self.std + self.mean, 2)
        return self.vae.decode(latents).sample.clamp(-1, 1)


class Klein(Flux2Autoencoder):
    """Captions as FLUX.2 [klein] reads them: three hidden layers of Qwen3, side by side."""

    layers = (9, 18, 27)
    text_length = 512

    def __init__(self, device, folder, cache=None):
        from transformers import AutoConfig

        super().__init__(device, folder)
        self.folder = folder
        self.cache = Path(cache) if cache else None
        self.qwen = None
        config = AutoConfig.from_pretrained(folder, subfolder="text_encoder", local_files_only=True)
        self.text_dim = len(self.layers) * config.hidden_size

    def load_qwen(self):
        """Load the tokenizer and Qwen3, up to the last layer that is read."""
        from transformers import AutoModel, AutoTokenizer

        options = {"dtype": self.dtype, "local_files_only": True}
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, subfolder="tokenizer", local_files_only=True)
        self.qwen = AutoModel.from_pretrained(self.folder, subfolder="text_encoder", **options)
        self.qwen.layers = self.qwen.layers[: max(self.layers)]
        self.qwen.norm = torch.nn.Identity()  # it would normalise the last layer alone
        self.qwen.to(self.device).requires_grad_(False)

    def embed(self, captions):
        """Captions -> (B, L, D). Padding has embeddings, too: the network was trained with them."""
        if self.qwen is None:
            self.load_qwen()
        chats = []
        for caption in captions:
            turn = [{"role": "user", "content": caption}]
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
            chats.append(self.tokenizer.apply_chat_template(turn, **options))
        options = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        tokens = self.tokenizer(chats, return_tensors="pt", **options).to(self.device)
        outputs = self.qwen(tokens.input_ids, tokens.attention_mask, output_hidden_states=True, use_cache=False)
        return torch.cat([outputs.hidden_states[layer] for layer in self.layers], -1)

    @torch.no_grad()
    def encode_text(self, captions):
        if self.cache is None:
            return self.embed(captions).float()
        rows = [self.read_or_embed(caption) for caption in captions]
        return torch.stack(rows).to(self.device).float()

    def read_or_embed(self, caption):
        """The embedding of a caption (L, D) from its file in the cache, which is written when it is first needed."""
        path = self.cache / f"{hashlib.sha256(caption.encode()).hexdigest()}.pt"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{uuid.uuid4().hex}")  # another rank may write the same caption
            torch.save(self.embed([caption])[0].to(self.dtype).cpu(), part)
            part.replace(path)
        return torch.load(path, weights_only=True)


class UMT5(Flux2Autoencoder):
    """Captions as the paper's scaling study reads them: the last hidden layer of UMT5. No caption is all zeros."""

    text_length = 256

    def __init__(self, device, folder, umt5):
        from transformers import AutoTokenizer, UMT5EncoderModel

        super().__init__(device, folder)
        self.tokenizer = AutoTokenizer.from_pretrained(umt5, local_files_only=True)
        self.text = UMT5EncoderModel.from_pretrained(umt5, dtype=self.dtype, local_files_only=True)
        self.text.to(device).requires_grad_(False)
        self.text_dim = self.text.config.d_model

    def encode_text(self, captions):
        options = {"padding": "max_length", "truncation": True, "max_length": self.text_length}
        tokens = self.tokenizer(captions, return_tensors="pt", **options).to(self.device)
        hidden = self.text(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state.float()
        has_text = torch.tensor([[bool(caption.strip())] for caption in captions], device=self.device)
        return hidden * (tokens.attention_mask * has_text)[..., None]
