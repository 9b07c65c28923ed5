"""Companions are shrunk without moving, and enlarged with edges where RGB has them."""

from __future__ import annotations

import numpy as np
import pytest

from transpixeler.data.media.scale import enlarge, shrink

Scene = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Draw a disc and a thin ring over a background with texture and noise: RGB and alpha, uint8 [1, 96, 96, 3]."""
    fine, size = 4, 96
    y, x = np.mgrid[: size * fine, : size * fine] / (size * fine)
    disc = (x - 0.5) ** 2 + (y - 0.45) ** 2 < 0.08
    ring = 0.6 * (abs(np.hypot(x - 0.3, y - 0.7) - 0.15) < 0.02)
    alpha = np.maximum(disc, ring)[..., None]
    front = np.stack([0.8 + 0 * x, 0.2 + 0.3 * x, 0.1 + 0 * y], -1)
    back = np.stack([0.2 + 0.3 * y, 0.5 + 0 * x, 0.7 - 0.3 * x], -1) + 0.05 * np.sin(60 * x + 40 * y)[..., None]
    rgb = front * alpha + back * (1 - alpha) + np.random.default_rng(0).uniform(-0.01, 0.01, (*x.shape, 1))
    alpha = np.repeat(alpha, 3, axis=-1)
    small = [part.reshape(size, fine, size, fine, 3).mean((1, 3)) for part in (rgb, alpha)]
    pictures = [np.rint(part.clip(0, 1) * 255).astype(np.uint8)[None] for part in small]
    return pictures[0], pictures[1]


def test_a_square_of_pixels_becomes_their_mean() -> None:
    video = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    found = shrink(video, 2)
    assert found.shape == (2, 2, 3, 3)
    assert found[1, 1, 2].tolist() == np.rint(video[1, 2:4, 4:6].mean((0, 1))).tolist()
    assert shrink(video, 1) is video


@pytest.mark.parametrize("scale", [2, 4])
def test_edges_are_put_where_rgb_has_them(scene: Scene, scale: int) -> None:
    rgb, alpha = scene
    small = shrink(alpha, scale)
    errors = {way: np.abs(enlarge(small, rgb, guided=way).astype(float) - alpha).mean() for way in (True, False)}
    assert errors[True] < 0.35 * errors[False], errors


@pytest.mark.parametrize("guided", [True, False])
def test_what_is_even_stays_and_nothing_moves(scene: Scene, guided: bool) -> None:
    rgb, _ = scene
    even = np.full((1, 48, 48, 3), 200, np.uint8)
    assert np.array_equal(enlarge(even, rgb, guided=guided), np.full_like(rgb, 200))
    slope = np.broadcast_to(np.arange(0, 192, 2, dtype=np.uint8)[None, None, :, None], rgb.shape).copy()
    found = enlarge(shrink(slope, 2), slope, guided=guided)[:, :, 4:-4].astype(int)
    assert np.abs(found - slope[:, :, 4:-4]).max() <= 1  # half a pixel off would be 1 everywhere, a whole one 2
    assert abs((found - slope[:, :, 4:-4]).mean()) < 0.5


def test_equal_sizes_are_left_alone(scene: Scene) -> None:
    rgb, alpha = scene
    assert enlarge(alpha, rgb) is alpha
