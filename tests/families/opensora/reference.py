"""Open-Sora 2 on one stream, its formulas written out slowly: no kernel, no fused function, no view of the package's.

In: the parameters by internal name, of one stream. Out: velocity `[B, C, F, H, W]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Places = list[tuple[int, int, int]]


class Formulas:
    """config: the published keys."""

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.w, self.config = weights, config
        self.heads, self.width = config["num_heads"], config["hidden_size"]
        self.dim = self.width // self.heads

    def __call__(self, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor, shown: Tensor | None = None) -> Tensor:
        """x: [B, C, F, H, W], time: [B]; shown: [B, 1 + C, F, H, W], a mask and masked latents."""
        rows = [None] * len(x) if shown is None else list(shown)
        return torch.stack([self.sample(*one) for one in zip(x, time, text, pooled, rows, strict=True)])

    def sample(self, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor, shown: Tensor | None) -> Tensor:
        vector = self.mlp("embed.time_in", self.wave(time)) + self.mlp("embed.vector_in", pooled)
        places = [(f, h, w) for f in range(x.shape[1]) for h in range(x.shape[2] // 2) for w in range(x.shape[3] // 2)]
        hidden = self.linear("embed.img_in", self.packed(x, places))
        if shown is not None:
            hidden = hidden + self.linear("embed.cond_in", self.packed(shown, places))
        words = self.linear("embed.txt_in", text)
        for index in range(self.config["depth"]):
            hidden, words = self.double(f"blocks.{index}", hidden, words, vector, places)
        both = torch.cat([words, hidden])  # the text first, as published
        for index in range(self.config["depth_single_blocks"]):
            both = self.single(f"blocks.s{index}", both, len(words), vector, places)
        shift, scale = self.linear("head.modulation", self.silu(vector)).chunk(2)
        y = self.linear("head.linear", self.norm(both[len(words) :]) * (1 + scale) + shift)
        out = torch.zeros_like(x)
        for row, (f, h, w) in zip(y, places, strict=True):
            out[:, f, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = row.reshape(-1, 2, 2)
        return out

    def packed(self, x: Tensor, places: Places) -> Tensor:
        """Channels slowest, then the rows and columns of a patch."""
        return torch.stack([x[:, f, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].reshape(-1) for f, h, w in places])

    def double(self, at: str, hidden: Tensor, words: Tensor, vector: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        mods, queries, keys, values = [], [], [], []
        for half, x in (("txt", words), ("img", hidden)):
            mods.append(self.linear(f"{at}.{half}.mod", self.silu(vector)).chunk(6))
            shift, scale = mods[-1][:2]
            q, k, v = self.linear(f"{at}.{half}.qkv", self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
            queries.append(self.normed(f"{at}.{half}.q_norm", q))
            keys.append(self.normed(f"{at}.{half}.k_norm", k))
            values.append(self.split(v))
        q, k = (self.turned(torch.cat(part), len(words), places) for part in (queries, keys))
        seen = self.attend(q, k, torch.cat(values))
        parts, done = (seen[: len(words)], seen[len(words) :]), []
        for half, x, part, mod in zip(("txt", "img"), (words, hidden), parts, mods, strict=True):
            x = x + mod[2] * self.linear(f"{at}.{half}.proj", part)
            y = self.linear(f"{at}.{half}.mlp.0", self.norm(x) * (1 + mod[4]) + mod[3])
            done.append(x + mod[5] * self.linear(f"{at}.{half}.mlp.2", self.gelu(y)))
        return done[1], done[0]

    def single(self, at: str, x: Tensor, words: int, vector: Tensor, places: Places) -> Tensor:
        shift, scale, gate = self.linear(f"{at}.mod", self.silu(vector)).chunk(3)
        y = self.linear(f"{at}.linear1", self.norm(x) * (1 + scale) + shift)
        q, k, v, inner = y.split([self.width] * 3 + [4 * self.width], dim=-1)
        q = self.turned(self.normed(f"{at}.heads.q_norm", q), words, places)
        k = self.turned(self.normed(f"{at}.heads.k_norm", k), words, places)
        return x + gate * self.linear(
            f"{at}.linear2", torch.cat([self.attend(q, k, self.split(v)), self.gelu(inner)], dim=-1)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.dim)
        return torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(len(q), -1)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.heads, self.dim)

    def normed(self, norm: str, x: Tensor) -> Tensor:
        x = self.split(x)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[norm]

    def turned(self, x: Tensor, words: int, places: Places) -> Tensor:
        """[T, H, d]: the text stands at (0, 0, 0); a channel turns with that half a head on, or with its neighbour."""
        half, rows = self.dim // 2, []
        for place in [(0, 0, 0)] * words + places:
            rows.append(
                [
                    position * 10000 ** (-2 * i / size)
                    for position, size in zip(place, self.config["axes_dim"], strict=True)
                    for i in range(size // 2)
                ]
            )
        angle = torch.tensor(rows)[:, None]
        if self.config.get("use_liger_rope", True):
            one, other = x[..., :half], x[..., half:]
            return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], -1)
        one, other = x[..., 0::2], x[..., 1::2]
        pair = [one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()]
        return torch.stack(pair, -1).reshape(x.shape)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.w[f"{name}.weight"]) + self.w[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.out_layer", self.silu(self.linear(f"{name}.in_layer", x)))

    def wave(self, value: Tensor) -> Tensor:
        phase = 1000 * value * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return torch.cat([phase.cos(), phase.sin()])

    def norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
