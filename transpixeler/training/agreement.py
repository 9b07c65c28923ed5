"""Share with all ranks what each knows of a step: its losses, whether they are finite, and what is due after it.

In: each rank's errors and what it wants. Out: the same `Facts` on every rank, from one small all-reduce. Ranks decide
from these alone, so that none waits for another that decided otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from transpixeler.flow.objective import Example, by_stream

T_BINS = 5  # equal parts of [0, 1], by which losses are told


@dataclass(frozen=True)
class Due:
    """Saves that are due at a step boundary, and reasons to stop; what is due on one rank is due on all."""

    save: bool = False  # a checkpoint, by file or signal
    quit: bool = False  # likewise, with the end of training
    checkpoint: bool = False  # by the clock
    adapter: bool = False  # a save, by the clock
    lost: bool = False  # the run's folder, so that nothing can be saved


@dataclass(frozen=True)
class Facts:
    """Results of a step; the same on every rank."""

    loss: float
    grad_norm: float
    by_stream: dict[str, float | None]
    by_time: tuple[float | None, ...]
    finite: bool  # on every rank; else the update is left out
    due: Due


def agree(errors: Sequence[Tensor], examples: Sequence[Example], grad_norm: Tensor, due: Due, *, counts: bool) -> Facts:
    """Sum losses over all ranks, and tell whether the step's update may be made. A collective call.

    errors: [b, G] of each of this rank's examples. counts: true on one of the ranks that hold the same samples' errors.
    """
    pairs = zip(errors, examples, strict=True)
    own = torch.stack([_sums(each, example, counts=counts) for each, example in pairs]).sum(0)
    own[-1] += ~torch.isfinite(grad_norm)
    flags = torch.tensor(astuple(due), dtype=torch.float64, device=own.device)
    sums = torch.cat([own, flags])
    dist.all_reduce(sums)
    names = examples[0].layout.names
    sizes = [1, len(names), len(names), T_BINS, T_BINS, 1, len(flags)]
    loss, streams, stream_counts, times_sum, time_counts, unsound, asked = (p.tolist() for p in sums.split(sizes))
    return Facts(
        loss=loss[0],
        grad_norm=float(grad_norm),
        by_stream=dict(zip(names, _ratios(streams, stream_counts), strict=True)),
        by_time=tuple(_ratios(times_sum, time_counts)),
        finite=not unsound[0],
        due=Due(*map(bool, asked)),
    )


def _sums(errors: Tensor, example: Example, *, counts: bool) -> Tensor:
    """Return one example's loss, errors by stream and by time with their counts, and whether some are not finite."""
    weights, times = example.weights.to(errors.device), example.timesteps.to(errors.device)
    counted = (weights > 0).double() * float(counts)
    bins = (times * T_BINS).long().clamp(max=T_BINS - 1)
    by_bin = torch.nn.functional.one_hot(bins, T_BINS) * counted[..., None]  # [b, G, T_BINS]
    values = torch.where(counted > 0, errors, 0.0).double()
    of_streams, counted_streams = by_stream(values, counted, example.layout)
    parts = [
        (errors.double() * weights).sum()[None] * float(counts),
        of_streams.sum(0),
        counted_streams.sum(0),
        (values[..., None] * by_bin).sum((0, 1)),
        by_bin.sum((0, 1)),
        (~torch.isfinite(errors).all())[None].double(),
    ]
    return torch.cat(parts)


def _ratios(totals: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]
