"""Have rank 0 do what is done once, tell all ranks what came of it, and gather what each did. A fault reaches all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from transpixeler.config.sections import Fault, UserError
from transpixeler.parallel.runtime import Runtime

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

    def gather(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.runtime.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


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
