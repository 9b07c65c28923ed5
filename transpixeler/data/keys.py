"""Make the keys of records, which decide what is stale: a clip, hashes of files, an encoder's fingerprint in; keys out.

A key is a hash of everything its record depends on: the files' content, the cut, the fill, the encoder's weights. If
one of those changes, the key is another, and the old record is asked for no more. Names, paths and times are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket
from transpixeler.data.items import ShownKeys
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.files import IMAGE_ENDINGS, LINEAR_ENDINGS, ending_of, spans_files
from transpixeler.data.media.fill import Fill
from transpixeler.data.parts import Part, named, parts_of
from transpixeler.data.pictures import least_clip
from transpixeler.data.sources.candidate import latent_column
from transpixeler.data.sources.samples import Sample
from transpixeler.models.family import Field, caption_fields
from transpixeler.models.streams import FramesOf

FEATURES_VERSION = 1  # raised when features are read in another way
ENCODER_VERSION = 1  # raised when decoding, resizing or encoding gives other values
ANIMATED = IMAGE_ENDINGS | {".gif"}


def part_keys(
    config: Config,
    sample: Sample,
    clip: Clip,
    *,
    digests: Mapping[Path, str],
    fill: Fill,
    vae: str,
    beside: Sequence[FramesOf],
) -> dict[Part, bytes]:
    """Return a key for each stream's clip, and for the frames beside it that some trained task gives."""
    made = partial(latent_keys, sample, clip, digests=digests, fill=fill, vae=vae, scales=config.scales)
    keys = {every: made(every=every) for every in dict.fromkeys([None, *(every for _, every in beside)])}
    return {part: keys[part.every][part.stream] for part in parts_of(tuple(dict(sample.paths)), beside, clip.frames)}


def given_part_keys(
    sample: Sample, clip: Clip, *, digests: Mapping[Path, str], beside: Sequence[FramesOf]
) -> dict[Part, bytes]:
    """Return the same for latents that are given: of each file's content, and which tensor of it is meant."""
    paths, found = dict(sample.paths), {}
    for part in parts_of(tuple(paths), beside, clip.frames):
        name = latent_column(part.stream, sample.paths[0][0])
        told = "clip" if part.every is None else named(part.every)
        content = {"file": digests[paths[part.stream]], "tensor": name, "part": told}
        found[part] = _hash(what="given latent", features=FEATURES_VERSION, dtype="bfloat16", **content)
    return found


def latent_keys(
    sample: Sample,
    clip: Clip,
    *,
    digests: Mapping[Path, str],
    fill: Fill,
    vae: str,
    scales: Sequence[int] = (),
    every: int | None = None,
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
            **({"light": fill.transfer if sample.rgba or number == 0 else "data"} if _linear(path) else {}),
            **({"scale": scales[number]} if scales and scales[number] > 1 else {}),
            **({"part": named(every)} if every is not None else {}),
        )
        for number, (stream, path) in enumerate(sample.paths)
    }


def _linear(path: Path) -> bool:
    """Tell whether a file may hold linear light, so that the curve counts."""
    return ending_of(path) in LINEAR_ENDINGS


def first_frame(sample: Sample, clip: Clip, *, digests: Mapping[Path, str], fill: Fill) -> bytes:
    """Return the key of the pixels of a clip's first frame."""
    made = latent_keys(sample, least_clip(sample, clip, fill), digests=digests, fill=fill, vae="")
    return next(iter(made.values()))


def keys_of_shown(
    fields: Sequence[Field], content: Sequence[bytes], bucket: Bucket, encoders: Mapping[str, str]
) -> ShownKeys:
    """Return the keys of what a clip's given frames are shown by. content: hashes of each stream's pictures."""
    own, blank = {}, {}
    for one in fields:
        parts: dict[str, Any] = {"what": one.name, "encoder": ENCODER_VERSION, "weights": encoders[one.source]}
        parts |= {"dtype": "bfloat16", "last": one.last, **({"stills": True} if one.stills else {})}
        streams = content if one.source == "clip" else content[:1]
        own[one.name] = tuple(_hash(pictures=pictures.hex(), **parts) for pictures in streams)
        if not one.stills:
            blank[one.name] = _hash(blank=list(bucket) if one.source == "clip" else [], **parts)
    return ShownKeys(own, blank)


def _rate(sample: Sample, clip: Clip) -> str:
    """Return the clip's rate; animations were once cut differently, so their old records must not be found."""
    if clip.frames == 1:
        return "still"
    first = sample.paths[0][1]
    if spans_files(first):
        return f"{clip.fps}, from {sample.media.fps}" if sample.media.fps else str(clip.fps)
    if first.suffix.lower() not in ANIMATED:
        return str(clip.fps)
    return f"{clip.fps}, {'timed' if sample.media.fps else 'counted'}"


def text_keys(caption: str, encoder: str, fields: Sequence[Field], *, picture: bytes | None = None) -> dict[str, bytes]:
    """Return a key for each field that comes from captions. picture: of the one that it is read beside; None: black."""
    parts: dict[str, Any] = {"encoder": ENCODER_VERSION, "weights": encoder, "dtype": "bfloat16", "caption": caption}
    beside = {"beside": picture.hex() if picture else "black"}
    return {
        field.name: _hash(what=field.name, **parts, **(beside if field.source == "caption+image" else {}))
        for field in caption_fields(fields)
    }


def given_text_keys(file: str, fields: Sequence[Field]) -> dict[str, bytes]:
    """Return the same for features that are given. file: a hash of its content."""
    parts: dict[str, Any] = {"features": FEATURES_VERSION, "dtype": "bfloat16", "file": file}
    return {field.name: _hash(what=f"given {field.name}", **parts) for field in caption_fields(fields)}


def _hash(**parts: object) -> bytes:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
