"""Images, animated images and sequences of images, the counterpart of `container`: through Pillow, `exr` and `dpx`."""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from transpixeler.data.media import dpx, exr
from transpixeler.data.media.clip import SLACK, Clip, Media
from transpixeler.data.media.errors import BadMedia, as_bad_media, check_size
from transpixeler.data.media.files import check_gaps, files_of, spans_files
from transpixeler.data.media.light import Light

if TYPE_CHECKING:
    from PIL import Image

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ANIMATED = ("WEBP", "PNG")  # the pages of a TIFF are not frames
ORIENTATION = 0x0112
LARGE = 1 << 24  # pixels
STRIP = 256  # rows converted at a time
_LARGE_ONE = threading.Lock()
LARGEST_DENOMINATOR = 65535  # of an APNG's delays: fractions in the file, floats from Pillow


def probe(path: Path) -> Media:
    """Read the first image's size and alpha, and for an animation when each frame ends."""
    files = files_of(path)
    if not files:
        raise BadMedia("is a folder without images" if path.is_dir() else "is missing: no image has a name like this")
    check_gaps(files)
    if (read := _film(files[0])) is not None:
        height, width, alpha = read.look(files[0])
        return Media(len(files), height, width, Fraction(0), Fraction(0), alpha)
    with as_bad_media(), _open(files[0]) as image, _turn(image):
        width, height = image.size
        if image.getexif().get(ORIENTATION) in TRANSPOSED:
            width, height = height, width
        alpha = image.has_transparency_data
        image.load()
        if spans_files(path):
            if len(files) > 1 and image.format in ANIMATED and getattr(image, "n_frames", 1) > 1:
                raise BadMedia(f"is a sequence of animations, not of images ({files[0].name}); give each a caption")
            return Media(len(files), height, width, Fraction(0), Fraction(0), alpha)
        ends = _read_ends(image)
    duration = ends[-1] / 1000
    return Media(len(ends), height, width, len(ends) / duration if duration else Fraction(0), duration, alpha)


def numbers(path: Path, clip: Clip, *, rate: Fraction = Fraction(0)) -> tuple[int, ...]:
    """Return the numbers of the frames that a clip shows. rate: of a sequence; 0 takes it image by image."""
    first = round(clip.start * clip.fps)
    if spans_files(path):
        if not rate:
            return tuple(range(first, first + clip.frames))
        last = len(files_of(path)) - 1
        return tuple(min(last, int((clip.start + k / clip.fps + SLACK) * rate)) for k in range(clip.frames))
    if _film(path) is not None:
        return (0,) * clip.frames
    ends = _ends(path)
    if not ends[-1]:  # without delays frames are counted, as in a folder
        return tuple(min(len(ends) - 1, first + k) for k in range(clip.frames))
    moments = ((clip.start + k / clip.fps + SLACK) * 1000 for k in range(clip.frames))
    return tuple(min(len(ends) - 1, bisect.bisect_right(ends, moment)) for moment in moments)


def frames(path: Path, wanted: Sequence[int], *, alpha: bool, light: Light) -> Iterator[np.ndarray]:
    """Yield uint8 [H,W,3] or [H,W,4] for each of `wanted`, which are ascending frame numbers.

    Linear light becomes pictures as `light` says; where alpha is asked for, with straight colour.
    """
    size = None
    for number, array in zip(wanted, _pictures(path, wanted, alpha=alpha, light=light)):
        if array.shape[:2] != (size or array.shape[:2]):
            raise BadMedia(f"changes its size at frame {number}")
        size = array.shape[:2]
        yield array


def _pictures(path: Path, wanted: Sequence[int], *, alpha: bool, light: Light) -> Iterator[np.ndarray]:
    """Open an animation once for all its frames, since each is drawn upon those before it."""
    if spans_files(path) or list(wanted) == [0]:
        files = files_of(path)
        if wanted[-1] >= len(files):
            raise BadMedia(f"has {len(files)} images, so there is no frame {wanted[-1]}")
        yield from (_picture(files[number], alpha=alpha, light=light) for number in wanted)
        return
    with as_bad_media(), _open(path) as image:
        for number in wanted:
            if number:
                image.seek(number)
            yield _pixels(image)


def _picture(path: Path, *, alpha: bool, light: Light) -> np.ndarray:
    """Read one file; Pillow's copy of the pixels goes on return, before the caller makes one of its own."""
    if (read := _film(path)) is not None:
        return read.picture(path, light, alpha=alpha)
    with as_bad_media(), _open(path) as image:
        return _pixels(image)


def _film(path: Path) -> ModuleType | None:
    """Return the module that reads a compositor's file, or None for Pillow's."""
    return {".exr": exr, ".dpx": dpx}.get(path.suffix.lower())


def _open(path: Path) -> Image.Image:
    from PIL import Image

    try:
        image = Image.open(path)
    except TypeError as error:  # Pillow's answer to a TIFF without its dimensions
        raise BadMedia(f"cannot be read: {error}") from error
    check_size(*image.size)
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # some Pillows open a PNG of 16 bits as I
        raise BadMedia("holds floating, signed or 32-bit numbers; save it as 8 or 16 bits")
    return image


def _ends(path: Path) -> tuple[Fraction, ...]:
    """Return when each frame ends, remembered by file: reading it anew for every clip would be quadratic."""
    with as_bad_media():
        stat = path.stat()
    return _ends_of(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _ends_of(path: Path, _: tuple[int, int]) -> tuple[Fraction, ...]:
    with as_bad_media(), _open(path) as image:
        return _read_ends(image)


def _read_ends(image: Image.Image) -> tuple[Fraction, ...]:
    """Return when each frame of an animation ends, in milliseconds; a still has one frame that ends at 0."""
    ends, now = [], Fraction(0)
    for number in range(getattr(image, "n_frames", 1) if image.format in ANIMATED else 1):
        image.seek(number)
        image.load()
        now += Fraction(float(image.info.get("duration", 0))).limit_denominator(LARGEST_DENOMINATOR)
        ends.append(now)
    return tuple(ends)


def _pixels(image: Image.Image) -> np.ndarray:
    """Return uint8 [H,W,3 or 4], upright; converted in strips, as each of Pillow's steps would hold the whole again."""
    from PIL import ImageOps

    with _turn(image):
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        alpha = image.has_transparency_data and not image.mode.startswith("I")
        out = np.empty((image.height, image.width, 4 if alpha else 3), np.uint8)
        for top in range(0, image.height, STRIP):
            bottom = min(top + STRIP, image.height)
            strip = image.crop((0, top, image.width, bottom))
            if image.mode.startswith("I"):  # 16 bits of depth or matte, which Pillow's own conversion would clip
                out[top:bottom] = (np.asarray(strip).astype(np.uint32) >> 8)[:, :, None]
            else:
                out[top:bottom] = np.asarray(strip.convert("RGBA" if alpha else "RGB"))
    return out


@contextmanager
def _turn(image: Image.Image) -> Iterator[None]:
    """Let large images be unpacked one at a time, however many threads look at files."""
    if image.width * image.height <= LARGE:
        yield
    else:
        with _LARGE_ONE:
            yield
