"""The token refiner: text goes in, and comes out read by two blocks of its own, before any video is seen.

In: text `[B, L, D']`, its true lengths and the noise level. Out: text `[B, L, D]`; rows beyond a text's length hold
whatever they hold, and nobody sees them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.families.hunyuan.config import MLP_RATIO
from transpixeler.models.attention import attention, length_bias
from transpixeler.models.linear import Linear
from transpixeler.models.mmdit import EPS, Embedder
from transpixeler.models.modulation import add_gated, sinusoid


class RefinerBlock(nn.Module):
    """Attention among a text's tokens, then a feed-forward; noise level and mean text set their gates alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.mlp = nn.Sequential(Linear(width, MLP_RATIO * width), nn.SiLU(), Linear(MLP_RATIO * width, width))
        self.mod = nn.Linear(width, 2 * width)

    def forward(self, text: Tensor, vector: Tensor, bias: Tensor) -> Tensor:
        """vector: [B, D]. bias: [B, L], which tokens may be seen."""
        gate, mlp_gate = self.mod(F.silu(vector))[:, None].chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(_normed(text, self.norm1)).chunk(3, -1))
        seen = self.proj(attention(q, k, v, bias=bias).flatten(2))
        text = add_gated(text, seen, gate, groups=(text.shape[1],))
        return add_gated(text, self.mlp(_normed(text, self.norm2)), mlp_gate, groups=(text.shape[1],))


def _normed(text: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(text.float()).to(text.dtype)


class TokenRefiner(nn.Module):
    """Text to the model's width, through blocks that mask its padding."""

    def __init__(self, inputs: int, width: int, *, heads: int, layers: int, time_frequencies: int) -> None:
        super().__init__()
        self.time_frequencies = time_frequencies
        self.input = Linear(inputs, width)
        self.time_in, self.mean_in = Embedder(time_frequencies, width), Embedder(inputs, width)
        self.blocks = nn.ModuleList(RefinerBlock(width, heads) for _ in range(layers))

    def forward(self, text: Tensor, lengths: Tensor, times: Tensor) -> Tensor:
        """text: [B, L, D']. lengths, times: [B]."""
        bias = length_bias(lengths, text.shape[1])
        valid = (bias == 0)[..., None]
        mean = torch.where(valid, text.float(), 0.0).sum(1) / lengths[:, None]
        vector = self.time_in(sinusoid(times, self.time_frequencies)) + self.mean_in(mean)
        words = self.input(text)
        for block in self.blocks:
            words = block(words, vector, bias)
        return words
