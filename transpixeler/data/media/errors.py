"""Refuse media files: `BadMedia`, the limits on size, and a guard that turns errors of parsers into reasons."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

MAX_SIDE = 16384
MAX_PIXELS = 1 << 26
MAX_ASPECT = 32
PARSER_ERRORS = (
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


def check_size(width: int, height: int) -> None:
    """Refuse absurd sizes before memory for them is allocated."""
    if min(width, height) < 1:
        raise BadMedia("has no picture size")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadMedia(f"is {width}×{height}, more than {MAX_SIDE} a side or {MAX_PIXELS >> 20} Mpixel")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadMedia(f"is {width}×{height}, a shape beyond {MAX_ASPECT}:1")


@contextmanager
def as_bad_media() -> Iterator[None]:
    """Turn whatever a parser raises about foreign bytes into BadMedia; our own mistakes (TypeError…) pass through."""
    from av.error import FFmpegError
    from PIL import Image

    try:
        yield
    except (FFmpegError, Image.DecompressionBombError, *PARSER_ERRORS) as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise BadMedia(f"cannot be read: {text[:160]}") from error
