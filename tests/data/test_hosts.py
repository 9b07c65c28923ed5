"""Hosts with a cache of their own each hold all records: each encoded once, and copied to the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.encoding import ALONE, config, records, write_pairs
from tests.support.ranks import RanksFailed, run_ranks
from transpixeler.data import hosts
from transpixeler.data.cache.records import Cache
from transpixeler.data.encode import encode_missing, find_missing
from transpixeler.families.wan.encoders import WanVae
from transpixeler.models.family import open_model
from transpixeler.parallel import sight
from transpixeler.parallel.runtime import Runtime

PAIRS = 5
VIDEOS = 2 * PAIRS


def encode_on_hosts(rank: int, world_size: int, model: Path, data: Path, caches: list[Path], *words: str) -> int:
    """Encode on two ranks a host, each host with its own folder; return how many videos this rank has encoded."""
    sight.SECONDS, hosts.MESSAGE_BYTES, count = 0.3, 4096, 0
    whole = WanVae.encode

    def counting(self: WanVae, video: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(video)
        return whole(self, video)

    WanVae.encode = counting
    setup = config(model, data, f"data.cache_dir={caches[rank // 2]}", *words)
    encode_missing(setup, open_model(setup.model), Runtime(rank, world_size, rank % 2, torch.device("cpu")))
    return count


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    write_pairs(folder, PAIRS)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one process."""
    folder = tmp_path_factory.mktemp("whole")
    setup = config(model, data, f"data.cache_dir={folder}")
    encode_missing(setup, open_model(setup.model), ALONE)
    return folder


def test_each_host_gets_all_and_each_video_is_encoded_once(
    model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    caches, wanted = [tmp_path / "first", tmp_path / "second"], records(Cache(whole))
    counts = run_ranks(encode_on_hosts, 4, model, data, caches)
    assert sum(counts) == VIDEOS and all(counts)
    assert [records(Cache(cache)) for cache in caches] == [wanted, wanted]
    assert not list(tmp_path.glob("*/.seen*"))

    shutil.rmtree(caches[0])  # a new disk, even the first host's, is filled by the other
    assert run_ranks(encode_on_hosts, 4, model, data, caches) == [0] * 4
    assert records(Cache(caches[0])) == wanted


def look_on_hosts(rank: int, world_size: int, model: Path, data: Path, caches: list[Path]) -> str:
    """Rehearse on one rank a host; return what is to be done first."""
    sight.SECONDS = 0.3
    setup = config(model, data, f"data.cache_dir={caches[rank]}")
    return str(find_missing(setup, open_model(setup.model), Runtime(rank, world_size, 0, torch.device("cpu")))[1])


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_rehearsal_says_what_is_copied_to_a_host_with_an_empty_cache(
    lacks: int, model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    caches = [whole, whole]
    caches[lacks] = tmp_path / "new"
    told = f"copies {len(Cache(whole))} records to hosts that lack them"
    assert run_ranks(look_on_hosts, 2, model, data, caches) == [told, told]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".seg", ".idx") or ".seen" in path.name]


def test_hosts_that_share_a_cache_write_each_record_once(model: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    assert sum(run_ranks(encode_on_hosts, 4, model, data, [tmp_path, tmp_path])) == VIDEOS
    assert records(Cache(tmp_path)) == records(Cache(whole))


def test_what_one_host_cannot_write_or_read_is_told_by_all(
    model: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RanksFailed) as told:
        run_ranks(encode_on_hosts, 4, model, data, [whole, tmp_path / "file" / "cache"], timeout=60)
    assert str(told.value).count("file/cache") >= 4 and "no answer" not in str(told.value)

    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    for segment in damaged.glob("*.seg"):
        segment.write_bytes(bytes(segment.stat().st_size))
    with pytest.raises(RanksFailed) as told:
        run_ranks(encode_on_hosts, 4, model, data, [damaged, tmp_path / "new"], timeout=60)
    assert str(told.value).count("is damaged; run") == 4
