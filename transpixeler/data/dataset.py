"""Hold what training and evaluation read: clips with the keys of their records, and the cache that has these.

In: what encoding found. Out: the layout of each clip, and the order in which training takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transpixeler.config.sections import BucketRule, Config, DataConfig, UserError
from transpixeler.data.buckets import Bucket, batch_for
from transpixeler.data.cache.records import Cache
from transpixeler.data.draws import Draws
from transpixeler.data.media.clip import Clip
from transpixeler.data.order import Order, make_order
from transpixeler.data.parts import Part, parts_of
from transpixeler.data.sources.pairs import Sample
from transpixeler.models.streams import FramesOf, Grid, Shape, StreamLayout

PLAIN = DataConfig()


@dataclass(frozen=True)
class ShownKeys:
    """Keys of what an image-to-video model can be shown of a clip, by field; `blank` where no frame is given."""

    own: Mapping[str, tuple[bytes, ...]]  # one a stream of a field of the source "clip", one of "image"
    blank: Mapping[str, bytes]

    @property
    def all(self) -> tuple[bytes, ...]:
        return (*(key for keys in self.own.values() for key in keys), *self.blank.values())


@dataclass(frozen=True)
class Item:
    """One clip and the keys of its records."""

    id: str
    sample_id: str
    caption: str
    bucket: tuple[int, int, int]  # frames, height, width in pixels
    latent_keys: tuple[bytes, ...]  # one a segment, in the order of the sequence
    text_keys: tuple[bytes, ...]  # one a field that comes from the caption
    repeats: int = 1
    source: str = ""  # name of the data set it comes from
    shown: ShownKeys | None = None
    unseen_text_keys: tuple[bytes, ...] = ()  # where captions are read beside a picture: for tasks that give none
    origin: tuple[Sample, Clip] | None = None  # the files behind an eval clip, to measure the loss by encoding

    @property
    def all_keys(self) -> tuple[tuple[bytes, ...], ...]:
        """Return the keys of its latents and of its texts."""
        return self.latent_keys, self.text_keys, self.unseen_text_keys


@dataclass(frozen=True)
class Dataset:
    """Clips whose records are all in the cache."""

    items: tuple[Item, ...]
    streams: tuple[str, ...]
    empty_text_keys: tuple[bytes, ...]
    cache: Cache = field(compare=False, repr=False)
    key: str = "train"  # the data set's name under `data.` in the config
    skipped: tuple[tuple[str, str], ...] = ()  # (sample id, reason)
    prompts: Mapping[str, tuple[bytes, ...]] = field(
        default_factory=dict
    )  # keys of the texts that evaluations sample from
    scales: tuple[int, ...] = ()  # of the streams
    beside: tuple[FramesOf, ...] = ()  # frames that are in the cache too, encoded alone, of clips that are long enough
    notes: tuple[str, ...] = ()  # on files in no sample, and on how others were understood

    def order(self, *, seed: int, global_batch: int, data: DataConfig = PLAIN) -> Order:
        """Return the order in which training takes the clips. data: its rules for buckets, and how they are drawn."""
        if not self.items:
            raise UserError(f"data.{self.key} holds no usable clip{_first_reason(self.skipped)}")
        buckets = [Bucket(*item.bucket) for item in self.items]
        batches = {bucket: batch_for(bucket, global_batch, data.buckets) for bucket in dict.fromkeys(buckets)}
        return make_order(
            buckets=buckets,
            repeats=[item.repeats for item in self.items],
            batches=[batches[bucket] for bucket in buckets],
            seed=seed,
            draws=self._draws(data.buckets, seed) if data.draw == "epoch" else None,
            key=self.key,
        )

    def _draws(self, rules: Sequence[BucketRule], seed: int) -> Draws:
        """Draw for each repeat of a sample by itself."""
        repeated = [(item, number) for item in self.items for number in range(item.repeats)]
        owners = [f"{item.sample_id}\0{number}" for item, number in repeated]
        return Draws(owners, [Bucket(*item.bucket) for item, _ in repeated], rules=rules, seed=seed)

    def layout(self, item: Item, patch: Grid) -> StreamLayout:
        """Lay out a clip's records."""
        shapes = tuple(self._shape(key) for key in self.video_keys(item))
        layout = StreamLayout(self.streams, shapes, patch, scales=self.scales)
        return layout.with_beside(self.beside, item.bucket[0])

    def parts(self, item: Item) -> list[Part]:
        """List the parts of a clip that have records, in the order of its keys."""
        return parts_of(self.streams, self.beside, item.bucket[0])

    def video_keys(self, item: Item) -> list[bytes]:
        """Return the keys of a clip's streams, without those of frames beside them."""
        pairs = zip(self.parts(item), item.latent_keys, strict=True)
        return [key for part, key in pairs if part.every is None]

    def _shape(self, key: bytes) -> Shape:
        channels, frames, height, width = self.cache.spec(key).shape
        return channels, frames, height, width

    def buckets(self) -> Mapping[tuple[int, int, int], int]:
        """Count the clips in each bucket."""
        counts: dict[tuple[int, int, int], int] = {}
        for item in sorted(self.items, key=lambda item: item.bucket):
            counts[item.bucket] = counts.get(item.bucket, 0) + 1
        return counts


def training_order(config: Config, data: Dataset) -> Order:
    """Return the order in which a config's training takes the clips of a set."""
    return data.order(seed=config.seed, global_batch=config.train.global_batch, data=config.data)


@dataclass(frozen=True)
class Datasets:
    """The two sets of a config."""

    train: Dataset
    eval: Dataset


def _first_reason(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return ": it is empty"
    name, reason = skipped[0]
    return f": {len(skipped)} were skipped, the first, {name}, because {reason}"
