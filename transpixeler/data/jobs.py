"""Say how the records of a clip or a caption are made: the rows of a set with their keys in; jobs to encode out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transpixeler.data.buckets import Bucket
from transpixeler.data.given import GivenPicture
from transpixeler.data.items import Items, ShownKeys
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.fill import Fill
from transpixeler.data.parts import Part, parts_of
from transpixeler.data.pictures import Picture, least_clip
from transpixeler.data.sources.candidate import NOT_GIVEN, Features
from transpixeler.data.sources.samples import Sample
from transpixeler.models.streams import FramesOf

Keys = tuple[bytes, ...]  # of a caption's fields, in the model's order


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
    picture: Picture | GivenPicture | None = None  # that it is read beside, by an encoder that sees; None: a black one
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
class Jobs:
    """Makes the jobs of a set's clips, when they are asked for."""

    items: Items
    folders: Sequence[Path]  # the cache of each source
    streams: tuple[str, ...]
    beside: Sequence[FramesOf]  # frames that some task gives, each encoded alone
    fields: tuple[str, ...]  # that come from captions
    fill: Fill
    alone: Mapping[str, Features]  # of texts whose features a row gives by itself

    def clip(self, row: int) -> ClipJob:
        """Return the job of all records of a clip."""
        item, (sample, clip, bucket) = self.items[row], self.items.clips[row]
        parts = parts_of(self.streams, self.beside, clip.frames)
        own = item.shown.own if item.shown else {}
        return ClipJob(
            item.id,
            sample,
            clip,
            bucket,
            self.folders[sample.source],
            item.latent_keys,
            dict(zip(parts, item.latent_keys, strict=True)),
            shown=item.shown,
            shown_keys={(name, n): key for name, keys in own.items() for n, key in enumerate(keys)},
            picture=self._picture(row, sample, clip),
        )

    def texts(self, row: int) -> tuple[TextJob, ...]:
        """Return the jobs of a clip's caption: one, or beside its first frame and beside none where tasks want both."""
        item, (sample, clip, _) = self.items[row], self.items.clips[row]
        features, alone = sample.features, False
        if features.text is None and item.caption in self.alone:
            features, alone = self.alone[item.caption], True
        picture = self._picture(row, sample, clip)
        told = item.caption, self.folders[sample.source], features if features.text else NOT_GIVEN, alone
        seen = picture if self.items.run(row).sees else None
        found = TextJob(self._named(item.text_keys), *told, picture=None if features.text else seen)
        if not item.unseen_text_keys:
            return (found,)
        return found, TextJob(self._named(item.unseen_text_keys), *told)

    def _named(self, keys: Keys) -> dict[str, bytes]:
        return dict(zip(self.fields, keys, strict=True))

    def _picture(self, row: int, sample: Sample, clip: Clip) -> Picture | None:
        key = self.items.picture_key(row)
        return Picture(sample, least_clip(sample, clip, self.fill), self.fill, key) if key else None

    def unique_clips(self, known: set[Keys]) -> Iterator[ClipJob]:
        """Yield the jobs of clips whose latents no other one has. known: those so far."""
        for row in range(len(self.items)):
            job = self.clip(row)
            if job.latent_keys not in known:
                known.add(job.latent_keys)
                yield job

    def unique_texts(self, known: set[Keys]) -> Iterator[TextJob]:
        """Yield the jobs of captions that no other one has. known: those so far."""
        for row in range(len(self.items)):
            for job in self.texts(row):
                if job.all_keys not in known:
                    known.add(job.all_keys)
                    yield job
