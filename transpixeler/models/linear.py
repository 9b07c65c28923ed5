"""The linear layer of every block: plain, over a quantized weight, or with a low-rank adapter on some tokens.

In: tokens and where each stream's lie. Out: the projection. One autograd function does it with a frozen weight, so that
nothing is computed on tokens out of scope and no pass over the output is spent on adding; another does it with a
trained one. Neither keeps a weight for the backward pass in another form than it is held in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.models.lowrank import add_product_, product, stacked, summed_product, summed_products
from transpixeler.models.streams import span_slice
from transpixeler.models.tokens import Tokens

INT8 = "int8"
Pair = tuple[Tensor, Tensor, Tensor | None]  # A [r, in], B [out, r], and of a DoRA the norms [out] of its rows
ALL = slice(None)


def dequantize(data: Tensor, scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """[out, in] back in `dtype`; int8 is stored under a float8 dtype, bit for bit."""
    values = data.view(torch.int8) if kind == INT8 else data
    return (values.to(dtype) * scale).to(dtype)  # the product in fp32: bf16 holds the values, but not the scale


class Linear(nn.Linear):
    """`nn.Linear` that is told how many tokens each stream has, and whose weight may be quantized.

    With `gelu` it takes what that takes; without `needs_output` it makes only what the backward pass keeps, no result.
    """

    quantized: str = ""  # the kind, when `weight_data` and `weight_scale` stand in place of `weight`
    weight_data: Tensor
    weight_scale: Tensor

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        lengths: Sequence[int] = (),
        part: Tensor | None = None,
        *,
        gelu: bool = False,
        needs_output: bool = True,
        rows: slice = ALL,
    ) -> Tensor:
        """rows: of the weight, whose part of the output is wanted."""
        if self.quantized or not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return project(x, self, gelu=gelu, needs_output=needs_output, rows=rows)
        weight, bias = _rows_of(rows, self.weight, self.bias)
        return _Trained.apply(activated(x, gelu), weight, bias)


def project_shared(x: Tensor, tokens: Tokens, *linears: Linear) -> list[Tensor]:
    """Project the same tokens by several linears, whose adapters then share one copy of the tokens in their scope."""
    part = scope_copy(x, tokens, *linears)
    return [linear(x, tokens.lengths, part) for linear in linears]


def project_seen(x: Tensor, tokens: Tokens, linear: Linear) -> Tensor:
    """Project what attention gave: its own backward pass keeps that whole, unless ranks share the sequence."""
    return linear(x, tokens.lengths, scope_copy(x, tokens, linear) if tokens.shared is not None else None)


class FeedForward(nn.Sequential):
    """Linear, GELU, linear. The activation is the second projection's, which keeps what goes into it for backward."""

    def __init__(self, width: int, inner: int, *, bias: bool = True) -> None:
        super().__init__(Linear(width, inner, bias=bias), nn.Identity(), Linear(inner, width, bias=bias))

    def forward(self, x: Tensor, tokens: Tokens, *, gate: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """gate: multiplies the output, the last of its block; in a recomputation the output may be discarded."""
        first, last = cast(Linear, self[0]), cast(Linear, self[2])
        (inner,) = project_shared(x, tokens, first)
        return last(inner, tokens.lengths, gelu=True, needs_output=not tokens.discards(gate))


def full_weight(linear: Linear, dtype: torch.dtype) -> Tensor:
    """Return a linear's whole weight, in `dtype`, whatever it is held in."""
    if linear.quantized:
        return dequantize(linear.weight_data, linear.weight_scale, linear.quantized, dtype)
    return linear.weight.to(dtype)


def activated(x: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x, approximate="tanh") if gelu else x


def scope_copy(x: Tensor, tokens: Tokens, *linears: Linear) -> Tensor | None:
    """Copy the tokens that these linears' adapters all act on, when the backward pass then holds fewer."""
    span, *others = (getattr(linear, "span", None) for linear in linears)
    if span is None or any(other != span for other in others) or not tokens.copy_scope or not x.requires_grad:
        return None
    scope = span_slice(tokens.lengths, span)
    return None if scope == slice(0, x.shape[1]) else x.detach()[:, scope].clone()


def project(
    x: Tensor,
    linear: Linear,
    pairs: Sequence[Pair] = (),
    norm: Tensor | None = None,
    *,
    scale: float = 1.0,
    start: int = 0,
    runs: Sequence[int] = (0,),
    part: Tensor | None = None,
    gelu: bool = False,
    needs_output: bool = True,
    rows: slice = ALL,
) -> Tensor:
    """Project all tokens by the frozen base, and add the adapter's projection of the scope's.

    pairs: the adapter's matrices, one pair for each of `runs`, which are tokens from `start` on.
    norm: of a DoRA, the norms of the base's rows.
    `part`, a copy of the scope's tokens, is what is kept for the backward pass; a view would keep all tokens alive.
    With `gelu`, what goes into it is kept instead, and what comes out of it is made again on the scope alone.
    """
    if linear.quantized:
        weight, weight_scale, kind = linear.weight_data, linear.weight_scale, linear.quantized
    else:
        weight, weight_scale, kind = linear.weight, None, ""
    weight, weight_scale, bias, norm = _rows_of(rows, weight, weight_scale, linear.bias, norm)
    cut = [(down, *_rows_of(rows, *others)) for down, *others in pairs]
    adapter = [tensor for tensors in zip(*cut, strict=True) for tensor in tensors if tensor is not None]
    how = norm, scale, start, tuple(runs), part, gelu, needs_output
    return _Project.apply(x, weight, weight_scale, kind, bias, *how, *adapter)


def _rows_of(rows: slice, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors if rows == ALL else tuple(None if x is None else x[rows] for x in tensors)


class _Trained(torch.autograd.Function):
    """y = x Wᵀ + b, of which what is trained is held in fp32 and multiplied in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = grad @ _rebuilt(weight, None, "", grad.dtype) if _asked(ctx, 0) else None
        grad_weight = None
        if _asked(ctx, 1):
            grad_weight = summed_product(rows.mT[None], x.flatten(0, -2)[None], weight.dtype)
        return grad_x, grad_weight, rows.sum(0, dtype=torch.float32) if _asked(ctx, 2) else None


def _asked(ctx, index: int) -> bool:
    """Tell whether this pass wants the gradient of a tensor that went in.

    A schedule may run those of inputs first and those of weights later, through one graph.
    """
    if torch.compiler.is_compiling() or not ctx.needs_input_grad[index]:
        return ctx.needs_input_grad[index]
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:  # where gradients are returned, it refuses to be asked about a leaf that is among them
        return True


class _Project(torch.autograd.Function):
    """y = a Wᵀ + b;  y[:, scope] += s · (a[:, scope] Aᵀ) Bᵀ, added by the matmul itself in both directions.

    a is x, or GELU(x), whose own derivative is then taken in the same breath. With a magnitude m, all but b is
    multiplied by m / ‖W + s·B A‖ in the scope, row by row; the norm counts as constant in the backward pass.
    The scope is a run of tokens for each pair of matrices: adapter holds every A, then every B, then every m.
    """

    @staticmethod
    def forward(ctx, x, weight, weight_scale, kind, bias, norm, scale, start, runs, part, gelu, wanted, *adapter):
        stop = start + sum(runs)
        ctx.kind, ctx.scale, ctx.runs, ctx.scope, ctx.gelu = kind, scale, runs, slice(start, stop), gelu
        down, up, magnitude = _parts(adapter, runs)
        a, full, inner, factor, made = activated(x, gelu and wanted), None, None, None, None
        if down and (wanted or not gelu or magnitude):
            alone = gelu and not wanted  # then the scope's alone go through GELU
            part = activated(a[:, start:stop], alone) if part is None or alone else part
            part = part.contiguous() if gelu else part  # as where it is made alone: a checkpoint counts what is called
            inner = product(part, stacked(down).to(x.dtype).mT, runs)  # [B, Ts, r]
        if wanted or magnitude:
            full = _full(weight, weight_scale, kind, x.dtype)
        y = x.new_empty(*x.shape[:-1], weight.shape[0]) if full is None or not wanted else _linear(a, full, bias)
        if magnitude:
            assert full is not None
            made = _scope_of(y, start, stop) if wanted else _linear(part, full, bias)
            norms = [adapted_norms(full, norm, *pair, scale) for pair in zip(down, up, strict=True)]
            factor = torch.stack([row_factors(m, norm, own) for m, own in zip(magnitude, norms, strict=True)])
            for own, each in zip(made.split(runs, 1), factor.unbind(0), strict=True):
                _scale_rows_(own, each, bias)
        if inner is not None and (wanted or made is not None):
            scaled = stacked(up) * scale if factor is None else stacked(up) * scale * factor[:, :, None]
            target = y[:, start:stop] if made is None else made
            add_product_(target, inner, scaled.to(x.dtype).mT, runs)
        kept = (x, None, None) if gelu else (None, part, inner)
        rows = (bias, factor, made) if magnitude else (None, None, None)
        ctx.save_for_backward(weight, weight_scale, *kept, *rows, *adapter)
        return y

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, weight_scale, x, part, inner, bias, factor, made, *adapter = ctx.saved_tensors
        down, up, magnitude = _parts(adapter, ctx.runs)
        dtype, grad_x, grad_inner, matrices, grads = grad.dtype, None, None, None, []
        if magnitude:
            along = grad[:, ctx.scope].split(ctx.runs, 1), made.split(ctx.runs, 1), magnitude
            grads = [_magnitude_gradient(g, of, bias, m) for g, of, m in zip(*along, strict=True)]
            grad = grad.clone()
            for own, each in zip(grad[:, ctx.scope].split(ctx.runs, 1), factor.unbind(0), strict=True):
                own.mul_(each)  # from here on, of what is not yet multiplied
        if down:
            matrices = stacked(down).to(dtype)
            if ctx.gelu:
                part = activated(x[:, ctx.scope], True)
                inner = product(part, matrices.mT, ctx.runs)
            grad_part = grad[:, ctx.scope]
            grad_inner = product(grad_part, (stacked(up) * ctx.scale).to(dtype), ctx.runs)  # [B, Ts, r]
            grad_down = summed_products(grad_inner, part, ctx.runs, down[0].dtype)
            grad_up = summed_products(grad_part, inner, ctx.runs, up[0].dtype) * ctx.scale
            grads = [*grad_down.unbind(0), *grad_up.unbind(0), *grads]
            del part  # before the widest tensor of the block is made
        if _asked(ctx, 0):
            grad_x = grad @ _rebuilt(weight, weight_scale, ctx.kind, dtype)
            if matrices is not None and grad_inner is not None:
                add_product_(grad_x[:, ctx.scope], grad_inner, matrices, ctx.runs)
            grad_x = _through_gelu(grad_x, x) if ctx.gelu else grad_x
        return grad_x, *([None] * 11), *grads


def _parts(adapter: Sequence[Tensor], runs: Sequence[int]) -> tuple[Sequence[Tensor], ...]:
    """Return every A, every B and every magnitude, of which there may be none."""
    count = len(runs)
    return adapter[:count], adapter[count : 2 * count], adapter[2 * count :]


def _scope_of(y: Tensor, start: int, stop: int) -> Tensor:
    """View an output's scope, detached: kept for the backward pass, it would else keep itself alive."""
    y.new_empty(0)  # recomputed alone, the scope needs a tensor of its own: a checkpoint counts what is called
    return y.detach()[:, start:stop]


def adapted_norms(weight: Tensor, norm: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return ‖W + s·B A‖ of each row from ‖W‖ and W Aᵀ, without making the sum; exactly ‖W‖ where B is zero."""
    cross = F.linear(weight, down.to(weight.dtype)).to(up.dtype)  # W Aᵀ [out, r]
    square = (up * (2 * scale * cross + scale**2 * (up @ (down @ down.mT)))).sum(1)
    return (norm.square() + square).clamp_min(0).sqrt()


def row_factors(magnitude: Tensor, norm: Tensor, norms: Tensor) -> Tensor:
    """Return m / ‖W + s·B A‖ of each row; 1 where the base's row is zero, which has no direction to keep."""
    return torch.where(norm > 0, magnitude / norms, 1.0)


def _scale_rows_(y: Tensor, factor: Tensor, bias: Tensor | None) -> None:
    """Multiply all but the bias, in place and in fp32: y → f·(y − b) + b, which is y itself where f is 1."""
    if bias is None:
        y.mul_(factor)
    elif torch.compiler.is_compiling():
        y.copy_(torch.addcmul((1 - factor) * bias, y, factor))
    else:
        torch.addcmul((1 - factor) * bias, y, factor, out=y)


def _magnitude_gradient(grad: Tensor, made: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """Return Σ g·(y − b) / m over the tokens, which is that of m / ‖…‖ times what it multiplies."""
    along = (grad * made).sum((0, 1), dtype=magnitude.dtype)
    if bias is not None:
        along = along - bias.to(magnitude.dtype) * grad.sum((0, 1), dtype=magnitude.dtype)
    return torch.where(magnitude != 0, along / magnitude, 0.0)


def _full(weight: Tensor, scale: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if scale is None else dequantize(weight, scale, kind, dtype)


def _rebuilt(weight: Tensor, scale: Tensor | None, kind: str, dtype: torch.dtype) -> Tensor:
    """Make the whole weight again in the backward pass, by way of the transpose.

    A compiler then finds that nothing the forward pass made is the same, or it would keep that.
    """
    return _full(weight.t(), None if scale is None else scale.t(), kind, dtype).t()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project into an empty tensor, as where the result is not needed: what is recorded stays alike."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y, rows = x.new_empty(*x.shape[:-1], weight.shape[0]), x.reshape(-1, x.shape[-1])
    flat = y.view(len(rows), len(weight))
    torch.mm(rows, weight.t(), out=flat) if bias is None else torch.addmm(bias, rows, weight.t(), out=flat)
    return y


def _through_gelu(grad: Tensor, x: Tensor) -> Tensor:
    """Write the gradient of what went into GELU in the place of that of what came out."""
    if torch.compiler.is_compiling():
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
