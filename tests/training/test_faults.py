"""A run that goes wrong says so: by its exit code, in one line, and with the checkpoint to go on from."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.training.trainings import FAST, launch, metrics, start, wait_for_step
from transpixeler import cli
from transpixeler.adapters.saved import CONFIG
from transpixeler.files import shown_path
from transpixeler.runs import checkpoint, folder, lock


def train(demo: Path, output: Path, *words: str) -> int:
    return cli.main(["train", str(demo / "config.yaml"), f"output_dir={output}", "run_name=mine", *FAST, *words])


def test_a_last_save_that_fails_ends_the_run_with_a_fault(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(demo, tmp_path, "train.max_steps=1") == 0
    (tmp_path / "mine/step2").write_text("a file where the save's folder would be")
    assert train(demo, tmp_path, "train.max_steps=2", "--resume") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step2 was not written" in said and "global_step00000002" in said and "--resume" in said
    (tmp_path / "mine/step2").unlink()
    assert train(demo, tmp_path, "train.max_steps=2", "--resume") == 0
    assert (tmp_path / "mine/step2/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("after", ["an empty folder", "nothing"])
def test_a_run_folder_that_is_lost_ends_training_and_is_not_made_again(demo: Path, tmp_path: Path, after: str) -> None:
    process = start(demo, tmp_path, "run_name=mine", "train.max_steps=500", "checkpoint.every_steps=2")
    wait_for_step(process, tmp_path, 3)
    (tmp_path / "mine").rename(tmp_path / "unmounted")
    if after == "an empty folder":
        (tmp_path / "mine").mkdir()
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert (b"mine" in said and b"another folder" in said) or b"gone" in said
    assert not list((tmp_path / "mine").rglob("*")) and (tmp_path / "mine").exists() == (after != "nothing")
    for saved in checkpoint.candidates(tmp_path / "unmounted/checkpoints"):
        checkpoint.check(saved)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_at_the_step_boundary_and_prints_the_line_that_resumes(demo: Path, tmp_path: Path) -> None:
    process = launch(demo, tmp_path, "train.max_steps=500", "checkpoint.every_steps=0")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    run = (tmp_path / "latest").resolve()
    assert process.returncode == 130, said
    last = metrics(run)[-1]["step"]
    checkpoint.check(run / "checkpoints" / checkpoint.folder_name(last))
    told = [f"train {demo / 'config.yaml'}", f"--resume {shown_path(run)}"]
    assert all(words.encode() in said for words in told)
    assert b"Traceback" not in said


# --- folders that a kill left behind ----------------------------------------------------------------------------------


def test_a_folder_that_a_killed_start_left_behind_is_taken_over(demo: Path, tmp_path: Path) -> None:
    """The process died between making the folder and writing its config; a draft of that is all there is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f".{CONFIG}.0123456789ab.tmp").write_text("streams:")
    assert train(demo, tmp_path, "train.max_steps=1") == 0
    assert not list((tmp_path / "mine").glob(".*.tmp"))


def test_drafts_of_a_killed_run_are_removed_when_it_goes_on(demo: Path, tmp_path: Path) -> None:
    assert train(demo, tmp_path, "train.max_steps=1") == 0
    (tmp_path / "mine/.step2.tmp").mkdir()
    for name in (".metrics.jsonl.0123456789ab.tmp", ".manifest.json.0123456789ab.new"):
        (tmp_path / "mine" / name).touch()
    assert train(demo, tmp_path, "train.max_steps=2", "--resume") == 0
    hidden = {path.name for path in (tmp_path / "mine").iterdir() if path.name.startswith(".")}
    assert hidden == {folder.JOB, lock.LOCK}


# --- optimizers by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [".x", "os.system", "torch.optim.LBFGS", "LBFGS", "a..b", "torch.nn.Linear", "no.Such"]
)
def test_a_name_that_is_no_optimizer_is_one_clear_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    assert train(demo, tmp_path, f"optim.name={name}") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("transpixeler: optim.name: ") and repr(name) in said
    assert not (tmp_path / "mine").exists()


def test_a_class_named_by_the_config_of_a_run_is_not_imported(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A run may be somebody else's; the command line is the user's own."""
    received = Path(shutil.copytree(demo, tmp_path / "received", ignore=shutil.ignore_patterns("data", "model")))
    (received / folder.METRICS).touch()
    text = (demo / "config.yaml").read_text().replace("\n  lr:", "\n  name: tests.training.planted.Planted\n  lr:")
    assert "planted" in text
    for name in ("model", "data"):
        (received / name).symlink_to(demo / name)
    (received / "config.yaml").write_text(text)
    words = ["train", str(received / "config.yaml"), f"output_dir={tmp_path}", *FAST]
    assert cli.main(words) == 2
    assert "optim.name: tests.training.planted.Planted" in capsys.readouterr().err
    assert "TRANSPIXELER_PLANTED" not in os.environ
