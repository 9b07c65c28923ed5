"""Name the parts of a clip that are encoded, each to a record of its own, and encode one.

In: the frames of one stream of a clip. Out: its latents, at the stream's scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.media.scale import shrink
from transpixeler.models.family import Vae
from transpixeler.models.geometry import Geometry
from transpixeler.models.streams import FramesOf, frames_beside


class Part(NamedTuple):
    """One record of a clip: a stream of it, or frames of one that stand beside it."""

    stream: str
    every: int | None = None  # frames beside the video, each encoded alone: as in `FramesOf`; None: the video

    def __str__(self) -> str:
        """Name it for people."""
        return self.stream if self.every is None else f"{self.stream}, its {named(self.every)}"

    @property
    def suffix(self) -> str:
        """Return the ending of its tensor's name in a file of features."""
        return "" if self.every is None else f"_every{self.every}" if self.every else "_last"


def named(every: int) -> str:
    """Name frames that stand beside a video."""
    return f"every {every} frames" if every else "last frame"


def parts_of(streams: Sequence[str], beside: Sequence[FramesOf], frames: int) -> list[Part]:
    """List the parts of a clip of so many frames, in the order of its segments."""
    found = []
    for number, stream in enumerate(streams):
        found.append(Part(stream))
        own = sorted(every for of, every in beside if of == number)
        found += [Part(stream, every) for every in own if frames_beside(every, frames)]
    return found


def encode_part(vae: Vae, video: np.ndarray, part: Part, scales: Mapping[str, int]) -> Tensor:
    """Return the latents [C, f, h, w] of a part, of its stream's frames uint8 [F, H, W, 3]. scales: by stream."""
    if part.every is not None:
        video = video[list(frames_beside(part.every, len(video)))]
    frames = torch.from_numpy(shrink(video, scales[part.stream]))[None]
    if part.every is None:
        return vae.encode(frames)[0]
    return torch.cat([vae.encode(one)[0] for one in frames.split(1, dim=1)], dim=1)


def part_shape(
    geometry: Geometry, bucket: tuple[int, int, int], part: Part, scales: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the shape of a part's latents."""
    frames, *sides = bucket
    channels, latents, *cells = geometry.latent(frames, *sides, scale=scales[part.stream])
    return (channels, latents if part.every is None else len(frames_beside(part.every, frames)), *cells)
