"""Adapters that other programs published come in with the strength that they were trained with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.adapters import FFN, LAYERS, TARGETS, TEXT_TARGETS, WIDTH, moved, our_model, output
from transpixeler import cli
from transpixeler.adapters.files import CONFIG_FILE, read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.config.sections import UserError


def published(folder: Path, *, averaged: bool = False, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    parts = (*TARGETS, *TEXT_TARGETS)
    stored = {"transformer.modality_embedding": moved((1, WIDTH), "embedding")}
    for block in range(LAYERS):
        for part in parts:
            out, inner = {"ffn.0": (FFN, WIDTH), "ffn.2": (WIDTH, FFN)}.get(part, (WIDTH, WIDTH))
            key = f"diffusion_model.blocks.{block}.{part}"
            stored[f"{key}.lora_A.weight"] = moved((8, inner), key).bfloat16()
            stored[f"{key}.lora_B.weight"] = moved((out, 8), key + "B").bfloat16()
    if averaged:
        stored["diffusion_model.modality_embedding"] = stored["transformer.modality_embedding"].clone()
    save_file(stored, folder / ADAPTER_FILE, {"format": "pt"})
    if config:
        (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("averaged", [False, True])
def test_a_published_adapter_comes_in_with_its_quirks(averaged: bool, tmp_path: Path, base: Path) -> None:
    folder = published(tmp_path / "p", averaged=averaged, config={"r": 8, "lora_alpha": 1})
    adapter = read_adapter(folder, stream="alpha")
    assert set(adapter.alphas.values()) == {1.0}
    assert adapter.scale("blocks.0.ffn.0") == 1 / 8
    assert {t.split(".", 2)[2] for t, scope in adapter.scopes.items() if scope == "all"} == {
        "cross_attn.o",
        *TEXT_TARGETS,
    }
    assert set(adapter.scopes.values()) == {"all", "aux"}
    assert torch.equal(adapter.stream_embeddings["alpha"], moved((1, WIDTH), "embedding")[0])
    model = our_model(base, "alpha")
    before = output(model)
    apply_adapter(model, adapter)
    assert (output(model) - before).abs().max() > 1e-3
    again = adapter_of(model, {})
    assert again.matches(adapter)
    assert read_adapter(write_adapter(again, tmp_path / "ours")).matches(adapter)


def test_a_published_adapter_without_its_alpha_needs_to_be_told(tmp_path: Path) -> None:
    folder = published(tmp_path / "p")
    with pytest.raises(UserError, match=r"^lora\.init_from: .*without alpha its strength is unknown") as told:
        read_adapter(folder, key="lora.init_from")
    words = re.search(r"`transpixeler (export .*) NEW\.safetensors`", str(told.value))[1].split()
    assert cli.main([*words, str(tmp_path / "new.safetensors")]) == 0
    again = read_adapter(tmp_path / "new.safetensors")
    assert set(again.alphas.values()) == {1} and again.matches(read_adapter(folder, alpha=1))


def test_a_foreign_file_without_alpha_has_the_strength_that_its_readers_give_it(tmp_path: Path) -> None:
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 3), f"{key}.lora_B.weight": torch.ones(3, 2)}, tmp_path / "x.safetensors"
    )
    adapter = read_adapter(tmp_path)
    assert adapter.scale("blocks.0.self_attn.q") == 1
    assert adapter.is_plain
