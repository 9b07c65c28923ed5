"""Wan of two experts: each trains on its own noise levels in one run, and videos equal diffusers' pipelines'."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.wan.pipelines import CPU, NEGATIVE, PROMPT, STEPS, layout_of, run, texts, write_experts
from tests.support.ranks import run_ranks
from tests.training import trainings
from transpixeler import cli, configfile
from transpixeler.config import ModelConfig, UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.names import NAMES
from transpixeler.flow import experts
from transpixeler.models.experts import experts_at
from transpixeler.models.family import open_model
from transpixeler.models.weights import WeightSource
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.publishing import hub
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.model import base_weights, open_engine
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.saves import SavedModel, load_saved
from transpixeler.sampling.shown import show
from transpixeler.sampling.video import Video

PIXELS = (9, 64, 64)
SCALES = {"high": 4.0, "low": 3.0}
CONFIG = """\
output_dir: output
model: {{path: {model}}}
data: {{train: data/train, eval: data/eval, cache_dir: cache, fps: 16, resolutions: [64], frames: [9]}}
lora: {{rank: 2}}
objective: {{shift: auto, tasks: {{joint: 1}}}}
optim: {{lr: 0.01, warmup_steps: 0}}
train: {{max_steps: 2, global_batch: 2, expert_steps: 1}}
eval: {{every_epochs: 0, before_first_step: false, times: [0.1, 0.9], samples: 1}}
sample: {{size: [64, 64, 9], steps: 2, shift: auto, prompts: [a red circle], guidance: {{high: 4, low: 3}}}}
log: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("experts"), "t2v")


@pytest.fixture(scope="module")
def project(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and its clips, encoded."""
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    made = tmp_path_factory.mktemp("project")
    for name, count in (("train", 4), ("eval", 1)):
        drawn = scenes(count, formats=[Format(64, 64, 9, Fraction(16))], held_out=name == "eval", seed=0)
        write_pairs(made / "data" / name, drawn)
    (made / "config.yaml").write_text(CONFIG.format(model=folder))
    assert cli.main(["cache", str(made / "config.yaml")]) == 0
    return made


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_experts_meet_where_the_pipeline_says(folder: Path, tmp_path: Path) -> None:
    model = open_model(ModelConfig(path=str(folder)))
    assert [(e.name, e.low, e.high, e.folder) for e in model.experts] == [
        ("high", 0.875, 1.0, "transformer"),
        ("low", 0.0, 0.875, "transformer_2"),
    ]
    assert model.shift(1) == model.sampling_shift(1) == 12.0
    levels = torch.tensor([1.0, 875 / 1000, 0.8749, 0.0])
    assert [expert.name for expert in experts_at(model.experts, levels)] == ["high", "high", "low", "low"]


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_wans_own_folder_is_the_same_model(kind: str, tmp_path: Path) -> None:
    theirs = open_model(ModelConfig(path=str(write_experts(tmp_path / "diffusers", kind))))
    for expert, place in zip(theirs.experts, ("high_noise_model", "low_noise_model"), strict=True):
        source = WeightSource(theirs.path, NAMES.internal_names, part=expert.folder)
        (tmp_path / "original" / place).mkdir(parents=True)
        spelled = {NAMES.parameter(n, source="internal", to="original"): source.read(n) for n in source.names()}
        held = {name: tensor.contiguous() for name, tensor in spelled.items()}
        save_file(held, tmp_path / "original" / place / "diffusion_pytorch_model.safetensors")
        told = {"_class_name": "WanModel", "dim": 48, "num_heads": 2, "out_dim": 16, "text_len": 512, "ffn_dim": 96}
        told |= {"in_dim": 36 if kind == "i2v" else 16, "num_layers": 2, "freq_dim": 32, "eps": 1e-6, "text_dim": 64}
        (tmp_path / "original" / place / "config.json").write_text(json.dumps(told | {"model_type": kind}))
    ours = open_model(ModelConfig(path=str(tmp_path / "original")))
    assert [(e.name, e.low, e.high) for e in ours.experts] == [(e.name, e.low, e.high) for e in theirs.experts]
    assert ours.diffusers_config() == theirs.diffusers_config() and ours.fields == theirs.fields
    for one, other in zip(ours.experts, theirs.experts, strict=True):
        found, wanted = (
            WeightSource(model.path, NAMES.internal_names, part=expert.folder)
            for model, expert in ((ours, one), (theirs, other))
        )
        assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.names())


def test_what_is_no_whole_pair_of_experts_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("model_index.json", "transformer", "transformer_2", "vae"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(UserError, match=r"no expert 'hi'; it has high, low, and all stands for both"):
        configured(tmp_path, "model.expert=hi")
    (tmp_path / "transformer_2").unlink()
    with pytest.raises(UserError, match=r"two experts and holds no transformer_2/config\.json"):
        _ = WanFolder(str(tmp_path)).experts
    (tmp_path / "transformer_2").mkdir()
    config = json.loads((folder / "transformer_2/config.json").read_text()) | {"num_layers": 3}
    (tmp_path / "transformer_2/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformer_2 is of another shape than transformer"):
        _ = WanFolder(str(tmp_path)).config


def configured(folder: Path, *overrides: str) -> Any:
    from transpixeler.training.preflight import check_experts

    config = configfile.from_overrides([f"model.path={folder}", *overrides])
    check_experts(config, open_model(config.model))
    return config


def test_what_cannot_be_trained_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"all experts at once train adapters only; set lora\.enabled=true"):
        configured(folder, "lora.enabled=false")
    configured(folder, "lora.enabled=false", "model.expert=low")
    with pytest.raises(UserError, match=r"no noise level from 0 to 0\.5 is for high"):
        configured(folder, "objective.t_max=0.5", "model.expert=high")


# --- which expert a step trains --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "share"), [(1, 0.026), (5, 0.368), (12, 0.705)])
def test_experts_train_as_often_as_noise_levels_are_theirs(shift: float, share: float, folder: Path) -> None:
    config, known = configfile.from_overrides([]).objective, WanFolder(str(folder)).experts
    assert experts.shares(config, known, shift=shift) == pytest.approx([share, 1 - share], abs=1e-3)
    draw = [experts.draw_expert(config, known, seed=1, step=n, run=1, shift=shift).name for n in range(1000)]
    assert draw.count("high") == pytest.approx(1000 * share, abs=3)  # evenly spread, so nearer than by chance
    other = [experts.draw_expert(config, known, seed=2, step=n, run=1, shift=shift).name for n in range(1000)]
    assert other != draw


def test_steps_come_in_runs_of_one_expert(folder: Path) -> None:
    config, known = configfile.from_overrides([]).objective, WanFolder(str(folder)).experts
    draw = [experts.draw_expert(config, known, seed=0, step=n, run=4, shift=5.0).name for n in range(80)]
    assert all(len(set(draw[n : n + 4])) == 1 for n in range(0, 80, 4)) and len(set(draw)) == 2


# --- the sampler -----------------------------------------------------------------------------------------------------


def _video(rank: int, world_size: int, folder: Path, overrides: tuple[str, ...], images: dict[int, Any]) -> Tensor:
    here = Runtime(rank, world_size, rank, CPU)
    config = configfile.from_overrides(
        [
            *(f"model.path={folder}", "streams={rgb: ''}", "lora.enabled=false", f"sample.steps={STEPS}"),
            *("sample.shift=auto", f"sample.negative_prompt={NEGATIVE}", *overrides),
        ]
    )
    model, layout = open_model(config.model), layout_of(folder, PIXELS)
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    text, negative = texts(model)
    fields = {**text, **show(model, Frames(model, CPU), layout, images)}
    engine = open_engine(SavedModel(config, "base"), mesh)
    sampler = Sampler(engine, mesh, config.sample, negative, model)
    (_, latents), *_ = sampler.each([Video("", PROMPT, fields, 3, layout)] * world_size)
    return latents


def video(folder: Path, *overrides: str, ranks: int = 1, images: dict[int, Any] | None = None) -> Tensor:
    """Return the latents [1, C, F, H, W] of our sampler."""
    found = run_ranks(_video, ranks, folder, overrides, images or {})[0]
    return layout_of(folder, PIXELS).unpack(found[None])[0]


GUIDED = f"sample.guidance={{high: {SCALES['high']}, low: {SCALES['low']}}}"


@torch.no_grad()
def test_a_video_of_two_experts_equals_the_pipelines(folder: Path) -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    guided = {"guidance_scale": SCALES["high"], "guidance_scale_2": SCALES["low"]}
    expected = run(pipeline, PIXELS, layout_of(folder, PIXELS), **guided)
    found = video(folder, GUIDED)
    assert (found - expected).abs().max() < 1e-4
    swapped = video(folder, f"sample.guidance={{high: {SCALES['low']}, low: {SCALES['high']}}}")
    assert (swapped - expected).abs().max() > 1e-3
    for elsewhere in ("disk", "host"):
        assert torch.equal(video(folder, GUIDED, f"parallel.idle_expert={elsewhere}"), found)
    piped = video(folder, GUIDED, "parallel.pipeline=2", ranks=2)
    assert (piped - found).abs().max() < 1e-5


@torch.no_grad()
def test_a_video_of_two_experts_from_an_image_equals_the_pipelines(tmp_path: Path) -> None:
    import numpy as np
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from PIL import Image

    folder = write_experts(tmp_path / "i2v", "i2v")
    image = np.random.default_rng(0).integers(0, 256, (1, *PIXELS[1:], 3), dtype=np.uint8)
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    guided = {"guidance_scale": SCALES["high"], "guidance_scale_2": SCALES["low"]}
    expected = run(pipeline, PIXELS, layout_of(folder, PIXELS), image=Image.fromarray(image[0]), **guided)
    assert (video(folder, GUIDED, images={0: image}) - expected).abs().max() < 1e-4


def test_a_guidance_that_names_other_experts_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--model", str(folder), "--prompt", "a", "--size", "64x64x9", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "sample.guidance={hi: 4, low: 3}"]) == 2
    assert "sample.guidance: is given for hi, low, and the model's experts are high, low" in capsys.readouterr().err


# --- training --------------------------------------------------------------------------------------------------------


KEYS = (
    *("train.max_steps=12", "optim.lr=1e-2", "optim.name=sgd", "optim.ema=0.5", "checkpoint.every_steps=4"),
    *("objective.tasks={joint: 1}", "save.every_epochs=0"),
)


def train(project: Path, output: Path, *overrides: str, ranks: int = 1, resume: str | None = None) -> Path:
    return trainings.run(project, output, *KEYS, *overrides, ranks=ranks, resume=resume)


@pytest.fixture(scope="module")
def alone(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(project, tmp_path_factory.mktemp("alone"), "checkpoint.keep=9", "checkpoint.every_steps=1")


def test_a_step_leaves_the_other_expert_as_it_was(alone: Path, tmp_path: Path) -> None:
    steps = [line for line in trainings.metrics(alone) if "expert" in line]
    assert {line["expert"] for line in steps} == {"high", "low"}
    found = [trainings.tensors(alone, step, tmp_path) for step in range(5, 13)]
    for before, after, line in zip(found, found[1:], steps[5:], strict=False):
        changed = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
        assert changed == {line["expert"]}, "weights, moments and averages of the idle one stay, to the last bit"
    for line in steps:  # bins of the noise level, of which the high expert has the last alone
        filled = [place for place, value in enumerate(line["loss_by_t"]) if value is not None]
        assert filled == [4] if line["expert"] == "high" else max(filled) <= 4


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_any_layout_trains_the_same(layout: tuple[int, int, int], alone: Path, project: Path, tmp_path: Path) -> None:
    other = train(project, tmp_path, *trainings.layout(*layout), ranks=2)
    for one, two in zip(trainings.exact(alone), trainings.exact(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6) and one["samples"] == two["samples"]
    assert trainings.difference(trainings.tensors(alone, 12, tmp_path), trainings.tensors(other, 12, tmp_path)) < 1e-6


@pytest.mark.parametrize("kind", [(), ("lora.kind=dora", "model.quantize=int8")], ids=["lora", "dora, int8"])
def test_weights_that_wait_elsewhere_come_back_the_same(kind: tuple[str, ...], project: Path, tmp_path: Path) -> None:
    runs = {
        wait: train(project, tmp_path / wait, f"parallel.idle_expert={wait}", *kind, "train.max_steps=6")
        for wait in ("device", "host", "disk")
    }
    there = trainings.tensors(runs["device"], 6, tmp_path)
    assert {line["expert"] for line in trainings.metrics(runs["device"])} == {"high", "low"}
    for wait in ("host", "disk"):
        assert trainings.exact(runs["device"]) == trainings.exact(runs[wait])
        assert trainings.difference(there, trainings.tensors(runs[wait], 6, tmp_path)) == 0


def test_a_killed_run_goes_on_bitwise(alone: Path, project: Path, tmp_path: Path) -> None:
    killed = trainings.start(project, tmp_path / "out", *KEYS)
    trainings.wait_for_step(killed, tmp_path / "out", 6)
    trainings.end(killed)
    found = train(project, tmp_path / "out", resume="")
    assert trainings.exact(alone) == trainings.exact(found)
    assert trainings.difference(trainings.tensors(alone, 12, tmp_path), trainings.tensors(found, 12, tmp_path)) == 0


# --- what comes out --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_both_adapters_load_in_diffusers_and_change_the_video_as_ours_do(
    project: Path, folder: Path, tmp_path: Path
) -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    one = ("streams={rgb: ''}", "objective.tasks.rgb_to_aux=null", "lora.scope=all")
    latest = train(project, tmp_path, *one, "optim.lr=0.3")
    save = latest / "step12"
    assert sorted(path.name for path in save.iterdir()) == ["config.yaml", "ema", "high", "low"]
    found = _sampled(str(latest), ema=False)
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("high", "low"):
        options = {"load_into_transformer_2": True} if name == "low" else {}
        pipeline.load_lora_weights(save / name, weight_name="adapter_model.safetensors", adapter_name=name, **options)
    guided = {"guidance_scale": SCALES["high"], "guidance_scale_2": SCALES["low"]}
    expected = run(pipeline, PIXELS, layout_of(folder, PIXELS), **guided)
    assert (found - expected).abs().max() < 1e-4
    assert (video(folder, GUIDED) - expected).abs().max() > 1e-3, "the adapters change nothing"
    one = _sampled(str(save / "high"), ema=False)
    assert (one - expected).abs().max() > 1e-4, "the low adapter changes nothing"

    assert cli.main(["export", str(save), "--no-ema", "--format", "merged", "--out", str(tmp_path / "whole")]) == 0
    merged = WanPipeline.from_pretrained(folder)
    merged.set_progress_bar_config(disable=True)
    for name, part in (("high", "transformer"), ("low", "transformer_2")):
        weights = load_file(tmp_path / "whole" / name / "transformer/diffusion_pytorch_model.safetensors")
        getattr(merged, part).load_state_dict(weights)
    again = run(merged, PIXELS, layout_of(folder, PIXELS), **guided)
    assert (again - expected).abs().max() < 1e-4
    assert cli.main(["export", str(save), "--format", "comfyui", "--out", str(tmp_path / "lora.safetensors")]) == 0
    assert {file.name for file in tmp_path.glob("lora*")} == {"lora_high.safetensors", "lora_low.safetensors"}
    parcel = hub.pack(str(latest), hub.Terms("a/b", base="c/d"))
    assert {"high/adapter_model.safetensors", "low/adapter_model.safetensors"} < set(parcel.files)
    card = parcel.files["README.md"]
    assert isinstance(card, bytes) and 'subfolder="low", weight_name="adapter_model.safetensors"' in card.decode()
    assert card.decode().count("load_into_transformer_2=True") == 1


def _sampled(source: str, *, ema: bool | None = None) -> Tensor:
    found = run_ranks(_video_of_a_save, 1, source, ema)[0]
    path = Path(load_saved(source).config.model.path)
    return layout_of(path, PIXELS).unpack(found[None])[0]


def _video_of_a_save(rank: int, world_size: int, source: str, ema: bool | None) -> Tensor:
    here = Runtime(rank, world_size, rank, CPU)
    keys = [f"sample.steps={STEPS}", "sample.shift=auto", f"sample.negative_prompt={NEGATIVE}", GUIDED]
    saved = load_saved(source, keys, ema=ema)
    config = saved.config
    model, layout = open_model(config.model), layout_of(Path(config.model.path), PIXELS)
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    text, negative = texts(model)
    sampler = Sampler(open_engine(saved, mesh), mesh, config.sample, negative, model)
    (_, latents), *_ = sampler.each([Video("", PROMPT, text, 3, layout)])
    return latents


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


def test_a_speed_up_is_fused_into_its_own_expert(folder: Path, project: Path, tmp_path: Path) -> None:
    other = train(project, tmp_path, "streams={rgb: ''}", "objective.tasks.rgb_to_aux=null", "lora.scope=all")
    bare = tmp_path / "speedup.safetensors"  # as other programs write them: nothing says whose it is
    save_file(load_file(other / "step12/low/adapter_model.safetensors"), bare)
    config = configfile.from_overrides([f"model.path={folder}", f"model.fuse=[{{path: {bare}, expert: low}}]"])
    plain = configfile.from_overrides([f"model.path={folder}"])
    name = "blocks.0.self_attn.q.weight"
    for expert in WanFolder(str(folder)).experts:
        one, two = (base_weights(each, expert).read_slice(name, ()) for each in (config, plain))
        assert torch.equal(one, two) is (expert.name == "high")
    with pytest.raises(UserError, match="is for the expert hi, and the model has high, low"):
        configured(folder, f"model.fuse=[{{path: {bare}, expert: hi}}]")


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


@pytest.mark.parametrize(("name", "share"), [("t2v-a14b-joint", 0.705), ("i2v-a14b-rgba", 0.278)])
def test_the_shipped_configs_are_planned_with_both_experts(
    name: str, share: float, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = {"_class_name": "WanTransformer3DModel", "in_channels": 36 if "i2v" in name else 16}
    for place in ("transformer", "transformer_2"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps(published))
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    config = Path(__file__).parents[3] / f"configs/wan2.2-{name}.yaml"
    words = [f"model.path={tmp_path}", f"data.train=[{{path: {project / 'data/train'}, repeats: 8}}]"]
    words += [
        "data.resolutions=[64]",
        "data.frames=[9]",
        "streams={rgb: '', seg: _seg, alpha: null}",
        "--gpus",
        "8",
        "--device",
        "h100",
    ]
    assert cli.main(["plan", str(config), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["experts"]["high"] == pytest.approx(share, abs=1e-3)
    assert told["parameters"]["all"] > 2 * 14.28e9 and told["layouts"]
    assert cli.main(["plan", str(config), *words, "objective.shift=1"]) == 0
    assert "warning: high would hardly be trained" in capsys.readouterr().out
