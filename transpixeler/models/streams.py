"""Locate each stream in a packed batch of latents and in the token sequence.

In: the streams' names, their latent shapes and the patch size. Out: grids, slices and views. Everything that depends on
shapes (scopes, RoPE, stream embeddings, unpatchify, receive buffers) asks this one value, so unequal grids are no
other path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transpixeler.config import UserError

Shape = tuple[int, int, int, int]
Grid = tuple[int, int, int]
Scope = str | tuple[str, ...]  # "aux", "all" or names of streams


class Tokens(NamedTuple):
    """Facts that a block needs of the sequence; plain ints, so that a compiled block specialises on them."""

    rope: Tensor  # [T, head_dim / 2, 2], cosine and sine
    lengths: tuple[int, ...]  # tokens of each stream
    kernel: str  # attention kernel
    lean: bool = True  # copy what an adapter keeps for the backward pass, where that frees more than it takes
    again: bool = False  # computed once more for what the backward pass keeps, and not for the result


def scope_span(scope: Scope, names: Sequence[str]) -> tuple[int, int]:
    """First and one past the last stream of a scope, because a scope must be one slice of the sequence."""
    if scope == "all":
        return 0, len(names)
    if scope == "aux":
        if len(names) < 2:
            raise UserError(f"lora.scope: aux has no stream to act on: {names[0]!r} is the only one; use `all`")
        return 1, len(names)
    wanted = (scope,) if isinstance(scope, str) else tuple(scope)
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"lora.scope: no stream {unknown[0]!r}; there are {', '.join(names)} (or use `aux`, `all`)")
    indices = sorted({names.index(name) for name in wanted})
    if not indices or indices[-1] - indices[0] + 1 != len(indices):
        raise UserError(f"lora.scope: {list(wanted)} must be streams that stand next to each other in {list(names)}")
    return indices[0], indices[-1] + 1


def stream_embeddings(names: Sequence[str], width: int) -> nn.ParameterDict:
    """Make a vector for each stream that is marked by one, under its name."""
    if taken := [name for name in names if hasattr(nn.ParameterDict(), name)]:
        raise UserError(f"streams: {taken[0]!r} is torch's own name for something else; choose another")
    return nn.ParameterDict({name: torch.zeros(width) for name in names})


def span_slice(lengths: Sequence[int], span: tuple[int, int]) -> slice:
    """Slice the tokens of a span of streams, or whatever the lengths count."""
    start = sum(lengths[: span[0]])
    return slice(start, start + sum(lengths[span[0] : span[1]]))


@dataclass(frozen=True)
class StreamLayout:
    """The shapes of one batch's streams; hashable, the key for all that is cached by shape."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]  # latent (C, F, H, W) of each stream
    patch: Grid

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shapes) > 0, (self.names, self.shapes)
        for _, *extent in self.shapes:
            assert all(n % p == 0 for n, p in zip(extent, self.patch, strict=True)), (self.shapes, self.patch)

    @classmethod
    def equal(cls, names: Sequence[str], shape: Sequence[int], patch: Sequence[int]) -> StreamLayout:
        """All streams with the same latent shape (C, F, H, W)."""
        return cls(tuple(names), (tuple(shape),) * len(names), tuple(patch))

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """(f, h, w) in tokens of each stream."""
        return tuple(tuple(n // p for n, p in zip(shape[1:], self.patch, strict=True)) for shape in self.shapes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each stream."""
        return tuple(prod(grid) for grid in self.grids)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Latent elements of each stream."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    def element_slice(self, stream: int) -> slice:
        return span_slice(self.sizes, (stream, stream + 1))

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, N] → a view [B, C, F, H, W] of each stream."""
        parts = packed.split(self.sizes, dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True))

    def pack(self, streams: Sequence[Tensor]) -> Tensor:
        """[B, C, F, H, W] of each stream → [B, N]."""
        assert tuple(tuple(stream.shape[1:]) for stream in streams) == self.shapes
        return torch.cat([stream.flatten(1) for stream in streams], dim=1)

    def spread(self, per_stream: Tensor) -> Tensor:
        """[B, S] → [B, N], each stream's number at each of its elements."""
        sizes = zip(per_stream.unbind(1), self.sizes, strict=True)
        return torch.cat([value[:, None].expand(-1, size) for value, size in sizes], dim=1)
