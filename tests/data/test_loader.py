"""The loader reads the order from any point on any number of ranks, and says what went wrong in it."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transpixeler.config.sections import UserError
from transpixeler.data.cache.records import Cache, CacheDamaged, CacheWriter, Record
from transpixeler.data.dataset import Dataset
from transpixeler.data.items import Item
from transpixeler.data.loader import Assembler, Batch, Loader
from transpixeler.models.family import Field

Folders = pytest.TempPathFactory
BUCKETS = {(1, 16, 16): (4, 1, 2, 2), (5, 16, 32): (4, 2, 2, 4), (9, 32, 16): (4, 3, 4, 2)}

FIELDS = (Field("text", width=6, length=8),)


def make_dataset(folder: Path, count: int = 26, streams: tuple[str, ...] = ("rgb", "seg")) -> Dataset:
    items, generator = [], torch.Generator().manual_seed(0)
    with CacheWriter(folder) as writer:
        writer.put([Record("text", b"empty".ljust(16), torch.full((1, 6), 0.5))])
        for number in range(count):
            bucket = list(BUCKETS)[number % 3]
            keys = tuple(f"{number}{stream}".encode().ljust(16) for stream in streams)
            latents = [torch.randn(BUCKETS[bucket], generator=generator).bfloat16() for _ in keys]
            writer.put([Record("latent", key, value) for key, value in zip(keys, latents)])
            text = f"text{number}".encode().ljust(16)
            writer.put([Record("text", text, torch.full((1 + number % 5, 6), float(number + 1)))])
            items.append(Item(f"c{number}", f"s{number}", "", bucket, keys, (text,)))
    return Dataset(tuple(items), streams, (b"empty".ljust(16),), Cache(folder))


def take(dataset: Dataset, steps: int, **where: int) -> list[Batch]:
    order = dataset.order(seed=7, global_batch=4)
    with Loader(Assembler(dataset, patch=(1, 2, 2), fields=FIELDS), order, **where) as loader:
        return [next(loader) for _ in range(steps)]


def same(one: Batch, two: Batch) -> bool:
    tensors = all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("latents",))
    tensors = tensors and all(torch.equal(one.fields[name], two.fields[name]) for name in ("text",))
    return tensors and (one.step, one.epoch, one.ids, one.layout) == (two.step, two.epoch, two.ids, two.layout)


def test_a_batch_holds_the_records_of_its_ids(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    by_id = {item.id: item for item in dataset.items}
    for batch in take(dataset, 20):
        assert batch.latents.dtype == batch.fields["text"].dtype == torch.float32
        assert batch.latents.shape == (4, batch.layout.elements) and batch.fields["text"].shape == (4, 8, 6)
        assert batch.empty["text"].eq(torch.tensor([0.5] + [0.0] * 7)[:, None]).all()
        for place, name in enumerate(batch.ids):
            item = by_id[name]
            for stream, key in enumerate(item.latent_keys):
                found = batch.layout.unpack(batch.latents)[stream][place]
                assert torch.equal(found, dataset.cache.get(key).float())
            text = dataset.cache.get(item.text_keys[0])
            assert torch.equal(batch.fields["text"][place, : len(text)], text)
            assert not batch.fields["text"][place, len(text) :].any()


@settings(max_examples=15, deadline=None)
@given(skip=st.integers(0, 25))
def test_a_loader_resumed_anywhere_gives_the_rest_of_the_stream(tmp_path_factory: Folders, skip: int) -> None:
    dataset = make_dataset(tmp_path_factory.mktemp("cache"))
    whole = take(dataset, 28)
    epoch, step = dataset.order(seed=7, global_batch=4).locate(skip)
    assert all(same(one, two) for one, two in zip(take(dataset, 3, epoch=epoch, step=step), whole[skip:]))
    assert [batch.step for batch in whole] == list(range(28))
    assert {batch.epoch for batch in whole} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_shares_tile_the_global_batch(tmp_path: Path, ranks: int) -> None:
    dataset = make_dataset(tmp_path)
    whole = take(dataset, 10)
    shares = [take(dataset, 10, rank=rank, ranks=ranks) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert [slot for part in parts for slot in part.slots] == [0, 1, 2, 3]
        assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
        assert torch.equal(torch.cat([part.fields["text"] for part in parts]), batch.fields["text"])
        assert all(part.ids == batch.ids and part.layout == batch.layout for part in parts)


def test_a_damaged_record_stops_training_and_names_the_clip(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    (path,) = tmp_path.glob("*latent-bfloat16-4x2x2x4*")
    data = bytearray(path.read_bytes())
    data[150] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheDamaged, match=r"c1, stream seg: .*is damaged.*--verify"):
        take(dataset, 28)
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_prepare_runs_in_the_background_and_its_error_reaches_the_caller(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)

    def prepare(batch: Batch) -> str:
        if batch.step == 2:
            raise ValueError("no noise")
        return threading.current_thread().name

    order = dataset.order(seed=0, global_batch=4)
    with Loader(Assembler(dataset, patch=(1, 2, 2), fields=FIELDS), order, prepare=prepare) as loader:
        assert [next(loader), next(loader)] == ["loader", "loader"]
        with pytest.raises(ValueError, match="no noise"):
            next(loader)


def test_waiting_is_measured_and_closing_never_hangs(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)

    def slow(batch: Batch) -> Batch:
        time.sleep(0.05)
        return batch

    order = dataset.order(seed=0, global_batch=4)
    loader = Loader(Assembler(dataset, patch=(1, 2, 2), fields=FIELDS), order, prepare=slow)
    next(loader)
    assert loader.wait_seconds > 0.03
    time.sleep(0.4)  # the thread now waits for room
    next(loader)
    assert loader.wait_seconds < 0.03
    loader.close()
    assert not loader._thread.is_alive()


def test_an_empty_set_says_why(tmp_path: Path) -> None:
    bare = make_dataset(tmp_path, count=0)
    with pytest.raises(UserError, match=r"data\.train holds no usable clip: its source is empty; .*001_seg\.mp4"):
        bare.order(seed=0, global_batch=1)
    skipped = Dataset((), ("rgb",), bare.empty_text_keys, bare.cache, "train", (("a", "no caption a.txt"),))
    with pytest.raises(UserError, match=r"1 skipped, the first a: no caption a\.txt; `transpixeler inspect` .*"):
        skipped.order(seed=0, global_batch=1)


def test_a_set_that_is_too_small_says_that_clips_were_skipped(tmp_path: Path) -> None:
    small = replace(make_dataset(tmp_path, count=3), skipped=(("a", "is empty"), ("b", "is empty")))
    with pytest.raises(UserError, match=r"has 3 clips .* train\.global_batch 4: .*\(2 skipped, the first a: is empty"):
        small.order(seed=0, global_batch=4)
