"""Define the format of the cache's index: a key in; the segment file and offset of its record out.

One file for each writer, `NAME.idx`: a header of 64 bytes, then a row of 64 bytes for each record, appended after the
record's bytes are on disk; the files are mapped, never parsed. A row has its own check: torn, zeroed or garbled, it is
no record. A dropped row is zeros.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transpixeler.config.sections import UserError

FORMAT = 1
ROW_BYTES = 64
MAGIC = b"TPXCACHE"
DTYPES = ("bfloat16", "float32", "float16", "uint8")
ITEM_BYTES = np.array([2, 4, 2, 1], np.uint64)
# text: a field of tokens; vector: a field without; clip, image: what is shown of given frames, by a field's source
KINDS = ("latent", "text", "vector", "clip", "image")

KEY = np.dtype("V16")
ROW = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("offset", "<u8"),
        ("shape", "<u4", (4,)),  # trailing zeros are no dimensions
        ("segment", "<u4"),
        ("crc", "<u4"),
        ("kind", "u1"),
        ("dtype", "u1"),
        ("spare", "V6"),
        ("check", "<u8"),
    ]
)
_FIELDS = struct.Struct("<16sQ4IIIBB")  # the same without spare and check, for reading one row, which numpy does slowly
assert ROW.itemsize == ROW_BYTES
_SALT = 0x9E3779B97F4A7C15
_ODD = np.array([(0xBF58476D1CE4E5B9 + 2 * i * 0x632BE59BD9B4E019) % 2**64 for i in range(7)], np.uint64)
_SOUGHT = 1 << 20  # keys looked up at once
_CHUNK = 1 << 15  # rows checked at once, few enough to stay in the CPU cache


class Spec(NamedTuple):
    """Kind, dtype and shape of a record's tensor; they also give the name of its segment."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(ITEM_BYTES[DTYPES.index(self.dtype)]) * math.prod(self.shape)

    @property
    def segment(self) -> str:
        """Name the segment: texts of all lengths share one, since only the width of a token is fixed."""
        shape = self.shape[1:] if self.kind == "text" else self.shape
        return f"{self.kind}-{self.dtype}-{'x'.join(map(str, shape))}"


def header() -> bytes:
    return (MAGIC + FORMAT.to_bytes(4, "little") + ROW_BYTES.to_bytes(4, "little")).ljust(ROW_BYTES, b"\0")


def checks(rows: np.ndarray) -> np.ndarray:
    """Return each row's check: every step is a bijection, so changing any one word always changes it."""
    words = rows.view(np.uint64).reshape(len(rows), ROW_BYTES // 8)
    result = np.full(len(rows), _SALT, np.uint64)
    for column in range(7):
        result = (result ^ words[:, column]) * _ODD[column]
        result ^= result >> np.uint64(32)
    return result


def make_rows(
    keys: Sequence[bytes], spec: Spec, *, segment: int, offsets: Sequence[int] | np.ndarray, crcs: Sequence[int]
) -> np.ndarray:
    rows = np.zeros(len(keys), ROW)
    rows["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    rows["offset"], rows["segment"], rows["crc"] = offsets, segment, crcs
    rows["shape"][:, : len(spec.shape)] = spec.shape
    rows["kind"], rows["dtype"] = KINDS.index(spec.kind), DTYPES.index(spec.dtype)
    rows["check"] = checks(rows)
    return rows


class Place(NamedTuple):
    """One row, read."""

    key: bytes
    offset: int
    segment: int
    crc: int
    spec: Spec

    @property
    def end(self) -> int:
        return self.offset + self.spec.bytes


def read_row(rows: np.ndarray, row: int) -> Place:
    key, offset, *shape, segment, crc, kind, dtype = _FIELDS.unpack_from(rows.data, row * ROW_BYTES)
    return Place(key, offset, segment, crc, _spec(kind, dtype, tuple(shape)))


@lru_cache(maxsize=4096)
def _spec(kind: int, dtype: int, shape: tuple[int, ...]) -> Spec:
    return Spec(KINDS[kind], DTYPES[dtype], tuple(size for size in shape if size))


def ends(rows: np.ndarray) -> np.ndarray:
    """Return the first byte after each record."""
    shape = rows["shape"].astype(np.uint64)
    items = np.where(shape == 0, np.uint64(1), shape).prod(axis=1, dtype=np.uint64)
    return rows["offset"] + items * ITEM_BYTES[np.minimum(rows["dtype"], len(DTYPES) - 1)]


class Segment(NamedTuple):
    path: Path
    bytes: int


@dataclass(frozen=True)
class IndexFile:
    """One writer's rows, and what is wrong with them."""

    path: Path
    rows: np.ndarray  # mapped, read-only
    valid: np.ndarray  # bool [n]: whole, not dropped, and its bytes are there
    damaged: np.ndarray  # row numbers whose check is wrong
    short: np.ndarray  # row numbers whose segment is missing or too short
    segments: Mapping[int, Segment]


def open_index(path: Path, rows: np.ndarray, segments: Mapping[int, Segment]) -> IndexFile:
    sizes = np.zeros(max(segments, default=-1) + 2, np.uint64)  # the last entry means "no such segment"
    for number, segment in segments.items():
        sizes[number] = segment.bytes
    valid, damaged, short = np.zeros(len(rows), bool), [], []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        whole = checks(chunk) == chunk["check"]
        there = ends(chunk) <= sizes[np.minimum(chunk["segment"], len(sizes) - 1)]
        valid[start : start + _CHUNK] = whole & there
        if not whole.all():
            words = chunk.view(np.uint64).reshape(len(chunk), -1)
            damaged.extend(start + np.flatnonzero(~whole & words.any(axis=1)))
        short.extend(start + np.flatnonzero(whole & ~there))
    return IndexFile(path, rows, valid, np.array(damaged, np.int64), np.array(short, np.int64), segments)


def map_rows(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 2 * ROW_BYTES:
            file.seek(0)
            _check_header(path, file.read(ROW_BYTES))
            return np.zeros(0, ROW)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _check_header(path, mapped[:ROW_BYTES])
    return np.frombuffer(mapped, ROW, count=size // ROW_BYTES - 1, offset=ROW_BYTES)


def _check_header(path: Path, found: bytes) -> None:
    if len(found) < ROW_BYTES or not any(found):
        return  # its writer was killed at once: it holds no rows
    version = int.from_bytes(found[8:12], "little")
    if found[:8] == MAGIC and version > FORMAT:
        raise UserError(
            f"{path} has cache format {version}, this version of transpixeler reads up to {FORMAT}: "
            "upgrade it, or set data.cache_dir to another folder"
        )
    if found != header():
        raise UserError(f"{path} is not an index of this cache: delete it, and its records are encoded again")


class Table:
    """All valid rows of several index files, sorted by key."""

    def __init__(self, files: Sequence[IndexFile]) -> None:
        self.files = tuple(files)
        numbers = [np.flatnonzero(file.valid) for file in files]
        high = np.concatenate([file.rows["key"][n, 0] for file, n in zip(files, numbers)] or [np.zeros(0, np.uint64)])
        self._starts = np.cumsum([0, *map(len, numbers)])
        order = np.argsort(high, kind="stable")
        self._high = high[order]
        self._places = np.concatenate(numbers or [np.zeros(0, np.int64)])[order]  # row number in its file
        self._owners = (np.searchsorted(self._starts, order, side="right") - 1).astype(np.int32)

    def __len__(self) -> int:
        return len(self._high)

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Return (file number, row number) of a key's newest record."""
        high, low = np.frombuffer(key, "<u8")
        place = int(np.searchsorted(self._high, high, side="right")) - 1
        while place >= 0 and self._high[place] == high:
            file, row = int(self._owners[place]), int(self._places[place])
            if self.files[file].rows["key"][row, 1] == low:
                return file, row
            place -= 1
        return None

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the keys without a record, each once, in the order given."""
        unique = list(dict.fromkeys(keys))
        absent = self.absent(np.frombuffer(b"".join(unique), KEY))
        return [key for key, lacks in zip(unique, absent, strict=True) if lacks]

    def absent(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys, 16 bytes each, have no record, bool [n]."""
        absent = np.ones(len(keys), bool)
        for start in range(0, len(keys) if len(self) else 0, _SOUGHT):
            some = np.frombuffer(keys[start : start + _SOUGHT].tobytes(), "<u8").reshape(-1, 2)
            order = np.argsort(some[:, 0])  # looked up in order, neighbours are in the CPU cache
            absent[start + order] = ~self._held(some[order])
        return absent

    def _held(self, keys: np.ndarray) -> np.ndarray:
        high, low = keys.T
        first, after = (np.searchsorted(self._high, high, side=side) for side in ("left", "right"))
        here = np.zeros(len(keys), bool)
        for number, file in enumerate(self.files):
            single = np.flatnonzero(after - first == 1)
            single = single[self._owners[first[single]] == number]
            here[single] = file.rows["key"][self._places[first[single]], 1] == low[single]
        for several in np.flatnonzero(after - first > 1):
            here[several] = self.find(keys[several].tobytes()) is not None
        return here
