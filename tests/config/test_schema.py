"""The schema that editors get accepts what the program accepts, and refuses what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.pages import DOCS, blocks
from tests.support.schema import faults
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.schema import config_schema
from transpixeler.config.sections import UserError

ROOT = Path(__file__).parents[2]
SCHEMA = config_schema()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def found(value: Any) -> list[str]:
    """Return the faults of a config by our own check, which jsonschema must agree with where it is installed."""
    ours = list(faults(value, SCHEMA, SCHEMA))
    if importlib.util.find_spec("jsonschema"):
        import jsonschema  # pyright: ignore[reportMissingImports]

        jsonschema.Draft7Validator.check_schema(SCHEMA)
        assert bool(list(jsonschema.Draft7Validator(SCHEMA).iter_errors(value))) == bool(ours), ours
    return ours


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_ours_is_valid(path: Path) -> None:
    assert found(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def test_the_configs_of_the_guides_are_valid() -> None:
    texts = [block for page in DOCS.glob("*.md") for block in blocks(page, "yaml")]
    shown = [yaml.safe_load(text) for text in texts if not text.startswith("apiVersion:")]  # a manifest of Kubernetes
    assert shown and [fault for config in shown for fault in found(config)] == []


def test_a_whole_config_that_is_written_out_is_valid() -> None:
    assert found(yaml.safe_load(loading.dump(loading.from_overrides([])))) == []


# Each is checked by the program too, so that the two cannot part.
GOOD = (
    "data: {train: clips}",
    "data: {train: [clips, {path: more, repeats: 2, sizes: [[64, 64, 5]]}]}",
    "data: {train: {path: clips}}",
    "streams: {rgb: '', alpha: {suffix: _alpha, scale: 2}}",
    "model: {path: a, fuse: [one.safetensors, {path: two.safetensors, strength: 0.5}]}",
    "optim: {lr: 1e-4, betas: [0.9, 0.95], groups: [{pattern: x, lr: 1.0e-3}]}",
    "parallel: {recompute: 4, compile: on, offload: true}",
    "sample: {guidance: {high: 4, low: 3.5}, shift: auto, size: null}",
    "objective:",
    "base: [a.yaml]\ndata: {resolutions: [512, [832, 480]]}",
)
BAD = (
    ("optim: {lrr: 1}", "optim.lrr"),
    ("optim: {lr: fast}", "optim.lr"),
    ("optim: {lr: -1}", "optim.lr"),
    ("lora: {rank: 0}", "lora.rank"),
    ("lora: {rank: 1.5}", "lora.rank"),
    ("sample: {size: [64, 64]}", "sample.size"),
    ("sample: {formats: [gif]}", "sample.formats"),
    ("data: {train: [{repeats: 2}]}", "data.train"),
    ("streams: {rgb: '', alpha: {scale: 2}}", "streams.alpha"),
    ("model: {family: sora}", "model.family"),
    ("parallel: {compile: maybe}", "parallel.compile"),
    ("train: {deterministic: 1}", "train.deterministic"),
)


@pytest.mark.parametrize("text", GOOD)
def test_what_the_program_takes_is_valid(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    (tmp_path / "c.yaml").write_text(text)
    loading.load(tmp_path / "c.yaml")
    assert found(yaml.safe_load(text)) == []


@pytest.mark.parametrize(("text", "key"), BAD)
def test_what_the_program_refuses_is_not_valid(text: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=key):
        loading.load(tmp_path / "c.yaml")
    faulty = found(yaml.safe_load(text))
    assert any(key.split(".")[0] in fault for fault in faulty), faulty


def test_an_editor_shows_what_the_reference_says() -> None:
    rank = SCHEMA["definitions"]["Lora"]["properties"]["rank"]
    assert rank["default"] == 128 and "rank" in rank["description"].lower()
    assert "example" not in SCHEMA["properties"]["sample"]


def test_the_command_prints_it_or_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert cli.main(["schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == SCHEMA
    assert cli.main(["schema", "--out", "/proc/nowhere/s.json"]) == 2
