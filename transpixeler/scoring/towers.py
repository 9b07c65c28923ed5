"""Embed videos and captions in one space: cached latents and text embeddings in; vectors of length one out.

One tower reads the video of any stream, the other a caption. What belongs together has a cosine near one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    text_layers: int
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
    """A transformer whose heads each look for tokens of their own and put them into one vector."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.wanted, self.value = nn.LayerNorm(width), nn.Linear(width, heads), nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return [b, D] from tokens [b, T, D]. valid: [b, T], where not all are."""
        mask = None if valid is None else valid[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        wanted = self.wanted(x)
        if valid is not None:
            wanted = wanted.masked_fill(~valid[..., None], -torch.inf)
        values = self.value(x).unflatten(-1, (self.heads, -1))
        return (wanted.softmax(1)[..., None] * values).sum(1).flatten(1)


class Scorer(nn.Module):
    """Both towers, and how far apart cosines are pulled.

    A caption tells of all streams (RGB may not show how transparent a thing is), so it is compared with their sum; RGB
    and a companion are compared by what both show, which is another reading of the same tower.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.patches = nn.ModuleList(nn.Linear(sizes.channels * sizes.patch**2, width) for _ in sizes.streams)
        self.place = nn.Linear(3 * 2 * FREQUENCIES, width)
        self.video = Tower(width, sizes.layers, sizes.heads)
        self.told = nn.ModuleList(nn.Linear(width, width) for _ in sizes.streams)
        self.shared = nn.ModuleList(nn.Linear(width, width) for _ in sizes.streams)
        self.word = nn.Linear(sizes.text_width, width)
        self.caption = Tower(width, sizes.text_layers, sizes.heads)
        self.scale = nn.Parameter(torch.full((len(sizes.streams),), FIRST_SCALE))  # captions; then each companion

    def embed_sample(self, videos: Sequence[Tensor], streams: Sequence[int] | None = None) -> Tensor:
        """Return vectors of length one from a sample's videos [b, C, F, H, W]: [1 + videos, b, D].

        The first is what captions are compared with, the others are each video's own. streams: of the videos; by
        default the first, the second, ….
        """
        places = range(len(videos)) if streams is None else streams
        seen = {place: self._see(video, place) for place, video in zip(places, videos, strict=True)}
        told = sum((self.told[place](one) for place, one in seen.items()), torch.zeros((), device=videos[0].device))
        return F.normalize(torch.stack([told, *(self.shared[place](one) for place, one in seen.items())]), dim=-1)

    def _see(self, latents: Tensor, stream: int) -> Tensor:
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
        return F.normalize(self.caption(self.word(text[:, :longest]), valid[:, :longest]), dim=-1)

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
