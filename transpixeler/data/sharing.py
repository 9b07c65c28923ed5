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
from transpixeler.data.ranks import Ranks
from transpixeler.parallel.sight import comes_in_sight

logger = logging.getLogger("transpixeler")
T = TypeVar("T")
ALIGNMENT = 64
PIECE = 16 << 20  # bytes that are packed and sent at a time


def shared(ranks: Ranks, make: Callable[[], T], folders: Sequence[Path]) -> T:
    """Return on every rank what `make` returns on rank 0. folders: where a file may lie that all hosts see.

    A collective call. The file has no name any more when it returns; the mappings keep its bytes.
    """
    if ranks.group is None:
        return make()
    main, name = ranks.runtime.is_main, f".columns-{uuid.uuid4().hex}"

    def write() -> tuple[bytes, list[int], Path]:
        buffers: list[pickle.PickleBuffer] = []
        told = pickle.dumps(make(), protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        return told, [len(view) for view in views], _written(views, name, folders)

    told, sizes, path = ranks.from_main(write)
    leader = ranks.runtime.local_rank == 0
    blind = leader and not main and not comes_in_sight(path)
    if ranks.any(blind):
        own = Path(tempfile.gettempdir()) / path.name if blind else None
        _send(ranks, path, own)
    dist.barrier(group=ranks.group)
    sent = Path(tempfile.gettempdir()) / path.name
    here = sent if sent.exists() else path
    seen = here.exists()
    value = pickle.loads(told, buffers=_mapped(here, sizes)) if seen else None
    if ranks.any(not seen):
        raise UserError(f"{path}: some rank does not see the list of clips; set TMPDIR to a folder of its host")
    if main or blind:
        here.unlink(missing_ok=True)
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


def _send(ranks: Ranks, path: Path, own: Path | None) -> None:
    """Send rank 0's file to hosts that do not see it. own: where this rank writes it. A collective call."""
    pieces = _packed(path) if ranks.runtime.is_main else iter(())
    with own.open("wb") if own else tempfile.TemporaryFile() as out:
        while True:
            piece = next(pieces, b"")
            size = torch.tensor(len(piece))
            dist.broadcast(size, src=0, group=ranks.group)
            if not int(size):
                return
            data = torch.empty(int(size), dtype=torch.uint8)
            if piece:
                data = torch.from_numpy(np.frombuffer(bytearray(piece), np.uint8))
            dist.broadcast(data, src=0, group=ranks.group)
            if own:
                out.write(zlib.decompress(data.numpy().tobytes()))


def _packed(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield zlib.compress(piece, 1)
