"""Replicas read the base once: the same bytes on all ranks, and a fault on all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.ranks import RanksFailed, run_ranks
from transpixeler.config.sections import UserError
from transpixeler.parallel.mesh import Layout, build
from transpixeler.parallel.replicas import read_once
from transpixeler.parallel.runtime import Runtime

CPU = torch.device("cpu")
WEIGHTS = {
    "a": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    "b": torch.arange(6, dtype=torch.float32).bfloat16(),
    "c": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
    "none": torch.zeros(0, 3),
}


class Source:
    """Weights in memory that count what is read."""

    path = Path("base")

    def __init__(self) -> None:
        self.read = 0

    def names(self) -> tuple[str, ...]:
        return tuple(WEIGHTS)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(WEIGHTS[name].shape)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        if name not in WEIGHTS:
            raise UserError("base: torn")
        self.read += 1
        return WEIGHTS[name][slices]


def read(rank: int, world_size: int, broken: bool) -> tuple[bool, int]:
    """Read halves of each weight, one for each of two shards, on two replicas."""
    mesh = build(Layout(1, 2, 2), Runtime(rank, world_size, rank, CPU))
    source = Source()
    once = read_once(source, mesh)
    if broken and dist.get_rank() >= 2:
        source.read_slice = lambda *_: torch.zeros(0)  # type: ignore[method-assign]
    same = True
    for name, whole in WEIGHTS.items():
        half = -(-len(whole) // 2)
        own = slice(half * (rank % 2), min(len(whole), half * (rank % 2 + 1)))
        slices = (own, *(slice(0, n) for n in whole.shape[1:]))
        found, expected = once.read_slice(name, slices), whole[slices]
        same &= found.dtype == expected.dtype and torch.equal(found.float(), expected.float())
    return same, source.read


@pytest.mark.parametrize("broken", [False, True])
def test_one_replica_reads_for_all(broken: bool) -> None:
    """What the other replicas have on their disks does not matter."""
    found = run_ranks(read, 4, broken)
    assert [same for same, _ in found] == [True] * 4
    assert [count for _, count in found] == [4, 4, 0, 0]


def fail(rank: int, world_size: int) -> None:
    mesh = build(Layout(1, 2, 1), Runtime(rank, world_size, rank, CPU))
    read_once(Source(), mesh).read_slice("torn", (slice(0, 1),))


def test_a_fault_of_the_reader_reaches_the_others() -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(fail, 2)
    assert "base: torn" in str(failed.value) and "base: rank 0 could not read torn" in str(failed.value)
