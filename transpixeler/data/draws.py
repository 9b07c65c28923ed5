"""Draw for each epoch anew which bucket a sample goes to: samples and their buckets in; what is taken in an epoch out.

A sample begins at its largest resolution with the longest bucket that it fills. By the bucket's `keep` it stays at that
length, otherwise it goes on to the next shorter; by `keep_resolution` it then stays at the resolution, otherwise it
goes on to the next smaller. It is in one bucket at most; a sample that stays nowhere sits the epoch out. All are pure
functions of (seed, epoch, sample, bucket).
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from transpixeler.config.sections import BucketRule
from transpixeler.data.buckets import Bucket, rule_for
from transpixeler.data.items import Coded, coded

NOWHERE = -1


class Draws:
    """Decide for clips whether an epoch takes them; those of one owner and one bucket are taken together.

    owners: of each clip, the number of the sample that it is cut from (or of one repeat of it), int [n].
    names: of the owners, in the order of their numbers. buckets: of the clips.
    """

    def __init__(
        self, owners: np.ndarray, names: Iterable[str], buckets: Coded, *, rules: Sequence[BucketRule], seed: int
    ) -> None:
        self.seed, self._owners = seed, owners
        self._ways = _Ways(owners, names, buckets, rules)
        self._places = self._ways.places
        self._lock = threading.Lock()  # the loader's thread and the loop ask at the same time
        self._last: tuple[int, np.ndarray] = (NOWHERE, np.zeros(0, bool))

    @classmethod
    def of(cls, owners: Sequence[str], buckets: Sequence[Bucket], *, rules: Sequence[BucketRule], seed: int) -> Draws:
        """Draw for clips by the names of their owners."""
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        mine = np.array([numbers[owner] for owner in owners], np.int64)
        return cls(mine, numbers, coded(buckets), rules=rules, seed=seed)

    def taken(self, epoch: int) -> np.ndarray:
        """Return for each clip whether an epoch takes it."""
        with self._lock:
            if self._last[0] != epoch:
                self._last = epoch, self._ways.choose(self.seed, epoch)[self._owners] == self._places
            return self._last[1]

    def chances(self) -> np.ndarray:
        """Return for each clip the share of epochs that take it; 0 where a sample only leaves from."""
        return self._ways.chances()[self._owners, self._places]


def in_order(buckets: Iterable[tuple[int, ...]]) -> list[Bucket]:
    """Return the buckets of one sample as they are tried: larger resolutions first, in each the longest first."""
    every = (Bucket(*bucket) for bucket in buckets)
    return sorted(every, key=lambda it: (it.height * it.width, it.height, it.frames), reverse=True)


class _Ways:
    """The buckets that each owner tries in turn, as arrays [owners, tries]."""

    def __init__(self, owners: np.ndarray, names: Iterable[str], buckets: Coded, rules: Sequence[BucketRule]) -> None:
        tried = in_order(buckets.offered)
        rank = np.array([tried.index(Bucket(*bucket)) for bucket in buckets.offered], np.int64)
        numbers = owners.astype(np.int64) * len(tried) + rank[buckets.numbers] if tried else owners.astype(np.int64)
        pairs, each = np.unique(numbers, return_inverse=True)  # an owner and a bucket, in the order of tries
        holders, ranks = np.divmod(pairs, max(1, len(tried)))
        begins = np.append(True, holders[1:] != holders[:-1])[: len(pairs)]
        firsts = np.flatnonzero(begins)
        columns = np.arange(len(pairs)) - np.repeat(firsts, np.diff(np.append(firsts, len(pairs))))
        self.places = columns[each].astype(np.int16)  # of each clip, among its owner's tries
        self.shape = int(holders.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1
        self.keys, self._ranks = np.zeros(self.shape, np.uint64), np.full(self.shape, len(tried), np.int16)
        self.resolutions = np.zeros(self.shape, np.int16)
        self.keys[holders, columns] = _keys(names, holders, ranks, tried)
        self._ranks[holders, columns] = ranks
        sizes = np.array([one == 0 or tried[one][1:] != tried[one - 1][1:] for one in range(len(tried))], int).cumsum()
        new = begins | np.append(True, sizes[ranks[1:]] != sizes[ranks[:-1]])[: len(pairs)]
        counted = np.cumsum(new)
        self.resolutions[holders, columns] = counted - np.repeat(
            counted[firsts] - 1, np.diff(np.append(firsts, len(pairs)))
        )
        found = [rule_for(bucket, rules) for bucket in tried]
        self._stays = np.array([*(rule.keep for rule in found), 0.0])  # 0 where there is no bucket
        self._keeps = np.array([*(rule.keep_resolution for rule in found), 0.0])

    def stays(self, column: int) -> np.ndarray:
        """Return the chance to stay at the length of a try, by owner."""
        return self._stays[self._ranks[:, column]]

    def keeps(self, column: int) -> np.ndarray:
        """Return the chance to stay at the resolution of a try, by owner."""
        return self._keeps[self._ranks[:, column]]

    def choose(self, seed: int, epoch: int) -> np.ndarray:
        """Return the try at which each owner stays, or NOWHERE."""
        chosen, left = np.full(self.shape[0], NOWHERE), np.zeros(self.shape[0], np.int64)
        for column in range(self.shape[1]):
            keys, resolution = self.keys[:, column], self.resolutions[:, column]
            open_ = (chosen == NOWHERE) & (left != resolution)
            open_ &= uniform(keys, seed, epoch, "length") < self.stays(column)
            stays = open_ & (uniform(keys, seed, epoch, "resolution") < self.keeps(column))
            chosen[stays] = column
            left = np.where(open_ & ~stays, resolution, left)
        return chosen

    def chances(self) -> np.ndarray:
        """Return the chance of each try."""
        found = np.zeros(self.shape)
        here = np.ones(self.shape[0])  # the chance to come to this try
        later = np.zeros(self.shape[0])  # of having left its resolution, to go on at the next
        for column in range(self.shape[1]):
            if column:
                new = self.resolutions[:, column] != self.resolutions[:, column - 1]
                here, later = np.where(new, here + later, here), np.where(new, 0.0, later)
            there = here * self.stays(column)
            found[:, column] = there * self.keeps(column)
            here, later = here - there, later + there - found[:, column]
        return found


def uniform(keys: np.ndarray, seed: int, epoch: int, name: str) -> np.ndarray:
    """Draw from [0, 1) for each key [n] of 64 bits: the same on every machine and in every version."""
    return (mix(state(seed, epoch, name) ^ keys) >> np.uint64(11)) * 2.0**-53


def state(seed: int, epoch: int, name: str) -> np.ndarray:
    """Return 64 bits that stand for one use of a seed in an epoch."""
    found = mix(np.array([seed % 2**64], np.uint64))
    for word in (epoch, zlib.crc32(name.encode())):
        found = mix(found ^ np.uint64(word))
    return found


def mix(words: np.ndarray) -> np.ndarray:
    """Mix bits with the finaliser of splitmix64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(names: Iterable[str], holders: np.ndarray, ranks: np.ndarray, tried: Sequence[Bucket]) -> np.ndarray:
    """Return 64 bits for each pair of an owner and a bucket, uint64 [n]. holders, ranks: their numbers, in order."""
    tails, found, place = [f"\0{tuple(bucket)}".encode() for bucket in tried], bytearray(), 0
    counts = np.bincount(holders).tolist() if len(holders) else []
    for name, count in zip(names, counts):
        head = name.encode("utf-8", "surrogateescape") if count else b""
        for rank in ranks[place : place + count].tolist():
            found += hashlib.blake2b(head + tails[rank], digest_size=8).digest()
        place += count
    assert place == len(holders), "every owner has a name"
    return np.frombuffer(found, ">u8").astype(np.uint64)
