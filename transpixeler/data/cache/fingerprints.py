"""Hash the content of files: paths in, digests out. Unchanged files are recognised by size and time in seconds.

The memory is one text file in the cache folder, a line a file; losing it costs reading the data once more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transpixeler.data.file_memory import FileMemory, Stamp
from transpixeler.models.family import file_digest

logger = logging.getLogger("transpixeler")
NAME = "hashes.tsv"
SAVE_SECONDS = 30.0


class FileHashes:
    """Content hashes of files, each read once until it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = 0  # files whose content was read
        self._memory = FileMemory(folder / NAME, read=_read, line=_line)
        self._saved = time.monotonic()

    def digest(self, path: Path) -> str:
        stamp = _stamp(path)
        if (known := self._memory.recall(path, stamp)) is not None:
            return known
        digest = file_digest(path)
        self.read += 1
        self._memory.note(path, stamp, digest)
        return digest

    def _known(self, path: Path) -> str | None:
        return self._memory.recall(path, _stamp(path))

    def digests(self, paths: Sequence[Path], threads: int) -> dict[Path, str]:
        """Hash many files at once; what is known is saved now and then, so that a kill loses little, not at the end."""
        found = {path: self._known(path) for path in paths}
        fresh = [path for path, digest in found.items() if digest is None]
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for path, digest in zip(fresh, pool.map(self.digest, fresh)):
                found[path] = digest
                if time.monotonic() - self._saved > SAVE_SECONDS:
                    self.save()
        return {path: digest for path, digest in found.items() if digest is not None}

    def save(self) -> None:
        self._saved = time.monotonic()
        if not self._memory.save():
            logger.info("%s cannot be written: files are hashed again the next time", self.folder)


def _stamp(path: Path) -> Stamp:
    found = os.stat(path)  # noqa: PTH116  pathlib takes several times as long
    return found.st_size, found.st_mtime_ns


def _line(name: str, stamp: Stamp, digest: str) -> str:
    return f"{digest}\t{stamp[0]}\t{stamp[1]}\t{name}"


def _read(line: bytes) -> tuple[bytes, Stamp, str]:
    digest, size, modified, name = line.split(b"\t", 3)
    return name, (int(size), int(modified)), digest.decode()
