"""Cut latents [B, C, F, H, W] into patches [B, L, C·patch], one for each token, and put patches together again."""

from __future__ import annotations

from torch import Tensor

from transpixeler.models.streams import Grid


def patchify(x: Tensor, patch: Grid) -> Tensor:
    """[B, C, F, H, W] → [B, L, C·patch]."""
    (_, _, f, h, w), (pf, ph, pw) = x.shape, patch
    split = x.unflatten(4, (w // pw, pw)).unflatten(3, (h // ph, ph)).unflatten(2, (f // pf, pf))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """[B, L, C·patch] → [B, C·F·H·W]."""
    return x.unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(1)
