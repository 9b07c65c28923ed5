"""Fixtures of the models' tests."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.support.weights import diffusers_wan
from transpixeler.families.wan.names import NAMES as wan_names


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return {
        wan_names.parameter(name, source="diffusers", to="original"): tensor
        for name, tensor in diffusers_wan().state_dict().items()
    }


@pytest.fixture(scope="module")
def internal(original: dict[str, Tensor]) -> dict[str, Tensor]:
    return {wan_names.parameter(name, source="original", to="internal"): tensor for name, tensor in original.items()}
