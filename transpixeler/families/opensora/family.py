"""Open-Sora 2 as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a transformer folder or a pipeline's layout with one, as training writes them, and the transformer as one file,
as it is published, with the encoders beside it or in `model.encoders`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from transpixeler.config import UserError
from transpixeler.families.opensora import encoders
from transpixeler.families.opensora.config import CLASS, PATCH, STRIDE, OpenSoraConfig, published_config
from transpixeler.families.opensora.model import OpenSoraModel, fields
from transpixeler.families.opensora.names import NAMES, config_from_shapes, is_opensora
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
from transpixeler.models.streams import Grid
from transpixeler.models.weights import WeightSource

_CONFIGS = ("transformer/config.json", "config.json")
# How far noise levels are shifted, by tokens of a frame: a straight line through two points.
_FEW, _MANY = (256, 1.0), (4096, 3.0)


class OpenSoraFolder(ModelFolder):
    """One Open-Sora 2 on disk."""

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=_CONFIGS)
        if place.is_file():
            return _config_of_file(place)
        found = [place / name for name in _CONFIGS if (place / name).is_file()]
        if not found:
            raise UserError(
                f"model.path: {self.path} holds neither {_CONFIGS[0]} nor {_CONFIGS[1]}; of the published model, name "
                "the file: FOLDER/Open_Sora_v2.safetensors"
            )
        return read_config(found[0])

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

    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.vae_fingerprint(self.encoders, digest)

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.text_fingerprint(self.encoders, digest)

    def shift_of(self, grid: Grid) -> float:
        """Grow on a line with a frame's tokens, and with the root of the latent frames."""
        frames, rows, columns = grid
        (few, least), (many, most) = _FEW, _MANY
        return (least + (most - least) / (many - few) * (rows * columns - few)) * math.sqrt(frames)

    def sampling_shift_of(self, grid: Grid) -> float:
        return self.shift_of(grid)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> OpenSoraModel:
        return OpenSoraModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return encoders.load_vae(self.encoders, device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype)


def _stored(path: Path) -> tuple[str, ...]:
    """Return the names of a file's weights as they are."""
    return WeightSource(path, lambda names: {name: name for name in names}).names()


def _config_of_file(path: Path) -> dict[str, Any]:
    source = WeightSource(path, NAMES.internal_names)
    apart = any(".q_proj." in name for name in _stored(path))
    try:
        return config_from_shapes({name: source.shape(name) for name in source.names()}, apart=apart)
    except (KeyError, ValueError) as fault:
        raise UserError(f"model.path: {path} holds no Open-Sora 2: {fault.args[0]} is not in it") from fault


def _recognises(path: Path) -> bool:
    """Tell Open-Sora 2 by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        return is_opensora(_stored(path))
    for name in _CONFIGS:
        if (path / name).is_file():
            return read_config(path / name).get("_class_name") == CLASS
    return False


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
    example="hpcai-tech/Open-Sora-v2",
    shapes={"11b": {"cond_embed": True}, "11b-t2v": {"cond_embed": False}},
)
