"""List what encoders make of the pictures that prompts of evaluations give: prompts in; keys, and jobs for them, out.

Some text encoders read a prompt beside its picture, some models are shown what an image encoder makes of it: both are
records of the cache, as the prompt's plain text is, so that no start loads an encoder for what an earlier one encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket
from transpixeler.data.given import GivenPicture, check_given_files
from transpixeler.data.jobs import Keys, TextJob
from transpixeler.data.keying import TextKeys
from transpixeler.data.keys import keys_of_shown
from transpixeler.data.prompts import read_prompts
from transpixeler.data.sampled import size_of
from transpixeler.data.shown import FieldJob
from transpixeler.models.conditions import shown_fields
from transpixeler.models.family import ModelFolder, sees_frames

NO_PICTURE = ""  # in the place of a digest


@dataclass(frozen=True)
class PictureKeys:
    """The keys of what the prompts of a config are made from, besides their plain texts."""

    seen: tuple[Keys, ...] = ()  # of the prompts that are read beside a picture, in their order
    # of the image encoder's tokens, by the field and the digests of its pictures, one after the other
    tokens: Mapping[tuple[str, str], bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureJobs:
    """The same with what it takes to make their records."""

    keys: PictureKeys
    texts: tuple[TextJob, ...]
    fields: tuple[FieldJob, ...]


def picture_jobs(
    config: Config, model: ModelFolder, texts: TextKeys, made_with: Mapping[str, str], folder: Path
) -> PictureJobs:
    """Read the pictures that prompts give, where an encoder of the model sees them, and list what is made of them."""
    fields, sees = [one for one in shown_fields(model.fields) if one.source == "image"], sees_frames(model.fields)
    seen: list[TextJob] = []
    jobs: dict[tuple[str, str], FieldJob] = {}
    blank: dict[tuple[str, str], bytes] = {}
    read = lru_cache(maxsize=None)(partial(GivenPicture.of, config=config, model=model))
    for prompt in read_prompts(config.sample) if fields or sees else ():
        size = Bucket(*size_of(prompt, config, model))
        blank |= {(name, NO_PICTURE): key for name, key in keys_of_shown(fields, (), size, made_with).blank.items()}
        if prompt.given.between or prompt.given.extend:
            continue  # which is for `sample` alone
        given = check_given_files(prompt.given, config, model, size)
        if sees and (first := "rgb" if given.rgb else "image" if given.image else ""):
            seen.append(texts.job(prompt.text, folder, read(given, first, size=size)))
        for one in fields if given.image else ():
            pictures = tuple(read(given, name, size=size) for name in ("image", "last")[: 1 + one.last])
            told = "".join(picture.digest for picture in pictures)
            key = keys_of_shown([one], (bytes.fromhex(told),), size, made_with).own[one.name][0]
            jobs[one.name, told] = FieldJob(one, size, key, folder, pictures)
    keys = PictureKeys(tuple(job.all_keys for job in seen), blank | {told: job.key for told, job in jobs.items()})
    return PictureJobs(keys, tuple(seen), tuple(jobs.values()))
