"""Hold the samples of all sources as columns: what was found of each in; samples, made when looked at, out."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transpixeler.data.columns import Rows, Texts, TextWriter, decoded
from transpixeler.data.media.clip import Media
from transpixeler.data.sources.candidate import NOT_GIVEN, Features
from transpixeler.data.sources.plain import PlainRow

RGBA, FEATURES, LATENTS, BAD = 1, 2, 4, 8  # flags of a sample
MEDIA_KNOWN = 4096  # spelled once: files of a set are alike
AT_ONCE = 1 << 14  # records that are read together
END = "\0"  # between the parts of a record: no path holds it


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample's files in stream order; with `rgba` one file with alpha stands for both streams."""

    id: str
    paths: tuple[tuple[str, Path], ...]
    caption: str
    source: int
    rgba: bool
    media: Media
    features: Features = NOT_GIVEN  # with latents, `paths` are theirs


class Shape(NamedTuple):
    """Describe a sample as far as its bucket depends on it."""

    frames: int  # at the rate at which clips are cut
    height: int
    width: int
    image: bool


class Samples(Rows[Sample]):
    """Samples in the order of ids: names, a record of text for each, and what assigning a bucket looks at."""

    def __init__(
        self,
        ids: Texts,
        records: Texts,
        kinds: np.ndarray,
        shapes: Sequence[Shape],
        sources: np.ndarray,
        flags: np.ndarray,
        streams: Sequence[str],
    ) -> None:
        self.ids, self.records = ids, records
        self.kinds, self.shapes = kinds, shapes  # int32 [n], numbers of shapes; samples of one shape are alike
        self.sources, self.flags = sources, flags  # int16 [n], uint8 [n]
        self.streams = tuple(streams)

    @classmethod
    def of(cls, samples: Sequence[Sample], fps: Fraction) -> Samples:
        """Return samples as columns, in the order given."""
        if isinstance(samples, Samples):
            return samples
        written = SampleWriter(fps)
        for sample in samples:
            written.append(sample)
        return written.done()

    def __len__(self) -> int:
        return len(self.sources)

    def make(self, row: int) -> Sample:
        flags = int(self.flags[row])
        media, *paths, caption = self.records.make(row).split(END, len(self.streams) + 1)
        named, features = tuple(zip(self.streams, map(Path, paths))), NOT_GIVEN
        if flags & FEATURES:
            told, text, caption = caption.split(END, 2)
            features = Features(told, named if flags & LATENTS else (), Path(text) if text else None)
        source, rgba = int(self.sources[row]), bool(flags & RGBA)
        return Sample(self.ids.make(row), named, caption, source, rgba, _media(media), features)

    def caption(self, row: int) -> str:
        parts = len(self.streams) + (3 if int(self.flags[row]) & FEATURES else 1)
        return self.records.make(row).split(END, parts)[-1]

    def captions(self, rows: np.ndarray) -> Iterator[str]:
        """Yield the captions of some samples, by their numbers."""
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            featured, plain = (self.flags[some] & FEATURES) > 0, len(self.streams) + 1
            for record, more in zip(self.records.take(some).each(), featured.tolist()):
                yield decoded(record.split(b"\0", plain + 2 * more)[-1])

    def take(self, rows: np.ndarray) -> Samples:
        """Return some of the samples in the order of their numbers."""
        kept = self.ids.take(rows), self.records.take(rows)
        return Samples(*kept, self.kinds[rows], self.shapes, self.sources[rows], self.flags[rows], self.streams)

    def alike(self) -> Iterator[tuple[int, Shape, np.ndarray]]:
        """Yield the numbers of those samples that have one source and one shape, for each such pair."""
        pairs = self.kinds * (1 + int(self.sources.max(initial=0))) + self.sources
        counts = np.bincount(pairs)
        order = np.argsort(pairs, kind="stable")
        for rows in np.split(order, np.cumsum(counts[counts > 0])[:-1]) if len(order) else ():
            yield int(self.sources[rows[0]]), self.shapes[int(self.kinds[rows[0]])], rows

    @property
    def given(self) -> np.ndarray:
        """Return which samples' latents are taken from files, bool [n]."""
        return (self.flags & LATENTS) > 0


class SampleWriter:
    """Gather samples one by one. fps: the rate at which clips are cut."""

    def __init__(self, fps: Fraction) -> None:
        self.fps = fps
        self.ascending = True  # so far each id comes after the one before it
        self._last = ""
        self._ids, self._records = TextWriter(filed=True), TextWriter(filed=True)
        self._kinds, self._sources, self._flags = array("i"), array("h"), bytearray()
        self._shapes: dict[Shape, int] = {}
        self._streams: tuple[str, ...] = ()
        self._known: dict[int, tuple[Media, str, int]] = {}

    def append(self, sample: Sample) -> None:
        streams, features = tuple(stream for stream, _ in sample.paths), sample.features
        assert streams == (self._streams or streams), "all samples have the same streams"
        self._streams = streams
        _, media, kind = self._known.get(id(sample.media)) or self._spelled(sample.media)
        rest = (features.row, str(features.text or ""), sample.caption) if features else (sample.caption,)
        record = END.join((media, *(str(path) for _, path in sample.paths), *rest))
        flags = RGBA * sample.rgba + FEATURES * bool(features) + LATENTS * bool(features.latents)
        self._add(sample.id, record, kind, sample.source, flags)

    def append_plain(self, row: PlainRow, first: Media, source: int, *, rgba: bool) -> None:
        """Take a plain row. first: its first file."""
        self._streams = row.streams
        _, media, kind = self._known.get(id(first)) or self._spelled(first)
        self._add(row.id, END.join((media, *row.paths, row.caption)), kind, source, RGBA * rgba)

    def append_bad(self, name: str) -> None:
        """Take the name of a sample that cannot be used, which no other may have."""
        self._add(name, "", 0, 0, BAD)

    def _add(self, name: str, record: str, kind: int, source: int, flags: int) -> None:
        self.ascending = self.ascending and (name > self._last or not len(self._ids))
        self._last = name
        self._ids.append(name)
        self._records.append(record)
        self._kinds.append(kind)
        self._sources.append(source)
        self._flags.append(flags)

    def _spelled(self, media: Media) -> tuple[Media, str, int]:
        if len(self._known) >= MEDIA_KNOWN:
            self._known.clear()
        values = media.frames, media.height, media.width, media.fps, media.duration, int(media.alpha)
        shape = Shape(media.frames_at(self.fps), media.height, media.width, media.image)
        kind = self._shapes.setdefault(shape, len(self._shapes))
        known = self._known[id(media)] = media, " ".join(map(str, values)), kind  # kept, so that its id stays its own
        return known

    def done(self) -> Samples:
        """Return the samples in the order in which they came, bad ones included."""
        kinds, sources = np.frombuffer(self._kinds, np.int32), np.frombuffer(self._sources, np.int16)
        flags = np.frombuffer(self._flags, np.uint8)
        columns = kinds, tuple(self._shapes), sources, flags
        return Samples(self._ids.done(), self._records.done(), *columns, self._streams)


@lru_cache(maxsize=MEDIA_KNOWN)
def _media(told: str) -> Media:
    frames, height, width, fps, duration, alpha = told.split(" ")
    return Media(int(frames), int(height), int(width), Fraction(fps), Fraction(duration), alpha == "1")


def in_order(written: SampleWriter) -> tuple[Samples, list[str]]:
    """Return the samples that can be used, sorted by ids that are unique now, and the ids of the bad ones as they came.

    A video with two captions is two samples, `clip` and `clip~2`, unless that is a name too.
    """
    samples = written.done()
    bad = (samples.flags & BAD) > 0
    if written.ascending and not bad.any():
        return samples, []
    samples.ids = samples.ids.mapped()
    order, same = samples.ids.in_order()
    if same.any():
        again = np.flatnonzero(same)
        samples.ids = samples.ids.replaced(
            _new_names(samples.ids, {*order[again].tolist(), *order[again - 1].tolist()})
        )
        order, same = samples.ids.in_order()
        assert not same.any(), "two samples share an id"
    names = [samples.ids.make(row) for row in np.flatnonzero(bad).tolist()]
    found = samples.take(order[~bad[order]])
    found.ids = found.ids.filed()
    return found, names


def _new_names(names: Texts, shared: set[int]) -> dict[int, str]:
    """Return new names for those of several texts that are the same. shared: all that are like another."""
    may_be_new = {row for row in range(len(names)) if "~" in names.make(row)}
    taken: dict[str, int] = {}
    found: dict[int, str] = {}
    for row in sorted(shared | may_be_new):
        name = names.make(row)
        if (free := _free(name, taken)) != name:
            found[row] = free
    return found


def _free(name: str, taken: dict[str, int]) -> str:
    """Return a free id. `taken` holds the last number given to each id, so that none is tried twice."""
    free = name
    while free in taken:
        taken[name] += 1
        free = f"{name}~{taken[name]}"
    taken[free] = 1
    return free
