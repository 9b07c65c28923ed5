"""A mask goes in, its connected regions come out, by runs of pixels rather than pixels: fast without a library for it.

Pixels are neighbours across edges, not corners (4-connectivity), as the matting literature counts them.
"""

from __future__ import annotations

import numpy as np


def label_regions(mask: np.ndarray) -> np.ndarray:
    """int [H,W]: 0 outside the mask [H,W], and 1, 2, … for its regions in the order in which a reader meets them."""
    starts, ends = _runs(mask)
    regions = _joined(starts, ends, mask.shape[1] + 1)
    labels = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int64)
    _, order = np.unique(regions, return_inverse=True)
    flat = labels.reshape(-1)
    np.add.at(flat, starts, order + 1)
    np.subtract.at(flat, ends, order + 1)
    return np.cumsum(flat).reshape(labels.shape)[:, :-1]


def largest_region(mask: np.ndarray) -> np.ndarray:
    """bool [H,W]: the region with the most pixels, the first of equals; nothing of an empty mask."""
    labels = label_regions(mask)
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return labels == sizes.argmax() if sizes.any() else np.zeros(mask.shape, bool)


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of true start and end, as positions in rows that are one pixel longer, so that none spans two rows."""
    flat = np.pad(mask.astype(np.int8), ((0, 0), (0, 1))).reshape(-1)
    steps = np.diff(flat, prepend=np.int8(0))
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)


def _joined(starts: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
    """For each run the first run of its region. Runs that touch take the lesser of their regions until none changes."""
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
    """Pairs (run, run one row below) that share a column. Shifted up by a row, runs overlap as intervals of a line."""
    first = np.searchsorted(ends, starts - width, side="right")  # the first run that ends after this one's start
    last = np.searchsorted(starts, ends - width, side="left")  # and the first that begins after its end
    counts = np.maximum(last - first, 0)
    lower = np.repeat(np.arange(len(starts)), counts)
    offsets = np.arange(len(lower)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + offsets, lower
