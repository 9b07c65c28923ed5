"""The toy's encoders, which need no library: latents are averages of pixels, words are vectors seeded by letters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transpixeler.families.toy.config import STRIDE, ToyConfig

from transpixeler.config.sections import UserError
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.family import Digest, file_digest

VAE_FILE, TEXT_FILE = "vae.json", "text_encoder.json"


class ToyVae:
    """Latents are the average red, green, blue and brightness of 2×8×8 pixels, times the scale in `vae.json`."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        self.folder, self.device = folder, device
        config = read_config(folder / VAE_FILE)
        with naming_damage(folder / VAE_FILE):
            self.scale = float(config["scale"])

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder, VAE_FILE)

    def to(self, device: torch.device) -> ToyVae:
        self.device = device
        return self

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,4,f,h,w]."""
        video = video.to(self.device)
        if video.dtype == torch.uint8:
            video = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        colours = F.avg_pool3d(video.float(), STRIDE)
        return self.scale * torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """[B,4,f,h,w] → fp32 [B,3,F,H,W] in [-1,1]."""
        colours = latents.to(self.device).float()[:, :3] / self.scale
        for axis, times in enumerate(STRIDE, start=2):
            colours = colours.repeat_interleave(times, dim=axis)
        return colours.clamp(-1, 1)


class ToyTextEncoder:
    """A vector for each word, and one for the caption."""

    networks = ()

    def __init__(self, folder: Path, config: ToyConfig, *, device: torch.device) -> None:
        self.folder, self.config, self.device = folder, config, device
        config = read_config(folder / TEXT_FILE)
        with naming_damage(folder / TEXT_FILE):
            self.seed = config["seed"]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder, TEXT_FILE)

    def to(self, device: torch.device) -> ToyTextEncoder:
        self.device = device
        return self

    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        return [self._encode(clean_caption(text)) for text in texts]

    def _encode(self, text: str) -> dict[str, Tensor]:
        words = [*text.split(), "<end>"][: self.config.text_length]
        rows = [self._vector(word, self.config.text_dim) for word in words]
        return {"text": torch.stack(rows), "pooled": self._vector(text, self.config.pooled_dim)}

    def _vector(self, text: str, width: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {text}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(width, generator=generator).to(self.device)


def clean_caption(text: str) -> str:
    return " ".join(text.lower().split())


def fingerprint(folder: Path, file: str, digest: Digest = file_digest) -> str:
    if not (folder / file).is_file():
        raise UserError(f"model.path: {folder} holds no {file}")
    return hashlib.sha256(f"{file} {digest(folder / file)}".encode()).hexdigest()
