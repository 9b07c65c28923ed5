"""List the work of encoding: what a config refers to in; jobs that lack records, and each rank's share of them, out.

Of clips that are drawn anew each epoch, only those count that the epochs of this run draw.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from transpixeler.config.sections import Config
from transpixeler.data.cache.index import KEY
from transpixeler.data.cache.records import Cache
from transpixeler.data.catalog import Catalog
from transpixeler.data.columns import Rows, come_first
from transpixeler.data.dataset import Dataset, training_order
from transpixeler.data.items import Item, Items, some_of
from transpixeler.data.jobs import ClipJob, Keys, TextJob
from transpixeler.data.order import Order
from transpixeler.data.shown import FieldJob

Job = TypeVar("Job", ClipJob, TextJob, FieldJob)
OWN, TEXT = ("latents", "own"), ("texts", "unseen")  # keys of what is made from frames, and from captions
Used = Mapping[str, np.ndarray]  # by set: which of its clips count, bool [n]
Absent = Callable[[np.ndarray], np.ndarray]
FIXED = -1  # in the place of a set: a text that is no clip's


@dataclass(frozen=True, eq=False)
class Lacking(Rows[Any]):
    """Jobs that lack records, made when they are asked for: ranks are sent their numbers alone."""

    sets: np.ndarray  # int8 [n], the number of each job's set
    clips: np.ndarray  # int32 [n], of its clip
    firsts: np.ndarray  # int16 [n], of its first key in the clip's run
    bits: np.ndarray  # uint64 [n], which of its keys have no record
    costs: np.ndarray  # int64 [n]
    given: np.ndarray  # bool [n]: taken from files
    found: Catalog | None = None  # each rank has its own

    def __len__(self) -> int:
        return len(self.clips)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": None}

    def take(self, rows: np.ndarray) -> Lacking:
        """Return some of the jobs in the order of their numbers, or those where `rows` is true."""
        arrays = {name: value[rows] for name, value in self.__dict__.items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)

    def _lacks(self, row: int, place: int) -> bool:
        return bool(int(self.bits[row]) >> place & 1)


class LackingClips(Lacking, Rows[ClipJob]):
    """Clips with parts to encode."""

    def make(self, row: int) -> ClipJob:
        assert self.found is not None
        jobs, clip = [*self.found.jobs.values()][int(self.sets[row])], int(self.clips[row])
        job, places = jobs.clip(clip), jobs.items.run(clip).places(OWN)
        keys = [(at, one) for at, one in zip(places, [*job.keys.items(), *job.shown_keys.items()], strict=True)]
        lacking = [one for at, one in keys if self._lacks(row, at)]
        own = {key for _, key in lacking}
        return replace(
            job,
            keys={part: key for part, key in job.keys.items() if key in own},
            shown_keys={place: key for place, key in job.shown_keys.items() if key in own},
        )


class LackingTexts(Lacking, Rows[TextJob]):
    """Captions with fields to encode."""

    def make(self, row: int) -> TextJob:
        assert self.found is not None
        number, which = int(self.sets[row]), int(self.clips[row])
        if number == FIXED:
            job = self.found.fixed[which]
        else:
            jobs = [*self.found.jobs.values()][number]
            job = jobs.texts(which)[int(self.firsts[row] != jobs.items.run(which).latents)]
        return replace(job, lacks=tuple(name for n, name in enumerate(job.keys) if self._lacks(row, n)))


@dataclass(frozen=True)
class Work:
    """The missing records of all ranks."""

    clips: Sequence[ClipJob] = ()
    texts: Sequence[TextJob] = ()
    fields: tuple[FieldJob, ...] = field(default=())
    copies: int = 0  # records that hosts without a common cache copy from each other

    def __bool__(self) -> bool:
        return bool(self.clips or self.texts or self.fields or self.copies)

    def __str__(self) -> str:
        """Say how much is to be encoded, how much is taken from features, and how much is copied to other hosts."""
        told = [self._made] if self.clips or self.texts or self.fields or not self.copies else []
        told += [f"copies {self.copies} records to hosts that lack them"] if self.copies else []
        return " and ".join(told)

    @property
    def _made(self) -> str:
        files = len(given(self.clips)), len(given(self.texts))
        clips, texts = len(self.clips) - files[0], len(self.texts) - files[1]
        taken = f"takes {files[0]} clips and {files[1]} captions from features"
        if clips or texts or self.fields or not any(files):
            return f"encodes {clips} clips and {texts} captions{f' and {taken}' * any(files)}"
        return taken

    def on(self, found: Catalog) -> Work:
        """Return the same on a rank, with its own catalog."""
        return Work(_on(self.clips, found), _on(self.texts, found), self.fields)


def _on(jobs: Sequence[Job], found: Catalog) -> Sequence[Job]:
    return replace(jobs, found=found) if isinstance(jobs, Lacking) else jobs


def given(jobs: Sequence[Job], wanted: bool = True) -> Sequence[Job]:
    """Return the jobs that are taken from files, or those that are not."""
    if isinstance(jobs, Lacking):
        return jobs.take(jobs.given == wanted)
    return [job for job in jobs if not isinstance(job, FieldJob) and job.given == wanted]


def missing_work(
    found: Catalog, *, used: Used | None = None, without: Container[Keys] = (), elsewhere: Container[bytes] = ()
) -> Work:
    """Return the jobs that lack a record. used: of the clips that count, all by default; elsewhere: keys of no need."""
    cache = Cache(*found.folders)

    def absent(keys: np.ndarray) -> np.ndarray:
        lacking = cache.absent(keys)
        places = np.flatnonzero(lacking) if elsewhere else ()
        lacking[[place for place in places if keys[place].tobytes() in elsewhere]] = False
        return lacking

    used = used or {name: np.ones(len(items), bool) for name, items in found.items.items()}
    shown = {key for name, items in found.items.items() for key in _blank_keys(items, used[name])}
    fields = tuple(job for job in found.fields if job.pictures or job.key in shown)
    lacking = absent(np.frombuffer(b"".join(job.key for job in fields), KEY))
    some = tuple(job for job, lacks in zip(fields, lacking, strict=True) if lacks)
    return Work(_clips(found, used, without, absent), _texts(found, used, without, absent), some).on(found)


def _blank_keys(items: Items, used: np.ndarray) -> set[bytes]:
    return {key for number in np.unique(items.clips.numbers[used]).tolist() for _, key in items.runs[number].blank}


def _clips(found: Catalog, used: Used, without: Container[Keys], absent: Absent) -> LackingClips:
    """Return the clips that lack a record; the same content twice is encoded once."""
    parts = []
    for number, (name, items) in enumerate(found.items.items()):
        rows, places = items.cells(OWN)
        keys = items.keys[items.starts[rows] + places]
        lacks = absent(keys) & used[name][rows]
        if without:
            bad = [row for row in np.unique(rows[lacks]).tolist() if items[row].latent_keys in without]
            lacks &= ~np.isin(rows, bad)
        parts.append((np.full(lacks.sum(), number, np.int8), rows[lacks], places[lacks], keys[lacks]))
    sets, rows, places, keys = map(np.concatenate, zip(*parts))
    first = come_first(keys)
    sets, rows, places = sets[first], rows[first], places[first]
    starts = np.flatnonzero(np.append(True, (np.diff(rows) != 0) | (np.diff(sets) != 0))[: len(rows)])
    bits = np.uint64(1) << places.astype(np.uint64)
    bits = np.bitwise_or.reduceat(bits, starts) if len(starts) else bits
    counts = np.diff(np.append(starts, len(rows)))
    sets, rows = sets[starts], rows[starts]
    every = [*found.items.values()]
    pixels, given = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for number, items in enumerate(every):
        here, clips = sets == number, items.clips
        sizes = np.array([np.prod(bucket) for bucket in clips.offered], np.int64)
        pixels[here] = sizes[clips.numbers[rows[here]]] if len(sizes) else 0
        given[here] = clips.samples.given[clips.owners[rows[here]]]
    return LackingClips(sets, rows, np.zeros(len(rows), np.int16), bits, pixels * counts, given)


def _texts(found: Catalog, used: Used, without: Container[Keys], absent: Absent) -> LackingTexts:
    """Return the captions that lack a record, each once; first those that are no clip's."""
    fields = len(found.fixed[0].keys)
    fixed = np.frombuffer(b"".join(b"".join(job.all_keys) for job in found.fixed), KEY)
    numbers = np.arange(len(found.fixed), dtype=np.int32)
    parts = [(np.full(len(numbers), FIXED, np.int8), numbers, np.zeros(len(numbers), np.int32), fixed)]
    for number, (name, items) in enumerate(found.items.items()):
        rows, places = items.cells(TEXT)
        keep = used[name][rows]
        rows, places = rows[keep], places[keep]
        keys = items.keys[items.starts[rows] + places]
        parts.append((np.full(len(rows) // fields, number, np.int8), rows[::fields], places[::fields], keys))
    sets, rows, places, keys = map(np.concatenate, zip(*parts))
    lacks = absent(keys).reshape(-1, fields)
    whole = np.frombuffer(keys.tobytes(), f"V{KEY.itemsize * fields}")
    kept = np.flatnonzero(lacks.any(1) & come_first(whole))
    if without:
        told = keys.reshape(-1, fields)
        kept = np.array([row for row in kept if tuple(told[row].tolist()) not in without], int)
    bits = (lacks[kept].astype(np.uint64) << np.arange(fields, dtype=np.uint64)).sum(1, dtype=np.uint64)
    nothing = np.zeros(len(kept), np.int64)
    made = LackingTexts(sets[kept], rows[kept], places[kept], bits, nothing, nothing > 0, found)
    costs = np.fromiter((job.cost for job in made), np.int64, len(kept))
    return replace(made, costs=costs, given=np.fromiter((job.given for job in made), bool, len(kept)))


def folders_by_key(found: Catalog, own: Mapping[Path, Path], used: Used | None = None) -> dict[bytes, Path]:
    """Return the cache folder of each record on this rank. own: its folders, by those of the catalog."""
    places = {job.key: own[job.folder] for job in found.fields}
    places |= {key: own[job.folder] for job in found.fixed for key in job.all_keys}
    for name, jobs in found.jobs.items():
        items = jobs.items if used is None else jobs.items.take(used[name])
        rows, at = items.cells((*OWN, *TEXT))
        sources = items.clips.samples.sources[items.clips.owners[rows]]
        keys = items.keys[items.starts[rows] + at].tolist()
        places |= {key: own[jobs.folders[source]] for key, source in zip(keys, sources.tolist())}
    return places


def share(jobs: Sequence[Job], *, rank: int, ranks: int) -> Sequence[Job]:
    """Return a rank's jobs, largest first: each job goes to the rank with the least to do, in order of size."""
    costs = jobs.costs if isinstance(jobs, Lacking) else np.array([job.cost for job in jobs], np.int64)
    loads = [(0, number) for number in range(ranks)]
    mine = []
    for place in np.argsort(-costs, kind="stable").tolist():
        load, number = heapq.heappop(loads)
        if number == rank:
            mine.append(place)
        heapq.heappush(loads, (load + int(costs[place]), number))
    return jobs.take(np.array(mine, int)) if isinstance(jobs, Lacking) else [jobs[place] for place in mine]


def clips_used(config: Config, data: Dataset, order: Order | None = None) -> Sequence[Item]:
    """Return those of the clips that are trained on which this run takes. order: theirs, where it is made already."""
    return some_of(data.items, which_used(config, data, order))


def which_used(config: Config, data: Dataset, order: Order | None = None) -> np.ndarray:
    """Return which of the clips that are trained on this run takes, bool [n]. order: as of `clips_used`."""
    if config.data.draw == "once" or not data.items:
        return np.ones(len(data.items), bool)
    order = order or training_order(config, data)
    return order.used(order.total(config.train), len(data.items))
