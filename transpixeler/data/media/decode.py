"""A media file and a clip go in, exactly the clip's frames come out as uint8: by number, seeked to, streamed, resized.

The numbers are computed once a sample, from the timestamps of its first stream, and every stream is read at those
numbers with one scale and one crop: that is why the streams of a pair cannot slip against each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transpixeler.data.media import container, stills
from transpixeler.data.media.clip import IMAGE_ENDINGS, BadMedia, Clip, Media, reasons
from transpixeler.data.media.fill import Fill, filled, looks_premultiplied, scaled_straight

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

LOOKED_AT = 12  # frames of a file that say whether its colour is premultiplied
Scaler = Callable[..., np.ndarray]
PLANAR = {3: "gbrp", 4: "gbrap"}  # swscale writes planes in half the time that packed pixels take it

__all__ = [
    "BadMedia",
    "Clip",
    "Media",
    "frame_numbers",
    "is_premultiplied",
    "probe",
    "read_frames",
    "read_rgba",
    "stream_rgba",
]


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
    multiplied = fill.alpha == "premultiplied" or (fill.alpha == "auto" and is_premultiplied(path))
    straight = None if fill.policy == "keep" and not multiplied else partial(scaled_straight, premultiplied=multiplied)
    fitted = _fitted(path, numbers, height=height, width=width, channels=4, threads=threads, straight=straight)
    rgba = _collect((filled(frame, fill) for frame in fitted), numbers, shape)
    return np.ascontiguousarray(rgba[..., :3]), np.repeat(rgba[..., 3:], 3, axis=3)


def is_premultiplied(path: Path) -> bool:
    """What the file's frames show, as no format says it; looked at once a file."""
    stat = path.stat()
    return _looks_premultiplied(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=4096)
def _looks_premultiplied(path: Path, _: tuple[int, int]) -> bool:
    media = probe(path)
    numbers = range(0, media.frames, -(-media.frames // LOOKED_AT))
    return media.alpha and looks_premultiplied(stream_rgba(path, numbers, media, threads=1))


def stream_rgba(path: Path, numbers: Sequence[int], media: Media, *, threads: int = 0) -> Iterator[np.ndarray]:
    """uint8 [H,W,4] for each of `numbers`, as the file holds it, one at a time: for clips larger than memory."""
    size = {"height": media.height, "width": media.width}
    fitted = _fitted(path, numbers, channels=4, threads=threads, **size)
    frame, before = None, None
    with reasons():
        for number in numbers:
            frame = frame if number == before else next(fitted)
            before = number
            yield frame


def _still(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in IMAGE_ENDINGS


def _collect(fitted: Iterator[np.ndarray], numbers: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    with reasons():
        for k, number in enumerate(numbers):
            out[k] = out[k - 1] if k and number == numbers[k - 1] else next(fitted)
    return out


def _fitted(
    path: Path,
    numbers: Sequence[int],
    *,
    height: int,
    width: int,
    channels: int,
    threads: int,
    straight: Scaler | None = None,
) -> Iterator[np.ndarray]:
    """Scales each frame in one pass and crops in the output's pixels, so that the phase is one for all formats."""
    import av
    from av.video.reformatter import VideoReformatter

    wanted = sorted(set(numbers))
    scaler, layout = VideoReformatter(), PLANAR[channels]
    if _still(path):
        arrays = stills.frames(path, wanted)
        kinds = {3: "rgb24", 4: "rgba"}
        pairs = ((av.VideoFrame.from_ndarray(a, kinds[a.shape[2]]), a.shape[1::-1]) for a in arrays)
    else:
        pairs = container.frames(path, wanted, alpha=channels == 4, threads=threads)
    for frame, shown in pairs:
        scale = max(height / shown[1], width / shown[0])
        tall, wide = max(height, round(shown[1] * scale)), max(width, round(shown[0] * scale))
        turns = frame.rotation // 90
        size = {"height": wide, "width": tall} if turns % 2 else {"height": tall, "width": wide}
        if straight is not None:
            array = straight(frame.to_ndarray(format=layout), **size)
        else:
            array = _scaled(frame, scaler, layout, **size)
        top, left = (tall - height) // 2, (wide - width) // 2
        yield np.rot90(array, turns)[top : top + height, left : left + width]


def _scaled(frame: av.VideoFrame, scaler: VideoReformatter, layout: str, *, height: int, width: int) -> np.ndarray:
    from av.video.reformatter import Interpolation as How

    how = How.BICUBIC | How.ACCURATE_RND | How.FULL_CHR_H_INT | How.FULL_CHR_H_INP
    return scaler.reformat(frame, width=width, height=height, format=layout, interpolation=how, threads=1).to_ndarray()
