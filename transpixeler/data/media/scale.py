"""Shrink a companion's frames to its scale before they are encoded, and enlarge what was decoded to RGB's size.

Both ways a pixel of the small frame stands for the square of pixels that it covers, so that streams stay aligned.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 1  # of the window in which a companion is told from RGB, in pixels of the small frame
SMOOTHING = 1e-4  # added to RGB's variance, of values in [0, 1]: below it a window counts as flat


def shrink(video: np.ndarray, scale: int) -> np.ndarray:
    """Average each square of scale² pixels: uint8 [F, H, W, 3] → [F, H/scale, W/scale, 3]."""
    if scale == 1:
        return video
    frames, height, width, channels = video.shape
    squares = video.reshape(frames, height // scale, scale, width // scale, scale, channels)
    return np.rint(squares.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def enlarge(video: np.ndarray, rgb: np.ndarray, *, guided: bool = True) -> np.ndarray:
    """Return a companion at RGB's size: uint8 [F, h, w, 3] and [F, H, W, 3] → [F, H, W, 3].

    guided: edges are put where RGB has them; else they are interpolated.
    """
    if video.shape == rgb.shape:
        return video
    frames = []
    for small, large in zip(video, rgb, strict=True):
        companion, guide = _unit(small), _unit(large)
        found = _guided(companion, guide) if guided else _interpolated(companion, guide)
        frames.append(found[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8).numpy())
    return np.stack(frames)


def _unit(frame: np.ndarray) -> Tensor:
    """Uint8 [H, W, 3] → [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255


def _interpolated(small: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(small, like.shape[-2:], mode="bilinear", align_corners=False)


def _guided(small: Tensor, guide: Tensor) -> Tensor:
    """Fit the companion as a linear function of RGB in each window of the small frame, and apply it to the large RGB.

    The guided filter of He, Sun and Tang (2010), its coefficients found at the small size (He and Sun, 2015).
    """
    coarse = F.interpolate(guide, small.shape[-2:], mode="area")
    mean_guide, mean = _box(coarse), _box(small)
    products = torch.einsum("nihw,njhw->nijhw", coarse, torch.cat([coarse, small], dim=1))
    covariances = _box(products.flatten(1, 2)).unflatten(1, products.shape[1:3])
    covariances = covariances - torch.einsum("nihw,njhw->nijhw", mean_guide, torch.cat([mean_guide, mean], dim=1))
    among, across = covariances.permute(0, 3, 4, 1, 2).split([3, small.shape[1]], dim=-1)  # [1, h, w, 3, 3]
    slopes = torch.linalg.solve(among + SMOOTHING * torch.eye(3), across)  # [1, h, w, 3, channels]
    offset = mean - torch.einsum("nhwic,nihw->nchw", slopes, mean_guide)
    slopes = slopes.permute(0, 3, 4, 1, 2).flatten(1, 2)  # [1, 3 · channels, h, w]
    large = [_interpolated(_box(part), guide) for part in (slopes, offset)]
    return torch.einsum("nichw,nihw->nchw", large[0].unflatten(1, (3, -1)), guide) + large[1]


def _box(x: Tensor) -> Tensor:
    """Average over a window of 2·RADIUS + 1 on each side, of what is inside the frame."""
    return F.avg_pool2d(x, 2 * RADIUS + 1, stride=1, padding=RADIUS, count_include_pad=False)
