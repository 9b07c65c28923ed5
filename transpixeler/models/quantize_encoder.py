"""Hold the linears of an encoder in eight or four bits; each weight is made whole again when it multiplies.

In: a network of transformers. Out: the same network, its linears replaced. int8 and fp8 have a scale for each output
row, nf4 one for each block of 64 weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.models.linear import dequantize
from transpixeler.models.quantize import quantize_weight

NF4 = "nf4"
BLOCK = 64  # weights that share a scale in four bits
_TAIL = 0.9677083  # the quantile of the outermost level, as NF4 is published


class QuantizedLinear(nn.Module):
    """A frozen linear in few bits."""

    data: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype = kind, linear.weight.shape, linear.weight.dtype
        data, scale = to_nf4(linear.weight) if kind == NF4 else quantize_weight(linear.weight, kind)
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """Return a tensor that says the precision alone, which some networks ask for."""
        return torch.empty(0, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == NF4:
            weight = from_nf4(self.data, self.scale, self.shape, x.dtype)
        else:
            weight = dequantize(self.data, self.scale, self.kind, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


@torch.no_grad()
def quantize_linears(network: nn.Module, kind: str) -> None:
    """Replace every linear of a network in place, one after the other."""
    for module in [*network.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear(child, kind))


# -- four bits


def nf4_levels() -> Tensor:
    """Return the 16 values in [-1, 1] of normal float 4: quantiles of a normal distribution, and zero exactly."""

    def half(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(_TAIL, 0.5, count + 1, dtype=torch.float64)[:-1])

    levels = torch.cat([-half(7), torch.zeros(1, dtype=torch.float64), half(8)]).sort().values
    return (levels / levels.max()).float()


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] → (two weights a byte, the largest of each block in fp32)."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax(1, keepdim=True)
    levels = nf4_levels()
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=1e-12), middles).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def from_nf4(data: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Make a weight whole again."""
    codes = torch.stack([data >> 4, data & 15], dim=-1).flatten(1)
    values = nf4_levels().to(data.device)[codes.long()] * scale
    return values.flatten()[: math.prod(shape)].view(shape).to(dtype)


def bytes_of_linear(rows: int, columns: int, kind: str) -> int:
    """Return the bytes that a weight takes, "none": in bf16."""
    if kind == "none":
        return 2 * rows * columns
    return rows * columns // 2 + 4 * -(-rows * columns // BLOCK) if kind == NF4 else rows * columns + 4 * rows
