"""The parts of a level: convolutions over rows and columns, and attention over a frame or over time.

In and out: `[B, C, F, H, W]`. A convolution sees one frame; attention over time sees one place in all frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.families.unet3d.config import UnetConfig
from transpixeler.models.attention import attention
from transpixeler.models.linear import Linear

BUCKETS, FARTHEST = 32, 32  # of distances in time: tables, and the distance from which on all are one
PERIOD, TURNED = 10_000.0, 32  # of the slowest channel that turns with time, and how many do at most


class Conv(nn.Conv2d):
    """A convolution over the rows and columns of each frame, in the dtype of what comes in."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        frames = x.transpose(1, 2).flatten(0, 1)
        y = F.conv2d(frames, self.weight.to(x.dtype), bias, self.stride, self.padding)
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Wider(nn.ConvTranspose2d):
    """A convolution that doubles the rows and columns of each frame."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.bias is not None
        frames = x.transpose(1, 2).flatten(0, 1)
        y = F.conv_transpose2d(frames, self.weight.to(x.dtype), self.bias.to(x.dtype), stride=2, padding=1)
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Norm(nn.GroupNorm):
    """Group norm over all frames together, in fp32."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the first one's result is scaled and shifted by the sample's vector."""

    def __init__(self, inputs: int, outputs: int, config: UnetConfig) -> None:
        super().__init__()
        self.vector = nn.Linear(config.vector, 2 * outputs)
        self.conv1, self.norm1 = Conv(inputs, outputs, 3, padding=1), Norm(config.groups, outputs)
        self.conv2, self.norm2 = Conv(outputs, outputs, 3, padding=1), Norm(config.groups, outputs)
        self.shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.vector(F.silu(vector))[:, :, None, None, None].to(x.dtype).chunk(2, dim=1)
        h = F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        h = F.silu(self.norm2(self.conv2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """The part that three kinds share: a norm before, and projections of each cell."""

    def __init__(self, width: int, config: UnetConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.norm = nn.LayerNorm(width, bias=False)
        self.qkv = Linear(width, 3 * config.inner, bias=False)
        self.out = Linear(config.inner, width, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, F, H·W, heads, d]."""
        cells = x.flatten(3).permute(0, 2, 3, 1)  # [B, F, HW, C]
        normed = F.layer_norm(cells.float(), cells.shape[-1:], self.norm.weight).to(x.dtype)
        made = self.qkv(normed.flatten(1, 2)).view(*cells.shape[:3], 3, self.heads, self.head_dim)
        q, k, v = made.unbind(3)
        return q, k, v

    def back(self, seen: Tensor, x: Tensor) -> Tensor:
        """Return x with what was seen [B, F, H·W, heads, d] added."""
        made = self.out(seen.flatten(3).flatten(1, 2))
        return x + made.view(x.shape[0], x.shape[2], *x.shape[3:], x.shape[1]).permute(0, 4, 1, 2, 3)


class LinearAttention(Attention):
    """Attention within a frame, linear in its cells: keys weigh values to a small matrix, which queries read."""

    def __init__(self, width: int, config: UnetConfig) -> None:
        super().__init__(width, config, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.transpose(2, 3) for each in self.project(x))  # [B, F, heads, HW, d]
        q = q.softmax(-1, dtype=torch.float32) * self.head_dim**-0.5
        k = k.softmax(-2, dtype=torch.float32)
        matrix = k.to(v.dtype).mT @ v
        return self.back((q.to(v.dtype) @ matrix).transpose(2, 3), x)


class FrameAttention(Attention):
    """Full attention within a frame."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.flatten(0, 1) for each in self.project(x))  # [BF, HW, heads, d]
        return self.back(attention(q, k, v).unflatten(0, (x.shape[0], x.shape[2])), x)


class TimeAttention(Attention):
    """Attention of one place to itself in all frames; a sample that is focused sees its present frame alone."""

    def forward(self, x: Tensor, bias: Tensor, focus: Tensor) -> Tensor:
        """bias: [heads, F, F]. focus: [B], 0 or 1; none where no sample is focused."""
        q, k, v = (each.transpose(1, 2) for each in self.project(x))  # [B, HW, F, heads, d]
        q, k = turned(q), turned(k)
        q, k, own = (each.flatten(0, 1) for each in (q, k, v))  # [B·HW, F, heads, d]
        seen = attention(q, k, own, bias=bias).unflatten(0, (x.shape[0], -1))
        if len(focus):
            seen = torch.where(focus[:, None, None, None, None] > 0, v, seen)
        return self.back(seen.transpose(1, 2), x)


def turned(x: Tensor) -> Tensor:
    """Turn neighbouring channels of each head by the frame's place in time: [B, HW, F, heads, d]."""
    count = min(TURNED, x.shape[-1])
    speeds = PERIOD ** (-torch.arange(0, count, 2, dtype=torch.float32, device=x.device) / count)
    angles = torch.arange(x.shape[2], dtype=torch.float32, device=x.device)[:, None] * speeds
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [F, 1, count / 2]
    pairs = torch.view_as_complex(x[..., :count].float().unflatten(-1, (-1, 2)))
    both = torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    return torch.cat([both, x[..., count:]], dim=-1) if count < x.shape[-1] else both


def distances(frames: int, device: torch.device) -> Tensor:
    """Return which table each pair of frames reads, [F, F]: half are for later frames, and far ones share theirs."""
    places = torch.arange(frames, device=device)
    later = places[None] - places[:, None]  # of a key than its query
    half, near = BUCKETS // 2, BUCKETS // 4  # up to `near` frames each distance has its own
    far = later.abs().clamp(min=near).float()
    grown = near + (torch.log(far / near) / math.log(FARTHEST / near) * (half - near)).long()
    return torch.where(later.abs() < near, later.abs(), grown.clamp(max=half - 1)) + half * (later > 0)
