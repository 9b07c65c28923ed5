"""Base weights that every rank draws alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from transpixeler.flow import draws
from transpixeler.models.backbone import Backbone
from transpixeler.models.meta import on_meta


class SeededSource:
    """Base weights that are a pure function of their name, so that every rank reads the same model."""

    path = Path("seeded")

    def __init__(self, make: Callable[[], Backbone]) -> None:
        with on_meta():
            parameters = dict(make().named_parameters())
        self._shapes = {n: tuple(p.shape) for n, p in parameters.items() if "stream_embedding" not in n}

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read_slice(self, name: str, slices: Sequence[slice]) -> Tensor:
        shape = self._shapes[name]
        value = torch.randn(shape, generator=draws.generator(name)) / max(shape[-1], 1) ** 0.5
        return (1 + 0.1 * value if "norm" in name and name.endswith("weight") else value)[tuple(slices)]
