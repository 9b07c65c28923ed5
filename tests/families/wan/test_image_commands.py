"""Wan's image models through the commands: cached, trained, evaluated on prompts with pictures, and sampled."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families.wan.pipelines import CPU, pictures, write_image_to_video
from tests.support.encoding import ALONE
from transpixeler import cli
from transpixeler.adapters.files import read_adapter
from transpixeler.config import loading
from transpixeler.data.encode import encode_missing, find_missing
from transpixeler.data.loader import Assembler
from transpixeler.data.sources.pairs import decode_pair
from transpixeler.families.wan.family import WanFolder
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.shown import ImageTokens, cached_tokens, show

FORMS = ("last", "plain")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_image_to_video(tmp_path_factory.mktemp(form), form) for form in FORMS}


CONFIG = """\
output_dir: output
model: {{path: {model}}}
data: {{train: data/train, eval: data/train, cache_dir: cache, fps: 16, resolutions: [64], frames: [9]}}
lora: {{rank: 2}}
objective: {{tasks: {{image_to_video: 1, joint: 1}}}}
train: {{max_steps: 2, global_batch: 4}}
eval: {{every_epochs: 0, every_steps: 2, before_first_step: false, times: [0.5], samples: 2}}
sample: {{size: [64, 64, 9], steps: 2, prompts_file: prompts.jsonl}}
log: {{tensorboard: false}}
"""


@pytest.mark.parametrize("form", FORMS)
def test_it_caches_trains_evaluates_and_samples(
    form: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    write_pairs(tmp_path / "data/train", scenes(4, formats=[Format(64, 64, 9, Fraction(16))], held_out=False, seed=0))
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=folders[form]))
    given = {"image": "0.png", **({"last": "1.png"} if form == "last" else {})}
    for name, one in zip(("0.png", "1.png"), pictures(), strict=True):
        Image.fromarray(one[:64, :64]).save(tmp_path / name)
    lines = [{"prompt": "a red circle"}, {"prompt": "a red circle", **given}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["plan", str(config), "--device", "a100", "--json"]) == 0
    assert cli.main(["cache", str(config)]) == 0
    assert cli.main(["cache", str(config), "--verify"]) == 0
    check_records(config, WanFolder(str(folders[form])))
    segments = {file: file.stat().st_size for file in tmp_path.rglob("*.seg")}
    with monkeypatch.context() as patch:
        patch.setattr(WanFolder, "load_image_encoder", refused)
        assert cli.main(["train", str(config)]) == 0
    assert {file: file.stat().st_size for file in tmp_path.rglob("*.seg")} == segments, "nothing is encoded twice"
    check_prompts(config, WanFolder(str(folders[form])))
    latest = (tmp_path / "output/latest").resolve()
    lines = [json.loads(line) for line in (latest / "metrics.jsonl").read_text().splitlines()]
    assert [np.isfinite(line["loss"]) for line in lines if "loss" in line] == [True, True]
    assert {"train/image_to_video", "train"} <= set(next(line["eval"] for line in lines if "eval" in line))
    video = str(next((tmp_path / "data/train").glob("001.mp4")))
    words = ["sample", str(latest), "--prompt", "a red circle", "--image", video, "--out", str(tmp_path / "out")]
    words.append("sample.image_guidance=2")  # a third prediction, beside grey
    other, told = (words, [*words, "--last", video]) if form == "last" else ([*words, "--last", video], words)
    assert cli.main(other) == 2 and cli.main(told) == 0
    facts = json.loads(next((tmp_path / "out").rglob("sample.json")).read_text())
    assert facts["given"] == ["first frame of rgb"] and facts["image"] == video
    for wrong in ("objective.tasks={ends_to_video: 1}", "streams.seg={suffix: _seg, scale: 2}"):
        assert cli.main(["train", str(config), wrong]) == 2
    said = capsys.readouterr().err
    assert ("give --last too" if form == "last" else "shown a first frame alone") in said
    assert read_adapter(latest).metadata["pictures"] == ("image,last_image" if form == "last" else "image")
    assert "say image_to_video" in said and "streams.seg.scale: this model takes given frames in channels" in said


def refused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an encoder is loaded for what the cache holds")


def check_prompts(path: Path, model: WanFolder) -> None:
    """Check that the cache holds what the image encoder makes of a prompt's pictures, until these are edited."""
    from PIL import Image

    config = loading.load(path)
    data = encode_missing(config, model, ALONE).eval
    found, fields = cached_tokens(data), [field for field in model.fields if field.source == "image"]
    assert len(found) == 2 * len(fields)
    for field in fields:
        exact, rounded = (ImageTokens(model, CPU, dtype=kind) for kind in (torch.float32, torch.bfloat16))
        cached = ImageTokens(model, CPU, found)
        cut = pictures()[: 1 + field.last, :64, :64]
        for shown in (cut, None):
            expected, other = rounded.of(field, 64, 64, shown), exact.of(field, 64, 64, shown)
            assert all(map(torch.equal, cached.of(field, 64, 64, shown), expected))
            torch.testing.assert_close(expected, other, atol=0.02, rtol=0.02)
    assert not find_missing(config, model, ALONE)[1]
    Image.fromarray(pictures()[1, :64, -64:]).save(path.parent / "0.png")
    assert bool(find_missing(config, model, ALONE)[1]) == bool(fields)


def check_records(config: Path, model: WanFolder) -> None:
    """Check that what the cache holds of a clip is what `sample` makes of its frames."""
    data = encode_missing(loading.load(config), model, ALONE).eval
    batch = Assembler(data, patch=model.geometry.patch, fields=model.fields).batch(np.array([1]), slots=range(1))
    assert batch.shown is not None
    origin = data.items[1].origin
    assert origin is not None
    streams = [frames[[0, -1]] for frames in decode_pair(*origin).values()]
    for given in ({}, {0: streams[0]}, dict(enumerate(streams))):
        expected = show(model, Frames(model, CPU), batch.layout, given)
        found = batch.shown.values(batch.layout, [given.keys()])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name][0], value, atol=0.02, rtol=0.02)  # records are bf16
    assert not torch.equal(batch.shown.own["shown"], batch.shown.blank["shown"])
