"""Convert Open-Sora's `bucket_config`: sizes → lengths → (chance, batch per GPU) in; a grid and data.buckets out.

With data.draw: epoch both mean the same: a clip begins at its largest size with the longest length that it fills, goes
on to shorter lengths by one chance and to smaller sizes by another, and has one bucket an epoch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from migrate_keys import Migration, Value

from transpixeler.config.sections import DataConfig, Resolution, SourceConfig, UserError
from transpixeler.data.buckets import bucket_groups
from transpixeler.models.geometry import Geometry

NAME = re.compile(r"(\d{2,4})(px|p|)(_(?:max|ar.+))?")  # 256px, 512: the side of a square; 720p: the height at 16:9
NAMED = {"2k": (2560, 1440), "4k": (3840, 2160)}
ASPECTS = [2.39, 2.0, 1.85, 1.78, 1.6, 1.5, 1.33, 1.0, 0.75, 0.67, 0.62, 0.56, 0.54, 0.5, 0.42]  # of film and phones

NEVER: dict[str, float] = {"keep": 0.0}


class Rule(dict[str, Any]):
    """One rule of data.buckets, which a YAML file has in one line."""


@dataclass(frozen=True)
class Entry:
    """One line of a bucket_config."""

    name: str  # of the size, as there
    resolution: Resolution
    frames: int
    keep: float  # chance that a clip which comes to this bucket stays at its length
    keep_resolution: float  # and then at its size
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
            chances = _chances(pair[0], second_skips=second_skips)
            if chances is None:
                raise _fault(migration, f"{at}: the chance is not a number from 0 to 1, or two of them")
            if not _is_count(pair[1]) and (pair[1] is not None or all(chances)):
                raise _fault(migration, f"{at}: the batch size is not a number above 0")
            found.append(Entry(name, resolution, frames, *chances, pair[1]))
    return found


def bucket_batches(line: Entry, *, groups: int, accumulation: int) -> dict[str, int]:
    """Return what a bucket's rule says of its batch.

    Batches there are of one GPU, or one group of GPUs that share a sample, and before accumulation.
    """
    if line.batch is None:
        return {}
    return {"micro_batch": line.batch, "global_batch": line.batch * groups * accumulation}


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
            shown = ((line.keep_resolution, line.keep), line.batch)
            migration.leave(f"bucket_config: {line.name}: {line.frames}", shown, why)
            continue
        rounded |= {line.frames: frames} if frames != line.frames else {}
        found[key] = replace(line, frames=frames)
    if rounded:
        told = ", ".join(f"{old} → {new}" for old, new in rounded.items())
        migration.notes.append(f"lengths are rounded down to what the model takes: {told}")
    return list(found.values())


def grid(lines: Sequence[Entry]) -> dict[str, Value]:
    """Return the sizes and lengths of `data`: each of the one with each of the other."""
    sizes = dict.fromkeys(line.resolution for line in lines)
    return {
        "resolutions": [size if isinstance(size, int) else list(size) for size in sizes],
        "frames": sorted({line.frames for line in lines}),
    }


def rules(lines: Sequence[Entry], geometry: Geometry, *, groups: int, accumulation: int) -> list[Rule]:
    """Return data.buckets: for each length a rule for any size, and before it one for each shape that differs."""
    made: list[Rule] = []
    sizes = list(dict.fromkeys(line.resolution for line in lines))
    for frames in sorted({line.frames for line in lines}):
        told = dict.fromkeys(sizes, NEVER)  # a length that a size does not have is passed over there
        for line in lines:
            if line.frames == frames:
                chances = {"keep": line.keep, "keep_resolution": line.keep_resolution}
                batches = bucket_batches(line, groups=groups, accumulation=accumulation)
                told[line.resolution] = batches | {name: chance for name, chance in chances.items() if chance < 1}
        usual = max(told.values(), key=list(told.values()).count)
        for size, settings in told.items():
            if settings != usual:
                made += [Rule(size=shape, **settings) for shape in _shapes(size, frames, geometry)]
        made.append(Rule(size=[0, 0, frames], **usual))
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


def _chances(chance: Any, *, second_skips: bool) -> tuple[float, float] | None:
    """Return the chances to stay at the length and then at the size, or nothing if they are none.

    One number is of the size. A second is of the length: how likely the next shorter is tried in its place
    (second_skips, in 2.0), or how likely not (before 2.0).
    """
    size: Any = chance
    length: Any = 0.0 if second_skips else 1.0
    if isinstance(chance, tuple | list) and len(chance) == 2:
        size, length = chance
    if not _is_share(size) or not _is_share(length):
        return None
    return round(1.0 - length if second_skips else float(length), 6), float(size)


def _is_share(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_count(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fault(migration: Migration, what: str) -> UserError:
    return UserError(f"{migration.where}: bucket_config: {what}")
