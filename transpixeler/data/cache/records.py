"""Store encoded clips and captions on disk: tensors by key in, views into the page cache out.

Every writer appends to its own segments and index, so that ranks never wait for each other, and never opens another's
files: after a kill the next run starts new ones, and a torn tail is no record. A record's row is written to the index
only after the record's bytes are on disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transpixeler.config.sections import Fault, UserError
from transpixeler.data.cache import index
from transpixeler.data.cache.index import IndexFile, Place, Segment, Spec, Table
from transpixeler.files import sync

SEGMENT_BYTES = 1 << 30
ALIGNMENT = 64
MAPPED_SEGMENTS = 4096  # mapped at once; the kernel allows 65,530 mappings
SYNC_INDEX_SECONDS = 1.0
_SEGMENT_NAME = re.compile(r"(?P<writer>.+)\.(?P<number>\d+)\.(?P<spec>[a-z0-9x-]+)\.seg")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class CacheDamaged(UserError):
    """A record whose bytes are not those that were written."""


DTYPE = torch.bfloat16  # that encoders' results are kept in


class Record(NamedTuple):
    kind: str  # one of `index.KINDS`
    key: bytes
    value: Tensor


# --- reading ---------------------------------------------------------------------------------------------------------


class Cache:
    """The records that the folders held when they were opened."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self.table = Table([file for folder in folders for file in open_indexes(folder)])
        self._maps: dict[tuple[int, int], Tensor] = {}
        self._verified = [np.zeros(len(file.rows), bool) for file in self.table.files]

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, key: bytes) -> bool:
        return self.table.find(key) is not None

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        return self.table.missing(keys)

    def absent(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys, 16 bytes each, have no record, bool [n]."""
        return self.table.absent(keys)

    def spec(self, key: bytes) -> Spec:
        return self.place(*self._found(key)).spec

    def get(self, key: bytes) -> Tensor | None:
        """Return a view, latents [C, f, h, w] or text [length, width]; its checksum is verified at the first read."""
        found = self.table.find(key)
        if found is None:
            return None
        if not self._verified[found[0]][found[1]]:
            self.verify(*found)
        return self.view(*found)

    def copy(self, key: bytes, out: Tensor) -> None:
        """Fill `out`, verifying the record on every read, so that training never sees a damaged one."""
        file, row = self._found(key)
        self.verify(file, row)
        value = self.view(file, row)
        if value.shape != out.shape:  # copying would broadcast
            raise CacheDamaged(f"the record {key.hex()} is {tuple(value.shape)}, not {tuple(out.shape)}")
        out.copy_(value)

    def place(self, file: int, row: int) -> Place:
        return index.read_row(self.table.files[file].rows, row)

    def view(self, file: int, row: int) -> Tensor:
        place = self.place(file, row)
        return self._bytes(file, place).view(getattr(torch, place.spec.dtype)).view(place.spec.shape)

    def verify(self, file: int, row: int) -> None:
        place = self.place(file, row)
        if zlib.crc32(_buffer(self._bytes(file, place))) != place.crc:
            raise CacheDamaged(
                f"{self._segment(file, place).path}: the record {place.key.hex()} at byte {place.offset} is damaged; "
                "run `transpixeler cache CONFIG --verify`, which drops it, and the next run encodes it again"
            )
        self._verified[file][row] = True

    def _found(self, key: bytes) -> tuple[int, int]:
        found = self.table.find(key)
        if found is None:
            raise UserError(f"the cache has no record {key.hex()}: was `cache --gc` run meanwhile? start again")
        return found

    def _segment(self, file: int, place: Place) -> Segment:
        return self.table.files[file].segments[place.segment]

    def _bytes(self, file: int, place: Place) -> Tensor:
        """Return a record's mapped bytes after a look at the file's size: reading beyond its end is a SIGBUS."""
        mapped = self._maps.get((file, place.segment))
        if mapped is None:
            mapped = self._map(file, place)
        path = self._segment(file, place).path
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # removed, but the mapping keeps its bytes
            size = len(mapped)
        if min(size, len(mapped)) < place.end:
            raise CacheDamaged(
                f"{path} was truncated while in use: it has {size} bytes, and the record {place.key.hex()} ends at "
                f"{place.end}; run `transpixeler cache CONFIG`, which encodes it again, and resume"
            )
        return mapped[place.offset : place.end]

    def _map(self, file: int, place: Place) -> Tensor:
        """Map a whole segment as bytes; no file stays open, and old mappings go when nobody views them."""
        path = self._segment(file, place).path
        try:
            mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read ({error}); was `cache --gc` run? start again") from error
        if len(self._maps) >= MAPPED_SEGMENTS:
            del self._maps[next(iter(self._maps))]
        self._maps[file, place.segment] = mapped
        return mapped


def open_indexes(folder: Path) -> list[IndexFile]:
    """Open a folder's indexes. Rows are mapped before segments are measured, since writers write in the other order."""
    if not folder.is_dir():
        return []
    mapped = [(path, index.map_rows(path)) for path in sorted(folder.glob("*.idx"))]
    segments = segments_of(folder)
    return [index.open_index(path, rows, segments.get(path.stem, {})) for path, rows in mapped]


def segments_of(folder: Path) -> dict[str, dict[int, Segment]]:
    """Return every segment file by its writer and number."""
    found: dict[str, dict[int, Segment]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := _SEGMENT_NAME.fullmatch(entry.name):
                segment = Segment(Path(entry.path), entry.stat().st_size)
                found.setdefault(match["writer"], {})[int(match["number"])] = segment
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


class _OpenSegment:
    """A segment that is being written."""

    def __init__(self, path: Path, number: int) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.number = number
        self.end = 0
        self.dirty = False

    def write(self, data: memoryview) -> int:
        offset = self.end
        self.dirty = True
        _write(self.file, data, offset)
        self.end = -(-(offset + len(data)) // ALIGNMENT) * ALIGNMENT
        return offset

    def sync(self) -> None:
        if self.dirty:
            os.fdatasync(self.file)
        self.dirty = False

    def close(self) -> None:
        os.close(self.file)


def _buffer(data: Tensor) -> memoryview:
    """Return the bytes [n] of a tensor without a copy."""
    return memoryview(data.numpy())  # pyright: ignore[reportArgumentType]  numpy declares __buffer__ from 3.12 on


class CacheWriter:
    """Appends records to its own files; when `put` returns, they would survive a power cut."""

    def __init__(self, folder: Path, name: str = "w") -> None:
        self.folder = folder
        self._open: dict[str, _OpenSegment] = {}
        self._segments = 0
        self._synced = 0.0
        self._broken = False
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{uuid.uuid4().hex[:8]}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._index = os.open(folder / f"{self.name}.idx", flags, 0o644)
            lock(self._index)
            _write(self._index, memoryview(index.header()))

    def put(self, records: Sequence[Record]) -> None:
        """Write records; they become visible together, after their bytes are on disk."""
        assert not self._broken, "this writer failed before and may have left half a row"
        self._broken = True
        with explained(self.folder):
            rows = [self._append(record) for record in records]
            for segment in self._open.values():
                segment.sync()
            _write(self._index, memoryview(b"".join(row.tobytes() for row in rows)))
            if time.monotonic() - self._synced > SYNC_INDEX_SECONDS:
                self._sync_index()
        self._broken = False

    def close(self) -> None:
        try:
            with explained(self.folder):
                self._sync_index()
        finally:
            for segment in self._open.values():
                segment.close()
            os.close(self._index)  # releases the lock

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: Record) -> np.ndarray:
        value = record.value.detach().cpu().contiguous()
        spec = Spec(record.kind, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        data = _buffer(value.view(-1).view(torch.uint8))
        segment = self._segment(spec)
        offset = segment.write(data)
        return index.make_rows([record.key], spec, segment=segment.number, offsets=[offset], crcs=[zlib.crc32(data)])

    def _segment(self, spec: Spec) -> _OpenSegment:
        segment = self._open.get(spec.segment)
        if segment is not None and segment.end + spec.bytes <= SEGMENT_BYTES:
            return segment
        if segment is not None:
            segment.sync()
            segment.close()
        path = self.folder / f"{self.name}.{self._segments:05d}.{spec.segment}.seg"
        self._open[spec.segment] = _OpenSegment(path, self._segments)
        self._segments += 1
        sync(self.folder)
        return self._open[spec.segment]

    def _sync_index(self) -> None:
        os.fdatasync(self._index)
        self._synced = time.monotonic()


def lock(file: int, *, path: Path | None = None) -> None:
    """Lock a file until it or its process is closed; file systems without locks go without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is being written by another run: wait until that has ended") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _write(file: int, data: memoryview, offset: int | None = None) -> None:
    """Write all data: a single call may write less on a full disk, and never more than 2 GiB."""
    while len(data):
        done = os.write(file, data) if offset is None else os.pwrite(file, data, offset)
        data, offset = data[done:], None if offset is None else offset + done


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a full disk into a Fault and a read-only one into a UserError, both with a way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Fault(
                f"{folder}: no space left ({error.strerror}); what was written stays valid. "
                "Free some space, or set data.cache_dir to another disk, and start again"
            ) from error
        if error.errno in READ_ONLY:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): set data.cache_dir to a folder that can"
            ) from error
        raise
