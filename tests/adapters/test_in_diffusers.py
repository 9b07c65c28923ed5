"""Diffusers reads our adapters in every spelling and gives our output, and its own come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.adapters import (
    METADATA,
    TARGETS,
    TEXT_TARGETS,
    diffusers_output,
    diffusers_wan,
    header,
    lora_names,
    move_adapter,
    our_model,
    output,
    pipeline,
    trained,
)
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.command import export_command
from transpixeler.adapters.files import CONFIG_FILE, FORMATS, read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.families.wan.model import WanModel


def in_diffusers(model: WanModel, folder: Path, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers gives out without the model's adapter and with it."""
    write_adapter(adapter_of(model, METADATA), folder / "pytorch_lora_weights.safetensors", format=format)
    pipe = pipeline()
    plain = diffusers_output(pipe.transformer)
    pipe.load_lora_weights(folder)
    return plain, diffusers_output(pipe.transformer)


@pytest.mark.parametrize("format", FORMATS)
def test_a_plain_adapter_gives_our_output_in_diffusers(format: str, tmp_path: Path, base: Path) -> None:
    model = trained(base, alpha=1.0, targets=(*TARGETS, *TEXT_TARGETS))
    plain, adapted = in_diffusers(model, tmp_path, format)
    assert torch.allclose(output(model), adapted, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01
    apply_adapter(model, Adapter(**vars(adapter_of(model, {})) | {"alphas": dict.fromkeys(lora_names(model), 4.0)}))
    assert not torch.allclose(output(model), adapted, atol=1e-3)  # the strength counts


@pytest.mark.parametrize("format", FORMATS)
def test_ranks_that_differ_keep_their_strength_in_diffusers(
    format: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, ranks = (*TARGETS, *TEXT_TARGETS), {"ffn.*": 8, "blocks.1.self_attn.q": 2}
    model = trained(base, alpha=1.0, targets=targets, ranks=ranks)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    write_adapter(adapter_of(model, METADATA), file, format=format)
    monkeypatch.setattr("diffusers.utils.peft_utils.get_peft_kwargs", None)  # older ones guess wrong
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path)
    assert torch.allclose(output(model), diffusers_output(pipe.transformer), atol=1e-4)
    write_adapter(adapter_of(trained(base), METADATA), file, format=format)
    assert "lora_adapter_metadata" not in header(file), "one rank needs no word"


@pytest.mark.parametrize("ranks", [{}, {"ffn.*": 8}], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("targets", [TARGETS, ("blocks.1.ffn.2", "blocks.1.self_attn.q")], ids=["default", "few"])
@pytest.mark.parametrize("format", FORMATS)
def test_diffusers_reads_an_adapter_of_some_linears_in_every_spelling(
    format: str, targets: tuple[str, ...], ranks: dict[str, int], tmp_path: Path, base: Path
) -> None:
    model = trained(base, alpha=1.0, targets=targets, ranks=ranks)
    plain, adapted = in_diffusers(model, tmp_path, format)
    assert torch.allclose(output(model), adapted, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
    back = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(back.targets) == set(lora_names(model)), "pairs of zeros stay in the file"


def test_an_export_that_diffusers_would_not_read_warns(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for targets, warned in ((TARGETS, False), (("*.self_attn.q",), True)):
        caplog.clear()
        write_adapter(adapter_of(trained(base, targets=targets), METADATA), tmp_path / "a")
        export_command(tmp_path / "a", format="kohya", out=tmp_path / "k.safetensors")
        assert ("use --format diffusers" in caplog.text) == warned


def test_diffusers_refuses_a_joint_adapter_instead_of_misusing_it(tmp_path: Path, base: Path) -> None:
    write_adapter(adapter_of(trained(base, "seg"), METADATA), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"Invalid LoRA checkpoint"):
        pipeline().load_lora_weights(tmp_path)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_an_adapter_trained_by_peft_in_diffusers_comes_in(rank_stabilized: bool, tmp_path: Path, base: Path) -> None:
    from diffusers import WanPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    theirs = diffusers_wan()
    options = {"r": 4, "lora_alpha": 8, "use_rslora": rank_stabilized}
    config = PeftConfig(**options, target_modules=["to_q", "to_out.0", "net.2"])
    theirs.add_adapter(config)
    move_adapter(theirs)
    layers = get_peft_model_state_dict(theirs)
    WanPipeline.save_lora_weights(tmp_path / "header", layers, transformer_lora_adapter_metadata=config.to_dict())
    WanPipeline.save_lora_weights(tmp_path / "beside", convert_state_dict_to_diffusers(layers))
    (tmp_path / "beside" / CONFIG_FILE).write_text(json.dumps(options))
    for name in ("header", "beside"):
        model = our_model(base)
        apply_adapter(model, read_adapter(tmp_path / name))
        assert torch.allclose(output(model), diffusers_output(theirs), atol=1e-5)
