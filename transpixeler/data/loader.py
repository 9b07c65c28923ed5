"""Load batches from the cache: (epoch, step) in; this rank's share of each global batch, a few steps ahead, out.

One background thread reads the mapped records, verifies their checksums and passes each batch to `prepare`, so that
the data of a step is ready when the step begins. The whole state is (epoch, step).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transpixeler.config import UserError
from transpixeler.data.cache.records import CacheDamaged
from transpixeler.data.dataset import Dataset, Item
from transpixeler.data.order import Order
from transpixeler.models.streams import StreamLayout

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step."""

    step: int  # global, from 0
    epoch: int  # from 0
    epoch_step: int  # within the epoch, from 0
    layout: StreamLayout
    latents: Tensor  # [b, N] packed, fp32
    text: Tensor  # [b, text_len, text_dim], fp32, zero padded
    empty_text: Tensor  # [text_len, text_dim]
    ids: tuple[str, ...]  # of the whole global batch
    slots: range  # positions in the global batch that this rank holds


class Assembler:
    """Builds one batch from its items, for training and evaluation."""

    def __init__(
        self, dataset: Dataset, *, patch: tuple[int, int, int], text_len: int = 512, device: torch.device = CPU
    ) -> None:
        self.dataset = dataset
        self.patch = patch
        self.text_len = text_len
        self.device = device
        self.pin = device.type == "cuda"  # copies from pinned memory overlap with compute
        self._text_dim = dataset.cache.spec(dataset.empty_text_key).shape[1]
        self._empty = self._text([dataset.empty_text_key])[0]

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
            text=self._text([item.text_key for item in mine]),
            empty_text=self._empty,
            ids=tuple(item.id for item in chosen),
            slots=slots,
        )

    def layout(self, item: Item) -> StreamLayout:
        return StreamLayout(self.dataset.streams, self.dataset.shapes(item), self.patch)

    def _latents(self, items: list[Item], layout: StreamLayout) -> Tensor:
        packed = torch.empty(len(items), layout.elements, pin_memory=self.pin)
        streams = layout.unpack(packed)
        for place, item in enumerate(items):
            for stream, key in enumerate(item.latent_keys):
                self._read(key, streams[stream][place], f"{item.id}, stream {self.dataset.streams[stream]}")
        return packed

    def _text(self, keys: list[bytes]) -> Tensor:
        text = torch.zeros(len(keys), self.text_len, self._text_dim, pin_memory=self.pin)
        for place, key in enumerate(keys):
            length = self.dataset.cache.spec(key).shape[0]
            if length > self.text_len:
                raise UserError(
                    f"a cached text has {length} tokens, the model takes {self.text_len}: rebuild the cache"
                )
            self._read(key, text[place, :length], "a caption")
        return text

    def _read(self, key: bytes, out: Tensor, what: str) -> None:
        try:
            self.dataset.cache.copy(key, out)
        except CacheDamaged as error:
            raise CacheDamaged(f"{what}: {error}") from error


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
        prepare: Callable[[Batch], Any] = lambda batch: batch,
    ) -> None:
        assert order.global_batch % ranks == 0 and 0 <= rank < ranks
        share = order.global_batch // ranks
        self.wait_seconds = 0.0  # that the last step waited for its data
        self._slots = range(rank * share, (rank + 1) * share)
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
            for number, items in enumerate(self._order.batches(epoch, step), start=step):
                yield self._assembler.batch(
                    items, slots=self._slots, step=first + number, epoch=epoch, epoch_step=number
                )
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
