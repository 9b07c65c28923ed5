"""FLUX.1 as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a diffusers pipeline, its transformer folder, or the transformer as one file in the original names, with
`model.encoders` for the rest. It makes images, which are videos of one frame here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from transpixeler.config import UserError
from transpixeler.families.flux import encoders
from transpixeler.families.flux.config import CLASS, PATCH, STRIDE, FluxConfig, diffusers_config
from transpixeler.families.flux.model import FluxModel, fields
from transpixeler.families.flux.names import NAMES, config_from_shapes
from transpixeler.models.damage import read_config
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
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

_CONFIGS = ("transformer/config.json", "config.json")
_SCHEDULER = "scheduler/scheduler_config.json"
# How far noise levels are shifted, by tokens: e to a power on a straight line between two points.
_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class FluxFolder(ModelFolder):
    """One FLUX.1 model on disk."""

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=(*_CONFIGS, "model_index.json"))
        if place.is_file():
            return _config_of_file(place)
        if (index := place / "model_index.json").is_file():
            pipeline = read_config(index).get("_class_name", "")
            if pipeline not in ("FluxPipeline", ""):
                raise UserError(
                    f"model.path: {self.path} is made for {pipeline}, which is shown more than noise and cannot be "
                    "trained here; use FLUX.1-dev or FLUX.1-schnell"
                )
        found = [place / name for name in _CONFIGS if (place / name).is_file()]
        if not found:
            raise UserError(f"model.path: {self.path} holds neither {_CONFIGS[0]} nor {_CONFIGS[1]}")
        return read_config(found[0])

    @cached_property
    def _checked(self) -> FluxConfig:
        return FluxConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        side, channels = encoders.vae_geometry(self.encoders)
        if channels != self._checked.channels:
            raise UserError(
                f"model.path: the VAE of {self.encoders} has {channels} channels, and the transformer takes "
                f"{self._checked.channels}; use the VAE that it was trained with"
            )
        return Geometry((STRIDE[0], side, side), channels, PATCH, stills=True)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_config(self.config)

    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.vae_fingerprint(self.encoders, digest)

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.text_fingerprint(self.encoders, digest)

    def shift(self, tokens: int) -> float:
        """Return the shift of dev, which grows with an image's tokens; the distilled schnell has none."""
        config = {"use_dynamic_shifting": self._checked.guidance_embeds, **_SHIFT, **self._scheduler}
        if not config["use_dynamic_shifting"]:
            return float(config.get("shift", 1.0))
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        return math.exp(config["base_shift"] + slope * (tokens - few))

    def sampling_shift(self, tokens: int) -> float:
        return self.shift(tokens)

    @cached_property
    def _scheduler(self) -> Mapping[str, Any]:
        place = resolve(self.encoders, only=(_SCHEDULER,))
        return read_config(place / _SCHEDULER) if (place / _SCHEDULER).is_file() else {}

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> FluxModel:
        return FluxModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return encoders.load_vae(self.encoders, device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, self._checked, device=device, dtype=dtype)


def _config_of_file(path: Path) -> dict[str, Any]:
    source = WeightSource(path, NAMES.internal_names)
    try:
        return config_from_shapes({name: source.shape(name) for name in source.names()})
    except (KeyError, ValueError) as fault:
        raise UserError(f"model.path: {path} holds no FLUX.1: {fault.args[0]} is not in it") from fault


def _is_flux(path: Path) -> bool:
    """Tell FLUX.1 by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        names = WeightSource(path, NAMES.internal_names).names()
        needed = ("blocks.s0.linear1.weight", "embed.vector_in.in_layer.weight", "embed.time_in.in_layer.weight")
        return all(name in names for name in needed)  # HunyuanVideo's file has the first two as well
    for name in _CONFIGS:
        if (path / name).is_file():
            return read_config(path / name).get("_class_name") == CLASS
    return False


FAMILY = Family(
    name="flux",
    title="FLUX.1",
    names=NAMES,
    open=FluxFolder,
    recognises=_is_flux,
    sampling=SamplingDefaults(negative_prompt="", shift=math.exp(_SHIFT["max_shift"])),
    lora_targets=FluxModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class="FluxPipeline",
    example=encoders.EXAMPLE,
    makes="image",
    shapes={"dev": {"guidance_embeds": True}, "schnell": {"guidance_embeds": False}},
)
