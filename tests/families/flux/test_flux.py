"""FLUX.1 is what was published: files in both layouts, encoders, the pipeline's images, and how many parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.flux.pipeline import TINY, published, write_pipeline
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.config.sections import SampleConfig, UserError
from transpixeler.families.flux.config import CLASS, FluxConfig
from transpixeler.families.flux.family import FAMILY, FluxFolder
from transpixeler.families.flux.model import FluxModel
from transpixeler.families.flux.names import NAMES, config_from_shapes
from transpixeler.flow.solver import denoise, start_noise
from transpixeler.models.names import pieces, split_rows
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling import sampler
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.video import Video

HOW: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
PROMPT = "a red circle before a wall of grey bricks"
STEPS = 4


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "dev"
    write_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "schnell"
    write_pipeline(folder, guidance_embeds=False)
    return folder


def model_of(path: Path) -> Any:
    model = FluxFolder(str(path)).build(streams=("rgb",))
    load_weights(model, WeightSource(str(path), FAMILY.internal_names))
    return model


# -- files


def original_file(folder: Path, file: Path, *, prefix: str = "") -> Path:
    """Write the transformer as its authors do, by their own layout: fused projections, shift before scale."""
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    stored: dict[str, Tensor] = {}
    ends = ("weight", "bias")
    for n in range(TINY["num_layers"]):
        for ours, attn, names in (("img", "to_{}", "norm_{}"), ("txt", "add_{}_proj", "norm_added_{}")):
            there, block = f"transformer_blocks.{n}", f"double_blocks.{n}.{ours}"
            side = "" if ours == "img" else "_context"
            out = "attn.to_out.0" if ours == "img" else "attn.to_add_out"
            for end in ends:
                stored[f"{block}_attn.qkv.{end}"] = torch.cat(
                    [state[f"{there}.attn.{attn.format(p)}.{end}"] for p in "qkv"]
                )
                stored[f"{block}_attn.proj.{end}"] = state[f"{there}.{out}.{end}"]
                stored[f"{block}_mlp.0.{end}"] = state[f"{there}.ff{side}.net.0.proj.{end}"]
                stored[f"{block}_mlp.2.{end}"] = state[f"{there}.ff{side}.net.2.{end}"]
                stored[f"{block}_mod.lin.{end}"] = state[f"{there}.norm1{side}.linear.{end}"]
            for p, word in (("q", "query"), ("k", "key")):
                stored[f"{block}_attn.norm.{word}_norm.scale"] = state[f"{there}.attn.{names.format(p)}.weight"]
    for n in range(TINY["num_single_layers"]):
        there, block = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        for end in ends:
            parts = [*(f"attn.to_{p}" for p in "qkv"), "proj_mlp"]
            stored[f"{block}.linear1.{end}"] = torch.cat([state[f"{there}.{part}.{end}"] for part in parts])
            stored[f"{block}.linear2.{end}"] = state[f"{there}.proj_out.{end}"]
            stored[f"{block}.modulation.lin.{end}"] = state[f"{there}.norm.linear.{end}"]
        for p, word in (("q", "query"), ("k", "key")):
            stored[f"{block}.norm.{word}_norm.scale"] = state[f"{there}.attn.norm_{p}.weight"]
    for end in ends:
        stored[f"img_in.{end}"], stored[f"txt_in.{end}"] = state[f"x_embedder.{end}"], state[f"context_embedder.{end}"]
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        stored[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
        stored[f"final_layer.linear.{end}"] = state[f"proj_out.{end}"]
        for ours, theirs in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text")):
            for layer, linear in (("in", 1), ("out", 2)):
                name = f"time_text_embed.{theirs}_embedder.linear_{linear}.{end}"
                stored[f"{ours}_in.{layer}_layer.{end}"] = state[name]
    save_file({prefix + name: value.contiguous() for name, value in stored.items()}, file)
    return file


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_an_original_file_is_the_same_model_bit_for_bit(dev: Path, tmp_path: Path, prefix: str) -> None:
    file = original_file(dev, tmp_path / "flux.safetensors", prefix=prefix)
    assert FAMILY.recognises(file)
    opened = FluxFolder(str(file), encoders=str(dev))
    assert FluxConfig.read(opened.config) == FluxConfig.read(FluxFolder(str(dev)).config)
    one, other = model_of(dev).state_dict(), model_of(file).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_rows_of_what_is_joined_are_read_alone(dev: Path) -> None:
    """As a shard reads them, over the borders of the stored tensors."""
    source = WeightSource(str(dev), FAMILY.internal_names)
    for name in (
        "blocks.0.img.qkv.weight",
        "blocks.s1.linear1.weight",
        "blocks.s1.linear1.bias",
        "head.modulation.weight",
    ):
        whole = source.read(name)
        assert tuple(whole.shape) == source.shape(name)
        for start, stop in ((0, 5), (30, 70), (len(whole) - 3, len(whole)), (10, 11)):
            rest = (slice(0, whole.shape[1]),) if whole.ndim > 1 else ()
            assert torch.equal(source.read_slice(name, (slice(start, stop), *rest)), whole[start:stop])


def test_a_name_stands_for_rows_in_their_order() -> None:
    rows = torch.arange(14).float()
    assert [part.name for part in pieces("x.(a+b+c+d*4).bias")] == [f"x.{letter}.bias" for letter in "abcd"]
    cut = split_rows(rows, "x.(a+b+c+d*4).bias")
    assert cut["x.b.bias"].tolist() == [2, 3] and cut["x.d.bias"].tolist() == [6, 7, 8, 9, 10, 11, 12, 13]
    assert split_rows(rows, "norm~.bias")["norm.bias"].tolist() == [*range(7, 14), *range(7)]
    assert split_rows(rows, "plain.bias").keys() == {"plain.bias"}


def test_a_part_that_is_missing_is_told(dev: Path, tmp_path: Path) -> None:
    state = load_file(dev / "transformer/diffusion_pytorch_model.safetensors")
    del state["transformer_blocks.0.attn.to_k.weight"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((dev / "transformer/config.json").read_text())
    with pytest.raises(UserError, match=r"1 missing: blocks\.0\.img\.qkv\.weight"):
        model_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"in_channels": 384, "out_channels": 64}, "FLUX.1 Fill"),
        ({"in_channels": 128, "out_channels": 64}, "Canny or Depth"),
        ({"_class_name": "Flux2Transformer2DModel"}, "is no FLUX.1"),
        ({"axes_dims_rope": [16, 56, 58]}, "do not add up to heads of 128"),
    ],
)
def test_what_is_no_plain_flux_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        FluxConfig.read(config)
    assert "\n" not in str(told.value)


def test_kontext_which_has_the_same_shape_is_told_by_its_pipeline(dev: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text((dev / "transformer/config.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    with pytest.raises(UserError, match="is made for FluxKontextPipeline"):
        _ = FluxFolder(str(tmp_path)).config


def test_published_models_have_as_many_parameters_as_diffusers_class() -> None:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    for guidance in (True, False):
        with torch.device("meta"):
            theirs = FluxTransformer2DModel(guidance_embeds=guidance)
            config = FluxConfig.read({**theirs.config})
            model = FluxModel(config, streams=("rgb",))
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert FluxConfig.read(config_from_shapes(shapes)) == config
        stored = [p.name for n in shapes for p in pieces(NAMES.parameter(n, source="internal", to="diffusers"))]
        assert set(stored) == set(theirs.state_dict())


# -- adapters


def low_rank(rows: int, columns: int, seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)


def test_matrices_of_queries_keys_and_values_stand_on_the_diagonal(tmp_path: Path) -> None:
    """As diffusers and peft train them, each with its own rank and alpha; what is left alone does not change."""
    width, stored, wanted = 32, {}, torch.zeros(7 * 32, 32)  # sizes follow from the matrices alone
    sizes = {"attn.to_q": 32, "attn.to_v": 32, "proj_mlp": 128}
    starts = {"attn.to_q": 0, "attn.to_v": 64, "proj_mlp": 96}
    for seed, (part, rows) in enumerate(sizes.items()):
        down, up = low_rank(rows, width, seed, rank=2 + seed)
        key = f"transformer.single_transformer_blocks.1.{part}"
        stored |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(1.0 + seed)}
        wanted[starts[part] : starts[part] + rows] = (1.0 + seed) / (2 + seed) * up @ down
    save_file(stored, tmp_path / "theirs.safetensors")
    adapter = read_adapter(tmp_path / "theirs.safetensors")
    assert adapter.targets == ("blocks.s1.linear1",) and adapter.rank("blocks.s1.linear1") == 2 + 3 + 4
    change = adapter.scale("blocks.s1.linear1") * adapter.up("blocks.s1.linear1") @ adapter.down("blocks.s1.linear1")
    torch.testing.assert_close(change, wanted)


def test_diffusers_file_of_ours_has_each_part(tmp_path: Path) -> None:
    down, up = low_rank(96, 32, 0)
    name = "blocks.0.img.qkv"
    adapter = Adapter(
        {f"{name}.lora_A": down, f"{name}.lora_B": up}, {name: 3.0}, {name: "all"}, {}, {"family": "flux"}
    )
    stored = load_file(write_adapter(adapter, tmp_path / "a.safetensors", format="diffusers"))
    parts = [f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"]
    assert stored.keys() == {f"{part}.lora_{end}.weight" for part in parts for end in "AB"}
    made = torch.cat([stored[f"{part}.lora_B.weight"] @ stored[f"{part}.lora_A.weight"] for part in parts])
    torch.testing.assert_close(made, 1.5 * up @ down)
    ours = write_adapter(adapter, tmp_path / "b.safetensors", format="comfyui")
    assert {re.sub(r"\.(lora|alpha).*", "", key) for key in load_file(ours)} == {
        "diffusion_model.double_blocks.0.img_attn.qkv"
    }


# -- encoders and images


def test_encoders_give_what_the_pipeline_s_give(dev: Path) -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    theirs = FluxPipeline.from_pretrained(dev)
    text, pooled, _ = theirs.encode_prompt(PROMPT, PROMPT, max_sequence_length=512)
    (ours,) = FluxFolder(str(dev)).load_text_encoder(**HOW).encode([PROMPT])
    torch.testing.assert_close(ours["text"], text[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["pooled"], pooled[0])
    image = torch.rand(2, 3, 1, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = FluxFolder(str(dev)).load_vae(**HOW)
    latents = vae.encode(image)
    expected = (theirs.vae.encode(image[:, :, 0]).latent_dist.mode() - 0.1159) * 0.3611
    torch.testing.assert_close(latents[:, :, 0], expected)
    decoded = theirs.vae.decode(expected / 0.3611 + 0.1159, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents)[:, :, 0], decoded, atol=1e-4, rtol=1e-4)


def made(folder: Path, size: tuple[int, int]) -> Tensor:
    """Return the latents [1, C, 1, h, w] of our sampler with euler."""
    opened, model = FluxFolder(str(folder)), model_of(folder)
    (fields,) = opened.load_text_encoder(**HOW).encode([PROMPT])
    engine = SimpleNamespace(
        config=SimpleNamespace(pipeline=1),
        mesh=SimpleNamespace(device=torch.device("cpu")),
        forward=lambda x, inputs, layout, batch: model(x, *inputs, layout=layout),
    )
    layout = StreamLayout.equal(("rgb",), opened.geometry.latent(1, *size), (1, 2, 2))
    velocity = sampler.guided(engine, layout, fields, None, guidance=lambda _: 1.0)
    config = SampleConfig(steps=STEPS, shift="auto", scheduler="euler")
    solver = Sampler(engine, None, config, None, opened)._solver(Video("", "", {}, 0, layout))  # type: ignore[arg-type]
    return layout.unpack(denoise(velocity, start_noise(layout, 3), layout, solver))[0]


@pytest.mark.parametrize("kind", ["dev", "schnell"])
@torch.no_grad()
def test_images_are_those_of_the_pipeline(kind: str, request: pytest.FixtureRequest) -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    folder, (height, width) = request.getfixturevalue(kind), (64, 96)
    theirs = FluxPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    ours = made(folder, (height, width))
    layout = StreamLayout.equal(("rgb",), tuple(ours.shape[1:]), (1, 2, 2))
    (noise,) = layout.unpack(start_noise(layout, 3))
    packed = theirs._pack_latents(noise[:, :, 0], 1, *noise.shape[1:2], *noise.shape[3:])
    options = {"max_sequence_length": 512 if kind == "dev" else 256, "guidance_scale": 3.5, "output_type": "latent"}
    expected = theirs(PROMPT, height=height, width=width, num_inference_steps=STEPS, latents=packed, **options).images
    torch.testing.assert_close(
        theirs._pack_latents(ours[:, :, 0], 1, ours.shape[1], *ours.shape[3:]), expected, atol=1e-4, rtol=1e-4
    )
    assert (expected - packed).abs().max() > 0.1


def test_noise_levels_shift_with_tokens_and_schnell_s_do_not(dev: Path, schnell: Path) -> None:
    assert FluxFolder(str(dev)).shift(256) == pytest.approx(2.718281828**0.5)
    assert FluxFolder(str(dev)).sampling_shift(4096) == pytest.approx(2.718281828**1.15)
    assert FluxFolder(str(schnell)).sampling_shift(4096) == 1.0
    assert FluxFolder(str(schnell)).fields[0].length == 256


def test_the_class_that_is_published_is_the_one_of_the_table() -> None:
    assert type(published()).__name__ == CLASS == FAMILY.transformer_class
