"""A small share of the campaign: its own programs, few rounds, and twins that they must find wrong."""

from __future__ import annotations

import importlib
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parents[2] / "tools" / "campaign"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(CAMPAIGN), *sys.path])
    return importlib.import_module(name)


def counts() -> dict[str, Any]:
    return {"found": 0, "harmless": 0, "unseen": 0, "wrong": 0, "accepted": 0, "refused": 0, "slowest_s": 0.0}


def test_flips_in_an_adapter_are_found_or_lie_in_its_tensors(run: Path, tmp_path: Path, monkeypatch) -> None:
    flips, figures = load("flips", monkeypatch), counts()
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes((run / "step2" / file.name).read_bytes())
    draw = random.Random(0)
    for _ in range(20):
        flips._flip_adapter(file, draw, figures)
    assert figures["wrong"] == 0 and figures["unseen"] + figures["found"] + figures["harmless"] == 20


def test_flips_in_a_checkpoint_are_found(run: Path, tmp_path: Path, monkeypatch) -> None:
    flips, figures = load("flips", monkeypatch), counts()
    found = next((run / "checkpoints").iterdir())
    folder, draw = Path(shutil.copytree(found, tmp_path / found.name)), random.Random(0)
    for _ in range(40):
        flips._flip_checkpoint(folder, draw, figures)
    assert figures["wrong"] == 0 and figures["found"] > 30
    monkeypatch.setattr(flips.checkpoint, "digest", lambda _: "the same")  # a broken twin: hashes that see nothing
    monkeypatch.setattr(flips.checkpoint, "check", lambda _: None)
    for _ in range(10):
        flips._flip_checkpoint(folder, draw, figures)
    assert figures["wrong"] > 0


@pytest.mark.parametrize(
    ("code", "lines", "wrong"), [(0, "", 0), (2, "transpixeler: one\n", 0), (1, "", 1), (2, "transpixeler: a\n" * 2, 1)]
)
def test_an_answer_is_judged(code: int, lines: str, wrong: int, monkeypatch) -> None:
    inputs, figures = load("inputs", monkeypatch), counts()

    def answer() -> int:
        sys.stderr.write(lines)
        return code

    inputs._judge("a kind", answer, figures)
    assert figures["wrong"] == wrong
    inputs._judge("a kind", lambda: 1 // 0, figures)
    assert figures["wrong"] == wrong + 1


def test_damaged_toml_is_answered(tmp_path: Path, monkeypatch) -> None:
    inputs, figures, draw = load("inputs", monkeypatch), counts(), random.Random(3)
    file, answer = inputs._toml(tmp_path)
    whole = file.read_bytes()
    for _ in range(60):
        file.write_bytes(inputs.mutated(whole, draw))
        inputs._judge("toml", answer, figures)
    assert figures["wrong"] == 0 and figures["accepted"] > 3 and figures["refused"] > 10
