"""Pyramid Flow on one stream, its formulas written out slowly: no kernel, no fused function, no view of the package's.

In: the parameters by internal name, of one stream. Out: what is predicted of each part of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.families.opensora.reference import Formulas as Blocks


class Formulas(Blocks):
    """The blocks are those of the same shape; what a token sees, where it stands and how it is packed are its own.

    config: the published keys.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        heads = config["num_attention_heads"]
        sizes = {"num_heads": heads, "hidden_size": heads * config["attention_head_dim"], "use_liger_rope": False}
        sizes |= {"axes_dim": config["axes_dims_rope"], "depth": config["num_layers"]}
        super().__init__(weights, sizes | {"depth_single_blocks": config["num_single_layers"]})
        self.causal = config.get("use_temporal_causal", True)

    def sequence(self, parts: Sequence[Tensor], time: Tensor, text: Tensor, pooled: Tensor) -> list[Tensor]:
        """Return [C, F, H, W] of each part, the oldest first; the last one's size is that of the positions.

        text: without padding.
        """
        vector = self.mlp("embed.time_in", self.wave(time)) + self.mlp("embed.vector_in", pooled)
        places, patches, before = [], [], 0
        for part in parts:
            scale = parts[-1].shape[2] / part.shape[2]
            for f in range(part.shape[1]):
                for h in range(part.shape[2] // 2):
                    for w in range(part.shape[3] // 2):
                        places.append((before + f, (h + 0.5) * scale - 0.5, (w + 0.5) * scale - 0.5))
                        patch = part[:, f, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
                        patches.append(patch.permute(1, 2, 0).reshape(-1))
            before += part.shape[1]
        self.frames = torch.tensor([0] * len(text) + [place[0] for place in places])
        hidden, words = self.linear("embed.img_in", torch.stack(patches)), self.linear("embed.txt_in", text)
        for index in range(self.config["depth"]):
            hidden, words = self.double(f"blocks.{index}", hidden, words, vector, places)
        both = torch.cat([words, hidden])
        for index in range(self.config["depth_single_blocks"]):
            both = self.single(f"blocks.s{index}", both, len(words), vector, places)
        shift, scale = self.linear("head.modulation", self.silu(vector)).chunk(2)
        rows = list(self.linear("head.linear", self.norm(both[len(words) :]) * (1 + scale) + shift))
        found = []
        for part in parts:
            channels, frames, height, width = part.shape
            cells = [rows.pop(0).reshape(2, 2, channels) for _ in range(frames * (height // 2) * (width // 2))]
            grid = torch.stack(cells).reshape(frames, height // 2, width // 2, 2, 2, channels)
            found.append(grid.permute(5, 0, 1, 3, 2, 4).reshape(channels, frames, height, width))
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.dim)
        if self.causal:
            score = score.masked_fill(self.frames[None, :, None] < self.frames[None, None], -torch.inf)
        return torch.einsum("hqk,khd->qhd", score.softmax(-1), v).reshape(len(q), -1)
