"""What all ranks know of a step once it ran: its losses, whether it is sound, and what was asked for meanwhile.

In: each rank's errors and wishes. Out: the same `Facts` on every rank, from one small all-reduce. Whatever a rank
decides on is decided from here, so that no rank ever waits for another that decided otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from transpixeler.flow.objective import Example

T_BINS = 5  # equal parts of [0, 1] that losses are told by


@dataclass(frozen=True)
class Wishes:
    """What this rank asks for; one rank's wish is everyone's."""

    save: bool = False  # a checkpoint, by file or signal
    quit: bool = False
    checkpoint: bool = False  # by the clock
    adapter: bool = False  # by the clock


@dataclass(frozen=True)
class Facts:
    """The same on every rank."""

    loss: float
    grad_norm: float
    by_stream: dict[str, float | None]
    by_time: tuple[float | None, ...]
    finite: bool
    wishes: Wishes


def agree(errors: Tensor, example: Example, grad_norm: Tensor, wishes: Wishes, *, counts: bool) -> Facts:
    """`errors` [b, S] of this rank's samples; `counts` on one rank of each pipeline, whose ranks hold the same."""
    weights, times = example.weights.to(errors.device), example.timesteps.to(errors.device)
    counted = (weights > 0).double() * float(counts)
    bins = (times * T_BINS).long().clamp(max=T_BINS - 1)
    by_bin = torch.nn.functional.one_hot(bins, T_BINS) * counted[..., None]  # [b, S, T_BINS]
    values = torch.where(counted > 0, errors, 0.0).double()
    sound = torch.isfinite(errors).all() & torch.isfinite(grad_norm)
    flags = [wishes.save, wishes.quit, wishes.checkpoint, wishes.adapter]
    parts = [
        (errors.double() * weights).sum()[None] * float(counts),
        values.sum(0),
        counted.sum(0),
        (values[..., None] * by_bin).sum((0, 1)),
        by_bin.sum((0, 1)),
        (~sound)[None].double(),
        torch.tensor(flags, dtype=torch.float64, device=errors.device),
    ]
    sums = torch.cat(parts)
    dist.all_reduce(sums)
    loss, streams, stream_counts, times_sum, time_counts, unsound, asked = (
        part.tolist() for part in sums.split([len(part) for part in parts])
    )
    return Facts(
        loss=loss[0],
        grad_norm=float(grad_norm),
        by_stream=dict(zip(example.layout.names, _ratios(streams, stream_counts), strict=True)),
        by_time=tuple(_ratios(times_sum, time_counts)),
        finite=not unsound[0],
        wishes=Wishes(*map(bool, asked)),
    )


def _ratios(totals: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]
