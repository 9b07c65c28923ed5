"""The linear layer of every block: plain, over a quantized weight, or with a low-rank adapter on some tokens.

In: tokens and where each stream's lie. Out: the projection. One autograd function does all that is not plain, so that
nothing is computed on tokens out of scope, no pass over the output is spent on adding, and a quantized weight is never
kept in full precision for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.models.base import Tokens
from transpixeler.models.streams import span_slice

INT8 = "int8"


def dequantize(data: Tensor, scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """[out, in] back in `dtype`; int8 is stored under a float8 dtype because sharding takes float parameters only."""
    values = data.view(torch.int8) if kind == INT8 else data
    return values.to(dtype) * scale.to(dtype)


class Linear(nn.Linear):
    """`nn.Linear` that is told how many tokens each stream has, and whose weight may be quantized."""

    quantized: str = ""  # the kind, when `weight_data` and `weight_scale` stand in place of `weight`

    def forward(self, x: Tensor, lengths: Sequence[int] = (), part: Tensor | None = None) -> Tensor:
        if self.quantized:
            return project(x, self)
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype:  # a weight that is trained is kept in fp32 and multiplied in bf16
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)


def scope_copy(x: Tensor, tokens: Tokens, *linears: Linear) -> Tensor | None:
    """A copy of the tokens that these linears' adapters all act on, when the backward pass then holds fewer."""
    spans = {getattr(linear, "span", None) for linear in linears}
    if not tokens.lean or len(spans) > 1 or None in spans or not x.requires_grad:
        return None
    return x.detach()[:, span_slice(tokens.lengths, *spans)].clone()


def project(
    x: Tensor,
    linear: Linear,
    down: Tensor | None = None,
    up: Tensor | None = None,
    *,
    scale: float = 1.0,
    scope: slice = slice(0, 0),
    part: Tensor | None = None,
) -> Tensor:
    """Base projection of all tokens, plus the adapter's on the scope's; the base is frozen.

    `part`, a copy of the scope's tokens, is what is kept for the backward pass; a view would keep all tokens alive.
    """
    if linear.quantized:
        weight, weight_scale, kind = linear.weight_data, linear.weight_scale, linear.quantized
    else:
        weight, weight_scale, kind = linear.weight, None, ""
    return _Project.apply(x, weight, weight_scale, kind, linear.bias, down, up, scale, scope.start, scope.stop, part)


class _Project(torch.autograd.Function):
    """y = x Wᵀ + b;  y[:, scope] += s · (x[:, scope] Aᵀ) Bᵀ, added by the matmul itself in both directions."""

    @staticmethod
    def forward(ctx, x, weight, weight_scale, kind, bias, down, up, scale, start, stop, part):
        full = weight if weight_scale is None else dequantize(weight, weight_scale, kind, x.dtype)
        y = F.linear(x, full, bias)
        inner = None
        if down is not None:
            part = x[:, start:stop] if part is None else part
            inner = F.linear(part, down.to(x.dtype))  # [B, Ts, r]
            scaled = (up * scale).to(x.dtype)  # [out, r]
            y[:, start:stop].baddbmm_(inner, scaled.t().expand(x.shape[0], -1, -1))
        ctx.save_for_backward(weight, weight_scale, down, up, part, inner)
        ctx.kind, ctx.scale, ctx.start, ctx.stop = kind, scale, start, stop
        return y

    @staticmethod
    def backward(ctx, grad):
        weight, weight_scale, down, up, part, inner = ctx.saved_tensors
        dtype, grad_x, grad_down, grad_up = grad.dtype, None, None, None
        if ctx.needs_input_grad[0]:
            full = weight if weight_scale is None else dequantize(weight, weight_scale, ctx.kind, dtype)
            grad_x = grad @ full
        if down is not None:
            grad_part = grad[:, ctx.start : ctx.stop]
            grad_inner = grad_part @ (up * ctx.scale).to(dtype)  # [B, Ts, r]
            if grad_x is not None:
                grad_x[:, ctx.start : ctx.stop].baddbmm_(grad_inner, down.to(dtype).expand(grad.shape[0], -1, -1))
            grad_down = torch.bmm(grad_inner.mT, part).sum(0, dtype=down.dtype)
            grad_up = torch.bmm(grad_part.mT, inner).sum(0, dtype=up.dtype) * ctx.scale
        return grad_x, None, None, None, None, grad_down, grad_up, None, None, None, None
