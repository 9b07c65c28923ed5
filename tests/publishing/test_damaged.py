"""A damaged file of a run costs what it holds, or one clear line: never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from transpixeler import cli
from transpixeler.adapters.saved import CONFIG
from transpixeler.runs.folder import MANIFEST, METRICS

CUT = b'{"loss": 1, "st\xff'


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """Lend a copy of a run, with a sample whose facts are damaged."""
    copy = Path(shutil.copytree(run, tmp_path / "copied"))
    (copy / "samples/step00000002/0-a").mkdir(parents=True)
    (copy / "samples/step00000002/0-a/sample.json").write_bytes(CUT)
    return copy


def push(copy: Path) -> list[str]:
    return ["push", str(copy), "--repo", "me/mine", "--base", "them/base", "--dry-run"]


@pytest.mark.parametrize("name", [MANIFEST, METRICS])
def test_a_damaged_manifest_or_line_is_passed_over_and_named(
    copied: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = copied / name
    file.write_bytes(CUT if name == MANIFEST else CUT + b"\n" + file.read_bytes())
    for words in (["report", str(copied)], push(copied)):
        caplog.clear()
        assert cli.main(words) == 0
        assert f"{name}: " in caplog.text and "damaged" in caplog.text and "sample.json: damaged" in caplog.text


@pytest.mark.parametrize("content", [b"streams: [", b"- a list", b"\xff\xfe"])
def test_a_damaged_config_is_one_clear_line(copied: Path, content: bytes, capsys: pytest.CaptureFixture) -> None:
    (copied / CONFIG).write_bytes(content)
    save = copied / "step2"
    (save / CONFIG).write_bytes(content)
    for words in (["report", str(copied)], push(copied)):
        assert cli.main(words) == 2
        (said,) = capsys.readouterr().err.splitlines()[-1:]
        assert CONFIG in said and "Traceback" not in said


@pytest.mark.parametrize("content", [CUT, b"[]"])
def test_a_damaged_adapter_config_is_one_clear_line(
    copied: Path, content: bytes, capsys: pytest.CaptureFixture
) -> None:
    for folder in (copied / "step2", copied / "step2/ema"):
        (folder / "adapter_config.json").write_bytes(content)
    assert cli.main(push(copied)) == 2
    assert "adapter_config.json: damaged" in capsys.readouterr().err


def test_a_run_with_a_damaged_line_goes_on(copied: Path, demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = copied / METRICS
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + CUT + b"\n" + b"".join(rest))
    words = ["train", str(demo / "config.yaml"), f"output_dir={copied.parent}", "optim.lr=0.1", "optim.warmup_steps=0"]
    more = ["optim.ema=0.9", "eval.before_first_step=false", "eval.every_epochs=0", "log.tensorboard=false"]
    assert cli.main([*words, *more, "train.max_steps=3", "--resume", str(copied)]) == 0
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert "line 2: damaged and left out" in (copied / "log.txt").read_text()
