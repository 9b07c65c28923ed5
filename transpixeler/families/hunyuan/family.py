"""HunyuanVideo 1.0 as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a diffusers pipeline, its transformer folder, or the transformer as one file in the original names, with
`model.encoders` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from transpixeler.config import UserError
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
from transpixeler.models.damage import naming_damage, read_config
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
_INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"


class HunyuanFolder(ModelFolder):
    """One HunyuanVideo model on disk."""

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=(*_CONFIGS, _INDEX))
        if place.is_file():
            return _config_of_file(place)
        if (index := place / _INDEX).is_file():
            pipeline = read_config(index).get("_class_name", "")
            if pipeline not in (PIPELINE, ""):
                raise UserError(
                    f"model.path: {self.path} is made for {pipeline}, which is shown more than noise and cannot be "
                    f"trained here; {USE}"
                )
        found = [place / name for name in _CONFIGS if (place / name).is_file()]
        if not found:
            raise UserError(f"model.path: {self.path} holds neither {_CONFIGS[0]} nor {_CONFIGS[1]}")
        return read_config(found[0])

    @cached_property
    def _checked(self) -> HunyuanConfig:
        return HunyuanConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders)
        if channels != self._checked.in_channels:
            raise UserError(
                f"model.path: the VAE of {self.encoders} has {channels} channels, and the transformer takes "
                f"{self._checked.in_channels}; use the VAE that it was trained with"
            )
        return Geometry(stride, channels, PATCH)

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
        """Return the shift that the model is sampled with: noise levels are learned where they are asked for."""
        return self.sampling_shift(tokens)

    def sampling_shift(self, tokens: int) -> float:
        place = resolve(self.encoders, only=(_SCHEDULER,)) / _SCHEDULER
        if not place.is_file():
            return SHIFT
        with naming_damage(place):
            return float(read_config(place).get("shift", SHIFT))

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> HunyuanModel:
        return HunyuanModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return encoders.load_vae(self.encoders, device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype)


def _config_of_file(path: Path) -> dict[str, Any]:
    source = WeightSource(path, NAMES.internal_names)
    try:
        return config_from_shapes({name: source.shape(name) for name in source.names()})
    except (KeyError, ValueError) as fault:
        raise UserError(f"model.path: {path} holds no HunyuanVideo: {fault.args[0]} is not in it") from fault


def _is_hunyuan(path: Path) -> bool:
    """Tell HunyuanVideo by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        names = WeightSource(path, NAMES.internal_names).names()
        return "blocks.s0.linear1.weight" in names and "embed.txt_in.input.weight" in names
    for name in _CONFIGS:
        if (path / name).is_file():
            return read_config(path / name).get("_class_name") == CLASS
    return False


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
