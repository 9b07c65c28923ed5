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
from collections.abc import Sequence

import numpy as np

from transpixeler.config.sections import BucketRule
from transpixeler.data.buckets import Bucket, rule_for

NOWHERE = -1


class Draws:
    """Decide for clips whether an epoch takes them; those of one owner and one bucket are taken together.

    owners: of each clip, the sample that it is cut from (or one repeat of it).
    """

    def __init__(
        self, owners: Sequence[str], buckets: Sequence[Bucket], *, rules: Sequence[BucketRule], seed: int
    ) -> None:
        self.seed = seed
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        self._owners = np.array([numbers[owner] for owner in owners], np.int64)
        offered: dict[str, set[Bucket]] = {owner: set() for owner in numbers}
        for owner, bucket in zip(owners, buckets):
            offered[owner].add(bucket)
        ways = {owner: in_order(some) for owner, some in offered.items()}
        places = {owner: {bucket: place for place, bucket in enumerate(some)} for owner, some in ways.items()}
        self._places = np.array([places[owner][bucket] for owner, bucket in zip(owners, buckets)], np.int64)
        self._ways = _Ways(ways, rules)
        self._lock = threading.Lock()  # the loader's thread and the loop ask at the same time
        self._last: tuple[int, np.ndarray] = (NOWHERE, np.zeros(0, bool))

    def taken(self, epoch: int) -> np.ndarray:
        """Return for each clip whether an epoch takes it."""
        with self._lock:
            if self._last[0] != epoch:
                self._last = epoch, self._ways.choose(self.seed, epoch)[self._owners] == self._places
            return self._last[1]

    def chances(self) -> np.ndarray:
        """Return for each clip the share of epochs that take it; 0 where a sample only leaves from."""
        return self._ways.chances()[self._owners, self._places]


def in_order(buckets: set[Bucket]) -> list[Bucket]:
    """Return the buckets of one sample as they are tried: larger resolutions first, in each the longest first."""
    return sorted(buckets, key=lambda it: (it.height * it.width, it.height, it.frames), reverse=True)


class _Ways:
    """The buckets that each owner tries in turn, as arrays [owners, tries]."""

    def __init__(self, ways: dict[str, list[Bucket]], rules: Sequence[BucketRule]) -> None:
        self.shape = len(ways), max(map(len, ways.values()), default=0)
        self.keys = np.zeros(self.shape, np.uint64)
        self.stays, self.keeps = np.zeros(self.shape), np.zeros(self.shape)  # 0 where there is no bucket
        self.resolutions = np.zeros(self.shape, np.int64)
        known: dict[Bucket, BucketRule] = {}
        for row, (owner, buckets) in enumerate(ways.items()):
            number, before = 0, None
            for column, bucket in enumerate(buckets):
                rule = known.setdefault(bucket, rule_for(bucket, rules))
                number += bucket[1:] != before
                before = bucket[1:]
                self.keys[row, column] = _key(owner, bucket)
                self.stays[row, column], self.keeps[row, column] = rule.keep, rule.keep_resolution
                self.resolutions[row, column] = number

    def choose(self, seed: int, epoch: int) -> np.ndarray:
        """Return the try at which each owner stays, or NOWHERE."""
        chosen, left = np.full(self.shape[0], NOWHERE), np.zeros(self.shape[0], np.int64)
        for column in range(self.shape[1]):
            keys, resolution = self.keys[:, column], self.resolutions[:, column]
            open_ = (chosen == NOWHERE) & (left != resolution)
            open_ &= uniform(keys, seed, epoch, "length") < self.stays[:, column]
            stays = open_ & (uniform(keys, seed, epoch, "resolution") < self.keeps[:, column])
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
            there = here * self.stays[:, column]
            found[:, column] = there * self.keeps[:, column]
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


def _key(owner: str, bucket: Bucket) -> int:
    content = f"{owner}\0{tuple(bucket)}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
