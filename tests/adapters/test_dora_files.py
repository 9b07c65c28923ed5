"""A DoRA's files: merged, sampled and read elsewhere, it gives what the model that trained gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.adapters.test_traded import sampled
from tests.support.adapters import METADATA, diffusers_output, header, our_model, output, trained
from tests.support.models import wan_source
from transpixeler import cli
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.command import export_command
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.merge import FusedSource, merge_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.adapters.readers import readers
from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.names import NAMES as wan_names
from transpixeler.sampling.model import initial_adapters


def dora(base: Path, *streams: str) -> tuple[torch.nn.Module, Adapter]:
    model = trained(base, *streams, alpha=2.0, kind="dora")
    return model, adapter_of(model, METADATA | {"base_model": str(base), "streams": ",".join(["rgb", *streams])})


def test_a_merged_dora_gives_the_output_of_the_model_that_trained(tmp_path: Path, base: Path) -> None:
    from diffusers import WanTransformer3DModel

    model, adapter = dora(base)
    made = merge_adapter(WanFolder(str(base)), [adapter], tmp_path / "m")
    assert torch.allclose(output(our_model(tmp_path / "m")), output(model), atol=1e-5)
    assert torch.allclose(diffusers_output(WanTransformer3DModel.from_pretrained(made)), output(model), atol=1e-5)
    lora = replace(adapter, tensors={n: t for n, t in adapter.tensors.items() if not n.endswith("magnitude")})
    merge_adapter(WanFolder(str(base)), [lora], tmp_path / "lora")
    assert not torch.allclose(output(our_model(tmp_path / "lora")), output(model), atol=1e-2)


@pytest.mark.parametrize("streams", [(), ("seg",)], ids=["plain", "joint"])
def test_a_saved_dora_says_its_kind_and_is_sampled_as_it_trained(
    streams: tuple[str, ...], tmp_path: Path, base: Path
) -> None:
    model, adapter = dora(base, *streams)
    adapter = replace(adapter, metadata=adapter.metadata | {"rgb_attends_aux": "true"})
    file = write_adapter(adapter, tmp_path / "epoch1")
    assert header(file)["transpixeler.kind"] == "dora"
    assert json.loads((tmp_path / "epoch1" / "adapter_config.json").read_text())["use_dora"] is True
    again = read_adapter(file)
    assert again.matches(adapter) and again.is_dora
    copy = our_model(base, *streams)
    apply_adapter(copy, again)
    assert torch.equal(output(copy), output(model))
    assert torch.allclose(sampled(str(file)), output(model), atol=1e-6)


def as_comfyui_patches(weight: Tensor, stored: dict[str, Tensor], key: str) -> Tensor:
    """ComfyUI 0.3.64: magnitudes as long as the weight has rows are divided by the norms of the weight as it was."""
    down, up = stored[f"{key}.lora_A.weight"], stored[f"{key}.lora_B.weight"]
    scale = stored[f"{key}.dora_scale"]
    assert scale.shape == (len(weight), 1)
    changed = weight + up @ down * (stored[f"{key}.alpha"].item() / len(down))
    return changed * (scale / (weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps))


def test_comfyui_computes_the_same_from_its_own_format(tmp_path: Path, base: Path) -> None:
    _, adapter = dora(base)
    write_adapter(adapter, tmp_path / "a")
    merged = FusedSource(wan_source(base), [adapter])
    wanted = {target: merged.read(f"{target}.weight") for target in adapter.targets}
    found: dict[str, bool] = {}
    for format in ("comfyui", "transpixeler"):
        (file,) = export_command(tmp_path / "a", format=format, out=tmp_path / f"{format}.safetensors")
        stored, source = load_file(file), wan_source(base)
        keys = {t: f"diffusion_model.{wan_names.module(t, source='internal', to='original')}" for t in adapter.targets}
        patched = {t: as_comfyui_patches(source.read(f"{t}.weight"), stored, key) for t, key in keys.items()}
        found[format] = all(torch.allclose(patched[t], wanted[t], atol=1e-5, rtol=1e-4) for t in wanted)
    assert found == {"comfyui": True, "transpixeler": False}
    back = read_adapter(tmp_path / "comfyui.safetensors")
    assert readers(back, "comfyui") == ("ComfyUI",) and readers(adapter, "transpixeler") == ()
    again = FusedSource(wan_source(base), [back])
    for target, weight in wanted.items():
        torch.testing.assert_close(again.read(f"{target}.weight"), weight, atol=1e-5, rtol=1e-4)
    words = [f"model.path={base}", f"lora.init_from={tmp_path / 'comfyui.safetensors'}", "streams={rgb: ''}"]
    with pytest.raises(UserError, match=r"lora\.init_from: .*dora_scale, which no adapter beside a frozen base"):
        initial_adapters(loading.from_overrides([*words, "lora.scope=all", "lora.kind=dora"]))


def test_a_dora_for_comfyui_needs_the_base_that_it_was_trained_on(tmp_path: Path, base: Path) -> None:
    _, adapter = dora(base)
    write_adapter(replace(adapter, metadata={"family": "wan"}), tmp_path / "a")
    with pytest.raises(UserError, match="does not say which base it was trained on; give one with `--base`"):
        export_command(tmp_path / "a", format="comfyui", out=tmp_path / "c.safetensors")
    export_command(tmp_path / "a", format="comfyui", out=tmp_path / "c.safetensors", base=base)
    assert header(tmp_path / "c.safetensors")["transpixeler.norms"] == "base"


def test_an_export_says_who_reads_a_dora(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    _, adapter = dora(base)
    write_adapter(adapter, tmp_path / "a")
    said = {}
    for format in ("comfyui", "diffusers", "kohya"):
        words = ["export", str(tmp_path / "a"), "--format", format, "--out", str(tmp_path / f"{format}.safetensors")]
        assert cli.main(words) == 0
        said[format] = capsys.readouterr().out.splitlines()[0]
    assert said == {
        "comfyui": "read by ComfyUI, transpixeler",
        "diffusers": "read by diffusers, transpixeler",
        "kohya": "read by transpixeler, and by no other program",
    }
    assert "for diffusers, use --format diffusers; for ComfyUI, --format comfyui" in caplog.text
    assert "lora_unet_blocks_0_ffn_0.dora_scale" in load_file(tmp_path / "kohya.safetensors")
    assert "transformer.blocks.0.attn1.to_q.lora_magnitude_vector" in load_file(tmp_path / "diffusers.safetensors")
