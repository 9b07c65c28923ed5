"""Both experts of a Wan train in one run, each by itself; what comes out is what diffusers and the commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.wan.expert_videos import GUIDED, PIXELS, SCALES, sampled, video
from tests.families.wan.pipelines import layout_of, run
from tests.training import trainings
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.publishing import hub
from transpixeler.sampling.model import base_weights
from transpixeler.training.preflight import check_experts

# --- training --------------------------------------------------------------------------------------------------------


KEYS = (
    *("train.max_steps=12", "optim.lr=1e-2", "optim.name=sgd", "optim.ema=0.5", "checkpoint.every_steps=4"),
    *("objective.tasks={joint: 1}", "save.every_epochs=0"),
)


LONG = "train.max_steps=20"


def train(project: Path, output: Path, *overrides: str, ranks: int = 1, resume: str | None = None) -> Path:
    return trainings.run(project, output, *KEYS, *overrides, ranks=ranks, resume=resume)


@pytest.fixture(scope="module")
def alone(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(project, tmp_path_factory.mktemp("alone"), LONG, "checkpoint.keep=9", "checkpoint.every_steps=1")


def test_a_step_leaves_the_other_expert_as_it_was(alone: Path, tmp_path: Path) -> None:
    steps = [line for line in trainings.metrics(alone) if "expert" in line]
    assert {line["expert"] for line in steps} == {"high", "low"}
    found = [trainings.tensors(alone, step, tmp_path) for step in range(12, 21)]
    for before, after, line in zip(found, found[1:], steps[12:], strict=False):
        changed = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
        assert changed == {line["expert"]}, "weights, moments and averages of the idle one stay, to the last bit"
    for line in steps:  # bins of the noise level, of which the high expert has the last alone
        filled = [place for place, value in enumerate(line["loss_by_t"]) if value is not None]
        assert filled == [4] if line["expert"] == "high" else max(filled) <= 4


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_any_layout_trains_the_same(layout: tuple[int, int, int], alone: Path, project: Path, tmp_path: Path) -> None:
    other = train(project, tmp_path, LONG, *trainings.layout(*layout), ranks=2)
    for one, two in zip(trainings.exact(alone), trainings.exact(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6) and one["samples"] == two["samples"]
    assert trainings.difference(trainings.tensors(alone, 20, tmp_path), trainings.tensors(other, 20, tmp_path)) < 1e-6


@pytest.mark.parametrize("kind", [(), ("lora.kind=dora", "model.quantize=int8")], ids=["lora", "dora, int8"])
def test_weights_that_wait_elsewhere_come_back_the_same(kind: tuple[str, ...], project: Path, tmp_path: Path) -> None:
    runs = {
        wait: train(project, tmp_path / wait, f"parallel.idle_expert={wait}", *kind, "train.max_steps=6")
        for wait in ("device", "host", "disk")
    }
    swapped = ("parallel.idle_expert=disk", "parallel.offload=2", "train.max_steps=6")
    runs["blocks"] = train(project, tmp_path / "blocks", *swapped, *kind)
    there = trainings.tensors(runs["device"], 6, tmp_path)
    assert {line["expert"] for line in trainings.metrics(runs["device"])} == {"high", "low"}
    for wait in ("host", "disk", "blocks"):
        assert trainings.exact(runs["device"]) == trainings.exact(runs[wait])
        assert trainings.difference(there, trainings.tensors(runs[wait], 6, tmp_path)) == 0


def test_a_killed_run_goes_on_bitwise(alone: Path, project: Path, tmp_path: Path) -> None:
    killed = trainings.start(project, tmp_path / "out", *KEYS, LONG)
    trainings.wait_for_step(killed, tmp_path / "out", 6)
    trainings.end(killed)
    found = train(project, tmp_path / "out", LONG, resume="")
    assert trainings.exact(alone) == trainings.exact(found)
    assert trainings.difference(trainings.tensors(alone, 20, tmp_path), trainings.tensors(found, 20, tmp_path)) == 0


# --- what comes out --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_both_adapters_load_in_diffusers_and_change_the_video_as_ours_do(
    project: Path, a14b: Path, tmp_path: Path
) -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    one = ("streams={rgb: ''}", "objective.tasks.rgb_to_aux=null", "lora.scope=all")
    latest = train(project, tmp_path, *one, "optim.lr=0.3")
    save = latest / "step12"
    assert sorted(path.name for path in save.iterdir()) == ["config.yaml", "ema", "high", "low"]
    found = sampled(str(latest), ema=False)
    pipeline = WanPipeline.from_pretrained(a14b)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("high", "low"):
        options = {"load_into_transformer_2": True} if name == "low" else {}
        pipeline.load_lora_weights(save / name, weight_name="adapter_model.safetensors", adapter_name=name, **options)
    guided = {"guidance_scale": SCALES["high"], "guidance_scale_2": SCALES["low"]}
    expected = run(pipeline, PIXELS, layout_of(a14b, PIXELS), **guided)
    assert (found - expected).abs().max() < 1e-4
    assert (video(a14b, GUIDED) - expected).abs().max() > 1e-3, "the adapters change nothing"
    one = sampled(str(save / "high"), ema=False)
    assert (one - expected).abs().max() > 1e-4, "the low adapter changes nothing"

    assert cli.main(["export", str(save), "--no-ema", "--format", "merged", "--out", str(tmp_path / "whole")]) == 0
    merged = WanPipeline.from_pretrained(a14b)
    merged.set_progress_bar_config(disable=True)
    for name, part in (("high", "transformer"), ("low", "transformer_2")):
        weights = load_file(tmp_path / "whole" / name / "transformer/diffusion_pytorch_model.safetensors")
        getattr(merged, part).load_state_dict(weights)
    again = run(merged, PIXELS, layout_of(a14b, PIXELS), **guided)
    assert (again - expected).abs().max() < 1e-4
    assert cli.main(["export", str(save), "--format", "comfyui", "--out", str(tmp_path / "lora.safetensors")]) == 0
    assert {file.name for file in tmp_path.glob("lora*")} == {"lora_high.safetensors", "lora_low.safetensors"}
    parcel = hub.pack(str(latest), hub.Terms("a/b", base="c/d"))
    assert {"high/adapter_model.safetensors", "low/adapter_model.safetensors"} < set(parcel.files)
    card = parcel.files["README.md"]
    assert isinstance(card, bytes) and 'subfolder="low", weight_name="adapter_model.safetensors"' in card.decode()
    assert card.decode().count("load_into_transformer_2=True") == 1


def test_the_commands_take_both_experts(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = str(project / "config.yaml"), f"output_dir={tmp_path / 'output'}"
    assert cli.main(["train", config, output, "eval.every_steps=2", "optim.ema=0.5"]) == 0
    latest = (tmp_path / "output/latest").resolve()
    line = next(line for line in trainings.metrics(latest) if "eval" in line)
    assert set(line["eval"]) == {"eval/high", "eval/low", "eval", "prompts"}
    assert list(line["eval"]["eval/high"]["loss"]["rgb"]) == ["0.8875", "0.9875"]
    assert cli.main(["eval", str(latest), "--out", str(tmp_path / "eval")]) == 0
    told = json.loads((tmp_path / "eval/eval.json").read_text())["eval"]
    assert told["eval/low"]["loss"] == line["eval"]["eval/low"]["loss_ema"]
    assert cli.main(["sample", str(latest), "--prompt", "a red circle", "--out", str(tmp_path / "out")]) == 0
    high = load_file(latest / "step2/ema/high/adapter_model.safetensors")
    low = load_file(latest / "step2/ema/low/adapter_model.safetensors")
    assert high.keys() == low.keys() and trainings.difference(high, low) > 0
    capsys.readouterr()
    again = ["train", config, output, f"lora.init_from={latest}", "optim.lr=0", "optim.ema=0", "run_name=again"]
    assert cli.main(again) == 0
    raw = load_file(latest / "step2/low/adapter_model.safetensors")
    assert trainings.difference(raw, load_file(tmp_path / "output/again/step2/low/adapter_model.safetensors")) == 0


def test_a_speed_up_is_fused_into_its_own_expert(a14b: Path, project: Path, tmp_path: Path) -> None:
    other = train(project, tmp_path, "streams={rgb: ''}", "objective.tasks.rgb_to_aux=null", "lora.scope=all")
    bare = tmp_path / "speedup.safetensors"  # as other programs write them: nothing says whose it is
    save_file(load_file(other / "step12/low/adapter_model.safetensors"), bare)
    config = loading.from_overrides([f"model.path={a14b}", f"model.fuse=[{{path: {bare}, expert: low}}]"])
    plain = loading.from_overrides([f"model.path={a14b}"])
    name = "blocks.0.self_attn.q.weight"
    for expert in WanFolder(str(a14b)).experts:
        one, two = (base_weights(each, expert).read_slice(name, ()) for each in (config, plain))
        assert torch.equal(one, two) is (expert.name == "high")
    with pytest.raises(UserError, match="is for the expert hi, and the model has high, low"):
        check_experts(
            loading.from_overrides([f"model.path={a14b}", f"model.fuse=[{{path: {bare}, expert: hi}}]"]),
            WanFolder(str(a14b)),
        )


def test_one_expert_trains_by_itself(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = str(project / "config.yaml"), f"output_dir={tmp_path / 'output'}"
    assert cli.main(["train", config, output, "model.expert=high", "eval.every_steps=2"]) == 0
    assert "videos need both experts" in capsys.readouterr().err
    latest = (tmp_path / "output/latest").resolve()
    lines = trainings.metrics(latest)
    assert {line.get("expert") for line in lines if "loss" in line} == {"high"}
    assert [set(line["eval"]) for line in lines if "eval" in line] == [{"eval/high"}]
    assert (latest / "step2/adapter_model.safetensors").is_file()
    assert cli.main(["sample", str(latest), "--prompt", "a red circle", "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["train", config, output, "model.expert=low", f"lora.init_from={latest}"]) == 2
    assert "is of the expert high, and low is trained" in capsys.readouterr().err
