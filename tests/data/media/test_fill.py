"""Colour under transparent pixels grows out of what is really seen, and holds still while the clip moves."""

from pathlib import Path

import numpy as np
import pytest

from transpixeler.data.media.decode import read_rgba
from transpixeler.data.media.extend import SEEN
from transpixeler.data.media.fill import Fill, fill_clip
from transpixeler.data.media.write import write_png_sequence

FRAMES, HEIGHT, WIDTH = 12, 72, 120
ORANGE, BLUE = np.array([220, 140, 60]), np.array([60, 110, 210])


def smoke() -> np.ndarray:
    """Draw a soft disc, orange above and blue below, that drifts over hidden green.

    Around it single pixels of an alpha up to 7 come and go, of any colour at all: as 8 bits of premultiplied colour
    and as codecs leave them.
    """
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    clip = np.empty((FRAMES, HEIGHT, WIDTH, 4), np.uint8)
    for number, frame in enumerate(clip):
        alpha = ((22 - np.hypot(y - 36, x - 36 - 2 * number)) / 8).clip(0, 1) * 255
        share = np.clip((y - 20) / 32, 0, 1)[..., None]
        frame[..., :3] = ORANGE * (1 - share) + BLUE * share
        frame[alpha == 0, :3] = (0, 255, 0)
        stray = (draw.random((HEIGHT, WIDTH)) < 0.02) & (alpha == 0)
        frame[stray, :3] = draw.choice([0, 255], (int(stray.sum()), 3))
        frame[..., 3] = np.where(stray, draw.integers(1, SEEN, (HEIGHT, WIDTH)), alpha)
    return clip


def extended(clip: np.ndarray, folder: Path) -> np.ndarray:
    write_png_sequence(folder, clip)
    rgb, _ = read_rgba(folder, range(len(clip)), height=HEIGHT, width=WIDTH, fill=Fill("extend"))
    return rgb.astype(int)


def test_pixels_of_almost_no_alpha_lend_nobody_their_colour(tmp_path: Path) -> None:
    clip = smoke()
    found = extended(clip, tmp_path / "a")
    hidden = clip[..., 3] < SEEN
    low, high = np.minimum(ORANGE, BLUE), np.maximum(ORANGE, BLUE)
    off = np.maximum(low - found, found - high)[hidden]
    assert off.max() <= 4, "a hidden pixel has a colour that nothing seen has"


def test_what_is_extended_holds_still_where_nothing_is_seen(tmp_path: Path) -> None:
    clip = smoke()
    found, hidden = extended(clip, tmp_path / "a"), clip[..., 3] < SEEN
    both = hidden[1:] & hidden[:-1]
    change = np.abs(np.diff(found, axis=0)).max(axis=-1)[both]
    assert change.mean() < 1 and np.percentile(change, 99) < 12


def test_frames_that_show_nothing_are_filled_as_the_others_are(tmp_path: Path) -> None:
    clip = smoke()
    clip[:4, ..., 3] = 0
    found = extended(clip, tmp_path / "a")
    assert (found[0] == found[3]).all() and found[0].max() > 100
    corner = found[:, :8, -8:].reshape(FRAMES, -1)
    assert np.abs(np.diff(corner, axis=0)).max() <= 1


def test_a_hidden_pixel_beside_an_edge_has_the_colour_of_that_edge(tmp_path: Path) -> None:
    clip = smoke()
    seen = clip[..., 3] >= SEEN
    found = extended(clip, tmp_path / "a")
    for frame, visible in zip(found, seen):
        beside = visible[:, :-1] & ~visible[:, 1:]  # the last column that is seen, and the first that is not
        assert np.abs(frame[:, :-1] - frame[:, 1:])[beside].mean() < 12


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 17), (64, 64)])
def test_any_size_is_extended(size: tuple[int, int]) -> None:
    clip = np.zeros((2, *size, 4), np.uint8)
    clip[:, 0, 0] = (200, 30, 90, 255)
    fill_clip(clip, Fill("extend"))
    assert (clip[..., :3] == (200, 30, 90)).all()
