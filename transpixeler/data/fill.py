"""What lies under zero alpha: a file's RGB there is arbitrary, and a model would learn it, so a policy decides.

Colours are scaled times alpha whenever they are filled: what was invisible must not bleed into visible edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from transpixeler.config import DataConfig


@dataclass(frozen=True, slots=True)
class Fill:
    policy: Literal["keep", "extend", "black", "color"] = "keep"
    color: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, data: DataConfig) -> Fill:
        """The colour counts only where the policy uses it, so that an unused one changes no cache key."""
        return cls(data.fill, data.fill_color if data.fill == "color" else (0, 0, 0))


KEEP = Fill()


def scaled_straight(rgba: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """uint8 straight [H,W,4] at another size, scaled as colour times alpha so that what is hidden has no weight."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgba)).permute(2, 0, 1).float()
    pixels[:3] *= pixels[3:] / 255
    scaled = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]
    scaled[:3] *= 255 / scaled[3:].clamp(min=1e-3)
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


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
