"""Find the bucket of samples whose latents are given: it must be theirs exactly, since nothing is cut or scaled.

In: samples. Out: a clip for each, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.buckets import Assignment, Bucket, bucket_groups, drawn, not_drawn, rate, rule_for
from transpixeler.data.media.clip import Clip
from transpixeler.data.sources.pairs import Sample
from transpixeler.models.geometry import Geometry

BUCKETS_SHOWN = 6


def place(
    samples: Sequence[Sample],
    sources: Sequence[SourceConfig],
    data: DataConfig,
    *,
    geometry: Geometry,
    seed: int,
) -> Assignment:
    """Return the clips of samples whose latents are given."""
    used = {sample.source for sample in samples}
    offered = {
        number: dict.fromkeys(bucket for group in bucket_groups(source, data, geometry=geometry) for bucket in group)
        for number, source in enumerate(sources)
        if number in used
    }
    clips: list[tuple[Bucket, Clip]] = []
    dropped: list[tuple[str, str]] = []
    for sample in samples:
        media = sample.media
        bucket = Bucket(media.frames, media.height, media.width)
        if bucket not in offered[sample.source]:
            dropped.append((sample.id, _misfit(sample, bucket, list(offered[sample.source]))))
        elif not drawn(sample, bucket, rule_for(bucket, data.buckets), data, seed=seed):
            dropped.append((sample.id, not_drawn([bucket])))
        else:
            clips.append((bucket, Clip(sample.id, Fraction(0), *bucket[:1], rate(data), *bucket[1:])))
    misfits = [reason for name, reason in dropped if not reason.startswith("not drawn")]
    if misfits and data.on_bad == "error":
        raise UserError(f"{len(misfits)} samples fit no bucket, the first is {misfits[0]}; or set data.on_bad=skip")
    return Assignment(tuple(clips), tuple(dropped))


def _misfit(sample: Sample, bucket: Bucket, offered: Sequence[Bucket]) -> str:
    near = sorted(offered, key=lambda other: sum(abs(a - b) for a, b in zip(other, bucket)))[:BUCKETS_SHOWN]
    size = f"[{bucket.width}, {bucket.height}, {bucket.frames}]"
    return (
        f"{sample.features.row}: its latents {sample.paths[0][1]} are of {bucket}, which is no bucket; near are "
        f"{', '.join(map(str, near))}: name {size} in data.sizes"
    )
