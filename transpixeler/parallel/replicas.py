"""Read base weights once for all ranks that keep the same ones: a source in; a source that sends what it reads, out.

In a large job every replica would read the whole base from the same disk. The first of them reads each slice, the
others receive its bytes; they ask for the same slices in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from transpixeler.config.sections import Fault
from transpixeler.models.shards import Slices
from transpixeler.models.weights import Readable
from transpixeler.parallel.mesh import Mesh

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES += (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
UNREAD = -1


class ReadOnce:
    """A source whose slices the first rank of a group reads."""

    def __init__(self, source: Readable, group: dist.ProcessGroup, device: torch.device) -> None:
        """device: that messages are on."""
        self.path: Path = source.path
        self.source, self.group, self.device = source, group, device

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read_slice(self, name: str, slices: Slices) -> Tensor:
        """Return a slice on every rank, or raise on all of them. A collective call."""
        if dist.get_rank(self.group) == 0:
            return self._read(lambda: self.source.read_slice(name, slices))
        code = self._broadcast(torch.empty((), dtype=torch.int64, device=self.device))
        if int(code) == UNREAD:
            raise Fault(f"{self.path}: rank {self._reader} could not read {name}")
        piece = torch.empty([s.stop - s.start for s in slices], dtype=DTYPES[int(code)], device=self.device)
        self._broadcast(_bytes(piece))
        return piece

    def _read(self, read: Callable[[], Tensor]) -> Tensor:
        try:
            piece = read().contiguous()
        except Exception:
            self._broadcast(torch.tensor(UNREAD, device=self.device))
            raise
        self._broadcast(torch.tensor(DTYPES.index(piece.dtype), device=self.device))
        self._broadcast(_bytes(piece.to(self.device)))
        return piece

    @property
    def _reader(self) -> int:
        return dist.get_global_rank(self.group, 0)

    def _broadcast(self, value: Tensor) -> Tensor:
        dist.broadcast(value, src=self._reader, group=self.group)
        return value


def _bytes(piece: Tensor) -> Tensor:
    return piece.reshape(-1).view(torch.uint8)  # a view, since it is contiguous


def read_once(source: Readable, mesh: Mesh) -> Readable:
    """Return a source that replicas read together, where there are any."""
    if mesh.layout.replicate == 1:
        return source
    group = mesh.shards.get_group("replicate")
    assert isinstance(group, dist.ProcessGroup)
    return ReadOnce(source, group, mesh.device)
