"""Hash the content of files: paths in, digests out. Unchanged files are recognised by size and time in seconds.

The memory is one text file in the cache folder, a line a file; losing it costs reading the data once more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from transpixeler.data.file_memory import FileMemory, Stamp
from transpixeler.data.progress import Pulse
from transpixeler.data.ranks import ALONE, Helpers
from transpixeler.models.family import file_digest

logger = logging.getLogger("transpixeler")
NAME = "hashes.tsv"
AT_ONCE = 256  # files that a rank hashes before what is known may be saved


class FileHashes:
    """Content hashes of files, each read once until it changes."""

    def __init__(self, folder: Path, helpers: Helpers = ALONE) -> None:
        self.folder, self._helpers = folder, helpers
        self.read = 0  # files whose content was read
        self._pulse = Pulse("hashing")
        self._memory = FileMemory(folder / NAME, read=_read, line=_line)

    def digest(self, path: Path) -> str:
        stamp = _stamp(path)
        if (known := self._memory.recall(path, stamp)) is not None:
            return known
        return self._note(path, stamp, file_digest(path))

    def _note(self, path: Path, stamp: Stamp, digest: str) -> str:
        self.read += 1
        self._pulse.step()
        self._memory.note(path, stamp, digest)
        return digest

    def digests(self, paths: Sequence[Path], threads: int) -> dict[Path, str]:
        """Hash many files at once, on all ranks; what is known is saved now and then, so that a kill loses little."""
        stamps = {path: _stamp(path) for path in paths}  # of this rank: others may see other times
        found = {path: self._memory.recall(path, stamp) for path, stamp in stamps.items()}
        fresh, some = [path for path, digest in found.items() if digest is None], AT_ONCE * self._helpers.count
        for start in range(0, len(fresh), some):
            part = fresh[start : start + some]
            for path, hashed in zip(part, self._helpers.map(_hashed, part, threads), strict=True):
                if isinstance(hashed, Exception):
                    raise hashed
                found[path] = self._note(path, stamps[path], hashed)
            self._tell(self._memory.save_now_and_then())
        return {path: digest for path, digest in found.items() if digest is not None}

    def save(self) -> None:
        self._tell(self._memory.save())

    def _tell(self, saved: bool) -> None:
        if not saved:
            logger.info("%s cannot be written: files are hashed again the next time", self.folder)


def _hashed(path: Path) -> str:
    return file_digest(path)


def _stamp(path: Path) -> Stamp:
    found = os.stat(path)  # noqa: PTH116  pathlib takes several times as long
    return found.st_size, found.st_mtime_ns


def _line(name: str, stamp: Stamp, digest: str) -> str:
    return f"{digest}\t{stamp[0]}\t{stamp[1]}\t{name}"


def _read(line: bytes) -> tuple[bytes, Stamp, str]:
    digest, size, modified, name = line.split(b"\t", 3)
    return name, (int(size), int(modified)), digest.decode()
