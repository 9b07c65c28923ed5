"""One training at a time in a run's folder: the second is told who holds it, and a dead holder holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.support.ranks import fork, run_ranks
from transpixeler.adapters.saved import CONFIG
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import opening
from transpixeler.runs.folder import Run
from transpixeler.runs.lock import LOCK, RunLock

ONE = Runtime(0, 1, 0, torch.device("cpu"))


def config(output: Path) -> Config:
    return loading.from_overrides([f"output_dir={output}", "run_name=mine"])


def _open_and_wait(output: Path) -> None:
    run = opening.open_run(config(output), ONE, None)
    (output / "open").touch()
    time.sleep(600)
    run.close()


@contextmanager
def training(output: Path) -> Iterator[BaseProcess]:
    """Start a process that has opened the run, and kill it at the end."""
    process = fork(_open_and_wait, output)
    try:
        while not (output / "open").exists():
            assert process.is_alive()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_run_that_trains_is_not_resumed_by_another(tmp_path: Path) -> None:
    with training(tmp_path) as holder, pytest.raises(UserError) as told:
        opening.open_run(config(tmp_path), ONE, "")
    assert f"trained by process {holder.pid} on {socket.gethostname()}" in str(told.value)
    run = opening.open_run(config(tmp_path), ONE, "")  # killed with signal 9, it holds nothing
    with pytest.raises(UserError, match=f"trained by process {os.getpid()}"):
        opening.open_run(config(tmp_path), ONE, "")
    run.close()
    opening.open_run(config(tmp_path), ONE, "").close()


def test_two_new_runs_of_one_name_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    holder = RunLock(tmp_path / "mine")  # another has made the folder, and is about to write its config
    with pytest.raises(UserError, match="trained by process"):
        opening.open_run(config(tmp_path), ONE, None)
    (tmp_path / "mine" / CONFIG).touch()
    holder.release()
    with pytest.raises(UserError, match="a run of this name exists"):
        opening.open_run(config(tmp_path), ONE, None)


def test_a_fault_while_a_run_is_opened_leaves_no_lock(tmp_path: Path) -> None:
    opening.open_run(config(tmp_path), ONE, None).close()
    (tmp_path / "mine" / "checkpoints" / "global_step00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint"):
        opening.open_run(config(tmp_path), ONE, "")
    RunLock(tmp_path / "mine").release()


def _opens(rank: int, world_size: int, output: Path) -> str:
    try:
        opening.open_run(config(output), Runtime(rank, world_size, rank, torch.device("cpu")), "")
    except UserError as error:
        return str(error)
    return "opened"


def test_all_ranks_are_told_that_a_run_trains(tmp_path: Path) -> None:
    with training(tmp_path):
        first, second = run_ranks(_opens, 2, tmp_path)
    assert "trained by process" in first and first == second


def test_a_file_system_without_locks_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    run: Run = opening.open_run(config(tmp_path), ONE, None)
    assert caplog.text.count("this file system has no locks (No locks available)") == 1
    run.close()
    assert (run.folder / LOCK).read_text() == ""


@pytest.mark.parametrize("resume", [None, ""])
def test_a_folder_where_the_link_to_the_newest_run_belongs_is_one_line(tmp_path: Path, resume: str | None) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(UserError, match=r"latest: is not the link .*move it away"):
        opening.open_run(config(tmp_path), ONE, resume)
