"""A media file and a clip go in, exactly the clip's frames come out as uint8: by number, seeked to, streamed, resized.

The numbers are computed once a sample, from the timestamps of its first stream, and every stream is read at those
numbers with one scale and one crop: that is why the streams of a pair cannot slip against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transpixeler.data import container, stills
from transpixeler.data.fill import Fill, filled, premultiplied, unmultiplied
from transpixeler.data.media import IMAGE_ENDINGS, BadMedia, Clip, Media, reasons

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

__all__ = ["BadMedia", "Clip", "Media", "frame_numbers", "probe", "read_frames", "read_rgba"]


def probe(path: Path) -> Media:
    """What the file shows; BadMedia with the reason for anything that cannot be used."""
    with reasons():
        if not path.exists():
            raise BadMedia("is missing")
        if not path.is_dir() and not path.is_file():
            raise BadMedia("is neither a file nor a folder")
        if path.is_file() and not path.stat().st_size:
            raise BadMedia("is empty")
        return stills.probe(path) if _still(path) else container.probe(path)


def frame_numbers(path: Path, clip: Clip) -> tuple[int, ...]:
    """Which source frames a clip shows, ascending; a slow source repeats some."""
    return stills.numbers(path, clip) if _still(path) else container.numbers(path, clip)


def read_frames(path: Path, numbers: Sequence[int], *, height: int, width: int, threads: int = 0) -> np.ndarray:
    """uint8 [F,H,W,3]: the frames of these numbers, scaled to cover the size and cropped to its centre."""
    shape = (len(numbers), height, width, 3)
    return _collect(_fitted(path, numbers, height=height, width=width, channels=3, threads=threads), numbers, shape)


def read_rgba(
    path: Path, numbers: Sequence[int], *, height: int, width: int, fill: Fill, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The RGB under its fill policy and the alpha as grey, both uint8 [F,H,W,3], in one decoding pass."""
    shape = (len(numbers), height, width, 4)
    multiply = fill.policy != "keep"
    fitted = _fitted(path, numbers, height=height, width=width, channels=4, threads=threads, multiply=multiply)
    rgba = _collect((filled(frame, fill) for frame in fitted), numbers, shape)
    return np.ascontiguousarray(rgba[..., :3]), np.repeat(rgba[..., 3:], 3, axis=3)


def _still(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in IMAGE_ENDINGS


def _collect(fitted: Iterator[np.ndarray], numbers: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    with reasons():
        for k, number in enumerate(numbers):
            out[k] = out[k - 1] if k and number == numbers[k - 1] else next(fitted)
    return out


def _fitted(
    path: Path, numbers: Sequence[int], *, height: int, width: int, channels: int, threads: int, multiply: bool = False
) -> Iterator[np.ndarray]:
    import av
    from av.video.reformatter import VideoReformatter

    wanted = sorted(set(numbers))
    scaler, layout = VideoReformatter(), "rgb24" if channels == 3 else "rgba"
    if _still(path):
        arrays = stills.frames(path, wanted)
        pairs = (
            (av.VideoFrame.from_ndarray(a, "rgba" if a.shape[2] == 4 else "rgb24"), a.shape[1::-1]) for a in arrays
        )
    else:
        pairs = container.frames(path, wanted, alpha=channels == 4, threads=threads)
    for frame, shown in pairs:
        turns = frame.rotation // 90
        if multiply:
            yield unmultiplied(_fit(premultiplied(frame), turns, shown, (height, width), "rgba64le", scaler))
        else:
            yield _fit(frame, turns, shown, (height, width), layout, scaler)


def _fit(
    frame: av.VideoFrame,
    turns: int,
    shown: tuple[int, int],
    size: tuple[int, int],
    layout: str,
    scaler: VideoReformatter,
) -> np.ndarray:
    """Scales the whole frame in one pass and crops in the output's pixels, so that the phase is one for all formats."""
    from av.video.reformatter import Interpolation as How

    height, width = size
    scale = max(height / shown[1], width / shown[0])
    tall, wide = max(height, round(shown[1] * scale)), max(width, round(shown[0] * scale))
    scaled = scaler.reformat(
        frame,
        width=tall if turns % 2 else wide,
        height=wide if turns % 2 else tall,
        format=layout,
        interpolation=How.BICUBIC | How.ACCURATE_RND | How.FULL_CHR_H_INT,
        threads=1,
    ).to_ndarray()
    array = np.rot90(scaled, turns)
    top, left = (tall - height) // 2, (wide - width) // 2
    return array[top : top + height, left : left + width]
