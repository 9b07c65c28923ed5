"""A whole model as one file in the original names: ComfyUI's rule finds it, diffusers and we read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.support.adapters import header
from tests.support.families.cases import CASES, Case, inputs
from tests.support.families.references import LTX, WAN
from tests.support.models import move
from transpixeler import cli
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.merge import save_model
from transpixeler.adapters.on_model import adapter_of
from transpixeler.adapters.tensorfile import stream_tensors
from transpixeler.config.sections import LoraConfig
from transpixeler.files import shown_path
from transpixeler.models.backbone import Backbone
from transpixeler.models.lora import inject
from transpixeler.models.weights import WeightSource, load_weights

# readers of Wan's own files take heads of 128 for granted; LTX-Video's files say in their header what shapes do not
CONFIGS: dict[str, dict[str, Any]] = {"wan": {**WAN, "num_attention_heads": 1, "attention_head_dim": 128}, "ltx": LTX}
PREFIX = {"wan": "", "ltx": "model.diffusion_model."}
DETECTED_BY = {"wan": "head.modulation", "ltx": "adaln_single.emb.timestep_embedder.linear_1.bias"}
CAUSAL = "causal_temporal_positioning"


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def base(case: Case, tmp_path: Path) -> Path:
    return write_base(case, CONFIGS[case.name], tmp_path / "base")


def write_base(case: Case, config: dict[str, Any], folder: Path) -> Path:
    import diffusers

    published = getattr(diffusers, case.family.transformer_class)(**config)
    move(published, seed=2)
    published.save_pretrained(folder / "transformer")
    if case.name == "ltx":  # as from version 0.9.5 on, which the config of diffusers does not say
        file = folder / "transformer/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {CAUSAL: True}))
    return folder


def loaded(case: Case, path: Path, *streams: str) -> Backbone:
    model = case.family.open(str(path)).build(streams=("rgb", *streams))
    load_weights(model, WeightSource(path, case.family.internal_names))
    return model.eval()


def trained(case: Case, base: Path) -> Backbone:
    model = loaded(case, base)
    inject(model, LoraConfig(rank=3, alpha=5.0, scope="all"))
    move(model, seed=1, names=".lora_")
    return model


@torch.no_grad()
def velocity(case: Case, model: Backbone) -> Tensor:
    channels = CONFIGS[case.name]["in_channels"]
    layout = model.layout((channels, *case.shapes[1][1:]))
    return model(*inputs(model, layout), layout=layout)


def export(path: Path, out: Path, *words: str) -> int:
    return cli.main(["export", str(path), "--format", "merged", "--out", str(out), *words])


@pytest.fixture
def merged(case: Case, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    adapter = adapter_of(trained(case, base), {"family": case.name, "base_model": str(base)})
    file = write_adapter(adapter, tmp_path / "adapter.safetensors")
    assert export(file, tmp_path / "merged.safetensors") == 0
    told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"read by ComfyUI \(.*\), diffusers \(from_single_file\), transpixeler", told[0])
    assert told[1:] == [shown_path(tmp_path / "merged.safetensors")]
    yield tmp_path / "merged.safetensors"


def test_a_merged_file_holds_every_weight_under_the_name_that_comfyui_detects(
    case: Case, base: Path, merged: Path
) -> None:
    stored, names = load_file(merged), case.family.names
    model = trained(case, base)
    plain = {name.removesuffix(".weight"): value for name, value in loaded(case, base).named_parameters()}
    assert PREFIX[case.name] + DETECTED_BY[case.name] in stored
    assert set(stored) == {
        PREFIX[case.name] + names.parameter(n, source="internal", to="original")
        for n, _ in loaded(case, base).named_parameters()
    }
    adapter = adapter_of(model, {})
    for target in adapter.targets:
        there = stored[PREFIX[case.name] + names.module(target, source="internal", to="original") + ".weight"]
        change = adapter.scale(target) * adapter.up(target) @ adapter.down(target)
        torch.testing.assert_close(there, plain[target].detach() + change, atol=1e-6, rtol=1e-5)


def test_a_merged_file_gives_our_velocity(case: Case, base: Path, merged: Path) -> None:
    ours = velocity(case, trained(case, base))
    torch.testing.assert_close(velocity(case, loaded(case, merged)), ours, atol=1e-5, rtol=1e-5)
    assert (velocity(case, loaded(case, base)) - ours).abs().max() > 1e-3


def test_diffusers_reads_a_merged_file(case: Case, base: Path, merged: Path) -> None:
    import diffusers

    kind = getattr(diffusers, case.family.transformer_class)
    theirs = kind.from_single_file(str(merged), config=str(base), subfolder="transformer").state_dict()
    source = WeightSource(merged, case.family.internal_names)
    ours = {case.family.names.parameter(n, source="internal", to="diffusers"): source.read(n) for n in source.names()}
    assert set(theirs) == set(ours) and all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_the_header_says_what_no_shape_tells(case: Case, merged: Path) -> None:
    opened = case.family.open(str(merged))
    if case.name == "ltx":
        said = json.loads(header(merged)["config"])["transformer"]
        assert said[CAUSAL] is True and said["num_attention_heads"] == LTX["num_attention_heads"]
    assert opened.diffusers_config()["num_attention_heads"] == CONFIGS[case.name]["num_attention_heads"]


def test_a_merged_file_is_never_overwritten_and_leaves_nothing_when_refused(
    case: Case, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(merged.parent.iterdir())
    assert export(merged.with_name("adapter.safetensors"), merged) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert sorted(merged.parent.iterdir()) == before


def test_a_model_that_readers_of_a_file_would_take_for_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["wan"]
    base = write_base(case, WAN, tmp_path / "base")
    adapter = adapter_of(trained(case, base), {"family": "wan", "base_model": str(base)})
    file, out = write_adapter(adapter, tmp_path / "adapter.safetensors"), tmp_path / "out/merged.safetensors"
    assert export(file, out) == 2
    told = capsys.readouterr().err
    assert "attention_head_dim 24 as 128" in told and "give a folder" in told and told.count("\n") == 1
    assert not list(out.parent.iterdir())
    assert export(file, tmp_path / "folder") == 0


def test_a_base_of_another_family_is_one_clear_line(
    case: Case, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = CASES["ltx" if case.name == "wan" else "wan"]
    theirs = write_base(other, CONFIGS[other.name], tmp_path / "other")
    file = write_adapter(adapter_of(trained(case, base), {"family": case.name}), tmp_path / "adapter.safetensors")
    assert export(file, tmp_path / "merged.safetensors", "--base", str(theirs)) == 2
    told = capsys.readouterr().err
    assert f"of the family {other.name}, and the adapter of the family {case.name}" in told and told.count("\n") == 1


# -- models that were trained in full


def saved_in_full(case: Case, base: Path, folder: Path, *streams: str) -> Backbone:
    model = loaded(case, base, *streams)
    move(model, seed=4)
    save_model(model.named_parameters(), folder, model=case.family.open(str(base)), metadata={"step": "7"})
    return model


def test_a_model_trained_in_full_becomes_one_file(case: Case, base: Path, tmp_path: Path) -> None:
    model = saved_in_full(case, base, tmp_path / "step7")
    assert export(tmp_path / "step7", tmp_path / "a.safetensors", "--base", str(base)) == 0
    (tmp_path / "step7/config.yaml").write_text(f"model: {{path: {base}}}\nlora: {{enabled: false}}\n")
    assert export(tmp_path / "step7", tmp_path / "b.safetensors") == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(velocity(case, loaded(case, tmp_path / "a.safetensors")), velocity(case, model))


def test_a_joint_model_trained_in_full_is_for_no_other_program(
    case: Case, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_in_full(case, base, tmp_path / "step7", "seg")
    assert export(tmp_path / "step7", tmp_path / "a.safetensors", "--base", str(base)) == 2
    told = capsys.readouterr().err
    assert "several streams" in told and told.count("\n") == 1 and not (tmp_path / "a.safetensors").exists()


def test_a_model_trained_in_full_asks_for_the_base_that_nothing_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["ltx"]
    saved_in_full(case, write_base(case, LTX, tmp_path / "base"), tmp_path / "step7")
    assert export(tmp_path / "step7", tmp_path / "a.safetensors") == 2
    assert "give one with `--base`" in capsys.readouterr().err


# -- the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_streamed_file_reads_back(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {f"é{n}": torch.randn(shape).to(dtype) for n, shape in enumerate([(3, 5), (), (7,), (2, 0), (1, 2, 3, 4)])}
    file = tmp_path / "a.safetensors"
    stream_tensors(given.items(), file, names=list(given), metadata={"format": "pt", "note": "ü"})
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ü"} and set(opened.keys()) == set(given)
        for name, tensor in given.items():
            found = opened.get_tensor(name)
            assert found.dtype == dtype and torch.equal(found.float(), tensor.float())
    assert not int.from_bytes(file.read_bytes()[:8], "little") % 8, "readers map the data aligned"
