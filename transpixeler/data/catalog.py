"""List the records that a config needs: sources in; clips and captions with their keys, and how to make each, out.

A key is a hash of everything its record depends on, so that a record stays valid until one of those changes: the files'
content, the cut, the fill policy, the encoder's weights. Names, paths and times of files are not among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transpixeler.config import Config, SourceConfig, UserError
from transpixeler.data.buckets import Bucket
from transpixeler.data.cache.fingerprints import FileHashes
from transpixeler.data.dataset import Item, ShownKeys
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.files import IMAGE_ENDINGS, files_of
from transpixeler.data.media.fill import Fill
from transpixeler.data.parts import Part
from transpixeler.data.prompts import sampled_texts
from transpixeler.data.shown import BlankJob
from transpixeler.data.sources.pairs import Sample, source_names
from transpixeler.data.survey import survey
from transpixeler.flow.objective import all_lasts
from transpixeler.models.conditions import shown_fields
from transpixeler.models.family import Digest, Field, ModelFolder

Keys = tuple[bytes, ...]  # of a caption's fields, in the model's order

ENCODER_VERSION = 1  # raised when decoding, resizing or encoding gives other values
SETS = ("train", "eval")
HASHING_THREADS = 8
ANIMATED = IMAGE_ENDINGS | {".gif"}


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

    @property
    def cost(self) -> int:
        return self.clip.frames * self.clip.height * self.clip.width * (len(self.keys) + len(self.shown_keys))


@dataclass(frozen=True)
class TextJob:
    """One caption to encode, with a key for each field that comes from it."""

    keys: Mapping[str, bytes]  # by field, in the model's order
    caption: str
    folder: Path

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
    skipped: Mapping[str, tuple[tuple[str, str], ...]]
    clips: tuple[ClipJob, ...]
    texts: tuple[TextJob, ...]
    empty_text_keys: Keys
    prompts: Mapping[str, Keys]  # keys of the texts that evaluations sample from
    folders: tuple[Path, ...]
    blanks: tuple[BlankJob, ...] = ()

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
    texts_with = model.text_fingerprint(hashes[folders[0]].digest)
    encoders = _fingerprints(model, hashes[folders[0]].digest)

    def text_job(text: str, folder: Path) -> TextJob:
        return TextJob(text_keys(model.clean_caption(text), texts_with, model.fields), text, folder)

    empty = text_job("", folders[0])
    prompts = {text: text_job(text, folders[0]) for text in sampled_texts(config, model.family)}
    clips: dict[tuple[bytes, ...], ClipJob] = {}
    texts = {job.all_keys: job for job in (empty, *prompts.values())}
    items: dict[str, tuple[Item, ...]] = {}
    skipped: dict[str, tuple[tuple[str, str], ...]] = {}
    for name in SETS:
        sources: tuple[SourceConfig, ...] = getattr(config.data, name)
        jobs, skipped[name] = _clip_jobs(config, model, sources, hashes, encoders)
        names, found = source_names(sources), []
        for job in jobs:
            caption = job.sample.caption
            text = text_job(caption, job.folder)
            clips.setdefault(job.latent_keys, job)
            texts.setdefault(text.all_keys, text)
            item = _item(job, text, sources[job.sample.source].repeats, names[job.sample.source])
            found.append(replace(item, origin=(job.sample, job.clip)) if name == "eval" else item)
        items[name] = tuple(found)
    for memory in hashes.values():
        memory.save()
    keys = {text: job.all_keys for text, job in prompts.items()}
    made = tuple(clips.values()), tuple(texts.values())
    return Catalog(items, skipped, *made, empty.all_keys, keys, folders, _blank_jobs(made[0], model, folders[0]))


def _fingerprints(model: ModelFolder, digest: Digest) -> dict[str, str]:
    """Return what clips' records are made with, by the source of the fields that they are for; latents as "clip"."""
    found = {"clip": model.vae_fingerprint(digest)}
    images = any(field.source == "image" for field in model.fields)
    return found | ({"image": model.image_fingerprint(digest)} if images else {})


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


def cache_folder(source: SourceConfig, config: Config) -> Path:
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser().absolute()
    path = Path(source.path).expanduser().absolute()
    return (path if path.is_dir() else path.parent) / "cache"


def _item(job: ClipJob, text: TextJob, repeats: int, source: str) -> Item:
    return Item(
        id=job.id,
        sample_id=job.sample.id,
        caption=text.caption,
        bucket=job.bucket,
        latent_keys=job.latent_keys,
        text_keys=text.all_keys,
        repeats=repeats,
        source=source,
        shown=job.shown,
    )


def _clip_jobs(
    config: Config,
    model: ModelFolder,
    sources: Sequence[SourceConfig],
    hashes: Mapping[Path, FileHashes],
    encoders: Mapping[str, str],
) -> tuple[list[ClipJob], tuple[tuple[str, str], ...]]:
    """Return all clips of one set in the order of their samples, and what is left out with its reason."""
    if not sources:
        return [], ()
    found = survey(
        sources,
        config.suffixes,
        config.data,
        geometry=model.geometry.over(config.scales),
        seed=config.seed,
        memory=cache_folders(config)[0],
    )
    folders = [cache_folder(source, config) for source in sources]
    used = list({sample.id: sample for sample, _, _ in found.clips}.values())
    digests, fill = _digests(used, folders, hashes), Fill.of(config.data)
    jobs = []
    for sample, clip, bucket in found.clips:
        keys = part_keys(config, sample, clip, digests=digests, fill=fill, vae=encoders["clip"])
        job = ClipJob(clip.id, sample, clip, bucket, folders[sample.source], tuple(keys.values()), keys)
        if fields := shown_fields(model.fields):
            content = latent_keys(sample, clip, digests=digests, fill=fill, vae="")
            shown = keys_of_shown(fields, tuple(content.values()), bucket, encoders)
            each = {(name, n): key for name, own in shown.own.items() for n, key in enumerate(own)}
            job = replace(job, shown=shown, shown_keys=each)
        jobs.append(job)
    return jobs, found.skipped


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


# --- keys ------------------------------------------------------------------------------------------------------------


def part_keys(
    config: Config, sample: Sample, clip: Clip, *, digests: Mapping[Path, str], fill: Fill, vae: str
) -> dict[Part, bytes]:
    """Return a key for each stream's clip, and for the last frames that some trained task gives."""
    lasts = all_lasts(config.objective, tuple(config.streams)) if clip.frames > 1 else ()
    made = partial(latent_keys, sample, clip, digests=digests, fill=fill, vae=vae, scales=config.scales)
    whole, alone = made(), made(last=True) if lasts else {}
    found = {}
    for number, stream in enumerate(whole):
        found[Part(stream)] = whole[stream]
        if number in lasts:
            found[Part(stream, last=True)] = alone[stream]
    return found


def latent_keys(
    sample: Sample,
    clip: Clip,
    *,
    digests: Mapping[Path, str],
    fill: Fill,
    vae: str,
    scales: Sequence[int] = (),
    last: bool = False,
) -> dict[str, bytes]:
    """Return a key for each stream. A companion is cut at the first stream's times, so it depends on both files."""
    first = sample.paths[0][1]
    return {
        stream: _hash(
            what="latent",
            encoder=ENCODER_VERSION,
            vae=vae,
            dtype="bfloat16",
            files=[digests[first], digests[path]],
            plane=("color" if number == 0 else "alpha") if sample.rgba else "all",
            fill=fill.parts if sample.rgba else [],
            clip=[str(clip.start), clip.frames, _rate(sample, clip), clip.height, clip.width],
            **({"scale": scales[number]} if scales and scales[number] > 1 else {}),
            **({"part": "last frame"} if last else {}),
        )
        for number, (stream, path) in enumerate(sample.paths)
    }


def keys_of_shown(
    fields: Sequence[Field], content: Sequence[bytes], bucket: Bucket, encoders: Mapping[str, str]
) -> ShownKeys:
    """Return the keys of what a clip's given frames are shown by. content: hashes of each stream's pictures."""
    own, blank = {}, {}
    for one in fields:
        parts: dict[str, Any] = {"what": one.name, "encoder": ENCODER_VERSION, "weights": encoders[one.source]}
        parts |= {"dtype": "bfloat16", "last": one.last}
        streams = content if one.source == "clip" else content[:1]
        own[one.name] = tuple(_hash(pictures=pictures.hex(), **parts) for pictures in streams)
        blank[one.name] = _hash(blank=list(bucket) if one.source == "clip" else [], **parts)
    return ShownKeys(own, blank)


def _rate(sample: Sample, clip: Clip) -> str:
    """Return the clip's rate; animations were once cut differently, so their old records must not be found."""
    if clip.frames == 1:
        return "still"
    first = sample.paths[0][1]
    if first.suffix.lower() not in ANIMATED or first.is_dir():
        return str(clip.fps)
    return f"{clip.fps}, {'timed' if sample.media.fps else 'counted'}"


def text_keys(caption: str, encoder: str, fields: Sequence[Field]) -> dict[str, bytes]:
    """Return a key for each field that comes from captions."""
    parts: dict[str, Any] = {"encoder": ENCODER_VERSION, "weights": encoder, "dtype": "bfloat16", "caption": caption}
    return {field.name: _hash(what=field.name, **parts) for field in fields if field.source == "caption"}


def _hash(**parts: object) -> bytes:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
