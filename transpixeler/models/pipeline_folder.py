"""A model's folder as most families have it: a pipeline in diffusers' layout, or the transformer as one file.

In: a path, and the family's module of encoders. Out: what a `ModelFolder` answers, but for what is the family's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from transpixeler.config.sections import UserError
from transpixeler.models.damage import read_config
from transpixeler.models.family import Digest, ModelFolder, TextEncoder, Vae, file_digest
from transpixeler.models.names import Names
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

CONFIGS = ("transformer/config.json", "config.json")
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"


class Encoders(Protocol):
    """Functions that a family's module of encoders has; `path`: where they lie."""

    def vae_fingerprint(self, path: str | Path, digest: Digest = ...) -> str: ...

    def text_fingerprint(self, path: str | Path, digest: Digest = ...) -> str: ...

    def load_vae(self, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Vae: ...

    def load_text_encoder(self, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder: ...


class PipelineFolder(ModelFolder):
    """One model whose encoders are those of a module, by functions of the same names."""

    library: ClassVar[Encoders]

    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        return self.library.vae_fingerprint(self.encoders, digest)

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        return self.library.text_fingerprint(self.encoders, digest)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return self.library.load_vae(self.encoders, device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return self.library.load_text_encoder(self.encoders, device=device, dtype=dtype)

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config beside the encoders; empty where there is none."""
        place = resolve(self.encoders, only=(SCHEDULER,)) / SCHEDULER
        return read_config(place) if place.is_file() else {}

    def check_channels(self, found: int, wanted: int) -> None:
        """Refuse a VAE whose latents the transformer does not take."""
        if found != wanted:
            raise UserError(
                f"model.path: the VAE of {self.encoders} has {found} channels, and the transformer takes {wanted}; use "
                "the VAE that it was trained with"
            )


# -- the transformer's config


def configs_in(place: Path) -> list[Path]:
    return [place / name for name in CONFIGS if (place / name).is_file()]


def read_published(place: Path, path: str) -> dict[str, Any]:
    """Return the config in a folder. path: as the user gave it."""
    found = configs_in(place)
    if not found:
        raise UserError(f"model.path: {path} holds neither {CONFIGS[0]} nor {CONFIGS[1]}")
    return read_config(found[0])


def names_class(place: Path, name: str) -> bool:
    """Tell whether a folder's config names a class of diffusers."""
    found = configs_in(place)
    return bool(found) and read_config(found[0]).get("_class_name") == name


def check_pipeline(place: Path, path: str, *, made_for: str, use: str) -> None:
    """Refuse a folder that says that it is made for another pipeline. use: what to do instead."""
    if (index := place / INDEX).is_file():
        pipeline = read_config(index).get("_class_name", "")
        if pipeline not in (made_for, ""):
            raise UserError(
                f"model.path: {path} is made for {pipeline}, which is shown more than noise and cannot be trained "
                f"here; {use}"
            )


def config_by_shapes(
    path: Path, names: Names, read: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]], *, title: str
) -> dict[str, Any]:
    """Return the config of a file without one, which `read` makes of its tensors' shapes by internal name."""
    source = WeightSource(path, names.internal_names)
    try:
        return read({name: source.shape(name) for name in source.names()})
    except (KeyError, ValueError) as fault:
        raise UserError(f"model.path: {path} holds no {title}: {fault.args[0]} is not in it") from fault
