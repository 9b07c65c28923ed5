"""Wan's VAE and UMT5 text encoder: videos and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before: training needs neither once
everything is cached. Each video and caption is encoded by itself, so that no record depends on its neighbours.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config import UserError
from transpixeler.families.wan.config import TEXT_LEN
from transpixeler.families.wan.original import (
    T5_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    original_t5_config,
    original_t5_state,
    original_vae_config,
    original_vae_state,
)
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import fingerprint, same_bits_every_time
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.resolve import resolve

Network = Any  # the libraries' stubs know neither their `config` nor their `to`

_VAE_CONFIG = "vae/config.json"
_TEXT_CONFIG = "text_encoder/config.json"
_VAE_FILES = ("vae/*", VAE_FILE)
_TEXT_FILES = ("text_encoder/*", "tokenizer/*", T5_FILE, f"{TOKENIZER_FOLDER}/*")

# Latents of one frame beyond which decoding goes tile by tile, blended at the seams: above 480×832 a whole frame's
# activations no longer fit beside a model on a small GPU.
TILED_LATENTS = 60 * 104


class WanVae:
    """`AutoencoderKLWan` with its latents scaled to what the transformer was trained on."""

    def __init__(self, network: Network, folder: Path, *, device: torch.device) -> None:
        self.folder = folder
        self.network = network.eval().requires_grad_(False)
        self._scale = torch.tensor([network.config.latents_mean, network.config.latents_std])[:, :, None, None, None]
        self.to(device)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return vae_fingerprint(self.folder)

    def to(self, device: torch.device) -> WanVae:
        self.device = device
        self.network.to(device)
        self._scale = self._scale.to(device)
        return self

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,C,f,h,w], the posterior's mean."""
        mean, deviation = self._scale
        with same_bits_every_time():
            latents = [self.network.encode(self._pixels(one)).latent_dist.mode().float() for one in video.split(1)]
        return (torch.cat(latents) - mean) / deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,f,h,w] → fp32 [B,3,F,H,W] in [-1,1]."""
        mean, deviation = self._scale
        latents = (latents.to(self.device).float() * deviation + mean).to(self.network.dtype)
        large = latents.shape[-1] * latents.shape[-2] > TILED_LATENTS
        self.network.enable_tiling() if large else self.network.disable_tiling()
        with same_bits_every_time():
            videos = [self.network.decode(one, return_dict=False)[0].float() for one in latents.split(1)]
        return torch.cat(videos).clamp(-1, 1)

    def _pixels(self, video: Tensor) -> Tensor:
        video = video.to(self.device, non_blocking=True)
        if video.dtype == torch.uint8:
            video = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return video.to(self.network.dtype)


class WanTextEncoder:
    """UMT5's encoder with Wan's cleaning; embeddings keep their true length."""

    def __init__(
        self,
        network: Network,
        tokenizer: Network,
        folder: Path,
        *,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.to(device)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return text_fingerprint(self.folder)

    def to(self, device: torch.device) -> WanTextEncoder:
        self.device = device
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """[length, width] each, length ≤ 512; without padding no mask is needed and short captions are quick."""
        return [{"text": self._encode(clean_caption(text))} for text in texts]

    def _encode(self, text: str) -> Tensor:
        tokens = self.tokenizer(
            text, truncation=True, max_length=TEXT_LEN, add_special_tokens=True, return_tensors="pt"
        )
        return self.network(input_ids=tokens.input_ids.to(self.device)).last_hidden_state[0]


def clean_caption(text: str) -> str:
    """Clean as Wan's training did: encodings mended if ftfy is there, entities resolved twice, blanks collapsed."""
    mended = _mender()(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


@cache
def _mender() -> Callable[[str], str]:
    if importlib.util.find_spec("ftfy") is None:
        return str
    import ftfy

    return ftfy.fix_text


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> WanVae:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    network: Network
    folder = _vae_folder(path)
    if (folder / _VAE_CONFIG).exists():
        with naming_damage(folder / "vae"):
            network = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype, local_files_only=True)
    else:
        network = AutoencoderKLWan(**original_vae_config(folder))
        with naming_damage(folder / VAE_FILE):
            network.load_state_dict(original_vae_state(folder))
        network.to(dtype)
    return WanVae(network, folder, device=device)


def load_text_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> WanTextEncoder:
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    network: Network
    folder = _text_folder(path)
    if (folder / _TEXT_CONFIG).exists():
        tokenizer, encoder = folder / "tokenizer", folder / "text_encoder"
        with naming_damage(encoder):
            network = UMT5EncoderModel.from_pretrained(encoder, torch_dtype=dtype, local_files_only=True)
    else:
        with torch.device("meta"):
            network = UMT5EncoderModel(UMT5Config(**original_t5_config(folder)))
        with naming_damage(folder / T5_FILE):
            network.load_state_dict(original_t5_state(folder), assign=True)
        network.to(dtype)
        tokenizer = folder / TOKENIZER_FOLDER
    with naming_damage(tokenizer):  # by default transformers offers to run code from the folder
        tokenize = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
    return WanTextEncoder(network, tokenize, folder, device=device)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash what cached latents depend on, without loading a weight."""
    return fingerprint(_vae_folder(path), _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash what cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def has_vae(path: str | Path) -> bool:
    """Return whether a local model folder holds its VAE."""
    folder = Path(path).expanduser()
    return any((folder / name).exists() for name in (_VAE_CONFIG, VAE_FILE))


def vae_geometry(path: str | Path) -> tuple[tuple[int, int, int], int]:
    """(stride in frames, height and width; latent channels), read off the config's levels."""
    folder = _vae_folder(path)
    if (folder / _VAE_CONFIG).exists():
        config = read_config(folder / _VAE_CONFIG)
    else:
        config = original_vae_config(folder)
    with naming_damage(folder / _VAE_CONFIG):
        levels = config.get("dim_mult", [1, 2, 4, 4])
        side = 2 ** (len(levels) - 1) * (config.get("patch_size") or 1)
        return (2 ** sum(config.get("temperal_downsample", [False, True, True])), side, side), config.get("z_dim", 16)


def _vae_folder(path: str | Path) -> Path:
    return _holding(resolve(path, only=_VAE_FILES), "VAE", (_VAE_CONFIG, VAE_FILE))


def _text_folder(path: str | Path) -> Path:
    return _holding(resolve(path, only=_TEXT_FILES), "text encoder", (_TEXT_CONFIG, T5_FILE))


def _holding(folder: Path, what: str, either: tuple[str, str]) -> Path:
    if not any((folder / name).exists() for name in either):
        raise UserError(f"model.path: {folder} holds no {what}: neither {either[0]} nor {either[1]} is there")
    return folder
