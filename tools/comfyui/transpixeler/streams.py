"""Locate each stream in a latent and in the sequence of tokens.

A latent [B, C, frames of all streams, h, w] holds the streams' frames one after another. A companion of scale s has
1/s of the rows and columns: it lies in the upper left corner of its frames, and the rest of them means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Names of the streams, and the rows and columns of the first one that one of their own covers."""

    names: tuple[str, ...]
    scales: tuple[int, ...]

    @property
    def shares(self) -> tuple[int, ...]:
        """Tokens of each stream's frame, by those of the smallest unit that divides them all."""
        unit = math.lcm(*self.scales)
        return tuple((unit // scale) ** 2 for scale in self.scales)

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """Return the tokens of each stream in a sequence of so many."""
        unit, rest = divmod(tokens, sum(self.shares))
        if rest:
            raise ValueError(f"{tokens} tokens are not {self.told()}; make the latent with Joint Latent (Wan)")
        return tuple(unit * share for share in self.shares)

    def frames(self, total: int) -> int:
        """Return the latent frames of one stream, of those of all."""
        count = len(self.names)
        if total % count:
            raise ValueError(f"{total} latent frames are not {count} streams; make the latent with Joint Latent (Wan)")
        return total // count

    def check_sides(self, height: int, width: int, *, unit: int, what: str) -> None:
        """Refuse sides that the streams' scales do not divide. unit: what a side of the smallest stream is made of."""
        unit *= math.lcm(*self.scales)
        if any(self.scales[0] != scale for scale in self.scales) and (height % unit or width % unit):
            raise ValueError(f"{what}: {width} by {height} does not fit {self.told()}; take multiples of {unit}")

    def parts(self, latent: Tensor) -> list[Tensor]:
        """Return a view [B, C, F, h, w] of each stream."""
        frames, (height, width) = self.frames(latent.shape[2]), latent.shape[-2:]
        return [
            latent[:, :, number * frames : (number + 1) * frames, : height // scale, : width // scale]
            for number, scale in enumerate(self.scales)
        ]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the latent that holds these parts, zeros where none lies."""
        height, width = parts[0].shape[-2:]
        whole = [
            torch.nn.functional.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2])) for part in parts
        ]
        return torch.cat(whole, dim=2)

    def told(self) -> str:
        """Return the streams in words, for an error."""
        scaled = (f"{name} at 1/{scale}" if scale > 1 else name for name, scale in zip(self.names, self.scales))
        return f"{len(self.names)} streams ({', '.join(scaled)})"


def of_latent(latent: dict, streams: int) -> Streams:
    """Return the streams that Joint Latent noted beside a latent; without a note, so many of one size."""
    return latent.get("transpixeler") or Streams(tuple(f"stream {number}" for number in range(streams)), (1,) * streams)
