"""HunyuanVideo 1.0 as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a diffusers pipeline, its transformer folder, or the transformer as one file in the original names, with
`model.encoders` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transpixeler.families.hunyuan import encoders
from transpixeler.families.hunyuan.config import (
    CLASS,
    PATCH,
    PIPELINE,
    SHIFT,
    USE,
    HunyuanConfig,
    diffusers_config,
)
from transpixeler.families.hunyuan.model import HunyuanModel, fields
from transpixeler.families.hunyuan.names import NAMES, config_from_shapes
from transpixeler.models.damage import naming_damage
from transpixeler.models.family import (
    Family,
    Field,
    SamplingDefaults,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.pipeline_folder import (
    CONFIGS,
    INDEX,
    SCHEDULER,
    PipelineFolder,
    check_pipeline,
    config_by_shapes,
    names_class,
    read_published,
)
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource


class HunyuanFolder(PipelineFolder):
    """One HunyuanVideo model on disk."""

    library = encoders

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=(*CONFIGS, INDEX))
        if place.is_file():
            return config_by_shapes(place, NAMES, config_from_shapes, title="HunyuanVideo")
        check_pipeline(place, self.path, made_for=PIPELINE, use=USE)
        return read_published(place, self.path)

    @cached_property
    def _checked(self) -> HunyuanConfig:
        return HunyuanConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders)
        self.check_channels(channels, self._checked.in_channels)
        return Geometry(stride, channels, PATCH)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_config(self.config)

    def shift(self, tokens: int) -> float:
        """Return the shift that the model is sampled with: noise levels are learned where they are asked for."""
        return self.sampling_shift(tokens)

    def sampling_shift(self, tokens: int) -> float:
        with naming_damage(Path(self.encoders) / SCHEDULER):
            return float(self.scheduler.get("shift", SHIFT))

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> HunyuanModel:
        return HunyuanModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)


def _is_hunyuan(path: Path) -> bool:
    """Tell HunyuanVideo by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        names = WeightSource(path, NAMES.internal_names).names()
        return "blocks.s0.linear1.weight" in names and "embed.txt_in.input.weight" in names
    return names_class(path, CLASS)


FAMILY = Family(
    name="hunyuan",
    title="HunyuanVideo",
    names=NAMES,
    open=HunyuanFolder,
    recognises=_is_hunyuan,
    sampling=SamplingDefaults(negative_prompt="", shift=SHIFT),
    lora_targets=HunyuanModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class=PIPELINE,
    example=encoders.EXAMPLE,
    shapes={"13b": {}},
)
