"""Fixtures of the tests of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapters import diffusers_wan


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    diffusers_wan().save_pretrained(folder / "transformer")
    return folder
