"""The joint forward pass, spelled out slowly: everything per token, every scope a mask, no view shared.

In: the parameters by name. Out: velocity of each stream. Nothing of the package's arithmetic is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from transpixeler.models.streams import StreamLayout


class Reference:
    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layout: StreamLayout,
        *,
        heads: int,
        freq_dim: int,
        attends: bool = True,
        scopes: Mapping[str, tuple[int, ...]] | None = None,
        lora_scale: float = 1.0,
    ) -> None:
        self.w, self.layout, self.heads, self.freq_dim = weights, layout, heads, freq_dim
        self.scopes, self.lora_scale = scopes or {}, lora_scale
        self.stream_of, self.part_of, self.cell_of, self.place_of = [], [], [], []
        for part, segment in enumerate(layout.segments):
            f, h, w = segment.grid
            for token in range(f * h * w):
                frame, row, column = cell = (token // (h * w), token // w % h, token % w)
                self.stream_of.append(segment.stream)
                self.part_of.append(part)
                self.cell_of.append(cell)
                middles = [segment.scale * n + (segment.scale - 1) / 2 for n in (row, column)]
                time = segment.beside.times[frame] if segment.beside else frame
                self.place_of.append((time, *middles))
        total = len(self.stream_of)
        self.mask = torch.ones(total, total, dtype=torch.bool)
        if not attends:
            for i in range(total):
                for j in range(total):
                    self.mask[i, j] = self.stream_of[i] != 0 or self.stream_of[j] == 0

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = torch.einsum("bti,oi->bto", x, self.w[f"{name}.weight"]) + self.w[f"{name}.bias"]
        if f"{name}.lora_A" not in self.w:
            return y
        low = torch.einsum("bti,ri->btr", x, self.w[f"{name}.lora_A"])
        delta = torch.einsum("btr,or->bto", low, self.w[f"{name}.lora_B"]) * self.lora_scale
        scope = self.scopes[name.split(".", 2)[2]]
        return y + delta * torch.tensor([float(stream in scope) for stream in self.stream_of])[None, :, None]

    def norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.weight"]

    def turn(self, x: Tensor) -> Tensor:
        """Rotate [B, T, H, d] pair by pair: pairs of time first, then of height, then of width."""
        dim = x.shape[-1]
        side = 2 * (dim // 6)
        rows = []
        for place in self.place_of:
            angles = []
            for position, size in zip(place, (dim - 2 * side, side, side), strict=True):
                angles += [position / 10000 ** (2 * i / size) for i in range(size // 2)]
            rows.append(angles)
        angle = torch.tensor(rows)[None, :, None, :]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
        return torch.stack(turned, -1).reshape(x.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if mask is not None:
            score = score.masked_fill(~mask, float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def self_attention(self, at: str, x: Tensor) -> Tensor:
        q = self.turn(self.split(self.rms(f"{at}.norm_q", self.linear(f"{at}.q", x))))
        k = self.turn(self.split(self.rms(f"{at}.norm_k", self.linear(f"{at}.k", x))))
        return self.linear(f"{at}.o", self.attend(q, k, self.split(self.linear(f"{at}.v", x)), self.mask))

    def cross_attention(self, at: str, x: Tensor, text: Tensor) -> Tensor:
        q = self.split(self.rms(f"{at}.norm_q", self.linear(f"{at}.q", x)))
        k = self.split(self.rms(f"{at}.norm_k", self.linear(f"{at}.k", text)))
        return self.linear(f"{at}.o", self.attend(q, k, self.split(self.linear(f"{at}.v", text)), None))

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def block(self, at: str, x: Tensor, vectors: Tensor, text: Tensor) -> Tensor:
        """`vectors` is [B, T, 6, D]: the modulation of each token."""
        shift, scale, gate, shift2, scale2, gate2 = (self.w[f"{at}.modulation"] + vectors).unbind(2)
        x = x + gate * self.self_attention(f"{at}.self_attn", self.norm(x) * (1 + scale) + shift)
        affine = self.norm(x) * self.w[f"{at}.norm3.weight"] + self.w[f"{at}.norm3.bias"]
        x = x + self.cross_attention(f"{at}.cross_attn", affine, text)
        inner = self.gelu(self.linear(f"{at}.ffn.0", self.norm(x) * (1 + scale2) + shift2))
        return x + gate2 * self.linear(f"{at}.ffn.2", inner)

    def tokens(self, streams: tuple[Tensor, ...]) -> Tensor:
        weight, bias = self.w["embed.patch_embedding.weight"], self.w["embed.patch_embedding.bias"]
        rows = []
        for stream, part, (f, h, w) in zip(self.stream_of, self.part_of, self.cell_of, strict=True):
            pf, ph, pw = self.layout.patch
            cut = streams[part][
                :, :, f * pf : (f + 1) * pf, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw
            ]  # one patch: [B, C, pf, ph, pw]
            row = torch.einsum("bcfhw,dcfhw->bd", cut, weight) + bias
            if stream:
                row = row + self.w[f"embed.stream_embedding.{self.layout.names[stream]}"]
            rows.append(row)
        return torch.stack(rows, 1)

    def velocity(self, x: Tensor) -> list[Tensor]:
        """[B, T, patch·C] → each segment's [B, C, F, H, W]."""
        out = [torch.zeros(x.shape[0], *segment.shape) for segment in self.layout.segments]
        pf, ph, pw = self.layout.patch
        for token, (part, (f, h, w)) in enumerate(zip(self.part_of, self.cell_of, strict=True)):
            patch = x[:, token].reshape(x.shape[0], pf, ph, pw, -1).permute(0, 4, 1, 2, 3)
            out[part][:, :, f * pf : (f + 1) * pf, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw] = patch
        return out

    def __call__(self, streams: tuple[Tensor, ...], timesteps: Tensor, text: Tensor) -> list[Tensor]:
        half = self.freq_dim // 2
        phase = 1000 * timesteps[..., None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        wave = torch.cat([phase.cos(), phase.sin()], -1)  # [B, S, freq]
        time = self.linear("embed.time_embedding.2", self.silu(self.linear("embed.time_embedding.0", wave)))
        vectors = self.linear("embed.time_projection.1", self.silu(time)).reshape(*time.shape[:2], 6, -1)
        text = self.linear("embed.text_embedding.2", self.gelu(self.linear("embed.text_embedding.0", text)))
        x = self.tokens(streams)
        blocks = sorted({int(name.split(".")[1]) for name in self.w if name.startswith("blocks.")})
        for index in blocks:
            x = self.block(f"blocks.{index}", x, vectors[:, self.part_of], text)
        shift, scale = (self.w["head.modulation"] + time[:, self.part_of, None]).unbind(2)
        y = self.norm(x) * (1 + scale) + shift
        return self.velocity(self.linear("head.head", y))
