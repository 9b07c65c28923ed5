"""Images, animated images and folders of images through Pillow: the same two questions as for video files."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transpixeler.data.media.clip import SLACK, BadMedia, Clip, Media, check_size, files_of, numbers_of, reasons

if TYPE_CHECKING:
    from PIL import Image

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ANIMATED = ("WEBP", "PNG")  # a TIFF's pages are no film
ORIENTATION = 0x0112
LARGEST_DENOMINATOR = 65535  # of an APNG's delays, which are fractions that Pillow gives as floats


def probe(path: Path) -> Media:
    files = files_of(path)
    if not files:
        raise BadMedia("is a folder without images")
    _check_gaps(files)
    with reasons(), _open(files[0]) as image:
        width, height = image.size
        if image.getexif().get(ORIENTATION) in TRANSPOSED:
            width, height = height, width
        alpha = image.has_transparency_data
        image.load()
        if len(files) > 1 or path.is_dir():
            return Media(len(files), height, width, Fraction(0), Fraction(0), alpha)
        ends = _read_ends(image)
    duration = ends[-1] / 1000
    return Media(len(ends), height, width, len(ends) / duration if duration else Fraction(0), duration, alpha)


def numbers(path: Path, clip: Clip) -> tuple[int, ...]:
    first = round(clip.start * clip.fps)
    if path.is_dir():
        return tuple(range(first, first + clip.frames))
    ends = _ends(path)
    if not ends[-1]:  # an animation without delays has no time, as a folder has none
        return tuple(min(len(ends) - 1, first + k) for k in range(clip.frames))
    moments = ((clip.start + k / clip.fps + SLACK) * 1000 for k in range(clip.frames))
    return tuple(min(len(ends) - 1, bisect.bisect_right(ends, moment)) for moment in moments)


def frames(path: Path, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 [H,W,3] or [H,W,4] for each of `wanted`, which are ascending frame numbers."""
    size = None
    for number, array in zip(wanted, _pictures(path, wanted)):
        if array.shape[:2] != (size or array.shape[:2]):
            raise BadMedia(f"changes its size at frame {number}")
        size = array.shape[:2]
        yield array


def _pictures(path: Path, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """An animation is opened once: each of its frames is drawn upon those before it."""
    if path.is_dir():
        files = files_of(path)
        for number in wanted:
            with reasons(), _open(files[number]) as image:
                yield _pixels(image)
        return
    with reasons(), _open(path) as image:
        for number in wanted:
            if number:
                image.seek(number)
            yield _pixels(image)


def _check_gaps(files: Sequence[Path]) -> None:
    """A frame's number is its place among the files, so a file that is missing would shift all that follow."""
    numbers = numbers_of(files) or ()
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    usual = min(steps, default=0)
    even = usual == math.gcd(*steps)  # uneven steps, such as times, tell nothing
    for k, step in enumerate(steps):
        names = files[k].name, files[k + 1].name
        if not step:
            raise BadMedia(f"has frame {numbers[k]} twice: {' and '.join(names)}")
        if even and step > usual:
            missing = numbers[k] + usual
            raise BadMedia(f"lacks frame {missing}: {names[0]} is followed by {names[1]}; add it, or rename the files")


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        image = Image.open(path)
    except TypeError as error:  # what Pillow raises at a TIFF without its dimensions
        raise BadMedia(f"cannot be read: {error}") from error
    check_size(*image.size)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # some Pillows open a PNG of 16 bits as I
        raise BadMedia("holds numbers that are floating, signed or of 32 bits; save it as 8 or 16 bits")
    return image


def _ends(path: Path) -> tuple[Fraction, ...]:
    """Remembered for the clips that one file gives: drawing all its frames for each would be quadratic."""
    with reasons():
        stat = path.stat()
    return _ends_of(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _ends_of(path: Path, _: tuple[int, int]) -> tuple[Fraction, ...]:
    with reasons(), _open(path) as image:
        return _read_ends(image)


def _read_ends(image: Image.Image) -> tuple[Fraction, ...]:
    """When each frame of an animation ends, in milliseconds; a still has one frame and no time."""
    ends, now = [], Fraction(0)
    for number in range(image.n_frames if image.format in ANIMATED else 1):
        image.seek(number)
        image.load()
        now += Fraction(float(image.info.get("duration", 0))).limit_denominator(LARGEST_DENOMINATOR)
        ends.append(now)
    return tuple(ends)


def _pixels(image: Image.Image) -> np.ndarray:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of depth or matte, which Pillow's own conversion would clip
        return np.repeat((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
