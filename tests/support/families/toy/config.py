"""The toy's config: the keys of its config.json go in, one frozen value comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

CLASS = "ToyTransformer3DModel"
STRIDE: Grid = (2, 8, 8)
PATCH: Grid = (1, 2, 2)
TIME_FREQUENCIES = 32


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of a small transformer of double-stream blocks, then single-stream ones."""

    num_attention_heads: int = 2
    attention_head_dim: int = 16
    channels: int = 4
    num_layers: int = 2
    num_single_layers: int = 2
    mlp_ratio: int = 4
    text_dim: int = 24
    text_length: int = 12
    pooled_dim: int = 20
    guidance: float = 3.5

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        return self.mlp_ratio * self.width

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> ToyConfig:
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"model.path: {config['_class_name']} is no toy; use a folder that write_toy made")
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
