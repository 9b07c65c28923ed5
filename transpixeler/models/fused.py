"""Compute a block's formulas in fewer passes over a tensor: the same values out, and less kept for the backward pass.

Each is one function: compiled, the formula itself, which a compiler fuses; else an autograd function whose backward
pass is written out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring pairs of `[B, T, H, d]` by their token's angles.

    Complex numbers are one pass in eager mode; a compiler fuses the same product only when it is spelled out.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        cos, sin = rope[:, None].unbind(-1)
        real, imaginary = pairs.unbind(-1)
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None]).flatten(-2)


def norm_heads(x: Tensor, weight: Tensor, rope: Tensor | None = None, *, heads: int, eps: float) -> Tensor:
    """`[B, T, D]` → `[B, T, H, d]` in its dtype: root-mean-square norm over all heads together, then the rotation."""
    if torch.compiler.is_compiling():
        return norm_heads_plainly(x, weight, rope, heads=heads, eps=eps)
    return _NormHeads.apply(x, weight, rope, heads, eps).unflatten(-1, (heads, -1))


def norm_heads_plainly(x: Tensor, weight: Tensor, rope: Tensor | None = None, *, heads: int, eps: float) -> Tensor:
    y = F.rms_norm(_wide(x), weight.shape, weight, eps).unflatten(-1, (heads, -1))
    return (y if rope is None else rotate(y, rope)).to(x.dtype)


class _NormHeads(torch.autograd.Function):
    """y = R(x · w / rms(x)): one number a token and the rotation are one complex factor, over the heads alike."""

    @staticmethod
    def forward(ctx, x, weight, rope, heads, eps):
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # [B, T, 1]
        ctx.save_for_backward(x, weight, rope, inverse)
        ctx.heads = heads
        return _turn_(x * weight, _factor(inverse, rope, heads), heads).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rope, inverse = ctx.saved_tensors
        factor, wide = _factor(inverse, rope, ctx.heads), _wide(x)
        back = factor.conj() if factor.is_complex() else factor
        grad = _turn_(grad.to(weight.dtype, copy=True), back, ctx.heads)  # of x · w, over rms(x)
        grad_weight = (grad * wide).sum((0, 1)) if ctx.needs_input_grad[1] else None
        grad.mul_(weight)
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1).mul_(inverse.square()).div_(-x.shape[-1])
        return grad.addcmul_(wide, along).to(x.dtype), grad_weight, None, None, None


def _factor(inverse: Tensor, rope: Tensor | None, heads: int) -> Tensor:
    """[B, T, 1], or with a rotation complex [B, T, 1, d / 2]."""
    return inverse if rope is None else torch.view_as_complex(rope)[:, None] * inverse.unsqueeze(-1)


def _turn_(x: Tensor, factor: Tensor, heads: int) -> Tensor:
    """`[B, T, D]` times the factor, in place."""
    if not factor.is_complex():
        return x.mul_(factor)
    torch.view_as_complex(x.unflatten(-1, (heads, -1, 2))).mul_(factor)
    return x


def _wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
