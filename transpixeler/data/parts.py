"""Name the parts of a clip that are encoded, each to a record of its own, and encode one.

In: the frames of one stream of a clip. Out: its latents, at the stream's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.media.scale import shrink
from transpixeler.models.family import Vae
from transpixeler.models.geometry import Geometry


class Part(NamedTuple):
    """One record of a clip: a stream of it, or the last frame of one, alone."""

    stream: str
    last: bool = False

    def __str__(self) -> str:
        """Name it for people."""
        return f"{self.stream}, its last frame" if self.last else self.stream


def encode_part(vae: Vae, video: np.ndarray, part: Part, scales: Mapping[str, int]) -> Tensor:
    """Return the latents [C, f, h, w] of a part, of its stream's frames uint8 [F, H, W, 3]. scales: by stream."""
    frames = video[-1:] if part.last else video
    return vae.encode(torch.from_numpy(shrink(frames, scales[part.stream]))[None])[0]


def part_shape(
    geometry: Geometry, bucket: tuple[int, int, int], part: Part, scales: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the shape of a part's latents."""
    frames, *sides = bucket
    return geometry.latent(1 if part.last else frames, *sides, scale=scales[part.stream])
