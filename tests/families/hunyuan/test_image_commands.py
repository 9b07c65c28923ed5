"""A model whose text encoder sees the clip: its captions are cached beside first frames, and every command takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families.hunyuan.pipeline import FORMS, write_pipeline
from tests.support.encoding import ALONE
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.catalog import catalog
from transpixeler.data.encode import encode_missing, find_missing
from transpixeler.data.loader import Assembler
from transpixeler.data.sources.pairs import decode_pair
from transpixeler.evaluation.clips import all_fields
from transpixeler.families.hunyuan.family import HunyuanFolder
from transpixeler.flow.objective import tasks
from transpixeler.models.family import open_model
from transpixeler.publishing import hub

CPU = torch.device("cpu")
CONFIG = """\
output_dir: output
model: {{path: {model}}}
streams: {{rgb: "", seg: _seg}}
data: {{train: data/train, eval: data/eval, cache_dir: cache, fps: 16, resolutions: [64], frames: [9]}}
lora: {{rank: 2, scope: all}}
objective: {{tasks: {{image_to_video: 2, images_to_videos: 1, joint: 1}}, caption_dropout: 0.2}}
optim: {{lr: 0.003, warmup_steps: 0, schedule: constant}}
train: {{max_steps: 2, global_batch: 2, micro_batch: 1}}
checkpoint: {{every_steps: 0}}
save: {{every_epochs: 0, every_steps: 2}}
eval: {{every_epochs: 0, every_steps: 2, before_first_step: false, times: [0.5], samples: 1}}
sample: {{size: [64, 64, 9], steps: 2, guidance: 1, shift: auto, scheduler: euler, prompts_file: prompts.jsonl}}
log: {{tensorboard: false}}
"""


def write_world(place: Path, form: str) -> Path:
    from PIL import Image

    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    write_pipeline(place / "model", form)
    shape = [Format(64, 64, 9, Fraction(16))]
    write_pairs(place / "data/train", scenes(2, formats=shape, held_out=False, seed=0))
    write_pairs(place / "data/eval", scenes(1, formats=shape, held_out=True, seed=0))
    Image.new("RGB", (64, 64), (200, 40, 40)).save(place / "a.png")
    (place / "prompts.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n{"prompt": "a red circle"}\n')
    (place / "config.yaml").write_text(CONFIG.format(model=place / "model"))
    return place / "config.yaml"


@pytest.fixture(scope="module", params=FORMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp(request.param), request.param)


def test_a_model_is_cached_trained_evaluated_and_sampled(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.parent
    assert cli.main(["plan", str(world), "--device", "a100", "--json"]) == 0
    assert cli.main(["cache", str(world)]) == 0
    segments = {file: file.stat().st_size for file in place.rglob("*.seg")}
    with monkeypatch.context() as patch:  # a text encoder takes 15 GB, which a start would wait for
        patch.setattr(HunyuanFolder, "load_text_part", refused)
        assert cli.main(["train", str(world)]) == 0
    assert {file: file.stat().st_size for file in place.rglob("*.seg")} == segments, "nothing is encoded twice"
    run = place / "output/latest"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = next(line["eval"] for line in lines if "eval" in line)
    assert {"eval", "eval/image_to_video", "eval/images_to_videos", "prompts"} <= evaluated.keys()
    words = ["sample", str(run), "--prompt", "a red circle", "--image", str(place / "a.png")]
    assert cli.main([*words, "--out", str(place / "out")]) == 0
    facts = json.loads(next((place / "out").rglob("sample.json")).read_text())
    assert facts["given"] == ["first frame of rgb"]
    card = hub.pack(str(run), hub.Terms("me/flames", base="me/base")).files["README.md"].decode()
    assert "pipeline_tag: image-to-video" in card and "--image first.png --prompt" in card
    capsys.readouterr()
    assert cli.main(["cache", str(world), "--export", str(place / "features")]) == 2
    assert "shown given frames (text" in capsys.readouterr().err


def refused(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an encoder is loaded for what the cache holds")


def test_a_prompt_beside_its_picture_is_cached_until_the_picture_is_edited(world: Path) -> None:
    from PIL import Image

    config, picture = loading.load(world), world.parent / "a.png"
    model, before = open_model(config.model), picture.read_bytes()
    data = encode_missing(config, model, ALONE).eval
    encoder = cast(Any, model.load_text_encoder(device=CPU, dtype=torch.float32))
    (keys,) = data.pictures.seen
    (found,) = encoder.encode_beside(["a red circle"], [torch.from_numpy(np.array(Image.open(picture)))])
    assert torch.equal(cast(Tensor, data.cache.get(keys[0])), found["text"].bfloat16())
    assert keys[0] != data.prompts["a red circle"][0] and keys[1] == data.prompts["a red circle"][1]
    assert {keys[0]} <= catalog(config, model).keys().keys(), "`cache --gc` keeps it"
    assert not find_missing(config, model, ALONE)[1]
    try:
        Image.new("RGB", (64, 64), (40, 200, 40)).save(picture)
        assert str(find_missing(config, model, ALONE)[1]) == "encodes 0 clips and 1 captions"
        (edited,) = encode_missing(config, model, ALONE).eval.pictures.seen
        assert edited[0] != keys[0] and not find_missing(config, model, ALONE)[1]
        assert str(find_missing(replaced(config), model, ALONE)[1]) == "encodes 0 clips and 1 captions", "another size"
    finally:
        picture.write_bytes(before)


def replaced(config: Config) -> Config:
    return replace(config, sample=replace(config.sample, size=(32, 64, 9)))


def test_a_cached_text_is_that_of_the_clips_first_frame(world: Path) -> None:
    config = loading.load(world)
    model = open_model(config.model)
    data = encode_missing(config, model, ALONE).eval
    item, encoder = data.items[0], cast(Any, model.load_text_encoder(device=CPU, dtype=torch.float32))
    assert item.origin is not None
    first = next(iter(decode_pair(*item.origin).values()))[0]
    for keys, shown in ((item.text_keys, torch.from_numpy(first)), (item.unseen_text_keys, None)):
        (found,) = encoder.encode_beside([item.caption], [shown])
        for name, key in zip(("text", "pooled"), keys, strict=True):
            record = data.cache.get(key)
            assert record is not None and torch.equal(record, found[name].bfloat16())
    (blank,) = encoder.encode([""])
    assert torch.equal(cast(Tensor, data.cache.get(data.empty_text_keys[0])), blank["text"].bfloat16())
    batch = Assembler(data, patch=model.geometry.patch, fields=model.fields).batch(np.array([0]), slots=range(1))
    known = tasks(data.streams, shows=batch.shown is not None, stills=batch.shown is not None)
    joint, image = (all_fields(batch, known[name])["text"] for name in ("joint", "image_to_video"))
    assert batch.unseen is not None and torch.equal(joint, batch.unseen["text"])
    assert torch.equal(image, batch.fields["text"]) and not torch.equal(joint, image)


def test_tasks_decide_which_texts_are_encoded(world: Path) -> None:
    def beside(*asked: str) -> list[bool]:
        """Return of each text whether it is read beside a picture; the prompt is once, and comes plain too."""
        every = dict.fromkeys(("image_to_video", "images_to_videos", "joint", "rgb_to_aux"), "null")
        told = ", ".join(f"{name}: {weight}" for name, weight in (every | dict.fromkeys(asked, "1")).items())
        config = loading.load(world, [f"objective.tasks={{{told}}}", "data.eval=[]"])
        return sorted(job.picture is not None for job in catalog(config, open_model(config.model)).texts if job.caption)

    assert beside("image_to_video") == beside("rgb_to_aux") == [False] + [True] * 3
    assert beside("joint") == [False] * 3 + [True]
    assert beside("image_to_video", "joint") == [False] * 3 + [True] * 3


def test_a_first_frame_is_what_a_whole_clip_begins_with(world: Path) -> None:
    """Its decoder is asked for one frame: the same as of the whole clip, at another rate and in the middle too."""
    config = loading.load(world, ["data.fps=12", "data.frames=[5]"])
    found = catalog(config, open_model(config.model))
    for job in found.clips:
        assert job.picture is not None and job.picture.clip.frames == 1
        whole = next(iter(decode_pair(job.sample, job.clip).values()))
        assert np.array_equal(job.picture.read(), whole[0]) and not np.array_equal(whole[0], whole[-1])
    assert len({job.picture.key for job in found.clips if job.picture}) == len(found.clips)
