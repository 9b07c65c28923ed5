"""What lies under zero alpha: a file's RGB there is arbitrary, and a model would learn it, so a policy decides.

Colours are scaled premultiplied whenever they are filled: what was invisible must not bleed into visible edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from transpixeler.config import DataConfig

if TYPE_CHECKING:
    import av


@dataclass(frozen=True, slots=True)
class Fill:
    policy: Literal["keep", "extend", "black", "color"] = "keep"
    color: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, data: DataConfig) -> Fill:
        """The colour counts only where the policy uses it, so that an unused one changes no cache key."""
        return cls(data.fill, data.fill_color if data.fill == "color" else (0, 0, 0))


KEEP = Fill()


def premultiplied(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame as 16 bit RGBA with its colours times alpha; the rotation stays with the caller's frame."""
    import av

    rgba = frame.reformat(format="rgba").to_ndarray().astype(np.uint16)
    rgba[..., :3] *= rgba[..., 3:]
    rgba[..., 3] *= 255
    return av.VideoFrame.from_ndarray(rgba, "rgba64le")


def unmultiplied(rgba: np.ndarray) -> np.ndarray:
    """uint16 premultiplied [H,W,4] → uint8 straight [H,W,4]."""
    alpha = rgba[..., 3:].astype(np.float32)
    color = rgba[..., :3] * (255 / np.maximum(alpha, 1))
    return np.concatenate([color, alpha / 257], axis=2).round().clip(0, 255).astype(np.uint8)


def filled(rgba: np.ndarray, fill: Fill) -> np.ndarray:
    """uint8 [H,W,4] with the RGB under zero alpha as the policy says."""
    if fill.policy == "keep":
        return rgba
    hidden = rgba[..., 3] == 0
    if fill.policy == "extend":
        rgba[hidden, :3] = extended(rgba)[hidden]
    else:
        rgba[hidden, :3] = fill.color
    return rgba


def extended(rgba: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3]: each hidden pixel takes the mean colour of the smallest neighbourhood that shows any."""
    weight = rgba[..., 3:].astype(np.float32) / 255
    levels = [np.concatenate([rgba[..., :3] * weight, weight], axis=2)]
    while max(levels[-1].shape[:2]) > 1:
        levels.append(_halved(levels[-1]))
    color = levels[-1][..., :3] / np.maximum(levels[-1][..., 3:], 1e-6)
    for level in reversed(levels[:-1]):
        height, width = level.shape[:2]
        coarse = color.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
        color = np.where(level[..., 3:] > 0, level[..., :3] / np.maximum(level[..., 3:], 1e-6), coarse)
    return color.round().clip(0, 255).astype(np.uint8)


def _halved(level: np.ndarray) -> np.ndarray:
    height, width = level.shape[:2]
    even = np.pad(level, ((0, height % 2), (0, width % 2), (0, 0)))
    return even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
