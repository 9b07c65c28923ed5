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

from transpixeler.families.flux import encoders
from transpixeler.families.flux.config import CLASS, PATCH, STRIDE, FluxConfig, diffusers_config
from transpixeler.families.flux.model import FluxModel, fields
from transpixeler.families.flux.names import NAMES, config_from_shapes
from transpixeler.models.encoders import PARTS
from transpixeler.models.family import (
    APACHE,
    Family,
    Field,
    License,
    SamplingDefaults,
    TextEncoder,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.pipeline_folder import (
    CONFIGS,
    INDEX,
    PipelineFolder,
    check_pipeline,
    config_by_shapes,
    names_class,
    read_published,
)
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

PIPELINE = "FluxPipeline"
# How far noise levels are shifted, by tokens: e to a power on a straight line between two points.
_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class FluxFolder(PipelineFolder):
    """One FLUX.1 model on disk."""

    library, text_parts = encoders, PARTS
    text_places = ("text_encoder_2", "text_encoder")

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=(*CONFIGS, INDEX))
        if place.is_file():
            return config_by_shapes(place, NAMES, config_from_shapes, title="FLUX.1")
        check_pipeline(place, self.path, made_for=PIPELINE, use="use FLUX.1-dev or FLUX.1-schnell")
        return read_published(place, self.path)

    @cached_property
    def _checked(self) -> FluxConfig:
        return FluxConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        side, channels = encoders.vae_geometry(self.encoders)
        self.check_channels(channels, self._checked.channels)
        return Geometry((STRIDE[0], side, side), channels, PATCH, stills=True)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_config(self.config)

    def shift(self, tokens: int) -> float:
        """Return the shift of dev, which grows with an image's tokens; the distilled schnell has none."""
        config = {"use_dynamic_shifting": self._checked.guidance_embeds, **_SHIFT, **self.scheduler}
        if not config["use_dynamic_shifting"]:
            return float(config.get("shift", 1.0))
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        return math.exp(config["base_shift"] + slope * (tokens - few))

    def sampling_shift(self, tokens: int) -> float:
        return self.shift(tokens)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> FluxModel:
        return FluxModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return self.load_text_part("", device=device, dtype=dtype)

    def load_text_part(self, part: str, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        length = self._checked.text_length
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype, length=length, part=part)


def _is_flux(path: Path) -> bool:
    """Tell FLUX.1 by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        names = WeightSource(path, NAMES.internal_names).names()
        needed = ("blocks.s0.linear1.weight", "embed.vector_in.in_layer.weight", "embed.time_in.in_layer.weight")
        return all(name in names for name in needed)  # HunyuanVideo's file has the first two as well
    return names_class(path, CLASS)


FAMILY = Family(
    name="flux",
    title="FLUX.1",
    names=NAMES,
    open=FluxFolder,
    recognises=_is_flux,
    sampling=SamplingDefaults(negative_prompt="", shift=math.exp(_SHIFT["max_shift"])),
    lora_targets=FluxModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class=PIPELINE,
    example=encoders.EXAMPLE,
    license=License(
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    licenses={"black-forest-labs/FLUX.1-schnell": APACHE},
    makes="image",
    shapes={"dev": {"guidance_embeds": True}, "schnell": {"guidance_embeds": False}},
)
