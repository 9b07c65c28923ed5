"""Find a set's clips: sources in; every sample with the buckets it goes to, and a reason for all that is not used, out.

The one way from sources to clips, for encoding, planning and inspecting alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.buckets import Clips, Dropped, assign, rate
from transpixeler.data.columns import Texts
from transpixeler.data.features.needs import Needs
from transpixeler.data.features.place import place
from transpixeler.data.media.decode import probe
from transpixeler.data.media.probe import Probes
from transpixeler.data.ranks import ALONE, Helpers
from transpixeler.data.sources.candidate import BadSample, Note, TextRow
from transpixeler.data.sources.pairs import scan
from transpixeler.data.sources.samples import Sample, Samples
from transpixeler.models.geometry import Geometry


@dataclass(frozen=True)
class Survey:
    """The samples that the sources of a set hold, good and bad."""

    samples: Sequence[Sample] = ()
    bad: tuple[BadSample, ...] = ()
    clips: Clips = field(default_factory=Clips.none)  # in the order of their samples
    dropped: Dropped = ()  # of samples that fit no bucket
    texts: tuple[TextRow, ...] = ()  # rows that give the features of a text alone
    notes: tuple[Note, ...] = ()  # on files that are in no sample, and on how others were understood
    others: Texts = field(default_factory=lambda: Texts.of(()))  # files that rows name which make no sample
    mark: str = ""  # all that it was found from, where that is known to be at rest

    @property
    def told(self) -> tuple[str, ...]:
        """Return the notes as texts."""
        return tuple(map(str, self.notes))

    @property
    def skipped(self) -> Dropped:
        """(sample id, reason) of all that is not used."""
        bad = tuple((sample.id, sample.reason) for sample in self.bad)
        return (*bad, *self.dropped) if bad else self.dropped


def survey(
    sources: Sequence[SourceConfig],
    streams: Mapping[str, str],
    data: DataConfig,
    *,
    geometry: Geometry,
    seed: int,
    memory: Path | None = None,  # the folder where probes are remembered
    needs: Needs | None = None,
    helpers: Helpers = ALONE,
) -> Survey:
    """Scan the sources and assign each sample its buckets. needs: of features that manifests may give."""
    probes = Probes(memory, helpers) if memory is not None else None
    found = scan(sources, streams, data, probe=probes or probe, needs=needs)
    if probes is not None:
        probes.save()
    samples = Samples.of(found.samples, rate(data))
    how = {"sources": sources, "data": data, "geometry": geometry, "seed": seed}
    if not samples.given.any():
        made = assign(samples, **how)
        return Survey(samples, found.bad, made.clips, made.dropped, found.texts, found.notes, found.others)
    videos, given = np.flatnonzero(~samples.given), np.flatnonzero(samples.given)
    parts = assign(samples.take(videos), **how), place(samples.take(given), **how)
    clips = beside([part.clips for part in parts], [videos, given], samples)
    dropped = (*parts[0].dropped, *parts[1].dropped)
    return Survey(samples, found.bad, clips, dropped, found.texts, found.notes, found.others)


def beside(parts: Sequence[Clips], rows: Sequence[np.ndarray], samples: Samples) -> Clips:
    """Return the clips of several parts of all samples in the order of samples. rows: each part's among all."""
    offered = list(dict.fromkeys(bucket for part in parts for bucket in part.offered))
    owners = np.concatenate([some[part.owners] for part, some in zip(parts, rows)]).astype(np.int32)
    places = [np.array([offered.index(bucket) for bucket in part.offered], np.int32) for part in parts]
    numbers = np.concatenate([place[part.numbers] for part, place in zip(parts, places)])
    firsts = np.concatenate([part.firsts for part in parts])
    order = np.argsort(owners, kind="stable")
    return Clips(samples, owners[order], numbers[order], firsts[order], offered, parts[0].fps)
