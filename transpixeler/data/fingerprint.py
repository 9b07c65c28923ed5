"""What a file holds, in one hash: remembered by path, size and time, so that unchanged data is checked in seconds.

The memory is one text file in the cache folder, a line a file; losing it costs reading the data once more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from transpixeler.files import write_text
from transpixeler.models.backbone import file_digest

logger = logging.getLogger("transpixeler")
NAME = "hashes.tsv"
SETTLED_SECONDS = 2.0  # a file changed later than this may change again within one tick of its clock
SAVE_SECONDS = 30.0


class _Known(NamedTuple):
    size: int
    modified: int
    digest: str


class FileHashes:
    """Content hashes of files, each read once until it changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = 0  # files whose content was read
        self._fresh: dict[str, _Known] = {}
        self._known = _load(folder / NAME)
        self._saved = time.monotonic()

    def digest(self, path: Path) -> str:
        name = os.path.relpath(path, self.folder)
        stat = path.stat()
        known = self._known.get(name)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known.digest
        digest = file_digest(path)
        self.read += 1
        if time.time() - stat.st_mtime > SETTLED_SECONDS and "\n" not in name:
            self._fresh[name] = _Known(stat.st_size, stat.st_mtime_ns, digest)
        return digest

    def digests(self, paths: Sequence[Path], threads: int) -> dict[Path, str]:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            found = {}
            for path, digest in zip(paths, pool.map(self.digest, paths)):
                found[path] = digest
                if time.monotonic() - self._saved > SAVE_SECONDS:
                    self.save()
        self.save()
        return found

    def save(self) -> None:
        """Beside what another run may have saved meanwhile."""
        self._saved = time.monotonic()
        if not self._fresh:
            return
        fresh, self._fresh = self._fresh, {}
        self._known = _load(self.folder / NAME) | self._known | fresh
        text = "".join(f"{k.digest}\t{k.size}\t{k.modified}\t{name}\n" for name, k in self._known.items())
        if not write_memory(self.folder / NAME, text):
            logger.info("%s cannot be written: files are hashed again the next time", self.folder)


def _load(path: Path) -> dict[str, _Known]:
    known = {}
    for line in memory_lines(path):
        with suppress(ValueError):  # a line that was cut or garbled
            digest, size, modified, name = line.split("\t", 3)
            known[name] = _Known(int(size), int(modified), digest)
    return known


# --- memories: text files that may be lost ----------------------------------------------------------------------------


def memory_lines(path: Path) -> list[str]:
    """The whole lines; a memory that cannot be read is an empty one."""
    try:
        return path.read_bytes().decode("utf-8", errors="surrogateescape").split("\n")[:-1]
    except OSError:
        return []


def write_memory(path: Path, text: str) -> bool:
    """False where it cannot be written."""
    try:
        write_text(path, text)
    except OSError:  # a folder of others, a full disk
        return False
    return True
