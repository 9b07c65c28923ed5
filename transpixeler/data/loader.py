"""Load batches from the cache: (epoch, step) in; this rank's share of each global batch, a few steps ahead, out.

One background thread reads the mapped records, verifies their checksums and passes each batch to `prepare`, so that
the data of a step is ready when the step begins. The whole state is (epoch, step).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.data.cache.records import CacheDamaged
from transpixeler.data.dataset import Dataset
from transpixeler.data.items import Item
from transpixeler.data.order import Order, shared_out
from transpixeler.flow.objective import Fields
from transpixeler.models.conditions import Shown, kept_layout, shown_fields
from transpixeler.models.family import Field, caption_fields, length_of
from transpixeler.models.streams import Grid, StreamLayout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step."""

    step: int  # global, from 0
    epoch: int  # from 0
    epoch_step: int  # within the epoch, from 0
    layout: StreamLayout
    latents: Tensor  # [b, N] packed, fp32
    fields: Fields  # what the model is conditioned on, [b, …] each, fp32, zero padded
    empty: Fields  # those of an empty caption, without the batch
    ids: tuple[str, ...]  # of the whole global batch
    slots: range  # positions in the global batch that this rank holds
    unseen: Fields | None = None  # of captions read beside no picture, where others are beside the first frame
    shown: Shown | None = None  # what the clips can be shown of given frames, where the model takes that


class Assembler:
    """Builds one batch from its items, for training and evaluation."""

    def __init__(self, dataset: Dataset, *, patch: Grid, fields: Sequence[Field], device: torch.device = CPU) -> None:
        self.dataset = dataset
        self.patch = patch
        self.fields, self.shown = caption_fields(fields), shown_fields(fields)
        self.device = device
        self.pin = device.type == "cuda"  # copies from pinned memory overlap with compute
        self._empty = {name: value[0] for name, value in self._fields([dataset.empty_text_keys]).items()}

    def batch(self, items: np.ndarray, *, slots: range, step: int = 0, epoch: int = 0, epoch_step: int = 0) -> Batch:
        chosen = [self.dataset.items[int(item)] for item in items]
        layout = self.layout(chosen[0])
        mine = [chosen[slot] for slot in slots]
        return Batch(
            step=step,
            epoch=epoch,
            epoch_step=epoch_step,
            layout=layout,
            latents=self._latents(mine, layout),
            fields=self._fields([item.text_keys for item in mine]),
            empty=self._empty,
            unseen=self._fields([item.unseen_text_keys for item in mine]) if chosen[0].unseen_text_keys else None,
            shown=self._shown(mine, layout) if self.shown else None,
            ids=tuple(item.id for item in chosen),
            slots=slots,
        )

    def layout(self, item: Item) -> StreamLayout:
        return self.dataset.layout(item, self.patch)

    def _latents(self, items: list[Item], layout: StreamLayout) -> Tensor:
        packed = torch.empty(len(items), layout.elements, pin_memory=self.pin)
        parts = layout.unpack(packed)
        for place, item in enumerate(items):
            for segment, part, key in zip(layout.segments, parts, item.latent_keys, strict=True):
                self._read(key, part[place], f"{item.id}, stream {self.dataset.streams[segment.stream]}")
        return packed

    def _shown(self, items: list[Item], layout: StreamLayout) -> Shown:
        """Read what the clips can be shown: latents of each stream packed as the streams are, and image tokens."""
        own, blank = {}, {}
        for field in self.shown:
            clip = field.source == "clip"
            inside = kept_layout(field, layout)
            shape = (inside.elements,) if clip else (field.length or 1, field.width)
            own[field.name] = torch.empty(len(items), *shape, pin_memory=self.pin)
            blank[field.name] = torch.zeros(1, *shape)
            streams, empty = inside.unpack(own[field.name]) if clip else (), blank[field.name]
            for place, item in enumerate(items):
                assert item.shown is not None, item.id
                keys = item.shown.own[field.name]
                outs = [stream[place] for stream in streams] if clip else [own[field.name][place]]
                for key, out in zip(keys, outs, strict=True):
                    self._read(key, out, f"{item.id}, {field.name}")
            if field.stills:
                continue
            assert items[0].shown is not None, items[0].id
            for out in inside.unpack(empty) if clip else (empty,):
                self._read(items[0].shown.blank[field.name], out[0], f"{field.name} of no frame")
        return Shown(self.shown, own, blank)

    def _fields(self, rows: Sequence[Sequence[bytes]]) -> dict[str, Tensor]:
        """Read the fields of some captions, each padded with zeros to the model's length."""
        found: dict[str, Tensor] = {}
        for number, field in enumerate(self.fields):
            shape = (len(rows), field.length, field.width) if field.length else (len(rows), field.width)
            value = found[field.name] = torch.zeros(shape, pin_memory=self.pin)
            lengths = torch.zeros(len(rows), dtype=torch.int64, pin_memory=self.pin)
            for place, keys in enumerate(rows):
                lengths[place] = self._length(keys[number], field)
                self._read(
                    keys[number], value[place, : int(lengths[place])] if field.length else value[place], "a caption"
                )
            if field.masked:
                found[length_of(field.name)] = lengths
        return found

    def _length(self, key: bytes, field: Field) -> int:
        length = self.dataset.cache.spec(key).shape[0]
        if field.length and length > field.length:
            raise UserError(f"a cached text has {length} tokens, the model takes {field.length}: rebuild the cache")
        return length

    def _read(self, key: bytes, out: Tensor, what: str) -> None:
        try:
            self.dataset.cache.copy(key, out)
        except CacheDamaged as error:
            raise CacheDamaged(f"{what}: {error}") from error


def padded_fields(values: Mapping[str, Tensor], fields: Sequence[Field]) -> dict[str, Tensor]:
    """Return one caption's fields, encoded or as the cache holds them, as an `Assembler` gives them."""
    found: dict[str, Tensor] = {}
    for field in caption_fields(fields):
        value = values[field.name].float()
        pad = (0, 0, 0, field.length - len(value)) if field.length else (0, 0)
        found[field.name] = torch.nn.functional.pad(value, pad)
        if field.masked:
            found[length_of(field.name)] = torch.tensor(len(value))
    return found


class Loader:
    """Iterates over batches from (epoch, step) on without end; call `close` when done."""

    def __init__(
        self,
        assembler: Assembler,
        order: Order,
        *,
        rank: int = 0,
        ranks: int = 1,
        epoch: int = 0,
        step: int = 0,
        ahead: int = 3,
        group: tuple[int, int] = (1, 1),
        prepare: Callable[[Batch], Any] = lambda batch: batch,
    ) -> None:
        """group: runs of samples that share their clips, and the samples of a run."""
        assert all(row.batch * group[0] % ranks == 0 for row in order.rows) and 0 <= rank < ranks
        self.wait_seconds = 0.0  # that the last step waited for its data
        self._rank, self._ranks, self._group = rank, ranks, group
        self._assembler, self._order, self._prepare = assembler, order, prepare
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(epoch, step), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        assert not self._closed.is_set(), "the loader is closed"
        start = time.perf_counter()
        result = self._ready.get()
        self.wait_seconds = time.perf_counter() - start
        if isinstance(result, _Failure):
            self.close()
            raise result.error
        return result

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, epoch: int, step: int) -> None:
        try:
            if self._assembler.pin:
                torch.cuda.set_device(self._assembler.device)  # otherwise this thread opens a context on GPU 0
            for batch in self._batches(epoch, step):
                if not self._offer(self._prepare(batch)):
                    return
        except BaseException as error:  # raised in the thread that waits for the batch
            self._offer(_Failure(error))

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        while True:
            first = self._order.first_step(epoch)
            for number, clips in enumerate(self._order.batches(epoch, step), start=step):
                items = shared_out(clips, *self._group)
                share = len(items) // self._ranks
                slots = range(self._rank * share, (self._rank + 1) * share)
                yield self._assembler.batch(items, slots=slots, step=first + number, epoch=epoch, epoch_step=number)
            epoch, step = epoch + 1, 0

    def _offer(self, value: Any) -> bool:
        """Wait for room; return False once the loader is closed."""
        while not self._closed.is_set():
            try:
                self._ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


@dataclass(frozen=True)
class _Failure:
    error: BaseException
