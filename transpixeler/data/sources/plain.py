"""Take plain rows of a manifest: each names files and a caption in text, and its files are known from an earlier look.

They are nearly all rows of a large set, so neither paths nor samples are made of them. A row that is not plain, or has
a fault, goes the longer way through `pairs`, which finds out what is wrong.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transpixeler.data.media.clip import Media
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.files import VIDEO_ENDINGS
from transpixeler.data.names import is_utf8, normal, printable
from transpixeler.data.sources.candidate import Candidate
from transpixeler.data.sources.twins import check_claims, check_twin

Known = Callable[[str], Media | None]
ONE_VIDEO = tuple(VIDEO_ENDINGS)  # files of these are no sequences of images
AT_ONCE = 256  # rows that one thread looks at
ASKED = 15  # files of a window that are timed
SLOW_SECONDS = 200e-6  # to ask for a file, as over a network: then threads ask at the same time


class PlainRow(NamedTuple):
    """A row that may be used as it is."""

    id: str
    streams: tuple[str, ...]
    paths: tuple[str, ...]  # one a stream
    caption: str
    claims: dict[str, Fraction]  # about the first file

    @property
    def candidate(self) -> Candidate:
        """Return the same for a longer look."""
        paths = tuple(zip(self.streams, map(Path, self.paths)))
        return Candidate(self.id, paths, self.caption, self.claims)


class PlainReader:
    """Read rows of one manifest. names: the columns of each stream that may hold its path, the first that is set."""

    def __init__(
        self,
        folder: Path,
        name: str,
        streams: tuple[str, ...],
        *,
        names: Sequence[Sequence[str]],
        text: str,
        claims: Callable[[Mapping[str, Any]], dict[str, Fraction] | str],
    ) -> None:
        self.name, self.streams, self.names, self.text, self.claims = name, streams, names, text, claims
        self.above = above(folder)

    def __call__(self, row: Mapping[str, Any]) -> PlainRow | None:
        """Return a row that gives no features, or None where it takes a longer look."""
        caption, claims = row.get(self.text), self.claims(row)
        if not isinstance(caption, str) or not isinstance(claims, dict) or not (caption := caption.strip()):
            return None
        paths = tuple([self._path(row, names) for names in self.names])
        if "" in paths or not is_utf8(caption):
            return None
        if len(paths) < len(self.streams):  # one file with alpha
            paths *= len(self.streams)
        if not (first := stem(paths[0], self.above)):
            return None
        return PlainRow(printable(f"{self.name}/{normal(first)}"), self.streams, paths, caption, claims)

    def _path(self, row: Mapping[str, Any], names: Sequence[str]) -> str:
        """Return a stream's path as `Path` would spell it; "" where that takes a longer look."""
        value = None
        for name in names:  # a generator takes twice as long, and there are millions
            if (value := row.get(name)) is not None:
                break
        if not isinstance(value, str):
            return ""
        path = value.strip()
        if not path.endswith(ONE_VIDEO) or "//" in path or "/./" in path or path.startswith("./") or not is_utf8(path):
            return ""
        return path if path[0] == "/" else self.above + path


def above(folder: Path) -> str:
    """Return what comes before the path of a file in a folder."""
    whole = str(folder)
    return "" if whole == "." else whole.rstrip("/") + "/"


def stem(whole: str, above: str) -> str:
    """Return a path relative to a folder, or without its root, and without its ending; "" where it names no file.

    With texts alone: pathlib takes ten times as long, and there are millions.
    """
    relative = "" if whole == (above[:-1] or ".") else whole.removeprefix(above).lstrip("/")
    dot = relative.rfind(".")
    has_ending = relative.rfind("/") + 1 < dot < len(relative) - 1
    return relative[:dot] if has_ending else relative


def known_media(window: Sequence[object], known: Known | None, pool: Executor, *, rgba: bool) -> list[Media | None]:
    """Return the first file of each plain row without a fault; None for what takes a longer look."""
    if known is None:
        return [None] * len(window)
    look = partial(_looks, known=known, rgba=rgba)
    if not slow_to_ask([row.paths[0] for row in window if isinstance(row, PlainRow)]):
        return look(window)
    pieces = [window[start : start + AT_ONCE] for start in range(0, len(window), AT_ONCE)]
    return [one for some in pool.map(look, pieces) for one in some]


def _looks(rows: Iterable[object], known: Known, *, rgba: bool) -> list[Media | None]:
    return [_look(row, known, rgba=rgba) if isinstance(row, PlainRow) else None for row in rows]


def _look(row: PlainRow, known: Known, *, rgba: bool) -> Media | None:
    media = known(row.paths[0])
    if media is None or not media.fps or (rgba and not media.alpha and len(row.paths) > 1):
        return None
    try:
        check_claims(row.claims, media)
        for path in () if rgba else row.paths[1:]:
            twin = known(path)
            if twin is None or not twin.fps:
                return None
            check_twin(row.streams[0], media, twin)
    except BadMedia:  # the longer look finds it too, and says where
        return None
    return media


def slow_to_ask(paths: Sequence[str | bytes]) -> bool:
    """Tell by a few files of a window whether asking for one takes so long that threads should."""
    times = list(map(_seconds, paths[:ASKED]))
    return bool(times) and statistics.median(times) > SLOW_SECONDS


def _seconds(path: str | bytes) -> float:
    started = time.perf_counter()
    with suppress(OSError, ValueError):  # the look at it says what is wrong
        os.stat(path)  # noqa: PTH116  as what is timed asks
    return time.perf_counter() - started
