"""Decode media: a file and a clip in; exactly the clip's frames, scaled and cropped, as uint8 arrays out.

Frame numbers are computed once a sample, from the times of its first stream, and every stream is read at those
numbers with the same scale and crop: that is why the streams of a pair cannot slip against each other.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from transpixeler.data.media import container, stills
from transpixeler.data.media.clip import Clip, Media
from transpixeler.data.media.container import Orientation
from transpixeler.data.media.errors import BadMedia, as_bad_media
from transpixeler.data.media.files import IMAGE_ENDINGS, ending_of, files_of, is_pattern, spans_files
from transpixeler.data.media.fill import Fill, fill_clip, looks_premultiplied, scaled_straight
from transpixeler.data.media.light import SHOWN, Light

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

FRAMES_JUDGED = 12  # of a file, to tell whether its colour is premultiplied
PLANAR = {3: "gbrp", 4: "gbrap"}  # swscale writes planes in half the time of packed pixels
PACKED = {3: "rgb24", 4: "rgba"}
# FFmpeg's numbers for bicubic, accurate rounding, full chroma interpolation and input; PyAV 17.0 names the first alone
BICUBIC = 0x4 | 0x40000 | 0x2000 | 0x4000


class Scaler(Protocol):
    """Scale one uint8 [H,W,4] frame."""

    def __call__(self, rgba: np.ndarray, *, height: int, width: int) -> np.ndarray: ...


def probe(path: Path) -> Media:
    """Return what the file shows; raise BadMedia with the reason if it cannot be used."""
    with as_bad_media():
        if is_pattern(path):
            return stills.probe(path)
        if not path.exists():
            raise BadMedia("is missing")
        if not path.is_dir() and not path.is_file():
            raise BadMedia("is neither a file nor a folder")
        if path.is_file() and not path.stat().st_size:
            raise BadMedia("is empty")
        return stills.probe(path) if _still(path) else container.probe(path)


def frame_numbers(path: Path, clip: Clip, *, rate: Fraction = Fraction(0)) -> tuple[int, ...]:
    """Return the source frames that a clip shows, ascending; a source of a lower rate repeats some.

    rate: of an image sequence; 0 takes it image by image.
    """
    return stills.numbers(path, clip, rate=rate) if _still(path) else container.numbers(path, clip)


def read_frames(
    path: Path, numbers: Sequence[int], *, height: int, width: int, threads: int = 0, light: Light = SHOWN
) -> np.ndarray:
    """Return uint8 [F,H,W,3]: the frames of these numbers, scaled to cover the size and cropped to its centre.

    light: how linear light becomes pictures.
    """
    shape = (len(numbers), height, width, 3)
    fitted = _fitted(path, numbers, height=height, width=width, channels=3, threads=threads, light=light)
    return _collect(fitted, numbers, shape)


def read_rgba(
    path: Path, numbers: Sequence[int], *, height: int, width: int, fill: Fill, threads: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return RGB, filled by the policy, and alpha as grey, both uint8 [F,H,W,3], from one decoding pass."""
    shape = (len(numbers), height, width, 4)
    multiplied = is_premultiplied(path, fill.alpha)
    straight = None if fill.policy == "keep" and not multiplied else partial(scaled_straight, premultiplied=multiplied)
    fitted = _fitted(
        path, numbers, height=height, width=width, channels=4, threads=threads, straight=straight, light=fill.light
    )
    rgba = _collect(fitted, numbers, shape)
    fill_clip(rgba, fill)
    return np.ascontiguousarray(rgba[..., :3]), np.repeat(rgba[..., 3:], 3, axis=3)


def is_premultiplied(path: Path, told: str = "auto") -> bool:
    """Tell whether the frames that are read hold colour times alpha: as told, or judged by them, once a file.

    Those of OpenEXR never do: there it is undone in linear light, as they are read.
    """
    if told != "auto" or ending_of(path) == ".exr":
        return told == "premultiplied" and ending_of(path) != ".exr"
    stat = files_of(path)[0].stat()
    return _looks_premultiplied(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=4096)
def _looks_premultiplied(path: Path, _: tuple[int, int]) -> bool:
    media = probe(path)
    numbers = range(0, media.frames, -(-media.frames // FRAMES_JUDGED))
    return media.alpha and looks_premultiplied(stream_rgba(path, numbers, media, threads=1))


def stream_rgba(
    path: Path, numbers: Sequence[int], media: Media, *, threads: int = 0, light: Light = SHOWN
) -> Iterator[np.ndarray]:
    """Yield uint8 [H,W,4] for each of `numbers` at the file's own size, one at a time: clips may exceed memory."""
    height, width = media.height, media.width
    fitted = _fitted(path, numbers, height=height, width=width, channels=4, threads=threads, light=light)
    with as_bad_media():
        yield from _repeated(fitted, numbers)


def _still(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_ENDINGS or spans_files(path)


def _collect(fitted: Iterator[np.ndarray], numbers: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    with as_bad_media():
        for k, frame in enumerate(_repeated(fitted, numbers)):
            out[k] = frame
    return out


def _repeated(frames: Iterator[np.ndarray], numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield a frame for each number, the same one again where a number repeats."""
    for _, same in itertools.groupby(numbers):
        frame = next(frames)
        for _ in same:
            yield frame
    next(frames, None)  # it ends by itself: closed at its last frame, Python 3.10 keeps that in a reference cycle


def _fitted(
    path: Path,
    numbers: Sequence[int],
    *,
    height: int,
    width: int,
    channels: int,
    threads: int,
    light: Light,
    straight: Scaler | None = None,
) -> Iterator[np.ndarray]:
    """Scale each frame in one pass, then crop in output pixels: the sampling phase is the same for all formats."""
    from av.video.reformatter import VideoReformatter

    wanted = sorted(set(numbers))
    scaler, layout = VideoReformatter(), PLANAR[channels]
    if _still(path):
        frames = _image_frames(path, wanted, alpha=channels == 4, light=light)
    else:
        frames = container.frames(path, wanted, alpha=channels == 4, threads=threads)
    for frame, shown in frames:
        scale = max(height / shown.height, width / shown.width)
        tall, wide = max(height, round(shown.height * scale)), max(width, round(shown.width * scale))
        rows, columns = (wide, tall) if shown.turns % 2 else (tall, wide)
        if straight is not None:
            array = straight(frame.to_ndarray(format=layout), height=rows, width=columns)
        else:
            array = _scaled(frame, scaler, layout, height=rows, width=columns)
        top, left = (tall - height) // 2, (wide - width) // 2
        yield np.rot90(array, shown.turns)[top : top + height, left : left + width]


def _image_frames(
    path: Path, wanted: Sequence[int], *, alpha: bool, light: Light
) -> Iterator[tuple[VideoFrame, Orientation]]:
    from av import VideoFrame

    for array in stills.frames(path, wanted, alpha=alpha, light=light):
        height, width, channels = array.shape
        yield VideoFrame.from_ndarray(array, PACKED[channels]), Orientation(width, height)


def _scaled(frame: VideoFrame, scaler: VideoReformatter, layout: str, *, height: int, width: int) -> np.ndarray:
    size = {"width": width, "height": height}
    return scaler.reformat(frame, **size, format=layout, interpolation=BICUBIC, threads=1).to_ndarray()
