"""Real torchrun, and ranks that are asked to stop, lose one of them, and are killed while they save."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import run_ranks
from tests.training.trainings import children, end, steps, wait_for_step, wait_until
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import CheckpointConfig
from transpixeler.files import write_text
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import checkpoint, checkpointer, restore
from transpixeler.runs.restore import Restored
from transpixeler.training import trainer
from transpixeler.training.callbacks import Callbacks

ROOT = Path(__file__).parents[2]
FAST = ("save.every_epochs=0", "eval.before_first_step=false", "eval.every_epochs=0", "log.tensorboard=false")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@contextmanager
def launched(
    demo: Path, output: Path, ranks: int, *overrides: str, options: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen]:
    words = ["-m", "transpixeler", "train", str(demo / "config.yaml"), f"output_dir={output}", *FAST, *overrides]
    process = subprocess.Popen(
        [*TORCHRUN, *options, "--nproc-per-node", str(ranks), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


def workers(process: subprocess.Popen) -> list[int]:
    """Return the processes of the ranks; one that ends meanwhile is none."""
    ranked = []
    for child in children(process):
        with suppress(FileNotFoundError, ProcessLookupError):
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    ranked.append((int(entry[5:]), child))
    return [child for _, child in sorted(ranked)]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(output: Path) -> Path:
    return checkpoint.candidates((output / "latest").resolve() / "checkpoints")[0]


def test_sigterm_to_torchrun_saves_and_ends_all_ranks_within_seconds(demo: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    with launched(demo, tmp_path, 2, "train.max_steps=1000", "parallel.pipeline=2") as process:
        wait_for_step(process, tmp_path, 3)
        start = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.wait(300)
        ended = time.monotonic()
    checkpoint.check(newest(tmp_path))
    assert checkpoint.step_of(newest(tmp_path)) == steps(tmp_path)
    assert ended - start < start - begun  # whatever else the machine does, sooner than it began


def _ask_rank_two(rank: int, world_size: int, path: Path, overrides: tuple[str, ...]) -> None:
    processes = [0] * world_size
    dist.all_gather_object(processes, os.getpid())

    def ask(line: Mapping[str, Any]) -> None:
        if line["step"] == 3:
            os.kill(processes[2], signal.SIGTERM)

    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    trainer.train(loading.load(path, overrides), here, callbacks=Callbacks(on_step=ask))


def test_sigterm_to_one_of_four_ranks_saves_and_ends_all(demo: Path, tmp_path: Path) -> None:
    overrides = (f"output_dir={tmp_path}", *FAST, "train.max_steps=1000", "parallel.pipeline=2", "parallel.shard=2")
    run_ranks(_ask_rank_two, 4, demo / "config.yaml", overrides)
    checkpoint.check(newest(tmp_path))
    assert 3 <= checkpoint.step_of(newest(tmp_path)) == steps(tmp_path) <= 5


# --- killed while saving ---------------------------------------------------------------------------------------------


def _save_for_ever(rank: int, world_size: int, folder: Path, begin: int) -> None:
    """Save a state that names its step, over and over, until it is killed."""
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(keep=2), runtime)
    for step in range(begin, begin + 10_000):
        keeper.save(step, {f"model.{rank}": torch.full((200_000,), float(step))}, {"step": step})
        write_text(folder / f"begun_{rank}", str(step))


def _load_latest(rank: int, world_size: int, folder: Path) -> int | None:
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    found = checkpoint.latest(folder, runtime)
    if found is None:
        return None
    values = {f"model.{r}": torch.zeros(200_000) for r in range(2)}
    restore.load(Restored.read(found), values, same_layout=False)
    step = checkpoint.step_of(found)
    assert all(bool((value == step).all()) for value in values.values()), "a torn checkpoint was taken for whole"
    assert checkpoint.read_state(found)["step"] == step
    return step


def kill_during_saves(folder: Path, times: int) -> list[int]:
    """Step resumed from after each kill of both ranks at a random moment."""
    from tests.support import ranks

    draw, resumed = random.Random(0), [0]
    for _ in range(2):  # the second time shows what ranks take to come up, with whatever else the machine does
        begun = time.monotonic()
        assert run_ranks(_load_latest, 2, folder) == [None, None]
        start = time.monotonic() - begun
    for _ in range(times):
        killer = start + draw.uniform(0.2, 0.7)
        with pytest.raises(ranks.RanksFailed, match="no answer"):
            run_ranks(_save_for_ever, 2, folder, resumed[-1] + 1, timeout=killer, grace=0.0)
        found = run_ranks(_load_latest, 2, folder)
        assert found[0] == found[1]
        if found[0] is not None:
            first = min(int((folder / f"begun_{rank}").read_text()) for rank in range(2))
            assert found[0] >= first - 2, "more than the saves in flight was lost"
            resumed.append(found[0])
    return resumed


def test_a_kill_during_saves_always_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    resumed = kill_during_saves(tmp_path, 20)
    assert resumed == sorted(resumed) and len(set(resumed)) > 5


# --- torchrun: restarts and Ctrl-C -----------------------------------------------------------------------------------


class Lost(NamedTuple):
    """A job that lost a rank twice."""

    output: Path
    said: str
    code: int
    seconds: float  # from the second loss to the end
    saved: Path  # the newest checkpoint before it


@pytest.fixture(scope="module")
def lost(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Lost:
    """Kill one of two stages, which torchrun starts again once; then kill one again."""
    output = tmp_path_factory.mktemp("lost")
    overrides = ("train.max_steps=1000", "optim.schedule=constant", "parallel.pipeline=2", "checkpoint.every_steps=2")
    options = ("--max-restarts", "1", "--monitor-interval", "0.1")
    with launched(demo, output, 2, *overrides, options=options) as process:
        wait_for_step(process, output, 4)
        checkpoints = (output / "latest").resolve() / "checkpoints"
        wait_until(process, lambda: bool(checkpoint.candidates(checkpoints)))  # it is written beside training
        first = workers(process)
        os.kill(first[1], signal.SIGKILL)
        wait_until(process, lambda: len(workers(process)) == 2 and not set(first) & set(workers(process)))
        wait_for_step(process, output, max(9, steps(output) + 1))
        saved, start = newest(output), time.monotonic()
        os.kill(workers(process)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=600)
    return Lost(output, said, process.returncode, time.monotonic() - start, saved)


def test_a_lost_rank_ends_the_job_with_the_reason(lost: Lost) -> None:
    assert lost.code != 0 and lost.seconds < 60
    assert "Signal 9 (SIGKILL)" in lost.said
    checkpoint.check(newest(lost.output))
    assert checkpoint.step_of(newest(lost.output)) >= checkpoint.step_of(lost.saved)


def test_a_restart_by_torchrun_goes_on_with_the_run_that_the_job_made(lost: Lost) -> None:
    (run,) = [folder for folder in lost.output.iterdir() if not folder.is_symlink()]
    told = [line["step"] for line in lines(run)]
    assert told == [*range(1, len(told) + 1)] and len(told) >= 9 and "resumed" in lost.said


def test_two_real_ranks_train_what_one_process_trains(demo: Path, lost: Lost, tmp_path: Path) -> None:
    """Before the restart, and after it."""
    words = ["train", str(demo / "config.yaml"), f"output_dir={tmp_path}", *FAST, "train.max_steps=8"]
    assert cli.main([*words, "optim.schedule=constant"]) == 0
    one, two = lines(tmp_path / "latest"), lines(lost.output / "latest")[:8]
    assert [line["samples"] for line in one] == [line["samples"] for line in two]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-5


def test_ctrl_c_under_torchrun_saves_on_all_ranks(demo: Path, tmp_path: Path) -> None:
    with launched(demo, tmp_path, 2, "train.max_steps=1000", "checkpoint.every_steps=0") as process:
        wait_for_step(process, tmp_path, 2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to torchrun, and to ranks in its group
        _, said = process.communicate(timeout=600)
    assert process.returncode != 0
    checkpoint.check(newest(tmp_path))
    assert checkpoint.step_of(newest(tmp_path)) == steps(tmp_path)
    assert said.count("--resume") == 1, said
