"""What a media file is and which part of it a clip takes: plain values, and the limits that guard every reader."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

VIDEO_ENDINGS = frozenset(
    [".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"]
)
IMAGE_ENDINGS = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
MAX_SIDE = 16384
MAX_PIXELS = 1 << 26
MAX_ASPECT = 32
SLACK = Fraction(1, 1000)  # Matroska rounds timestamps to milliseconds: a frame counts as shown 1 ms early
FAULTS = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    struct.error,
    zlib.error,
)


class BadMedia(Exception):
    """A file that cannot be used; the message is the reason, in words for the user."""


@dataclass(frozen=True, slots=True)
class Media:
    """What a file shows, as seen: after rotation and with square pixels."""

    frames: int
    height: int
    width: int
    fps: Fraction  # 0: has no rate of its own (a folder of images), so it is taken at the rate that is asked for
    duration: Fraction  # seconds, 0 where there is no rate
    alpha: bool

    @property
    def image(self) -> bool:
        return self.frames == 1

    def frames_at(self, fps: Fraction) -> int:
        """How many frames a resampling to `fps` yields."""
        if self.image or not self.fps:
            return self.frames
        return max(1, math.ceil((self.duration - SLACK) * fps))


@dataclass(frozen=True, slots=True)
class Clip:
    """What to cut, the same for all streams of a sample: so many frames at a rate from a moment on, at one size."""

    sample_id: str
    start: Fraction  # seconds after the first frame
    frames: int
    fps: Fraction
    height: int
    width: int

    @property
    def id(self) -> str:
        return f"{self.sample_id}@{round(self.start * self.fps)}+{self.frames}:{self.width}x{self.height}"


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a sample's path stands for: itself, or the images of a sequence folder in natural order."""
    if not path.is_dir():
        return (path,)
    found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    return tuple(sorted(found, key=natural))


def natural(path: Path) -> tuple[tuple[int, int | str], ...]:
    """Sorts frame_10 after frame_9."""
    parts = re.split(r"([0-9]+)", path.name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts)


def numbers_of(files: Sequence[Path]) -> tuple[int, ...] | None:
    """The frame numbers in the names of a sequence's files; None where the names do not count frames."""
    parts = [re.split(r"([0-9]+)", file.stem) for file in files]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return None
    counters = [values for values in zip(*(map(int, part[1::2]) for part in parts)) if len(set(values)) > 1]
    return counters[0] if len(counters) == 1 else None


def check_size(width: int, height: int) -> None:
    """Refuses what no training clip has before anything of that size is allocated."""
    if min(width, height) < 1:
        raise BadMedia("has no picture size")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadMedia(f"is {width}×{height}, more than {MAX_SIDE} a side or {MAX_PIXELS >> 20} Mpixel")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadMedia(f"is {width}×{height}, a shape beyond {MAX_ASPECT}:1")


@contextmanager
def reasons() -> Iterator[None]:
    """Whatever a parser of foreign bytes throws becomes a reason; a mistake of our own (TypeError…) passes through."""
    import av
    from PIL import Image

    try:
        yield
    except (av.FFmpegError, Image.DecompressionBombError, *FAULTS) as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise BadMedia(f"cannot be read: {text[:160]}") from error
