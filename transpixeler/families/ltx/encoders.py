"""LTX-Video's VAE and T5 text encoder: videos and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before: training needs neither once
everything is cached. Each video and caption is encoded by itself, so that no record depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.families.ltx.config import TEXT_LEN
from transpixeler.families.ltx.original import VAE_FILE_PREFIX, original_vae_config, original_vae_state, stored_names
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import LatentVae, Network, T5TextEncoder, fingerprint, load_network, load_tokenizer
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.meta import on_meta
from transpixeler.models.resolve import resolve
from transpixeler.models.streams import Grid

VAE_CONFIG = "vae/config.json"
_TEXT_CONFIG = "text_encoder/config.json"
_VAE_FILES = ("vae/*",)
_TEXT_FILES = ("text_encoder/*", "tokenizer/*")

# A decoder that takes a timestep (from 0.9.1 on) is the last denoising step: it is given latents with a little noise.
DECODE_TIMESTEP = 0.05
DECODE_NOISE = 0.025


class LtxVae(LatentVae):
    """`AutoencoderKLLTXVideo`, whose later decoders take a timestep."""

    tiled_latents = 22 * 38  # 704×1216

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode one video; the noise of a decoder that wants some is the same for all videos of one shape."""
        timestep = None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)  # some decoders also draw noise inside
            if self.network.config.timestep_conditioning:
                timestep = torch.tensor([DECODE_TIMESTEP], device=self.device, dtype=self.network.dtype)
                noise = torch.randn(latents.shape).to(self.device)
                latents = torch.lerp(latents, noise, DECODE_NOISE)
            return self.network.decode(self._unscaled(latents), timestep, return_dict=False)[0].float()


class LtxTextEncoder(T5TextEncoder):
    """T5's encoder. Padding is neither encoded nor attended, as in Lightricks' code.

    Diffusers' pipeline lets T5 attend its padding.
    """

    length = TEXT_LEN


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> LtxVae:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    place = _vae_place(path)
    network: Network
    if place.is_file():
        with naming_damage(place):
            with on_meta():
                network = AutoencoderKLLTXVideo(**original_vae_config(place))
            # Copied, because weights that lie in a mapped file at odd addresses give other last bits on some CPUs.
            weights = {name: value.clone() for name, value in original_vae_state(place).items()}
            network.load_state_dict(weights, assign=True)
        network.to(dtype)
    else:
        network = load_network(AutoencoderKLLTXVideo, place / "vae", dtype=dtype)
    mean, deviation = network.latents_mean.float(), network.latents_std.float() / network.config.scaling_factor
    return LtxVae(network, (mean, deviation), partial(vae_fingerprint, path), device=device)


def load_text_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> LtxTextEncoder:
    from transformers import T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    folder = _text_folder(path)
    network = load_network(T5EncoderModel, folder / "text_encoder", dtype=dtype)
    tokenize = load_tokenizer(folder / "tokenizer")
    return LtxTextEncoder(network, tokenize, partial(text_fingerprint, path), device=device)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached latents depend on, without loading a weight."""
    place = _vae_place(path)
    return digest(place) if place.is_file() else fingerprint(place, _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def vae_geometry(path: str | Path) -> tuple[Grid, int]:
    """Return (stride in frames, height and width; latent channels), read off the config."""
    config = vae_config(path)
    with naming_damage(Path(path) / VAE_CONFIG):
        doublings = sum(config.get("spatio_temporal_scaling") or (True, True, True, False))
        side = config.get("spatial_compression_ratio") or (config.get("patch_size") or 4) * 2**doublings
        frames = config.get("temporal_compression_ratio") or (config.get("patch_size_t") or 1) * 2**doublings
        return (frames, side, side), config.get("latent_channels") or 128


def vae_config(path: str | Path) -> dict[str, Any]:
    """Return the VAE's config in diffusers' words."""
    place = _vae_place(path, only=(VAE_CONFIG,))
    if place.is_file():
        return original_vae_config(place)
    return read_config(place / VAE_CONFIG)


def _vae_place(path: str | Path, *, only: Sequence[str] = _VAE_FILES) -> Path:
    """Return the pipeline's folder, or the single file that holds a VAE beside the transformer."""
    place = resolve(path, only=only)
    if place.is_file():
        if any(name.startswith(VAE_FILE_PREFIX) for name in stored_names(place)):
            return place
        raise UserError(f"model.path: {place} holds no VAE; use the file that Lightricks published, which does")
    if not (place / VAE_CONFIG).exists():
        raise UserError(
            f"model.path: {place} holds no VAE: {VAE_CONFIG} is not there; set model.encoders to Lightricks/LTX-Video "
            "or a folder of it"
        )
    return place


def _text_folder(path: str | Path) -> Path:
    place = resolve(path, only=_TEXT_FILES)
    folder = place.parent if place.is_file() else place
    if not (folder / _TEXT_CONFIG).exists():
        beside = "put text_encoder/ and tokenizer/ of Lightricks/LTX-Video beside the file"
        where = beside if place.is_file() else "set model.encoders to Lightricks/LTX-Video or a folder of it"
        raise UserError(f"model.path: {folder} holds no text encoder: {_TEXT_CONFIG} is not there; {where}")
    return folder
