"""Modulate by time group: one vector a group goes in and acts on that group's tokens, never made per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PERIOD = 10000.0  # of the slowest of a timestep's sinusoids


def sinusoid(times: Tensor, channels: int) -> Tensor:
    """[…] in [0, 1] → […, channels], cosines first; in fp32, because the rounding of 1000·t shows in the output."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    phase = (1000.0 * times.float())[..., None] * torch.exp(-math.log(PERIOD) * steps / half)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def groupwise(
    function: Callable[..., Tensor], tokens: Sequence[Tensor], vectors: Sequence[Tensor], groups: Sequence[int]
) -> Tensor:
    """Apply `function` to token tensors `[B, T, D]` and vectors `[B, G, D]`, each broadcast over its group's tokens."""
    if len(set(groups)) == 1:
        views = [x.unflatten(1, (len(groups), groups[0])) for x in tokens]
        return function(*views, *[vector[:, :, None] for vector in vectors]).flatten(1, 2)
    rows = zip(*[x.split(tuple(groups), dim=1) for x in tokens], strict=True)
    return torch.cat([function(*row, *[v[:, i, None] for v in vectors]) for i, row in enumerate(rows)], dim=1)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, groups: Sequence[int], eps: float, rms: bool = False
) -> Tensor:
    """Return norm(x)·(1 + scale) + shift in fp32; the norm is a layer norm, or `rms`, without weights."""
    wide = x.float()
    normed = F.rms_norm(wide, x.shape[-1:], eps=eps) if rms else F.layer_norm(wide, x.shape[-1:], eps=eps)
    return groupwise(lambda n, a, b: torch.addcmul(a, n, b), [normed], [shift, 1 + scale], groups)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, *, groups: Sequence[int]) -> Tensor:
    """Return x + y·gate, computed in fp32, in the dtype of x."""
    return groupwise(lambda a, b, g: torch.addcmul(a, b, g), [x.float(), y.float()], [gate], groups).to(x.dtype)
