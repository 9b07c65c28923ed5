import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RanksFailed, run_ranks
from transpixeler.config import CheckpointConfig, UserError
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.runs.checkpointer import Checkpointer


def _sum_of_ranks(rank: int, world_size: int, scale: int) -> int:
    value = torch.tensor(rank * scale)
    dist.all_reduce(value)
    return int(value)


def _fails_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("lost")


def _hangs(rank: int, world_size: int) -> None:
    time.sleep(60)


def test_ranks_talk_and_their_results_come_back_in_order() -> None:
    assert run_ranks(_sum_of_ranks, 3, 10) == [30, 30, 30]


def test_four_ranks_cost_well_under_a_second() -> None:
    run_ranks(_sum_of_ranks, 1, 1)
    costs = []
    for _ in range(3):
        start = time.perf_counter()
        run_ranks(_sum_of_ranks, 4, 1)
        costs.append(time.perf_counter() - start)
    assert min(costs) < 1.0, costs


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1[\s\S]*KeyError: 'lost'"):
        run_ranks(_fails_on_rank_one, 2)


def test_a_hanging_rank_is_killed() -> None:
    start = time.perf_counter()
    with pytest.raises(RanksFailed, match="no answer"):
        run_ranks(_hangs, 2, timeout=0.5)
    assert time.perf_counter() - start < 5


def test_a_single_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with runtime.running(device="cpu", timeout_minutes=3) as here:
        assert here.timeout == timedelta(minutes=3)
        assert (here.rank, here.world_size, here.is_main) == (0, 1, True)
        assert here.broadcast({"a": 1}) == {"a": 1} and here.gather(3) == [3]
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def _waits(rank: int, world_size: int, folder: Path) -> list[float]:
    """Seconds that a rank waits in each group that training uses."""
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"), timedelta(seconds=77))
    mesh = meshes.build(meshes.Layout(2, 2, 2), here)
    keeper = Checkpointer(folder, CheckpointConfig(), here)
    groups = [mesh.pipeline_group, mesh.data_group, *mesh.shards.get_all_groups(), keeper._group]
    return [group._get_backend(here.device).options._timeout.total_seconds() for group in groups]


def test_a_rank_waits_as_long_as_the_config_says_in_every_group(tmp_path: Path) -> None:
    assert run_ranks(_waits, 8, tmp_path) == [[77.0] * 5] * 8


def test_a_garbled_environment_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match=r"RANK='first'.*torchrun"):
        runtime.start(device="cpu")


PROGRAM = """
import logging, sys
from transpixeler.parallel import runtime
with runtime.running(device="cpu") as here:
    logging.getLogger("transpixeler").info("quiet unless first")
    logging.getLogger("transpixeler").warning("heard from all")
    total = sum(here.gather(here.rank))
    assert here.broadcast(total if here.is_main else None) == 1
    with runtime.steady_garbage(2) as tick:
        tick(2)
"""


def test_real_torchrun_starts_speaks_and_leaves(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("quiet unless first") == 1
    assert "[rank 1] warning: heard from all" in done.stderr
