"""Embed videos and captions in one space: cached latents and text embeddings in; vectors of length one out.

One tower reads the video of any stream, the other a caption. What belongs together has a cosine near one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 8  # of each axis of a patch's place
LONGEST = 64.0  # latent pixels or frames that the slowest of them spans in one radian
FIRST_SCALE = math.log(1 / 0.07)  # of cosines before their softmax, learned from there on
LARGEST_SCALE = math.log(100.0)
MLP_RATIO = 4


@dataclass(frozen=True)
class Sizes:
    """All that the shape of a scorer depends on."""

    streams: tuple[str, ...]
    scales: tuple[int, ...]  # rows and columns of RGB's latents that one of each stream's covers
    channels: int  # of a latent
    text_width: int
    patch: int
    width: int
    layers: int
    heads: int

    def plain(self) -> dict[str, object]:
        return asdict(self)


class Block(nn.Module):
    """Attention and a feed-forward, each on normed tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_ff = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the tokens [b, T, D] after the block. mask: [b, 1, 1, T], True where a token may be attended to."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_ff(x))))


class Tower(nn.Module):
    """A transformer whose tokens' mean becomes one vector."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return [b, D] of length one from tokens [b, T, D]. valid: [b, T], where not all are."""
        mask = None if valid is None else valid[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if valid is None:
            mean = x.mean(1)
        else:
            share = valid / valid.sum(1, keepdim=True)
            mean = (share[..., None] * x).sum(1)
        return F.normalize(self.out(mean), dim=-1)


class Scorer(nn.Module):
    """Both towers, and how far apart cosines are pulled."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.patches = nn.ModuleList(nn.Linear(sizes.channels * sizes.patch**2, width) for _ in sizes.streams)
        self.place = nn.Linear(3 * 2 * FREQUENCIES, width)
        self.video = Tower(width, sizes.layers, sizes.heads)
        self.word = nn.Linear(sizes.text_width, width)
        self.caption = Tower(width, sizes.layers, sizes.heads)
        self.scale = nn.Parameter(torch.full((len(sizes.streams),), FIRST_SCALE))  # captions; then each companion

    def embed_video(self, latents: Tensor, stream: int) -> Tensor:
        """[b, C, F, H, W] of a stream → [b, D]."""
        side = self.sizes.patch
        padded = F.pad(latents, (0, -latents.shape[-1] % side, 0, -latents.shape[-2] % side))
        cut = padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # b C F h s w s
        patches = cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)  # b F h w (C s s)
        places = self.place(features(patches.shape[1:4], side * self.sizes.scales[stream], latents.device))
        return self.video((self.patches[stream](patches) + places).flatten(1, 3))

    def embed_caption(self, text: Tensor) -> Tensor:
        """[b, L, D] of text embeddings, padded with zeros → [b, D]; a caption without a token counts its first."""
        valid = (text != 0).any(-1)
        valid[:, 0] = True
        longest = int(valid.any(0).nonzero()[-1]) + 1
        return self.caption(self.word(text[:, :longest]), valid[:, :longest])

    def temperatures(self) -> Tensor:
        """Return what cosines are multiplied by: with captions, then with each companion."""
        return self.scale.clamp(max=LARGEST_SCALE).exp()


def features(grid: tuple[int, ...] | torch.Size, side: int, device: torch.device) -> Tensor:
    """Return sines and cosines of each patch's place, [F, h, w, 6n]; companions count in RGB's pixels."""
    rates = LONGEST ** (-torch.arange(FREQUENCIES, device=device) / (FREQUENCIES - 1))
    parts = []
    for axis, (count, unit) in enumerate(zip(grid, (1, side, side), strict=True)):
        angles = (torch.arange(count, device=device) + 0.5)[:, None] * unit * rates
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        shape = [1, 1, 1, 2 * FREQUENCIES]
        shape[axis] = count
        parts.append(waves.view(shape).expand(*grid, -1))
    return torch.cat(parts, -1)
