"""What an export says of its readers is so: diffusers' own loaders are asked, for every family and format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.families.cases import CASES, Case, Reference, inputs
from tests.support.models import move
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.merge import merge_adapter
from transpixeler.adapters.on_model import adapter_of
from transpixeler.adapters.readers import model_readers, readers
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import LoraConfig
from transpixeler.models.backbone import Backbone
from transpixeler.models.lora import inject
from transpixeler.models.names import pieces

PUBLISHED = {name: case for name, case in CASES.items() if case.family.names.loaders.read_by}
every_published_family = pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)


def trained(case: Case, *, streams: int = 1, **lora: Any) -> tuple[Reference, Backbone, Adapter]:
    """Return diffusers' model of the base, ours with an adapter that has moved, and the adapter."""
    reference = case.reference(case.model())
    model = case.model(streams)
    inject(model, LoraConfig(**{"rank": 3, "alpha": 5.0, "scope": "all" if streams == 1 else "aux"} | lora))
    move(model, seed=1, names=".lora_")
    return reference, model, adapter_of(model, {"family": case.name})


def pipeline(case: Case, reference: Reference) -> Any:
    """Put a transformer alone into the pipeline that a user would load."""
    import diffusers

    kind = getattr(diffusers, case.family.pipeline_class)
    needed = [name for name, one in signature(kind).parameters.items() if one.default is one.empty]
    return kind(**{**dict.fromkeys(needed), "transformer": reference.module})


REFUSALS = (ValueError, KeyError, AssertionError, RuntimeError)  # some loaders cut tensors before they look at names


def load_or_refuse(case: Case, reference: Reference, folder: Path, *, read: bool) -> None:
    """Load an adapter's folder; a loader may refuse what it is not said to read."""
    try:
        pipeline(case, reference).load_lora_weights(folder)
    except REFUSALS:
        assert not read


@torch.no_grad()
def velocities(case: Case, runs: Iterable[Any]) -> list[Tensor]:
    single = case.model()
    layout = single.layout(case.shapes[1])
    given = inputs(single, layout)
    return [run(*given, layout=layout) for run in runs]


@every_published_family
@pytest.mark.parametrize("ranks", [{}, {"blocks.1.*": 2}], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("format", FORMATS)
def test_diffusers_reads_an_adapter_just_where_the_export_says_so(
    case: Case, format: str, ranks: dict[str, int], tmp_path: Path
) -> None:
    reference, model, adapter = trained(case, ranks=ranks)
    write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format=format)
    (before,) = velocities(case, [reference.run])
    read = "diffusers" in readers(adapter, format)
    load_or_refuse(case, reference, tmp_path, read=read)
    after, ours = velocities(case, [reference.run, model])
    torch.testing.assert_close(after, ours if read else before, atol=1e-5, rtol=1e-5)
    assert (ours - before).abs().max() > 1e-3


@every_published_family
@pytest.mark.parametrize("ranks", [{}, {"blocks.1.*": 2}], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("format", FORMATS)
def test_diffusers_reads_a_dora_just_where_the_export_says_so(
    case: Case, format: str, ranks: dict[str, int], tmp_path: Path
) -> None:
    """Elsewhere it refuses, or warns and leaves the norms out."""
    reference, model, adapter = trained(case, ranks=ranks, kind="dora")
    write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format=format)
    read = "diffusers" in readers(adapter, format)
    assert read == (format == "diffusers")
    load_or_refuse(case, reference, tmp_path, read=read)
    after, ours = velocities(case, [reference.run, model])
    assert torch.allclose(after, ours, atol=1e-5, rtol=1e-5) == read


@every_published_family
@pytest.mark.parametrize("embedded", [True, False], ids=["with embeddings", "without"])
@pytest.mark.parametrize("format", FORMATS)
def test_diffusers_refuses_a_joint_adapter_or_finds_nothing_in_it(
    case: Case, format: str, embedded: bool, tmp_path: Path
) -> None:
    reference, _, adapter = trained(case, streams=2)
    adapter = adapter if embedded else replace(adapter, stream_embeddings={})
    file = write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format=format)
    (before,) = velocities(case, [reference.run])
    for load in (pipeline(case, reference).load_lora_weights, reference.module.load_lora_adapter):
        try:
            load(file if load == reference.module.load_lora_adapter else tmp_path)
        except REFUSALS as refusal:
            assert isinstance(refusal, RuntimeError) or "Invalid LoRA" in str(refusal)
        assert torch.equal(*velocities(case, [reference.run]), before)
    assert "diffusers" not in readers(adapter, format)


@every_published_family
def test_the_transformer_alone_reads_the_format_that_is_named_for_it(case: Case, tmp_path: Path) -> None:
    reference, model, adapter = trained(case)
    file = write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format="diffusers")
    reference.module.load_lora_adapter(load_file(file))
    after, ours = velocities(case, [reference.run, model])
    torch.testing.assert_close(after, ours, atol=1e-5, rtol=1e-5)


@every_published_family
def test_diffusers_reads_a_merged_folder(case: Case, tmp_path: Path) -> None:
    reference, model, adapter = trained(case)
    reference.module.save_pretrained(tmp_path / "base/transformer")
    made = merge_adapter(case.family.open(str(tmp_path / "base")), [adapter], tmp_path / "merged")
    reference.module.load_state_dict(type(reference.module).from_pretrained(made).state_dict())
    merged, ours = velocities(case, [reference.run, model])
    torch.testing.assert_close(merged, ours, atol=1e-5, rtol=1e-5)
    assert "diffusers (from_pretrained)" in model_readers(case.family, made)


# -- ComfyUI, by its rule: a weight is patched by the key of its module in the family's original names


def comfyui_keys(case: Case) -> dict[str, str]:
    """Map the keys that ComfyUI looks for to a model's weights: dotted and flat, of whatever it calls a weight.

    The flat ones are made of its own names, which may differ from the family's.
    """
    names = case.family.names
    stored = [names.parameter(n, source="internal", to="original") for n, _ in case.model().named_parameters()]
    modules = [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]
    dotted = {f"diffusion_model.{module}": module for module in modules}
    return dotted | {f"lora_unet_{case.in_comfyui(module).replace('.', '_')}": module for module in modules}


def patched(case: Case, file: Path) -> dict[str, Tensor]:
    """Return what ComfyUI adds to each weight: alpha / rank · up · down, or up · down where there is no alpha."""
    stored, added = load_file(file), {}
    for key, module in comfyui_keys(case).items():
        if (change := changed(stored, key)) is not None:
            added[module] = change
    if case.family.name == "flux":  # the only one of ours whose names in diffusers ComfyUI knows, as rows of its own
        for module in comfyui_keys(case).values():
            joined = case.family.names.module(module, source="original", to="diffusers")
            rows = [changed(stored, f"transformer.{piece.name}") for piece in pieces(joined)]
            if found := [change for change in rows if change is not None]:
                assert len(found) == len(rows), module
                added[module] = torch.cat(found)
    return {module: change for module, change in added.items() if change.any()}


def changed(stored: dict[str, Tensor], key: str) -> Tensor | None:
    """Return what a file's pair of matrices adds, if it has one of this key."""
    for up, down in ((".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight")):
        if key + up in stored:
            rank = stored[key + down].shape[0]
            scale = stored[key + ".alpha"] / rank if key + ".alpha" in stored else 1.0
            return scale * stored[key + up] @ stored[key + down]
    return None


@every_published_family
@pytest.mark.parametrize("streams", [1, 2], ids=["plain", "joint"])
@pytest.mark.parametrize("format", FORMATS)
def test_comfyui_patches_every_weight_of_a_plain_adapter_and_none_of_a_joint_one(
    case: Case, format: str, streams: int, tmp_path: Path
) -> None:
    _, _, adapter = trained(case, streams=streams, ranks={"blocks.1.*": 2})
    added = patched(case, write_adapter(adapter, tmp_path / "a.safetensors", format=format))
    names = case.family.names
    wanted = {
        names.module(target, source="internal", to="original"): adapter.scale(target)
        * adapter.up(target)
        @ adapter.down(target)
        for target in adapter.targets
    }
    if "ComfyUI" not in readers(adapter, format):
        assert set(added) < set(wanted) and not (added and streams == 2)
        return
    assert set(added) == set(wanted)
    for module, change in wanted.items():
        torch.testing.assert_close(added[module], change, atol=1e-6, rtol=1e-5)
