"""Convert between linear light, as compositors keep it, and pictures as models see them: floats in, floats out.

Pictures are sRGB or BT.709 in [0, 1]; both have the same primaries, by other curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Curve = Literal["srgb", "rec709"]
REC709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)  # x and y of red, green, blue and white
SAME = 0.002  # by which chromaticities may differ and be the same
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True, slots=True)
class Light:
    """Say how files of linear light become pictures. `data`: values of mattes and depth, which no curve touches."""

    curve: Curve | Literal["data"] = "srgb"
    alpha: Literal["auto", "straight", "premultiplied"] = "auto"  # auto: premultiplied, unless the file says otherwise


SHOWN, DATA = Light(), Light("data")


def encoded(linear: np.ndarray, curve: str) -> np.ndarray:
    """Return float32 in [0, 1] by a curve; what is brighter than white is white."""
    x = np.nan_to_num(linear.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    if curve == "srgb":
        return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** np.float32(1 / 2.4) - 0.055)
    if curve == "rec709":
        return np.where(x < 0.018053968, 4.5 * x, 1.0992968 * x ** np.float32(0.45) - 0.0992968)
    assert curve == "data", curve
    return x


def decoded(picture: np.ndarray, curve: str) -> np.ndarray:
    """Return linear light float32 of a picture in [0, 1]: the inverse of `encoded`."""
    x = picture.astype(np.float32)
    if curve == "srgb":
        return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** np.float32(2.4))
    if curve == "rec709":
        return np.where(x < 0.08124286, x / 4.5, ((x + 0.0992968) / 1.0992968) ** np.float32(1 / 0.45))
    assert curve == "data", curve
    return x


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Return uint8 of floats in [0, 1]."""
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def straightened(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return linear colour [H,W,3] that is not multiplied by alpha [H,W]; light without alpha stays as it is."""
    return np.where(alpha[..., None] > 0, rgb / np.maximum(alpha[..., None], 1e-6), rgb)


def to_rec709(rgb: np.ndarray, chromaticities: Sequence[float] | None) -> np.ndarray:
    """Return linear colour [H,W,3] in the primaries of pictures. chromaticities: of a file, None as pictures' own."""
    if chromaticities is None or np.abs(np.subtract(chromaticities, REC709)).max() < SAME:
        return rgb
    return (rgb @ primaries_matrix(chromaticities).T).astype(np.float32)


def primaries_matrix(chromaticities: Sequence[float]) -> np.ndarray:
    """Return [3, 3] from linear colour of these chromaticities to BT.709's, with the white adapted (Bradford)."""
    cones = [BRADFORD @ _white(one) for one in (chromaticities, REC709)]
    adapted = np.linalg.inv(BRADFORD) @ np.diag(cones[1] / cones[0]) @ BRADFORD
    return np.linalg.inv(_to_xyz(REC709)) @ adapted @ _to_xyz(chromaticities)


def _to_xyz(chromaticities: Sequence[float]) -> np.ndarray:
    x, y = np.array(chromaticities[0:6:2], float), np.array(chromaticities[1:6:2], float)
    columns = np.stack([x / y, np.ones(3), (1 - x - y) / y])
    return columns * np.linalg.solve(columns, _white(chromaticities))


def _white(chromaticities: Sequence[float]) -> np.ndarray:
    x, y = chromaticities[6:8]
    return np.array([x / y, 1, (1 - x - y) / y])
