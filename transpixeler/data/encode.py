"""Encode what the cache lacks: a config in; data sets whose records are all in the cache out. On one rank or many.

Rank 0 reads the sources and lists what is missing; every rank takes a share by cost, decodes ahead in threads while the
device encodes, and writes to files of its own. The VAE is freed before the text encoder is loaded; neither is loaded
when nothing is missing. Videos are encoded one at a time: in a batch, last bits would depend on the neighbours.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transpixeler.config.sections import Config, UserError
from transpixeler.data.cache.records import DTYPE, Cache, CacheWriter, Record
from transpixeler.data.catalog import Catalog, cache_folders, catalog, own_folders
from transpixeler.data.dataset import Dataset, Datasets
from transpixeler.data.features.needs import Needs
from transpixeler.data.features.take import take
from transpixeler.data.hosts import Hosts, find_hosts
from transpixeler.data.items import RECORDS, Items
from transpixeler.data.jobs import ClipJob, Keys, TextJob
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.parts import Part, encode_part, part_shape
from transpixeler.data.progress import Progress
from transpixeler.data.ranks import Ranks, connected, portable
from transpixeler.data.sharing import shared
from transpixeler.data.shown import Encoders, FieldJob, encode_all_shown, encode_field
from transpixeler.data.sources.pairs import decode_pair
from transpixeler.data.texts import encode_texts
from transpixeler.data.work import Used, Work, clips_used, folders_by_key, given, missing_work, share, which_used
from transpixeler.flow.tasks import all_beside
from transpixeler.models.family import ModelFolder
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")
DECODERS = 4  # clips that a rank decodes at a time
KINDS_SHOWN = 10  # kinds of reasons for skipping that the summary lists


@dataclass
class Outcome:
    """The result of one rank's share."""

    bad: dict[Keys, str] = field(default_factory=dict)  # why a clip with these latents cannot be used
    bytes: int = 0
    records: int = 0
    taken: int = 0  # of these, from features
    fault: Exception | None = None


def encode_missing(config: Config, model: ModelFolder, runtime: Runtime) -> Datasets:
    """Return the train and eval sets of a config, with every record in the cache."""
    with connected(runtime) as ranks:
        found = shared(ranks, partial(catalog, config, model), cache_folders(config))
        folders = own_folders(found, config)
        hosts = find_hosts(ranks, [*folders.values()])
        outcomes: list[Outcome] = []
        bad: dict[Keys, str] = {}
        while work := _find_work(config, model, found, bad, hosts):
            done = _encode_on_all(config, model, ranks, work, folders)
            outcomes += done
            fresh = {keys: reason for other in done for keys, reason in other.bad.items()}
            if not fresh:
                break
            bad |= fresh  # others may share a record with these, or be drawn in their place, so look again
        hosts.fill(lambda: folders_by_key(found, folders, _used(config, model, found, bad)))
    datasets = _datasets(config, model, found, bad)
    if runtime.is_main:
        _summarise(datasets, outcomes)
    return datasets


def find_missing(config: Config, model: ModelFolder, runtime: Runtime) -> tuple[Datasets, Work]:
    """Return the train and eval sets of a config, and what `encode_missing` would encode of them."""
    with connected(runtime) as ranks:
        found = shared(ranks, partial(catalog, config, model), cache_folders(config))
        folders = own_folders(found, config)
        hosts = find_hosts(ranks, [*folders.values()])
        work = _find_work(config, model, found, {}, hosts)
        copies = hosts.copies(lambda: folders_by_key(found, folders, _used(config, model, found, {})))
    datasets = _datasets(config, model, found, {}, whole=False)
    if runtime.is_main:
        _summarise(datasets, [])
    return datasets, replace(work, copies=copies)


def _find_work(config: Config, model: ModelFolder, found: Catalog, bad: Mapping[Keys, str], hosts: Hosts) -> Work:
    """Return what no host has. A collective call."""
    used = partial(_used, config, model, found, bad)
    elsewhere = hosts.held_elsewhere(lambda: folders_by_key(found, own_folders(found, config), used()))
    work = hosts.ranks.from_main(lambda: missing_work(found, used=used(), without=bad, elsewhere=elsewhere))
    return work.on(found)


def _used(config: Config, model: ModelFolder, found: Catalog, bad: Mapping[Keys, str]) -> Used | None:
    """Return which clips of a catalog this run takes; None: all."""
    if config.data.draw == "once":
        return None
    good = {name: ~_bad_clips(items, bad)[0] for name, items in found.items.items()}
    good["train"][good["train"]] = which_used(config, _datasets(config, model, found, bad, whole=False).train)
    return good


def _encode_on_all(
    config: Config, model: ModelFolder, ranks: Ranks, work: Work, folders: Mapping[Path, Path]
) -> list[Outcome]:
    outcome, own = Outcome(), None
    try:
        _encode(config, model, ranks.runtime, work, _Writers(f"rank{ranks.runtime.rank}", outcome, folders))
    except Exception as fault:  # sent to all ranks before it is raised, so that none waits for this one
        own, outcome.fault = fault, portable(fault, ranks.runtime.rank)
    outcomes = ranks.gather(outcome)
    if own is not None:
        raise own
    for other in outcomes:
        if other.fault is not None:
            raise other.fault
    return outcomes


# --- one rank's share ------------------------------------------------------------------------------------------------


def _encode(config: Config, model: ModelFolder, runtime: Runtime, work: Work, writers: _Writers) -> None:
    clips = share(work.clips, rank=runtime.rank, ranks=runtime.world_size)
    texts = share(work.texts, rank=runtime.rank, ranks=runtime.world_size)
    fields = share(work.fields, rank=runtime.rank, ranks=runtime.world_size)
    with writers, _one_thread(runtime.device):
        _take(config, model, [*given(clips), *given(texts)], writers)
        clips, texts = given(clips, False), given(texts, False)
        if clips or fields:
            _encode_clips(config, model, runtime, clips, fields, writers)
        if texts:
            encode_texts(config, model, runtime, texts, writers.put, partial(_refuse, config, writers))


def _take(config: Config, model: ModelFolder, jobs: Sequence[ClipJob | TextJob], writers: _Writers) -> None:
    """Write the records of clips and captions that are given as features."""
    before = writers.outcome.records
    take(jobs, Needs.of(config, model), writers.put, partial(_refuse, config, writers))
    writers.outcome.taken += writers.outcome.records - before


def _refuse(config: Config, writers: _Writers, job: ClipJob | TextJob, reason: BadMedia) -> None:
    """Leave out a job that cannot be done, or end here where that is asked."""
    if config.data.on_bad == "error" or (isinstance(job, TextJob) and job.alone):
        raise UserError(f"{reason}; mend it{' or set data.on_bad=skip' * (config.data.on_bad == 'error')}")
    name = job.id if isinstance(job, ClipJob) else f"the caption {job.caption[:60]!r}"
    logger.warning("%s is skipped: %s", name, reason)
    writers.outcome.bad[job.latent_keys if isinstance(job, ClipJob) else job.all_keys] = str(reason)


def _encode_clips(
    config: Config,
    model: ModelFolder,
    runtime: Runtime,
    jobs: Sequence[ClipJob],
    fields: Sequence[FieldJob],
    writers: _Writers,
) -> None:
    encoders = Encoders(model, runtime.device)
    for one in fields:
        writers.put(one.folder, [Record(one.field.source, one.key, encode_field(one, encoders).to(DTYPE))])
    cores = _cores(runtime)
    workers = config.data.workers or min(DECODERS, cores)
    decode = partial(_decode, fill=Fill.of(config.data), threads=max(1, cores // workers))
    frames, scales = sum(job.clip.frames * len(job.keys) for job in jobs), dict(zip(config.streams, config.scales))
    with Progress("clips", len(jobs), frames, shown=runtime.is_main, ranks=runtime.world_size) as progress:
        for job, decoded in _ahead(jobs, decode, workers):
            try:
                videos = decoded.result()
                latents = {part: encode_part(encoders.vae, videos[part.stream], part, scales) for part in job.keys}
                _check(latents, {part: part_shape(model.geometry, job.bucket, part, scales) for part in job.keys})
                shown = encode_all_shown(job.shown_keys, model.fields, [*videos.values()], encoders)
            except BadMedia as reason:
                if config.data.on_bad == "error":
                    raise UserError(f"{job.id}: {reason}; mend it or set data.on_bad=skip") from reason
                logger.warning("%s is skipped: %s", job.id, reason)
                writers.outcome.bad[job.latent_keys] = str(reason)
            else:
                records = [Record("latent", key, latents[part].to(DTYPE)) for part, key in job.keys.items()]
                records += [Record(kind, key, value.to(DTYPE)) for kind, key, value in shown]
                writers.put(job.folder, records)
            progress.step(frames=job.clip.frames * len(job.keys))
    del encoders
    _free(runtime.device)


def _check(latents: Mapping[Part, torch.Tensor], shapes: Mapping[Part, tuple[int, ...]]) -> None:
    for part, latent in latents.items():
        assert latent.shape == shapes[part], (part, latent.shape, shapes[part])
        if not latent.isfinite().all():
            raise BadMedia(f"its {part.stream} stream gives values that are not finite when it is encoded")


def _decode(job: ClipJob, *, fill: Fill, threads: int) -> dict[str, np.ndarray]:
    return decode_pair(job.sample, job.clip, fill=fill, threads=threads)


def _ahead(
    jobs: Sequence[ClipJob], decode: Callable[[ClipJob], dict[str, np.ndarray]], workers: int
) -> Iterator[tuple[ClipJob, Future[dict[str, np.ndarray]]]]:
    """Yield jobs in order, decoded while earlier ones are encoded; memory holds at most `workers` + 2 clips."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[ClipJob, Future[dict[str, np.ndarray]]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.submit(decode, job)))
                if len(waiting) > workers:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


class _Writers:
    """One writer for each folder, opened at its first record."""

    def __init__(self, name: str, outcome: Outcome, folders: Mapping[Path, Path]) -> None:
        self.outcome = outcome
        self._name, self._folders = name, folders
        self._stack = ExitStack()
        self._open: dict[Path, CacheWriter] = {}

    def put(self, folder: Path, records: Sequence[Record]) -> None:
        if folder not in self._open:
            self._open[folder] = self._stack.enter_context(CacheWriter(self._folders[folder], self._name))
        self._open[folder].put(records)
        self.outcome.records += len(records)
        self.outcome.bytes += sum(record.value.nbytes for record in records)

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *fault: Any) -> None:
        self._stack.__exit__(*fault)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Encode with one thread on a CPU, as torchrun sets it too: records are then the same for any number of ranks.

    Small convolutions lose far more to threads than they gain.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores(runtime: Runtime) -> int:
    """Return this rank's share of the machine's cores."""
    here = min(runtime.world_size, torch.cuda.device_count() or runtime.world_size)
    return max(1, len(os.sched_getaffinity(0)) // here)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- the result ------------------------------------------------------------------------------------------------------


def _datasets(
    config: Config, model: ModelFolder, found: Catalog, bad: Mapping[Keys, str], *, whole: bool = True
) -> Datasets:
    """Return both sets without clips that are bad. whole: every record must be in the cache."""
    folders, streams, empty = [*own_folders(found, config).values()], tuple(config.streams), found.empty_text_keys
    cache = Cache(*folders)
    beside = all_beside(config.objective, streams, model.fields)
    sets: dict[str, Dataset] = {}
    for name, items in found.items.items():
        faulty, reasons = _bad_clips(items, bad)
        kept = items.take(~faulty) if reasons else items
        skipped = (*found.skipped[name], *reasons.items()) if reasons else found.skipped[name]
        told = found.prompts, config.scales, beside, found.notes.get(name, ()), found.pictures
        sets[name] = data = Dataset(kept, streams, empty, cache, name, skipped, *told)
        if not whole:
            continue
        used = clips_used(config, data) if name == "train" else kept
        assert isinstance(used, Items)
        blank = [key for number in np.unique(used.clips.numbers).tolist() for _, key in used.runs[number].blank]
        absent = len(cache.missing([*blank, *found.empty_text_keys])) + int(cache.absent(used.keys_of(RECORDS)).sum())
        if absent:
            raise UserError(
                f"{folders[0]}: {absent} records are not on {platform.node()}: `cache --gc` has removed them "
                "meanwhile, or its disk shows them late; start again"
            )
    return Datasets(sets["train"], sets["eval"])


def _bad_clips(items: Items, bad: Mapping[Keys, str]) -> tuple[np.ndarray, dict[str, str]]:
    """Return which clips are bad, bool [n], and why, by their ids."""
    faulty, reasons = np.zeros(len(items), bool), dict[str, str]()
    for row, item in enumerate(items if bad else ()):
        if found := [bad[keys] for keys in item.all_keys if keys in bad]:
            faulty[row], reasons[item.id] = True, found[0]
    return faulty, reasons


def _summarise(datasets: Datasets, outcomes: Sequence[Outcome]) -> None:
    logger.info("%-6s %-18s %8s", "set", "bucket", "clips")
    for dataset in (datasets.train, datasets.eval):
        for bucket, clips in dataset.buckets().items():
            frames, height, width = bucket
            logger.info("%-6s %-18s %8d", dataset.key, f"{width}×{height}×{frames}", clips)
        for note in dataset.notes:
            logger.info("%-6s note: %s", dataset.key, note)
        kinds = _by_kind(dataset.skipped)
        for count, name, reason in kinds[:KINDS_SHOWN]:
            logger.info("%-6s skipped %d: %s (%s%s)", dataset.key, count, reason, name, ", …" if count > 1 else "")
        if rest := sum(count for count, *_ in kinds[KINDS_SHOWN:]):
            logger.info("%-6s skipped %d for other reasons; `plan CONFIG --json` names all", dataset.key, rest)
    records, size = sum(other.records for other in outcomes), sum(other.bytes for other in outcomes)
    taken, held = sum(other.taken for other in outcomes), len(datasets.train.cache)
    how = f"{records - taken} records encoded" + f", {taken} taken from features" * bool(taken)
    logger.info("%s, %.1f MB; the cache holds %d", how, size / 1e6, held)


def _by_kind(skipped: Sequence[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Return (count, first sample, its reason) for each kind of reason, the most frequent first."""
    kinds = [_kind(name, reason) for name, reason in skipped]
    first: dict[str, tuple[str, str]] = {}
    for kind, one in zip(kinds, skipped):
        first.setdefault(kind, one)
    return [(count, *first[kind]) for kind, count in Counter(kinds).most_common()]


def _kind(name: str, reason: str) -> str:
    """Return a reason without words of this sample alone: those that begin with its name, hold a digit or a path."""
    own = re.escape(name.rpartition("/")[2].rpartition("@")[0] or name.rpartition("/")[2])
    return re.sub(rf"(?<!\w){own}(?![^\W_])\S*|\S*[\d/]\S*", "…", reason)
