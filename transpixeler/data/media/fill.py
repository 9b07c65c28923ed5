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

from transpixeler.config.sections import DataConfig
from transpixeler.data.media.extend import Backdrop, extend
from transpixeler.data.media.light import Curve, Light


@dataclass(frozen=True, slots=True)
class Fill:
    """Say what to do with a file's hidden colour; `alpha` and `transfer` say how the file stores its colour.

    transfer: the curve by which linear light becomes a picture; other files have theirs.
    """

    policy: Literal["keep", "extend", "black", "color"] = "keep"
    color: tuple[int, int, int] = (0, 0, 0)
    alpha: Literal["auto", "straight", "premultiplied"] = "straight"
    transfer: Curve = "srgb"

    @property
    def light(self) -> Light:
        """Say how colour in linear light becomes a picture."""
        return Light(self.transfer, self.alpha)

    @classmethod
    def of(cls, data: DataConfig) -> Fill:
        """Read the config; a colour that the policy does not use is left out, so that it changes no cache key."""
        return cls(data.fill, data.fill_color if data.fill == "color" else (0, 0, 0), data.alpha, data.transfer)

    @property
    def parts(self) -> list[str | int]:
        """List what a cache key covers; `straight` adds nothing, since old keys were made before there was a choice."""
        policy = [self.policy, EXTENDS] if self.policy == "extend" else [self.policy]
        return [*policy, *self.color, *([] if self.alpha == "straight" else [self.alpha])]


KEEP = Fill()
EXTENDS = 2  # raised when extending gives other colours: cache keys cover it
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


def fill_clip(rgba: np.ndarray, fill: Fill) -> None:
    """Set the hidden RGB of a whole clip uint8 [F,H,W,4] by the policy, in place."""
    backdrop = Backdrop(rgba) if fill.policy == "extend" else None
    for frame in rgba if fill.policy != "keep" else ():
        fill_frame(frame, fill, backdrop)


def fill_frame(rgba: np.ndarray, fill: Fill, backdrop: Backdrop | None) -> None:
    """Set the hidden RGB of uint8 [H,W,4] by the policy, in place. backdrop: of its clip, to extend."""
    if fill.policy == "extend":
        assert backdrop is not None, "extending needs the clip's backdrop"
        extend(rgba, backdrop)
    elif fill.policy != "keep":
        rgba[rgba[..., 3] == 0, :3] = fill.color
