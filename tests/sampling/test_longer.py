"""A clip is made longer by windows: its own frames stay in their places, and every other one is made once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from transpixeler.sampling.longer import Course, Longer

NAMES = ("rgb", "seg")


def course(**settings: int | tuple[int, ...]) -> Course:
    facts = {"fps": Fraction(16), "numbers": (), "streams": (0, 1), **settings}
    return Course(**facts)  # pyright: ignore[reportArgumentType]


def numbered(frames: int) -> np.ndarray:
    """Return a clip [F, 1, 1, 3] whose frames are their own numbers, plus 100."""
    return np.repeat(np.arange(100, 100 + frames, dtype=np.uint8), 3).reshape(frames, 1, 1, 3)


def grown(one: Course, streams: tuple[int, ...] = (0, 1)) -> dict[str, list[int]]:
    """Make each window of its own number, in all frames; return what the video holds."""
    longer = Longer(one, {stream: numbered(one.clip) for stream in streams}, NAMES)
    for window in range(len(one.starts)):
        made = np.full((one.window, 1, 1, 3), window + 1, np.uint8)
        longer.take(window, dict.fromkeys(NAMES, made))
    return {name: video[:, 0, 0, 0].tolist() for name, video in longer.result().items()}


@pytest.mark.parametrize(
    ("every", "clip", "window", "starts"),
    [
        (4, 3, 9, [0]),
        (4, 5, 9, [0, 8]),
        (4, 6, 9, [0, 8, 12]),  # the last one goes back to end with the video
        (3, 4, 17, [0]),  # 10 frames of 17
        (3, 9, 17, [0, 9]),  # a window holds five steps of three, and a frame that is not used
        (2, 20, 5, [*range(0, 36, 4), 34]),
    ],
)
def test_frames_between_are_made_by_windows_that_share_given_ones(
    every: int, clip: int, window: int, starts: list[int]
) -> None:
    one = course(every=every, clip=clip, total=(clip - 1) * every + 1, window=window)
    assert one.starts == starts
    for name, video in grown(one).items():
        assert video[::every] == list(range(100, 100 + clip)), name
        assert all(0 < frame < 100 for number, frame in enumerate(video) if number % every)
    longer = Longer(one, {0: numbered(clip)}, NAMES)
    for window, start in enumerate(starts):
        first, between = longer.given(window)[0]
        given = [*first[:, 0, 0, 0].tolist(), *between[:, 0, 0, 0].tolist()]
        assert given == list(range(100 + start // every, 100 + start // every + len(given)))
        assert len(given) == min((one.window - 1) // every + 1, clip - start // every)


def test_a_clip_goes_on_by_windows_that_begin_with_the_end_of_the_one_before() -> None:
    one = course(clip=10, total=40, window=17, begin=2, context=5)
    assert one.starts == [5, 17, 29]
    video = grown(one)["rgb"]
    assert video == [*range(100, 110), *[1] * 12, *[2] * 12, *[3] * 6]
    longer = Longer(one, dict.fromkeys((0, 1), numbered(10)), NAMES)
    longer.take(0, dict.fromkeys(NAMES, np.full((17, 1, 1, 3), 1, np.uint8)))
    first, between = longer.given(1)[1]
    assert first[:, 0, 0, 0].tolist() == [1] * 5 and not len(between)


def test_a_stream_that_the_clip_does_not_give_is_made_in_every_frame() -> None:
    one = course(every=4, clip=5, total=17, window=9, streams=(0,))
    video = grown(one, streams=(0,))
    assert video["rgb"][::4] == list(range(100, 105)) and set(video["seg"]) == {1, 2}


def test_a_frame_that_no_window_made_is_found() -> None:
    longer = Longer(course(every=4, clip=5, total=17, window=9), {0: numbered(5)}, NAMES)
    with pytest.raises(AssertionError, match="no window"):
        longer.result()
