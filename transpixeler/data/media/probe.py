"""Probe media files, remembered by path, size and time: a path in, its `Media` out, 10,000 known files in a second.

The memory is one text file in the cache folder, a line a file; losing it costs opening the files once more. Files that
cannot be used are not remembered. A line begins with a check of its rest, so that a torn or edited line is no fact.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR

from transpixeler.data.file_memory import FileMemory, Stamp
from transpixeler.data.media.clip import Media
from transpixeler.data.media.decode import probe
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.progress import Pulse
from transpixeler.data.ranks import ALONE, Helpers

logger = logging.getLogger("transpixeler")
NAME = "probes.tsv"
CHECK = 8  # letters that a line begins with
VERSION = 4  # raised when probing gives other values or the lines change; an older memory is made anew


class Probes:
    """`probe` with a memory; called from many threads."""

    def __init__(self, folder: Path, helpers: Helpers = ALONE) -> None:
        self.folder, self._helpers = folder, helpers
        self.opened = 0  # files that had to be opened
        self._pulse = Pulse("opening")
        self._faults: dict[Path, BadMedia] = {}  # of files that other ranks have opened last
        self._memory = FileMemory(folder / NAME, read=_read, line=_line, header=str(VERSION))

    def __call__(self, path: Path) -> Media:
        if path in self._faults:
            raise BadMedia(str(self._faults[path]))
        stamp = stamp_of(path)
        if stamp is None:
            return probe(path)
        if (known := self._memory.recall(path, stamp)) is not None:
            return known
        media = probe(path)
        self.remember(path, stamp, media)
        return media

    def remember(self, path: Path, stamp: Stamp, media: Media) -> None:
        """Remember a file that was opened. stamp: from before it was."""
        self.opened += 1
        self._pulse.step()
        self._memory.note(path, stamp, media)

    def look_ahead(self, paths: Iterable[Path], threads: int) -> None:
        """Open files that are not known, on all ranks, where there are others."""
        if self._helpers.count == 1:
            return
        stamps = {path: stamp for path in dict.fromkeys(paths) if (stamp := stamp_of(path)) is not None}
        unknown = [path for path, stamp in stamps.items() if self._memory.recall(path, stamp) is None]
        self._faults.clear()
        for path, found in zip(unknown, self._helpers.map(_opened, unknown, threads), strict=True):
            if isinstance(found, BadMedia):
                self._faults[path] = found
            elif isinstance(found, Exception):
                raise found
            else:
                self.remember(path, stamps[path], found)

    def known(self, path: str) -> Media | None:
        """Return what is remembered of a file, without opening it."""
        stamp = stamp_of(path)
        return None if stamp is None else self._memory.recall(path, stamp)

    def save(self, *, now: bool = True) -> None:
        """Write what is new. now: else only where that was long ago."""
        if not (self._memory.save() if now else self._memory.save_now_and_then()):
            logger.info("%s cannot be written: files are looked at again the next time", self.folder)


def _opened(path: Path) -> Media:
    return probe(path)


def stamp_of(path: Path | str) -> Stamp | None:
    """Return None for what cannot be remembered: a folder's time says nothing of the images in it."""
    try:
        found = os.stat(path)  # noqa: PTH116  pathlib takes several times as long
    except (OSError, ValueError):  # probing says why, in words for the user
        return None
    return None if S_ISDIR(found.st_mode) else (found.st_size, found.st_mtime_ns)


def _line(name: str, stamp: Stamp, media: Media) -> str:
    values = (*stamp, media.frames, media.height, media.width, media.fps, media.duration, int(media.alpha))
    rest = "\t".join(map(str, (*values, name)))
    return f"{_check(rest.encode('utf-8', 'surrogateescape'))}\t{rest}"


def _read(line: bytes) -> tuple[bytes, Stamp, Media]:
    check, rest = line[:CHECK], line[CHECK + 1 :]
    if int(check, 16) != zlib.crc32(rest) or line[CHECK : CHECK + 1] != b"\t":
        raise ValueError("torn or edited")
    size, modified, *media, name = rest.split(b"\t", 8)
    return name, (int(size), int(modified)), _media(*media)


def _check(rest: bytes) -> str:
    return f"{zlib.crc32(rest):08x}"


@lru_cache(maxsize=4096)  # files of a set are alike, and reading fractions takes longest
def _media(frames: bytes, height: bytes, width: bytes, fps: bytes, duration: bytes, alpha: bytes) -> Media:
    rates = Fraction(fps.decode()), Fraction(duration.decode())
    return Media(int(frames), int(height), int(width), *rates, alpha == b"1")
