"""Share what rank 0 knows of a large data set: a value with columns in; the same on all ranks out, its bytes in a file.

The ranks of a machine map one file, so that its bytes are in memory once; only what is no column is sent to each. A
machine that does not see rank 0's file is sent the bytes.
"""

from __future__ import annotations

import logging
import mmap
import pickle
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from transpixeler.config.sections import UserError
from transpixeler.data.ranks import Helpers, Ranks
from transpixeler.parallel.sight import comes_in_sight

logger = logging.getLogger("transpixeler")
T = TypeVar("T")
ALIGNMENT = 64
PIECE = 16 << 20  # bytes that are packed and sent at a time


def shared(ranks: Ranks, make: Callable[[Helpers], T], folders: Sequence[Path]) -> T:
    """Return on every rank what `make` returns on rank 0, with the help of all. folders: that all hosts may see.

    A collective call. The file has no name any more when it returns; the mappings keep its bytes.
    """
    helpers = Helpers(ranks)
    if ranks.group is None:
        return make(helpers)
    main, name = ranks.runtime.is_main, f".columns-{uuid.uuid4().hex}"

    def write() -> tuple[bytes, list[int], Path]:
        buffers: list[pickle.PickleBuffer] = []
        with helpers:
            made = make(helpers)
        told = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        return told, [len(view) for view in views], _written(views, name, folders)

    if not main:
        helpers.serve()
    told, sizes, path = ranks.from_main(write)
    leader = ranks.runtime.local_rank == 0
    blind = leader and not main and not comes_in_sight(path)
    _send(ranks, path, ranks.those(blind))
    dist.barrier(group=ranks.group)
    here = _sent(path) if _sent(path).exists() else path
    seen = here.exists()
    value = pickle.loads(told, buffers=_mapped(here, sizes)) if seen else None
    lost = ranks.any(not seen)  # all have mapped it now
    if main or blind:
        here.unlink(missing_ok=True)
    if lost:
        raise UserError(f"{path}: some rank does not see the list of clips; set TMPDIR to a folder of its host")
    return value  # pyright: ignore[reportReturnType]  it is there without a fault


def _written(views: Sequence[memoryview], name: str, folders: Sequence[Path]) -> Path:
    """Write bytes one after another into the first folder that takes them, else into the host's own for such."""
    path, told = Path(name), ""
    for folder in (*folders, Path(tempfile.gettempdir())):
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for view in views:
                    file.write(view)
                    file.write(bytes(-len(view) % ALIGNMENT))
        except OSError as error:  # as of a disk that is full or cannot be written
            told = str(error.strerror)
            with suppress(OSError):
                path.unlink()
        else:
            return path
    raise UserError(f"{path}: the list of clips cannot be written ({told}): free some space, or set TMPDIR")


def _mapped(path: Path, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Yield the bytes that `_written` has laid down."""
    if not sum(sizes):
        yield from (memoryview(b"") for _ in sizes)
        return
    with path.open("rb") as file:
        whole, first = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), 0
    for size in sizes:
        yield whole[first : first + size]
        first += size + -size % ALIGNMENT


def _sent(path: Path) -> Path:
    """Return where a host that does not see a file has its own."""
    return Path(tempfile.gettempdir()) / path.name


def _send(ranks: Ranks, path: Path, blind: Sequence[int]) -> None:
    """Send rank 0's file to the hosts of blind ranks, each of which hands it on to the next: rank 0 sends it once."""
    line, rank = [0, *blind], ranks.runtime.rank
    if not blind or rank not in line:
        return
    after = line[line.index(rank) + 1 :][:1]
    if rank == 0:
        for piece in _packed(path):
            _put(ranks, piece, after)
        _put(ranks, b"", after)
        return
    before, own = line[line.index(rank) - 1], _sent(path)
    there = _append(own, b"")
    while piece := _take(ranks, before, after):  # to the end, as others wait for it
        there = there and _append(own, zlib.decompress(piece))
    if not there:
        own.unlink(missing_ok=True)  # which all ranks are told


def _append(path: Path, data: bytes) -> bool:
    try:
        with path.open("ab") as out:
            out.write(data)
    except OSError as error:  # as of a disk that is full
        logger.warning("%s: the list of clips cannot be written: %s", path, error.strerror)
        return False
    return True


def _take(ranks: Ranks, before: int, after: Sequence[int]) -> bytes:
    size = torch.tensor(0)
    dist.recv(size, src=before, group=ranks.group)
    data = torch.empty(int(size), dtype=torch.uint8)
    if int(size):
        dist.recv(data, src=before, group=ranks.group)
    piece = data.numpy().tobytes()
    _put(ranks, piece, after)
    return piece


def _put(ranks: Ranks, piece: bytes, after: Sequence[int]) -> None:
    for rank in after:
        dist.send(torch.tensor(len(piece)), dst=rank, group=ranks.group)
        if piece:
            dist.send(torch.from_numpy(np.frombuffer(bytearray(piece), np.uint8)), dst=rank, group=ranks.group)


def _packed(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield zlib.compress(piece, 1)
