"""Remember facts about files in a text file, a line each: a path in; its fact out, unless the file has changed since.

The text file may be lost, torn or edited: then the facts are found again, never taken wrongly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from transpixeler.files import write_text

Fact = TypeVar("Fact")
Stamp = tuple[int, int]  # size, time of change
SETTLED_SECONDS = 2.0  # a file changed later than this may change again within one tick of its clock


class FileMemory(Generic[Fact]):
    """Facts by path and stamp; `read` and `line` turn one into a line without its end and back (ValueError: no fact).

    Called from many threads. Names are relative to the memory's folder, so that data and memory may move together.
    """

    def __init__(
        self,
        path: Path,
        *,
        read: Callable[[str], tuple[str, Stamp, Fact]],
        line: Callable[[str, Stamp, Fact], str],
        header: str = "",  # the first line, if any; a memory with another one is forgotten
    ) -> None:
        self.path = path
        self._read, self._line, self._header = read, line, header
        self._folders: dict[str, str] = {}
        self._known = self._load()
        self._fresh: dict[str, tuple[Stamp, Fact]] = {}

    def recall(self, path: Path, stamp: Stamp) -> Fact | None:
        known = self._known.get(self._name(path))
        return known[1] if known is not None and known[0] == stamp else None

    def note(self, path: Path, stamp: Stamp, fact: Fact) -> None:
        """Remember a fact, unless the file may still change unseen."""
        name = self._name(path)
        if time.time_ns() - stamp[1] > SETTLED_SECONDS * 1e9 and "\n" not in name:
            self._fresh[name] = (stamp, fact)

    def save(self) -> bool:
        """Write what is new beside what another run has saved meanwhile; return False where that is impossible."""
        if not self._fresh:
            return True
        fresh, self._fresh = self._fresh, {}
        self._known = self._load() | self._known | fresh
        lines = [self._line(name, *known) for name, known in self._known.items()]
        return write_memory(self.path, [self._header, *lines] if self._header else lines)

    def _name(self, path: Path) -> str:
        parent = str(path.parent)
        if parent not in self._folders:
            self._folders[parent] = os.path.relpath(parent, self.path.parent)
        return os.path.join(self._folders[parent], path.name)  # noqa: PTH118  thousands of them

    def _load(self) -> dict[str, tuple[Stamp, Fact]]:
        lines, known = memory_lines(self.path), {}
        if self._header:
            lines = lines[1:] if lines[:1] == [self._header] else []
        for line in lines:
            with suppress(ValueError, ZeroDivisionError):  # torn or garbled
                name, stamp, fact = self._read(line)
                known[name] = (stamp, fact)
        return known


def memory_lines(path: Path) -> list[str]:
    """Return the whole lines of a memory; one that cannot be read is empty."""
    try:
        return path.read_bytes().decode("utf-8", errors="surrogateescape").split("\n")[:-1]
    except OSError:
        return []


def write_memory(path: Path, lines: Iterable[str]) -> bool:
    """Return False where the memory cannot be written: a folder of someone else's, a full disk."""
    try:
        write_text(path, "".join(f"{line}\n" for line in lines))
    except OSError:
        return False
    return True
