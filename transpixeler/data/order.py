"""Which clips each step trains on: a pure function of (seed, epoch), the same for any number of ranks.

In: the clips' buckets. Out: for each epoch its global batches, in order. A bucket is an endless row of permutations,
one an epoch, cut into global batches: nothing is padded and nothing is dropped for ever, since what an epoch leaves
over opens the next one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from transpixeler.config import UserError


class Row(NamedTuple):
    """One bucket's items, each as often as it repeats."""

    name: str
    items: np.ndarray  # int64 [n], indices into the data set


@dataclass(frozen=True)
class Order:
    """The steps of every epoch; its whole state is (epoch, step)."""

    seed: int
    global_batch: int
    rows: tuple[Row, ...]

    def steps(self, epoch: int) -> int:
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """Steps in all epochs before this one."""
        return sum(epoch * len(row.items) // self.global_batch for row in self.rows)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step."""
        epoch = step * self.global_batch // sum(len(row.items) for row in self.rows)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        while self.first_step(epoch) > step:
            epoch -= 1
        return epoch, step - self.first_step(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Items of each global batch [global_batch], from a step of the epoch on."""
        owned = [range(*(e * len(row.items) // self.global_batch for e in (epoch, epoch + 1))) for row in self.rows]
        rows = np.repeat(np.arange(len(owned)), [len(batches) for batches in owned])
        numbers = np.concatenate([np.arange(batches.start, batches.stop) for batches in owned])
        permutations: dict[tuple[int, int], np.ndarray] = {}
        for place in permutation(len(rows), self.seed, epoch, "steps")[start:]:
            row = int(rows[place])
            yield self._items(row, int(numbers[place]), permutations)

    def _items(self, row: int, batch: int, permutations: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
        """Batch k of a bucket: places k·G to (k+1)·G of its endless row."""
        name, items = self.rows[row]
        pieces, place, end = [], batch * self.global_batch, (batch + 1) * self.global_batch
        while place < end:
            epoch, first = divmod(place, len(items))
            if (row, epoch) not in permutations:
                permutations[row, epoch] = permutation(len(items), self.seed, epoch, name)
            last = min(len(items), first + end - place)
            pieces.append(items[permutations[row, epoch][first:last]])
            place += last - first
        return np.concatenate(pieces)


def make_order(
    *, buckets: Sequence[tuple[int, ...]], repeats: Sequence[int], seed: int, global_batch: int, key: str = "train"
) -> Order:
    """Groups items by bucket; refuses a data set that cannot fill one step."""
    total = sum(repeats)
    if total < global_batch:
        raise UserError(
            f"data.{key} has {total} clips (with repeats), fewer than train.global_batch {global_batch}: "
            "add data, raise the source's repeats, or lower train.global_batch"
        )
    groups: dict[tuple[int, ...], list[int]] = {}
    for item, bucket in enumerate(buckets):
        groups.setdefault(tuple(bucket), []).extend([item] * repeats[item])
    rows = [Row("x".join(map(str, bucket)), np.array(groups[bucket], np.int64)) for bucket in sorted(groups)]
    return Order(seed, global_batch, tuple(rows))


def permutation(length: int, seed: int, epoch: int, name: str) -> np.ndarray:
    """Sorts hashes instead of drawing from a generator, whose stream could change with numpy's version."""
    state = _mix(np.array([seed % 2**64], np.uint64))
    for word in (epoch, zlib.crc32(name.encode())):
        state = _mix(state ^ np.uint64(word))
    return np.argsort(_mix(state + np.arange(1, length + 1, dtype=np.uint64)), kind="stable")


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
