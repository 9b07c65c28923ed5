"""Streams with matrices of their own in files: each under its name, read back exactly, and one of them alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.adapters import METADATA, header, move_adapter, our_model, output, trained
from transpixeler import cli
from transpixeler.adapters.adapter import Adapter, linear_of, stream_of
from transpixeler.adapters.companion import only
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.adapters.readers import readers
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan.model import WanModel
from transpixeler.models.lora import inject, lora_linears

STREAMS = ("seg", "depth")


def own(base: Path, **lora: object) -> tuple[WanModel, Adapter]:
    model = trained(base, *STREAMS, alpha=2.0, ranks={"ffn.0": 2}, per_stream=True, **lora)
    said = METADATA | {"base_model": str(base), "streams": "rgb,seg,depth", "scales": "1,2,1"}
    return model, adapter_of(model, said)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("format", FORMATS)
def test_each_streams_matrices_come_back_from_every_spelling(
    format: str, kind: str, base: Path, tmp_path: Path
) -> None:
    model, adapter = own(base, kind=kind)
    file = write_adapter(adapter, tmp_path / "a", format=format)
    stored = load_file(file)
    for stream in STREAMS:
        keys = [key for key in stored if key.startswith(f"transpixeler.stream.{stream}.{FORMATS[format].prefix}")]
        assert len(keys) == (len(stored) - len(STREAMS)) / len(STREAMS)
    again = read_adapter(file)
    assert again.matches(adapter) and again.own_streams == STREAMS and again.is_dora == (kind == "dora")
    assert header(file)["transpixeler.scope"] == '["seg", "depth"]' and "transpixeler.scopes" not in header(file)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"][0] == "cross_attn.o"
    copy = our_model(base, *STREAMS)
    apply_adapter(copy, again)
    torch.testing.assert_close(output(copy), output(model), atol=1e-6, rtol=1e-6)
    assert readers(again, format) == ()


def test_a_twin_with_the_streams_exchanged_is_caught(base: Path) -> None:
    model, adapter = own(base)
    swap = {"seg": "depth", "depth": "seg"}
    tensors = {
        f"{linear_of(n)}@{swap[stream_of(n.rpartition('.')[0])]}.{n[-6:]}": t for n, t in adapter.tensors.items()
    }
    assert tensors.keys() == adapter.tensors.keys()
    twin, copy = replace(adapter, tensors=tensors), our_model(base, *STREAMS)
    assert not twin.matches(adapter)
    apply_adapter(copy, twin)
    assert not torch.allclose(output(copy), output(model), atol=1e-3)


@pytest.mark.parametrize("scope", ["aux", "all"])
def test_one_companion_alone_is_an_ordinary_adapter_beside_the_rgb(scope: str, base: Path, tmp_path: Path) -> None:
    model, adapter = own(base, scope=scope)
    write_adapter(adapter, tmp_path / "a.safetensors")
    words = ["export", str(tmp_path / "a.safetensors"), "--format", "transpixeler", "--only", "depth"]
    assert cli.main([*words, "--out", str(tmp_path / "depth.safetensors")]) == 0
    found = read_adapter(tmp_path / "depth.safetensors")
    assert found.metadata["streams"] == "rgb,depth" and "scales" not in found.metadata
    assert set(found.stream_embeddings) == {"depth"}
    assert found.own_streams == (("rgb", "depth") if scope == "all" else ())
    assert set(found.scopes.values()) == ({("rgb",), ("depth",)} if scope == "all" else {"aux"})
    for target in adapter.targets:
        if stream_of(target) == "depth":
            ours = target if scope == "all" else linear_of(target)
            assert torch.equal(found.up(ours), adapter.up(target)) and found.alphas[ours] == adapter.alphas[target]
    two, plain = our_model(base, "depth"), our_model(base, "depth")
    apply_adapter(two, found)
    inject(plain, LoraConfig(rank=4, alpha=2.0, ranks={"ffn.0": 2}, scope=scope, per_stream=True))  # type: ignore[arg-type]
    source, given = dict(model.named_parameters()), dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in given.items():
            if ".lora_" in name or "stream_embedding" in name:
                parameter.copy_(source[name if name in source else f"{name}.depth"])
    torch.testing.assert_close(output(two), output(plain))


def test_one_of_several_companions_that_share_matrices_takes_them_along(base: Path) -> None:
    shared = adapter_of(trained(base, *STREAMS), METADATA | {"streams": "rgb,seg,depth", "scales": "1,2,1"})
    found = only(shared, "seg")
    assert set(found.scopes.values()) == {"aux"} and found.metadata["scales"] == "1,2"
    assert found.tensors == shared.tensors and set(found.stream_embeddings) == {"seg"}
    narrow = only(replace(shared, scopes=dict.fromkeys(shared.scopes, ("seg",))), "depth")
    assert not narrow.targets and set(narrow.stream_embeddings) == {"depth"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--format", "comfyui", "--only", "normal"],
            "--only: 'normal' is no companion of this adapter; there are seg, d",
        ),
        (["--format", "comfyui", "--only", "rgb"], "--only: 'rgb' is no companion of this adapter"),
        (["--format", "merged"], "acts on some streams only"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    words: list[str], told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(own(base, scope="all")[1], tmp_path / "a.safetensors")
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "a.safetensors"), *words, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not out.exists()


def test_training_starts_from_a_shared_adapter_as_it_is_and_not_the_other_way(base: Path) -> None:
    source, model = trained(base, *STREAMS, alpha=2.0), our_model(base, *STREAMS)
    inject(model, LoraConfig(rank=4, per_stream=True))
    move_adapter(model)
    apply_adapter(model, adapter_of(source, METADATA))
    torch.testing.assert_close(output(model), output(source))
    assert all(torch.equal(pair[1], m.pairs[0][1]) for _, m in lora_linears(model) for pair in m.pairs)
    with pytest.raises(UserError, match=r"has matrices for each stream: set lora\.per_stream=true"):
        apply_adapter(source, own(base)[1])
    with pytest.raises(UserError, match=r"no stream 'seg'; there are rgb, depth"):
        apply_adapter(our_model(base, "depth"), own(base)[1])
