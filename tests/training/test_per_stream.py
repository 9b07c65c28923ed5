"""A run whose companions have matrices of their own: resumed, on shards, averaged, planned, sampled and published."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.trainings import difference, exact, layout, run, tensors
from transpixeler import cli
from transpixeler.adapters.files import read_adapter
from transpixeler.publishing import hub

OWN = (
    *("streams={rgb: '', seg: _seg, depth: _depth}", "lora.per_stream=true", "train.max_steps=4"),
    *("checkpoint.every_steps=2", "save.every_steps=4", "train.global_batch=2"),
)


@pytest.fixture(scope="module")
def three(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lend a copy of the demo whose mattes are also its depth maps."""
    folder = shutil.copytree(demo, tmp_path_factory.mktemp("three") / "demo", symlinks=True)
    for file in list((folder / "data").rglob("*_seg.*")):
        shutil.copy(file, file.with_name(file.name.replace("_seg.", "_depth.")))
    return folder


def test_it_goes_on_bit_for_bit_and_on_shards(three: Path, tmp_path: Path) -> None:
    whole = run(three, tmp_path / "whole", *OWN)
    part = run(three, tmp_path / "part", *OWN, "train.max_steps=2")
    shards = shutil.copytree(part, tmp_path / "shards" / part.name, symlinks=True)
    folder = run(three, tmp_path / "part", *OWN, resume=str(part))
    assert exact(folder) == exact(whole)
    assert difference(tensors(folder, 4, tmp_path), tensors(whole, 4, tmp_path)) == 0.0
    run(three, tmp_path / "shards", *OWN, *layout(1, 1, 2), resume=str(shards), ranks=2)
    assert difference(tensors(shards, 4, tmp_path), tensors(whole, 4, tmp_path)) < 1e-4
    for name in ("step4", "step4/ema"):
        ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (folder, whole))
        assert difference(ours, theirs) == 0.0
        ups = [key for key in ours if key.startswith("transpixeler.stream.seg.") and "lora_B" in key]
        assert ups and all((ours[up] != ours[up.replace(".seg.", ".depth.")]).any() for up in ups)
    raw, mean = (load_file(whole / name / "adapter_model.safetensors") for name in ("step4", "step4/ema"))
    assert difference(raw, mean) > 0
    card = hub.pack(str(whole), hub.Terms("a/b", base="c/d")).files["README.md"]
    assert isinstance(card, bytes) and "for each of seg, depth, scope aux, on" in card.decode()
    assert "`transpixeler export a/b --format comfyui --only depth --out depth/`" in card.decode()
    video = ("--prompt", "a red circle", "sample.steps=1", "sample.guidance=0", "sample.size=[64,64,9]")
    assert cli.main(["sample", str(whole), "--out", str(tmp_path / "out"), *video]) == 0
    alone = tmp_path / "depth.safetensors"
    words = ["export", str(whole), "--format", "transpixeler", "--only", "depth", "--out", str(alone)]
    assert cli.main(words) == 0 and read_adapter(alone).metadata["streams"] == "rgb,depth"
    assert cli.main(["sample", str(alone), "--out", str(tmp_path / "two"), *video]) == 0
    assert {path.stem for path in (tmp_path / "two").rglob("*.mp4")} > {"rgb", "depth"}


def test_the_plan_counts_what_each_companion_has(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for each, words in {"true": " for each stream", "false": ""}.items():
        assert cli.main(["plan", str(three / "config.yaml"), *OWN, f"lora.per_stream={each}", "--device", "a100"]) == 0
        told = re.search(rf"([\d,]+) parameters \(a LoRA of rank \d+{words}\) of", capsys.readouterr().out)
        assert told is not None
        counts[each] = int(told[1].replace(",", ""))
    width, companions = 8 * 24, 2
    embeddings = companions * width
    assert counts["true"] - embeddings == companions * (counts["false"] - embeddings) > 0
