"""Open-Sora 2 as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a transformer folder or a pipeline's layout with one, as training writes them, the published folder, and the
transformer as one file, with the encoders beside it or in `model.encoders`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from transpixeler.config.sections import UserError
from transpixeler.families.opensora import encoders
from transpixeler.families.opensora.config import CLASS, PATCH, STRIDE, OpenSoraConfig, published_config
from transpixeler.families.opensora.model import OpenSoraModel, fields
from transpixeler.families.opensora.names import NAMES, config_from_shapes, is_opensora
from transpixeler.models.encoders import PARTS
from transpixeler.models.experts import ONLY, Expert
from transpixeler.models.family import (
    APACHE,
    Family,
    Field,
    SamplingDefaults,
    TextEncoder,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.pipeline_folder import (
    CONFIGS,
    PipelineFolder,
    config_by_shapes,
    configs_in,
    names_class,
    read_published,
)
from transpixeler.models.resolve import resolve
from transpixeler.models.streams import Grid
from transpixeler.models.weights import WeightSource, as_stored

_FILE = "Open_Sora_v2.safetensors"  # of the weights in the published folder, which has no config
# How far noise levels are shifted, by tokens of a frame: a straight line through two points.
_FEW, _MANY = (256, 1.0), (4096, 3.0)


class OpenSoraFolder(PipelineFolder):
    """One Open-Sora 2 on disk."""

    library, text_parts = encoders, PARTS
    text_places = ("text_encoder_2", "text_encoder")

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = self._place
        if place.is_file():
            return _config_of_file(place)
        if configs_in(place):
            return read_published(place, self.path)
        if (place / _FILE).is_file():
            return _config_of_file(place / _FILE)
        if self._on_hub:
            return self.family.shapes["11b"]  # its file is fetched when weights are read
        raise UserError(f"model.path: {self.path} holds neither {CONFIGS[0]} nor {CONFIGS[1]} nor {_FILE}")

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """Name the published file as the place of the weights, where there is no folder of them."""
        place = self._place
        alone = not place.is_file() and not configs_in(place) and ((place / _FILE).is_file() or self._on_hub)
        return (Expert(folder=_FILE),) if alone else (ONLY,)

    @cached_property
    def _place(self) -> Path:
        """Return where its configs lie, or its one file."""
        return resolve(self.path, only=CONFIGS)

    @property
    def _on_hub(self) -> bool:
        return not Path(self.path).expanduser().exists()

    @cached_property
    def _checked(self) -> OpenSoraConfig:
        return OpenSoraConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders)
        if channels != self._checked.channels or stride != STRIDE:
            raise UserError(
                f"model.path: the VAE of {self.encoders} has {channels} channels and a stride of {stride}, and the "
                f"transformer takes {self._checked.channels} and {STRIDE}; use the VAE that it was trained with"
            )
        return Geometry(stride, channels, PATCH)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    def diffusers_config(self) -> dict[str, Any]:
        return published_config(self.config)

    def shift_of(self, grid: Grid) -> float:
        """Grow on a line with a frame's tokens, and with the root of the latent frames."""
        frames, rows, columns = grid
        (few, least), (many, most) = _FEW, _MANY
        return (least + (most - least) / (many - few) * (rows * columns - few)) * math.sqrt(frames)

    def sampling_shift_of(self, grid: Grid) -> float:
        return self.shift_of(grid)

    def load_text_part(self, part: str, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype, part=part)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> OpenSoraModel:
        return OpenSoraModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)


def _stored(path: Path) -> tuple[str, ...]:
    """Return the names of a file's weights as they are."""
    return WeightSource(path, as_stored).names()


def _config_of_file(path: Path) -> dict[str, Any]:
    apart = any(".q_proj." in name for name in _stored(path))
    return config_by_shapes(path, NAMES, partial(config_from_shapes, apart=apart), title="Open-Sora 2")


def _recognises(path: Path) -> bool:
    """Tell Open-Sora 2 by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        return is_opensora(_stored(path))
    if configs_in(path):
        return names_class(path, CLASS)
    return (path / _FILE).is_file() and is_opensora(_stored(path / _FILE))


FAMILY = Family(
    name="opensora",
    title="Open-Sora 2",
    names=NAMES,
    open=OpenSoraFolder,
    recognises=_recognises,
    sampling=SamplingDefaults(negative_prompt="", shift=_MANY[1]),
    lora_targets=OpenSoraModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class="",
    example=encoders.EXAMPLE,
    license=APACHE,
    shapes={"11b": {"cond_embed": True}, "11b-t2v": {"cond_embed": False}},
)
