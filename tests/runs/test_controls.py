"""Signals and files steer a run; Ctrl-C saves first, and a second one does not wait."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import controls
from transpixeler.runs.folder import Run

ONE = Runtime(0, 1, 0, torch.device("cpu"))


def test_ctrl_c_stops_at_once_before_the_first_step_and_at_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with controls.listening(Run(tmp_path), ONE) as asked:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked.poll() == (False, False)
        asked.started = True
        for _ in range(2):  # the second is the same Ctrl-C, passed on by torchrun
            os.kill(os.getpid(), signal.SIGINT)
        assert asked.poll() == (True, True) and asked.interrupted
        monkeypatch.setattr(controls, "ONE_CTRL_C_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("name", "asked"), [("save", (True, False)), ("save_quit", (True, True))])
def test_a_file_in_the_run_folder_is_honoured_once(tmp_path: Path, name: str, asked: tuple[bool, bool]) -> None:
    (tmp_path / name).touch()
    found = controls.Controls(tmp_path, is_main=True)
    assert found.poll() == asked and not (tmp_path / name).exists()
    found.saved()
    assert found.poll() == (False, asked[1])
