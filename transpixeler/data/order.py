"""Order the clips: their buckets in; the global batches of each epoch, a pure function of (seed, epoch), out.

A bucket is an endless row of permutations, one for each epoch, cut into global batches of its own size. A batch that
straddles two epochs belongs to the earlier one: after N epochs every clip was seen at least N times, and nothing is
padded. Where buckets are drawn anew each epoch, a row's epoch holds the clips that are drawn for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from transpixeler.config.sections import TrainConfig, UserError
from transpixeler.data.draws import Draws, mix, state
from transpixeler.data.items import Coded, coded

LONGEST_BATCH = 1000  # epochs that one batch may take to fill


class Row(NamedTuple):
    """One bucket's items, each as often as it repeats."""

    name: str
    items: np.ndarray  # int32 [n], indices into the data set
    batch: int  # clips of a step
    mean: float  # items of an epoch
    entries: np.ndarray  # int64 [n], where the order's draws have each of them; none without draws

    @property
    def steps(self) -> float:
        """Return the steps of a mean epoch."""
        return self.mean / self.batch


@dataclass(frozen=True)
class Order:
    """The batches of every epoch; its whole state is (epoch, step)."""

    seed: int
    rows: tuple[Row, ...]
    draws: Draws | None = None  # where an epoch takes some of the items only
    _before: list[np.ndarray] = field(default_factory=list, compare=False, repr=False)  # by epoch: places of each row
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def mean_steps(self) -> float:
        """Return the steps of a mean epoch."""
        return sum(row.steps for row in self.rows)

    def steps(self, epoch: int) -> int:
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """Count the steps in all epochs before this one."""
        return sum(self._first_batches(epoch))

    def total(self, train: TrainConfig) -> int | float:
        """Return the steps of a whole run: so many epochs or steps, whichever are fewer; infinity without either."""
        by_epoch = self.first_step(train.epochs) if train.epochs else math.inf
        return min(by_epoch, train.max_steps or math.inf)

    def ended(self, step: int) -> range:
        """Return the epochs, counted from 1, that end with so many steps: mostly none or one.

        Several where buckets are smaller than a batch: its first batch then covers later epochs too.
        """
        last, within = self.locate(step)
        first = last
        while not within and first > 0 and self.first_step(first - 1) == step:
            first -= 1
        return range(0) if within else range(max(first, 1), last + 1)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within it) of a global step."""
        epoch = int(step / self.mean_steps)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        while self.first_step(epoch) > step:
            epoch -= 1
        return epoch, step - self.first_step(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the items of each global batch, as many as its bucket's, from a step of the epoch on."""
        owned = list(map(range, self._first_batches(epoch), self._first_batches(epoch + 1)))
        rows = np.repeat(np.arange(len(owned)), [len(batches) for batches in owned])
        numbers = np.concatenate([np.arange(batches.start, batches.stop) for batches in owned])
        shuffled: dict[tuple[int, int], np.ndarray] = {}
        for place in permutation(len(rows), self.seed, epoch, "steps")[start:]:
            yield self._items(int(rows[place]), int(numbers[place]), epoch, shuffled)

    def used(self, steps: float, items: int) -> np.ndarray:
        """Return which of so many items a run of so many steps takes, the rest of its last epoch included."""
        if self.draws is None or steps == math.inf:
            return np.ones(items, bool)
        found, every = np.zeros(items, bool), np.concatenate([row.items for row in self.rows])
        epochs, within = self.locate(int(steps))
        for epoch in range(epochs + bool(within)):
            for number in range(len(self.rows)):
                found[self._taken(number, epoch)] = True
            if found[every].all():
                return found
        self._mark_reached(found, epochs + bool(within))
        return found

    def _mark_reached(self, found: np.ndarray, epochs: int) -> None:
        """Mark what the last batch of each row takes from epochs after so many."""
        for number, batches in enumerate(self._first_batches(epochs)):
            if batches:
                owner = epochs - 1
                while self._first_batches(owner)[number] == batches:
                    owner -= 1
                found[self._items(number, batches - 1, owner, {})] = True

    def _first_batches(self, epoch: int) -> list[int]:
        """Return the first batch of each row that belongs to an epoch: those that reach into it from before do not."""
        return [-(-int(places) // row.batch) for places, row in zip(self._places(epoch), self.rows, strict=True)]

    def _places(self, epoch: int) -> np.ndarray:
        """Count the places of each endless row that lie before an epoch."""
        if self.draws is None:
            return np.array([epoch * len(row.items) for row in self.rows], np.int64)
        with self._lock:
            if not self._before:
                self._before.append(np.zeros(len(self.rows), np.int64))
            while len(self._before) <= epoch:
                taken = self.draws.taken(len(self._before) - 1)
                counts = [int(taken[row.entries].sum()) for row in self.rows]
                self._before.append(self._before[-1] + counts)
            return self._before[epoch]

    def _taken(self, row: int, epoch: int) -> np.ndarray:
        """Return those items of a row that an epoch takes."""
        items, entries = self.rows[row].items, self.rows[row].entries
        return items if self.draws is None else items[self.draws.taken(epoch)[entries]]

    def _items(self, row: int, batch: int, epoch: int, shuffled: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
        """Return a batch of a bucket, which begins in an epoch and goes on into the next ones until it is full."""
        name, size = self.rows[row].name, self.rows[row].batch
        pieces, missing = [], size
        first = batch * size - int(self._places(epoch)[row])
        while missing:
            if (row, epoch) not in shuffled:
                taken = self._taken(row, epoch)
                shuffled[row, epoch] = taken[permutation(len(taken), self.seed, epoch, name)]
            pieces.append(shuffled[row, epoch][first : first + missing])
            missing -= len(pieces[-1])
            epoch, first = epoch + 1, 0
        return np.concatenate(pieces)


def shared_out(clips: np.ndarray, group: int, run: int) -> np.ndarray:
    """Return the clip of each sample of a step: `group` runs of `run` samples have the same clips."""
    return np.repeat(clips.reshape(-1, run), group, axis=0).ravel() if group > 1 else clips


def make_order(
    *,
    buckets: Sequence[tuple[int, ...]] | Coded,
    repeats: Sequence[int] | np.ndarray,
    batches: Sequence[int] | np.ndarray,
    seed: int,
    draws: Draws | None = None,
    key: str = "train",
    left_out: str = "",
) -> Order:
    """Group items by bucket; refuse a data set that cannot fill one step.

    batches: of each item's bucket, the samples of a step. draws: of each item, repeated as often as it repeats.
    left_out: what a refusal says of the samples that are not among the items.
    """
    offered, numbers = buckets if isinstance(buckets, Coded) else coded(buckets)
    times, rows, chances = np.asarray(repeats), [], None if draws is None else draws.chances()
    firsts = np.zeros(0, np.int64) if draws is None else np.cumsum(times) - times
    for number, bucket in sorted(enumerate(offered), key=lambda it: it[1]):
        members = np.flatnonzero(numbers == number).astype(np.int32)
        if not len(members):
            continue
        often = times[members]
        items, entries = np.repeat(members, often), np.zeros(0, np.int64)
        if draws is not None:
            entries = np.repeat(firsts[members] - np.cumsum(often) + often, often) + np.arange(len(items))
        mean = float(len(items) if chances is None else chances[entries].sum())
        if mean > 0:
            rows.append(Row("x".join(map(str, bucket)), items, int(batches[members[0]]), mean, entries))
    _check_filled(rows, key, left_out)
    return Order(seed, tuple(rows), draws)


def _check_filled(rows: Sequence[Row], key: str, left_out: str) -> None:
    """Refuse a set of less than one step an epoch, and a bucket that is drawn too rarely."""
    if sum(row.steps for row in rows) < 1:
        total, most = sum(row.mean for row in rows), max((row.batch for row in rows), default=0)
        raise UserError(
            f"data.{key} has {total:.4g} clips (with repeats), fewer than train.global_batch {most}: "
            "add data, raise the source's repeats, or lower train.global_batch" + f" ({left_out})" * bool(left_out)
        )
    for row in rows:
        if row.steps * LONGEST_BATCH < 1:
            frames, height, width = row.name.split("x")
            raise UserError(
                f"data.buckets: an epoch draws {row.mean:.2g} clips for {width}×{height}×{frames}, so a batch of "
                f"{row.batch} takes {1 / row.steps:,.0f} epochs; raise its keep, or set 0"
            )


def permutation(length: int, seed: int, epoch: int, name: str) -> np.ndarray:
    """Return a permutation by sorting hashes: the stream of a numpy generator could change with its version."""
    numbers = np.arange(1, length + 1, dtype=np.uint64)
    return np.argsort(mix(state(seed, epoch, name) + numbers), kind="stable")
