"""Progress is told in lines where there is no terminal to draw a bar on."""

from __future__ import annotations

import pytest

from transpixeler.data import progress
from transpixeler.data.progress import Progress, Pulse


def told(caplog: pytest.LogCaptureFixture, *, shown: bool = True, **options: str) -> list[str]:
    caplog.clear()
    with caplog.at_level("INFO"), Progress("steps", 3, shown=shown, **options) as steps:
        for _ in range(3):
            steps.step()
    return [record.getMessage().partition(" (")[0] for record in caplog.records]


def test_a_line_every_few_seconds(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(caplog, verb="sampling") == []  # that was quick
    assert told(caplog) == ["encoding steps: 3/3"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert told(caplog, verb="sampling") == ["sampling steps: 1/3", "sampling steps: 2/3", "sampling steps: 3/3"]
    assert told(caplog, shown=False, verb="sampling") == []


def test_files_are_counted_where_nobody_knows_how_many_there_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            pulse = Pulse("opening")
            pulse.step()
            pulse.step()
        return [record.getMessage().partition(" (")[0] for record in caplog.records]

    assert told() == []
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    assert told() == ["opening files: 1 so far", "opening files: 2 so far"]
