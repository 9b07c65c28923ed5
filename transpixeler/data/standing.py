"""Tell whether the files of sources stand as they stood: sources and samples in; a digest of all their stamps out.

Of folders all files count, of manifests their shards and the files that rows name. Files are asked for, not opened.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR

import numpy as np

from transpixeler.config.sections import SourceConfig
from transpixeler.data.columns import Texts, decoded, encoded
from transpixeler.data.file_memory import SETTLED_SECONDS
from transpixeler.data.sources.folder import holds_cache
from transpixeler.data.sources.pairs import reads_manifest
from transpixeler.data.sources.plain import AT_ONCE, slow_to_ask
from transpixeler.data.sources.samples import FEATURES, Samples

WINDOW = 4096  # files that are asked for together
THREADS = 32  # that ask at the same time, where asking is slow
Name = str | bytes


class Standing:
    """Gather stamps. since: when looking through the sources began, in nanoseconds; nothing may be newer."""

    def __init__(self, since: int = 0) -> None:
        self._digest, self._newest = hashlib.blake2b(digest_size=16), 0
        self._since, self._listed = since, set[str]()

    def add(self, sources: Sequence[SourceConfig], samples: Samples, others: Texts) -> Standing:
        """Ask for all files. others: those that are in no sample."""
        for source in sources:
            self._add_all(_below(source.path))
        own = np.array([reads_manifest(source) for source in sources], bool)
        self._add_all(named(samples, np.flatnonzero(own[samples.sources]) if len(samples) else np.zeros(0, int)))
        self._add_all(others)
        return self

    def _add_all(self, names: Iterable[Name]) -> None:
        left = iter(names)
        with ThreadPoolExecutor(THREADS) as pool:
            while window := list(itertools.islice(left, WINDOW)):
                pieces = [window[start : start + AT_ONCE] for start in range(0, len(window), AT_ONCE)]
                for found in (pool.map if slow_to_ask(window) else map)(_stamps, pieces):
                    for name, stamp, changed in found:
                        self._newest = max(self._newest, changed)
                        self._digest.update(_bytes(name) + stamp)
                        if stamp in (FOLDER, NOTHING):
                            self._add_images(name, stamp)

    def _add_images(self, name: Name, stamp: bytes) -> None:
        """Add the files of a folder, or of that in which a pattern's images lie."""
        path = decoded(_bytes(name))
        folder = path if stamp == FOLDER else os.path.dirname(path)  # noqa: PTH120  as pathlib is slow
        if folder not in self._listed and (stamp == FOLDER or "#" in path):
            self._listed.add(folder)
            self._add_all(_files(folder))

    @property
    def told(self) -> str:
        """Return the digest; "" where a file was changed while it was read, or may change again unseen."""
        settled = not self._since or self._newest < self._since - SETTLED_SECONDS * 1e9
        return self._digest.hexdigest() if settled else ""


FOLDER, NOTHING = b"\0folder\n", b"\0-\n"


def _bytes(name: Name) -> bytes:
    return encoded(name) if isinstance(name, str) else name


def _stamps(names: Sequence[Name]) -> list[tuple[Name, bytes, int]]:
    return [(name, *_stamp(name)) for name in names]


def _stamp(name: Name) -> tuple[bytes, int]:
    try:
        found = os.stat(name)  # noqa: PTH116  pathlib takes several times as long
    except (OSError, ValueError):
        return NOTHING, 0
    if S_ISDIR(found.st_mode):
        return FOLDER, 0
    return b"\0%d %d %d\n" % (found.st_size, found.st_mtime_ns, found.st_mode), found.st_mtime_ns


def named(samples: Samples, rows: np.ndarray) -> Iterator[bytes]:
    """Yield the files of some samples, by their numbers."""
    streams, featured = len(samples.streams), samples.flags[rows] & FEATURES > 0
    for record, more in zip(samples.records.take(rows).each(), featured.tolist()):
        _, *paths, rest = record.split(b"\0", streams + 1)
        yield from dict.fromkeys(paths)
        if more and (text := rest.split(b"\0", 2)[1]):
            yield text


def _below(path: str | Path) -> Iterator[str]:
    """Yield a file, or all files of a folder and its folders but for those of caches, in order of their names."""
    if not os.path.isdir(path):  # noqa: PTH112
        yield str(path)
        return
    waiting, seen = [str(path)], set[str]()
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in seen:  # links may go in circles
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                found = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError:
            found = []
        if folder == str(path) or not holds_cache(name for name, _ in found):
            yield from (f"{folder}/{name}" for name, is_folder in found if not is_folder)
            waiting += [f"{folder}/{name}" for name, is_folder in found if is_folder]


def _files(folder: str) -> list[str]:
    try:
        return sorted(f"{folder}/{name}" for name in os.listdir(folder or "."))  # noqa: PTH208  as pathlib is slow
    except OSError:
        return []
