"""Share one sequence out over ranks (Ulysses): each holds a part of every segment, and attends for some of the heads.

In: this rank's tokens with all heads. Out: all tokens with its share of the heads, for the attention among streams.
Parts differ by one token at most and messages by as much: nothing is padded, so nothing needs a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The ranks that share a sequence, and which of them this one is."""

    group: dist.ProcessGroup
    rank: int
    ranks: int

    def part(self, length: int, rank: int | None = None) -> slice:
        """Return the tokens that a rank holds of so many; this rank's where none is named."""
        place = self.rank if rank is None else rank
        return slice(length * place // self.ranks, length * (place + 1) // self.ranks)

    def count(self, length: int, rank: int | None = None) -> int:
        """Count the tokens that a rank holds of so many."""
        own = self.part(length, rank)
        return own.stop - own.start

    def most(self, length: int) -> int:
        """Count those of the rank that holds the most."""
        return -(-length // self.ranks)

    def cut(self, x: Tensor, runs: Sequence[int], dim: int = 1) -> Tensor:
        """Return this rank's part of each run of tokens."""
        parts = zip(x.split(tuple(runs), dim), runs, strict=True)
        return torch.cat([each.narrow(dim, self.part(run).start, self.count(run)) for each, run in parts], dim)

    def group_counts(self, groups: Sequence[int], runs: Sequence[int]) -> tuple[int, ...]:
        """Count this rank's tokens of each time group, which lies in one of the runs; a cut may go through it."""
        parts = zip((0, *accumulate(runs)), map(self.part, runs))
        own = [(begin + part.start, begin + part.stop) for begin, part in parts]
        return tuple(
            sum(max(0, min(end, stop) - max(begin, start)) for start, stop in own)
            for begin, end in pairwise((0, *accumulate(groups)))
        )


@dataclass(frozen=True)
class Shared:
    """The whole sequence, of which this rank holds a part."""

    context: Context
    segments: tuple[tuple[int, ...], ...]  # tokens of each stream's segments
    text: int = 0  # tokens of text that flows after them

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each stream."""
        return tuple(map(sum, self.segments))

    @property
    def runs(self) -> tuple[int, ...]:
        """Tokens of each run that is shared out by itself."""
        return (*(length for own in self.segments for length in own), *([self.text] if self.text else []))

    def rgb(self) -> Shared:
        """Return stream 0 alone, with the text."""
        return replace(self, segments=(self.segments[0], *(() for _ in self.segments[1:])))

    def companions(self) -> Shared:
        """Return the other streams alone, beside which no text flows."""
        return replace(self, segments=((), *self.segments[1:]), text=0)

    def _counts(self) -> list[list[int]]:
        """Count by rank, and by run, the tokens that each holds."""
        return [[self.context.count(run, rank) for run in self.runs] for rank in range(self.context.ranks)]

    # -- between all heads of a part and some heads of all

    def to_heads(self, *parts: Tensor) -> list[Tensor]:
        """Exchange tensors alike, [B, own tokens, H, d], for [B, T, H / ranks, d] in the order of the sequence."""
        ranks, counts = self.context.ranks, self._counts()
        own, held = parts[0].shape[1], [sum(row) for row in counts]
        sent = torch.stack([part.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4) for part in parts], dim=2)
        sent = sent.flatten(0, 1)  # [ranks · own, n, B, H / ranks, d]
        received = _Exchange.apply(sent, held, [own] * ranks, self.context.group)  # [T, n, B, H / ranks, d]
        del sent  # three tensors, before as many are made of what was received
        return [_by_run(part, counts).transpose(0, 1) for part in received.unbind(1)]

    def to_tokens(self, seen: Tensor) -> Tensor:
        """Exchange [B, T, H / ranks, d] for [B, own tokens, H, d]: the way back."""
        ranks, counts = self.context.ranks, self._counts()
        held = [sum(row) for row in counts]
        own = held[self.context.rank]
        sent = _by_rank(seen.transpose(0, 1), counts)
        received = _Exchange.apply(sent, [own] * ranks, held, self.context.group)
        return received.unflatten(0, (ranks, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def gather(self, values: Tensor) -> Tensor:
        """Return [B, T, n] of the streams from every rank's [B, own tokens, n], for a loss that each takes of all."""
        return _Gather.apply(values, replace(self, text=0))

    def gathered(self, values: Tensor) -> Tensor:
        """Do what `gather` does, without a backward pass."""
        ranks, counts = self.context.ranks, self._counts()
        sent = values.transpose(0, 1).repeat(ranks, 1, 1)  # an all-gather takes no parts of different sizes
        own, held = values.shape[1], [sum(row) for row in counts]
        received = _all_to_all(sent, held, [own] * ranks, self.context.group)
        return _by_run(received, counts).transpose(0, 1)


class _Exchange(torch.autograd.Function):
    """Send each rank its rows and receive those that it has for this one; gradients go back the same way."""

    @staticmethod
    def forward(ctx, x, received, sent, group):
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_to_all(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
    return found


class _Gather(torch.autograd.Function):
    """All ranks' tokens; each takes the same loss of them, so the gradient of its own is its part of that."""

    @staticmethod
    def forward(ctx, values, shared):
        ctx.shared = shared
        return shared.gathered(values)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.shared.context.cut(grad, ctx.shared.runs), None


def _by_run(x: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Bring rows that come rank by rank, in each run by run, into the order of the sequence."""
    pieces = dict(zip(_places(counts), x.split([n for row in counts for n in row]), strict=True))
    order = sorted(pieces, key=lambda place: (place[1], place[0]))
    return x if order == list(pieces) else torch.cat([pieces[place] for place in order])


def _by_rank(x: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Undo `_by_run`."""
    order = sorted(_places(counts), key=lambda place: (place[1], place[0]))
    pieces = dict(zip(order, x.split([counts[rank][run] for rank, run in order]), strict=True))
    places = list(_places(counts))
    return x if order == places else torch.cat([pieces[place] for place in places])


def _places(counts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield (rank, run), rank by rank."""
    yield from ((rank, run) for rank, row in enumerate(counts) for run in range(len(row)))
