"""What lies under zero alpha: a file's RGB there is arbitrary, and a model would learn it, so a policy decides.

Colours are scaled times alpha whenever they are filled: what was invisible must not bleed into visible edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from transpixeler.config import DataConfig


@dataclass(frozen=True, slots=True)
class Fill:
    """What becomes of a file's colour; `alpha` says how the file holds it."""

    policy: Literal["keep", "extend", "black", "color"] = "keep"
    color: tuple[int, int, int] = (0, 0, 0)
    alpha: Literal["auto", "straight", "premultiplied"] = "straight"

    @classmethod
    def of(cls, data: DataConfig) -> Fill:
        """The colour counts only where the policy uses it, so that an unused one changes no cache key."""
        return cls(data.fill, data.fill_color if data.fill == "color" else (0, 0, 0), data.alpha)

    @property
    def parts(self) -> list[str | int]:
        """What tells two of them apart; straight, as it was before there was a choice, says nothing."""
        return [self.policy, *self.color, *([] if self.alpha == "straight" else [self.alpha])]


KEEP = Fill()
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
SOFT = (8, 96)  # alpha between these tells best: even dark colours are brighter than it
OVER, SHARE = 4, 0.02  # so much brighter than its alpha, in so many of the soft pixels, no premultiplied picture is
FADED, FEW = 0.75, 16  # the softer half of them is so much darker, where there are enough to say


def looks_premultiplied(frames: Iterable[np.ndarray]) -> bool:
    """Whether uint8 [H,W,4] frames hold colour times alpha: then no soft pixel is brighter than its alpha, and the
    softer are the darker, which tells them from what is dark by itself.

    Brightness is judged by luma, which chroma subsampling leaves sharp. Without soft pixels there is nothing to undo.
    """
    counts, sums, over = np.zeros(2), np.zeros(2), 0  # of the softer half and of the other
    for frame in frames:
        soft = (frame[..., 3] >= SOFT[0]) & (frame[..., 3] <= SOFT[1])
        luma, alpha = frame[soft][:, :3] @ LUMA, frame[soft][:, 3].astype(np.float32)
        over += int((luma > alpha + OVER).sum())
        harder = (alpha > sum(SOFT) / 2).astype(np.intp)
        counts += np.bincount(harder, minlength=2)
        sums += np.bincount(harder, luma, minlength=2)
    if over >= SHARE * counts.sum():
        return False
    return bool(counts.min() < FEW or sums[0] / counts[0] < FADED * sums[1] / counts[1])


def scaled_straight(rgba: np.ndarray, *, height: int, width: int, premultiplied: bool = False) -> np.ndarray:
    """uint8 [H,W,4] as straight colour at another size, scaled times alpha so that what is hidden has no weight."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgba)).permute(2, 0, 1).float()
    if not premultiplied:
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
