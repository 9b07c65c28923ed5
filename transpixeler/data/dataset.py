"""Hold what training and evaluation read: clips with the keys of their records, and the cache that has these.

In: what encoding found. Out: the layout of each clip, and the order in which training takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from transpixeler.config.sections import BucketRule, Config, DataConfig, UserError
from transpixeler.data.buckets import Bucket, Dropped, batch_for
from transpixeler.data.cache.records import Cache
from transpixeler.data.draws import Draws
from transpixeler.data.items import Coded, Item, coded_buckets, repeats_of, samples_of
from transpixeler.data.order import Order, make_order
from transpixeler.data.parts import Part, parts_of
from transpixeler.data.prompt_pictures import PictureKeys
from transpixeler.models.streams import FramesOf, Grid, Shape, StreamLayout

PLAIN = DataConfig()
EMPTY = "its source is empty; a sample is a video, its companions and its caption: 001.mp4, 001_seg.mp4, 001.txt"


@dataclass(frozen=True)
class Dataset:
    """Clips whose records are all in the cache."""

    items: Sequence[Item]
    streams: tuple[str, ...]
    empty_text_keys: tuple[bytes, ...]
    cache: Cache = field(compare=False, repr=False)
    key: str = "train"  # the data set's name under `data.` in the config
    skipped: Dropped = ()
    prompts: Mapping[str, tuple[bytes, ...]] = field(
        default_factory=dict
    )  # keys of the texts that evaluations sample from
    scales: tuple[int, ...] = ()  # of the streams
    beside: tuple[FramesOf, ...] = ()  # frames that are in the cache too, encoded alone, of clips that are long enough
    notes: tuple[str, ...] = ()  # on files in no sample, and on how others were understood
    pictures: PictureKeys = field(default_factory=PictureKeys)  # of what evaluations' prompts give

    def refuse_empty(self) -> None:
        """Raise `UserError` with the reason if no clip of the set can be used."""
        if not self.items:
            raise UserError(f"data.{self.key} holds no usable clip: {_left_out(self.skipped) or EMPTY}")

    def order(self, *, seed: int, global_batch: int, data: DataConfig = PLAIN) -> Order:
        """Return the order in which training takes the clips. data: its rules for buckets, and how they are drawn.

        A step has fewer clips than samples where groups of samples share them.
        """
        self.refuse_empty()
        buckets, times = coded_buckets(self.items), repeats_of(self.items)
        batches = [
            batch_for(Bucket(*bucket), global_batch, data.buckets) // data.sync_group for bucket in buckets.offered
        ]
        return make_order(
            buckets=buckets,
            repeats=times,
            batches=np.array(batches, np.int32)[buckets.numbers],
            seed=seed,
            draws=self._draws(data.buckets, seed) if data.draw == "epoch" else None,
            key=self.key,
            left_out=_left_out(self.skipped),
        )

    def _draws(self, rules: Sequence[BucketRule], seed: int) -> Draws:
        """Draw for each repeat of a sample by itself."""
        buckets, times, how = coded_buckets(self.items), repeats_of(self.items), {"rules": rules, "seed": seed}
        samples, names = samples_of(self.items)
        number = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)  # of each repeat
        often = np.zeros(len(names), np.int64)
        often[samples] = times  # clips of one sample are of one source
        owners = np.repeat((np.cumsum(often) - often)[samples], times) + number
        told = (f"{name}\0{repeat}" for name, count in zip(names, often.tolist()) for repeat in range(count))
        return Draws(owners, told, Coded(buckets.offered, np.repeat(buckets.numbers, times)), **how)

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
        offered, numbers = coded_buckets(self.items)
        counts = zip(offered, np.bincount(numbers, minlength=len(offered)).tolist())
        return {bucket: count for bucket, count in sorted(counts) if count}


def training_order(config: Config, data: Dataset) -> Order:
    """Return the order in which a config's training takes the clips of a set."""
    return data.order(seed=config.seed, global_batch=config.train.global_batch, data=config.data)


@dataclass(frozen=True)
class Datasets:
    """The two sets of a config."""

    train: Dataset
    eval: Dataset


def _left_out(skipped: Sequence[tuple[str, str]]) -> str:
    """Return how many samples were skipped and why the first one was; nothing where none was."""
    if not skipped:
        return ""
    name, reason = skipped[0]
    return f"{len(skipped)} skipped, the first {name}: {reason}; `transpixeler inspect` names each with its file"
