"""Every command works for every family, on a small world of its own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.families.conformance.conftest import train
from tests.support.families.cases import Case
from tests.training.trainings import as_killed, difference, exact, metrics, tensors
from transpixeler import cli
from transpixeler.adapters.files import read_adapter
from transpixeler.adapters.readers import readers
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import ModelConfig, ObjectiveConfig
from transpixeler.data.media.decode import probe
from transpixeler.models.conditions import shows_frames
from transpixeler.models.family import open_model
from transpixeler.publishing import hub
from transpixeler.sampling.saves import find_save

BRIEF = ("sample.steps=1", "sample.guidance=0")
KINDS = {"lora": (), "full": ("lora.enabled=false", "model.trainable=['*']", "optim.lr=0.001")}


def test_a_folder_says_which_family_it_is(case: Case, world: Path) -> None:
    opened = open_model(ModelConfig(path=str(world / "model")))
    assert opened.family is case.family
    frames = case.frames[1]
    shape = opened.geometry.latent(frames, 64, 64)
    assert opened.geometry.pixels(shape) == (frames, 64, 64) and not opened.geometry.fault(64, 64, frames)
    assert bool(opened.geometry.fault(64, 64, frames + 1)) == (not case.joins)  # one takes any length
    assert opened.geometry.fault(65, 64, frames)


@torch.no_grad()
def test_the_encoders_fit_the_geometry_and_the_fields(case: Case, world: Path) -> None:
    opened, cpu = open_model(ModelConfig(path=str(world / "model"))), torch.device("cpu")
    vae = opened.load_vae(device=cpu, dtype=torch.float32)
    frames = case.frames[1]
    video = torch.randint(0, 256, (1, frames, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(video)
    assert tuple(latents.shape[1:]) == opened.geometry.latent(frames, 64, 64)
    assert tuple(vae.decode(latents).shape) == (1, 3, frames, 64, 64)
    assert vae.fingerprint == opened.vae_fingerprint()
    encoder = opened.load_text_encoder(device=cpu, dtype=torch.float32)
    assert encoder.fingerprint == opened.text_fingerprint()
    for found in encoder.encode(["", "a red circle", "word " * 600]):
        assert set(found) == {field.name for field in opened.fields}
        for field in opened.fields:
            *length, width = found[field.name].shape
            assert width == field.width
            assert 1 <= length[0] <= field.length if field.length else not length
    both, alone = encoder.encode(["a red circle", "a long blue caption"])[0], encoder.encode(["a red circle"])[0]
    assert all(torch.equal(both[name], alone[name]) for name in both)


@pytest.fixture
def copied(world: Path, tmp_path: Path) -> Path:
    """Return a config in a copy of the world: some commands remember in the cache what they saw of the files."""
    return shutil.copytree(world, tmp_path / "world") / "config.yaml"


def test_a_length_that_would_lose_frames_is_refused(
    case: Case, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case.joins:
        pytest.skip("it takes clips of any length")
    short, long = case.frames
    for command in ("plan", "cache", "train", "inspect"):
        assert cli.main([command, str(world / "config.yaml"), f"data.frames=[{short},{long + 1}]"]) == 2
        told = capsys.readouterr().err.strip()
        assert f"data.frames: {long + 1} frames are no" in told and "\n" not in told
        assert (f"{long} or " if long > 1 else "use 1 frame") in told


def test_a_plan_is_made(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(copied), "--device", "a100", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["layouts"] and made["flop_step"] > 0 and made["cache"]["latents"] > 0


def test_a_cache_is_whole_and_nothing_is_encoded_twice(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segments = {file: file.stat().st_size for file in copied.parent.rglob("*.seg")}
    assert segments and cli.main(["cache", str(copied)]) == 0
    assert cli.main(["cache", str(copied), "--verify"]) == 0
    assert "every record is whole" in capsys.readouterr().out
    assert {file: file.stat().st_size for file in copied.parent.rglob("*.seg")} == segments


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(
    case: Case, kind: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    straight = request.getfixturevalue("run") if kind == "lora" else train(world, tmp_path / "straight", *KINDS[kind])
    first = as_killed(straight, 1, tmp_path / "parts")
    second = train(world, tmp_path / "parts", *KINDS[kind], "--resume", str(first))
    assert second == first and exact(second) == exact(straight) and len(metrics(second)) == 2
    assert all(math.isfinite(line["loss"]) for line in metrics(second))
    ends = [tensors(folder, 2, tmp_path) for folder in (straight, second)]
    assert difference(*ends) == 0.0
    assert difference(ends[0], tensors(straight, 1, tmp_path)) > 0  # the second step does something


def test_a_run_is_evaluated(run: Path, tmp_path: Path) -> None:
    assert cli.main(["eval", str(run), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["eval"]
    streams = [stream for values in found.values() for stream in values.get("loss", {}).values()]
    losses = [loss for stream in streams for loss in stream.values()]
    assert losses and all(math.isfinite(loss) for loss in losses), found


def test_a_run_is_sampled(case: Case, run: Path, tmp_path: Path) -> None:
    assert cli.main(["sample", str(run), "--out", str(tmp_path)]) == 0
    videos = [probe(file) for file in tmp_path.rglob("*.mp4")]
    assert len(videos) >= 2, sorted(tmp_path.rglob("*"))
    assert {(video.frames, video.width, video.height) for video in videos} >= {(case.frames[1], 64, 64)}


def test_first_and_last_frames_are_given(
    case: Case, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = copied.parent  # last frames are encoded into its cache
    tasks = ("objective.tasks={image_to_video: 1, ends_to_videos: 1}", "eval.every_epochs=1", *BRIEF)
    opened = open_model(ModelConfig(path=str(world / "model")))
    geometry, ladder = opened.geometry, opened.ladder(ObjectiveConfig())
    if geometry.stills or not geometry.first_alone or case.joins or ladder:
        assert cli.main(["train", str(world / "config.yaml"), f"output_dir={tmp_path}", *tasks]) == 2
        why = "3D U-Net is told one time" if case.joins else "Toy encodes 2 frames at a time"
        why = "FLUX.1 makes images" if geometry.stills else "Pyramid Flow learns to go on" if ladder else why
        assert f"objective.tasks.image_to_video: {why}" in capsys.readouterr().err
        return
    run = train(world, tmp_path / "run", *tasks)
    assert all(math.isfinite(line["loss"]) for line in metrics(run) if "loss" in line)
    image = next((world / "data/eval").glob("*.mp4"))
    words = ["sample", str(run), "--prompt", "a red circle", "--image", str(image), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    facts = json.loads(next((tmp_path / "out").rglob("sample.json")).read_text())
    assert facts["given"] == ["first frame of rgb"] and facts["image"] == str(image)
    rgba = tmp_path / "rgba.png"
    Image.new("RGBA", (64, 64), (200, 40, 40, 128)).save(rgba)
    assert cli.main([*words[:-1], str(tmp_path / "ends"), "--last", str(rgba)]) == 0
    facts = json.loads(next((tmp_path / "ends").rglob("sample.json")).read_text())
    assert facts["given"] == ["first frame of rgb", "last frame of rgb", "last frame of seg"]
    alone = [word for word in words if word not in ("--image", str(image))] + ["--last", str(rgba)]
    assert cli.main(alone) == 2
    tail = "objective.tasks={image_to_video: 0, ends_to_videos: 0, last_to_video: 1}"
    assert cli.main([*alone, "--out", str(tmp_path / "tail"), tail]) == 0
    facts = json.loads(next((tmp_path / "tail").rglob("sample.json")).read_text())
    assert facts["given"] == ["last frame of rgb"] and facts["last"] == str(rgba)


def test_clips_are_made_longer(case: Case, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world, (_, frames) = copied.parent, case.frames
    opened = open_model(ModelConfig(path=str(world / "model")))
    geometry, shows = opened.geometry, shows_frames(opened.fields)
    # of two latent frames, as one family has here, extend is given one
    few = (
        "objective.extend_latents=1",
        f"data.frames=[{frames}]",
        "eval.every_epochs=1",
        "eval.samples=0",
        "sample.prompts=[]",
    )
    tasks = ("objective.tasks={extend: 1, interpolate: 1, joint: 0, rgb_to_aux: 0}", *few)
    clip = next(path for path in sorted((world / "data/eval").iterdir()) if path.suffix in (".mp4", ".png"))
    ask = ["sample", "", "--prompt", "a red circle", "sample.steps=1", "sample.guidance=1", "--between", str(clip)]
    if geometry.stills or not geometry.first_alone or shows or case.joins or opened.ladder(ObjectiveConfig()):
        assert cli.main(["train", str(copied), f"output_dir={tmp_path}", *tasks]) == 2
        assert "objective.tasks.extend: " in capsys.readouterr().err
        ask += [f"sample.{key}={value}" for key, value in case.more.get("sample", {}).items()]
        assert cli.main([*ask[:1], *ask[2:], "--model", str(world / "model"), f"sample.size=[64,64,{frames}]"]) == 2
        assert "--between: " in capsys.readouterr().err
        return
    run = train(world, tmp_path / "run", *tasks)
    told = next(line["eval"] for line in metrics(run) if "eval" in line)
    assert {"eval/extend", "eval/interpolate"} == told.keys(), told
    ask[1] = str(run)
    capsys.readouterr()
    assert cli.main([*ask, "--out", str(tmp_path / "between")]) == 0
    assert "gives rgb, and the model was trained to be given rgb, seg" in capsys.readouterr().err
    facts = json.loads(next((tmp_path / "between").rglob("sample.json")).read_text())
    total = (frames - 1) * 4 + 1
    assert facts["given"] == ["first frame of rgb", "every 4 frames of rgb"] and facts["windows"] == 4
    assert (facts["frames"], facts["fps"]) == (total, "64")
    ask[-2:] = ["--extend", str(clip), "--frames", str(frames + 2)]
    assert cli.main([*ask, "--out", str(tmp_path / "extend")]) == 2
    assert "gives no seg" in capsys.readouterr().err


def test_a_companion_of_half_the_size_goes_the_whole_way(
    case: Case, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = f"data.frames=[{case.frames[1]}]"
    half = ("streams.seg={suffix: _seg, scale: 2}", "train.max_steps=1", frames, "eval.every_epochs=1", *BRIEF)
    if case.joins or open_model(ModelConfig(path=str(copied.parent / "model"))).ladder(ObjectiveConfig()):
        assert cli.main(["plan", str(copied), *half]) == 2
        why = "3D U-Net joins streams" if case.joins else "the stages of Pyramid Flow go by streams of one size"
        assert f"streams.seg.scale: {why}" in capsys.readouterr().err
        return
    assert cli.main(["plan", str(copied), "--device", "a100", "--json", frames]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", str(copied), "--device", "a100", "--json", *half]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["buckets"][0]["tokens"] * 2 / 1.25 == whole["buckets"][0]["tokens"]
    run = train(copied.parent, tmp_path / "run", *half)
    assert all(math.isfinite(line["loss"]) for line in metrics(run) if "loss" in line)
    saved = find_save(str(run)).path / "adapter_model.safetensors"
    assert read_adapter(saved).metadata["scales"] == "1,2"
    alone, out = shutil.copy(saved, tmp_path / "alone.safetensors"), tmp_path / "out"  # whose header says the scale
    words = ["sample", str(alone), "--model", str(copied.parent / "model"), "--prompt", "a red circle"]
    settings = (f"sample.size=[64,64,{case.frames[1]}]", *BRIEF)
    assert cli.main([*words, "--out", str(out), *settings]) == 0
    assert {(video.width, video.height) for video in map(probe, out.rglob("*.mp4"))} == {(64, 64)}
    assert cli.main([*words, "--out", str(out), *settings, "streams.seg.scale=1"]) == 2
    assert "was trained with streams of scales 1, 2, not 1, 1" in capsys.readouterr().err
    assert readers(read_adapter(saved), "comfyui") == case.family.names.loaders.joint_read_by.get("comfyui", ())
    with safe_open(saved, framework="pt") as file:
        stored, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for scales in ("1,2x{", "1", "0,2", "1,2,2"):
        save_file(stored, alone, header | {next(key for key in header if key.endswith("scales")): scales})
        assert cli.main([*words, "--out", str(out), *settings]) == 2
        assert "damaged: the scales in its header are not a number from 1 to 8" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_is_exported_in_every_spelling(case: Case, format: str, run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), "--format", format, "--out", str(tmp_path / "out.safetensors")]) == 0
    ours, exported = read_adapter(find_save(str(run)).path), read_adapter(tmp_path / "out.safetensors")
    assert exported.family is case.family and set(exported.targets) == set(ours.targets)
    for target in ours.targets:
        there, here = (a.up(target) @ a.down(target) * a.scale(target) for a in (exported, ours))
        torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-5)
    assert any(value.any() for name, value in load_file(tmp_path / "out.safetensors").items() if "alpha" not in name)


def test_a_run_could_be_pushed(case: Case, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = case.family.example or "someone/base"  # of one there is none on the Hub
    words = ["push", str(run), "--repo", "someone/tiny", "--base", base, "--dry-run"]
    assert cli.main(words) == 0
    assert "adapter_model.safetensors" in capsys.readouterr().out
    card = hub.pack(str(run), hub.Terms("someone/tiny", base=base)).files["README.md"]
    told = bytes(card).decode() if isinstance(card, bytes) else card.read_text()
    assert f"pipeline_tag: text-to-{case.family.makes}" in told and f"2 aligned {case.family.makes}s" in told
