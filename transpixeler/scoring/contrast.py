"""Compare each sample with all others of the global batch: every rank's vectors in; a loss with its gradient out.

The loss is a sum over this rank's own rows, so that gradients of all ranks add up to those of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gathered(torch.autograd.Function):
    """Concatenate every rank's samples; going back, each rank gets the sum of what all ranks found for its own."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, vectors.contiguous())
        ctx.own = slice(dist.get_rank() * vectors.shape[1], (dist.get_rank() + 1) * vectors.shape[1])
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[:, ctx.own]


def gathered(vectors: Tensor, ranks: int) -> Tensor:
    """[kinds, own samples, D] → [kinds, all samples, D], in the order of ranks. A collective call."""
    return vectors if ranks == 1 else _Gathered.apply(vectors)  # pyright: ignore[reportReturnType]


def contrast(ones: Tensor, others: Tensor, scale: Tensor, *, own: range, same: Tensor) -> Tensor:
    """Return the symmetric cross entropy of finding each one's other among all, and back, over `own` rows of n.

    same: [n, n], True where two samples share what is looked for, so that neither is wrong for the other.
    """
    count = len(ones)
    rows = torch.arange(own.start, own.stop, device=ones.device)
    hidden = same[own.start : own.stop].clone()
    hidden[torch.arange(len(rows), device=rows.device), rows] = False
    losses = [
        F.cross_entropy((scale * a[own.start : own.stop] @ b.T).masked_fill(hidden, -torch.inf), rows, reduction="sum")
        for a, b in ((ones, others), (others, ones))
    ]
    return (losses[0] + losses[1]) / (2 * count)


def alike(keys: Sequence[object]) -> Tensor:
    """Return [n, n]: where two keys are equal."""
    numbers: dict[object, int] = {}
    found = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    return found[:, None] == found
