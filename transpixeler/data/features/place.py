"""Find the bucket of samples whose latents are given: it must be theirs exactly, since nothing is cut or scaled.

In: samples. Out: a clip for each, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.buckets import Assignment, Bucket, Fate, bucket_groups, decided, drawn, not_drawn, rate, rule_for
from transpixeler.data.sources.samples import Sample, Samples
from transpixeler.models.geometry import Geometry

BUCKETS_SHOWN = 6


def place(
    samples: Samples,
    sources: Sequence[SourceConfig],
    data: DataConfig,
    *,
    geometry: Geometry,
    seed: int,
) -> Assignment:
    """Return the clips of samples whose latents are given."""
    used = {int(source) for source in np.unique(samples.sources)}
    offered = {
        number: dict.fromkeys(bucket for group in bucket_groups(source, data, geometry=geometry) for bucket in group)
        for number, source in enumerate(sources)
        if number in used
    }
    fates: dict[Fate, int] = {}
    kinds = np.empty(len(samples), np.int32)
    misfits: list[str] = []
    for row, (source, kind) in enumerate(zip(samples.sources.tolist(), samples.kinds.tolist())):
        shape = samples.shapes[kind]
        bucket = Bucket(*shape[:3])  # given latents have no rate, so these are their own frames
        if bucket not in offered[source]:
            misfits.append(_misfit(samples[row], bucket, list(offered[source])))
            fate = Fate((), (misfits[-1],))
        elif not drawn(samples.ids.make(row), bucket, rule_for(bucket, data.buckets), data, seed=seed):
            fate = Fate((), (not_drawn([bucket]),))
        else:
            fate = Fate(((bucket, 0),), ())
        kinds[row] = fates.setdefault(fate, len(fates))
    if misfits and data.on_bad == "error":
        raise UserError(f"{len(misfits)} samples fit no bucket, the first is {misfits[0]}; or set data.on_bad=skip")
    return decided(samples, kinds, [*fates], rate(data))


def _misfit(sample: Sample, bucket: Bucket, offered: Sequence[Bucket]) -> str:
    near = sorted(offered, key=lambda other: sum(abs(a - b) for a, b in zip(other, bucket)))[:BUCKETS_SHOWN]
    size = f"[{bucket.width}, {bucket.height}, {bucket.frames}]"
    return (
        f"{sample.features.row}: its latents {sample.paths[0][1]} are of {bucket}, which is no bucket; near are "
        f"{', '.join(map(str, near))}: name {size} in data.sizes"
    )
