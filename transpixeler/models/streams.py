"""Locate each stream in a packed batch of latents and in the token sequence.

In: the streams' names, their latent shapes and the patch size. Out: grids, slices and views. Everything that depends on
shapes (scopes, RoPE, stream embeddings, unpatchify, receive buffers) asks this one value, so unequal grids are no
other path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Facts that a block needs of the sequence; plain values, so that a compiled block specialises on them."""

    rope: Tensor  # [T, head_dim / 2, 2], cosine and sine; a family may shape it otherwise
    lengths: tuple[int, ...]  # tokens of each stream, in the order of the sequence; text that flows comes after them
    groups: tuple[int, ...]  # tokens of each time group, in the order of the sequence
    kernel: str  # attention kernel
    rgb_attends_aux: bool = True
    copy_scope: bool = True  # copy what an adapter keeps for the backward pass, where that frees more than it takes
    recomputing: bool = False  # this is the recomputation: only what the backward pass keeps is needed

    @property
    def text_weight(self) -> float:
        """Return how often a text key counts beside all streams' keys, so that more streams do not outweigh it."""
        return sum(self.lengths) / self.lengths[0]

    def discards(self, gate: Tensor) -> bool:
        """Return whether a block's last output, which `gate` multiplies, is thrown away."""
        return self.recomputing and not gate.requires_grad  # a gate that trains needs what it multiplies


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
    """The shapes of one batch's streams; hashable, the key for all that is cached by shape.

    A time group is a run of tokens with one timestep. It is a whole stream, unless `cuts` names latent frames of that
    stream at which another group begins, such as 1 where a given first frame has a time of its own.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]  # latent (C, F, H, W) of each stream
    patch: Grid
    cuts: tuple[tuple[int, ...], ...] = ()  # of each stream; empty where every stream is one group

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shapes) > 0, (self.names, self.shapes)
        assert len(self.cuts) in (0, len(self.names)), (self.names, self.cuts)
        for _, *extent in self.shapes:
            assert all(n % p == 0 for n, p in zip(extent, self.patch, strict=True)), (self.shapes, self.patch)
        for (_, frames, *_), cuts in zip(self.shapes, self.cuts):
            inside = all(0 < cut < frames and cut % self.patch[0] == 0 for cut in cuts)
            assert inside and list(cuts) == sorted(set(cuts)), (self.shapes, self.cuts)

    @classmethod
    def equal(cls, names: Sequence[str], shape: Sequence[int], patch: Sequence[int]) -> StreamLayout:
        """Lay out streams that all have the same latent shape (C, F, H, W)."""
        channels, frames, height, width = shape
        return cls(tuple(names), ((channels, frames, height, width),) * len(names), _grid(patch))

    def cut(self, cuts: Sequence[Sequence[int]]) -> StreamLayout:
        """Return the same streams in other time groups: for each stream the latent frames where a group begins."""
        return replace(self, cuts=tuple(tuple(own) for own in cuts) if any(cuts) else ())

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """(f, h, w) in tokens of each stream."""
        return tuple(_grid([n // p for n, p in zip(shape[1:], self.patch, strict=True)]) for shape in self.shapes)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each stream."""
        return tuple(prod(grid) for grid in self.grids)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Latent elements of each stream."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Time groups in the order of the sequence."""
        found = []
        for stream, (_, frames, *_) in enumerate(self.shapes):
            starts = (0, *(self.cuts[stream] if self.cuts else ()))
            found += [Group(stream, start, end) for start, end in zip(starts, (*starts[1:], frames), strict=True)]
        return tuple(found)

    @cached_property
    def group_lengths(self) -> tuple[int, ...]:
        """Tokens of each time group."""
        frames = [prod(self.grids[group.stream][1:]) for group in self.groups]
        return tuple((group.end - group.start) // self.patch[0] * n for group, n in zip(self.groups, frames))

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Latent elements of each time group."""
        frames = [self.sizes[group.stream] // self.shapes[group.stream][1] for group in self.groups]
        return tuple((group.end - group.start) * n for group, n in zip(self.groups, frames))

    def groups_of(self, stream: int) -> range:
        """Return the places of a stream's time groups."""
        places = [place for place, group in enumerate(self.groups) if group.stream == stream]
        return range(places[0], places[-1] + 1)

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

    def split_groups(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, N] → [B, elements] of each time group."""
        if not self.cuts:
            return packed.split(self.sizes, dim=1)
        streams = self.unpack(packed)
        return tuple(streams[group.stream][:, :, group.start : group.end].flatten(1) for group in self.groups)

    def spread(self, values: Tensor) -> Tensor:
        """[B, G] → [B, N], each time group's number at each of its elements."""
        if not self.cuts:
            sizes = zip(values.unbind(1), self.sizes, strict=True)
            return torch.cat([value[:, None].expand(-1, size) for value, size in sizes], dim=1)
        frames = torch.tensor([group.end - group.start for group in self.groups], device=values.device)
        each = values.repeat_interleave(frames, dim=1).split([shape[1] for shape in self.shapes], dim=1)  # [B, F]
        rows = zip(each, self.shapes, strict=True)
        return torch.cat([v[:, None, :, None, None].expand(-1, *shape).flatten(1) for v, shape in rows], dim=1)


class Group(NamedTuple):
    """A time group: latent frames `start` to `end` of a stream."""

    stream: int
    start: int
    end: int


def _grid(numbers: Sequence[int]) -> Grid:
    frames, height, width = numbers
    return frames, height, width
