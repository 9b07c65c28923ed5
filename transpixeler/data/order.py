"""Order the clips: their buckets in; the global batches of each epoch, a pure function of (seed, epoch), out.

A bucket is an endless row of permutations, one for each epoch, cut into global batches. A batch that straddles two
epochs belongs to the earlier one: after N epochs every clip was seen at least N times, and nothing is padded.
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

    def places(self, epoch: int) -> int:
        """Count the places of the endless row that lie before an epoch."""
        return epoch * len(self.items)


@dataclass(frozen=True)
class Order:
    """The batches of every epoch; its whole state is (epoch, step)."""

    seed: int
    global_batch: int
    rows: tuple[Row, ...]

    def steps(self, epoch: int) -> int:
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """Count the steps in all epochs before this one."""
        return sum(self._first_batch(row, epoch) for row in self.rows)

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
        epoch = step * self.global_batch // sum(len(row.items) for row in self.rows)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        while self.first_step(epoch) > step:
            epoch -= 1
        return epoch, step - self.first_step(epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the items of each global batch [global_batch], from a step of the epoch on."""
        owned = [range(self._first_batch(row, epoch), self._first_batch(row, epoch + 1)) for row in self.rows]
        rows = np.repeat(np.arange(len(owned)), [len(batches) for batches in owned])
        numbers = np.concatenate([np.arange(batches.start, batches.stop) for batches in owned])
        permutations: dict[tuple[int, int], np.ndarray] = {}
        for place in permutation(len(rows), self.seed, epoch, "steps")[start:]:
            row = int(rows[place])
            yield self._items(row, int(numbers[place]), permutations)

    def _first_batch(self, row: Row, epoch: int) -> int:
        """Return the first batch of a row that belongs to an epoch: those that reach into it from before do not."""
        return -(-row.places(epoch) // self.global_batch)

    def _items(self, row: int, batch: int, permutations: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
        """Return batch k of a bucket: places k·G to (k+1)·G of its endless row."""
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
    """Group items by bucket; refuse a data set that cannot fill one step."""
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
    """Return a permutation by sorting hashes: the stream of a numpy generator could change with its version."""
    state = _mix(np.array([seed % 2**64], np.uint64))
    for word in (epoch, zlib.crc32(name.encode())):
        state = _mix(state ^ np.uint64(word))
    return np.argsort(_mix(state + np.arange(1, length + 1, dtype=np.uint64)), kind="stable")


def _mix(words: np.ndarray) -> np.ndarray:
    """Mix bits with the finaliser of splitmix64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
