"""Pyramid Flow's autoencoder and its two text encoders, T5 and CLIP: frames and captions in, latents and fields out.

The autoencoder is this family's own network, which reads the published file. Latents of a first frame, which is encoded
alone, are scaled otherwise than those that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from transpixeler.families.pyramid.config import TEXT_LEN
from transpixeler.families.pyramid.vae import CausalVae, VaeConfig
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import (
    ClipTextEncoder,
    Encoder,
    T5AndClipTextEncoder,
    fingerprint,
    folder_with,
    load_t5_and_clip,
    same_bits_every_time,
)
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.weights import load_pickled

EXAMPLE = "rain1011/pyramid-flow-miniflux"
FIRST, REST = (-0.04, 1.8726), (-0.2343, 3.0986)  # mean and deviation of latents: of a first frame, and of others
_VAES = ("vae/config.json", "causal_video_vae/config.json")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_VAE_FILES = ("vae/*", "causal_video_vae/*")
_TEXT_FILES = ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*")
_TEXT_CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")


class PyramidVae(Encoder):
    """The causal autoencoder, whose latents are scaled to what the transformer was trained on."""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,C,f,h,w], the posterior's mean."""
        with same_bits_every_time():
            latents = torch.cat([self.network.encode(self._pixels(one)).float() for one in video.split(1)])
        mean, deviation = self._scale(latents)
        return (latents - mean) / deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,f,h,w] → fp32 [B,3,F,H,W] in [-1,1]."""
        latents = latents.to(self.device).float()
        mean, deviation = self._scale(latents)
        raw = (latents * deviation + mean).to(self.network.dtype)
        with same_bits_every_time():
            return torch.cat([self.network.decode(one).float() for one in raw.split(1)]).clamp(-1, 1)

    @staticmethod
    def _scale(latents: Tensor) -> Tensor:
        """[2, 1, 1, f, 1, 1]: mean and deviation of each latent frame."""
        frames = [FIRST, *[REST] * (latents.shape[2] - 1)]
        return torch.tensor(frames, device=latents.device).T[:, None, None, :, None, None]

    def _pixels(self, video: Tensor) -> Tensor:
        video = video.to(self.device, non_blocking=True)
        if video.dtype == torch.uint8:
            video = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return video.to(self.network.dtype)


class PyramidTextEncoder(T5AndClipTextEncoder):
    """T5's rows of a text at its true length, which no padding reaches, and CLIP's one vector."""

    def rows(self, text: str) -> Tensor:
        ids = self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt").input_ids
        return self.network(input_ids=ids.to(self.device)).last_hidden_state[0]


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> PyramidVae:
    place = _vae_place(path)
    with naming_damage(place):
        network = CausalVae(VaeConfig.read(read_config(place / "config.json")))
    file = next((file for name in _WEIGHTS if (file := place / name).is_file()), place / _WEIGHTS[0])
    with naming_damage(file):
        network.load_state_dict(load_file(file) if file.suffix == ".safetensors" else load_pickled(file))
    return PyramidVae(network.to(dtype), partial(vae_fingerprint, path), device=device)


def load_text_encoder(
    path: str | Path, *, device: torch.device, dtype: torch.dtype, part: str = ""
) -> PyramidTextEncoder | ClipTextEncoder:
    """part: the field of one of the two networks, to load it alone."""
    folder, hashed = _text_folder(path), partial(text_fingerprint, path)
    made = load_t5_and_clip(
        t5=(folder / "text_encoder_2", folder / "tokenizer_2"),
        clip=(folder / "text_encoder", folder / "tokenizer"),
        length=TEXT_LEN,
        hashed=hashed,
        device=device,
        dtype=dtype,
        part=part,
    )
    if isinstance(made, ClipTextEncoder):
        return made
    return PyramidTextEncoder(made.network, made.tokenizer, made.clip, TEXT_LEN, hashed, device=device)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached latents depend on, without loading a weight."""
    place = _vae_place(path)
    return fingerprint(place.parent, (f"{place.name}/*",), digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def vae_geometry(path: str | Path) -> tuple[tuple[int, int, int], int]:
    """(stride in frames, height and width; latent channels), read off the config."""
    place = _vae_place(path, only=_VAES) / "config.json"
    with naming_damage(place):
        config = VaeConfig.read(read_config(place))
        return config.stride, config.channels


def _vae_place(path: str | Path, *, only: Sequence[str] = _VAE_FILES) -> Path:
    """Return the folder of the autoencoder's config and weights."""
    folder = folder_with(path, [(name,) for name in _VAES], "VAE", only=only, example=EXAMPLE)
    return (folder / next(name for name in _VAES if (folder / name).is_file())).parent


def _text_folder(path: str | Path) -> Path:
    return folder_with(path, [_TEXT_CONFIGS], "pair of text encoders", only=_TEXT_FILES, example=EXAMPLE)
