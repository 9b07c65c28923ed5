"""Read shape, colour and direction off the frames of a sampled scene, by measurements that know nothing of the model.

RGB is uint8 [F, H, W, 3] over black. The shape is what stands out from black; its mean colour and the direction in
which its centre moves are compared with the caption's words.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter

import numpy as np

from transpixeler.demo.scenes import COLORS, DIRECTIONS, Attributes, all_attributes

SHAPE_BRIGHTNESS = 0.5  # share of the shape's own brightness from which a pixel is part of it
EMPTY_BRIGHTNESS = 60  # a frame whose brightest pixels are below this shows nothing
LEAST_MOTION = 2.0  # pixels; a centre that moves less stands still
HELD_OUT = tuple(attributes for attributes in all_attributes() if attributes.held_out)


def held_out_captions(count: int) -> list[Attributes]:
    """Choose captions one by one, always the one whose words were chosen least, so that a few cover all words."""
    left = [HELD_OUT[n] for n in np.random.default_rng(0).permutation(len(HELD_OUT))]
    asked: Counter[str] = Counter()
    chosen = []
    for _ in range(count):
        next_one = min(left, key=lambda one: sum(asked[word] for word in dataclasses.astuple(one)))
        left.remove(next_one)
        asked.update(dataclasses.astuple(next_one))
        chosen.append(next_one)
    return chosen


def add_captions(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the option `--captions`: how many held-out captions are measured."""

    def number(text: str) -> int:
        if text.isdecimal() and 1 <= int(text) <= len(HELD_OUT):
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {len(HELD_OUT)}")

    told = f"how many of the {len(HELD_OUT)} held-out captions to measure (default: {default})"
    parser.add_argument("--captions", type=number, default=default, metavar="N", help=told)


def silhouette(rgb: np.ndarray) -> np.ndarray:
    """Return a mask, bool [F, H, W], of what stands out from black."""
    brightness = rgb.max(axis=-1)
    peak = np.percentile(brightness.reshape(len(rgb), -1), 98, axis=1)[:, None, None]
    return (brightness >= SHAPE_BRIGHTNESS * peak) & (peak >= EMPTY_BRIGHTNESS)


def color(rgb: np.ndarray) -> str | None:
    """Return the colour of the shape by its hue."""
    inside = silhouette(rgb)
    if not inside.any():
        return None
    seen = _unit(rgb[inside].mean(0))
    return max(COLORS, key=lambda name: float(_unit(np.array(COLORS[name])) @ seen))


def direction(rgb: np.ndarray) -> str | None:
    """Return the direction in which the shape's centre moves from the first quarter of the frames to the last."""
    centers = [np.argwhere(frame).mean(0)[::-1] for frame in silhouette(rgb) if frame.any()]
    if len(centers) < 2:
        return None
    quarter = max(1, len(centers) // 4)
    way = np.mean(centers[-quarter:], axis=0) - np.mean(centers[:quarter], axis=0)
    if np.linalg.norm(way) < LEAST_MOTION:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.array(DIRECTIONS[name]) @ way))


def follows(rgb: np.ndarray, wanted: Attributes) -> dict[str, bool]:
    """Tell if colour and direction are the caption's."""
    return {"color": color(rgb) == wanted.color, "direction": direction(rgb) == wanted.direction}


def silhouette_iou(rgb: np.ndarray, alpha: np.ndarray) -> float:
    """Return the IoU of alpha [F, H, W], cut at one half, with the RGB's silhouette; 0 if neither shows a shape."""
    shape, matte = silhouette(rgb), alpha >= 0.5
    return np.count_nonzero(shape & matte) / max(np.count_nonzero(shape | matte), 1)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)
