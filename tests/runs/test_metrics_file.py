"""metrics.jsonl is read in one way: a damaged line is named and left out, an unfinished one is left out."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from transpixeler.runs import metrics_file

TORN = b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo\n\xff\xfe\n[3]\n{"loss": 1}\n{"step": 4, "eval": {}}\n{"step": 5'


def test_good_lines_are_read_and_damaged_ones_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(TORN)
    logging.getLogger("transpixeler").propagate = True
    assert metrics_file.read_records(file) == [{"step": 1, "loss": 0.5}, {"step": 4, "eval": {}}]
    assert "metrics.jsonl: line 2, 3, 4, 5: damaged and left out" in caplog.text


def test_a_file_is_opened_again_without_damaged_and_later_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(TORN)
    with metrics_file.reopen(file, 3) as out:
        out.write(b'{"step": 2}\n')
    assert file.read_bytes() == b'{"step": 1, "loss": 0.5}\n{"step": 2}\n'


def test_a_file_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert metrics_file.read_lines(tmp_path / "metrics.jsonl") == []
