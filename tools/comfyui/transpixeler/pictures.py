"""Fit pictures to a size, and make RGBA of two streams. Pictures are [F, H, W, C] of 0 to 1, as ComfyUI has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 1e-4  # added to RGB's variance: below it a window counts as flat


def fitted(pictures: Tensor, *, frames: int, height: int, width: int, name: str) -> Tensor:
    """Return the first frames of pictures, scaled to cover the size and cropped to its centre: [frames, H, W, 3]."""
    if len(pictures) < frames:
        raise ValueError(
            f"{name}: has {len(pictures)} frames, not {frames}; make length {1 + (len(pictures) - 1) // 4 * 4}"
        )
    pictures = pictures[:frames, :, :, :3]
    if pictures.shape[1:3] == (height, width):
        return pictures
    scale = max(height / pictures.shape[1], width / pictures.shape[2])
    tall, wide = (max(least, round(side * scale)) for least, side in zip((height, width), pictures.shape[1:3]))
    scaled = F.interpolate(pictures.movedim(-1, 1), (tall, wide), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (tall - height) // 2, (wide - width) // 2
    return scaled[:, :, top : top + height, left : left + width].movedim(1, -1)


def shrunk(pictures: Tensor, scale: int) -> Tensor:
    """Average each square of scale² pixels."""
    return F.avg_pool2d(pictures.movedim(-1, 1), scale).movedim(1, -1)


def enlarged(companion: Tensor, rgb: Tensor) -> Tensor:
    """Return a companion at RGB's size, its edges where RGB has them.

    Within each window of 3 by 3 small pixels it is a linear function of RGB: the guided filter of He, Sun and Tang
    (2010), its coefficients found at the small size (He and Sun, 2015).
    """
    if companion.shape == rgb.shape:
        return companion
    frames = [_guided(small.movedim(-1, 0)[None], large.movedim(-1, 0)[None]) for small, large in zip(companion, rgb)]
    return torch.cat(frames).clamp(0, 1).movedim(1, -1)


def _guided(small: Tensor, guide: Tensor) -> Tensor:
    """[1, 3, h, w] and [1, 3, H, W] → [1, 3, H, W]."""
    coarse = F.interpolate(guide, small.shape[-2:], mode="area")
    mean_guide, mean = _box(coarse), _box(small)
    products = torch.einsum("nihw,njhw->nijhw", coarse, torch.cat([coarse, small], dim=1))
    covariances = _box(products.flatten(1, 2)).unflatten(1, products.shape[1:3])
    covariances = covariances - torch.einsum("nihw,njhw->nijhw", mean_guide, torch.cat([mean_guide, mean], dim=1))
    among, across = covariances.permute(0, 3, 4, 1, 2).split([3, small.shape[1]], dim=-1)  # [1, h, w, 3, 3]
    slopes = torch.linalg.solve(among + SMOOTHING * torch.eye(3, device=small.device), across)
    offset = mean - torch.einsum("nhwic,nihw->nchw", slopes, mean_guide)
    slopes = slopes.permute(0, 3, 4, 1, 2).flatten(1, 2)  # [1, 9, h, w]
    large = [F.interpolate(_box(part), guide.shape[-2:], mode="bilinear") for part in (slopes, offset)]
    return torch.einsum("nichw,nihw->nchw", large[0].unflatten(1, (3, -1)), guide) + large[1]


def _box(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def rgba(rgb: Tensor, alpha: Tensor, mode: str) -> Tensor:
    """Return [F, H, W, 4] of colour and alpha [F, H, W]; straight colour, or premultiplied by alpha."""
    color = rgb * alpha[..., None] if mode == "premultiplied" else rgb
    return torch.cat([color, alpha[..., None]], dim=-1)
