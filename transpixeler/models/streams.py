"""Locate each stream in a packed batch of latents and in the token sequence.

In: the streams' names, their latent shapes and the patch size. Out: grids, slices and views. Everything that depends on
shapes (scopes, RoPE, stream embeddings, unpatchify, receive buffers) asks this one value, so unequal grids are no
other path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transpixeler.config.sections import UserError

Shape = tuple[int, int, int, int]
Grid = tuple[int, int, int]
Scope = str | tuple[str, ...]  # "aux", "all" or names of streams


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


# Frames of a stream that stand beside its video: every k-th after the first, or `LAST`, the last one alone.
FramesOf = tuple[int, int]  # (stream, k or LAST)
LAST = 0


class Beside(NamedTuple):
    """Frames of a stream that stand beside its video, each encoded alone."""

    stream: int
    every: int  # as in `FramesOf`
    times: tuple[float, ...]  # of each, in latent frames of the video: frame p of a VAE of stride s is at p / s


def frames_beside(every: int, frames: int) -> range:
    """Return which frames of a video of so many stand beside it; none where its first is all."""
    return range(every, frames, every) if every else range(max(1, frames - 1), frames)


class Past(NamedTuple):
    """Latent frames that come before a video, at a coarser resolution than its own."""

    frames: int
    scale: int  # rows and columns of the video that one of their own covers


@dataclass(frozen=True)
class StreamLayout:
    """The shapes of one batch's streams; hashable, the key for all that is cached by shape.

    A segment is a run of tokens with a grid of its own: a stream's video, before it what is its `past`, and after it
    what stands `beside` it, frames that are encoded alone because a latent frame of a video holds several. A time group
    is a run of tokens with one timestep. It is a whole segment, unless `cuts` names latent frames of that stream's
    video at which another group begins, such as 1 where a given first frame has a time of its own.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]  # latent (C, F, H, W) of each stream's video
    patch: Grid
    cuts: tuple[tuple[int, ...], ...] = ()  # of each stream; empty where every segment is one group
    scales: tuple[int, ...] = ()  # of each stream: rows and columns of stream 0 that one of its own covers; empty: 1
    beside: tuple[Beside, ...] = ()  # frames that are segments of their own
    past: tuple[Past, ...] = ()  # of every stream, the oldest first; each is a segment of its own

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.shapes) > 0, (self.names, self.shapes)
        if self.scales and max(self.scales) == 1:
            object.__setattr__(self, "scales", ())  # one key for one layout
        assert len(self.cuts) in (0, len(self.names)), (self.names, self.cuts)
        assert len(self.scales) in (0, len(self.names)), (self.names, self.scales)
        assert not self.beside or self.patch[0] == 1, "a frame alone is no whole patch"
        assert not self.past or (self.patch[0] == 1 and not self.cuts and not self.beside), "the past is whole"
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

    def with_beside(self, wanted: Iterable[FramesOf], frames: int) -> StreamLayout:
        """Return the same videos, of so many frames of pixels, with those that are wanted beside them."""
        found = []
        for stream, every in sorted(set(wanted)):
            strides = self.shapes[stream][1] - 1  # of the video, after its first frame
            if places := frames_beside(every, frames):
                found.append(Beside(stream, every, tuple(place * strides / (frames - 1) for place in places)))
        return replace(self, beside=tuple(found))

    def with_lasts(self, streams: Iterable[int]) -> StreamLayout:
        """Return the same videos, those of `streams` followed by their last frame."""
        return self.with_beside([(stream, LAST) for stream in streams], self.shapes[0][1])

    def only(self, start: int, stop: int) -> StreamLayout:
        """Return the layout of some neighbouring streams, where their positions do not matter."""
        span = slice(start, stop)
        beside = tuple(one._replace(stream=one.stream - start) for one in self.beside if start <= one.stream < stop)
        parts = {name: getattr(self, name)[span] for name in ("names", "shapes", "cuts", "scales")}
        return replace(self, **parts, beside=beside)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Segments in the order of the sequence."""
        found = []
        for stream, shape in enumerate(self.shapes):
            scale = self.scales[stream] if self.scales else 1
            channels, _, height, width = shape
            begin = 0
            for frames, coarser in self.past:
                small = (channels, frames, height // coarser, width // coarser)
                found.append(Segment(stream, small, self.patch, scale * coarser, begin=begin, past=True))
                begin += frames
            found.append(Segment(stream, shape, self.patch, scale, begin=begin))
            for one in (one for one in self.beside if one.stream == stream):
                found.append(Segment(stream, (channels, len(one.times), height, width), self.patch, scale, one))
        return tuple(found)

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """(f, h, w) in tokens of each segment."""
        return tuple(segment.grid for segment in self.segments)

    @cached_property
    def segment_lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple(prod(grid) for grid in self.grids)

    @cached_property
    def segments_by_stream(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each segment of each stream."""
        pairs = list(zip(self.segments, self.segment_lengths, strict=True))
        return tuple(tuple(n for segment, n in pairs if segment.stream == s) for s in range(len(self.names)))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each stream."""
        return self._by_stream(self.segment_lengths)

    @cached_property
    def segment_sizes(self) -> tuple[int, ...]:
        """Latent elements of each segment."""
        return tuple(prod(segment.shape) for segment in self.segments)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Latent elements of each stream."""
        return self._by_stream(self.segment_sizes)

    def _by_stream(self, counts: Sequence[int]) -> tuple[int, ...]:
        pairs = list(zip(self.segments, counts, strict=True))
        return tuple(sum(n for segment, n in pairs if segment.stream == s) for s in range(len(self.names)))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Time groups in the order of the sequence."""
        found = []
        for segment in self.segments:
            starts = (0, *(self.cuts[segment.stream] if self.cuts and not segment.alone else ()))
            ends = (*starts[1:], segment.shape[1])
            pairs = zip(starts, ends, strict=True)
            found += [Group(segment.stream, start, end, segment.alone, segment.past) for start, end in pairs]
        return tuple(found)

    @cached_property
    def group_lengths(self) -> tuple[int, ...]:
        """Tokens of each time group."""
        if not self.cuts:
            return self.segment_lengths
        frames = [prod(n // p for n, p in zip(self.shapes[group.stream][2:], self.patch[1:])) for group in self.groups]
        return tuple((group.end - group.start) // self.patch[0] * n for group, n in zip(self.groups, frames))

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Latent elements of each time group."""
        if not self.cuts:
            return self.segment_sizes
        frames = [prod(self.shapes[group.stream]) // self.shapes[group.stream][1] for group in self.groups]
        return tuple((group.end - group.start) * n for group, n in zip(self.groups, frames))

    @cached_property
    def frame_runs(self) -> tuple[tuple[Run, ...], ...]:
        """Tokens of each latent frame of each stream, with its place in time, in the order of the sequence."""
        assert self.patch[0] == 1, "each token is of one latent frame"
        found: list[list[Run]] = [[] for _ in self.names]
        for segment in self.segments:
            frames, rows, columns = segment.grid
            times = segment.beside.times if segment.beside else range(segment.begin, segment.begin + frames)
            found[segment.stream] += [Run(rows * columns, time) for time in times]
        return tuple(tuple(runs) for runs in found)

    def groups_of(self, stream: int) -> range:
        """Return the places of a stream's time groups."""
        places = [place for place, group in enumerate(self.groups) if group.stream == stream]
        return range(places[0], places[-1] + 1)

    @property
    def text_group(self) -> int:
        """Return the time group whose time text takes: the last one of stream 0's video."""
        return [not group.stream and not group.alone for group in self.groups].count(True) - 1

    @property
    def whole(self) -> bool:
        """Tell whether every stream is one time group."""
        return len(self.groups) == len(self.names)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    def element_slice(self, stream: int) -> slice:
        return span_slice(self.sizes, (stream, stream + 1))

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, N] → a view [B, C, F, H, W] of each segment."""
        parts = packed.split(self.segment_sizes, dim=1)
        return tuple(part.unflatten(1, one.shape) for part, one in zip(parts, self.segments, strict=True))

    def videos(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, N] → a view [B, C, F, H, W] of each stream's video."""
        pairs = zip(self.unpack(packed), self.segments, strict=True)
        return tuple(part for part, one in pairs if not one.alone and not one.past)

    def pack(self, segments: Sequence[Tensor]) -> Tensor:
        """[B, C, F, H, W] of each segment → [B, N]."""
        assert [tuple(part.shape[1:]) for part in segments] == [one.shape for one in self.segments]
        return torch.cat([part.flatten(1) for part in segments], dim=1)

    def split_groups(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, N] → [B, elements] of each time group."""
        if not self.cuts:
            return packed.split(self.segment_sizes, dim=1)
        parts = {(one.stream, one.alone): part for one, part in zip(self.segments, self.unpack(packed), strict=True)}
        assert len(parts) == len(self.segments), "a stream has one segment beside its video in a step"
        return tuple(parts[one.stream, one.alone][:, :, one.start : one.end].flatten(1) for one in self.groups)

    def spread(self, values: Tensor) -> Tensor:
        """[B, G] → [B, N], each time group's number at each of its elements."""
        if not self.cuts:
            sizes = zip(values.unbind(1), self.segment_sizes, strict=True)
            return torch.cat([value[:, None].expand(-1, size) for value, size in sizes], dim=1)
        frames = torch.tensor([group.end - group.start for group in self.groups], device=values.device)
        each = values.repeat_interleave(frames, dim=1).split([one.shape[1] for one in self.segments], dim=1)  # [B, F]
        rows = zip(each, self.segments, strict=True)
        return torch.cat([v[:, None, :, None, None].expand(-1, *one.shape).flatten(1) for v, one in rows], dim=1)


class Run(NamedTuple):
    """Tokens that stand together in the sequence, and are of one latent frame."""

    tokens: int
    frame: float  # its place in time; one that stands beside a video may be between two


class Segment(NamedTuple):
    """A run of tokens with a grid of its own."""

    stream: int
    shape: Shape  # latent (C, F, H, W)
    patch: Grid
    scale: int = 1  # rows and columns of stream 0 that one of its own covers
    beside: Beside | None = None  # which frames of the stream it holds, each encoded alone; None: it is the video
    begin: int = 0  # latent frames before it
    past: bool = False  # it comes before the video

    @property
    def alone(self) -> bool:
        """Tell frames that are encoded alone from a video."""
        return self.beside is not None

    @property
    def grid(self) -> Grid:
        """(f, h, w) in tokens."""
        return _grid([n // p for n, p in zip(self.shape[1:], self.patch, strict=True)])

    def positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places in time, height and width of its tokens, in fp64 and in tokens of stream 0.

        A token of another scale stands in the middle of those that it covers, a frame that is encoded alone at its own
        time among the video's latent frames.
        """
        f, h, w = self.grid
        time, *sides = (torch.arange(n, dtype=torch.float64) for n in (f, h, w))
        rows, columns = ((side + 0.5) * self.scale - 0.5 for side in sides)
        time = time + self.begin
        return torch.tensor(self.beside.times, dtype=torch.float64) if self.beside else time, rows, columns


class Group(NamedTuple):
    """A time group: latent frames `start` to `end` of a stream's video, of what stands beside it, or of its past."""

    stream: int
    start: int
    end: int
    alone: bool = False
    past: bool = False


def _grid(numbers: Sequence[int]) -> Grid:
    frames, height, width = numbers
    return frames, height, width
