"""Convert Open-Sora's `bucket_config`: sizes → lengths → (chance, batch per GPU) in; sources' grids and rules out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrate_keys import Migration, Value

from transpixeler.config import DataConfig, Resolution, SourceConfig, UserError
from transpixeler.data.buckets import bucket_groups
from transpixeler.models.geometry import Geometry

NAME = re.compile(r"(\d{2,4})(px|p|)(_(?:max|ar.+))?")  # 256px, 512: the side of a square; 720p: the height at 16:9
NAMED = {"2k": (2560, 1440), "4k": (3840, 2160)}
ASPECTS = [2.39, 2.0, 1.85, 1.78, 1.6, 1.5, 1.33, 1.0, 0.75, 0.67, 0.62, 0.56, 0.54, 0.5, 0.42]  # of film and phones


@dataclass(frozen=True)
class Entry:
    """One line of a bucket_config."""

    name: str  # of the size, as there
    resolution: Resolution
    frames: int
    keep: float  # chance that a clip which reaches this bucket stays
    batch: int | None  # per GPU; None: where nothing ever stays


def entries(config: Value, migration: Migration, *, second_skips: bool) -> list[Entry]:
    """Return the lines of a bucket_config. second_skips: what a second chance means; see `_keep`."""
    if not isinstance(config, dict) or not config:
        raise UserError(f"{migration.where}: bucket_config = {config!r} is not a table of sizes")
    found = []
    for name, lengths in config.items():
        resolution = _resolution(name, migration)
        if not isinstance(lengths, dict):
            raise _fault(migration, f"[{name!r}] = {lengths!r} is not a table of lengths")
        for frames, pair in lengths.items():
            at = f"[{name!r}][{frames!r}] = {pair!r}"
            if not _is_count(frames):
                raise _fault(migration, f"{at}: the length is not a number of frames")
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise _fault(migration, f"{at} is not (chance to keep, batch size)")
            keep = _keep(pair[0], second_skips=second_skips)
            if keep is None:
                raise _fault(migration, f"{at}: the chance is not a number from 0 to 1, or two of them")
            if not _is_count(pair[1]) and (pair[1] is not None or keep):
                raise _fault(migration, f"{at}: the batch size is not a number above 0")
            found.append(Entry(name, resolution, frames, keep, pair[1]))
    return found


def bucket_batches(
    lines: Sequence[Entry], *, groups: int, accumulation: int
) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Return what each bucket's rule says of its batch, and what `train` says for all.

    Batches there are per GPU, or group of GPUs that share one sample, and before accumulation. A rule here has the
    samples of a forward pass alone; the samples of a step are one number for all buckets, so the largest are taken.
    """
    each = [{} if line.batch is None else {"micro_batch": line.batch} for line in lines]
    largest = max((line.batch or 1 for line in lines), default=1)
    return each, {"micro_batch": 1, "global_batch": largest * groups * accumulation}


def fitted(lines: Sequence[Entry], migration: Migration, geometry: Geometry) -> list[Entry]:
    """Return the lines with lengths that the model takes; of several that come to one, the shortest stands."""
    found: dict[tuple[str, int], Entry] = {}
    rounded: dict[int, int] = {}
    for line in sorted(lines, key=lambda line: line.frames):
        frames = 1 if line.frames == 1 else geometry.longest(line.frames)
        key = (line.name, frames)
        if (frames == 1) != (line.frames == 1) or key in found:
            why = "is a still" if frames == 1 else "another line has"
            why = f"with this model {line.frames} frames come to {frames}, which {why}"
            migration.leave(f"bucket_config: {line.name}: {line.frames}", (line.keep, line.batch), why)
            continue
        rounded |= {line.frames: frames} if frames != line.frames else {}
        found[key] = Entry(line.name, line.resolution, frames, line.keep, line.batch)
    if rounded:
        told = ", ".join(f"{old} → {new}" for old, new in rounded.items())
        migration.notes.append(f"lengths are rounded down to what the model takes: {told}")
    return sorted(found.values(), key=lambda line: list(dict.fromkeys(one.name for one in lines)).index(line.name))


def grids(lines: Sequence[Entry]) -> list[dict[str, Value]]:
    """Return `resolutions` and `frames` of as many sources as there are different lists of lengths."""
    lengths: dict[Resolution, list[int]] = {}
    for line in lines:
        lengths.setdefault(line.resolution, []).append(line.frames)
    sources: dict[tuple[int, ...], list[Value]] = {}
    for resolution, frames in lengths.items():
        sources.setdefault(tuple(sorted(frames)), []).append(_plain(resolution))
    return [{"resolutions": sizes, "frames": list(frames)} for frames, sizes in sources.items()]


def rules(lines: Sequence[Entry], batches: Sequence[Mapping[str, int]], geometry: Geometry) -> list[dict[str, Value]]:
    """Return data.buckets: for each length a rule for any size, and before it one for each shape that differs."""
    made = []
    for frames in sorted({line.frames for line in lines}):
        there = [(line, settings) for line, settings in zip(lines, batches, strict=True) if line.frames == frames]
        told = [dict(settings) | ({"keep": line.keep} if line.keep < 1 else {}) for line, settings in there]
        *others, usual = zip((line.resolution for line, _ in there), told)
        for resolution, settings in others:
            if settings != usual[1]:
                made += [{"size": size, **settings} for size in _shapes(resolution, frames, geometry)]
        made += [{"size": [0, 0, frames], **usual[1]}] if usual[1] or len(made) else []
    return made


def _shapes(resolution: Resolution, frames: int, geometry: Geometry) -> list[list[int]]:
    source = SourceConfig("", resolutions=(resolution,), frames=(frames,))
    (group,) = bucket_groups(source, DataConfig(aspect_ratios=tuple(ASPECTS)), geometry=geometry)
    return [[bucket.width, bucket.height, bucket.frames] for bucket in group]


def _resolution(name: Value, migration: Migration) -> Resolution:
    if str(name).lower() in NAMED:
        return NAMED[str(name).lower()]
    found = NAME.fullmatch(name) if isinstance(name, str) else None
    if not found or int(found[1]) < 16:
        raise _fault(migration, f"{name!r} is not a size such as 256px, 480p or 512")
    if found[3]:
        why = "its shapes are those of all sizes, which data.aspect_ratios gives"
        migration.leave(f"bucket_config: {name}", found[3][1:], why)
    side = int(found[1])
    return (round(side * 16 / 9), side) if found[2] == "p" else side


def _keep(chance: Any, *, second_skips: bool) -> float | None:
    """Return the chance that a clip stays, or nothing if it is none.

    Of two numbers, the first is that. The second says for a length, before that, how likely the next shorter one is
    tried in its place (second_skips, in 2.0), or how likely not (before 2.0).
    """
    first: Any = chance
    second: Any = None
    if isinstance(chance, tuple | list) and len(chance) == 2:
        first, second = chance
    second = (0.0 if second_skips else 1.0) if second is None else second
    if not _is_share(first) or not _is_share(second):
        return None
    return round(first * (1 - second if second_skips else second), 6)


def _is_share(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_count(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _plain(resolution: Resolution) -> Value:
    return resolution if isinstance(resolution, int) else list(resolution)


def _fault(migration: Migration, what: str) -> UserError:
    return UserError(f"{migration.where}: bucket_config: {what}")
