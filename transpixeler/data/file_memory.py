"""Remember facts about files in a text file, a line each: a path in; its fact out, unless the file has changed since.

The text file may be lost, torn or edited: then the facts are found again, never taken wrongly.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from transpixeler.files import whole

Fact = TypeVar("Fact")
Stamp = tuple[int, int]  # size, time of change
USUAL_READ = 1 << 14  # bytes that are read for a line and those after it, and more where it goes on
BLOCK = 1 << 20  # bytes that are looked through at a time
PLACE_BITS = 36  # of where a line begins
HASH, PLACE = (1 << 64 - PLACE_BITS) - 1, (1 << PLACE_BITS) - 1
SAVE_SECONDS, SAVE_SHARE = 30.0, 20.0  # between saves, at least, and in times of what one takes
SETTLED_SECONDS = 2.0  # a file changed later than this may change again within one tick of its clock


class FileMemory(Generic[Fact]):
    """Facts by path and stamp; `read` and `line` turn one into a line without its end and back (ValueError: no fact).

    Called from many threads. Names are relative to the memory's folder, so that data and memory may move together.
    """

    def __init__(
        self,
        path: Path,
        *,
        read: Callable[[bytes], tuple[bytes, Stamp, Fact]],
        line: Callable[[str, Stamp, Fact], str],
        header: str = "",  # the first line, if any; a memory with another one is forgotten
    ) -> None:
        self.path = path
        self._read, self._line, self._header = read, line, header
        self._folders: dict[str, str] = {}
        self._known = _Lines(path, header)
        self._fresh: dict[str, tuple[Stamp, Fact]] = {}
        self._unsaved = False
        self._saved, self._took = time.monotonic(), 0.0

    def recall(self, path: Path | str, stamp: Stamp) -> Fact | None:
        name = self._name(path)
        known = self._fresh.get(name) or self._find(name)
        return known[1] if known is not None and known[0] == stamp else None

    def note(self, path: Path, stamp: Stamp, fact: Fact) -> None:
        """Remember a fact, unless the file may still change unseen."""
        name = self._name(path)
        if time.time_ns() - stamp[1] > SETTLED_SECONDS * 1e9 and "\n" not in name:
            self._fresh[name] = (stamp, fact)
            self._unsaved = True

    def save(self) -> bool:
        """Write what is new beside what another run has saved meanwhile; return False where that is impossible."""
        started = self._saved = time.monotonic()
        if not self._unsaved:
            return True
        fresh, self._unsaved = dict(self._fresh), False
        try:
            with whole(self.path, synced=True) as unfinished, unfinished.open("wb") as out:
                out.writelines(_lines([self._header] if self._header else []))
                out.writelines(self._others(fresh))
                out.writelines(_lines(self._line(name, *known) for name, known in fresh.items()))
        except OSError:
            return False
        self._known = _Lines(self.path, self._header)
        for name in fresh:
            self._fresh.pop(name)
        self._saved = time.monotonic()
        self._took = self._saved - started
        return True

    def save_now_and_then(self) -> bool:
        """Save where that was long ago, so that a kill loses little; the more so, the longer it takes."""
        due = max(SAVE_SECONDS, SAVE_SHARE * self._took)
        return time.monotonic() - self._saved < due or self.save()

    def _others(self, fresh: Container[str]) -> Iterator[bytes]:
        """Yield the lines of facts that the file holds now, but for those of fresh ones."""
        for line in itertools.chain.from_iterable(_blocks(self.path, self._header)):
            found = self._parsed(line + b"\n")
            if found is not None and _text(found[0]) not in fresh:
                yield line + b"\n"

    def _find(self, name: str) -> tuple[Stamp, Fact] | None:
        wanted = _bytes(name)
        for line in self._known.find(wanted):
            found = self._parsed(line)
            if found is not None and found[0] == wanted:
                return found[1], found[2]
        return None

    def _parsed(self, line: bytes) -> tuple[bytes, Stamp, Fact] | None:
        try:
            return self._read(line[:-1])
        except (ValueError, ZeroDivisionError):  # torn or garbled
            return None

    def _name(self, path: Path | str) -> str:
        parent, slash, name = str(path).rpartition("/")  # as pathlib is slow, and there are millions
        if parent not in self._folders:
            self._folders[parent] = os.path.relpath(parent or slash or ".", self.path.parent)
        return f"{self._folders[parent]}/{name}"


class _Lines:
    """Find lines of a text file by the name at their ends, with 8 bytes of memory a line."""

    def __init__(self, path: Path, header: str) -> None:
        self._places = array("Q")  # hash of a name and where its line begins, in order
        self._held = 0, b"", 0  # a piece of the file, where it begins, and where in it a line follows the last found
        try:
            self._file = path.open("rb", buffering=0)
        except OSError:  # lost, or someone else's: an empty memory
            return
        weakref.finalize(self, self._file.close)
        first = len(header.encode()) + 1 if header else 0
        for lines in _blocks(path, header):
            hashes = np.array([hash(line[line.rfind(b"\t") + 1 :]) & HASH for line in lines], np.uint64)
            ends = first + np.cumsum([len(line) + 1 for line in lines], dtype=np.uint64)
            begins = np.append(np.uint64(first), ends)[:-1].astype(np.uint64)
            self._places.frombytes((hashes << np.uint64(PLACE_BITS) | begins).tobytes())
            first = int(ends[-1]) if lines else first
        np.frombuffer(self._places, np.uint64).sort()

    def find(self, name: bytes) -> Iterator[bytes]:
        """Yield the lines that may be a name's: the one that follows the last found, and the last of the file first."""
        start, held, at = self._held
        if (end := held.find(b"\n", at) + 1) and held.endswith(name, at, end - 1):
            self._held = start, held, end
            yield held[at:end]
        wanted = hash(name[name.rfind(b"\t") + 1 :]) & HASH
        place = bisect_left(self._places, wanted + 1 << PLACE_BITS) - 1
        while place >= 0 and (found := self._places[place]) >> PLACE_BITS == wanted:
            yield self._line(found & PLACE)
            place -= 1

    def _line(self, first: int) -> bytes:
        """Return the line that begins somewhere; those of files that are looked for one after another lie together."""
        start, held, _ = self._held
        if start <= first < start + len(held) and (end := held.find(b"\n", first - start) + 1):
            self._held = start, held, end
            return held[first - start : end]
        size = USUAL_READ
        while b"\n" not in (held := os.pread(self._file.fileno(), size, first)) and len(held) == size:
            size *= 4
        end = held.find(b"\n") + 1
        self._held = first, held, end
        return held[:end]


def _blocks(path: Path, header: str) -> Iterator[list[bytes]]:
    """Yield the whole lines of a memory, many at a time and without their ends; none, where it cannot be read."""
    try:
        with path.open("rb") as file:
            if header and file.readline() != header.encode() + b"\n":
                return
            rest = b""
            while block := file.read(BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                yield lines
    except OSError:
        return


def _lines(texts: Iterable[str]) -> Iterator[bytes]:
    return (_bytes(f"{text}\n") for text in texts)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")
