"""HunyuanVideo is what was published: files in both layouts, the pipeline's videos, and how many parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.hunyuan.pipeline import TINY, published, write_pipeline
from tests.support.families.cases import CASES, inputs
from transpixeler.config.sections import ModelConfig, SampleConfig, UserError
from transpixeler.families.flux.family import FAMILY as FLUX
from transpixeler.families.hunyuan.config import CLASS, HunyuanConfig, diffusers_config
from transpixeler.families.hunyuan.family import FAMILY, HunyuanFolder
from transpixeler.families.hunyuan.model import HunyuanModel
from transpixeler.families.hunyuan.names import NAMES, config_from_shapes
from transpixeler.flow.solver import denoise, start_noise
from transpixeler.models.family import open_model
from transpixeler.models.names import pieces, split_rows
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling import sampler
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.video import Video

HOW: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
PROMPT = "a red circle before a wall of grey bricks"
STEPS = 4
PIXELS = (9, 64, 96)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_pipeline(folder := tmp_path_factory.mktemp("hunyuan") / "pipeline")
    return folder


def model_of(path: Path) -> Any:
    model = HunyuanFolder(str(path)).build(streams=("rgb",))
    load_weights(model, WeightSource(str(path), FAMILY.internal_names))
    return model


# -- the model


def given_and_theirs() -> tuple[HunyuanModel, StreamLayout, list[Tensor], Tensor]:
    """Return a model, its inputs with texts of two lengths in one batch, and what diffusers' class makes of them."""
    case = CASES["hunyuan"]
    model = case.model()
    layout = model.layout(case.shapes[1])
    given = list(inputs(model, layout))
    assert given[3].tolist() == [5, 256]
    return model, layout, given, case.reference(model).run(*given, layout=layout)  # type: ignore[return-value]


@torch.no_grad()
def test_the_velocity_is_that_of_diffusers_class() -> None:
    model, layout, given, theirs = given_and_theirs()
    torch.testing.assert_close(model(*given, layout=layout), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("twin", ["no mask", "no guidance", "another theta", "another time"])
@torch.no_grad()
def test_a_broken_twin_is_caught(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transpixeler.families.hunyuan import model as module

    model, layout, given, theirs = given_and_theirs()
    if twin == "no mask":
        given[3] = torch.full_like(given[3], 256)
    elif twin == "another time":
        given[1] = given[1] + 0.1
    else:
        if twin == "no guidance":
            monkeypatch.setattr(module, "GUIDANCE", 0.0)
        theta = 10000.0 if twin == "another theta" else 256.0
        broken = HunyuanModel(HunyuanConfig.read(TINY | {"rope_theta": theta}), streams=("rgb",))
        broken.load_state_dict(model.state_dict())
        model = broken
    assert (model(*given, layout=layout) - theirs).abs().max() > 1e-3


@torch.no_grad()
def test_what_lies_beyond_a_texts_length_changes_nothing() -> None:
    model, layout, given, _ = given_and_theirs()
    before = model(*given, layout=layout)
    given[2] = given[2].clone()
    given[2][0, 5:] = 1e4
    assert torch.equal(model(*given, layout=layout), before)
    given[2][0, 4] += 1
    assert not torch.equal(model(*given, layout=layout)[0], before[0])


@torch.no_grad()
def test_a_model_without_guidance_is_that_of_diffusers_class() -> None:
    theirs = published(guidance_embeds=False)
    model = HunyuanModel(HunyuanConfig.read(TINY | {"guidance_embeds": False}), streams=("rgb",))
    stored = theirs.state_dict()
    for name, there in NAMES.internal_names(stored).items():
        parts = [(stored[part.name], part) for part in pieces(there)]
        model.get_parameter(name).copy_(torch.cat([value[part.rows(len(value))] for value, part in parts]))
    layout = model.layout((4, 2, 4, 8))
    x, times, text, lengths, pooled = inputs(model, layout)
    (latents,) = layout.unpack(x)
    mask = (torch.arange(256) < lengths[:, None]).float()
    expected = theirs(latents, 1000 * times[:, 0], text, mask, pooled, return_dict=False)[0].flatten(1)
    torch.testing.assert_close(model(x, times, text, lengths, pooled, layout=layout), expected, atol=1e-5, rtol=1e-5)


def test_the_published_model_has_the_parameters_of_diffusers_class() -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel()
        config = HunyuanConfig.read({**theirs.config})
        model = HunyuanModel(config, streams=("rgb",))
    assert type(theirs).__name__ == CLASS == FAMILY.transformer_class
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 12_821_012_544
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert HunyuanConfig.read(config_from_shapes(shapes)) == config == HunyuanConfig()
    stored = [p.name for n in shapes for p in pieces(NAMES.parameter(n, source="internal", to="diffusers"))]
    assert set(stored) == set(theirs.state_dict()) and len(set(stored)) == len(stored) - 2  # two have swapped halves


def test_a_config_that_we_write_is_one_that_diffusers_reads(folder: Path) -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    ours = diffusers_config(HunyuanFolder(str(folder)).config)
    with torch.device("meta"):
        theirs = HunyuanVideoTransformer3DModel.from_config(ours)
    written = {**theirs.config, "rope_axes_dim": list(theirs.config["rope_axes_dim"])}
    assert {key: written[key] for key in ours if key[0] != "_"} == {k: v for k, v in ours.items() if k[0] != "_"}


# -- files


def original_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the transformer as its authors store it: fused projections, shift before scale."""
    stored: dict[str, Tensor] = {}
    ends = ("weight", "bias")

    def fused(parts: list[str], end: str) -> Tensor:
        return torch.cat([state[f"{part}.{end}"] for part in parts])

    for n in range(TINY["num_layers"]):
        for ours, attn, norm in (("img", "to_{}", "norm_{}"), ("txt", "add_{}_proj", "norm_added_{}")):
            there, block = f"transformer_blocks.{n}", f"double_blocks.{n}.{ours}"
            side = "" if ours == "img" else "_context"
            out = "attn.to_out.0" if ours == "img" else "attn.to_add_out"
            for end in ends:
                stored[f"{block}_attn_qkv.{end}"] = fused([f"{there}.attn.{attn.format(p)}" for p in "qkv"], end)
                stored[f"{block}_attn_proj.{end}"] = state[f"{there}.{out}.{end}"]
                stored[f"{block}_mlp.fc1.{end}"] = state[f"{there}.ff{side}.net.0.proj.{end}"]
                stored[f"{block}_mlp.fc2.{end}"] = state[f"{there}.ff{side}.net.2.{end}"]
                stored[f"{block}_mod.linear.{end}"] = state[f"{there}.norm1{side}.linear.{end}"]
            for p in "qk":
                stored[f"{block}_attn_{p}_norm.weight"] = state[f"{there}.attn.{norm.format(p)}.weight"]
    for n in range(TINY["num_single_layers"]):
        there, block = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        for end in ends:
            parts = [*(f"{there}.attn.to_{p}" for p in "qkv"), f"{there}.proj_mlp"]
            stored[f"{block}.linear1.{end}"] = fused(parts, end)
            stored[f"{block}.linear2.{end}"] = state[f"{there}.proj_out.{end}"]
            stored[f"{block}.modulation.linear.{end}"] = state[f"{there}.norm.linear.{end}"]
        for p in "qk":
            stored[f"{block}.{p}_norm.weight"] = state[f"{there}.attn.norm_{p}.weight"]
    for n in range(2):
        there = f"context_embedder.token_refiner.refiner_blocks.{n}"
        block = f"txt_in.individual_token_refiner.blocks.{n}"
        for end in ends:
            stored[f"{block}.self_attn_qkv.{end}"] = fused([f"{there}.attn.to_{p}" for p in "qkv"], end)
            for ours, theirs in (
                ("self_attn_proj", "attn.to_out.0"),
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("mlp.fc1", "ff.net.0.proj"),
                ("mlp.fc2", "ff.net.2"),
                ("adaLN_modulation.1", "norm_out.linear"),
            ):
                stored[f"{block}.{ours}.{end}"] = state[f"{there}.{theirs}.{end}"]
    for end in ends:
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        stored[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
        time, refiner = "time_text_embed", "context_embedder.time_text_embed"
        for ours, theirs in (
            ("img_in.proj", "x_embedder.proj"),
            ("txt_in.input_embedder", "context_embedder.proj_in"),
            ("txt_in.t_embedder.mlp.0", f"{refiner}.timestep_embedder.linear_1"),
            ("txt_in.t_embedder.mlp.2", f"{refiner}.timestep_embedder.linear_2"),
            ("txt_in.c_embedder.linear_1", f"{refiner}.text_embedder.linear_1"),
            ("txt_in.c_embedder.linear_2", f"{refiner}.text_embedder.linear_2"),
            ("time_in.mlp.0", f"{time}.timestep_embedder.linear_1"),
            ("time_in.mlp.2", f"{time}.timestep_embedder.linear_2"),
            ("guidance_in.mlp.0", f"{time}.guidance_embedder.linear_1"),
            ("guidance_in.mlp.2", f"{time}.guidance_embedder.linear_2"),
            ("vector_in.in_layer", f"{time}.text_embedder.linear_1"),
            ("vector_in.out_layer", f"{time}.text_embedder.linear_2"),
            ("final_layer.linear", "proj_out"),
        ):
            stored[f"{ours}.{end}"] = state[f"{theirs}.{end}"]
    return {name: value.contiguous() for name, value in stored.items()}


def original_file(folder: Path, file: Path, kind: str) -> Path:
    state = original_state(load_file(folder / WEIGHTS))
    if kind == "published":  # by the authors, as a checkpoint of their training
        torch.save({"module": state, "epoch": 1}, file.with_suffix(".pt"))
        return file.with_suffix(".pt")
    save_file({kind + name: value for name, value in state.items()}, file)
    return file


@pytest.mark.parametrize("kind", ["", "model.diffusion_model.", "published"], ids=["plain", "prefixed", "published"])
def test_an_original_file_is_the_same_model_bit_for_bit(folder: Path, tmp_path: Path, kind: str) -> None:
    file = original_file(folder, tmp_path / "hunyuan.safetensors", kind)
    assert FAMILY.recognises(file) and not FLUX.recognises(file)
    opened = HunyuanFolder(str(file), encoders=str(folder))
    assert HunyuanConfig.read(opened.config) == HunyuanConfig.read(HunyuanFolder(str(folder)).config)
    one, other = model_of(folder).state_dict(), model_of(file).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert opened.geometry == HunyuanFolder(str(folder)).geometry and opened.sampling_shift(1) == 7


def test_diffusers_converts_what_we_call_the_original_names() -> None:
    """It takes the published width for granted, so weights are on meta; biases are not, and show the order of rows."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        model = HunyuanModel(HunyuanConfig(num_layers=2, num_single_layers=2), streams=("rgb",))
        theirs = HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=2).state_dict()
    state = {n: torch.randn(v.shape) if n.endswith(".bias") else v for n, v in model.state_dict().items()}
    file = {NAMES.parameter(n, source="internal", to="original"): value for n, value in state.items()}
    made = convert_hunyuan_video_transformer_to_diffusers(file)
    assert {n: value.shape for n, value in made.items()} == {n: value.shape for n, value in theirs.items()}
    spelled = {n: NAMES.parameter(n, source="internal", to="diffusers") for n in state}
    ours = {stored: value for n in state for stored, value in split_rows(state[n], spelled[n]).items()}
    biases = [n for n in ours if n.endswith(".bias")]
    assert len(biases) > 40 and all(torch.equal(ours[n], made[n]) for n in biases)


def test_a_part_that_is_missing_is_told(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / WEIGHTS)
    del state["context_embedder.token_refiner.refiner_blocks.1.attn.to_k.weight"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "transformer/config.json").read_text())
    with pytest.raises(UserError, match=r"1 missing: embed\.txt_in\.blocks\.1\.qkv\.weight"):
        model_of(tmp_path)


# -- what is refused


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"in_channels": 33}, "33 channels in and 16 out: this is a model that is shown something else"),
        ({"in_channels": 32}, "SkyReels V1 image-to-video"),
        ({"image_condition_type": "other"}, "'other' is not known, only latent_concat and token_replace"),
        ({"_class_name": "HunyuanVideo15Transformer3DModel"}, "HunyuanVideo15Transformer3DModel is not HunyuanVideo 1"),
        ({"rope_axes_dim": [16, 56, 58]}, "do not add up to heads of 128"),
        ({"patch_size": 1}, "patch_size 1 is not supported, only 2"),
        ({"mlp_ratio": 3.0}, "mlp_ratio 3.0 is not supported"),
    ],
)
def test_what_is_another_model_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        HunyuanConfig.read(config)
    assert "\n" not in str(told.value) and "hunyuanvideo-community/HunyuanVideo" in str(told.value)


@pytest.mark.parametrize("pipeline", ["HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"])
def test_a_text_to_video_model_of_another_pipeline_is_refused(folder: Path, tmp_path: Path, pipeline: str) -> None:
    (tmp_path / "transformer").mkdir()
    shutil.copy(folder / "transformer/config.json", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UserError, match=f"made for {pipeline}, which is .* cannot be trained here; use HunyuanVideo 1"):
        open_model(ModelConfig(path=str(tmp_path))).build(streams=("rgb",))


# -- videos


def made(folder: Path, *, shift: float | str = "auto") -> Tensor:
    """Return the latents [1, C, F, h, w] of our sampler with euler."""
    opened, model = HunyuanFolder(str(folder)), model_of(folder)
    (found,) = opened.load_text_encoder(**HOW).encode([PROMPT])
    fields = {"text": found["text"], "text_length": torch.tensor(len(found["text"])), "pooled": found["pooled"]}
    engine = SimpleNamespace(
        config=SimpleNamespace(pipeline=1),
        mesh=SimpleNamespace(device=torch.device("cpu")),
        forward=lambda x, inputs, layout, batch: model(x, *inputs, layout=layout),
    )
    layout = layout_of(folder)
    velocity = sampler.guided(engine, layout, fields, None, guidance=lambda _: 1.0)  # type: ignore[arg-type]
    config = SampleConfig(steps=STEPS, shift=shift, scheduler="euler")
    solver = Sampler(engine, None, config, None, opened)._solver(Video("", "", {}, 0, layout))  # type: ignore[arg-type]
    return layout.unpack(denoise(velocity, start_noise(layout, 3), layout, solver))[0]


def layout_of(folder: Path) -> StreamLayout:
    geometry = HunyuanFolder(str(folder)).geometry
    return StreamLayout.equal(("rgb",), geometry.latent(*PIXELS), geometry.patch)


@torch.no_grad()
def test_videos_are_those_of_the_pipeline(folder: Path) -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

    theirs = HunyuanVideoPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    frames, height, width = PIXELS
    layout = layout_of(folder)
    (noise,) = layout.unpack(start_noise(layout, 3))
    expected = theirs(
        PROMPT,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        latents=noise,
        output_type="latent",
    ).frames
    torch.testing.assert_close(made(folder), expected, atol=1e-4, rtol=1e-4)
    assert (expected - noise).abs().max() > 0.1
    assert (made(folder, shift=1.0) - expected).abs().max() > 1e-2


def test_noise_levels_shift_as_the_scheduler_says(folder: Path, tmp_path: Path) -> None:
    opened = HunyuanFolder(str(folder))
    assert opened.shift(100) == opened.sampling_shift(100) == 7 == FAMILY.sampling.shift
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"shift": 17.0}')
    assert HunyuanFolder(str(folder), encoders=str(tmp_path)).sampling_shift(100) == 17
    (tmp_path / "scheduler/scheduler_config.json").unlink()
    assert HunyuanFolder(str(folder), encoders=str(tmp_path)).sampling_shift(100) == 7
