"""Adapters of HunyuanVideo are what diffusers loads, under either of their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.families.cases import CASES
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.on_model import adapter_of
from transpixeler.adapters.readers import readers
from transpixeler.config.sections import LoraConfig
from transpixeler.families.hunyuan.config import HunyuanConfig
from transpixeler.families.hunyuan.model import HunyuanModel
from transpixeler.families.hunyuan.names import NAMES
from transpixeler.models.lora import inject
from transpixeler.models.names import split_rows


@pytest.mark.parametrize("format", ["transpixeler", "comfyui"])
def test_diffusers_reads_the_original_names_of_an_adapter_of_the_published_width(format: str, tmp_path: Path) -> None:
    """It takes that width for granted; memory of the model that nobody touches is never given out."""
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

    small = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel(**small)
        model = HunyuanModel(HunyuanConfig.read(small), streams=("rgb",))
    theirs.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    linears = [n for n, _ in model.named_modules() if n.split(".", 2)[2:] and n.split(".", 2)[2] in model.lora_targets]
    ranks = {name: 2 + place % 2 for place, name in enumerate(linears)}
    tensors = {}
    for name, rank in ranks.items():
        rows, columns = model.get_submodule(name).weight.shape  # type: ignore[union-attr]
        tensors[f"{name}.lora_A"] = torch.randn(rank, columns, generator=draw)
        tensors[f"{name}.lora_B"] = torch.randn(rows, rank, generator=draw)
    scopes = dict.fromkeys(linears, "all")
    adapter = Adapter(tensors, dict.fromkeys(linears, 3.0), scopes, {}, {"family": "hunyuan"})
    assert len(linears) == 6 and "diffusers" in readers(adapter, format)
    write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format=format)
    needed = dict.fromkeys(("text_encoder", "tokenizer", "vae", "scheduler", "text_encoder_2", "tokenizer_2"))
    HunyuanVideoPipeline(**needed, transformer=theirs).load_lora_weights(tmp_path, low_cpu_mem_usage=True)
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    wanted = {}
    for name in linears:
        rows = torch.arange(len(adapter.up(name)))
        spelled = NAMES.module(name, source="internal", to="diffusers")
        wanted |= {there: (name, own) for there, own in split_rows(rows, spelled).items()}
    assert set(layers) == set(wanted)
    for there, (name, rows) in wanted.items():
        found = layers[there].scaling["default_0"] * layers[there].lora_B["default_0"].weight
        torch.testing.assert_close(found, adapter.scale(name) * adapter.up(name)[rows])
        assert torch.equal(layers[there].lora_A["default_0"].weight, adapter.down(name))


def test_diffusers_is_not_named_for_original_names_of_another_width() -> None:
    model = CASES["hunyuan"].model()
    inject(model, LoraConfig(rank=2, scope="all"))
    adapter = adapter_of(model, {"family": "hunyuan"})
    assert readers(adapter, "comfyui") == ("ComfyUI",) and readers(adapter, "diffusers") == ("diffusers",)
