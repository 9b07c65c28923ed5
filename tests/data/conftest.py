"""The model and the counters that tests of encoding share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.encoding import Counted


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transpixeler.demo.model import write_model

    folder = tmp_path_factory.mktemp("wan") / "model"
    write_model(folder, seed=0)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)
