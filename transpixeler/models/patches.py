"""Cut latents [B, C, F, H, W] into patches [B, L, C·patch], one for each token, and put patches together again."""

from __future__ import annotations

from torch import Tensor

from transpixeler.models.streams import Grid


def patchify(x: Tensor, patch: Grid, *, channels_last: bool = False) -> Tensor:
    """[B, C, F, H, W] → [B, L, C·patch]. channels_last: in a patch, the channels of one cell stand together."""
    (_, _, f, h, w), (pf, ph, pw) = x.shape, patch
    split = x.unflatten(4, (w // pw, pw)).unflatten(3, (h // ph, ph)).unflatten(2, (f // pf, pf))
    inside = (3, 5, 7, 1) if channels_last else (1, 3, 5, 7)
    return split.permute(0, 2, 4, 6, *inside).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: Grid, patch: Grid, *, channels_last: bool = False) -> Tensor:
    """[B, L, C·patch] → [B, C·F·H·W]."""
    split = x.unflatten(2, (*patch, -1) if channels_last else (-1, *patch)).unflatten(1, grid)
    if channels_last:
        split = split.permute(0, 1, 2, 3, 7, 4, 5, 6)
    return split.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(1)
