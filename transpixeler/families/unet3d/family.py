"""The 3D U-Net of Ho et al. 2022 as a family: a folder that `transpixeler init` or a training wrote.

No weights of it are published. The folder holds the network in `transformer/`, a text encoder in `text_encoder/` and,
where it works on latents, an autoencoder in `vae/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from transpixeler.config.sections import UserError
from transpixeler.families.unet3d import encoders
from transpixeler.families.unet3d.config import CLASS, UnetConfig, published_config
from transpixeler.families.unet3d.diffusion import CosineDiffusion
from transpixeler.families.unet3d.model import UnetModel, fields
from transpixeler.families.unet3d.names import NAMES
from transpixeler.models.family import (
    Digest,
    Family,
    Field,
    ModelFolder,
    SamplingDefaults,
    TextEncoder,
    Vae,
    file_digest,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.pipeline_folder import CONFIGS, names_class, read_published
from transpixeler.models.resolve import resolve


class UnetFolder(ModelFolder):
    """One U-Net on disk."""

    joins = True

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=CONFIGS)
        if place.is_file():
            raise UserError(f"model.path: {self.path} is a file; give the folder of a U-Net, with its config.json")
        return read_published(place, self.path)

    @cached_property
    def _checked(self) -> UnetConfig:
        return UnetConfig.read(self.config)

    @property
    def _pixels(self) -> bool:
        return self._checked.space == "pixels"

    @property
    def noising(self) -> CosineDiffusion:
        return self._noising

    @cached_property
    def _noising(self) -> CosineDiffusion:
        config = self._checked
        return CosineDiffusion(config.noise_steps, config.loss, clips=self._pixels)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders, pixels=self._pixels)
        if channels != self._checked.channels:
            raise UserError(
                f"model.path: the VAE of {self.encoders} has {channels} channels, and the U-Net takes "
                f"{self._checked.channels}; use the VAE that it was trained with"
            )
        return Geometry(stride, channels, self._checked.patch)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        width = encoders.width_in(self.encoders)
        if width != self._checked.cond_dim:
            raise UserError(
                f"model.path: the text encoder of {self.encoders} makes vectors of {width}, and the U-Net takes "
                f"cond_dim {self._checked.cond_dim}; use the text encoder that it was trained with"
            )
        return fields(self._checked)

    def diffusers_config(self) -> dict[str, Any]:
        return published_config(self.config)

    def clean_caption(self, text: str) -> str:
        return text.strip()

    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.vae_fingerprint(self.encoders, digest, pixels=self._pixels)

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.text_fingerprint(self.encoders, digest)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> UnetModel:
        if not rgb_attends_aux:
            raise UserError(
                "model.rgb_attends_aux: false keeps RGB from seeing its companions, and this model joins them in "
                "channels; set it to true"
            )
        if attention != "auto":
            raise UserError(f"model.attention: {attention} is for attention over a sequence; set it to auto")
        return UnetModel(self._checked, streams=streams)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return encoders.load_vae(self.encoders, pixels=self._pixels, device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype)


def _recognises(path: Path) -> bool:
    """Tell it by the class that a config names."""
    return path.is_dir() and names_class(path, CLASS)


FAMILY = Family(
    name="unet3d",
    title="3D U-Net",
    names=NAMES,
    open=UnetFolder,
    recognises=_recognises,
    sampling=SamplingDefaults(negative_prompt="", shift=1.0),
    lora_targets=UnetModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class="",
    example="",
    shapes={
        "64px": {"dim": 64, "dim_mults": [1, 2, 4, 8]},
        "32px": {"dim": 32, "dim_mults": [1, 2, 4]},
        "wan-latents": {"dim": 64, "dim_mults": [1, 2, 4, 8], "channels": 16, "space": "latents"},
    },
)
