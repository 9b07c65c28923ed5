"""List the records that a config needs: sources in; clips and captions with their keys, and how to make each, out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from transpixeler.config.sections import Config, SourceConfig, UserError
from transpixeler.data.buckets import Bucket, Dropped, not_drawn
from transpixeler.data.cache.fingerprints import FileHashes
from transpixeler.data.draws import Draws
from transpixeler.data.features.needs import Needs
from transpixeler.data.items import Coded, Items
from transpixeler.data.jobs import ClipJob, Jobs, Keys, TextJob
from transpixeler.data.kept_survey import kept_path, kept_survey
from transpixeler.data.keying import Fingerprints, Keying, TextKeys
from transpixeler.data.prompt_pictures import PictureKeys, picture_jobs
from transpixeler.data.prompts import sampled_texts
from transpixeler.data.ranks import ALONE, Helpers
from transpixeler.data.shown import FieldJob
from transpixeler.data.survey import Survey, survey
from transpixeler.files import refuse_file
from transpixeler.models.conditions import shown_fields
from transpixeler.models.family import ModelFolder

SETS = ("train", "eval")


@dataclass(frozen=True)
class Catalog:
    """Everything a config refers to, encoded or not: clips as columns, by set, and texts that no clip has."""

    jobs: Mapping[str, Jobs]
    skipped: Mapping[str, Dropped]
    fixed: tuple[TextJob, ...]  # the empty caption, and the texts that evaluations sample from
    prompts: Mapping[str, Keys]  # keys of these
    folders: tuple[Path, ...]
    fields: tuple[FieldJob, ...] = ()  # that no clip has to itself
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by set
    pictures: PictureKeys = field(default_factory=PictureKeys)

    @property
    def items(self) -> Mapping[str, Items]:
        """Return the clips of each set."""
        return {name: jobs.items for name, jobs in self.jobs.items()}

    @property
    def empty_text_keys(self) -> Keys:
        return self.fixed[0].all_keys

    @property
    def clips(self) -> tuple[ClipJob, ...]:
        """Return the jobs of all clips, those with the same latents once."""
        known: set[Keys] = set()
        return tuple(job for jobs in self.jobs.values() for job in jobs.unique_clips(known))

    @property
    def texts(self) -> tuple[TextJob, ...]:
        """Return the jobs of all texts, each once."""
        fixed = {job.all_keys: job for job in self.fixed}
        known = set(fixed)
        return (*fixed.values(), *(job for jobs in self.jobs.values() for job in jobs.unique_texts(known)))

    def keys(self) -> dict[bytes, str]:
        """Return every key with a name for it."""
        clips = self.clips
        names = {key: f"clip {job.id}, stream {part}" for job in clips for part, key in job.keys.items()}
        names |= {key: f"clip {job.id}, {name}" for job in clips for (name, _), key in job.shown_keys.items()}
        names |= {job.key: f"{job.field.name} of {_told(job)}" for job in self.fields}
        return names | {key: f"caption {job.caption[:60]!r}" for job in self.texts for key in job.keys.values()}


def catalog(config: Config, model: ModelFolder, helpers: Helpers = ALONE) -> Catalog:
    """Read the sources; files that have not changed since the last time are neither opened nor hashed again.

    Where none has, what was found then is taken as it is.
    """
    if not config.data.train and not config.data.eval:
        raise UserError("data.train names no source; give a folder of pairs or a manifest")
    folders = cache_folders(config)
    for folder in folders:
        refuse_file(folder, "data.cache_dir")
    hashes = {folder: FileHashes(folder, helpers) for folder in folders}
    made_with = Fingerprints(config, model, hashes[folders[0]].digest)
    found = {name: surveyed(config, model, name, helpers) for name in SETS}
    texts = TextKeys(config, model, made_with, hashes[folders[0]], [row for one in found.values() for row in one.texts])
    keying = Keying(config, model, hashes, made_with, texts)
    jobs = {}
    for name in SETS:
        sources: tuple[SourceConfig, ...] = getattr(config.data, name)
        own = [cache_folder(source, config) for source in sources]
        path = kept_path(folders[0], f"{name}-keys")
        jobs[name] = keying.jobs(found[name], sources, own, traced=name == "eval", path=path)
    prompts = {text: texts.job(text, folders[0]) for text in sampled_texts(config, model.family)}
    seen = picture_jobs(config, model, texts, made_with, folders[0])
    for memory in hashes.values():
        memory.save()
    return Catalog(
        jobs,
        {name: one.skipped for name, one in found.items()},
        (texts.job("", folders[0]), *prompts.values(), *seen.texts),
        {text: job.all_keys for text, job in prompts.items()},
        folders,
        (*_blank_jobs([made.items for made in jobs.values()], model, folders[0]), *seen.fields),
        {name: one.told for name, one in found.items()},
        seen.keys,
    )


def _told(job: FieldJob) -> str:
    return " and ".join(str(picture.path) for picture in job.pictures) or "no frame"


def surveyed(config: Config, model: ModelFolder, name: str, helpers: Helpers = ALONE) -> Survey:
    """Look through the sources of a set, `train` or `eval`, which may have none."""
    sources: tuple[SourceConfig, ...] = getattr(config.data, name)
    if not sources:
        return Survey()
    memory, needs = cache_folders(config)[0], Needs.of(config, model)

    def look() -> Survey:
        how = {"geometry": needs.geometry, "seed": config.seed, "memory": memory, "needs": needs, "helpers": helpers}
        found = survey(sources, config.suffixes, config.data, **how)
        return drawn_once(found, config) if name == "eval" and config.data.draw == "epoch" else found

    return kept_survey(config, name, needs, memory, look)


def drawn_once(found: Survey, config: Config) -> Survey:
    """Keep one bucket of each sample: sets to measure on are the same in every epoch."""
    clips, ids = found.clips, found.clips.samples.ids
    coded = Coded(clips.offered, clips.numbers)
    taken = Draws(clips.owners, ids, coded, rules=config.data.buckets, seed=config.seed).taken(0)
    left = ~np.isin(clips.owners, clips.owners[taken])
    ways: dict[int, dict[Bucket, None]] = {}
    for owner, number in zip(clips.owners[left].tolist(), clips.numbers[left].tolist()):
        ways.setdefault(owner, {})[clips.offered[number]] = None
    dropped = sorted((ids[owner], not_drawn(list(some))) for owner, some in ways.items())
    clips = clips.take(taken)
    return replace(found, clips=clips, dropped=(*found.dropped, *dropped))


def _blank_jobs(sets: Sequence[Items], model: ModelFolder, folder: Path) -> tuple[FieldJob, ...]:
    """List what clips of which no frame is given are shown, once for each bucket."""
    fields = {field.name: field for field in shown_fields(model.fields)}
    found: dict[bytes, FieldJob] = {}
    for items in sets:
        for number in np.unique(items.clips.numbers).tolist():
            for name, key in items.runs[number].blank:
                found.setdefault(key, FieldJob(fields[name], items.clips.offered[number], key, folder))
    return tuple(found.values())


def cache_folders(config: Config) -> tuple[Path, ...]:
    """Return the cache folders: one beside each source, or the one that `data.cache_dir` names."""
    sources = (*config.data.train, *config.data.eval)
    return tuple(dict.fromkeys(cache_folder(source, config) for source in sources))


def own_folders(found: Catalog, config: Config) -> dict[Path, Path]:
    """Return this rank's cache folder for each of rank 0's, whose config may name others."""
    own = cache_folders(config)
    if len(own) != len(found.folders):
        raise UserError(
            f"data.cache_dir: rank 0 keeps {len(found.folders)} caches, this one {len(own)}; set it on all or none"
        )
    return dict(zip(found.folders, own))


def cache_folder(source: SourceConfig, config: Config) -> Path:
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser().absolute()
    path = Path(source.path).expanduser().absolute()
    return (path if path.is_dir() else path.parent) / "cache"
