"""List the work of encoding: what a config refers to in; jobs that lack records, and each rank's share of them, out.

Of clips that are drawn anew each epoch, only those count that the epochs of this run draw.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transpixeler.config.sections import Config
from transpixeler.data.cache.records import Cache
from transpixeler.data.catalog import Catalog, ClipJob, Keys, TextJob
from transpixeler.data.dataset import Dataset, training_order
from transpixeler.data.items import Item, some_of
from transpixeler.data.order import Order
from transpixeler.data.shown import BlankJob

Job = TypeVar("Job", ClipJob, TextJob, BlankJob)


@dataclass(frozen=True)
class Work:
    """The missing records of all ranks."""

    clips: tuple[ClipJob, ...]
    texts: tuple[TextJob, ...]
    blanks: tuple[BlankJob, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.clips or self.texts or self.blanks)

    def __str__(self) -> str:
        """Say how much is to be encoded, and how much is taken from features."""
        clips, texts = (sum(not job.given for job in jobs) for jobs in (self.clips, self.texts))
        given = len(self.clips) - clips, len(self.texts) - texts
        taken = f"takes {given[0]} clips and {given[1]} captions from features"
        if clips or texts or self.blanks or not any(given):
            return f"encodes {clips} clips and {texts} captions{f' and {taken}' * any(given)}"
        return taken


def missing_work(found: Catalog, *, without: Container[Keys] = (), elsewhere: Container[bytes] = ()) -> Work:
    """Return the jobs that lack a record, each with only the parts that lack one. elsewhere: keys of no need."""
    cache = Cache(*found.folders)
    jobs = [job for job in found.clips if job.latent_keys not in without]

    def missing(keys: Sequence[bytes]) -> set[bytes]:
        return {key for key in cache.missing(keys) if key not in elsewhere}

    absent = missing([key for job in jobs for key in (*job.keys.values(), *job.shown_keys.values())])
    clips: list[ClipJob] = []
    for job in jobs:
        keys = {part: key for part, key in job.keys.items() if key in absent}
        shown = {place: key for place, key in job.shown_keys.items() if key in absent}
        absent.difference_update(keys.values(), shown.values())  # the same content twice is encoded once
        if keys or shown:
            clips.append(replace(job, keys=keys, shown_keys=shown))
    texts = missing([key for job in found.texts for key in job.all_keys])
    blanks = missing([job.key for job in found.blanks])
    wanted = (job for job in found.texts if not texts.isdisjoint(job.all_keys) and job.all_keys not in without)
    return Work(
        tuple(clips),
        tuple(replace(job, lacks=tuple(n for n, key in job.keys.items() if key in texts)) for job in wanted),
        tuple(job for job in found.blanks if job.key in blanks),
    )


def folders_by_key(found: Catalog, own: Mapping[Path, Path]) -> dict[bytes, Path]:
    """Return the cache folder of each record on this rank. own: its folders, by those of the catalog."""
    places = {job.key: own[job.folder] for job in found.blanks}
    for text in found.texts:
        places |= dict.fromkeys(text.all_keys, own[text.folder])
    for clip in found.clips:
        places |= dict.fromkeys([*clip.keys.values(), *clip.shown_keys.values()], own[clip.folder])
    return places


def share(jobs: Sequence[Job], *, rank: int, ranks: int) -> list[Job]:
    """Return a rank's jobs, largest first: each job goes to the rank with the least to do, in order of size."""
    loads = [(0, number) for number in range(ranks)]
    mine = []
    for job in sorted(jobs, key=lambda job: -job.cost):
        load, number = heapq.heappop(loads)
        if number == rank:
            mine.append(job)
        heapq.heappush(loads, (load + job.cost, number))
    return mine


def clips_used(config: Config, data: Dataset, order: Order | None = None) -> Sequence[Item]:
    """Return those of the clips that are trained on which this run takes. order: theirs, where it is made already."""
    if config.data.draw == "once" or not data.items:
        return data.items
    order = order or training_order(config, data)
    used = order.used(order.total(config.train), len(data.items))
    return some_of(data.items, used)


def only(found: Catalog, items: Iterable[Item]) -> Catalog:
    """Return a catalog with the jobs that some clips need, and those that need no clip."""
    kept = list(items)
    latents = {item.latent_keys for item in kept}
    texts = {keys for item in kept for keys in (item.text_keys, item.unseen_text_keys)}
    texts |= {found.empty_text_keys, *found.prompts.values()}
    blanks = {key for item in kept if item.shown for key in item.shown.blank.values()}
    return replace(
        found,
        clips=tuple(job for job in found.clips if job.latent_keys in latents),
        texts=tuple(job for job in found.texts if job.all_keys in texts),
        blanks=tuple(job for job in found.blanks if job.key in blanks),
    )
