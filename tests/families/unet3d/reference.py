"""The 3D U-Net, its formulas written out slowly: a sample, a frame and a head at a time, and nothing of the package's.

In: the parameters by internal name. Out: the noise that is predicted, [B, S·C, F, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = "blocks.0."


class Reference:
    """streams: names of the companions, whose channels come after those of the first stream."""

    def __init__(self, weights: Mapping[str, Tensor], sizes: Mapping[str, Any], streams: Sequence[str] = ()) -> None:
        self.w, self.sizes, self.streams = weights, sizes, streams

    def __call__(self, x: Tensor, time: Tensor, text: Tensor, focus: Sequence[bool] = ()) -> Tensor:
        """x: [B, S·C, F, H, W], time: [B], text: [B, D]."""
        focus = focus or [False] * len(x)
        return torch.stack([self.sample(*one) for one in zip(x, time, text, focus, strict=True)])

    def sample(self, x: Tensor, time: Tensor, text: Tensor, focus: bool) -> Tensor:
        self.focus = focus
        levels = len(self.sizes["dim_mults"])
        vector = torch.cat([self.time(time), text if text.any() else self.w["embed.null"][0]])
        x = self.first(x)
        x = first = x + self.over_time("start", x)
        seen = []
        for level in range(levels):
            x = self.level(f"down.{level}", x, vector)
            seen.append(x)
            if level < levels - 1:
                x = self.each(x, lambda f, at=f"down.{level}.resample": self.conv(at, f, stride=2, padding=1))
        x = self.res("middle.res1", x, vector)
        x = x + self.over_frame("middle.spatial", x)
        x = x + self.over_time("middle.temporal", x)
        x = self.res("middle.res2", x, vector)
        for level in range(levels):
            x = self.level(f"up.{level}", torch.cat([x, seen.pop()]), vector)
            if level < levels - 1:
                at = f"{BLOCK}up.{level}.resample"
                weight, bias = self.w[f"{at}.weight"], self.w[f"{at}.bias"]
                x = self.each(x, lambda f, w=weight, b=bias: F.conv_transpose2d(f, w, b, stride=2, padding=1))
        x = self.res("last", torch.cat([x, first]), vector)
        return self.out(x)

    def level(self, at: str, x: Tensor, vector: Tensor) -> Tensor:
        x = self.res(f"{at}.res2", self.res(f"{at}.res1", x, vector), vector)
        x = x + self.linear_over_frame(f"{at}.spatial", x)
        return x + self.over_time(f"{at}.temporal", x)

    # -- ends

    def time(self, time: Tensor) -> Tensor:
        half = self.sizes["dim"] // 2
        angles = [1000 * time * math.exp(-math.log(10000) * i / half) for i in range(half)]
        wave = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles])
        inner = F.linear(wave, self.w["embed.time1.weight"], self.w["embed.time1.bias"])
        return F.linear(F.gelu(inner), self.w["embed.time2.weight"], self.w["embed.time2.bias"])

    def first(self, x: Tensor) -> Tensor:
        """Convolve all channels by one kernel: the first stream's and the companions' side by side."""
        k = self.sizes["first_kernel"]
        kernel = [self.w["embed.conv.weight"]]
        for name in self.streams:
            rows = self.w[f"embed.stream_embedding.{name}"]  # [C, k·k + 1, dim]
            kernel.append(torch.stack([rows[:, place].T for place in range(k * k)], -1).unflatten(-1, (k, k)))
        weight = torch.cat(kernel, dim=1)
        return self.each(x, lambda f: F.conv2d(f, weight, self.w["embed.conv.bias"], padding=k // 2))

    def out(self, x: Tensor) -> Tensor:
        rows = [self.w["head.conv.weight"]] + [self.w[f"embed.stream_embedding.{n}"][:, -1] for n in self.streams]
        weight, bias = torch.cat(rows), self.w["head.conv.bias"]
        bias = torch.cat([bias, torch.zeros(len(weight) - len(bias))])
        return torch.einsum("cd,dfhw->cfhw", weight, x) + bias[:, None, None, None]

    # -- parts

    def each(self, x: Tensor, do: Any) -> Tensor:
        """Do the same to each frame of [C, F, H, W]."""
        return torch.stack([do(x[:, f][None])[0] for f in range(x.shape[1])], dim=1)

    def conv(self, at: str, frame: Tensor, **how: int) -> Tensor:
        return F.conv2d(frame, self.w[f"{BLOCK}{at}.weight"], self.w[f"{BLOCK}{at}.bias"], **how)

    def res(self, at: str, x: Tensor, vector: Tensor) -> Tensor:
        made = F.linear(F.silu(vector), self.w[f"{BLOCK}{at}.vector.weight"], self.w[f"{BLOCK}{at}.vector.bias"])
        half = len(made) // 2
        scale, shift = (part[:, None, None, None] for part in (made[:half], made[half:]))
        h = self.each(x, lambda f: self.conv(f"{at}.conv1", f, padding=1))
        h = F.silu(self.norm(f"{at}.norm1", h) * (1 + scale) + shift)
        h = self.each(h, lambda f: self.conv(f"{at}.conv2", f, padding=1))
        h = F.silu(self.norm(f"{at}.norm2", h))
        if f"{BLOCK}{at}.shortcut.weight" in self.w:
            x = self.each(x, lambda f: self.conv(f"{at}.shortcut", f))
        return h + x

    def norm(self, at: str, x: Tensor) -> Tensor:
        """Norm each group of channels over all frames, rows and columns."""
        parts = []
        for part in x.chunk(self.sizes["groups"]):
            away = part - part.mean()
            parts.append(away / (away.square().mean() + 1e-5).sqrt())
        weight, bias = (self.w[f"{BLOCK}{at}.{leaf}"][:, None, None, None] for leaf in ("weight", "bias"))
        return torch.cat(parts) * weight + bias

    # -- attention

    def heads(self, at: str, cells: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return queries, keys and values [n, d] of each head for cells [n, C]."""
        away = cells - cells.mean(1, keepdim=True)
        normed = away / (away.square().mean(1, keepdim=True) + 1e-5).sqrt() * self.w[f"{BLOCK}{at}.norm.weight"]
        made = normed @ self.w[f"{BLOCK}{at}.qkv.weight"].T
        heads, d = self.sizes["heads"], self.sizes["head_dim"]
        parts = made.split(heads * d, dim=1)
        return [tuple(part[:, h * d : (h + 1) * d] for part in parts) for h in range(heads)]  # type: ignore[misc]

    def back(self, at: str, seen: Sequence[Tensor]) -> Tensor:
        bias = self.w.get(f"{BLOCK}{at}.out.bias")
        made = torch.cat([*seen], dim=1) @ self.w[f"{BLOCK}{at}.out.weight"].T
        return made if bias is None else made + bias

    def linear_over_frame(self, at: str, x: Tensor) -> Tensor:
        def one(frame: Tensor) -> Tensor:
            seen = []
            for q, k, v in self.heads(at, frame[0].flatten(1).T):
                q, k = q.softmax(1) / math.sqrt(q.shape[1]), k.softmax(0)
                matrix = sum(torch.outer(k[n], v[n]) for n in range(len(k)))
                seen.append(q @ matrix)
            return self.back(at, seen).T.unflatten(1, frame.shape[2:])[None]

        return self.each(x, one)

    def over_frame(self, at: str, x: Tensor) -> Tensor:
        def one(frame: Tensor) -> Tensor:
            cells = frame[0].flatten(1).T
            seen = [(q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v for q, k, v in self.heads(at, cells)]
            return self.back(at, seen).T.unflatten(1, frame.shape[2:])[None]

        return self.each(x, one)

    def over_time(self, at: str, x: Tensor) -> Tensor:
        _, frames, rows, columns = x.shape
        made = torch.zeros_like(x)
        for i in range(rows):
            for j in range(columns):
                seen = []
                for head, (q, k, v) in enumerate(self.heads(at, x[:, :, i, j].T)):
                    q, k = self.turned(q), self.turned(k)
                    scores = torch.stack(
                        [
                            torch.stack(
                                [q[a] @ k[b] / math.sqrt(q.shape[1]) + self.bias(a, b, head) for b in range(frames)]
                            )
                            for a in range(frames)
                        ]
                    )
                    if self.focus:
                        scores = scores.masked_fill(~torch.eye(frames, dtype=torch.bool), -math.inf)
                    seen.append(scores.softmax(1) @ v)
                made[:, :, i, j] = self.back(at, seen).T
        return made

    def turned(self, x: Tensor) -> Tensor:
        count = min(32, x.shape[1])
        rows = []
        for place, row in enumerate(x):
            parts = []
            for pair in range(count // 2):
                angle = torch.tensor(place * 10000.0 ** (-2 * pair / count))
                a, b = row[2 * pair], row[2 * pair + 1]
                parts += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
            rows.append(torch.stack([*parts, *row[count:]]))
        return torch.stack(rows)

    def bias(self, query: int, key: int, head: int) -> Tensor:
        """Read the table of a distance in time as T5 does, with 32 tables and 32 frames at most."""
        apart, bucket = query - key, 0
        if apart < 0:
            apart, bucket = -apart, 16
        if apart >= 8:
            apart = min(15, 8 + int(math.log(apart / 8) / math.log(32 / 8) * 8))
        return self.w[f"{BLOCK}relative"][bucket + apart, head]
