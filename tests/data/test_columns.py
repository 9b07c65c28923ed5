"""Clips as columns are the clips that objects were: the same ones, with the same names, trained in the same order."""

from __future__ import annotations

import hashlib
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ranks import RanksFailed, run_ranks
from transpixeler.config.sections import BucketRule, DataConfig, SourceConfig
from transpixeler.data import columns, sharing
from transpixeler.data.buckets import assign
from transpixeler.data.cache.records import Cache
from transpixeler.data.columns import Texts, TextWriter
from transpixeler.data.dataset import Dataset
from transpixeler.data.items import Items
from transpixeler.data.media.clip import Media
from transpixeler.data.ranks import connected
from transpixeler.data.sources.candidate import Features
from transpixeler.data.sources.samples import Sample, Samples, SampleWriter, in_order
from transpixeler.models.geometry import Geometry
from transpixeler.parallel.runtime import Runtime

FPS = Fraction(16)
KINDS = ((1, 64, 64), (20, 64, 64), (40, 48, 80), (90, 80, 48))
names = st.lists(st.text("ab~2é\U0001f600", max_size=20), max_size=30)


def media(frames: int, height: int, width: int) -> Media:
    fps = Fraction(0) if frames == 1 else FPS
    return Media(frames, height, width, fps, frames / fps if fps else Fraction(0), alpha=False)


def sample(name: str, number: int = 0, **more: object) -> Sample:
    made = {"caption": "c", "source": number % 2, "rgba": False, "media": media(*KINDS[number % 4]), **more}
    return Sample(name, (("rgb", Path(f"{number}.mp4")), ("seg", Path(f"{number}_seg.mp4"))), **made)


@settings(deadline=None, max_examples=200)
@given(names)
def test_texts_are_sorted_as_python_sorts_them(some: list[str]) -> None:
    texts = Texts.of(some)
    order, same = texts.in_order()
    assert list(texts.take(order)) == sorted(some)
    assert same.sum() == len(some) - len(set(some)) and list(texts) == some


@settings(deadline=None, max_examples=200)
@given(names, st.data())
def test_no_two_samples_share_an_id_and_the_first_keeps_its_own(some: list[str], data: st.DataObject) -> None:
    bad = [data.draw(st.booleans()) for _ in some]
    written, wanted, taken = SampleWriter(FPS), list[str](), dict[str, int]()
    for name, is_bad in zip(some, bad):
        written.append_bad(name) if is_bad else written.append(sample(name))
        free = name  # the rule, one after another
        while free in taken:
            taken[name] += 1
            free = f"{name}~{taken[name]}"
        taken[free] = 1
        wanted.append(free)
    found, left_out = in_order(written)
    assert [one.id for one in found] == sorted(name for name, is_bad in zip(wanted, bad) if not is_bad)
    assert left_out == [name for name, is_bad in zip(wanted, bad) if is_bad]


def test_a_sample_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "HELD_BYTES", 100)  # some lie in a file then
    latents = (("rgb", Path("1.mp4")), ("seg", Path("1_seg.mp4")))
    features = [Features("row 1", latents), Features("row 2", (), Path("t.pt")), Features("row 3", latents, Path("t"))]
    some = [sample(f"s{n}", n, caption=f"größer\0 {n}\n") for n in range(8)]
    some += [sample(f"t{n}", 1, features=given) for n, given in enumerate(features)]
    found = Samples.of(some, FPS)
    assert found == some and [found.caption(n) for n in range(len(some))] == [one.caption for one in some]
    assert found.given.tolist() == [False] * 8 + [True, False, True]
    filed = TextWriter(filed=True)
    for one in some:
        filed.append(one.caption * 50)
    assert list(filed.done()) == [one.caption * 50 for one in some]


def share(rank: int, world_size: int, folder: Path, blind: tuple[int, ...], full: int) -> tuple[list[str], bool, int]:
    """Share samples among hosts of two ranks, each with a folder of its own; tell the bytes that this rank has sent.

    blind: the ranks whose host does not see rank 0's file. full: the host that cannot write, either.
    """
    tempfile.tempdir, sharing.PIECE = str(folder / f"host{rank // 2}"), 2000
    sent, send = [0], dist.send
    dist.send = lambda data, *a, **k: (sent.append(data.nbytes), send(data, *a, **k))[1]
    if rank in blind:
        sharing.comes_in_sight = lambda _: False
    if rank // 2 == full:  # in a world of its own
        sharing._sent = lambda path: folder / "nowhere" / path.name
        Path.exists = lambda path, **_: not path.name.startswith(".columns-")  # pyright: ignore
    runtime = Runtime(rank, world_size, rank % 2, torch.device("cpu"))
    with connected(runtime) as ranks:
        some = [sample(f"s{n}", n) for n in range(500)]
        found = sharing.shared(ranks, lambda _: Samples.of(some, FPS), [folder / "c"])
    return [one.id for one in found] + [one.caption for one in found], found.kinds.flags.writeable, sum(sent)


@pytest.mark.parametrize("blind", [(), (2,), (2, 4)], ids=str)
def test_ranks_map_one_file_of_columns_and_hosts_that_do_not_see_it_hand_on_its_bytes(
    blind: tuple[int, ...], hosts: Path
) -> None:
    wanted = [f"s{n}" for n in range(500)] + ["c"] * 500
    found = run_ranks(share, 6, hosts, blind, -1)
    assert [one[:2] for one in found] == [(wanted, False)] * 6
    sent = [one[2] for one in found]
    assert [rank for rank, size in enumerate(sent) if size] == [0, *blind][:-1], "each but the last sends"
    assert len({*sent} - {0}) <= 1, "as much as rank 0 does, which sends to one"
    assert not [path for path in hosts.rglob("*") if path.is_file()]


def test_a_host_that_cannot_write_the_file_is_told_on_all_ranks(hosts: Path) -> None:
    with pytest.raises(RanksFailed) as told:
        run_ranks(share, 6, hosts, (2, 4), 1)
    assert str(told.value).count("UserError: ") == 6
    assert not [path for path in hosts.rglob("*") if path.is_file()]


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    for host in range(3):
        (tmp_path / f"host{host}").mkdir()
    return tmp_path


WRITTEN = {"once": (687, 1120, "86640c818969bffa"), "epoch": (1350, 543, "fff3f74bbae186a3")}


@pytest.mark.parametrize("draw", WRITTEN)
def test_clips_and_their_order_are_those_of_earlier_versions(draw: str) -> None:
    """Checkpoints hold (epoch, step) alone: what comes then must be what came. Written when clips were objects."""
    some = sorted((sample(f"set/clip ä{n:03}", n) for n in range(300)), key=lambda one: one.id)
    keep = 0.5 if draw == "epoch" else 1.0
    rules = BucketRule((0, 0, 33), keep=0.4, keep_resolution=keep, global_batch=2), BucketRule((0, 0, 17), keep=0.7)
    grid = {"resolutions": (64, 32), "frames": (1, 17, 33), "upscale": True}
    data = DataConfig(**grid, buckets=rules, draw=draw, clip_mode="multiple_overlapping")
    sources = [SourceConfig("a", repeats=2), SourceConfig("b", clip_mode="single_middle")]
    clips = assign(some, sources, data, geometry=Geometry((4, 8, 8), 16, (1, 2, 2)), seed=7).clips
    items = Items(clips, ("a", "b"), [one.repeats for one in sources])
    digest = hashlib.sha256()
    for found in (items, tuple(items)):
        order = Dataset(found, ("rgb",), (), Cache()).order(seed=7, global_batch=4, data=data)
        digest = hashlib.sha256()
        for batch in (batch for epoch in range(3) for batch in order.batches(epoch)):
            digest.update("\n".join(found[int(row)].id for row in batch).encode() + b"\0")
        assert (len(found), order.first_step(3), digest.hexdigest()[:16]) == WRITTEN[draw]
