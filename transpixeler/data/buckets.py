"""Assign samples to buckets: samples in; (bucket, clip) pairs, and a reason for each sample that fits none, out.

All clips of a batch share one bucket: (frames, height, width). For each resolution a sample goes to the bucket nearest
to its aspect ratio, and the longest that it fills; buckets of one frame are for images and never for videos.
All functions here are pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from transpixeler.config.sections import (
    BucketRule,
    Config,
    DataConfig,
    Resolution,
    SourceConfig,
    TrainConfig,
    UserError,
)
from transpixeler.data.media.clip import Clip, Media, exact_rate
from transpixeler.data.sources.pairs import Sample
from transpixeler.models.geometry import Geometry


class Bucket(NamedTuple):
    """The size in pixels of every clip in a batch."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}×{self.frames}"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Clips in the order of samples; `dropped` holds (sample id, reason)."""

    clips: tuple[tuple[Bucket, Clip], ...]
    dropped: tuple[tuple[str, str], ...]


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
    groups = [
        [_Group(group, data, seed) for group in bucket_groups(source, data, geometry=geometry)] for source in sources
    ]
    clips: list[tuple[Bucket, Clip]] = []
    dropped: list[tuple[str, str]] = []
    fps = rate(data)
    for sample in samples:
        mode = sources[sample.source].clip_mode or data.clip_mode
        for group in groups[sample.source]:
            chosen = group.choose(sample)
            if isinstance(chosen, str):
                dropped.append((sample.id, chosen))
                continue
            for bucket in chosen:
                clips += [(bucket, clip) for clip in clips_of(sample, bucket, mode=mode, fps=fps)]
    return Assignment(tuple(clips), tuple(dropped))


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


class _Group:
    """Choose among the buckets of one resolution. Samples of one length and size are looked through once."""

    def __init__(self, buckets: Sequence[Bucket], data: DataConfig, seed: int) -> None:
        self.buckets, self.data, self.seed, self.fps = buckets, data, seed, rate(data)
        self.rules = {bucket: rule_for(bucket, data.buckets) for bucket in buckets}
        self._nearest: dict[tuple[int, int, int, bool], Sequence[Bucket] | str] = {}

    def choose(self, sample: Sample) -> Sequence[Bucket] | str:
        """Return the bucket that a sample goes to, or all that it may be drawn for; or why there is none."""
        media = sample.media
        shape = media.frames_at(self.fps), media.height, media.width, media.image
        if shape not in self._nearest:
            self._nearest[shape] = self._find(media)
        nearest = self._nearest[shape]
        if isinstance(nearest, str):
            return nearest
        how = {"data": self.data, "seed": self.seed}
        kept = [bucket for bucket in nearest if drawn(sample, bucket, self.rules[bucket], **how)]
        if self.data.draw == "once":
            return kept[:1] or not_drawn(nearest)
        # those where none stays count too: by them a sample leaves for a smaller resolution
        return kept if any(self.rules[bucket].keep_resolution > 0 for bucket in kept) else not_drawn(nearest)

    def _find(self, media: Media) -> Sequence[Bucket] | str:
        """Return the buckets of the nearest shape, longest first, or why there is none."""
        lasting = [bucket for bucket in self.buckets if _lasts(media, bucket, self.fps)]
        if not lasting:
            return _too_short(media, self.buckets, self.fps)
        fitting = [bucket for bucket in lasting if self.data.upscale or _covers(media, bucket)]
        if not fitting:
            near = min(lasting, key=lambda bucket: (_distance(media, bucket), bucket))
            return (
                f"{media.width}×{media.height} is smaller than {near.width}×{near.height}; data.upscale=true allows it"
            )
        best = min(_distance(media, bucket) for bucket in fitting)
        return sorted((bucket for bucket in fitting if _distance(media, bucket) <= best + 1e-9), reverse=True)


def drawn(sample: Sample, bucket: Bucket, rule: BucketRule, data: DataConfig, *, seed: int) -> bool:
    """Tell whether a sample may be in a bucket: by one draw for all epochs, or by whether any epoch may draw it."""
    if data.draw == "epoch":
        return rule.keep > 0
    return draw(seed, sample.id, bucket) < rule.keep


def not_drawn(buckets: Sequence[Bucket]) -> str:
    return f"not drawn for {', '.join(map(str, buckets))} (data.buckets, keep)"


def _lasts(media: Media, bucket: Bucket, fps: Fraction) -> bool:
    """Tell whether a file has enough frames; only images go to buckets of one frame."""
    return bucket.frames == 1 if media.image else 1 < bucket.frames <= media.frames_at(fps)


def _too_short(media: Media, group: Sequence[Bucket], fps: Fraction) -> str:
    if media.image:
        return "an image, and no bucket holds 1 frame"
    least = min((bucket.frames for bucket in group if bucket.frames > 1), default=0)
    if not least:
        return "a video, and all buckets hold 1 frame"
    return f"{media.frames_at(fps)} frames at {float(fps):g} fps, the shortest bucket holds {least}"


def _covers(media: Media, bucket: Bucket) -> bool:
    return media.width >= bucket.width and media.height >= bucket.height


def _distance(media: Media, bucket: Bucket) -> float:
    return abs(math.log(media.width * bucket.height / (media.height * bucket.width)))


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


def clips_of(sample: Sample, bucket: Bucket, *, mode: str, fps: Fraction) -> Iterator[Clip]:
    """Yield one clip, or as many as cover the whole length, evenly spread and overlapping."""
    room = sample.media.frames_at(fps) - bucket.frames
    if mode == "multiple_overlapping":
        count = -(-(room + bucket.frames) // bucket.frames)
        firsts = [round(Fraction(i * room, max(1, count - 1))) for i in range(count)]
    else:
        firsts = [room // 2 if mode == "single_middle" else 0]
    for first in firsts:
        yield Clip(sample.id, Fraction(first) / fps, bucket.frames, fps, bucket.height, bucket.width)


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
