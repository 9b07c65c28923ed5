"""Every spelling of a weight's name leads to every other, one to one, and is what the published files hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families.ltx.tiny import ltx, published
from transpixeler.families.ltx.names import NAMES, config_from_shapes
from transpixeler.models.names import UnknownName

GOLDEN = Path(__file__).parent / "golden"
INTERNAL = (GOLDEN / "ltx_internal.txt").read_text().splitlines()
internal_names = st.builds(
    lambda name, block: name.replace("blocks.N", f"blocks.{block}"), st.sampled_from(INTERNAL), st.integers(0, 99)
)


def spelled(name: str, to: str) -> str:
    return NAMES.parameter(name, source="internal", to=to)


@pytest.mark.parametrize("spelling", ["internal", "original", "diffusers"])
def test_the_names_of_each_spelling_are_golden(spelling: str) -> None:
    ours = [name if spelling == "internal" else spelled(name, spelling) for name, _ in ltx().named_parameters()]
    names = sorted({re.sub(r"blocks\.\d+", "blocks.N", name) for name in ours})
    assert names == (GOLDEN / f"ltx_{spelling}.txt").read_text().splitlines()


def test_the_diffusers_names_are_those_of_diffusers() -> None:
    assert {spelled(name, "diffusers") for name, _ in ltx().named_parameters()} == set(published().state_dict())


def test_the_original_names_are_those_that_diffusers_converts() -> None:
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

    originals = [spelled(name, "original") for name, _ in ltx().named_parameters()]
    for prefix in ("", "model.diffusion_model."):
        file = {prefix + name: torch.zeros(1) for name in originals}
        assert set(convert_ltx_transformer_checkpoint_to_diffusers(file)) == set(published().state_dict())


@given(internal_names)
def test_the_name_maps_are_bijections(name: str) -> None:
    module = name.removesuffix(".weight").removesuffix(".bias")
    for spelling in ("original", "diffusers"):
        assert NAMES.parameter(spelled(name, spelling), source=spelling, to="internal") == name
    for spelling in ("original", "diffusers", "flat"):
        assert (
            NAMES.module(NAMES.module(module, source="internal", to=spelling), source=spelling, to="internal") == module
        )
    assert NAMES.read_module(NAMES.module(module, source="internal", to="diffusers")) == module


@given(st.sets(internal_names, min_size=2))
def test_two_weights_never_share_a_name(names: set[str]) -> None:
    for spelling in ("original", "diffusers"):
        assert len({spelled(name, spelling) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name",
    ["transformer_blocks.0.norm1.weight", "transformer_blocks.00.ff.net.2.bias", "scale_shift_table.weight", "x"],
)
def test_a_name_outside_the_table_is_refused(name: str) -> None:
    for spelling in ("original", "diffusers"):
        with pytest.raises(UnknownName):
            NAMES.parameter(name, source=spelling, to="internal")


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_file_is_read_in_the_spelling_it_has(spelling: str) -> None:
    internal = {name for name, _ in ltx().named_parameters()}
    assert set(NAMES.internal_names(spelled(name, spelling) for name in internal)) == internal


def test_linears_have_the_sizes_that_the_table_says() -> None:
    block, sizes = ltx().blocks["0"], {"width": 32, "inner": 128}
    for name, (inputs, outputs) in NAMES.block_linears.items():
        assert block.get_submodule(name).weight.shape == (sizes[outputs], sizes[inputs])  # type: ignore[union-attr]


def test_a_file_without_a_config_is_measured() -> None:
    from transpixeler.families.ltx.config import LtxConfig
    from transpixeler.families.ltx.model import LtxModel

    for config in (LtxConfig(), LtxConfig(attention_head_dim=128, cross_attention_dim=4096, num_layers=48)):
        with torch.device("meta"):
            model = LtxModel(config, streams=("rgb",))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert LtxConfig.read(config_from_shapes(shapes)) == config
