"""The toy as a family: a folder of `config.json`, weights in either spelling, and the two files of its encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transpixeler.families.toy import codec
from transpixeler.families.toy.config import CLASS, PATCH, STRIDE, ToyConfig
from transpixeler.families.toy.model import ToyModel, fields
from transpixeler.families.toy.names import NAMES

from transpixeler.config.sections import UserError
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

_FILES = ("config.json", codec.VAE_FILE, codec.TEXT_FILE)


class ToyFolder(ModelFolder):
    """One toy on disk."""

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def folder(self) -> Path:
        return resolve(self.encoders, only=_FILES)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        file = _config_file(resolve(self.path, only=_FILES))
        if not file.is_file():
            raise UserError(f"model.path: {self.path} holds no config.json")
        return read_config(file)

    @cached_property
    def _checked(self) -> ToyConfig:
        return ToyConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry(STRIDE, self._checked.channels, PATCH, first_alone=False)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    def diffusers_config(self) -> dict[str, Any]:
        return {**self.config, "_class_name": CLASS}

    def clean_caption(self, text: str) -> str:
        return codec.clean_caption(text)

    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        return codec.fingerprint(self.folder, codec.VAE_FILE, digest)

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        return codec.fingerprint(self.folder, codec.TEXT_FILE, digest)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> ToyModel:
        return ToyModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return codec.ToyVae(self.folder, device=device)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return codec.ToyTextEncoder(self.folder, self._checked, device=device)


def _config_file(folder: Path) -> Path:
    """Return the transformer's config, which lies in a folder of its own where training wrote the model."""
    inner = folder / "transformer" / "config.json"
    return inner if inner.is_file() else folder / "config.json"


def _is_toy(path: Path) -> bool:
    file = _config_file(path)
    return file.is_file() and read_config(file).get("_class_name") == CLASS


FAMILY = Family(
    name="toy",
    title="Toy",
    names=NAMES,
    open=ToyFolder,
    recognises=_is_toy,
    sampling=SamplingDefaults(negative_prompt="dull", shift=3.0),
    lora_targets=ToyModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class="ToyPipeline",
    example="someone/toy",
)
