"""Find a set's clips: sources in; every sample with the buckets it goes to, and a reason for all that is not used, out.

The one way from sources to clips, for encoding, planning and inspecting alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.buckets import Bucket, assign
from transpixeler.data.features.needs import Needs
from transpixeler.data.features.place import place
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import probe
from transpixeler.data.media.probe import Probes
from transpixeler.data.sources.candidate import BadSample, Note, TextRow
from transpixeler.data.sources.pairs import Sample, scan
from transpixeler.models.geometry import Geometry


class SampleClip(NamedTuple):
    """One clip of a sample and its bucket."""

    sample: Sample
    clip: Clip
    bucket: Bucket


@dataclass(frozen=True)
class Survey:
    """The samples that the sources of a set hold, good and bad."""

    samples: tuple[Sample, ...] = ()
    bad: tuple[BadSample, ...] = ()
    clips: tuple[SampleClip, ...] = ()  # in the order of their samples
    dropped: tuple[tuple[str, str], ...] = ()  # (sample id, reason) of samples that fit no bucket
    texts: tuple[TextRow, ...] = ()  # rows that give the features of a text alone
    notes: tuple[Note, ...] = ()  # on files that are in no sample, and on how others were understood

    @property
    def told(self) -> tuple[str, ...]:
        """Return the notes as texts."""
        return tuple(map(str, self.notes))

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(sample id, reason) of all that is not used."""
        return (*((sample.id, sample.reason) for sample in self.bad), *self.dropped)


def survey(
    sources: Sequence[SourceConfig],
    streams: Mapping[str, str],
    data: DataConfig,
    *,
    geometry: Geometry,
    seed: int,
    memory: Path | None = None,  # the folder where probes are remembered
    needs: Needs | None = None,
) -> Survey:
    """Scan the sources and assign each sample its buckets. needs: of features that manifests may give."""
    probes = Probes(memory) if memory is not None else None
    found = scan(sources, streams, data, probe=probes or probe, needs=needs)
    if probes is not None:
        probes.save()
    videos = [sample for sample in found.samples if not sample.features.latents]
    given = [sample for sample in found.samples if sample.features.latents]
    assigned = assign(videos, sources, data, geometry=geometry, seed=seed)
    placed = place(given, sources, data, geometry=geometry, seed=seed)
    samples = {sample.id: sample for sample in found.samples}
    assert len(samples) == len(found.samples), "two samples share an id"
    both = (*assigned.clips, *placed.clips)
    clips = [SampleClip(samples[clip.sample_id], clip, bucket) for bucket, clip in both]
    if given:
        clips.sort(key=lambda clip: clip.sample.id)  # as the samples are; the clips of one keep their order
    dropped = (*assigned.dropped, *placed.dropped)
    return Survey(found.samples, found.bad, tuple(clips), dropped, found.texts, found.notes)
