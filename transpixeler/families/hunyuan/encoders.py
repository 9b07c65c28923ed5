"""HunyuanVideo's VAE and its two text encoders: videos and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before. Each video and caption is
encoded by itself, so that no record depends on its neighbours. A caption goes into a template, whose own tokens are cut
off what the language model says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from transpixeler.families.hunyuan.config import TEXT_LEN
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import (
    ROWS,
    VECTOR,
    ClipTextEncoder,
    LatentVae,
    TextAndClipEncoder,
    fingerprint,
    folder_with,
    load_clip_text,
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


class HunyuanTextEncoder(TextAndClipEncoder):
    """A language model's rows for the caption, as many as it has tokens, and CLIP's one vector."""

    def rows(self, text: str) -> Tensor:
        limit = {"truncation": True, "max_length": self.length}
        ids = self.tokenizer(TEMPLATE.format(text), return_tensors="pt", **limit).input_ids
        found = self.network(input_ids=ids.to(self.device), output_hidden_states=True).hidden_states[LAYER]
        return found[0, TEMPLATE_LEN:]


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> HunyuanVae:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    place = _vae_folder(path)
    network = load_network(AutoencoderKLHunyuanVideo, place / "vae", dtype=dtype)
    with naming_damage(place / VAE_CONFIG):
        deviation = torch.ones(network.config.latent_channels) / network.config.scaling_factor
    return HunyuanVae(network, (torch.zeros_like(deviation), deviation), partial(vae_fingerprint, path), device=device)


def load_text_encoder(
    path: str | Path, *, device: torch.device, dtype: torch.dtype, part: str = ""
) -> HunyuanTextEncoder | ClipTextEncoder:
    """part: the field of one of the two networks, to load it alone."""
    from transformers import LlamaModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    folder, hashed = text_folder(path), partial(text_fingerprint, path)
    if part == VECTOR:
        return load_clip(folder, hashed, device=device, dtype=dtype)
    llama = load_network(LlamaModel, folder / "text_encoder", dtype=dtype)
    tokenizer, length = load_tokenizer(folder / "tokenizer"), TEMPLATE_LEN + TEXT_LEN
    clip = None if part == ROWS else load_clip(folder, hashed, device=device, dtype=dtype)
    return HunyuanTextEncoder(llama, tokenizer, clip, length, hashed, device=device)


def load_clip(folder: Path, hashed: Callable[[], str], *, device: torch.device, dtype: torch.dtype) -> ClipTextEncoder:
    return load_clip_text(folder / "text_encoder_2", folder / "tokenizer_2", hashed, device=device, dtype=dtype)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached latents depend on, without loading a weight."""
    return fingerprint(_vae_folder(path), _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(text_folder(path), _TEXT_FILES, digest)


def vae_geometry(path: str | Path) -> tuple[Grid, int]:
    """Return (stride in frames, height and width; latent channels), read off the config."""
    place = _vae_folder(path, only=(VAE_CONFIG,)) / VAE_CONFIG
    config = read_config(place)
    with naming_damage(place):
        side = config["spatial_compression_ratio"]
        return (config["temporal_compression_ratio"], side, side), config["latent_channels"]


def _vae_folder(path: str | Path, *, only: Sequence[str] = _VAE_FILES) -> Path:
    return folder_with(path, [(VAE_CONFIG,)], "VAE", only=only, example=EXAMPLE)


def text_folder(path: str | Path, *, only: Sequence[str] = _TEXT_FILES, example: str = EXAMPLE) -> Path:
    return folder_with(path, [_TEXT_CONFIGS], "pair of text encoders", only=only, example=example)
