"""Remember facts about files in a text file, a line each: a path in; its fact out, unless the file has changed since.

The text file may be lost, torn or edited: then the facts are found again, never taken wrongly.
"""

from __future__ import annotations

import os
import time
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from transpixeler.files import whole

Fact = TypeVar("Fact")
Stamp = tuple[int, int]  # size, time of change
USUAL_LINE = 512  # bytes that are read for a line, and more where it goes on
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

    def recall(self, path: Path, stamp: Stamp) -> Fact | None:
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
        return True

    def _others(self, fresh: Container[str]) -> Iterator[bytes]:
        """Yield the lines of facts that the file holds now, but for those of fresh ones."""
        for line in _raw_lines(self.path, self._header):
            found = self._parsed(line)
            if found is not None and _text(found[0]) not in fresh:
                yield line

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

    def _name(self, path: Path) -> str:
        parent, _, name = str(path).rpartition("/")  # as `path.parent` is slow, and there are millions
        if parent not in self._folders:
            self._folders[parent] = os.path.relpath(path.parent, self.path.parent)
        return f"{self._folders[parent]}/{name}"


class _Lines:
    """Find lines of a text file by the name at their ends, with 8 bytes of memory a line (12 beyond 4 GiB)."""

    def __init__(self, path: Path, header: str) -> None:
        self._hashes, self._firsts = array("I"), array("Q")
        try:
            self._file = path.open("rb", buffering=0)
        except OSError:  # lost, or someone else's: an empty memory
            return
        weakref.finalize(self, self._file.close)
        lines = _raw_lines(path, header)
        both: np.ndarray = np.fromiter(((_hash(_tail(line)), len(line)) for line in lines), np.dtype((np.uint32, 2)))
        first = len(header.encode()) + 1 if header else 0
        firsts = first + np.cumsum(both[:, 1], dtype=np.int64) - both[:, 1]
        kind = np.uint32 if not len(firsts) or firsts[-1] < 1 << 32 else np.uint64
        order = np.argsort(both[:, 0], kind="stable")
        self._hashes.frombytes(both[order, 0].tobytes())  # an array is several times as fast to look through as numpy's
        self._firsts = array("I" if kind is np.uint32 else "Q")
        self._firsts.frombytes(firsts.astype(kind)[order].tobytes())

    def find(self, name: bytes) -> Iterator[bytes]:
        """Yield the lines that may be a name's, the last of the file first."""
        wanted = _hash(_tail(name + b"\n"))
        place = bisect_right(self._hashes, wanted) - 1
        while place >= 0 and self._hashes[place] == wanted:
            yield self._line(self._firsts[place])
            place -= 1

    def _line(self, first: int) -> bytes:
        size = USUAL_LINE
        while b"\n" not in (line := os.pread(self._file.fileno(), size, first)) and len(line) == size:
            size *= 4
        return line[: line.find(b"\n") + 1]


def _hash(tail: bytes) -> int:
    return hash(tail) & 0xFFFFFFFF


def _tail(line: bytes) -> bytes:
    """Return what comes after the last tab; a name may hold tabs."""
    return line[line.rfind(b"\t") + 1 :]


def _raw_lines(path: Path, header: str) -> Iterator[bytes]:
    """Yield the whole lines of a memory as they are; one that cannot be read, or has another header, is empty."""
    try:
        with path.open("rb") as file:
            if header and file.readline() != header.encode() + b"\n":
                return
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError:
        return


def _lines(texts: Iterable[str]) -> Iterator[bytes]:
    return (_bytes(f"{text}\n") for text in texts)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")
