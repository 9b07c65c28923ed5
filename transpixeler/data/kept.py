"""Keep columns in a file from one start to the next: what a start has found in; the same, if its key holds, out.

A file is the columns one after another and at its end a header in JSON, with a check of each part: nothing of it is
executed, and a torn one is no file.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from transpixeler.data.columns import Filed, Texts
from transpixeler.files import whole

logger = logging.getLogger("transpixeler")
ALIGNMENT = 64
KEPT_ENDING = ".columns"
PIECE = 1 << 20  # bytes that are written or checked at a time
SIZES = "<i4"  # of texts, in bytes
TAIL = 16  # bytes: the size of the header and its check, in letters
Column = np.ndarray | Texts


@dataclass(frozen=True)
class Columns:
    """Hold what was read: columns by name, and all that is no column."""

    told: Mapping[str, Any]
    columns: Mapping[str, Any]  # each an array or texts, as it was written


@dataclass(frozen=True)
class KeptFile:
    """One such file. key: all that it depends on; a file with another one is made anew."""

    path: Path
    key: str

    def read(self) -> Columns | None:
        """Return what the file holds, mapped; None where it is not there, not whole, or of another key."""
        try:
            file = self.path.open("rb")  # closed with the texts that read it; another run may replace it meanwhile
            header = _header(file)
            if (
                header is None
                or header.get("key") != self.key
                or not all(_is_whole(file, *it) for it in header["parts"].values())
            ):
                return None
        except OSError:
            return None
        parts = header["parts"]
        columns = {name: _column(file, parts, name, kind) for name, kind in header["columns"].items()}
        return Columns(header["told"], columns)

    def write(self, told: Mapping[str, Any], columns: Mapping[str, Column]) -> None:
        """Write the file whole; where that is impossible, as on a disk that is full, the next start finds all again."""
        try:
            with whole(self.path, synced=True) as unfinished, unfinished.open("wb") as out:
                parts: dict[str, tuple[int, int, int]] = {}
                for name, column in columns.items():
                    if isinstance(column, Texts):
                        parts[name] = _put(out, column.each())
                        parts[f"{name} sizes"] = _put(out, _sliced(column.sizes.astype(SIZES)))
                    else:
                        parts[name] = _put(out, _sliced(column))
                kinds = {name: "texts" if isinstance(one, Texts) else one.dtype.str for name, one in columns.items()}
                header = json.dumps({"key": self.key, "told": told, "columns": kinds, "parts": parts}).encode()
                out.write(header)
                out.write(f"{len(header):08x}{zlib.crc32(header):08x}".encode())
        except OSError as error:
            logger.info("%s cannot be written (%s): the next start looks through all again", self.path, error.strerror)


def _column(file: BinaryIO, parts: Mapping[str, tuple[int, int, int]], name: str, kind: str) -> Column:
    if kind != "texts":
        return _array(file, parts[name], kind)
    sizes = _array(file, parts[f"{name} sizes"], SIZES)
    first, size, _ = parts[name]
    return Texts(Filed(file, first, size), np.cumsum(sizes, dtype=np.int64) - sizes, sizes)


def _array(file: BinaryIO, part: tuple[int, int, int], kind: str) -> np.ndarray:
    first, size, _ = part
    count = size // np.dtype(kind).itemsize
    return np.asarray(np.memmap(file, kind, "r", first, (count,))) if count else np.zeros(0, kind)


def _put(out: BinaryIO, pieces: Iterable[bytes | memoryview]) -> tuple[int, int, int]:
    """Write pieces of bytes; return where they begin, how many they are, and their check."""
    first, check, held = out.tell(), 0, bytearray()
    for piece in pieces:
        held += piece
        if len(held) > PIECE:
            check = zlib.crc32(held, check)
            out.write(held)
            held = bytearray()
    check = zlib.crc32(held, check)
    out.write(held)
    size = out.tell() - first
    out.write(bytes(-out.tell() % ALIGNMENT))
    return first, size, check


def _sliced(column: np.ndarray) -> Iterator[memoryview]:
    data = np.ascontiguousarray(column).view(np.uint8).data
    return (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def _header(file: BinaryIO) -> dict[str, Any] | None:
    end = file.seek(0, 2)
    file.seek(max(0, end - TAIL))
    tail = file.read(TAIL)
    try:
        size, check = int(tail[: TAIL // 2], 16), int(tail[TAIL // 2 :], 16)
        file.seek(end - TAIL - size)
    except (ValueError, OSError):  # torn: what is no number, or one that leads to before the beginning
        return None
    header = file.read(size)
    if zlib.crc32(header) != check:
        return None
    try:
        told = json.loads(header)
    except (ValueError, RecursionError):  # of someone who only knows how to check it
        return None
    return told if isinstance(told, dict) else None


def _is_whole(file: BinaryIO, first: int, size: int, wanted: int) -> bool:
    file.seek(first)
    check = 0
    while size and (piece := file.read(min(size, PIECE))):
        check, size = zlib.crc32(piece, check), size - len(piece)
    return not size and check == wanted
