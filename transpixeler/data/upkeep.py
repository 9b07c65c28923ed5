"""Run the `cache` command: encode, verify, collect garbage, rebuild, list. A config in, a report out.

Training uses nothing of this. Whatever removes files first makes sure that no writer is at work, and keeps the cache
valid at every moment in between.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transpixeler.config.sections import Config
from transpixeler.data.cache import index
from transpixeler.data.cache.index import IndexFile
from transpixeler.data.cache.records import (
    Cache,
    CacheDamaged,
    CacheWriter,
    Record,
    explained,
    lock,
    open_indexes,
    segments_of,
)
from transpixeler.data.catalog import cache_folders, catalog
from transpixeler.data.dataset import Datasets
from transpixeler.data.encode import encode_missing
from transpixeler.data.features import export as features
from transpixeler.data.kept import KEPT_ENDING
from transpixeler.data.parts import part_shape
from transpixeler.files import whole
from transpixeler.flow.tasks import check_given
from transpixeler.models.family import ModelFolder, open_model
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")
COPIED_AT_ONCE = 32
SPARSE = 0.75  # a segment with a smaller share in use is copied and its file removed


@dataclass(frozen=True)
class Problem:
    """Something wrong in the cache, and where to find it."""

    path: Path
    record: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.record}: {self.reason}"


@dataclass(frozen=True)
class Shelf:
    """All records of one kind and shape."""

    name: str
    records: int
    bytes: int
    segments: int


@dataclass
class Report:
    """The result of a `cache` command."""

    datasets: Datasets | None = None
    problems: list[Problem] = field(default_factory=list)
    shelves: list[Shelf] = field(default_factory=list)
    exported: list[features.Exported] = field(default_factory=list)
    removed_records: int = 0
    removed_bytes: int = 0


def cache_command(
    config: Config,
    runtime: Runtime,
    *,
    verify: bool = False,
    gc: bool = False,
    rebuild: bool = False,
    list: bool = False,
    export: str = "",
) -> Report:
    """Encode what is missing, or do what is asked for instead; rank 0 alone verifies, cleans, lists and exports."""
    model = open_model(config.model)
    check_given(config, model)
    report = Report()
    if runtime.is_main:
        if export:
            features.check_export(Path(export), config, model)
        if list:
            report.shelves = listing(cache_folders(config))
        if verify:
            report.problems = verify_cache(cache_folders(config), drop=True, expected=expectations(config, model))
        if gc:
            collect_garbage(config, model, report)
        if rebuild:
            remove_all(cache_folders(config), report)
    if not (list or verify or gc):
        report.datasets = encode_missing(config, model, runtime)
        if export and runtime.is_main:
            report.exported = features.export(report.datasets, model, Path(export))
    return report


def listing(folders: tuple[Path, ...]) -> list[Shelf]:
    """Count the records of each kind and shape, and their bytes."""
    counts: dict[str, list[int]] = {}
    for folder in folders:
        for segments in segments_of(folder).values() if folder.is_dir() else ():
            for segment in segments.values():
                counts.setdefault(segment.path.name.split(".")[2], [0, 0, 0])[2] += 1
        for file in open_indexes(folder):
            for number, segment in file.segments.items():
                mine = file.rows[file.valid & (file.rows["segment"] == number)]
                shelf = counts.setdefault(segment.path.name.split(".")[2], [0, 0, 1])  # a new one
                shelf[0] += len(mine)
                shelf[1] += int((index.ends(mine) - mine["offset"]).sum())
    return [Shelf(name, *numbers) for name, numbers in sorted(counts.items())]


# --- verify ----------------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A record as the config expects it."""

    name: str
    shape: tuple[int, ...] | None  # None: a text may have any length


def expectations(config: Config, model: ModelFolder) -> dict[bytes, Expected]:
    found = catalog(config, model)
    scales = dict(zip(config.streams, config.scales))
    shapes = {
        key: part_shape(model.geometry, job.bucket, part, scales)
        for job in found.clips
        for part, key in job.keys.items()
    }
    return {key: Expected(name, shapes.get(key)) for key, name in found.keys().items()}


def verify_cache(folders: tuple[Path, ...], *, drop: bool, expected: Mapping[bytes, Expected]) -> list[Problem]:
    """Read every record once; with `drop`, damaged ones count as missing from now on."""
    problems = []
    for folder in folders:
        can_drop = drop and all(os.access(path, os.W_OK) for path in folder.glob("*.idx"))
        with _alone(folder) if can_drop else nullcontext():
            problems += _verify_folder(folder, drop=drop, expected=expected)
    return problems


def _verify_folder(folder: Path, *, drop: bool, expected: Mapping[bytes, Expected]) -> list[Problem]:
    cache, problems = Cache(folder), []
    for number, file in enumerate(cache.table.files):
        bad = dict.fromkeys(map(int, file.damaged), "its row in the index is damaged")
        bad |= dict.fromkeys(map(int, file.short), "its segment is missing or truncated")
        for row in np.flatnonzero(file.valid):
            known = expected.get(file.rows[row]["key"].tobytes(), Expected("record", None))
            if reason := _unsound(cache, number, int(row), known.shape):
                bad[int(row)] = reason
        for row, reason in sorted(bad.items()):
            key = file.rows[row]["key"].tobytes()
            name = expected[key].name if key in expected else "record"
            problems.append(Problem(_place(file, row), f"{name} ({key.hex()})", reason))
        if drop and bad:
            drop_rows(file, list(bad))
    return [*problems, *(Problem(path, "all its records", "its index is missing") for path in _orphans(folder))]


def _unsound(cache: Cache, file: int, row: int, shape: tuple[int, ...] | None) -> str | None:
    try:
        cache.verify(file, row)
    except CacheDamaged:
        return "its checksum does not match"
    value = cache.view(file, row)
    if shape is not None and tuple(value.shape) != shape:
        return f"its shape is {tuple(value.shape)}, not {shape}"
    return None if bool(value.isfinite().all()) else "it holds values that are not finite"


def _place(file: IndexFile, row: int) -> Path:
    segment = file.segments.get(int(file.rows[row]["segment"]))
    return segment.path if segment else file.path


def drop_rows(file: IndexFile, rows: list[int]) -> None:
    """Zero the rows, which makes them no records; the bytes of the records go with the next `--gc`."""
    with explained(file.path.parent), file.path.open("r+b", buffering=0) as out:
        for row in rows:
            os.pwrite(out.fileno(), bytes(index.ROW_BYTES), index.ROW_BYTES * (row + 1))
        os.fsync(out.fileno())


def _orphans(folder: Path) -> list[Path]:
    """Return segments without an index; a writer makes its index first, so these are not of a writer at work."""
    if not folder.is_dir():
        return []
    found = segments_of(folder)
    return [
        segment.path
        for writer, segments in sorted(found.items())
        if not (folder / f"{writer}.idx").exists()
        for segment in segments.values()
    ]


# --- remove ----------------------------------------------------------------------------------------------------------


def collect_garbage(config: Config, model: ModelFolder, report: Report) -> None:
    """Remove what this config does not refer to, and what is damaged; other configs of the folder encode anew."""
    wanted = catalog(config, model).keys()
    for folder in cache_folders(config):
        if folder.is_dir():
            before = _bytes(folder)
            with _alone(folder):
                report.removed_records += _sweep(folder, set(wanted))
            report.removed_bytes += before - _bytes(folder)


def _sweep(folder: Path, wanted: set[bytes]) -> int:
    """Copy what is left of sparse segments, then shorten the indexes, then remove files: valid at each step."""
    cache = Cache(folder)
    orphans = _orphans(folder)
    kept = [_live_rows(cache, number, wanted) for number in range(len(cache.table.files))]
    removed = len(cache) - sum(map(len, kept))
    sparse = [_sparse_segments(file, live) for file, live in zip(cache.table.files, kept)]
    moved = [
        (number, int(row))
        for number, file in enumerate(cache.table.files)
        for row in kept[number]
        if int(file.rows[row]["segment"]) in sparse[number]
    ]
    lost = _copy(cache, moved, folder)
    for file, live, gone in zip(cache.table.files, kept, sparse):
        staying = [row for row in live if int(file.rows[row]["segment"]) not in gone]
        if len(staying) < len(file.rows):
            _replace_index(file, file.rows[staying])
        for number in gone:
            file.segments[number].path.unlink()
    for path in orphans:
        path.unlink()
    return removed + lost


def _live_rows(cache: Cache, number: int, wanted: set[bytes]) -> np.ndarray:
    """Return wanted rows that a lookup would find: of two records with one key, one goes."""
    file = cache.table.files[number]
    keys = ((row, file.rows[row]["key"].tobytes()) for row in np.flatnonzero(file.valid))
    return np.array([row for row, key in keys if key in wanted and cache.table.find(key) == (number, row)], np.int64)


def _sparse_segments(file: IndexFile, live: np.ndarray) -> set[int]:
    rows = file.rows[live]
    used = index.ends(rows) - rows["offset"]
    return {
        number
        for number, segment in file.segments.items()
        if used[rows["segment"] == number].sum() < SPARSE * segment.bytes or not segment.bytes
    }


def _copy(cache: Cache, places: list[tuple[int, int]], folder: Path) -> int:
    """Copy records into new segments; leave out those that are damaged and return how many."""
    lost = 0
    if not places:
        return lost
    with CacheWriter(folder, "gc") as writer:
        for start in range(0, len(places), COPIED_AT_ONCE):
            whole = [place for place in places[start : start + COPIED_AT_ONCE] if _whole(cache, *place)]
            lost += len(places[start : start + COPIED_AT_ONCE]) - len(whole)
            writer.put([_record(cache, *place) for place in whole])
    return lost


def _whole(cache: Cache, file: int, row: int) -> bool:
    try:
        cache.verify(file, row)
    except CacheDamaged as damage:
        logger.warning("%s: it is removed", damage)
        return False
    return True


def _record(cache: Cache, file: int, row: int) -> Record:
    place = cache.place(file, row)
    return Record(place.spec.kind, place.key, cache.view(file, row))


def _replace_index(file: IndexFile, rows: np.ndarray) -> None:
    if not len(rows):
        file.path.unlink()
        return
    with whole(file.path, synced=True) as unfinished:
        unfinished.write_bytes(index.header() + rows.tobytes())


def remove_all(folders: tuple[Path, ...], report: Report) -> None:
    """Remove everything that was encoded; what is remembered of the media files stays."""
    for folder in folders:
        if not folder.is_dir():
            continue
        with _alone(folder):
            report.removed_records += len(Cache(folder))
            report.removed_bytes += _bytes(folder)
            for path in (*folder.glob("*.idx"), *folder.glob("*.seg"), *folder.glob(f"*{KEPT_ENDING}")):
                path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold every writer's lock."""
    with ExitStack() as stack:
        for path in sorted(folder.glob("*.idx")):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, file)
            lock(file, path=path)
        yield


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for pattern in ("*.idx", "*.seg") for path in folder.glob(pattern))
