"""HunyuanVideo's VAE and its two text encoders: videos and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before. Each video and caption is
encoded by itself, so that no record depends on its neighbours. A caption goes into a template, whose own tokens are cut
off what the language model says of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from transpixeler.families.hunyuan.config import TEXT_LEN
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import (
    Encoder,
    LatentVae,
    Network,
    fingerprint,
    folder_with,
    load_network,
    load_tokenizer,
)
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.streams import Grid

EXAMPLE = "hunyuanvideo-community/HunyuanVideo"
VAE_CONFIG = "vae/config.json"
_VAE_FILES = ("vae/*",)
_TEXT_FILES = ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*")
_TEXT_CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")
_CLIP_LEN = 77

# The words that the model was trained with around a caption, and how many tokens come before the caption.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
TEMPLATE_LEN = 95
LAYER = -3  # of the language model's hidden states: the last two layers are not asked


class HunyuanVae(LatentVae):
    """`AutoencoderKLHunyuanVideo`, which takes 16 frames at a time, and large ones tile by tile, as its authors do."""

    tiled_latents = 64 * 64  # 512×512: the mask of its attention grows with the square of a frame
    tiled_pixels = 512 * 512


class HunyuanTextEncoder(Encoder):
    """A language model's rows for the caption and CLIP's one vector."""

    def __init__(
        self, llama: Network, clip: Network, tokenizers: tuple[Network, Network], path: str | Path,
        *, device: torch.device,
    ) -> None:  # fmt: skip
        """tokenizers: of the language model and of CLIP."""
        self.clip, self.tokenizers = clip.eval().requires_grad_(False), tokenizers
        super().__init__(llama, partial(text_fingerprint, path), device=device)

    def to(self, device: torch.device) -> HunyuanTextEncoder:
        self.clip.to(device)
        return super().to(device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's rows [true length, width] and its vector [width]."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> dict[str, Tensor]:
        tokenize, tokenize_clip = self.tokenizers
        ids = tokenize(
            TEMPLATE.format(text), truncation=True, max_length=TEMPLATE_LEN + TEXT_LEN, return_tensors="pt"
        ).input_ids
        rows = self.network(input_ids=ids.to(self.device), output_hidden_states=True).hidden_states[LAYER]
        padded = {"padding": "max_length", "truncation": True, "max_length": _CLIP_LEN}
        ids = tokenize_clip(text, return_tensors="pt", **padded).input_ids
        return {"text": rows[0, TEMPLATE_LEN:], "pooled": self.clip(input_ids=ids.to(self.device)).pooler_output[0]}


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> HunyuanVae:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    place = _vae_folder(path)
    network = load_network(AutoencoderKLHunyuanVideo, place / "vae", dtype=dtype)
    with naming_damage(place / VAE_CONFIG):
        deviation = torch.ones(network.config.latent_channels) / network.config.scaling_factor
    return HunyuanVae(network, (torch.zeros_like(deviation), deviation), partial(vae_fingerprint, path), device=device)


def load_text_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> HunyuanTextEncoder:
    from transformers import CLIPTextModel, LlamaModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    folder = _text_folder(path)
    llama = load_network(LlamaModel, folder / "text_encoder", dtype=dtype)
    clip = load_network(CLIPTextModel, folder / "text_encoder_2", dtype=dtype)
    tokenizers = load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "tokenizer_2")
    return HunyuanTextEncoder(llama, clip, tokenizers, path, device=device)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached latents depend on, without loading a weight."""
    return fingerprint(_vae_folder(path), _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def vae_geometry(path: str | Path) -> tuple[Grid, int]:
    """Return (stride in frames, height and width; latent channels), read off the config."""
    place = _vae_folder(path, only=(VAE_CONFIG,)) / VAE_CONFIG
    config = read_config(place)
    with naming_damage(place):
        side = config["spatial_compression_ratio"]
        return (config["temporal_compression_ratio"], side, side), config["latent_channels"]


def _vae_folder(path: str | Path, *, only: Sequence[str] = _VAE_FILES) -> Path:
    return folder_with(path, [(VAE_CONFIG,)], "VAE", only=only, example=EXAMPLE)


def _text_folder(path: str | Path) -> Path:
    return folder_with(path, [_TEXT_CONFIGS], "pair of text encoders", only=_TEXT_FILES, example=EXAMPLE)
