"""What each media file is, remembered by path, size and time, so that a data set is looked at anew in a second.

In: a path. Out: its `Media`, from the memory where the file has not changed since. The memory is one text file in the
cache folder, a line a file; losing it costs opening the files once more. Files that cannot be used are not remembered.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from stat import S_ISDIR

from transpixeler.data.fingerprint import SETTLED_SECONDS, memory_lines, write_memory
from transpixeler.data.media.clip import Media
from transpixeler.data.media.decode import probe

logger = logging.getLogger("transpixeler")
NAME = "probes.tsv"
VERSION = 3  # raised when probing gives other values
Stamp = tuple[int, int]  # size, time of change


class Probes:
    """`probe` with a memory; called from many threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened = 0  # files that had to be opened
        self._known = _load(folder / NAME)
        self._places: dict[str, str] = {}
        self._fresh: dict[str, tuple[Stamp, Media]] = {}

    def __call__(self, path: Path) -> Media:
        found = _stamp(path)
        if found is None or "\n" in str(path):
            return probe(path)
        name = os.path.join(self._place(str(path.parent)), path.name)  # noqa: PTH118 thousands of them
        stamp, media = self._known.get(name, (None, None))
        if media is not None and stamp == found:
            return media
        media = probe(path)
        self.opened += 1
        if time.time_ns() - found[1] > SETTLED_SECONDS * 1e9:
            self._fresh[name] = (found, media)
        return media

    def _place(self, parent: str) -> str:
        """A folder as seen from the memory's, so that both may move together."""
        if parent not in self._places:
            self._places[parent] = os.path.relpath(parent, self.folder)
        return self._places[parent]

    def save(self) -> None:
        """Beside what another run may have saved meanwhile."""
        if not self._fresh:
            return
        known = _load(self.folder / NAME) | self._known | self._fresh
        lines = [f"{VERSION}\n", *(_line(name, stamp, media) for name, (stamp, media) in known.items())]
        if not write_memory(self.folder / NAME, "".join(lines)):
            logger.info("%s cannot be written: files are looked at again the next time", self.folder)
        self._known, self._fresh = known, {}


def _stamp(path: Path) -> Stamp | None:
    """Nothing for what cannot be remembered: a folder's time says nothing of the images in it."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # probing says why, in words for the user
        return None
    return None if S_ISDIR(found.st_mode) else (found.st_size, found.st_mtime_ns)


def _line(name: str, stamp: Stamp, media: Media) -> str:
    values = (*stamp, media.frames, media.height, media.width, media.fps, media.duration, int(media.alpha))
    return "\t".join(map(str, (*values, name))) + "\n"


def _load(path: Path) -> dict[str, tuple[Stamp, Media]]:
    lines = memory_lines(path)
    known = {}
    for line in lines[1:] if lines[:1] == [str(VERSION)] else ():
        with suppress(ValueError, ZeroDivisionError):  # a line that was cut or garbled
            size, modified, frames, height, width, fps, duration, alpha, name = line.split("\t", 8)
            media = Media(int(frames), int(height), int(width), Fraction(fps), Fraction(duration), alpha == "1")
            known[name] = ((int(size), int(modified)), media)
    return known
