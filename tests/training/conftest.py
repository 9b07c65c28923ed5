"""Runs that several tests of training look at."""

from pathlib import Path

import pytest

from tests.training.trainings import run


@pytest.fixture(scope="session")
def straight(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps without a stop."""
    return run(demo, tmp_path_factory.mktemp("straight"))
