"""Multiply tokens by small matrices: one matrix for all tokens, or one for each run of them.

In: tokens [B, S, …], a matrix a run [n, …] and how many tokens each run has. Where runs are equally long, one matmul
takes all runs of a sample; else one takes a run of all samples. Nothing is computed for a run with another's matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Stack the [a, b] of each run to [n, a, b]; a single one is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack([*matrices])


def product(x: Tensor, matrices: Tensor, runs: Sequence[int]) -> Tensor:
    """[B, S, c] · [n, c, d] → [B, S, d]."""
    if len(runs) == 1:
        return F.linear(x, matrices[0].mT)
    y = x.new_empty(*x.shape[:-1], matrices.shape[-1])
    for own, tokens, matrix in zip(_batches(y, runs), _batches(x, runs), _for_batches(matrices, x, runs), strict=True):
        own.baddbmm_(tokens, matrix, beta=0)
    return y


def add_product_(y: Tensor, x: Tensor, matrices: Tensor, runs: Sequence[int]) -> None:
    """Add [B, S, c] · [n, c, d] to y [B, S, d], in place and by the matmul itself."""
    for own, tokens, matrix in zip(_batches(y, runs), _batches(x, runs), _for_batches(matrices, x, runs), strict=True):
        own.baddbmm_(tokens, matrix)


def summed_products(a: Tensor, b: Tensor, runs: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[B, S, m], [B, S, k] → [n, m, k]: aᵀ b of each run, summed over the samples, in `dtype`."""
    pairs = list(zip(_batches(a, runs), _batches(b, runs), strict=True))
    if not _by_sample(runs):
        return stacked([summed_product(one.mT, other, dtype) for one, other in pairs])
    return torch.stack([_bmm(one.mT, other, dtype) for one, other in pairs]).sum(0)


def summed_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, m, T] · [B, T, n] → [m, n], summed over the batch too, in `dtype`."""
    return _bmm(a, b, dtype).sum(0)


def _bmm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply batches, with the result in `dtype`.

    A GPU adds in fp32 whatever it multiplies; a sum over ten thousands of tokens is not rounded to bf16 at its end.
    """
    if a.dtype == dtype:
        return torch.bmm(a, b)
    if dtype == torch.float32 and a.is_cuda:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def _by_sample(runs: Sequence[int]) -> bool:
    """Tell whether all runs of a sample go into one matmul."""
    return len(runs) > 1 and len(set(runs)) == 1


def _batches(x: Tensor, runs: Sequence[int]) -> list[Tensor]:
    """View [B, S, c] as what one matmul takes each: [n, tokens, c] of a sample, or [B, tokens, c] of a run."""
    if _by_sample(runs):
        return [sample.unflatten(0, (len(runs), runs[0])) for sample in x.unbind(0)]
    return list(x.split([*runs], dim=1))


def _for_batches(matrices: Tensor, x: Tensor, runs: Sequence[int]) -> list[Tensor]:
    """Return the matrices of each of `_batches`."""
    if _by_sample(runs):
        return [matrices] * len(x)
    return [matrix.expand(len(x), -1, -1) for matrix in matrices.unbind(0)]
