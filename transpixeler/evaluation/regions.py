"""A mask goes in, its connected regions come out. It joins runs of pixels, not pixels: fast without a library.

Pixels are neighbours across edges, not corners (4-connectivity), as the matting literature counts them.
"""

from __future__ import annotations

import numpy as np


def label_regions(mask: np.ndarray) -> np.ndarray:
    """Label a mask [H,W]: int [H,W], 0 outside the mask and 1, 2, … for its regions in reading order."""
    starts, ends = _runs(mask)
    regions = _joined(starts, ends, mask.shape[1] + 1)
    labels = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int64)
    _, order = np.unique(regions, return_inverse=True)
    flat = labels.reshape(-1)
    np.add.at(flat, starts, order + 1)
    np.subtract.at(flat, ends, order + 1)
    return np.cumsum(flat).reshape(labels.shape)[:, :-1]


def largest_region(mask: np.ndarray) -> np.ndarray:
    """Return bool [H,W] of the region with the most pixels, the first of equals; all false for an empty mask."""
    labels = label_regions(mask)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return labels == sizes.argmax() if sizes.any() else np.zeros(mask.shape, bool)


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and ends of runs, as positions in rows padded by one pixel, so that none spans two rows."""
    flat = np.pad(mask.astype(np.int8), ((0, 0), (0, 1))).reshape(-1)
    steps = np.diff(flat, prepend=np.int8(0))
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)


def _joined(starts: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
    """Return, for each run, the first run of its region: runs that touch take the lesser number until none changes."""
    upper, lower = _touching(starts, ends, width)
    parent = np.arange(len(starts))
    while True:
        a, b = parent[upper], parent[lower]
        if (a == b).all():
            return parent
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while (parent[parent] != parent).any():
            parent = parent[parent]


def _touching(starts: np.ndarray, ends: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs (run, run one row below) that share a column: shifted up by a row, they overlap as intervals."""
    first = np.searchsorted(ends, starts - width, side="right")  # the first run that ends after this one's start
    last = np.searchsorted(starts, ends - width, side="left")  # and the first that begins after its end
    counts = np.maximum(last - first, 0)
    lower = np.repeat(np.arange(len(starts)), counts)
    offsets = np.arange(len(lower)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + offsets, lower
