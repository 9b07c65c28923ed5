"""LTX-Video's VAE and T5 text encoder: videos and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before: training needs neither once
everything is cached. Each video and caption is encoded by itself, so that no record depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config import UserError
from transpixeler.families.ltx.config import TEXT_LEN
from transpixeler.families.ltx.original import VAE_FILE_PREFIX, original_vae_config, original_vae_state, stored_names
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import fingerprint, same_bits_every_time
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.resolve import resolve
from transpixeler.models.streams import Grid

Network = Any  # the libraries' stubs know neither their `config` nor their `to`

VAE_CONFIG = "vae/config.json"
_TEXT_CONFIG = "text_encoder/config.json"
_VAE_FILES = ("vae/*",)
_TEXT_FILES = ("text_encoder/*", "tokenizer/*")

# A decoder that takes a timestep (from 0.9.1 on) is the last denoising step: it is given latents with a little noise.
DECODE_TIMESTEP = 0.05
DECODE_NOISE = 0.025

# Latents of one frame beyond which decoding goes tile by tile, blended at the seams: 704×1216.
TILED_LATENTS = 22 * 38


class LtxVae:
    """`AutoencoderKLLTXVideo` with its latents scaled to what the transformer was trained on."""

    def __init__(self, network: Network, path: str | Path, *, device: torch.device) -> None:
        self.path = path
        self.network = network.eval().requires_grad_(False)
        mean, deviation = network.latents_mean.float(), network.latents_std.float() / network.config.scaling_factor
        self._scale = torch.stack([mean, deviation])[:, :, None, None, None]
        self.to(device)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return vae_fingerprint(self.path)

    def to(self, device: torch.device) -> LtxVae:
        self.device = device
        self.network.to(device)
        self._scale = self._scale.to(device)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,C,f,h,w], the posterior's mean."""
        mean, deviation = self._scale
        self.network.disable_tiling()
        with same_bits_every_time():
            latents = [self.network.encode(self._pixels(one)).latent_dist.mode().float() for one in video.split(1)]
        return (torch.cat(latents) - mean) / deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,f,h,w] → fp32 [B,3,F,H,W] in [-1,1]."""
        large = latents.shape[-1] * latents.shape[-2] > TILED_LATENTS
        self.network.enable_tiling() if large else self.network.disable_tiling()
        with same_bits_every_time():
            videos = [self._decode(one) for one in latents.to(self.device).float().split(1)]
        return torch.cat(videos).clamp(-1, 1)

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode one video; the noise of a decoder that wants some is the same for all videos of one shape."""
        mean, deviation = self._scale
        timestep = None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)  # some decoders also draw noise inside
            if self.network.config.timestep_conditioning:
                timestep = torch.tensor([DECODE_TIMESTEP], device=self.device, dtype=self.network.dtype)
                noise = torch.randn(latents.shape).to(self.device)
                latents = torch.lerp(latents, noise, DECODE_NOISE)
            scaled = (latents * deviation + mean).to(self.network.dtype)
            return self.network.decode(scaled, timestep, return_dict=False)[0].float()

    def _pixels(self, video: Tensor) -> Tensor:
        video = video.to(self.device, non_blocking=True)
        if video.dtype == torch.uint8:
            video = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return video.to(self.network.dtype)


class LtxTextEncoder:
    """T5's encoder; embeddings keep their true length.

    Padding is neither encoded nor attended, as in Lightricks' code. Diffusers' pipeline lets T5 attend its padding.
    """

    def __init__(self, network: Network, tokenizer: Any, path: str | Path, *, device: torch.device) -> None:
        self.path = path
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.to(device)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return text_fingerprint(self.path)

    def to(self, device: torch.device) -> LtxTextEncoder:
        self.device = device
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's embedding [length, width], length ≤ 128."""
        return [{"text": self._encode(clean_caption(text))} for text in texts]

    def _encode(self, text: str) -> Tensor:
        tokens = self.tokenizer(
            text, truncation=True, max_length=TEXT_LEN, add_special_tokens=True, return_tensors="pt"
        )
        return self.network(input_ids=tokens.input_ids.to(self.device)).last_hidden_state[0]


def clean_caption(text: str) -> str:
    return text.strip()


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> LtxVae:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    place = _vae_place(path)
    network: Network
    if place.is_file():
        with naming_damage(place), torch.device("meta"):
            network = AutoencoderKLLTXVideo(**original_vae_config(place))
            network.load_state_dict(original_vae_state(place), assign=True)
        network.to(dtype)
    else:
        with naming_damage(place / "vae"):
            network = AutoencoderKLLTXVideo.from_pretrained(place / "vae", torch_dtype=dtype, local_files_only=True)
    return LtxVae(network, path, device=device)


def load_text_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> LtxTextEncoder:
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    network: Network
    folder = _text_folder(path)
    with naming_damage(folder / "text_encoder"):
        network = T5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=dtype, local_files_only=True)
    with naming_damage(folder / "tokenizer"):  # by default transformers offers to run code from the folder
        tokenize = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    return LtxTextEncoder(network, tokenize, path, device=device)


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
        raise UserError(f"model.path: {place} holds no VAE: {VAE_CONFIG} is not there")
    return place


def _text_folder(path: str | Path) -> Path:
    place = resolve(path, only=_TEXT_FILES)
    folder = place.parent if place.is_file() else place
    if not (folder / _TEXT_CONFIG).exists():
        where = "; put text_encoder/ and tokenizer/ of Lightricks/LTX-Video beside the file" if place.is_file() else ""
        raise UserError(f"model.path: {folder} holds no text encoder: {_TEXT_CONFIG} is not there{where}")
    return folder
