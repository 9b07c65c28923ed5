"""A model's folder as most families have it: a pipeline in diffusers' layout, or the transformer as one file.

In: a path, and the family's module of encoders. Out: what a `ModelFolder` answers, but for what is the family's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from transpixeler.config import UserError
from transpixeler.models.damage import read_config
from transpixeler.models.family import Digest, ModelFolder, TextEncoder, Vae, file_digest
from transpixeler.models.names import Names
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

CONFIGS = ("transformer/config.json", "config.json")
INDEX = "model_index.json"
_SCHEDULER = "scheduler/scheduler_config.json"


class Encoders(Protocol):
    """What a family's module of encoders has; `path`: where they lie."""

    def vae_fingerprint(self, path: str | Path, digest: Digest = ...) -> str: ...

    def text_fingerprint(self, path: str | Path, digest: Digest = ...) -> str: ...

    def load_vae(self, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Vae: ...


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
        load: Callable[..., TextEncoder] = getattr(self.library, "load_text_encoder")  # noqa: B009
        return load(self.encoders, device=device, dtype=dtype)

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config beside the encoders; empty where there is none."""
        place = resolve(self.encoders, only=(_SCHEDULER,)) / _SCHEDULER
        return read_config(place) if place.is_file() else {}
