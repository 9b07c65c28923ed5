"""What a push tells of the adapters that were added to a base."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from tests.support.saves import TERMS, save_adapter
from transpixeler.config import loading
from transpixeler.config.sections import FuseConfig, ModelConfig
from transpixeler.publishing import hub


def test_no_folder_is_told_of_what_is_fused_at_a_strength(tmp_path: Path) -> None:
    file = save_adapter(tmp_path / "step30") / "config.yaml"
    model = ModelConfig(path="/secret/wan", fuse=("/secret/a.safetensors", FuseConfig("/secret/b.safetensors", 0.5)))
    file.write_text(loading.dump(dataclasses.replace(loading.load(file), model=model)))
    found = yaml.safe_load(hub.pack(str(file.parent), TERMS).files["config.yaml"])["model"]["fuse"]
    assert found == ["a.safetensors", {"path": "b.safetensors", "strength": 0.5, "expert": ""}]
