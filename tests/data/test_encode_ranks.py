"""Many ranks encode what one would, and a kill at any moment costs the records in flight."""

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.encoding import ALONE, config, records, write_pairs
from tests.support.ranks import run_ranks
from transpixeler.config.sections import Config, Fault, UserError
from transpixeler.data.cache import records as cache_records
from transpixeler.data.cache.records import Cache
from transpixeler.data.encode import encode_missing, share
from transpixeler.families.wan.encoders import WanVae
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime

PAIRS = 18  # of the set whose encoding is killed


def test_the_share_is_even_by_cost_and_nothing_is_lost() -> None:
    @dataclasses.dataclass(frozen=True)
    class Job:
        cost: int

    jobs = [Job(int(cost)) for cost in np.random.default_rng(0).integers(1, 100, 200)]
    shares = [share(jobs, rank=rank, ranks=4) for rank in range(4)]
    assert sorted(job.cost for mine in shares for job in mine) == sorted(job.cost for job in jobs)
    loads = [sum(job.cost for job in mine) for mine in shares]
    assert max(loads) - min(loads) < 100 and all(mine == sorted(mine, key=lambda job: -job.cost) for mine in shares)


def _ranks(setup: Config, world_size: int, store: Path, work: Callable[[Runtime], None]) -> list[int]:
    """Forked from here, where everything is imported: what a launcher does, in a moment."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            if world_size > 1:
                there = dist.FileStore(str(store), world_size)
                dist.init_process_group("gloo", store=there, rank=rank, world_size=world_size)
            work(Runtime(rank, world_size, rank, torch.device("cpu")))
            code = 0
        finally:
            os._exit(code)
    return children


def _encoding(setup: Config, log: Path) -> Callable[[Runtime], None]:
    """Encodes, and writes a byte to `log` for each video."""

    def work(runtime: Runtime) -> None:
        whole, file = WanVae.encode, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def counting(vae: WanVae, video: torch.Tensor) -> torch.Tensor:
            os.write(file, b".")
            return whole(vae, video)

        WanVae.encode = counting
        encode_missing(setup, open_model(setup.model), runtime)

    return work


@pytest.fixture(scope="module")
def many(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, bytes]]:
    """A data set and its cache as an uninterrupted run makes it."""
    folder = tmp_path_factory.mktemp("many")
    write_pairs(folder / "d", PAIRS)
    setup = config(model, folder / "d", f"data.cache_dir={folder / 'whole'}")
    return folder / "d", records(encode_missing(setup, open_model(setup.model), ALONE).train.cache)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_same_records(
    model: Path, many: tuple[Path, dict[bytes, bytes]], tmp_path: Path, world_size: int
) -> None:
    setup = config(model, many[0], f"data.cache_dir={tmp_path}")
    children = _ranks(setup, world_size, tmp_path / "store", _encoding(setup, tmp_path / "log"))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
    assert records(Cache(tmp_path)) == many[1]
    assert len(list(tmp_path.glob("*.idx"))) == world_size


KILLS = int(os.environ.get("CACHE_KILLS", "12"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_killed_at_any_moment_it_goes_on_where_it_was(
    model: Path, many: tuple[Path, dict[bytes, bytes]], tmp_path: Path, world_size: int
) -> None:
    setup = config(model, many[0], f"data.cache_dir={tmp_path / 'cache'}")
    log, rng, kills = tmp_path / "log", np.random.default_rng(world_size), -(-KILLS // 3)
    in_flight, midway = 0, 0
    for number in range(kills):
        target = len(many[1]) * (number + rng.uniform(0, 1)) / (kills + 1)
        children = _ranks(setup, world_size, tmp_path / f"store{number}", _encoding(setup, log))
        deadline = time.monotonic() + 60
        while number % 4 and len(Cache(tmp_path / "cache")) < target and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.02) if number % 4 else rng.uniform(0, 0.5))  # every fourth: before it has begun
        for child in rng.permutation(children):
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        found = records(Cache(tmp_path / "cache"))
        assert all(many[1][key] == value for key, value in found.items())
        in_flight += world_size * 2  # one clip of two streams a rank
        midway += 0 < len(found) < len(many[1])
    children = _ranks(setup, world_size, tmp_path / "store", _encoding(setup, log))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
    assert records(Cache(tmp_path / "cache")) == many[1]
    assert log.stat().st_size - 2 * PAIRS <= in_flight
    assert midway >= kills // 2


def _told_by_another(rank: int, world_size: int, setup: Config) -> str:
    try:
        encode_missing(setup, open_model(setup.model), Runtime(rank, world_size, rank, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return ""


def test_a_fault_of_one_rank_is_told_on_all(model: Path, tmp_path: Path) -> None:
    said = run_ranks(_told_by_another, 2, config(model, tmp_path / "nowhere"))
    assert said[0] == said[1] and "nowhere" in said[0]


def _with_a_full_disk_on_rank_one(rank: int, world_size: int, setup: Config) -> str:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank:
        cache_records._write = refuse  # a limit on files' sizes would hit the ranks' store as well
    with pytest.raises(Fault) as told:
        encode_missing(setup, open_model(setup.model), Runtime(rank, world_size, rank, torch.device("cpu")))
    return str(told.value)


def test_a_full_disk_of_one_rank_is_a_fault_on_all(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d", 4)
    setup = config(model, tmp_path / "d", f"data.cache_dir={tmp_path / 'cache'}")
    said = run_ranks(_with_a_full_disk_on_rank_one, 2, setup)
    assert said[0] == said[1] and "no space left" in said[0]
