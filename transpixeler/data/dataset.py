"""What training and evaluation read: the clips, each with the keys of its records, and the cache that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transpixeler.config import UserError
from transpixeler.data.cache.records import Cache
from transpixeler.data.media.clip import Clip
from transpixeler.data.order import Order, make_order
from transpixeler.data.sources.pairs import Sample


@dataclass(frozen=True)
class Item:
    """One clip."""

    id: str
    sample_id: str
    caption: str
    bucket: tuple[int, int, int]  # frames, height, width in pixels
    latent_keys: tuple[bytes, ...]  # one a stream
    text_key: bytes
    repeats: int = 1
    source: str = ""  # the name of the data set that it came from
    origin: tuple[Sample, Clip] | None = None  # what an eval clip was encoded from, to measure what encoding costs


@dataclass(frozen=True)
class Dataset:
    """Clips whose records all are in the cache."""

    items: tuple[Item, ...]
    streams: tuple[str, ...]
    empty_text_key: bytes
    cache: Cache = field(compare=False, repr=False)
    key: str = "train"  # the data set's name under `data.` in the config
    skipped: tuple[tuple[str, str], ...] = ()  # (sample id, reason)
    prompts: Mapping[str, bytes] = field(default_factory=dict)  # the keys of what evaluations sample from

    def order(self, *, seed: int, global_batch: int) -> Order:
        if not self.items:
            raise UserError(f"data.{self.key} holds no usable clip{_first_reason(self.skipped)}")
        return make_order(
            buckets=[item.bucket for item in self.items],
            repeats=[item.repeats for item in self.items],
            seed=seed,
            global_batch=global_batch,
            key=self.key,
        )

    def shapes(self, item: Item) -> tuple[tuple[int, ...], ...]:
        """Latent shape [C, f, h, w] of each stream."""
        return tuple(self.cache.spec(key).shape for key in item.latent_keys)

    def buckets(self) -> Mapping[tuple[int, int, int], int]:
        """Clips in each bucket."""
        counts: dict[tuple[int, int, int], int] = {}
        for item in sorted(self.items, key=lambda item: item.bucket):
            counts[item.bucket] = counts.get(item.bucket, 0) + 1
        return counts


@dataclass(frozen=True)
class Datasets:
    """Both sets of a config."""

    train: Dataset
    eval: Dataset


def _first_reason(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return ": it is empty"
    name, reason = skipped[0]
    return f": {len(skipped)} were skipped, the first, {name}, because {reason}"
