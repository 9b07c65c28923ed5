"""`train --dry-run`: all that comes before the first step, and nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.trainings import FAST, run
from transpixeler import cli


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def dry(demo: Path, output: Path, *words: str) -> int:
    return cli.main(["train", str(demo / "config.yaml"), f"output_dir={output}", *FAST, *words, "--dry-run"])


def test_it_says_what_would_be_trained_and_leaves_nothing(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry(demo, tmp_path / "output") == 0
    said = capsys.readouterr().err
    assert "8 steps would be trained. Nothing was made" in said and "a LoRA of rank 32" in said
    assert "first    " in said and "train/0" in said.split("first    ")[1], "the first batch is named"
    assert not (tmp_path / "output").exists()


def test_the_batch_that_it_reads_is_the_one_that_training_takes(
    demo: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    first = json.loads((straight / "metrics.jsonl").read_text().splitlines()[0])["samples"]
    assert dry(demo, tmp_path / "output") == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("first"))
    assert all(name in line for name in first)


def test_a_resume_is_rehearsed_and_the_run_stays_as_it_was(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(demo, tmp_path / "output", "train.max_steps=2", "checkpoint.every_steps=2")
    (folder / "save_quit").touch()
    before = files(tmp_path / "output")
    assert dry(demo, tmp_path / "output", "--resume") == 0
    assert "6 steps would be trained" in capsys.readouterr().err
    assert dry(demo, tmp_path / "output", "--resume", str(folder), "--restart-steps") == 0
    assert "8 steps would be trained" in capsys.readouterr().err
    assert files(tmp_path / "output") == before


def test_clips_that_are_not_encoded_are_counted_and_left(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(demo, tmp_path / "demo", ignore=shutil.ignore_patterns("cache"))
    assert dry(copy, tmp_path / "output") == 0
    said = capsys.readouterr().err
    assert "encodes  1" in said and "no batch was read" in said
    assert not [*(copy / "data").glob("cache/*.seg")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.global_batch=1000",), "fewer than train.global_batch"),
        (("model.path=nowhere",), "model.path: nowhere does not exist"),
        (("--resume", "nowhere"), "--resume: nowhere is no folder"),
        (("optim.groups=[{pattern: nothing.*, lr: 1}]",), "optim.groups"),
        (("run_name=taken",), "a run of this name exists"),
    ],
)
def test_what_training_refuses_it_refuses_in_one_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "output/taken").mkdir(parents=True)
    (tmp_path / "output/taken/config.yaml").touch()
    assert dry(demo, tmp_path / "output", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transpixeler:")]
    assert said in line
