"""Every spelling of a weight's name leads to every other, one to one."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.weights import diffusers_wan
from transpixeler.families.wan.names import NAMES as wan_names
from transpixeler.models.names import UnknownName

GOLDEN = Path(__file__).parent / "golden"


def test_the_names_of_each_spelling_are_golden(original: dict[str, Tensor]) -> None:
    for spelling, rename in (
        ("original", str),
        ("diffusers", partial(wan_names.parameter, source="original", to="diffusers")),
        ("internal", partial(wan_names.parameter, source="original", to="internal")),
    ):
        names = sorted({re.sub(r"^blocks\.\d+", "blocks.N", rename(name)) for name in original})
        assert names == (GOLDEN / f"wan_{spelling}.txt").read_text().splitlines()


def test_the_diffusers_names_are_those_of_diffusers(original: dict[str, Tensor]) -> None:
    assert {wan_names.parameter(name, source="original", to="diffusers") for name in original} == set(
        diffusers_wan().state_dict()
    )


ORIGINAL_NAMES = (GOLDEN / "wan_original.txt").read_text().splitlines()
original_names = st.builds(
    lambda name, block: name.replace("blocks.N", f"blocks.{block}"), st.sampled_from(ORIGINAL_NAMES), st.integers(0, 99)
)


@given(original_names)
def test_the_name_maps_are_bijections(name: str) -> None:
    assert (
        wan_names.parameter(
            wan_names.parameter(name, source="original", to="diffusers"), source="diffusers", to="original"
        )
        == name
    )
    assert (
        wan_names.parameter(
            wan_names.parameter(name, source="original", to="internal"), source="internal", to="original"
        )
        == name
    )
    module = name.removesuffix(".weight").removesuffix(".bias")
    assert (
        wan_names.module(wan_names.module(module, source="original", to="flat"), source="flat", to="original") == module
    )
    assert (
        wan_names.module(wan_names.module(module, source="original", to="diffusers"), source="diffusers", to="original")
        == module
    )


@given(st.sets(original_names, min_size=2))
def test_two_weights_never_share_a_name(names: set[str]) -> None:
    for rename in (
        partial(wan_names.parameter, source="original", to="diffusers"),
        partial(wan_names.parameter, source="original", to="internal"),
    ):
        assert len({rename(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["blocks.0.norm2.weight", "blocks.00.norm3.weight", "blocks.0.modulation.weight", "x"])
def test_a_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(UnknownName):
        wan_names.parameter(name, source="original", to="diffusers")
