"""Files of the time before families go on: a config, a cache, a checkpoint and adapters that that code wrote.

The archive holds a small demo after two steps, and what that code itself made of the third.
"""

from __future__ import annotations

import json
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from transpixeler import cli
from transpixeler.adapters.files import read_adapter
from transpixeler.demo.model import write_model

ARCHIVE = Path(__file__).parent / "golden/before_families.tar.xz"
SETTINGS = (
    *("lora.rank=1", "lora.targets=[self_attn.q, ffn.2]", "optim.ema=0.9", "optim.lr=0.01", "optim.warmup_steps=0"),
    *("optim.schedule=constant", "train.global_batch=2", "train.micro_batch=1", "train.max_steps=3", "run_name=old"),
    *("eval.before_first_step=false", "eval.every_epochs=0", "checkpoint.every_steps=1", "log.tensorboard=false"),
    *("save.every_epochs=0", "save.every_steps=1"),
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    write_model(tmp_path / "demo/model")
    return tmp_path / "demo"


@pytest.mark.skipif(
    Version(version("diffusers")) < Version("0.42"),
    reason="it writes other files of the model than the cache is of",
)
def test_a_run_goes_on_as_the_code_that_began_it_would_have(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(old / "config.yaml"), *SETTINGS, "--resume"]) == 0
    assert "0 records encoded" in capfd.readouterr().err
    ours = json.loads((old / "output/old/metrics.jsonl").read_text().splitlines()[-1])
    theirs = json.loads((old / "expected.jsonl").read_text())
    assert ours["samples"] == theirs["samples"] and ours["step"] == 3
    for key in ("loss", "grad_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
    third, second = (read_adapter(old / "output/old" / step) for step in ("step3", "step2"))
    expected = read_adapter(old / "expected.safetensors")
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(third.tensors[name], tensor, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(second.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_an_adapter_is_known_by_its_names_and_goes_to_other_programs(old: Path, tmp_path: Path) -> None:
    adapter = read_adapter(old / "output/old/step2/ema")  # what is exported
    assert adapter.family.name == "wan" and set(adapter.scopes.values()) == {"aux"}
    for format in ("transpixeler", "comfyui", "diffusers", "kohya"):
        file = tmp_path / f"{format}.safetensors"
        assert cli.main(["export", str(old / "output/old/step2"), "--format", format, "--out", str(file)]) == 0
        again = read_adapter(file)
        for target in adapter.targets:
            there, here = (one.up(target) @ one.down(target) * one.scale(target) for one in (again, adapter))
            torch.testing.assert_close(there, here, atol=1e-7, rtol=1e-5)
