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

from transpixeler.config import UserError
from transpixeler.families.flux.config import FluxConfig
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import (
    Encoder,
    LatentVae,
    Network,
    fingerprint,
    load_network,
    load_tokenizer,
    same_bits_every_time,
)
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.resolve import resolve

VAE_CONFIG = "vae/config.json"
_VAE_FILES = ("vae/*",)
_TEXT_FILES = ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*")
_TEXT_CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")
_CLIP_LEN = 77


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


class FluxTextEncoder(Encoder):
    """T5's rows for the text and CLIP's one vector."""

    def __init__(
        self, t5: Network, clip: Network, tokenizers: tuple[Network, Network], length: int, path: str | Path,
        *, device: torch.device,
    ) -> None:  # fmt: skip
        """tokenizers: of CLIP and of T5. length: tokens of T5's text."""
        self.clip, self.tokenizers, self.length = clip.eval().requires_grad_(False), tokenizers, length
        super().__init__(t5, partial(text_fingerprint, path), device=device)

    def to(self, device: torch.device) -> FluxTextEncoder:
        self.clip.to(device)
        return super().to(device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's rows [length, width] and its vector [width]."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> dict[str, Tensor]:
        clip, t5 = self.tokenizers
        rows = self.network(input_ids=self._ids(t5, text, self.length)).last_hidden_state[0]
        return {"text": rows, "pooled": self.clip(input_ids=self._ids(clip, text, _CLIP_LEN)).pooler_output[0]}

    def _ids(self, tokenize: Network, text: str, length: int) -> Tensor:
        padded = {"padding": "max_length", "truncation": True, "max_length": length}
        return tokenize(text, return_tensors="pt", **padded).input_ids.to(self.device)


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> FluxVae:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    place = _vae_folder(path)
    network = load_network(AutoencoderKL, place / "vae", dtype=dtype)
    count = torch.ones(network.config.latent_channels)
    scale = count * (network.config.shift_factor or 0.0), count / network.config.scaling_factor
    return FluxVae(network, scale, partial(vae_fingerprint, path), device=device)


def load_text_encoder(
    path: str | Path, config: FluxConfig, *, device: torch.device, dtype: torch.dtype
) -> FluxTextEncoder:
    from transformers import CLIPTextModel, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    folder = _text_folder(path)
    clip = load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype)
    t5 = load_network(T5EncoderModel, folder / "text_encoder_2", dtype=dtype)
    tokenizers = load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "tokenizer_2")
    return FluxTextEncoder(t5, clip, tokenizers, config.text_length, path, device=device)


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
    return _holding(path, only, (VAE_CONFIG,), "VAE")


def _text_folder(path: str | Path) -> Path:
    return _holding(path, _TEXT_FILES, _TEXT_CONFIGS, "pair of text encoders")


def _holding(path: str | Path, only: Sequence[str], needed: Sequence[str], what: str) -> Path:
    place = resolve(path, only=only)
    folder = place.parent if place.is_file() else place
    for name in needed:
        if not (folder / name).is_file():
            where = "; set model.encoders to black-forest-labs/FLUX.1-dev or a folder of it" if place.is_file() else ""
            raise UserError(f"model.path: {folder} holds no {what}: {name} is not there{where}")
    return folder
