"""Hold the clips of a set with the keys of their records, as columns: what training reads of a clip comes out."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from transpixeler.data.buckets import Clips
from transpixeler.data.cache.index import KEY
from transpixeler.data.columns import Rows, spread
from transpixeler.data.media.clip import Clip
from transpixeler.data.sources.samples import Sample

RECORDS = ("latents", "texts", "unseen", "own")  # kinds of keys that a clip's own records have


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


class Run(NamedTuple):
    """Say how many keys of each kind a clip of one bucket has: they lie one after another in this order."""

    latents: int = 0
    texts: int = 0
    unseen: int = 0
    own: tuple[tuple[str, int], ...] = ()  # of what it can be shown, by field
    pictures: int = 0  # that its caption is read beside: a key of pixels, no record's
    blank: tuple[tuple[str, bytes], ...] = ()  # of a field where no frame is given: one key for all of a bucket
    sees: bool = False  # the first of its texts is read beside the picture

    @property
    def told(self) -> tuple[Any, ...]:
        """Return the same for JSON."""
        return (*self[:-2], [(name, key.hex()) for name, key in self.blank], self.sees)

    @classmethod
    def of(cls, told: Sequence[Any]) -> Run:
        """Return what `told` was made of."""
        latents, texts, unseen, own, pictures, blank, sees = told
        named = tuple((name, bytes.fromhex(key)) for name, key in blank)
        return cls(latents, texts, unseen, tuple((name, count) for name, count in own), pictures, named, sees)

    @property
    def sizes(self) -> dict[str, int]:
        """Return how many keys there are of each kind, in their order."""
        own = sum(count for _, count in self.own)
        counts = self.latents, self.texts, self.unseen, own, self.pictures
        return dict(zip(("latents", "texts", "unseen", "own", "pictures"), counts))

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def places(self, kinds: Container[str]) -> list[int]:
        """Return where in the run the keys of some kinds are."""
        every = [kind for kind, count in self.sizes.items() for _ in range(count)]
        return [place for place, kind in enumerate(every) if kind in kinds]


class Items(Rows[Item]):
    """The clips of a set. `keys` holds a run for each; without any, as when only planning, all runs are empty."""

    def __init__(
        self,
        clips: Clips,
        names: Sequence[str],
        repeats: Sequence[int],
        *,
        keys: np.ndarray | None = None,
        starts: np.ndarray | None = None,
        runs: Sequence[Run] = (),
        traced: bool = False,
    ) -> None:
        self.clips, self.names, self.source_repeats = clips, tuple(names), tuple(repeats)  # the last two by source
        self.keys = np.zeros(0, KEY) if keys is None else keys
        self.starts = np.zeros(len(clips), np.int64) if starts is None else starts  # of each clip's run
        self.runs = tuple(runs) or (Run(),) * len(clips.offered)  # by the clips' bucket numbers
        self.traced = traced  # each says the files behind it

    def __len__(self) -> int:
        return len(self.clips)

    def make(self, row: int) -> Item:
        clips, owner = self.clips, int(self.clips.owners[row])
        samples, bucket, run = clips.samples, clips.offered[clips.numbers[row]], self.run(row)
        name, source, keys = samples.ids.make(owner), int(samples.sources[owner]), self._keys(row, run.size)
        latents, keys = tuple(keys[: run.latents]), keys[run.latents :]
        texts, keys = tuple(keys[: run.texts]), keys[run.texts :]
        unseen, keys = tuple(keys[: run.unseen]), keys[run.unseen :]
        return Item(
            id=clips.name(row, name),
            sample_id=name,
            caption=samples.caption(owner),
            bucket=bucket,
            latent_keys=latents,
            text_keys=texts,
            repeats=self.source_repeats[source],
            source=self.names[source],
            shown=_shown(run, keys) if run.own or run.blank else None,
            unseen_text_keys=unseen,
            origin=(samples[owner], clips.cut(row, name)) if self.traced and not samples.given[owner] else None,
        )

    def run(self, row: int) -> Run:
        return self.runs[int(self.clips.numbers[row])]

    def picture_key(self, row: int) -> bytes | None:
        """Return the key of the picture that a clip's caption is read beside, where there is one."""
        run = self.run(row)
        return self._keys(row, run.size)[-1] if run.pictures else None

    def cells(self, kinds: Container[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return where the keys of some kinds are: the number of the clip of each, and its place in its run."""
        return spread(self.clips.numbers, [run.places(kinds) for run in self.runs])

    def keys_of(self, kinds: Container[str]) -> np.ndarray:
        """Return the keys of some kinds, clip after clip."""
        rows, places = self.cells(kinds)
        return self.keys[self.starts[rows] + places]

    def _keys(self, row: int, size: int) -> list[bytes]:
        start = int(self.starts[row])
        return self.keys[start : start + size].tolist()

    def take(self, rows: np.ndarray) -> Items:
        """Return some of the clips in the order of their numbers, or those where `rows` is true."""
        kept = self.clips.take(rows)
        how = {"keys": self.keys, "starts": self.starts[rows], "runs": self.runs, "traced": self.traced}
        return Items(kept, self.names, self.source_repeats, **how)

    def captions(self) -> Iterator[str]:
        """Yield each clip's caption."""
        return self.clips.samples.captions(self.clips.owners)

    @property
    def repeats(self) -> np.ndarray:
        """Return how often an epoch takes each clip, int32 [n]."""
        return np.array(self.source_repeats, np.int32)[self.clips.samples.sources[self.clips.owners]]


def _shown(run: Run, keys: Sequence[bytes]) -> ShownKeys:
    own, first = {}, 0
    for name, count in run.own:
        own[name], first = tuple(keys[first : first + count]), first + count
    return ShownKeys(own, dict(run.blank))


class Coded(NamedTuple):
    """The bucket of each clip, by its number among those that occur."""

    offered: tuple[tuple[int, int, int], ...]
    numbers: np.ndarray  # int32 [n]


def coded_buckets(items: Sequence[Item]) -> Coded:
    """Return the buckets of clips as numbers."""
    if isinstance(items, Items):
        return Coded(items.clips.offered, items.clips.numbers)
    return coded(item.bucket for item in items)


def coded(buckets: Iterable[tuple[int, ...]]) -> Coded:
    """Give each bucket that occurs a number, in the order in which they come."""
    numbers: dict[tuple[int, ...], int] = {}
    every = np.fromiter((numbers.setdefault(tuple(bucket), len(numbers)) for bucket in buckets), np.int32)
    return Coded(tuple(numbers), every)  # pyright: ignore[reportArgumentType]  of three numbers each


def repeats_of(items: Sequence[Item]) -> np.ndarray:
    """Return how often an epoch takes each clip, int32 [n]."""
    return items.repeats if isinstance(items, Items) else np.array([item.repeats for item in items], np.int32)


def samples_of(items: Sequence[Item]) -> tuple[np.ndarray, Sequence[str]]:
    """Return the number of each clip's sample, int [n], and the ids of the samples by their numbers."""
    if isinstance(items, Items):
        return items.clips.owners, items.clips.samples.ids
    names = {name: number for number, name in enumerate(dict.fromkeys(item.sample_id for item in items))}
    return np.array([names[item.sample_id] for item in items], np.int64), [*names]


def captions_of(items: Sequence[Item]) -> Iterator[str]:
    """Yield each clip's caption."""
    return items.captions() if isinstance(items, Items) else (item.caption for item in items)


def some_of(items: Sequence[Item], takes: np.ndarray) -> Sequence[Item]:
    """Return those of the clips where `takes`, bool [n], is true."""
    if takes.all():
        return items
    if isinstance(items, Items):
        return items.take(takes)
    return tuple(item for item, taken in zip(items, takes, strict=True) if taken)
