"""Fill the RGB under zero alpha, which is arbitrary in files and which a model would learn: frames in, frames out.

Whenever a fill is made, colours are scaled multiplied by alpha, so that hidden colour cannot bleed into visible edges.
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
    """Say what to do with a file's hidden colour; `alpha` says how the file stores its colour."""

    policy: Literal["keep", "extend", "black", "color"] = "keep"
    color: tuple[int, int, int] = (0, 0, 0)
    alpha: Literal["auto", "straight", "premultiplied"] = "straight"

    @classmethod
    def of(cls, data: DataConfig) -> Fill:
        """Read the config; a colour that the policy does not use is left out, so that it changes no cache key."""
        return cls(data.fill, data.fill_color if data.fill == "color" else (0, 0, 0), data.alpha)

    @property
    def parts(self) -> list[str | int]:
        """List what a cache key covers; `straight` adds nothing, since old keys were made before there was a choice."""
        return [self.policy, *self.color, *([] if self.alpha == "straight" else [self.alpha])]


KEEP = Fill()
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
SOFT = (8, 96)  # the range of alpha that is judged: here even dark straight colours are brighter than alpha
OVER = 4  # levels that luma may exceed alpha by in a premultiplied picture, because of rounding and compression
MAX_OVER = 0.02  # share of soft pixels beyond OVER from which on a picture is not premultiplied
FADED = 0.75  # premultiplied: the softer half has less than this part of the harder half's luma
STRIP = 256  # rows judged at a time: as floats, a large frame takes many times its memory
FEW = 16  # pixels in a half below which the halves are not compared


def looks_premultiplied(frames: Iterable[np.ndarray]) -> bool:
    """Tell whether uint8 [H,W,4] frames hold colour times alpha, judged by their soft (half-transparent) pixels.

    If so, no soft pixel is brighter than its alpha, and softer pixels are darker, which a merely dark picture's are
    not. Brightness is luma, which chroma subsampling leaves sharp. Without soft pixels there is nothing to undo.
    """
    counts, sums, over = np.zeros(2), np.zeros(2), 0  # [softer half, harder half]
    strips = (frame[top : top + STRIP] for frame in frames for top in range(0, len(frame), STRIP))
    for frame in strips:
        soft = (frame[..., 3] >= SOFT[0]) & (frame[..., 3] <= SOFT[1])
        luma, alpha = frame[soft][:, :3] @ LUMA, frame[soft][:, 3].astype(np.float32)
        over += int((luma > alpha + OVER).sum())
        harder = (alpha > sum(SOFT) / 2).astype(np.intp)
        counts += np.bincount(harder, minlength=2)
        sums += np.bincount(harder, luma, minlength=2)
    if over >= MAX_OVER * counts.sum():
        return False
    return bool(counts.min() < FEW or sums[0] / counts[0] < FADED * sums[1] / counts[1])


def scaled_straight(rgba: np.ndarray, *, height: int, width: int, premultiplied: bool = False) -> np.ndarray:
    """Scale uint8 [H,W,4] to straight colour, weighting by alpha so that hidden pixels do not count."""
    pixels = torch.from_numpy(np.ascontiguousarray(rgba)).permute(2, 0, 1).float()
    if not premultiplied:
        pixels[:3] *= pixels[3:] / 255
    scaled = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]
    scaled[:3] *= 255 / scaled[3:].clamp(min=1e-3)
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def filled(rgba: np.ndarray, fill: Fill) -> np.ndarray:
    """Set the RGB under zero alpha of uint8 [H,W,4] by the policy, in place."""
    if fill.policy == "keep":
        return rgba
    hidden = rgba[..., 3] == 0
    if fill.policy == "extend":
        rgba[hidden, :3] = extended(rgba)[hidden]
    else:
        rgba[hidden, :3] = fill.color
    return rgba


def extended(rgba: np.ndarray) -> np.ndarray:
    """Return uint8 [H,W,3]: each hidden pixel takes the mean colour of the smallest neighbourhood that shows any."""
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
