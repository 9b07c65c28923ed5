"""Frames of a sampled scene in, what they show out: by simple measurements that know nothing of the model.

RGB is uint8 [F, H, W, 3] over black. What stands out from black is the shape; its mean colour and the way its centre
goes are held against the caption's words.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter

import numpy as np

from transpixeler.demo.scenes import COLORS, DIRECTIONS, Attributes, all_attributes

BRIGHT = 0.5  # share of the shape's own brightness from which a pixel is part of it
DARK = 60  # a video whose brightest pixels are below this shows nothing
STILL = 2.0  # pixels; a centre that moves less goes nowhere
HELD_OUT = tuple(attributes for attributes in all_attributes() if attributes.held_out)


def held_out_captions(count: int) -> list[Attributes]:
    """The next is always the one whose words were asked for least, so that a few tell of all."""
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
    """The option that says how many of them are measured."""

    def number(text: str) -> int:
        if text.isdecimal() and 1 <= int(text) <= len(HELD_OUT):
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {len(HELD_OUT)}")

    told = f"how many of the {len(HELD_OUT)} held-out captions to measure (default: {default})"
    parser.add_argument("--captions", type=number, default=default, metavar="N", help=told)


def silhouette(rgb: np.ndarray) -> np.ndarray:
    """bool [F, H, W]: what stands out from black."""
    brightness = rgb.max(axis=-1)
    peak = np.percentile(brightness.reshape(len(rgb), -1), 98, axis=1)[:, None, None]
    return (brightness >= BRIGHT * peak) & (peak >= DARK)


def color(rgb: np.ndarray) -> str | None:
    """The colour of the shape, by its hue."""
    inside = silhouette(rgb)
    if not inside.any():
        return None
    seen = _unit(rgb[inside].mean(0))
    return max(COLORS, key=lambda name: float(_unit(np.array(COLORS[name])) @ seen))


def direction(rgb: np.ndarray) -> str | None:
    """Where its centre goes from the first quarter of the frames to the last."""
    centers = [np.argwhere(frame).mean(0)[::-1] for frame in silhouette(rgb) if frame.any()]
    if len(centers) < 2:
        return None
    quarter = max(1, len(centers) // 4)
    way = np.mean(centers[-quarter:], axis=0) - np.mean(centers[:quarter], axis=0)
    if np.linalg.norm(way) < STILL:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.array(DIRECTIONS[name]) @ way))


def follows(rgb: np.ndarray, wanted: Attributes) -> dict[str, bool]:
    """Whether colour and direction are the caption's."""
    return {"color": color(rgb) == wanted.color, "direction": direction(rgb) == wanted.direction}


def silhouette_iou(rgb: np.ndarray, alpha: np.ndarray) -> float:
    """Of the alpha [F, H, W] in [0, 1] cut at one half with the RGB's silhouette; 0 where no shape is to be seen."""
    shape, matte = silhouette(rgb), alpha >= 0.5
    return np.count_nonzero(shape & matte) / max(np.count_nonzero(shape | matte), 1)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)
