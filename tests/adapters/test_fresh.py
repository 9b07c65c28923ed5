"""`transpixeler init`: random bases of any shape, with the encoders of a model that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.hub_server import serving_here
from tests.training.trainings import FAST
from transpixeler import cli
from transpixeler.config.sections import ModelConfig
from transpixeler.models.family import open_model
from transpixeler.models.weights import WeightSource

SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 96, "text_dim": 64}


def written(folder: Path, config: dict) -> Path:
    (folder / "shape.json").write_text(json.dumps(config))
    return folder / "shape.json"


def init(shape: object, encoders: object, out: Path, *words: str) -> int:
    return cli.main(
        ["init", "--family", "wan", "--shape", str(shape), "--encoders", str(encoders), "--out", str(out), *words]
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = WeightSource(folder, open_model(ModelConfig(path=str(folder))).family.internal_names)
    return {name: source.read(name) for name in source.names()}


@pytest.fixture(scope="module")
def fresh(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    assert init(written(folder, SMALL), demo / "model", folder / "base") == 0
    return folder / "base"


def test_it_has_the_shape_that_was_asked_and_the_encoders_of_the_other(demo: Path, fresh: Path) -> None:
    ours, theirs = open_model(ModelConfig(path=str(fresh))), open_model(ModelConfig(path=str(demo / "model")))
    assert ours.config["num_layers"] == 2 and ours.vae_fingerprint() == theirs.vae_fingerprint()
    assert ours.text_fingerprint() == theirs.text_fingerprint()
    assert (fresh / "model_index.json").is_file()


@pytest.mark.parametrize("place", ["here", "hub"])
def test_no_weights_are_taken_that_no_encoder_reads(
    place: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published transformers lie in files and folders of many names, of tens of gigabytes."""
    source = tmp_path / "published"
    shutil.copytree(demo / "model", source)
    large = ("The_Model_v2.safetensors", "model-q8.gguf", "diffusion_transformer_768p/diffusion_pytorch_model.bin")
    for name in large:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x" * 100)
    (source / "diffusion_transformer_768p/config.json").write_text("{}")
    with serving_here(monkeypatch, tmp_path) as hub:
        files = [file for file in source.rglob("*") if file.is_file()]
        hub.repos["me/base"] = {file.relative_to(source).as_posix(): file.read_bytes() for file in files}
        assert init(written(tmp_path, SMALL), source if place == "here" else "me/base", tmp_path / "base") == 0
        asked = {request.split("/resolve/")[1].partition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert sorted(file.name for file in (tmp_path / "base").iterdir()) == [
        *("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    ]
    ours, theirs = open_model(ModelConfig(path=str(tmp_path / "base"))), open_model(ModelConfig(path=str(source)))
    assert ours.vae_fingerprint() == theirs.vae_fingerprint() and ours.text_fingerprint() == theirs.text_fingerprint()
    if place == "hub":
        assert "vae/config.json" in asked and not [name for name in asked if name in large or "transformer" in name]


def test_weights_are_drawn_by_seed_and_keep_the_size_of_what_passes(demo: Path, fresh: Path, tmp_path: Path) -> None:
    shape = written(tmp_path, SMALL)
    assert init(shape, demo / "model", tmp_path / "same") == 0
    assert init(shape, demo / "model", tmp_path / "other", "--seed", "1") == 0
    first, same, other = (tensors(folder) for folder in (fresh, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    matrix = "blocks.0.ffn.0.weight"
    assert not torch.equal(first[matrix], other[matrix])
    assert float(first[matrix].std() * first[matrix].shape[1] ** 0.5) == pytest.approx(3**-0.5, rel=0.05)
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_diffusers_reads_it_and_training_lowers_its_loss(demo: Path, fresh: Path, tmp_path: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    assert WanTransformer3DModel.from_pretrained(fresh / "transformer").config.num_layers == 2
    keys = (*FAST, "lora.enabled=false", "train.max_steps=40", "optim.lr=5e-3", "checkpoint.every_steps=0")
    cache = shutil.copytree(demo / "data/cache", tmp_path / "cache")
    words = (
        "train",
        str(demo / "config.yaml"),
        *keys,
        f"model.path={fresh}",
        f"output_dir={tmp_path}",
        f"data.cache_dir={cache}",
    )
    assert cli.main([*words, "run_name=run", "optim.ema=0"]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--family": "wam"}, "--family: wam is unknown; there are"),
        ({"--shape": "2b"}, "--shape: 2b is neither a file nor a shape of Wan (1.3b, 14b)"),
        ({"--shape": {"_class_name": "Other"}}, "is of a Other"),
        ({"--shape": {**SMALL, "text_dim": 32}}, "reads texts of width 32 (text_dim)"),
        ({"--shape": {**SMALL, "out_channels": 48, "in_channels": 48}}, "channels"),
        ({"--encoders": "nowhere"}, "--encoders: nowhere does not exist"),
        ({"--encoders": "."}, "holds no VAE"),
        ({"--out": "taken"}, "is not empty; name a new folder"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    words = {"--family": "wan", "--shape": SMALL, "--encoders": demo / "model", "--out": "base"} | change
    shape = words["--shape"]
    words["--shape"] = written(tmp_path, shape) if isinstance(shape, dict) else shape
    assert cli.main(["init", *(str(word) for pair in words.items() for word in pair)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transpixeler:")]
    assert said in line and not (tmp_path / "base").exists()
