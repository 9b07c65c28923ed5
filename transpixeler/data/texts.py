"""Encode captions: jobs in; a record for each field out, of the caption, or of it beside its clip's first frame.

The networks that read captions are loaded one after the other, so that the device holds one of them at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.data.cache.records import DTYPE, Record
from transpixeler.data.jobs import TextJob
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.progress import Progress
from transpixeler.models.family import ModelFolder, SeeingTextEncoder, TextEncoder, caption_fields
from transpixeler.models.text_parts import fields_of_part, makes_seen, open_text_part
from transpixeler.parallel.runtime import Runtime

TEXTS_AT_ONCE = 16  # written together, with one fsync for all

Put = Callable[[Path, list[Record]], None]
Refuse = Callable[[TextJob, BadMedia], None]


def encode_texts(
    config: Config, model: ModelFolder, runtime: Runtime, jobs: Sequence[TextJob], put: Put, refuse: Refuse
) -> None:
    """Write what captions lack, by one network after the other. refuse: is told of those whose picture is bad."""
    bad: set[tuple[bytes, ...]] = set()

    def left_out(job: TextJob, reason: BadMedia) -> None:
        refuse(job, reason)
        bad.add(job.all_keys)

    for part in model.text_parts:
        names, seen = fields_of_part(part, model.fields), makes_seen(part, model.fields)
        wanted = _lacking([job for job in jobs if job.all_keys not in bad], names)
        if not wanted:
            continue
        encoder = open_text_part(model, part, device=runtime.device, quantize=config.model.quantize_encoders)
        with Progress("captions", len(wanted), 0, shown=runtime.is_main, ranks=runtime.world_size) as progress:
            for start in range(0, len(wanted), TEXTS_AT_ONCE):
                some = wanted[start : start + TEXTS_AT_ONCE]
                _write(_encoded(encoder, some, left_out, seen=seen), names, model, put)
                progress.step(len(some))
        del encoder
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def _lacking(jobs: Sequence[TextJob], names: Collection[str]) -> list[TextJob]:
    """Return the jobs that lack a record of some fields; the same field of several clips is made once."""
    found: dict[tuple[bytes, ...], TextJob] = {}
    for job in jobs:
        if keys := tuple(job.keys[name] for name in names if name in job.lacks):
            found.setdefault(keys, job)
    return list(found.values())


Values = list[tuple[TextJob, dict[str, Tensor]]]


def _encoded(encoder: TextEncoder, jobs: Sequence[TextJob], refuse: Refuse, *, seen: bool) -> Values:
    """Return each job's fields; those that are read beside a picture get theirs."""
    if not seen:
        return list(zip(jobs, encoder.encode([job.caption for job in jobs]), strict=True))
    found: Values = []
    with ThreadPoolExecutor() as pool:
        pictures = [(job, pool.submit(job.picture.read, 1) if job.picture else None) for job in jobs]
        for job, reading in pictures:
            try:
                picture = torch.from_numpy(reading.result()) if reading else None
            except BadMedia as reason:
                refuse(job, reason)
            else:
                (values,) = cast(SeeingTextEncoder, encoder).encode_beside([job.caption], [picture])
                found.append((job, values))
    return found


def _write(values: Values, names: Collection[str], model: ModelFolder, put: Put) -> None:
    kinds = {field.name: "text" if field.length else "vector" for field in caption_fields(model.fields)}
    for folder in dict.fromkeys(job.folder for job, _ in values):
        rows = [(job, found) for job, found in values if job.folder == folder]
        parts = [(name, job.keys[name], found[name]) for job, found in rows for name in names if name in job.lacks]
        put(folder, [Record(kinds[name], key, value.to(DTYPE)) for name, key, value in parts])
