"""List the records that a config needs: sources in; clips and captions with their keys, and how to make each, out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transpixeler.config.sections import Config, SourceConfig, UserError
from transpixeler.data.buckets import Bucket, Clips, Dropped, not_drawn
from transpixeler.data.cache.fingerprints import FileHashes
from transpixeler.data.draws import Draws
from transpixeler.data.features.needs import Needs
from transpixeler.data.items import Item, ShownKeys
from transpixeler.data.keys import (
    first_frame,
    given_part_keys,
    given_text_keys,
    keys_of_shown,
    latent_keys,
    part_keys,
    text_keys,
)
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.files import files_of
from transpixeler.data.media.fill import Fill
from transpixeler.data.parts import Part
from transpixeler.data.pictures import Picture
from transpixeler.data.prompts import sampled_texts
from transpixeler.data.shown import BlankJob
from transpixeler.data.sources.candidate import NOT_GIVEN, TEXT_COLUMN, Features, TextRow
from transpixeler.data.sources.pairs import source_names
from transpixeler.data.sources.samples import Sample
from transpixeler.data.survey import Survey, survey
from transpixeler.flow.tasks import all_beside, views
from transpixeler.models.conditions import shown_fields
from transpixeler.models.family import Digest, ModelFolder, sees_frames

Keys = tuple[bytes, ...]  # of a caption's fields, in the model's order

SETS = ("train", "eval")
HASHING_THREADS = 8


@dataclass(frozen=True)
class ClipJob:
    """One clip and the parts of it to encode: all, or those whose records are missing."""

    id: str
    sample: Sample
    clip: Clip
    bucket: Bucket
    folder: Path
    latent_keys: tuple[bytes, ...]  # one a part, in the order of the sequence
    keys: Mapping[Part, bytes]  # of those to encode
    shown: ShownKeys | None = None
    shown_keys: Mapping[tuple[str, int], bytes] = field(default_factory=dict)  # by field and stream, of those to encode
    picture: Picture | None = None  # that its caption is read beside, where a text encoder sees

    @property
    def given(self) -> bool:
        """Tell whether its latents are taken from files."""
        return bool(self.sample.features.latents)

    @property
    def cost(self) -> int:
        return self.clip.frames * self.clip.height * self.clip.width * (len(self.keys) + len(self.shown_keys))


@dataclass(frozen=True)
class TextJob:
    """One caption to encode, with a key for each field that comes from it."""

    keys: Mapping[str, bytes]  # by field, in the model's order
    caption: str
    folder: Path
    features: Features = NOT_GIVEN  # with `text`: the file that they are taken from
    alone: bool = False  # of a row that gives nothing else, so no clip can be left out for it
    picture: Picture | None = None  # that it is read beside, by an encoder that sees; None: a black one
    lacks: tuple[str, ...] = ()  # fields whose records are to be made

    @property
    def given(self) -> bool:
        return self.features.text is not None

    @property
    def all_keys(self) -> Keys:
        return tuple(self.keys.values())

    @property
    def cost(self) -> int:
        return 32 + len(self.caption)


@dataclass(frozen=True)
class Catalog:
    """Everything a config refers to, encoded or not."""

    items: Mapping[str, tuple[Item, ...]]  # by set
    skipped: Mapping[str, Dropped]
    clips: tuple[ClipJob, ...]
    texts: tuple[TextJob, ...]
    empty_text_keys: Keys
    prompts: Mapping[str, Keys]  # keys of the texts that evaluations sample from
    folders: tuple[Path, ...]
    blanks: tuple[BlankJob, ...] = ()
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by set

    def keys(self) -> dict[bytes, str]:
        """Return every key with a name for it."""
        names = {key: f"clip {job.id}, stream {part}" for job in self.clips for part, key in job.keys.items()}
        names |= {key: f"clip {job.id}, {name}" for job in self.clips for (name, _), key in job.shown_keys.items()}
        names |= {job.key: f"{job.field.name} of no frame" for job in self.blanks}
        return names | {key: f"caption {job.caption[:60]!r}" for job in self.texts for key in job.keys.values()}


def catalog(config: Config, model: ModelFolder) -> Catalog:
    """Read the sources; files that have not changed since the last time are neither opened nor hashed again."""
    if not config.data.train and not config.data.eval:
        raise UserError("data.train names no source; give a folder of pairs or a manifest")
    folders = cache_folders(config)
    hashes = {folder: FileHashes(folder) for folder in folders}
    made_with = Fingerprints(config, model, hashes[folders[0]].digest)
    found = {name: surveyed(config, model, name) for name in SETS}
    texts_of = Texts(config, model, made_with, hashes[folders[0]], [row for one in found.values() for row in one.texts])
    clips: dict[tuple[bytes, ...], ClipJob] = {}
    texts: dict[Keys, TextJob] = {}
    items: dict[str, tuple[Item, ...]] = {}
    for name in SETS:
        sources: tuple[SourceConfig, ...] = getattr(config.data, name)
        names, own = source_names(sources), []
        for job in _clip_jobs(config, model, sources, found[name], hashes, made_with):
            both = texts_of.of_clip(job)
            clips.setdefault(job.latent_keys, job)
            for text in both:
                texts.setdefault(text.all_keys, text)
            item = _item(job, both, sources[job.sample.source].repeats, names[job.sample.source])
            shown = name == "eval" and not job.given
            own.append(replace(item, origin=(job.sample, job.clip)) if shown else item)
        items[name] = tuple(own)
    empty = texts_of.job("", folders[0])
    prompts = {text: texts_of.job(text, folders[0]) for text in sampled_texts(config, model.family)}
    texts = {job.all_keys: job for job in (empty, *prompts.values())} | texts
    for memory in hashes.values():
        memory.save()
    keys = {text: job.all_keys for text, job in prompts.items()}
    made, skipped = (tuple(clips.values()), tuple(texts.values())), {name: one.skipped for name, one in found.items()}
    blanks, notes = _blank_jobs(made[0], model, folders[0]), {name: one.told for name, one in found.items()}
    return Catalog(items, skipped, *made, empty.all_keys, keys, folders, blanks, notes)


class Fingerprints(dict[str, str]):
    """Hold hashes of what records are made with, by the source of the fields that they are for; latents as "clip".

    Each is found when it is asked for: where all features are given, no encoder needs to be here.
    """

    def __init__(self, config: Config, model: ModelFolder, digest: Digest) -> None:
        super().__init__()
        self.model, self.digest = model, digest
        kind = config.model.quantize_encoders
        self.quantized = "" if kind == "none" else f" {kind}"  # of text encoders

    def __missing__(self, source: str) -> str:
        found = {
            "clip": self.model.vae_fingerprint,
            "image": self.model.image_fingerprint,
            "caption": self.model.text_fingerprint,
        }
        self[source] = found[source](self.digest) + (self.quantized if source == "caption" else "")
        return self[source]


class Texts:
    """Make the jobs of texts: from a row's own features, from a row that gives a text's alone, or to be encoded."""

    def __init__(
        self,
        config: Config,
        model: ModelFolder,
        made_with: Mapping[str, str],
        hashes: FileHashes,
        rows: Sequence[TextRow],
    ) -> None:
        self.config, self.model, self.made_with, self.hashes = config, model, made_with, hashes
        self.alone = {row.text: row.features for row in rows}

    def job(self, text: str, folder: Path, features: Features = NOT_GIVEN, picture: Picture | None = None) -> TextJob:
        """Return the job of a text. picture: that it is read beside; None: a black one."""
        own = features if features.text else self.alone.get(text, NOT_GIVEN)
        if own.text is not None:
            keys = given_text_keys(self.hashes.digest(own.text), self.model.fields)
            return TextJob(keys, text, folder, own, alone=own is not features)
        cleaned, key = self.model.clean_caption(text), picture.key if picture else None
        keys = text_keys(cleaned, self._encoder(text), self.model.fields, picture=key)
        return TextJob(keys, text, folder, picture=picture)

    def of_clip(self, job: ClipJob) -> tuple[TextJob, ...]:
        """Return the jobs of a clip's caption: one, or beside its first frame and beside none where tasks want both."""
        told = job.sample.caption, job.folder, job.sample.features
        if job.picture is None:
            return (self.job(*told),)
        config, video = self.config, job.clip.frames > 1
        seen, unseen = views(config.objective, tuple(config.streams), video=video)
        return (*[self.job(*told, job.picture)] * seen, *[self.job(*told)] * unseen)

    def _encoder(self, text: str) -> str:
        try:
            return self.made_with["caption"]
        except UserError as fault:
            row = json.dumps({"text": text, TEXT_COLUMN: "FILE"}, ensure_ascii=False)
            raise UserError(f"{fault}; or give the features of this text in a manifest's row: {row}") from fault


def surveyed(config: Config, model: ModelFolder, name: str) -> Survey:
    """Look through the sources of a set, `train` or `eval`, which may have none."""
    sources: tuple[SourceConfig, ...] = getattr(config.data, name)
    if not sources:
        return Survey()
    found = survey(
        sources,
        config.suffixes,
        config.data,
        geometry=model.geometry.over(config.scales),
        seed=config.seed,
        memory=cache_folders(config)[0],
        needs=Needs.of(config, model),
    )
    return drawn_once(found, config) if name == "eval" and config.data.draw == "epoch" else found


def drawn_once(found: Survey, config: Config) -> Survey:
    """Keep one bucket of each sample: sets to measure on are the same in every epoch."""
    owners, buckets = [clip.sample.id for clip in found.clips], [clip.bucket for clip in found.clips]
    taken = Draws(owners, buckets, rules=config.data.buckets, seed=config.seed).taken(0)
    clips = found.clips.take(taken) if isinstance(found.clips, Clips) else ()
    kept, ways = {clip.sample.id for clip in clips}, dict[str, dict[Bucket, None]]()
    for owner, bucket in zip(owners, buckets):
        if owner not in kept:
            ways.setdefault(owner, {})[bucket] = None
    dropped = [(name, not_drawn(list(some))) for name, some in sorted(ways.items())]
    return replace(found, clips=clips, dropped=(*found.dropped, *dropped))


def _blank_jobs(clips: Sequence[ClipJob], model: ModelFolder, folder: Path) -> tuple[BlankJob, ...]:
    """List what clips of which no frame is given are shown, once for each bucket."""
    fields = {field.name: field for field in shown_fields(model.fields)}
    found: dict[bytes, BlankJob] = {}
    for job in clips:
        for name, key in (job.shown.blank if job.shown else {}).items():
            found.setdefault(key, BlankJob(fields[name], job.bucket, key, folder))
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


def _item(job: ClipJob, texts: Sequence[TextJob], repeats: int, source: str) -> Item:
    return Item(
        id=job.id,
        sample_id=job.sample.id,
        caption=texts[0].caption,
        bucket=job.bucket,
        latent_keys=job.latent_keys,
        text_keys=texts[0].all_keys,
        unseen_text_keys=texts[1].all_keys if len(texts) > 1 else (),
        repeats=repeats,
        source=source,
        shown=job.shown,
    )


def _clip_jobs(
    config: Config,
    model: ModelFolder,
    sources: Sequence[SourceConfig],
    found: Survey,
    hashes: Mapping[Path, FileHashes],
    encoders: Mapping[str, str],
) -> list[ClipJob]:
    """Return all clips of one set in the order of their samples."""
    folders = [cache_folder(source, config) for source in sources]
    used = list({sample.id: sample for sample, _, _ in found.clips}.values())
    digests, fill = _digests(used, folders, hashes), Fill.of(config.data)
    beside = all_beside(config.objective, tuple(config.streams), model.fields)
    jobs = []
    for sample, clip, bucket in found.clips:
        if sample.features.latents:
            keys = given_part_keys(sample, clip, digests=digests, beside=beside)
        else:
            keys = part_keys(config, sample, clip, digests=digests, fill=fill, vae=encoders["clip"], beside=beside)
        job = ClipJob(clip.id, sample, clip, bucket, folders[sample.source], tuple(keys.values()), keys)
        if fields := shown_fields(model.fields):
            content = latent_keys(sample, clip, digests=digests, fill=fill, vae="")
            shown = keys_of_shown(fields, tuple(content.values()), bucket, encoders)
            each = {(name, n): key for name, own in shown.own.items() for n, key in enumerate(own)}
            job = replace(job, shown=shown, shown_keys=each)
        if sees_frames(model.fields):
            job = replace(job, picture=first_frame(sample, clip, digests=digests, fill=fill))
        jobs.append(job)
    return jobs


def _digests(samples: Sequence[Sample], folders: Sequence[Path], hashes: Mapping[Path, FileHashes]) -> dict[Path, str]:
    """Hash the content of each stream's file, or of all images in its folder."""
    found: dict[Path, str] = {}
    for folder, memory in hashes.items():
        paths = {path for sample in samples if folders[sample.source] == folder for _, path in sample.paths}
        files = {path: files_of(path) for path in sorted(paths)}
        each = memory.digests([file for some in files.values() for file in some], HASHING_THREADS)
        for path, some in files.items():
            whole = [each[file] for file in some]
            found[path] = whole[0] if len(whole) == 1 else hashlib.sha256("".join(whole).encode()).hexdigest()
    return found
