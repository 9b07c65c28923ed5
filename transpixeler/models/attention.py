"""Attention through one function that can choose its kernel.

In: queries, keys and values `[B, T, H, d]`. Out: the same shape. What is not there is an error that names what is.
Wan attends its text's padding, hundreds of equal rows; `fold_padding` makes one key of them that counts for all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transpixeler.config import UserError

KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
    # what cuDNN cannot take (an odd head size, fp32) goes to the next that can
    "cudnn-first": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}

_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
# The operators whose outputs are dear to recompute and small to keep.
SAVED_OPS = (
    *(getattr(torch.ops.aten, op).default for op in _OPS if hasattr(torch.ops.aten, op)),
    torch.ops.higher_order.flex_attention,
)


def available_kernels(device: torch.device) -> tuple[str, ...]:
    """List the values of `model.attention` that run forward and backward on a device."""
    if device.type == "cuda":
        return ("sdpa", "flash", "cudnn", "efficient", "math", "flex")
    return ("sdpa", "flash", "math")


def pick_kernel(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve `model.attention` for a device: cuDNN is the fastest from Hopper on, elsewhere torch chooses well."""
    if kernel == "auto":
        hopper = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0)
        return "cudnn-first" if hopper else "sdpa"
    if kernel not in available_kernels(device) or not _runs(kernel, device, dtype, head_dim):
        there = [name for name in available_kernels(device) if _runs(name, device, dtype, head_dim)]
        what = f"{str(dtype).removeprefix('torch.')} and heads of {head_dim} on this {device.type}"
        raise UserError(f"model.attention: {kernel} does not run in {what}; there are {', '.join(('auto', *there))}")
    return kernel


@cache
def _runs(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Try it once on a few zeros: only torch knows what a machine, a dtype and a size of heads exclude."""
    if kernel in ("sdpa", "math", "flex"):  # which take all
        return True
    x = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's reasons, one a kernel
        try:
            attention(x, x, x, kernel).sum().backward()
        except RuntimeError:
            return False
    return True


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "sdpa", bias: Tensor | None = None) -> Tensor:
    """Softmax attention without a mask; a bias `[keys]` is added to each key's logit."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if kernel == "flex":
        assert bias is None  # which is a CPU's
        return _flex()(q, k, v).transpose(1, 2)
    mask = None if bias is None else bias.expand(q.shape[2], -1)
    with _backends(kernel):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def fold_padding(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cut rows `[B, T, D]` after the first from which all are equal, and make the bias that lets it count for them.

    n equal keys take the share of one whose logit is higher by log n.
    Only where it is a gain: on a GPU the kernels without a bias are the fast ones, and reading the rows would wait.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows, None
    different = (rows[:, :-1] != rows[:, -1:]).any(-1).any(0).nonzero()
    kept = int(different[-1]) + 2 if len(different) else 1
    folded = rows.shape[1] - kept + 1
    if folded == 1:
        return rows, None
    bias = torch.zeros(kept, dtype=torch.promote_types(rows.dtype, torch.float32))
    bias[-1] = math.log(folded)
    return rows[:, :kept], bias


def unfold_padding(rows: Tensor, length: int) -> Tensor:
    """`[B, length, D]` again, of whatever was made of folded rows."""
    return torch.cat([rows, rows[:, -1:].expand(-1, length - rows.shape[1], -1)], dim=1)


def _backends(kernel: str) -> AbstractContextManager:
    if kernel == "sdpa":
        return nullcontext()
    return sdpa_kernel(KERNELS[kernel], set_priority=True)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex() -> Callable[..., Tensor]:
    """Flex is fast only when compiled; inside a compiled block it is compiled already."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()
