"""Every family's names lead to each other one to one, and its adapters go to disk and back in every spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.families.cases import CASES, EVERY, Case, inputs
from tests.support.models import move
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.models.backbone import Backbone
from transpixeler.models.lora import adapter_parameters, inject, lora_linears, targets
from transpixeler.models.names import Names, UnknownName

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
really_every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
METADATA = {
    "base_model": "user/tiny",
    "streams": '["rgb", "seg"]',
    "fill": "keep",
    "step": "7",
    "ema": "false",
}


# -- names


def faults(names: Names, parameters: Iterable[str]) -> list[str]:
    """List the parameters that do not come back from a spelling, or share their name in it with another."""
    found = []
    parameters = list(parameters)
    modules = dict.fromkeys(names._split(name, "internal")[0] for name in parameters)
    for spelling in ("original", "diffusers"):
        stored = [names.parameter(name, source="internal", to=spelling) for name in parameters]
        found += [name for name, there in zip(parameters, stored) if stored.count(there) > 1]
        found += [
            n for n, there in zip(parameters, stored) if names.parameter(there, source=spelling, to="internal") != n
        ]
        if set(names.internal_names(stored)) != set(parameters):
            found.append(f"a file in the {spelling} spelling")
    for spelling in ("original", "diffusers", "flat"):
        for module in modules:
            there = names.module(module, source="internal", to=spelling)
            if names.module(there, source=spelling, to="internal") != module:
                found.append(f"{module} in the {spelling} spelling")
            elif spelling != "flat" and names.read_module(there) != module:
                found.append(f"{module}, read from either spelling")
    return found


def parameters(case: Case) -> list[str]:
    """Name the parameters of a model, and those of blocks with numbers of two figures."""
    names = [name for name, _ in case.model().named_parameters()]
    return names + [
        re.sub(r"^(blocks\.\D?)0\.", r"\g<1>10.", name) for name in names if re.match(r"blocks\.\D?0\.", name)
    ]


@really_every
def test_the_name_maps_are_bijections(case: Case) -> None:
    assert faults(case.family.names, parameters(case)) == []


@really_every
@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_twin_whose_rows_share_a_name_is_caught(case: Case, spelling: str) -> None:
    first, second, *rest = case.family.names.rows
    broken = replace(case.family.names, rows=(first, second._replace(**{spelling: getattr(first, spelling)}), *rest))
    assert faults(broken, parameters(case))


@really_every
@pytest.mark.parametrize("name", ["blocks.0.no_such.weight", "blocks.00.x", "no_such", "embed.weight"])
def test_a_name_outside_the_table_is_refused(case: Case, name: str) -> None:
    for source, to in (("internal", "original"), ("original", "internal"), ("diffusers", "internal")):
        with pytest.raises(UnknownName):
            case.family.names.parameter(name, source=source, to=to)


@really_every
def test_linears_have_the_sizes_that_the_table_says(case: Case) -> None:
    """Families whose blocks differ need no table: no program takes all of their linears for granted."""
    linears = {name.split(".", 2)[2]: linear for name, linear in targets(case.model()).items()}
    sizes: dict[str, int] = {}
    for name, (inner, outer) in case.family.names.block_linears.items():
        out, into = linears[name].weight.shape
        assert sizes.setdefault(inner, into) == into and sizes.setdefault(outer, out) == out, name


# -- adapters


def adapted(case: Case, **lora: object) -> Backbone:
    model = case.model(2)
    inject(model, LoraConfig(rank=3, **{"scope": "aux", **lora}))  # type: ignore[arg-type]
    move(model, seed=1, names=".lora_")
    return model


@every_family
def test_an_adapter_trains_on_every_default_target_and_nothing_else(case: Case) -> None:
    model = adapted(case)
    layout = model.layout(case.shapes[1])
    model(*inputs(model, layout), layout=layout).square().sum().backward()
    inside = {target.split(".", 2)[2] for target, _ in lora_linears(model)}
    assert inside == set(case.family.lora_targets) == set(model.lora_targets)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(adapter_parameters(model))
    assert all(model.get_parameter(name).grad.any() for name in trained)  # type: ignore[union-attr]


@every_family
def test_a_linear_of_the_text_belongs_to_no_stream(case: Case) -> None:
    with pytest.raises(UserError, match=f"{case.reads_text.replace('.', '[.]')} acts on the text") as told:
        adapted(case, targets=(case.reads_text,))
    assert "\n" not in str(told.value) and "lora.scope: all" in str(told.value)
    adapted(case, targets=(case.reads_text,), scope="all")


@every_family
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("scope", ["aux", "all"])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_an_adapter_comes_back_from_every_spelling(
    case: Case, format: str, scope: str, kind: str, tmp_path: Path
) -> None:
    model = adapted(case, scope=scope, alpha=5.0, kind=kind)
    adapter = adapter_of(model, {"family": case.name, **METADATA})
    if scope == "all":
        adapter = replace(adapter, stream_embeddings={})
    back = read_adapter(write_adapter(adapter, tmp_path, format=format))
    assert back.matches(adapter) and back.family is case.family
    other = case.model(2)
    apply_adapter(other, back)
    layout = model.layout(case.shapes[1])
    given = inputs(model, layout)
    found = other(*given, layout=layout)
    torch.testing.assert_close(found, model(*given, layout=layout), atol=1e-5, rtol=1e-5)
    assert (case.model(2)(*given, layout=layout) - found).abs().max() > 1e-3


@every_family
def test_a_plain_file_says_by_its_names_whose_it_is(case: Case, tmp_path: Path) -> None:
    """Other programs' files have no header of ours."""
    from safetensors.torch import load_file, save_file

    adapter = adapter_of(adapted(case, scope="all"), {"family": case.name})
    file = write_adapter(replace(adapter, stream_embeddings={}), tmp_path / "ours.safetensors", format=case.own_format)
    save_file(load_file(file), tmp_path / "theirs.safetensors")
    assert read_adapter(tmp_path / "theirs.safetensors").family is case.family
