"""A place that cannot be written, or a disk that is full, is one clear line."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from transpixeler import cli

QUICK = ("--prompt", "a red ball", "--size", "64x64x5", "--steps", "1")


def one_line(capsys: pytest.CaptureFixture) -> str:
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if line.startswith("transpixeler: ")]
    assert len(lines) == 1 and not any("Traceback" in line for line in said)
    return lines[0]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow past 20 kB, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("out", ["FILE/below", "/proc/nowhere"])
def test_an_output_place_that_cannot_be_written_is_told_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, out: str
) -> None:
    (tmp_path / "file").write_text("")
    place = out.replace("FILE", str(tmp_path / "file"))
    assert cli.main(["sample", str(run), *QUICK, "--out", place]) == 2
    assert f"--out: {place} cannot be written: " in one_line(capsys)
    assert cli.main(["demo", place]) == 2
    assert f"demo: {place} cannot be written: " in one_line(capsys)


def test_a_full_disk_is_a_fault_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, full_disk: None
) -> None:
    assert cli.main(["sample", str(run), *QUICK, "--out", str(tmp_path / "out")]) == 1
    assert "--out: writing to" in one_line(capsys)
    assert cli.main(["demo", str(tmp_path / "demo")]) == 1
    assert "demo: writing to" in one_line(capsys)
