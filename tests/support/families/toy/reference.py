"""The toy on one stream, its formulas written out slowly: no kernel, no fused function and no view of the package's.

In: the parameters by internal name, of one stream. Out: velocity `[B, C, F, H, W]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transpixeler.families.toy.config import ToyConfig


class Reference:
    def __init__(self, weights: Mapping[str, Tensor], config: ToyConfig) -> None:
        self.w, self.config = weights, config
        self.heads, self.dim = config.num_attention_heads, config.attention_head_dim

    def __call__(self, x: Tensor, time: Tensor, text: Tensor, lengths: Tensor, pooled: Tensor) -> Tensor:
        """x: [B, C, F, H, W], time: [B]."""
        return torch.stack([self.sample(*one) for one in zip(x, time, text, lengths.tolist(), pooled, strict=True)])

    def sample(self, x: Tensor, time: Tensor, text: Tensor, length: int, pooled: Tensor) -> Tensor:
        """Compute one sample, without its padding."""
        guidance = torch.tensor(self.config.guidance)
        vector = self.mlp("embed.time_in", self.wave(time)) + self.mlp("embed.guidance_in", self.wave(guidance))
        vector = vector + self.mlp("embed.vector_in", pooled)
        places, rows = [], []
        _, frames, height, width = x.shape
        for f in range(frames):
            for h in range(height // 2):
                for w in range(width // 2):
                    places.append((f, h, w))
                    rows.append(x[:, f, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].reshape(-1))
        hidden = self.linear("embed.img_in", torch.stack(rows))
        words = self.linear("embed.txt_in", text[:length])
        for index in range(self.config.num_layers):
            hidden, words = self.double(f"blocks.{index}", hidden, words, vector, places)
        for index in range(self.config.num_single_layers):
            hidden, words = self.single(f"blocks.s{index}", hidden, words, vector, places)
        shift, scale = self.linear("head.modulation", self.silu(vector)).chunk(2)
        y = self.linear("head.linear", self.norm(hidden) * (1 + scale) + shift)
        out = torch.zeros_like(x)
        for row, (f, h, w) in zip(y, places, strict=True):
            out[:, f, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = row.reshape(-1, 2, 2)
        return out

    def double(
        self, at: str, hidden: Tensor, words: Tensor, vector: Tensor, places: list[tuple[int, int, int]]
    ) -> tuple[Tensor, Tensor]:
        mods, queries, keys, values = [], [], [], []
        for half, x, where in (("img", hidden, places), ("txt", words, None)):
            mods.append(self.linear(f"{at}.{half}.mod", self.silu(vector)).chunk(6))
            shift, scale = mods[-1][:2]
            q, k, v = self.linear(f"{at}.{half}.qkv", self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
            queries.append(self.turned(f"{at}.{half}.q_norm", q, where))
            keys.append(self.turned(f"{at}.{half}.k_norm", k, where))
            values.append(v.reshape(len(v), self.heads, self.dim))
        seen = self.attend(torch.cat(queries), torch.cat(keys), torch.cat(values))
        parts = seen[: len(hidden)], seen[len(hidden) :]
        done = []
        for half, x, part, mod in zip(("img", "txt"), (hidden, words), parts, mods, strict=True):
            x = x + mod[2] * self.linear(f"{at}.{half}.proj", part)
            y = self.linear(f"{at}.{half}.mlp.0", self.norm(x) * (1 + mod[4]) + mod[3])
            done.append(x + mod[5] * self.linear(f"{at}.{half}.mlp.2", self.gelu(y)))
        return done[0], done[1]

    def single(
        self, at: str, hidden: Tensor, words: Tensor, vector: Tensor, places: list[tuple[int, int, int]]
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(f"{at}.mod", self.silu(vector)).chunk(3)
        x = torch.cat([hidden, words])
        y = self.linear(f"{at}.linear1", self.norm(x) * (1 + scale) + shift)
        q, k, v, inner = y.split([self.config.width] * 3 + [self.config.inner], dim=-1)
        turned = [self.turned(f"{at}.heads.{name}", part, places) for name, part in (("q_norm", q), ("k_norm", k))]
        seen = self.attend(*turned, v.reshape(len(v), self.heads, self.dim))
        x = x + gate * self.linear(f"{at}.linear2", torch.cat([seen, self.gelu(inner)], dim=-1))
        return x[: len(hidden)], x[len(hidden) :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.dim)
        return torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(len(q), -1)

    def turned(self, norm: str, x: Tensor, places: list[tuple[int, int, int]] | None) -> Tensor:
        """[T, D] → [T, H, d], normed head by head; tokens with a place turn, pair by pair."""
        x = x.reshape(len(x), self.heads, self.dim)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[norm]
        if places is None:
            return x
        side = 2 * (self.dim // 6)
        rows = []
        for place in places:
            row = []
            for position, size in zip(place, (self.dim - 2 * side, side, side), strict=True):
                row += [position / 10000 ** (2 * i / size) for i in range(size // 2)]
            rows.append(row)
        angle = torch.tensor(rows)[:, None]
        even, odd = x[: len(rows), :, 0::2], x[: len(rows), :, 1::2]
        turned = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
        return torch.cat([torch.stack(turned, -1).reshape(len(rows), self.heads, self.dim), x[len(rows) :]])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.w[f"{name}.weight"]) + self.w[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", self.silu(self.linear(f"{name}.in_layer", x)))

    def wave(self, value: Tensor) -> Tensor:
        phase = 1000 * value * torch.exp(-math.log(10000) * torch.arange(16) / 16)
        return torch.cat([phase.cos(), phase.sin()])

    def norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
