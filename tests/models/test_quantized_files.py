"""Files of quantized weights are dequantized as they are read, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.models import wan_source
from tests.support.weights import FFN, WIDTH, holder, write_comfyui
from transpixeler.config.sections import UserError
from transpixeler.families.wan.names import NAMES as wan_names
from transpixeler.models.weights import load_weights


def quantize(original: dict[str, Tensor], *, per_row: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file as ComfyUI's `fp8_scaled` ones are, and what it stands for."""
    stored, meant = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, dict(original)
    for name, weight in original.items():
        stored[name] = weight.contiguous()
        if not re.search(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.[qkvo02]\.weight", name):
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 448 if per_row else weight.abs().max() / 448
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".scale_weight")] = scale
        stored[name.replace(".weight", ".scale_input")] = torch.tensor(3.0)
        meant[name] = stored[name].float() * scale
    return stored, meant


@pytest.mark.parametrize("per_row", [False, True])
def test_a_scaled_fp8_file_is_dequantized(tmp_path: Path, original: dict[str, Tensor], per_row: bool) -> None:
    stored, meant = quantize({name: 0.01 * tensor for name, tensor in original.items()}, per_row=per_row)
    source = wan_source(write_comfyui(tmp_path / "c.safetensors", stored))
    model = holder(
        {wan_names.parameter(name, source="original", to="internal"): tensor for name, tensor in meant.items()}
    )
    load_weights(model, source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, meant[wan_names.parameter(name, source="internal", to="original")]), name
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(source.read_slice(name, (slice(5, 9), slice(None))), meant[name][5:9])


def test_a_plain_fp8_file_is_cast(tmp_path: Path, original: dict[str, Tensor]) -> None:
    low = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in original.items()}
    model = holder(
        {wan_names.parameter(name, source="original", to="internal"): tensor for name, tensor in original.items()}
    )
    load_weights(model, wan_source(write_comfyui(tmp_path / "c.safetensors", low)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, low[wan_names.parameter(name, source="internal", to="original")].float())


def test_newer_quantized_files_are_dequantized_or_refused(tmp_path: Path, original: dict[str, Tensor]) -> None:
    name = "blocks.0.self_attn.q"
    stored = {n: t.contiguous() for n, t in original.items()} | {
        f"{name}.weight": torch.ones(WIDTH, WIDTH).to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.tensor(0.5),
        f"{name}.comfy_quant": torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8),
    }
    source = wan_source(write_comfyui(tmp_path / "good.safetensors", stored))
    assert torch.equal(source.read(f"{name}.weight"), torch.full((WIDTH, WIDTH), 0.5))
    stored[f"{name}.comfy_quant"] = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    source = wan_source(write_comfyui(tmp_path / "bad.safetensors", stored))
    with pytest.raises(UserError, match="mxfp8"):
        source.read(f"{name}.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantized_weight_without_its_scale_is_refused(
    tmp_path: Path, original: dict[str, Tensor], dtype: torch.dtype
) -> None:
    stored, _ = quantize(original, per_row=False)
    del stored["blocks.1.ffn.2.scale_weight"]
    stored["blocks.1.ffn.2.weight"] = torch.ones(WIDTH, FFN).to(dtype)
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.2\.weight is quantized"):
        wan_source(write_comfyui(tmp_path / "c.safetensors", stored)).read("blocks.1.ffn.2.weight")
