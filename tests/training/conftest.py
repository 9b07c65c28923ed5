"""Runs that several tests of training look at."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shared import made_once, session_folder
from tests.training.trainings import run


@pytest.fixture(scope="session")
def straight(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lend a run of eight steps without a stop, saved after four of them too. Nobody writes into it."""

    def train(output: Path) -> None:
        run(demo, output, "save.every_steps=4")

    with made_once(session_folder(tmp_path_factory) / "shared/straight", train) as output:
        yield (output / "latest").resolve()
