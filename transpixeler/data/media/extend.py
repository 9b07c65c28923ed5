"""Grow the colours that are seen over transparent pixels: RGBA frames in; the same with their hidden colour set, out.

Near an edge a frame's own colours count; further away those of all frames of the clip together, so that what nobody
sees holds still while the picture moves, and frames that show nothing are like the others.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEEN = 8  # levels of alpha from which on a pixel's colour is trusted: below, rounding and codecs leave any
NEAR = 4  # halvings up to which a frame's own colours reach: 16 pixels


class Backdrop:
    """The colour of a clip far from all that is seen: the mean of its frames around each place."""

    def __init__(self, frames: Iterable[np.ndarray] = ()) -> None:
        self._sums: Tensor | None = None  # [1, 4, h, w]: colours times alpha, and alpha
        for frame in frames:
            self.add(frame)

    def add(self, rgba: np.ndarray) -> None:
        """Add one uint8 [H,W,4] frame."""
        sums = _levels(rgba, NEAR)[-1]
        self._sums = sums if self._sums is None else self._sums + sums

    def color(self) -> Tensor:
        """Return [1, 3, h, w], black where no frame shows any colour at all."""
        assert self._sums is not None, "a backdrop of no frames"
        levels = [self._sums]
        while max(levels[-1].shape[2:]) > 1:
            levels.append(_halved(levels[-1]))
        return _grown(levels, _color(levels[-1]))


def extend(rgba: np.ndarray, backdrop: Backdrop) -> None:
    """Set the RGB of uint8 [H,W,4] where alpha is below SEEN, in place."""
    levels = _levels(rgba, NEAR)
    top = levels[-1]
    sure = top[:, 3:].clamp(max=1)
    grown = _grown(levels, _color(top) * sure + backdrop.color() * (1 - sure))
    found = grown[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    hidden = rgba[..., 3] < SEEN
    rgba[hidden, :3] = found[hidden]


def _levels(rgba: np.ndarray, count: int) -> list[Tensor]:
    """Return [1, 4, h, w] of colours times alpha and alpha in [0, 1], summed over ever larger squares."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgba)).permute(2, 0, 1)[None].float()
    weight = pixels[:, 3:] / 255 * (pixels[:, 3:] >= SEEN)
    levels = [torch.cat([pixels[:, :3] * weight, weight], 1)]
    for _ in range(count):
        levels.append(_halved(levels[-1]))
    return levels


def _halved(level: Tensor) -> Tensor:
    height, width = level.shape[2:]
    return 4 * F.avg_pool2d(F.pad(level, (0, width % 2, 0, height % 2)), 2)


def _grown(levels: list[Tensor], color: Tensor) -> Tensor:
    """Bring the colour of the last level to the first one's size: a level's own counts as far as it is seen there."""
    for level in reversed(levels[:-1]):
        coarse = F.interpolate(color, scale_factor=2.0, mode="bilinear")[..., : level.shape[2], : level.shape[3]]
        sure = level[:, 3:].clamp(max=1)
        color = _color(level) * sure + coarse * (1 - sure)
    return color


def _color(level: Tensor) -> Tensor:
    return level[:, :3] / level[:, 3:].clamp(min=1e-6)
