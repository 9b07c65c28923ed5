"""From random weights through its stages, each a plain command; given frames go the whole way."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.families.opensora.folder import SHOWN, write_encoders, write_folder
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Assembler
from transpixeler.data.media.decode import read_frames
from transpixeler.data.sources.pairs import decode_pair
from transpixeler.families.opensora.config import published_config
from transpixeler.families.opensora.family import OpenSoraFolder
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.saves import find_save
from transpixeler.sampling.shown import show

CPU, SETS = torch.device("cpu"), ("train", "eval")
CONFIG = """\
output_dir: output
model: {{path: {model}}}
streams: {{rgb: ""}}
data: {{train: data/train, eval: data/eval, cache_dir: cache, fps: 16, resolutions: [64], frames: [9]}}
lora: {{enabled: false}}
objective: {{shift: auto, caption_dropout: {{text: 0.3, pooled: 0.3}}}}
optim: {{name: adamw, lr: 0.003, warmup_steps: 0, schedule: constant}}
train: {{max_steps: 30, global_batch: 4, micro_batch: 4}}
checkpoint: {{every_steps: 0}}
save: {{every_epochs: 0}}
eval: {{every_epochs: 0, every_steps: 30, times: [0.3, 0.7], samples: 0}}
sample: {{size: [64, 64, 9], steps: 2, guidance: 3, shift: auto, scheduler: euler}}
log: {{tensorboard: false}}
"""


def write_world(place: Path, model: Path) -> Path:
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    shape = [Format(64, 64, 9, Fraction(16))]
    write_pairs(place / "data/train", scenes(4, formats=shape, held_out=False, seed=0))
    write_pairs(place / "data/eval", scenes(2, formats=shape, held_out=True, seed=0))
    for clip in [file for file in place.rglob("*.mp4") if file.stem.isdigit()]:
        picture = Image.fromarray(read_frames(clip, [0], height=64, width=64)[0])
        (images := clip.parent.with_name(f"{clip.parent.name}-images")).mkdir(exist_ok=True)
        picture.save(images / f"{clip.stem}.png")
        shutil.copy(clip.with_suffix(".txt"), images)
    (place / "config.yaml").write_text(CONFIG.format(model=model))
    return place / "config.yaml"


def losses(run: Path) -> list[float]:
    """Return the mean held-out loss of each evaluation of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [next(iter(line["eval"].values()))["loss"]["rgb"] for line in lines if "eval" in line]
    return [sum(loss.values()) / len(loss) for loss in found]


# -- stages


def test_images_then_small_videos_then_larger_ones(tmp_path: Path) -> None:
    write_encoders(tmp_path / "encoders")
    (shape := tmp_path / "tiny.json").write_text(json.dumps(published_config(SHOWN)))
    base = str(tmp_path / "base")
    words = ["--family", "opensora", "--shape", str(shape), "--encoders", str(tmp_path / "encoders"), "--out", base]
    assert cli.main(["init", *words]) == 0
    config = str(write_world(tmp_path, tmp_path / "base"))
    stages = {
        "images": ["data.frames=[1]", "data.resolutions=[32]", *(f"data.{s}={tmp_path}/data/{s}-images" for s in SETS)],
        "small": ["data.resolutions=[32]"],
        "large": ["data.resolutions=[64]"],
    }
    before, last = base, 1.0
    for name, keys in stages.items():
        assert cli.main(["train", config, *keys, f"model.path={before}", f"run_name={name}"]) == 0
        run = tmp_path / "output" / name
        start, end = losses(run)
        assert end < 0.9 * start, (name, start, end)
        assert name == "images" or start < last, "a stage begins with what the last one learned"
        before, last = str(run), start
    again = ["train", config, *stages["large"], f"model.path={before}", "run_name=again", "train.max_steps=1"]
    assert cli.main([*again, "eval.every_steps=1"]) == 0
    assert losses(tmp_path / "output/again")[0] == pytest.approx(losses(tmp_path / "output/large")[1], rel=1e-5)
    stored = load_file(next((find_save(before).path / "transformer").glob("*.safetensors")))
    assert {"double_blocks.0.img_attn.q_proj.weight", "single_blocks.1.v_mlp.weight"} <= stored.keys()
    assert not stored["cond_in.weight"].any() and stored["cond_in.bias"].any(), "nothing was shown yet"
    images = ["train", config, f"model.path={before}", "run_name=i2v", "train.max_steps=2", "eval.every_steps=2"]
    assert cli.main([*images, "objective.tasks={joint: 1, image_to_video: 5, ends_to_video: 1, last_to_video: 1}"]) == 0
    shown = load_file(next((find_save(str(tmp_path / "output/i2v")).path / "transformer").glob("*.safetensors")))
    assert shown["cond_in.weight"].any()


# -- given frames


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two streams that trains all that can be shown."""
    place = tmp_path_factory.mktemp("shown")
    config = write_world(place, write_folder(place / "model", SHOWN))
    text = config.read_text().replace('{rgb: ""}', '{rgb: "", seg: _seg}')
    tasks = "{joint: 1, image_to_video: 2, ends_to_videos: 2, last_to_video: 1}"
    text = text.replace("shift: auto, caption", f"shift: auto, tasks: {tasks}, caption")
    config.write_text(text.replace("max_steps: 30", "max_steps: 2").replace("every_steps: 30", "every_steps: 2"))
    return config


def test_each_end_is_cached_trained_evaluated_and_sampled(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(world), "--device", "a100", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out[:-1])["cache"]["latents"]
    assert cli.main(["cache", str(world)]) == 0 and cli.main(["cache", str(world), "--verify"]) == 0
    segments = {file: file.stat().st_size for file in world.parent.rglob("*.seg")}
    assert planned == 2 * (4 + 2) * 2 * 4 * (3 + 2) * 8 * 8  # bf16, clips, streams, channels; frames and both ends
    assert cli.main(["train", str(world), "eval.samples=4"]) == 0
    assert {file: file.stat().st_size for file in world.parent.rglob("*.seg")} == segments, "nothing is encoded twice"
    run = world.parent / "output/latest"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = next(line["eval"] for line in lines if "eval" in line)
    assert {"eval", *(f"eval/{t}" for t in ("image_to_video", "ends_to_videos", "last_to_video"))} <= evaluated.keys()
    capsys.readouterr()
    assert cli.main(["push", str(run), "--repo", "someone/tiny", "--base", "hpcai-tech/Open-Sora-v2", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert "diffusers and ComfyUI do not know Open-Sora 2" in card and "import torch" not in card
    image, out = str(next((world.parent / "data/eval").glob("*.mp4"))), world.parent / "out"
    words = ["sample", str(run), "--prompt", "a red circle", "sample.image_guidance=3", "sample.image_falloff=true"]
    for name, options, told in (
        ("head", ["--image", image], ["first frame of rgb"]),
        ("tail", ["--last", image], ["last frame of rgb"]),
        ("loop", ["--image", image, "--last", image], ["first frame of rgb", "last frame of rgb"]),
    ):
        assert cli.main([*words, *options, "--out", str(out / name)]) == 0
        facts = json.loads(next((out / name).rglob("sample.json")).read_text())
        assert facts["given"] == told and facts["image_guidance"] == 3
    assert cli.main(["train", str(world), "streams.seg={suffix: _seg, scale: 2}"]) == 2
    assert cli.main(["train", str(world), "objective.caption_dropout={clip: 0.3}"]) == 2
    said = capsys.readouterr().err
    assert (
        "objective.caption_dropout.clip: Open-Sora 2 makes no such field of a caption; there are text, pooled" in said
    )


def test_records_are_what_sampling_makes_of_the_same_frames(world: Path) -> None:
    model = OpenSoraFolder(str(world.parent / "model"))
    data = encode_missing(loading.load(world), model, Runtime(0, 1, 0, CPU)).eval
    batch = Assembler(data, patch=model.geometry.patch, fields=model.fields).batch(np.array([1]), slots=range(1))
    origin = data.items[1].origin
    assert batch.shown is not None and origin is not None and batch.layout.beside == ()
    streams = dict(enumerate(decode_pair(*origin).values()))
    first, last = ({n: frames[[place]] for n, frames in streams.items()} for place in (0, -1))
    for firsts, lasts in (({}, {}), ({0: first[0]}, {}), ({}, last), (first, {1: last[1]})):
        found = batch.shown.values(batch.layout, [firsts.keys()], [lasts.keys()])["shown"][0]
        expected = show(model, Frames(model, CPU), batch.layout, firsts, lasts)["shown"]
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)  # records are bf16
        parts = StreamLayout.equal(("rgb", "seg"), (5, 3, 8, 8), (1, 2, 2)).unpack(found[None])
        for number, part in enumerate(parts):
            masks = part[0, 0].flatten(1).mean(1).tolist()
            assert masks == [float(number in firsts), 0, float(number in lasts)] and not part[0, 1:, 1].any()
            assert bool(part[0, 1:, 0].any()) == (number in firsts)
            assert bool(part[0, 1:, 2].any()) == (number in lasts)


def test_lines_of_a_list_are_shown_frames_of_their_own(world: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "a.png")
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "a red circle", "last": "a.png"},
        {"prompt": "a red circle", "image": "a.png", "seed": 5},
        {"prompt": "a red circle", "image": "a.png", "seed": 5, "negative": "a blue square"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["sample", f"model.path={world.parent / 'model'}", "sample.size=[64, 64, 9]", "sample.steps=2"]
    words += ["sample.guidance=1", "sample.image_guidance=3", "--out", str(tmp_path / "out"), "--resume"]
    assert cli.main([*words, "--prompts", str(tmp_path / "list.jsonl")]) == 0
    places = sorted((tmp_path / "out").rglob("sample.json"))
    facts = [json.loads(place.read_text()) for place in places]
    assert [one["given"] for one in facts] == [[], ["last frame of rgb"], *[["first frame of rgb"]] * 2]
    assert [one.get("image_guidance") for one in facts] == [None, 3, 3, 3]
    videos = [next(place.parent.glob("*.mp4")) for place in places]
    assert len({video.read_bytes() for video in videos}) == 4, "the negative prompt counts beside given frames alone"
    before = [video.stat().st_mtime_ns for video in videos]
    assert cli.main([*words, "--prompts", str(tmp_path / "list.jsonl")]) == 0
    assert [video.stat().st_mtime_ns for video in videos] == before
    assert cli.main([*words, "--prompts", str(tmp_path / "list.jsonl"), "sample.image_guidance=2"]) == 0
    made = [video.stat().st_mtime_ns > was for video, was in zip(videos, before)]
    assert made[1:] == [True] * 3
