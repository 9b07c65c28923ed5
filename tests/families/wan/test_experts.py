"""Wan of two experts: the folder, the share of steps, and videos that equal diffusers' pipelines'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.families.wan.expert_videos import GUIDED, PIXELS, SCALES, video
from tests.families.wan.pipelines import layout_of, run, write_experts
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import ModelConfig, UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.names import NAMES
from transpixeler.flow import experts
from transpixeler.models.experts import experts_at
from transpixeler.models.family import open_model
from transpixeler.models.weights import WeightSource

# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_experts_meet_where_the_pipeline_says(a14b: Path, tmp_path: Path) -> None:
    model = open_model(ModelConfig(path=str(a14b)))
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


def test_what_is_no_whole_pair_of_experts_is_named(a14b: Path, tmp_path: Path) -> None:
    for name in ("model_index.json", "transformer", "transformer_2", "vae"):
        (tmp_path / name).symlink_to(a14b / name)
    with pytest.raises(UserError, match=r"no expert 'hi'; it has high, low, and all stands for both"):
        configured(tmp_path, "model.expert=hi")
    (tmp_path / "transformer_2").unlink()
    with pytest.raises(UserError, match=r"two experts and holds no transformer_2/config\.json"):
        _ = WanFolder(str(tmp_path)).experts
    (tmp_path / "transformer_2").mkdir()
    config = json.loads((a14b / "transformer_2/config.json").read_text()) | {"num_layers": 3}
    (tmp_path / "transformer_2/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformer_2 is of another shape than transformer"):
        _ = WanFolder(str(tmp_path)).config


def configured(a14b: Path, *overrides: str) -> Any:
    from transpixeler.training.preflight import check_experts

    config = loading.from_overrides([f"model.path={a14b}", *overrides])
    check_experts(config, open_model(config.model))
    return config


def test_what_cannot_be_trained_is_refused(a14b: Path) -> None:
    with pytest.raises(UserError, match=r"all experts at once train adapters only; set lora\.enabled=true"):
        configured(a14b, "lora.enabled=false")
    configured(a14b, "lora.enabled=false", "model.expert=low")
    with pytest.raises(UserError, match=r"no noise level from 0 to 0\.5 is for high"):
        configured(a14b, "objective.t_max=0.5", "model.expert=high")


# --- which expert a step trains --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "share"), [(1, 0.026), (5, 0.368), (12, 0.705)])
def test_experts_train_as_often_as_noise_levels_are_theirs(shift: float, share: float, a14b: Path) -> None:
    config, known = loading.from_overrides([]).objective, WanFolder(str(a14b)).experts
    assert experts.shares(config, known, shift=shift) == pytest.approx([share, 1 - share], abs=1e-3)
    draw = [experts.draw_expert(config, known, seed=1, step=n, run=1, shift=shift).name for n in range(1000)]
    assert draw.count("high") == pytest.approx(1000 * share, abs=3)  # evenly spread, so nearer than by chance
    other = [experts.draw_expert(config, known, seed=2, step=n, run=1, shift=shift).name for n in range(1000)]
    assert other != draw


def test_steps_come_in_runs_of_one_expert(a14b: Path) -> None:
    config, known = loading.from_overrides([]).objective, WanFolder(str(a14b)).experts
    draw = [experts.draw_expert(config, known, seed=0, step=n, run=4, shift=5.0).name for n in range(80)]
    assert all(len(set(draw[n : n + 4])) == 1 for n in range(0, 80, 4)) and len(set(draw)) == 2


# --- the sampler -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_video_of_two_experts_equals_the_pipelines(a14b: Path) -> None:
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    pipeline = WanPipeline.from_pretrained(a14b)
    pipeline.set_progress_bar_config(disable=True)
    guided = {"guidance_scale": SCALES["high"], "guidance_scale_2": SCALES["low"]}
    expected = run(pipeline, PIXELS, layout_of(a14b, PIXELS), **guided)
    found = video(a14b, GUIDED)
    assert (found - expected).abs().max() < 1e-4
    swapped = video(a14b, f"sample.guidance={{high: {SCALES['low']}, low: {SCALES['high']}}}")
    assert (swapped - expected).abs().max() > 1e-3
    for elsewhere in ("disk", "host"):
        assert torch.equal(video(a14b, GUIDED, f"parallel.idle_expert={elsewhere}"), found)
        assert torch.equal(video(a14b, GUIDED, f"parallel.idle_expert={elsewhere}", "parallel.offload=2"), found)
    piped = video(a14b, GUIDED, "parallel.pipeline=2", ranks=2)
    assert (piped - found).abs().max() < 1e-5


@torch.no_grad()
def test_a_video_of_two_experts_from_an_image_equals_the_pipelines(tmp_path: Path) -> None:
    import numpy as np
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from PIL import Image

    a14b = write_experts(tmp_path / "i2v", "i2v")
    image = np.random.default_rng(0).integers(0, 256, (1, *PIXELS[1:], 3), dtype=np.uint8)
    pipeline = WanImageToVideoPipeline.from_pretrained(a14b)
    pipeline.set_progress_bar_config(disable=True)
    guided = {"guidance_scale": SCALES["high"], "guidance_scale_2": SCALES["low"]}
    expected = run(pipeline, PIXELS, layout_of(a14b, PIXELS), image=Image.fromarray(image[0]), **guided)
    assert (video(a14b, GUIDED, images={0: image}) - expected).abs().max() < 1e-4


def test_a_guidance_that_names_other_experts_is_refused(
    a14b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--model", str(a14b), "--prompt", "a", "--size", "64x64x9", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "sample.guidance={hi: 4, low: 3}"]) == 2
    assert "sample.guidance: is given for hi, low, and the model's experts are high, low" in capsys.readouterr().err


# --- the configs ---------------------------------------------------------------------------------------------------


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
