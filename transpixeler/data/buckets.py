"""Assign samples to buckets: samples in; (bucket, clip) pairs, and a reason for each sample that fits none, out.

All clips of a batch share one bucket: (frames, height, width). For each resolution a sample goes to the bucket nearest
to its aspect ratio, and the longest that it fills; buckets of one frame are for images and never for videos.
All functions here are pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from transpixeler.config.sections import (
    BucketRule,
    Config,
    DataConfig,
    Resolution,
    SourceConfig,
    TrainConfig,
    UserError,
)
from transpixeler.data.columns import Rows, Texts, spread
from transpixeler.data.media.clip import Clip, exact_rate
from transpixeler.data.sources.samples import Sample, Samples, Shape
from transpixeler.models.geometry import Geometry

SHAPES_KNOWN = 1 << 16  # of a set's files: each is looked through once


class Bucket(NamedTuple):
    """The size in pixels of every clip in a batch."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}×{self.frames}"


class SampleClip(NamedTuple):
    """One clip of a sample and its bucket."""

    sample: Sample
    clip: Clip
    bucket: Bucket


class Clips(Rows[SampleClip]):
    """Clips as columns, in the order of their samples."""

    def __init__(
        self,
        samples: Samples,
        owners: np.ndarray,
        numbers: np.ndarray,
        firsts: np.ndarray,
        offered: Buckets,
        fps: Fraction,
    ) -> None:
        self.samples, self.offered, self.fps = samples, tuple(offered), fps
        self.owners, self.numbers, self.firsts = owners, numbers, firsts  # int32 [n]: sample, bucket, first frame

    @classmethod
    def none(cls) -> Clips:
        """Return the clips of a set without sources."""
        nothing = np.zeros(0, np.int32)
        return cls(Samples.of((), Fraction(1)), nothing, nothing, nothing, (), Fraction(1))

    def __len__(self) -> int:
        return len(self.owners)

    def make(self, row: int) -> SampleClip:
        sample, bucket = self.samples[int(self.owners[row])], self.offered[self.numbers[row]]
        return SampleClip(sample, self.cut(row, sample.id), bucket)

    def cut(self, row: int, name: str) -> Clip:
        """Return a clip alone. name: its sample's id."""
        frames, height, width = self.offered[self.numbers[row]]
        return Clip(name, Fraction(int(self.firsts[row])) / self.fps, frames, self.fps, height, width)

    def name(self, row: int, sample: str) -> str:
        """Return a clip's id. sample: its sample's."""
        frames, height, width = self.offered[self.numbers[row]]
        return f"{sample}@{self.firsts[row]}+{frames}:{width}x{height}"

    def take(self, rows: np.ndarray) -> Clips:
        """Return some of the clips in the order of their numbers, or those where `rows` is true."""
        parts = self.owners[rows], self.numbers[rows], self.firsts[rows]
        return Clips(self.samples, *parts, self.offered, self.fps)


Buckets = Sequence[Bucket]
Dropped = Sequence[tuple[str, str]]  # (sample id, reason)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Clips in the order of samples, and the samples that are in no bucket."""

    clips: Clips
    dropped: Dropped


@dataclass(frozen=True)
class Fate:
    """Say where the clips of samples that are alike begin, and why there are none."""

    clips: tuple[tuple[Bucket, int], ...]  # first frames
    reasons: tuple[str, ...]


def assign(
    samples: Sequence[Sample],
    sources: Sequence[SourceConfig],
    data: DataConfig,
    *,
    geometry: Geometry,
    seed: int,
) -> Assignment:
    """Cut each sample into clips under its source's options.

    With `data.draw: epoch` these are the clips of every bucket that some epoch may draw.
    """
    check_draws(data)
    fps = rate(data)
    table = Samples.of(samples, fps)
    choosers = [
        _Chooser(bucket_groups(source, data, geometry=geometry), source.clip_mode or data.clip_mode, data)
        for source in sources
    ]
    alike: dict[tuple[int, Shape, tuple[bool, ...]], int] = {}
    kinds = np.empty(len(table), np.int32)
    for source, shape, rows in table.alike():
        chances = choosers[source].chances(shape)
        if not chances:
            kinds[rows] = alike.setdefault((source, shape, ()), len(alike))
        for row in rows if chances else ():
            draws = tuple(draw(seed, table.ids.make(row), bucket) < keep for bucket, keep in chances)
            kinds[row] = alike.setdefault((source, shape, draws), len(alike))
    fates = [choosers[source].fate(shape, draws) for source, shape, draws in alike]
    return decided(table, kinds, fates, fps)


def decided(samples: Samples, kinds: np.ndarray, fates: Sequence[Fate], fps: Fraction) -> Assignment:
    """Return all clips. kinds: the number of each sample's fate, int [n]."""
    offered = list(dict.fromkeys(bucket for fate in fates for bucket, _ in fate.clips))
    numbers = {bucket: number for number, bucket in enumerate(offered)}
    owners, buckets = spread(kinds, [[numbers[bucket] for bucket, _ in fate.clips] for fate in fates])
    _, firsts = spread(kinds, [[first for _, first in fate.clips] for fate in fates])
    told = list(dict.fromkeys(reason for fate in fates for reason in fate.reasons))
    left, reasons = spread(kinds, [[told.index(reason) for reason in fate.reasons] for fate in fates])
    return Assignment(
        Clips(samples, owners, buckets, firsts, offered, fps), Reasons(samples.ids.take(left), reasons, told)
    )


class Reasons(Rows[tuple[str, str]]):
    """Samples that are left out, by their ids, and why."""

    def __init__(self, ids: Texts, numbers: np.ndarray, told: Sequence[str]) -> None:
        self.ids, self.numbers, self.told = ids, numbers, tuple(told)

    def __len__(self) -> int:
        return len(self.numbers)

    def make(self, row: int) -> tuple[str, str]:
        return self.ids.make(row), self.told[int(self.numbers[row])]


def check_draws(data: DataConfig) -> None:
    """Refuse rules that nothing follows."""
    if data.draw == "once" and any(rule.keep_resolution < 1 for rule in data.buckets):
        raise UserError(
            "data.buckets: keep_resolution is drawn each epoch, and data.draw=once puts a clip in a bucket of every "
            "resolution; set data.draw=epoch"
        )


def rate(data: DataConfig) -> Fraction:
    """Return `data.fps` as an exact fraction."""
    return exact_rate(data.fps)


def bucket_groups(source: SourceConfig, data: DataConfig, *, geometry: Geometry) -> tuple[tuple[Bucket, ...], ...]:
    """Return the buckets that a source offers, a group for each resolution; explicit sizes are one group."""
    own_grid = source.resolutions is not None or source.frames is not None
    sizes = source.sizes or (() if own_grid else data.sizes)
    if sizes:
        return (tuple(_explicit(size, geometry) for size in sizes),)
    frames = source.frames or data.frames
    for count in frames:
        if fault := geometry.length_fault(count):
            raise UserError(f"data.frames: {fault}")
    groups = []
    for resolution in source.resolutions or data.resolutions:
        shapes = dict.fromkeys(_shapes(resolution, data, geometry.unit))
        groups.append(tuple(Bucket(count, *shape) for count in frames for shape in shapes))
    return tuple(groups)


def first_bucket(data: DataConfig, *, geometry: Geometry) -> Bucket:
    """Return the first of `data.sizes`, or the longest bucket of the first resolution (a single number is a square)."""
    group = bucket_groups(SourceConfig(""), data, geometry=geometry)[0]
    if data.sizes:
        return group[0]
    first = data.resolutions[0]
    ratio = 1.0 if isinstance(first, int) else first[0] / first[1]
    return min(group, key=lambda bucket: (abs(math.log(bucket.width / bucket.height / ratio)), -bucket.frames))


def _explicit(size: tuple[int, int, int], geometry: Geometry) -> Bucket:
    width, height, frames = size
    if fault := geometry.fault(width, height, frames):
        raise UserError(f"data.sizes: {fault}")
    return Bucket(frames, height, width)


def aspect_ratios(data: DataConfig) -> tuple[float, ...]:
    """Return ratios of width to height: as given, or evenly spread on a logarithmic scale."""
    if data.aspect_ratios:
        return data.aspect_ratios
    if data.aspect_count == 1:
        return (math.sqrt(data.aspect_min * data.aspect_max),)
    step = (data.aspect_max / data.aspect_min) ** (1 / (data.aspect_count - 1))
    return tuple(data.aspect_min * step**i for i in range(data.aspect_count))


def _shapes(resolution: Resolution, data: DataConfig, unit: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (height, width) of about the resolution's area; first [w, h] itself and its transpose, where given."""
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    own = () if isinstance(resolution, int) else (width / height, height / width)
    for ratio in (*own, *aspect_ratios(data)):
        tall, wide = math.sqrt(width * height / ratio), math.sqrt(width * height * ratio)
        yield max(1, round(tall / unit[0])) * unit[0], max(1, round(wide / unit[1])) * unit[1]


class _Chooser:
    """Choose among the buckets of a source. Samples of one length and size are looked through once."""

    def __init__(self, groups: Sequence[Buckets], mode: str, data: DataConfig) -> None:
        self.groups, self.mode, self.data, self.fps = groups, mode, data, rate(data)
        self.rules = {bucket: rule_for(bucket, data.buckets) for group in groups for bucket in group}
        self.near = lru_cache(maxsize=SHAPES_KNOWN)(self._near)
        self.chances = lru_cache(maxsize=SHAPES_KNOWN)(self._chances)

    def _chances(self, shape: Shape) -> list[tuple[Bucket, float]]:
        """Return the buckets that samples of a shape stay in by one draw for all epochs, and how many of them do."""
        near = [self.near(number, shape) for number in range(len(self.groups))]
        buckets = dict.fromkeys(bucket for some in near if not isinstance(some, str) for bucket in some)
        some = [(bucket, self.rules[bucket].keep) for bucket in buckets if 0 < self.rules[bucket].keep < 1]
        return some if self.data.draw == "once" else []

    def fate(self, shape: Shape, draws: Sequence[bool]) -> Fate:
        """Return the clips of samples of a shape, or why there are none. draws: as many as there are `chances`."""
        stays = {bucket: rule.keep > 0 for bucket, rule in self.rules.items()}
        stays |= {bucket: drawn for (bucket, _), drawn in zip(self.chances(shape), draws, strict=True)}
        clips: list[tuple[Bucket, int]] = []
        reasons: list[str] = []
        for number in range(len(self.groups)):
            chosen = self._chosen(self.near(number, shape), stays)
            if isinstance(chosen, str):
                reasons.append(chosen)
            else:
                clips += [(bucket, first) for bucket in chosen for first in first_frames(shape[0], bucket, self.mode)]
        return Fate(tuple(clips), tuple(reasons))

    def _chosen(self, nearest: Buckets | str, stays: Mapping[Bucket, bool]) -> Buckets | str:
        """Return the bucket that a sample goes to, or all that it may be drawn for; or why there is none."""
        if isinstance(nearest, str):
            return nearest
        kept = [bucket for bucket in nearest if stays[bucket]]
        if self.data.draw == "once":
            return kept[:1] or not_drawn(nearest)
        # those where none stays count too: by them a sample leaves for a smaller resolution
        return kept if any(self.rules[bucket].keep_resolution > 0 for bucket in kept) else not_drawn(nearest)

    def _near(self, number: int, shape: Shape) -> Buckets | str:
        """Return a group's buckets of the nearest shape, longest first, or why there is none."""
        _, height, width, _ = shape
        lasting = [bucket for bucket in self.groups[number] if _lasts(shape, bucket)]
        if not lasting:
            return _too_short(shape, self.groups[number], self.fps)
        fitting = [
            bucket for bucket in lasting if self.data.upscale or (width >= bucket.width and height >= bucket.height)
        ]
        if not fitting:
            near = min(lasting, key=lambda bucket: (_distance(shape, bucket), bucket))
            return f"{width}×{height} is smaller than {near.width}×{near.height}; data.upscale=true allows it"
        best = min(_distance(shape, bucket) for bucket in fitting)
        return sorted((bucket for bucket in fitting if _distance(shape, bucket) <= best + 1e-9), reverse=True)


def drawn(name: str, bucket: Bucket, rule: BucketRule, data: DataConfig, *, seed: int) -> bool:
    """Tell whether a sample may be in a bucket: by one draw for all epochs, or by whether any epoch may draw it."""
    if data.draw == "epoch":
        return rule.keep > 0
    return draw(seed, name, bucket) < rule.keep


def not_drawn(buckets: Sequence[Bucket]) -> str:
    return f"not drawn for {', '.join(map(str, buckets))} (data.buckets, keep)"


def _lasts(shape: Shape, bucket: Bucket) -> bool:
    """Tell whether a file has enough frames; only images go to buckets of one frame."""
    frames, _, _, image = shape
    return bucket.frames == 1 if image else 1 < bucket.frames <= frames


def _too_short(shape: Shape, group: Buckets, fps: Fraction) -> str:
    frames, _, _, image = shape
    if image:
        return "an image, and no bucket holds 1 frame"
    least = min((bucket.frames for bucket in group if bucket.frames > 1), default=0)
    if not least:
        return "a video, and all buckets hold 1 frame"
    return f"{frames} frames at {float(fps):g} fps, the shortest bucket holds {least}"


def _distance(shape: Shape, bucket: Bucket) -> float:
    _, height, width, _ = shape
    return abs(math.log(width * bucket.height / (height * bucket.width)))


def rule_for(bucket: Bucket, rules: Sequence[BucketRule]) -> BucketRule:
    """Return the first rule whose [width, height, frames] matches, where 0 stands for any."""
    for rule in rules:
        width, height, frames = rule.size
        if width in (0, bucket.width) and height in (0, bucket.height) and frames in (0, bucket.frames):
            return rule
    return BucketRule(size=(0, 0, 0))


def batch_for(bucket: Bucket, global_batch: int, rules: Sequence[BucketRule]) -> int:
    """Return the samples of a step of a bucket: its rule's, or `train.global_batch`."""
    return rule_for(bucket, rules).global_batch or global_batch


def batch_sizes(config: Config) -> list[int]:
    """Return the samples that a step may have, whatever its bucket."""
    own = (rule.global_batch for rule in config.data.buckets if rule.global_batch)
    return list(dict.fromkeys([config.train.global_batch, *own]))


def draw(seed: int, sample_id: str, bucket: Bucket) -> float:
    """Draw uniformly from [0, 1): the same on every machine, independent for each bucket of a sample."""
    digest = hashlib.sha256(f"{seed}\0{sample_id}\0{tuple(bucket)}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def first_frames(frames: int, bucket: Bucket, mode: str) -> list[int]:
    """Return where a sample's clips begin: one, or as many as cover the whole length, evenly spread and overlapping."""
    room = frames - bucket.frames
    if mode == "multiple_overlapping":
        count = -(-frames // bucket.frames)
        return [round(Fraction(i * room, max(1, count - 1))) for i in range(count)]
    return [room // 2 if mode == "single_middle" else 0]


def micro_batch_for(
    bucket: Bucket, *, per_rank_batch: int, train: TrainConfig, rules: Sequence[BucketRule], tokens: int
) -> int:
    """Return how many samples of a bucket one forward pass takes: the largest divisor of a rank's batch in the limit.

    `tokens`: of one sample in all its streams. A rule's micro_batch takes precedence over the token budget.
    """
    limit = rule_for(bucket, rules).micro_batch
    if limit is None:
        limit = train.micro_tokens // tokens if train.micro_tokens else train.micro_batch
    return max(size for size in range(1, per_rank_batch + 1) if per_rank_batch % size == 0 and size <= max(1, limit))
