"""Take features into the cache: clips and captions whose rows give them in; their records, checked, out.

No encoder is loaded. A key is a hash of the file's content, so that a record depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from transpixeler.data.cache.records import DTYPE, Record
from transpixeler.data.features.files import old_formats, open_features
from transpixeler.data.features.needs import Needs, blamed
from transpixeler.data.jobs import ClipJob, TextJob
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.sources.candidate import TEXT_COLUMN, latent_column
from transpixeler.models.family import caption_fields

Put = Callable[[Path, list[Record]], None]
Refuse = Callable[[ClipJob | TextJob, BadMedia], None]


def take(jobs: Iterable[ClipJob | TextJob], needs: Needs, put: Put, refuse: Refuse) -> None:
    """Write the records of each job, or say why its files cannot be used."""
    with old_formats():
        for job in jobs:
            try:
                records = clip_records(job, needs) if isinstance(job, ClipJob) else text_records(job, needs)
            except BadMedia as reason:
                refuse(job, reason)
            else:
                put(job.folder, records)


def clip_records(job: ClipJob, needs: Needs) -> list[Record]:
    """Return the records of a clip that lack one."""
    features, records = job.sample.features, []
    paths: Mapping[str, Path] = dict(features.latents)
    for part, key in job.keys.items():
        with blamed(features, latent_column(part.stream, needs.first), paths[part.stream]):
            opened = open_features(paths[part.stream])
            value = needs.latent(features, opened, part)
            size = (job.clip.frames, job.clip.height, job.clip.width)
            needs.check_shape(value, size, part)  # the file may have changed since it was scanned
            needs.check_values(value, opened, latent=True)
            records.append(Record("latent", key, value.to(DTYPE)))
    return records


def text_records(job: TextJob, needs: Needs) -> list[Record]:
    """Return a caption's records."""
    features = job.features
    assert features.text is not None, job
    kinds = {field.name: "text" if field.length else "vector" for field in caption_fields(needs.fields or ())}
    with blamed(features, TEXT_COLUMN, features.text):
        opened = open_features(features.text)
        found = needs.texts(opened)
        for value in found.values():
            needs.check_values(value, opened, latent=False)
    return [Record(kinds[name], key, found[name].to(DTYPE)) for name, key in job.keys.items()]
