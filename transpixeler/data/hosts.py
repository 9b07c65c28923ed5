"""Fill the caches of hosts that do not share one: what any host holds is copied to the others, not encoded again.

In: the catalog's keys, and ranks whose cache folders may be on disks of their own. Out: every host's cache holds all.
"""

from __future__ import annotations

import logging
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from transpixeler.data.cache.records import Cache, CacheWriter, Record
from transpixeler.data.ranks import FOREVER, Ranks, portable
from transpixeler.parallel.sight import comes_in_sight

logger = logging.getLogger("transpixeler")

MESSAGE_BYTES = 64 << 20  # of records that are sent together
Folders = Mapping[bytes, Path]  # the cache folder of each key on this rank, in the same order on all ranks


@dataclass(frozen=True)
class Hosts:
    """The hosts' caches, and the rank of each that reads and writes it for the others."""

    ranks: Ranks
    leaders: tuple[int, ...] = (0,)  # one rank for each cache; rank 0 alone where all share one
    group: dist.ProcessGroup | None = None  # of the leaders, on these

    def held_elsewhere(self, list_folders: Callable[[], Folders]) -> set[bytes]:
        """Return on rank 0 the keys that other caches hold. A collective call."""
        if self.group is None:
            return set()
        folders = list_folders()
        held = np.logical_or.reduce(self._held(folders)[1:], axis=0)
        return {key for key, there in zip(folders, held, strict=True) if there}

    def copies(self, list_folders: Callable[[], Folders]) -> int:
        """Count the records that `fill` would copy. A collective call."""
        if len(self.leaders) == 1:
            return 0
        held = None if self.group is None else self._held(list_folders())
        return self.ranks.from_main(lambda: 0 if held is None else int((held.any(0) & ~held).sum()))

    def fill(self, list_folders: Callable[[], Folders]) -> None:
        """Copy to each cache what others hold. A collective call."""
        if len(self.leaders) == 1:
            return
        own = None
        if self.group is not None:
            folders = list_folders()
            copying = _Copying(self, folders, self._held(folders))
            copying.run()
            own = copying.fault
        faults = self.ranks.gather(own and portable(own, self.ranks.runtime.rank))
        if own is not None:
            raise own
        for fault in filter(None, faults):
            raise fault

    def _held(self, folders: Folders) -> np.ndarray:
        """Return [caches, keys], which cache holds which record. A collective call of the leaders."""
        cache = Cache(*dict.fromkeys(folders.values()))
        missing = set(cache.missing([*folders]))
        own = np.packbits([key not in missing for key in folders])
        every: list[np.ndarray] = [own] * len(self.leaders)
        dist.all_gather_object(every, own, group=self.group)
        return np.stack([np.unpackbits(bits, count=len(folders)).astype(bool) for bits in every])


class _Copying:
    """One leader's part in copying: each leader in turn sends what it is the first to hold."""

    def __init__(self, hosts: Hosts, folders: Folders, held: np.ndarray) -> None:
        self.hosts, self.folders, self.keys = hosts, folders, [*folders]
        self.fault: Exception | None = None
        wanted = held.any(0) & ~held.all(0)
        self.first = np.where(wanted, held.argmax(0), -1)  # the place of the leader that sends each record
        self.place = hosts.leaders.index(hosts.ranks.runtime.rank)
        self.lacks = {key for key, there in zip(self.keys, held[self.place], strict=True) if not there}
        self.stack = ExitStack()
        self.writers: dict[Path, CacheWriter] = {}

    def run(self) -> None:
        """Send and receive all; a fault of this rank's disk is noted, and raised by `fill` on all ranks."""
        for place, leader in enumerate(self.hosts.leaders):
            messages = self._messages() if place == self.place else iter(())
            while (records := self._sent(next(messages, None), leader)) is not None:
                self._write(records)
        try:
            self.stack.close()
        except Exception as fault:
            self.fault = self.fault or fault

    def _sent(self, records: Sequence[Record] | None, leader: int) -> Sequence[Record] | None:
        box = [records]
        dist.broadcast_object_list(box, src=leader, group=self.hosts.group)
        return box[0]

    def _messages(self) -> Iterator[Sequence[Record]]:
        """Yield the records that this leader sends; a damaged one ends it, and is told by `fill`."""
        cache, records, size = Cache(*dict.fromkeys(self.folders.values())), list[Record](), 0
        for place in np.flatnonzero(self.first == self.place):
            key = self.keys[place]
            try:
                value = cache.get(key)
                assert value is not None, "it was held a moment ago"
                records.append(Record(cache.spec(key).kind, key, value.clone()))
            except Exception as fault:
                self.fault = fault
                return
            size += value.nbytes
            if size >= MESSAGE_BYTES:
                yield records
                records, size = [], 0
        if records:
            yield records

    def _write(self, records: Sequence[Record]) -> None:
        """Write what this cache lacks; after a fault, let the others go on."""
        if self.fault is not None:
            return
        wanted = [record for record in records if record.key in self.lacks]
        try:
            for folder in dict.fromkeys(self.folders[record.key] for record in wanted):
                if folder not in self.writers:
                    writer = CacheWriter(folder, f"rank{self.hosts.ranks.runtime.rank}")
                    self.writers[folder] = self.stack.enter_context(writer)
                self.writers[folder].put([record for record in wanted if self.folders[record.key] == folder])
        except Exception as fault:
            self.fault = fault


def find_hosts(ranks: Ranks, folders: Sequence[Path]) -> Hosts:
    """Find out which ranks share their cache folders, by a file that the others must see. A collective call.

    A host whose disk is slow to show it counts as one with a cache of its own, which costs no more than space.
    """
    runtime, alone = ranks.runtime, Hosts(ranks)
    if ranks.group is None:
        return alone
    first_of_host = runtime.rank - runtime.local_rank
    hosts = sorted(set(ranks.gather(first_of_host)))
    if len(hosts) == 1:
        return alone
    name = ranks.from_main(lambda: f".seen-{uuid.uuid4().hex}")
    marks = [folder / name for folder in folders]
    made = ranks.from_main(lambda: _make(marks))
    sees = not made or all(map(comes_in_sight, marks))
    blind = {first: host for first, host, seen in ranks.gather((first_of_host, platform.node(), sees)) if not seen}
    if runtime.is_main:
        for mark in marks:
            mark.unlink(missing_ok=True)
    if not blind:
        return alone
    leaders = tuple(sorted({0, *blind}))
    if runtime.is_main:
        names = ", ".join(dict.fromkeys([platform.node(), *blind.values()]))
        logger.info("%s is not the same folder on all hosts: what one encodes is copied to %s", folders[0], names)
    group = dist.new_group(list(leaders), backend="gloo", timeout=FOREVER)
    return Hosts(ranks, leaders, group if isinstance(group, dist.ProcessGroup) else None)


def _make(marks: Sequence[Path]) -> bool:
    """Make files that show who sees them; False where that is not allowed, as on a read-only disk."""
    with suppress(OSError):
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return True
    return False
