"""Attention through one function that can choose its kernel.

In: queries, keys and values `[B, T, H, d]`. Out: the same shape. What is not there is an error that names what is.
"""

from __future__ import annotations

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
SAVED_OPS = tuple(getattr(torch.ops.aten, op).default for op in _OPS if hasattr(torch.ops.aten, op))


def available_kernels(device: torch.device) -> tuple[str, ...]:
    """The values of `model.attention` that run forward and backward on a device."""
    if device.type == "cuda":
        return ("sdpa", "flash", "cudnn", "efficient", "math", "flex")
    return ("sdpa", "flash", "math")


def pick_kernel(kernel: str, device: torch.device) -> str:
    """What `model.attention` means on a device: cuDNN is the fastest from Hopper on, elsewhere torch chooses well."""
    if kernel == "auto":
        hopper = device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (9, 0)
        return "cudnn-first" if hopper else "sdpa"
    if kernel not in available_kernels(device):
        there = ", ".join(("auto", *available_kernels(device)))
        raise UserError(f"model.attention: {kernel} does not run on {device.type}; there are {there}")
    return kernel


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "sdpa") -> Tensor:
    """Softmax attention without a mask: Wan attends the text's padding too."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if kernel == "flex":
        return _flex()(q, k, v).transpose(1, 2)
    with _backends(kernel):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


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
