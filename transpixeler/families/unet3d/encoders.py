"""Give the U-Net pixels as they are or an autoencoder's latents, and one vector for a caption.

The networks are diffusers' and transformers', imported when one is loaded and never before. The vector is the first
token's of a network of BERT's kind, the mean of the tokens of T5's, or CLIP's own; an empty caption is zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import Encoder, Network, fingerprint, folder_with, load_network, load_tokenizer
from transpixeler.models.family import Digest, Vae, file_digest
from transpixeler.models.streams import Grid

EXAMPLE = "google-bert/bert-base-uncased in text_encoder/"
LENGTH = 256  # tokens of a caption, at most
PIXELS = "pixels"  # the fingerprint of what nothing encodes
_VAE_CONFIG, _TEXT_CONFIG = "vae/config.json", "text_encoder/config.json"
_TEXT_FILES = ("text_encoder/*", "tokenizer/*")
_VAES = {"AutoencoderKLWan": "wan", "AutoencoderKLHunyuanVideo": "hunyuan", "AutoencoderKLLTXVideo": "ltx"}
_FIRST, _MEAN, _POOLED = "first", "mean", "pooled"
_TEXTS = {  # by the config's model_type: transformers' class, and what stands for the text
    "bert": ("BertModel", _FIRST),
    "distilbert": ("DistilBertModel", _FIRST),
    "roberta": ("RobertaModel", _FIRST),
    "t5": ("T5EncoderModel", _MEAN),
    "umt5": ("UMT5EncoderModel", _MEAN),
    "clip_text_model": ("CLIPTextModel", _POOLED),
}


# --- pixels and latents ----------------------------------------------------------------------------------------------


class PixelVae:
    """Pixels between -1 and 1, which nothing encodes."""

    fingerprint = PIXELS

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,3,F,H,W]."""
        video = video.to(self.device)
        return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1 if video.dtype == torch.uint8 else video.float()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.to(self.device).float().clamp(-1, 1)

    def to(self, device: torch.device) -> PixelVae:
        self.device = device
        return self


def vae_library(path: str | Path) -> Any:
    """Return the module of encoders whose autoencoder a folder holds."""
    place = folder_with(path, [(_VAE_CONFIG,)], "VAE", only=("vae/*",), example="a model of video") / _VAE_CONFIG
    kind = read_config(place).get("_class_name", "")
    if kind not in _VAES:
        raise UserError(f"model.path: {place} is of {kind or 'no class'}; known are {', '.join(_VAES)}")
    return import_module(f"transpixeler.families.{_VAES[kind]}.encoders")


def vae_geometry(path: str | Path, *, pixels: bool) -> tuple[Grid, int]:
    """Return (stride in frames, height and width; channels)."""
    return ((1, 1, 1), 3) if pixels else vae_library(path).vae_geometry(path)


def load_vae(path: str | Path, *, pixels: bool, device: torch.device, dtype: torch.dtype) -> Vae:
    return PixelVae(device) if pixels else vae_library(path).load_vae(path, device=device, dtype=dtype)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest, *, pixels: bool) -> str:
    return PIXELS if pixels else vae_library(path).vae_fingerprint(path, digest)


# --- captions --------------------------------------------------------------------------------------------------------


class VectorTextEncoder(Encoder):
    """One vector of a caption."""

    def __init__(
        self, network: Network, tokenizer: Any, kind: str, hashed: Callable[[], str], *, device: torch.device
    ) -> None:
        """kind: what stands for the text."""
        self.tokenizer, self.kind = tokenizer, kind
        super().__init__(network, hashed, device=device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's vector [width]; zeros of an empty one."""
        return [{"text": self._encode(text.strip())} for text in texts]

    def _encode(self, text: str) -> Tensor:
        if not text:
            return torch.zeros(text_width(self.network.config.to_dict()), device=self.device)
        longest = min(LENGTH, getattr(self.tokenizer, "model_max_length", LENGTH))
        tokens = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        found = self.network(input_ids=tokens.input_ids.to(self.device))
        if self.kind == _POOLED:
            return found.pooler_output[0].float()
        rows = found.last_hidden_state[0].float()
        return rows[0] if self.kind == _FIRST else rows.mean(0)


def load_text_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> VectorTextEncoder:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    folder = _text_folder(path)
    name, kind = _kind(folder / _TEXT_CONFIG)
    network = load_network(getattr(transformers, name), folder / "text_encoder", dtype=dtype)
    words = folder / "tokenizer"
    tokenizer = load_tokenizer(words if words.is_dir() else folder / "text_encoder")
    return VectorTextEncoder(network, tokenizer, kind, partial(text_fingerprint, path), device=device)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def width_in(path: str | Path) -> int:
    """Return the width of a caption's vector, read off the config."""
    place = _text_folder(path, only=(_TEXT_CONFIG,)) / _TEXT_CONFIG
    _kind(place)
    with naming_damage(place):
        return text_width(read_config(place))


def text_width(config: dict[str, Any]) -> int:
    """Return the width that a text encoder's config says, under either of its names."""
    return int(next(config[name] for name in ("d_model", "hidden_size", "dim") if config.get(name)))


def _kind(place: Path) -> tuple[str, str]:
    kind = read_config(place).get("model_type", "")
    if kind not in _TEXTS:
        raise UserError(f"model.path: {place} is of {kind or 'no type'}; known are {', '.join(_TEXTS)}")
    return _TEXTS[kind]


def _text_folder(path: str | Path, *, only: Sequence[str] = _TEXT_FILES) -> Path:
    return folder_with(path, [(_TEXT_CONFIG,)], "text encoder", only=only, example=EXAMPLE)
