"""Keep many values of one kind as columns: texts in one run of bytes, rows that are made only when they are looked at.

A million Python objects take hundreds of bytes each, and seconds to copy to another process; columns take neither.
"""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np

Row = TypeVar("Row")
HELD_BYTES = 1 << 20  # of texts that a writer keeps before it uses its file
WORD = 8  # bytes that are compared at a time
COMPARED = 1 << 14  # texts whose bytes are gathered at a time
READ_ROOM = 1 << 16  # bytes between texts that are read with them, whatever their size


class Rows(Sequence[Row], Generic[Row]):
    """A sequence whose rows are made when they are asked for; equal to any sequence of equal rows."""

    @abstractmethod
    def make(self, row: int) -> Row:
        """Return a row by its number from 0."""

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, row: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(row, slice):
            return tuple(map(self.make, range(*row.indices(len(self)))))
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self.make(row % len(self))

    def __iter__(self) -> Iterator[Row]:
        return map(self.make, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  as of a list


class Store(Protocol):
    """Bytes in memory, in a mapped file, or in a file that is read where it is asked."""

    def read(self, first: int, size: int) -> bytes: ...

    def held(self) -> Held: ...


class Held:
    """Bytes of an array, which may be a mapped file's."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data  # uint8 [n]

    def read(self, first: int, size: int) -> bytes:
        return self.data[first : first + size].tobytes()

    def held(self) -> Held:
        return self


class Filed:
    """Bytes of an open file, read without a mapping: what was read does not count as this process's memory.

    start, size: of those that count; by default all.
    """

    def __init__(self, file: Any, start: int = 0, size: int | None = None) -> None:
        self._file, self._start = file.fileno(), start
        self._open = file  # closed with this
        self._size = os.fstat(self._file).st_size - start if size is None else size

    def read(self, first: int, size: int) -> bytes:
        return os.pread(self._file, size, self._start + first)

    def held(self) -> Held:
        some = np.memmap(self._open, np.uint8, "r", self._start, (self._size,)) if self._size else np.zeros(0, np.uint8)
        return Held(np.asarray(some))

    def __reduce__(self) -> tuple[type[Held], tuple[np.ndarray]]:
        return Held, (self.held().data,)


class Texts(Rows[str]):
    """Texts in one store, each by where it begins and how long it is."""

    def __init__(self, store: Store, firsts: np.ndarray, sizes: np.ndarray) -> None:
        self.store, self.firsts, self.sizes = store, firsts, sizes  # int64 [n], int32 [n] in bytes

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        written = TextWriter()
        for text in texts:
            written.append(text)
        return written.done()

    def __len__(self) -> int:
        return len(self.firsts)

    def make(self, row: int) -> str:
        return decoded(self.store.read(int(self.firsts[row]), int(self.sizes[row])))

    def __iter__(self) -> Iterator[str]:
        return map(decoded, self.each())

    def each(self) -> Iterator[bytes]:
        """Yield the bytes of each text; those that lie together are read together."""
        for start in range(0, len(self), COMPARED):
            firsts, sizes = self.firsts[start : start + COMPARED], self.sizes[start : start + COMPARED]
            low, high = int(firsts.min()), int((firsts + sizes).max())
            if high - low > READ_ROOM + 2 * int(sizes.sum(dtype=np.int64)):
                yield from map(self.store.read, firsts.tolist(), sizes.tolist())
                continue
            data = self.store.read(low, high - low)
            yield from (data[first : first + size] for first, size in zip((firsts - low).tolist(), sizes.tolist()))

    def take(self, rows: np.ndarray) -> Texts:
        """Return some of the texts in the order of their numbers; the bytes stay where they are."""
        return Texts(self.store, self.firsts[rows], self.sizes[rows])

    def replaced(self, new: Mapping[int, str]) -> Texts:
        """Return the same texts with new ones in the place of some, by their numbers."""
        assert isinstance(self.store, Held), "texts are changed in memory"
        rows, added = np.array([*new], np.int64), Texts.of(new.values())
        data = np.concatenate([self.store.data, np.frombuffer(b"".join(map(encoded, new.values())), np.uint8)])
        firsts, sizes = self.firsts.copy(), self.sizes.copy()
        firsts[rows], sizes[rows] = added.firsts + len(self.store.data), added.sizes
        return Texts(Held(data), firsts, sizes)

    def mapped(self) -> Texts:
        """Return the same texts in memory, or in a mapped file, so that they can be put in order."""
        return self if isinstance(self.store, Held) else Texts(self.store.held(), self.firsts, self.sizes)

    def filed(self) -> Texts:
        """Return the same texts, kept in a file without a name where they are large."""
        if not isinstance(self.store, Held) or self.store.data.nbytes < HELD_BYTES:
            return self
        file = tempfile.TemporaryFile()  # noqa: SIM115  closed with what reads it
        file.write(self.store.data.data)
        file.flush()
        return Texts(Filed(file), self.firsts, self.sizes)

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of all texts one after another, uint8, and where each ends, int64 [n]."""
        ends = np.cumsum(self.sizes, dtype=np.int64)
        out, first = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8), 0
        for data in self.each():
            out[first : first + len(data)] = np.frombuffer(data, np.uint8)
            first += len(data)
        return out, ends

    @classmethod
    def unpacked(cls, data: np.ndarray, ends: np.ndarray) -> Texts:
        """Return texts that `packed` has laid down."""
        sizes = np.diff(ends, prepend=0)
        return cls(Held(data), ends - sizes, sizes.astype(np.int32))

    def in_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the texts, sorted as Python sorts them, and which equal the one before them."""
        order, same = np.arange(len(self), dtype=np.int32), np.zeros(len(self), bool)
        place = np.zeros(len(self), np.int32)  # in `order`: where those begin that are equal so far
        unsettled = order.copy()  # places in `order` whose texts have equals so far
        depth = 0
        while len(unsettled):
            some = order[unsettled]
            word, left = self._words(some, depth)
            within = np.lexsort((left, word, place[unsettled]))
            order[unsettled] = some[within]
            word, left, group = word[within], left[within], place[unsettled][within]
            new = np.ones(len(unsettled), bool)
            new[1:] = (word[1:] != word[:-1]) | (left[1:] != left[:-1]) | (group[1:] != group[:-1])
            starts = np.flatnonzero(new)
            place[unsettled] = unsettled[starts[np.cumsum(new) - 1]]
            ended = left < WORD  # equal to the last byte
            same[unsettled[~new & ended]] = True
            several = ~new | ~np.append(new[1:], True)
            unsettled, depth = unsettled[several & ~ended], depth + WORD
        return order, same

    def _words(self, rows: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of each text from a depth on as numbers that compare alike, and how many these are."""
        left = np.clip(self.sizes[rows] - depth, 0, WORD).astype(np.int8)
        assert isinstance(self.store, Held), "texts are put in order in memory"
        data, word = self.store.data, np.zeros((len(rows), WORD), np.uint8)
        for start in range(0, len(rows), COMPARED):
            some = slice(start, start + COMPARED)
            firsts = self.firsts[rows[some]] + depth
            for byte in range(WORD):
                there = left[some] > byte
                word[some][there, byte] = data[firsts[there] + byte]
        return word.view(">u8")[:, 0], left


class TextWriter:
    """Gather texts one by one. filed: those beyond a size go to a file without a name, in the folder for such."""

    def __init__(self, *, filed: bool = False) -> None:
        self._filed, self._file = filed, None
        self._held, self._sizes = bytearray(), array("i")

    def append(self, text: str) -> None:
        data = encoded(text)
        self._held += data
        self._sizes.append(len(data))
        if self._filed and len(self._held) > HELD_BYTES:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  closed with what reads it
            self._file.write(self._held)
            self._held.clear()

    def __len__(self) -> int:
        return len(self._sizes)

    def done(self) -> Texts:
        """Return the texts; nothing is appended any more."""
        sizes = np.frombuffer(self._sizes, np.int32)
        firsts = np.cumsum(sizes, dtype=np.int64)
        firsts -= sizes
        if self._file is None:
            return Texts(Held(np.frombuffer(self._held, np.uint8)), firsts, sizes)
        self._file.write(self._held)
        self._file.flush()
        return Texts(Filed(self._file), firsts, sizes)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def spread(kinds: np.ndarray, values: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Give each row the values of its kind: the rows' numbers and the values, int32 [n], row after row."""
    counts = np.array([len(some) for some in values], np.int64)
    flat = np.array([one for some in values for one in some], np.int32)
    size = int(np.dot(np.bincount(kinds, minlength=len(counts)), counts)) if len(kinds) else 0
    owners, found, first = np.empty(size, np.int32), np.empty(size, np.int32), 0
    for start in range(0, len(kinds) if size else 0, COMPARED):  # some at a time, as all take much memory
        some = kinds[start : start + COMPARED]
        each, begins = counts[some], (np.cumsum(counts) - counts)[some]
        places = np.arange(first, first + int(each.sum()))
        owners[places] = np.repeat(np.arange(start, start + len(some), dtype=np.int32), each)
        found[places] = flat[places - first + np.repeat(begins - np.cumsum(each) + each, each)]
        first += len(places)
    return owners, found


def come_first(values: np.ndarray) -> np.ndarray:
    """Return which values, bytes [n], no earlier one is like, bool [n]."""
    found = np.zeros(len(values), bool)
    found[np.unique(values, return_index=True)[1]] = True
    return found
