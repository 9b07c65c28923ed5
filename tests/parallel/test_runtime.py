import gc
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RanksFailed, run_ranks
from transpixeler.config.sections import CheckpointConfig, UserError
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


def _agree(rank: int, world_size: int) -> tuple[bool, bool, list[str], list[str], list[int]]:
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.Layout(2, 2, 1), here)
    sent: list[object] = []
    gather = dist.all_gather_object
    dist.all_gather_object = lambda values, value, **how: sent.append(value) or gather(values, value, **how)
    found = here.any(rank == 3), here.any(False), here.faults(""), here.faults("torn" if rank == 1 else "")
    assert sent == ["torn" if rank == 1 else ""], "texts are sent only where there is one"
    return *found, mesh.gather_stages(rank)


def test_ranks_agree_by_a_number_and_stages_by_their_pipeline() -> None:
    pipelines = [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert run_ranks(_agree, 4) == [(True, False, [], ["torn"], ranks) for ranks in pipelines]


def test_shards_that_leave_a_machine_are_told() -> None:
    crossing = meshes.crossing
    assert crossing(meshes.Layout(1, 2, 8), 8) == crossing(meshes.Layout(1, 1, 16), 0) == ""
    assert "parallel.shard: 16 takes 16 ranks, a machine has 8" in crossing(meshes.Layout(1, 1, 16), 8)
    assert "shard: 4 × context 4 takes 16 ranks" in crossing(meshes.Layout(1, 1, 4, 4), 8)


def _limits(rank: int, world_size: int) -> tuple[tuple[int, int], bool, int]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
    gc.unfreeze = sys.modules["tests.support.preload"].thaw  # as it is outside of tests
    runtime.raise_file_limit()
    with runtime.steady_garbage(2):
        frozen = gc.get_freeze_count()
    return resource.getrlimit(resource.RLIMIT_NOFILE), frozen > 10_000, gc.get_freeze_count()


def test_a_rank_may_open_as_many_files_as_it_can_and_looks_at_old_objects_no_more() -> None:
    assert run_ranks(_limits, 1) == [((512, 512), True, 0)]


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


# --- real torchrun ---------------------------------------------------------------------------------------------------


def torchrun(program: Path, *options: str, ranks: int = 2) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*start, str(program), *options]


WAITS = """
import pathlib, sys, time
from transpixeler.parallel import runtime
with runtime.running(device="cpu") as here:
    here.barrier()
    pathlib.Path(sys.argv[1], str(here.rank)).write_text(str(__import__("os").getpid()))
    time.sleep(300)
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    program, told = tmp_path / "program.py", tmp_path / "told"
    program.write_text(WAITS)
    told.mkdir()
    launcher = subprocess.Popen(torchrun(program, str(told)), stderr=subprocess.DEVNULL)
    wait_until(lambda: sorted(file.name for file in told.iterdir() if file.read_text()) == ["0", "1"])
    ranks = [int(file.read_text()) for file in told.iterdir()]
    assert all(map(alive, ranks))
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(alive, ranks)), 20)


def test_a_process_without_torchrun_outlives_its_shell(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WAITS.replace("300", "5") + f"open({str(tmp_path / 'done')!r}, 'w').close()")
    shell = f"nohup {sys.executable} {program} {tmp_path} >/dev/null 2>&1 & sleep 0.1"
    subprocess.run(["bash", "-c", shell], check=True)
    wait_until((tmp_path / "done").exists)


FAILS = """
import sys
from transpixeler import cli
from transpixeler.config.sections import UserError
from transpixeler.parallel import runtime

def fail(arguments):
    with runtime.running(device="cpu", timeout_minutes=float(sys.argv[2])) as here:
        if sys.argv[1] == "all":
            raise UserError("four ranks do not divide")
        if sys.argv[1] == "one" and here.rank == 1:
            raise UserError("only here")
        if sys.argv[1] == "dies" and here.rank == 1:
            __import__("os")._exit(9)
        if sys.argv[1] == "hangs" and here.rank == 1:
            __import__("time").sleep(100)
        here.gather(1)

cli.COMMANDS["report"] = fail
raise SystemExit(cli.main(["report", "x"]))
"""


@pytest.mark.parametrize(
    ("case", "minutes", "said"),
    [
        ("all", 1, "transpixeler: four ranks do not divide"),
        ("one", 1, "transpixeler: [rank 1] only here"),
        (
            "dies",
            1,
            "another rank has ended; the cause is in its own output (parallel.timeout_minutes=1 plays no part)",
        ),
        ("hangs", 0.05, "not answered for 3 s, which is the limit that parallel.timeout_minutes=0.05 sets"),
    ],
)
def test_a_fault_of_many_ranks_is_one_line(tmp_path: Path, case: str, minutes: float, said: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAILS)
    done = subprocess.run(torchrun(program, case, str(minutes)), capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("transpixeler: ")]
    if case == "dies":  # torchrun may end the others before they notice, and names the rank itself
        assert all(said in line for line in lines) and "rank : 1" in re.sub(" +", " ", done.stderr), done.stderr
    else:
        assert said in lines[0] and (len(lines) == 1 or case == "one"), done.stderr
    own = done.stderr.split("torch/distributed/elastic")[0].split("Traceback")
    assert program.name not in "".join(own[1:]), done.stderr
    assert done.returncode == 1  # torchrun's own, whatever a rank ends with
    assert "(exitcode: 2)" in done.stderr or case in ("dies", "hangs")


def _asks_for_rank_zero(rank: int, world_size: int, port: int, said: Path) -> tuple[bool, str]:
    os.environ |= {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    return runtime.main_tells(0.5), said.read_text()


def test_a_store_that_is_out_of_reach_keeps_nobody_from_telling(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        port = closed.getsockname()[1]
        assert run_ranks(_asks_for_rank_zero, 1, port, tmp_path / "said", timeout=120) == [(False, "")]


def test_real_torchrun_starts_speaks_and_leaves(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(torchrun(program), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("quiet unless first") == 1
    assert "[rank 1] warning: heard from all" in done.stderr
