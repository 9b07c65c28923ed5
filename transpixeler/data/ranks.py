"""Have rank 0 do what is done once, tell all ranks what came of it, and gather what each did. A fault reaches all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from transpixeler.config.sections import Fault, UserError
from transpixeler.data.media.errors import BadMedia
from transpixeler.parallel.runtime import Runtime

T = TypeVar("T")
R = TypeVar("R")

FOREVER = timedelta(days=7)  # as long as one rank may read a large data set while the others wait


@dataclass(frozen=True)
class Ranks:
    """Messages between ranks, with a timeout of days: one rank may read a large data set while the others wait."""

    runtime: Runtime
    group: dist.ProcessGroup | None  # None: there is one rank

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` returns on rank 0, or raise its fault on all of them."""
        box: list[Any] = [None, None]
        own = None
        if self.runtime.is_main:
            try:
                box = [make(), None]
            except Exception as fault:
                box, own = [None, portable(fault, 0)], fault
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise own or box[1]
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return on every rank whether it is so on one: a number is reduced, however many ranks there are."""
        if self.group is None:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return bool(found)

    def those(self, flag: bool) -> list[int]:
        """Return on every rank the ranks on which it is so, from a reduction of as many numbers."""
        found = torch.zeros(self.runtime.world_size, dtype=torch.uint8)
        found[self.runtime.rank] = flag
        if self.group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.nonzero().flatten().tolist()

    def gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class Helpers:
    """Ranks that do their part of what rank 0 asks for, while it lists a data set: to apply a function to many values.

    Rank 0 calls `map` within a `with`; the others call `serve`, which returns when that ends.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.group = ranks.group if ranks else None
        self.rank, self.count = (ranks.runtime.rank, ranks.runtime.world_size) if ranks and ranks.group else (0, 1)

    def map(self, work: Callable[[T], R], values: Sequence[T], threads: int) -> list[R | Exception]:
        """Return what a module's function makes of each value, or why it cannot, on all ranks, each with threads."""
        if not values:
            return []
        if self.group is None:
            return self._part(work, values, threads)
        dist.broadcast_object_list([(work, values, threads)], src=0, group=self.group)
        parts: list[Any] = [None] * self.count
        dist.gather_object(self._part(work, values, threads), parts, dst=0, group=self.group)
        return [parts[place % self.count][place // self.count] for place in range(len(values))]

    def serve(self) -> None:
        """Do this rank's part of all that rank 0 asks for."""
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0, group=self.group)
            if box[0] is None:
                return
            dist.gather_object(self._part(*box[0]), dst=0, group=self.group)

    def _part(self, work: Callable[[T], R], values: Sequence[T], threads: int) -> list[R | Exception]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(partial(self._tried, work), values[self.rank :: self.count]))

    def _tried(self, work: Callable[[T], R], value: T) -> R | Exception:
        try:
            return work(value)
        except Exception as fault:
            return fault if isinstance(fault, (OSError, BadMedia)) else portable(fault, self.rank)

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.group is not None:
            dist.broadcast_object_list([None], src=0, group=self.group)


ALONE = Helpers()


def portable(fault: Exception, rank: int) -> Exception:
    """Return a fault for other ranks to raise: not every exception can be pickled, these three can."""
    for kind in (UserError, Fault):
        if isinstance(fault, kind):
            return kind(str(fault))
    return RuntimeError(f"rank {rank} failed: {type(fault).__name__}: {fault}")


@contextmanager
def connected(runtime: Runtime) -> Iterator[Ranks]:
    """Connect all ranks for as long as their work takes."""
    if runtime.world_size == 1:
        yield Ranks(runtime, None)
        return
    group = dist.new_group(backend="gloo", timeout=FOREVER)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    try:
        yield Ranks(runtime, group)
    finally:
        dist.destroy_process_group(group)
