"""FLUX.1's autoencoder and its two text encoders: images and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before. Each image and caption is
encoded by itself, so that no record depends on its neighbours. T5 attends its padding, and the transformer attends it
too, as in the published pipeline: the text has its whole length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from transpixeler.families.flux.config import TEXT_LEN
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import (
    ClipTextEncoder,
    LatentVae,
    T5AndClipTextEncoder,
    fingerprint,
    folder_with,
    load_network,
    load_t5_and_clip,
    same_bits_every_time,
)
from transpixeler.models.family import Digest, file_digest

EXAMPLE = "black-forest-labs/FLUX.1-dev"
VAE_CONFIG = "vae/config.json"
_VAE_FILES = ("vae/*",)
_TEXT_FILES = ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*")
_TEXT_CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")


class FluxVae(LatentVae):
    """`AutoencoderKL`, which takes images: ours are videos of one frame."""

    tiled_latents = 160 * 160  # 1280×1280

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,1,H,W,3] or float in [-1,1] [B,3,1,H,W] → fp32 [B,C,1,h,w], the posterior's mean."""
        mean, deviation = self._scale.to(self.device)
        self.network.disable_tiling()
        with same_bits_every_time():
            images = [self._pixels(one).squeeze(2) for one in video.split(1)]
            latents = [self.network.encode(image).latent_dist.mode().float() for image in images]
        return (torch.cat(latents)[:, :, None] - mean) / deviation

    def _decode(self, latents: Tensor) -> Tensor:
        image = self.network.decode(self._unscaled(latents).squeeze(2), return_dict=False)[0]
        return image.float()[:, :, None]


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> FluxVae:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    place = _vae_folder(path)
    network = load_network(AutoencoderKL, place / "vae", dtype=dtype)
    count = torch.ones(network.config.latent_channels)
    scale = count * (network.config.shift_factor or 0.0), count / network.config.scaling_factor
    return FluxVae(network, scale, partial(vae_fingerprint, path), device=device)


def load_text_encoder(
    path: str | Path, *, device: torch.device, dtype: torch.dtype, length: int = TEXT_LEN, part: str = ""
) -> T5AndClipTextEncoder | ClipTextEncoder:
    """length: tokens of T5's text. part: the field of one of the two networks, to load it alone."""
    folder = _text_folder(path)
    return load_t5_and_clip(
        t5=(folder / "text_encoder_2", folder / "tokenizer_2"),
        clip=(folder / "text_encoder", folder / "tokenizer"),
        length=length,
        hashed=partial(text_fingerprint, path),
        device=device,
        dtype=dtype,
        part=part,
    )


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached latents depend on, without loading a weight."""
    return fingerprint(_vae_folder(path), _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def vae_geometry(path: str | Path) -> tuple[int, int]:
    """Return (rows or columns of pixels in one latent cell, latent channels), read off the config."""
    place = _vae_folder(path, only=(VAE_CONFIG,)) / VAE_CONFIG
    config = read_config(place)
    with naming_damage(place):
        return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]


def _vae_folder(path: str | Path, *, only: Sequence[str] = _VAE_FILES) -> Path:
    return folder_with(path, [(VAE_CONFIG,)], "VAE", only=only, example=EXAMPLE)


def _text_folder(path: str | Path) -> Path:
    return folder_with(path, [_TEXT_CONFIGS], "pair of text encoders", only=_TEXT_FILES, example=EXAMPLE)
