"""Trainings that start from another's result: a full model, or an adapter, is a base like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.training.trainings import FAST, metrics
from transpixeler import cli
from transpixeler.files import shown_path

IMAGES = "data.train=[{path: data/train, frames: [1], repeats: 4}]"
FULL = ("lora.enabled=false", "optim.ema=0", "optim.lr=1e-3")
SMALL = (
    *FAST,
    "train.max_steps=2",
    "checkpoint.every_steps=0",
    "eval.before_first_step=true",
    "eval.every_steps=2",
    "eval.times=[0.3, 0.7]",
    "eval.samples=0",
    "sample.prompts=[]",
)
ONE_STREAM = ("streams.seg=null", "objective.tasks={joint: 1.0, rgb_to_aux: null}")


def train(demo: Path, output: Path, name: str, *words: str) -> Path:
    """Run the command as a user does, and return the run."""
    keys = [*SMALL, f"output_dir={output}", f"run_name={name}", *words]
    assert cli.main(["train", str(demo / "config.yaml"), *keys]) == 0
    return output / name


def refused(capsys: pytest.CaptureFixture[str], demo: Path, output: Path, *words: str) -> str:
    """Return the one line with which the command refuses."""
    capsys.readouterr()
    assert cli.main(["train", str(demo / "config.yaml"), *SMALL, f"output_dir={output}", "run_name=no", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transpixeler:")]
    assert len(lines) == 1 and not (output / "no").exists()
    return lines[0]


def losses(run: Path, step: int) -> dict[str, Any]:
    """Return the held-out losses of a step's evaluation."""
    return next(line["eval"] for line in metrics(run) if "eval" in line and line["step"] == step)["eval"]["loss"]


def embeddings(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "stream_embedding" in name}


def close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    one, other = (json.loads(json.dumps(side)) for side in (one, other))
    return one == other or _leaves(one) == pytest.approx(_leaves(other), rel=2e-6)


def _leaves(tree: Any) -> list[float]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


@pytest.fixture(scope="module")
def chain(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three plain commands: all weights on images, all weights on joint videos, a joint adapter on those."""
    output = tmp_path_factory.mktemp("chain")
    images = IMAGES.replace("data/train", str(demo / "data/train"))
    first = train(demo, output, "images", *FULL, *ONE_STREAM, images)
    second = train(demo, output, "videos", *FULL, f"model.path={first}")
    third = train(demo, output, "adapter", "lora.rank=4", "optim.lr=1e-3", f"model.path={second}")
    return {"images": first, "videos": second, "adapter": third}


def test_losses_go_on_where_the_stage_before_ended(demo: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    again = train(demo, tmp_path, "again", *FULL, *ONE_STREAM, f"model.path={chain['images']}")
    assert close(losses(again, 0), losses(chain["images"], 2))
    assert close(losses(chain["adapter"], 0), losses(chain["videos"], 2))
    assert not close(losses(chain["adapter"], 0), losses(chain["videos"], 0)), "nothing was learned in between"


def test_stream_embeddings_come_along_bit_by_bit(demo: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    brought = embeddings(chain["videos"] / "step2")
    assert all(tensor.any() for tensor in brought.values()) and brought
    kept = train(demo, tmp_path, "kept", *FULL, f"model.path={chain['videos']}", "model.trainable=[blocks.*]")
    for name, tensor in brought.items():
        assert torch.equal(embeddings(kept / "step2")[name], tensor)
        assert not torch.equal(embeddings(chain["adapter"] / "step2")[name], tensor), "the adapter trains them further"


def test_embeddings_that_are_not_trained_outlive_a_resume(demo: Path, chain: dict[str, Path], tmp_path: Path) -> None:
    base = (f"model.path={chain['videos']}", *FULL, "model.trainable=[blocks.*]", "checkpoint.every_steps=1")
    train(demo, tmp_path, "resumed", *base, "train.max_steps=1")
    run = train(demo, tmp_path, "resumed", *base, "--resume")
    brought = embeddings(chain["videos"] / "step2")
    assert all(torch.equal(embeddings(run / "step2")[name], tensor) for name, tensor in brought.items())


def test_a_training_ends_with_the_page_to_open(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(demo, tmp_path, "told", "train.max_steps=1")
    assert [line.split() for line in capsys.readouterr().err.splitlines()][-1] == [
        "report",
        shown_path(run / "report.html"),
    ]


def test_a_chained_adapter_samples_exports_and_names_its_base(
    chain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample.steps=1", "sample.size=[64, 64, 5]", "--prompt", "a red circle drifts left, opaque"]
    assert cli.main(["sample", str(chain["adapter"]), *words, "--out", str(tmp_path / "samples")]) == 0
    assert [*(tmp_path / "samples").glob("*/seg.mp4")]
    sheet = shown_path(tmp_path / "samples/sheet.html")
    assert [line.split() for line in capsys.readouterr().err.splitlines()][-1] == ["sheet", sheet], "the page to open"
    out = tmp_path / "exported"
    assert cli.main(["export", str(chain["adapter"]), "--format", "comfyui", "--out", str(out)]) == 0
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["transpixeler.base_model"] == str(chain["videos"] / "step2")
    lone = tmp_path / "lone.safetensors"  # without its config: the header leads to the base and its encoders
    lone.write_bytes((chain["adapter"] / "step2/adapter_model.safetensors").read_bytes())
    assert cli.main(["sample", str(lone), *words, "--out", str(tmp_path / "more")]) == 0


def test_the_card_names_the_published_model_that_a_chain_began_with(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "models--someone--tiny" / "snapshots" / "1"
    shutil.copytree(demo / "model", published)
    cache = shutil.copytree(demo / "data/cache", tmp_path / "cache")
    short = ("train.max_steps=1", f"data.cache_dir={cache}", "eval.before_first_step=false", "eval.every_steps=0")
    full = train(demo, tmp_path, "full", *FULL, *short, f"model.path={published}")
    again = train(demo, tmp_path, "again", *FULL, *short, f"model.path={full}")
    adapter = train(demo, tmp_path, "adapter", *short, "lora.rank=4", f"model.path={full}")
    cards = []
    for run in (again, adapter):
        capsys.readouterr()
        assert cli.main(["push", str(run), "--repo", "someone/mine", "--dry-run"]) == 0
        cards.append(capsys.readouterr().out)
    assert "base_model: someone/tiny\nbase_model_relation: finetune" in cards[0]
    assert "base_model:" not in cards[1] and "encoders of [someone/tiny]" in cards[1]


def test_an_adapter_of_all_streams_starts_a_full_training(demo: Path, tmp_path: Path) -> None:
    adapter = train(demo, tmp_path, "adapter", "lora.scope=all", "lora.rank=4", "optim.lr=1e-2", "optim.ema=0")
    full = train(demo, tmp_path, "full", *FULL, f"model.path={adapter}")
    assert close(losses(full, 0), losses(adapter, 2))
    again = train(demo, tmp_path, "again", *FULL, f"model.path={full}")
    assert close(losses(again, 0), losses(full, 2)), "what was fused once is not fused again"


def test_averaged_weights_are_the_base_where_they_were_saved(demo: Path, tmp_path: Path) -> None:
    first = train(demo, tmp_path, "first", "lora.enabled=false", "optim.ema=0.5", "optim.lr=1e-3")
    second = train(demo, tmp_path, "second", "lora.rank=4", "optim.ema=0", f"model.path={first}")
    averaged = next(line["eval"] for line in metrics(first) if "eval" in line and line["step"] == 2)["eval"]["loss_ema"]
    assert close(losses(second, 0), averaged)


def test_what_cannot_be_a_base_is_refused_in_one_line(
    demo: Path, chain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aux = chain["adapter"]
    said = refused(capsys, demo, tmp_path, *FULL, f"model.path={aux}")
    assert "some streams only" in said and f"lora.init_from={aux / 'step2'}" in said
    said = refused(capsys, demo, tmp_path, f"model.path={chain['videos']}", "streams.seg=null", "streams.depth=_seg")
    assert "trained for the stream seg" in said
    (empty := tmp_path / "empty").mkdir()
    (empty / "config.yaml").write_bytes((aux / "config.yaml").read_bytes())
    assert "nothing is saved in this run yet" in refused(capsys, demo, tmp_path, f"model.path={empty}")
    bare = tmp_path / "bare"
    (bare / "transformer").mkdir(parents=True)
    for file in (chain["images"] / "step2/transformer").iterdir():
        (bare / "transformer" / file.name).write_bytes(file.read_bytes())
    assert "set model.encoders" in refused(
        capsys, demo, tmp_path, f"model.path={bare}", f"data.cache_dir={tmp_path / 'cache'}"
    )
