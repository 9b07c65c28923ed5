"""One clip that the tests of sources copy."""

from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.media import write_marked


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_marked(path, range(20), fps=Fraction(16))
    return path
