"""Pyramid Flow miniFLUX as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a transformer folder or a pipeline's layout with one, as training writes them, a folder of the published
repository such as `diffusion_transformer_384p`, and the transformer as one file, with the encoders in `model.encoders`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, UserError
from transpixeler.families.pyramid import encoders
from transpixeler.families.pyramid.config import CLASS, PATCH, PyramidConfig, published_config
from transpixeler.families.pyramid.lessons import PyramidLadder
from transpixeler.families.pyramid.model import PyramidModel, fields
from transpixeler.families.pyramid.names import NAMES, config_from_shapes, is_pyramid
from transpixeler.families.pyramid.stages import STAGES, StageFlow
from transpixeler.models.encoders import PARTS
from transpixeler.models.family import Family, Field, License, SamplingDefaults, TextEncoder
from transpixeler.models.geometry import Geometry
from transpixeler.models.ladder import Ladder
from transpixeler.models.noising import Noising
from transpixeler.models.pipeline_folder import (
    CONFIGS,
    PipelineFolder,
    config_by_shapes,
    configs_in,
    names_class,
    read_published,
)
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource, as_stored


class PyramidFolder(PipelineFolder):
    """One Pyramid Flow on disk."""

    library, text_parts = encoders, PARTS
    text_places = ("text_encoder_2", "text_encoder")

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=CONFIGS)
        if place.is_file():
            return config_by_shapes(place, NAMES, config_from_shapes, title="Pyramid Flow")
        found = sorted(file.parent.name for file in place.glob("diffusion_transformer_*/config.json"))
        if found and not configs_in(place):
            raise UserError(
                f"model.path: {self.path} holds {', '.join(found)}; name one, such as {Path(self.path) / found[0]}, "
                "and the folder itself as model.encoders"
            )
        return read_published(place, self.path)

    @cached_property
    def _checked(self) -> PyramidConfig:
        return PyramidConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders)
        self.check_channels(channels, self._checked.channels)
        return Geometry(stride, channels, PATCH, smallest=2 ** (STAGES - 1))

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    @property
    def noising(self) -> Noising:
        return StageFlow()

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Return those of all frames but the first."""
        mean, deviation = encoders.REST
        ones = torch.ones(self._checked.channels)
        return ones * mean, ones * deviation

    def ladder(self, objective: ObjectiveConfig) -> Ladder:
        by_frame = objective.history != "off"
        if by_frame and not self._checked.use_temporal_causal:
            raise UserError("objective.history: this model's frames see later ones; set it to off")
        return PyramidLadder(by_frame=by_frame)

    def diffusers_config(self) -> dict[str, Any]:
        return published_config(self.config)

    def load_text_part(self, part: str, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype, part=part)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> PyramidModel:
        return PyramidModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)


def _recognises(path: Path) -> bool:
    """Tell Pyramid Flow by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        return is_pyramid(WeightSource(path, as_stored).names())
    return names_class(path, CLASS)


FAMILY = Family(
    name="pyramid",
    title="Pyramid Flow",
    names=NAMES,
    open=PyramidFolder,
    recognises=_recognises,
    sampling=SamplingDefaults(negative_prompt="", shift=1.0),
    lora_targets=PyramidModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class="",
    example=encoders.EXAMPLE,
    license=License("other", "see the model's page", f"https://huggingface.co/{encoders.EXAMPLE}"),
    shapes={"miniflux": {}},
)
