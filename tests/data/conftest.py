"""The model and the counters that tests of encoding share."""

from pathlib import Path

import pytest

from tests.support.encoding import Counted


@pytest.fixture(scope="session")
def model(demo_model: Path) -> Path:
    return demo_model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)
