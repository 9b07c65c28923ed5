"""Open-Sora 2 is what was published: its files, its sizes, its noise levels, and what it is shown of given frames."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.opensora.folder import SHOWN, TINY, make, stored, write_folder
from tests.families.opensora.reference import Formulas
from tests.publishing import test_hub
from tests.support.hub_server import Hub
from tests.support.models import move
from transpixeler.adapters.fresh import random_weights
from transpixeler.config import loading
from transpixeler.config.sections import ModelConfig, UserError
from transpixeler.families.opensora.config import OpenSoraConfig
from transpixeler.families.opensora.encoders import CLIP_FOLDER, T5_FOLDER, VAE_FILE
from transpixeler.families.opensora.family import FAMILY, OpenSoraFolder
from transpixeler.families.opensora.model import OpenSoraModel, fields
from transpixeler.models.conditions import with_channels
from transpixeler.models.family import open_model
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling.model import base_weights

server = test_hub.server  # a fixture
HOW: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
SHAPE = (4, 3, 4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("opensora") / "model", SHOWN)


# -- what is shown


def given(config: dict[str, Any], seed: int = 0) -> tuple[StreamLayout, list[Tensor]]:
    """Return the inputs of two samples: latents, times, both texts and, where the model takes it, what is shown."""
    layout, draws = StreamLayout.equal(("rgb",), SHAPE, (1, 2, 2)), torch.Generator().manual_seed(seed)
    found = [torch.randn(2, layout.elements, generator=draws), torch.rand(2, 1, generator=draws)]
    for field in fields(OpenSoraConfig.read(config)):
        size = (field.length, field.width) if field.length else (field.width,)
        size = size if field.source == "caption" else (with_channels(layout, field.width).elements,)
        found.append(torch.randn(2, *size, generator=draws))
    return layout, found


def formulas(config: dict[str, Any], weights: dict[str, Tensor], layout: StreamLayout, inputs: list[Tensor]) -> Tensor:
    x, times, text, pooled, *shown = inputs
    shown = [with_channels(layout, 5).unpack(one)[0] for one in shown]
    (latents,) = layout.unpack(x)
    return Formulas(weights, config)(latents, times[:, 0], text, pooled, *shown).flatten(1)


CONFIGS = {"shown": SHOWN, "plain": TINY, "neighbours turn": SHOWN | {"use_liger_rope": False}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_equals_the_formulas_forward_and_gradients(config: dict[str, Any]) -> None:
    model = make(config)
    layout, inputs = given(config)
    weights = {name: value.detach().clone().requires_grad_(True) for name, value in model.named_parameters()}
    found, expected = model(*inputs, layout=layout), formulas(config, weights, layout, inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    largest = max(float(weight.grad.abs().max()) for weight in weights.values() if weight.grad is not None)
    for name, weight in weights.items():
        mine, theirs = model.get_parameter(name).grad, weight.grad
        assert mine is not None and theirs is not None and theirs.any(), name
        assert (mine - theirs).abs().max() < 1e-5 * largest, name


@torch.no_grad()
@pytest.mark.parametrize("twin", ["mask last", "other halves", "cond_in"])
def test_a_broken_twin_is_caught(twin: str) -> None:
    model = make(SHOWN)
    layout, inputs = given(SHOWN)
    expected = formulas(SHOWN, dict(model.named_parameters()), layout, inputs)
    if twin == "mask last":
        parts = with_channels(layout, 5).unpack(inputs[-1])[0].roll(-1, 1)
        inputs[-1] = parts.flatten(1)
    elif twin == "other halves":
        model = OpenSoraModel(OpenSoraConfig.read(SHOWN | {"use_liger_rope": False}), streams=("rgb",))
        move(model, seed=0)
    else:
        model.get_parameter("embed.cond_in.weight").zero_()
    assert (model(*inputs, layout=layout) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_alike_streams_are_the_bases_and_each_is_shown_its_own() -> None:
    single = make(SHOWN)
    model = make(SHOWN, streams=("rgb", "seg"))
    torch.nn.init.zeros_(model.get_parameter("embed.stream_embedding.seg"))
    single.load_state_dict({name: value for name, value in model.state_dict().items() if "stream" not in name})
    layout, (x, times, text, pooled, shown) = given(SHOWN)
    base = single(x, times, text, pooled, shown, layout=layout)
    two = StreamLayout.equal(("rgb", "seg"), SHAPE, (1, 2, 2))
    found = model(x.repeat(1, 2), times.repeat(1, 2), text, pooled, shown.repeat(1, 2), layout=two)
    torch.testing.assert_close(found, base.repeat(1, 2), atol=1e-5, rtol=1e-5)
    other = torch.cat([shown, 0 * shown], dim=1)
    moved = model(x.repeat(1, 2), times.repeat(1, 2), text, pooled, other, layout=two)
    assert (moved - found).abs().max() > 1e-2


# -- sizes


def test_the_published_config_has_as_many_parameters_as_its_arithmetic() -> None:
    """Width 3072, 19 double and 38 single blocks, feed-forwards of 4 widths, conditions of 17 channels a cell."""
    width, head, inner = 3072, 128, 4 * 3072

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    half = linear(width, 6 * width) + 4 * linear(width, width) + 2 * head + linear(width, inner) + linear(inner, width)
    single = linear(width, 3 * width) + linear(width, 3 * width + inner) + linear(width + inner, width) + 2 * head
    embedders = sum(linear(inputs, width) + linear(width, width) for inputs in (256, 768))
    ends = linear(64, width) + linear(4096, width) + linear(width, 2 * width) + linear(width, 64) + embedders
    plain = 19 * 2 * half + 38 * single + ends
    for config, expected in (({}, plain), ({"cond_embed": True}, plain + linear(68, width))):
        with torch.device("meta"):
            model = OpenSoraModel(OpenSoraConfig.read(config), streams=("rgb",))
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert round(expected / 1e9, 1) == 11.9


def test_noise_levels_shift_with_pixels_and_frames(folder: Path) -> None:
    model = OpenSoraFolder(str(folder))
    assert model.shift_of((1, 16, 16)) == 1.0 and model.shift_of((1, 64, 64)) == 3.0  # 256² and 1024² pixels
    assert model.shift_of((33, 16, 16)) == pytest.approx(math.sqrt(33))
    assert model.sampling_shift_of((33, 48, 48)) == pytest.approx((1 + 2 * (48 * 48 - 256) / 3840) * math.sqrt(33))


# -- files


def model_of(path: str) -> OpenSoraModel:
    model = OpenSoraFolder(path).build(streams=("rgb",))
    load_weights(model, WeightSource(path, FAMILY.internal_names))
    return model


def test_projections_apart_or_together_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    apart = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {"double_blocks.1.txt_attn.v_proj.bias", "single_blocks.0.v_mlp.weight", "cond_in.weight"} <= apart.keys()
    assert apart["single_blocks.0.v_mlp.weight"].shape == (5 * 32, 32)
    save_file(apart, published := tmp_path / "Open_Sora_v2.safetensors")
    whole = model_of(str(folder))
    save_file(stored(whole, "original"), together := tmp_path / "together.safetensors")
    assert {"double_blocks.1.txt_attn.qkv.bias", "single_blocks.0.linear1.weight"} <= load_file(together).keys()
    for file in (published, together):
        other = model_of(str(file)).state_dict()
        assert all(torch.equal(other[name], value) for name, value in whole.state_dict().items())
    assert FAMILY.recognises(published) and OpenSoraConfig.read(OpenSoraFolder(str(published)).config).use_liger_rope
    assert not OpenSoraConfig.read(OpenSoraFolder(str(together)).config).use_liger_rope, "as the image model turns"
    assert open_model(ModelConfig(path=str(published), encoders=str(folder))).family is FAMILY


def test_the_encoders_are_read_where_they_are_published(folder: Path, tmp_path: Path) -> None:
    for ours, theirs in ((("text_encoder_2", "tokenizer_2"), T5_FOLDER), (("text_encoder", "tokenizer"), CLIP_FOLDER)):
        for part in ours:
            shutil.copytree(folder / part, tmp_path / theirs, dirs_exist_ok=True)
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", tmp_path / VAE_FILE)
    one, other = OpenSoraFolder(str(folder)), OpenSoraFolder(str(folder), encoders=str(tmp_path))
    assert other.geometry == one.geometry
    texts = [model.load_text_encoder(**HOW).encode(["a red circle"])[0] for model in (one, other)]
    assert all(torch.equal(texts[0][name], texts[1][name]) for name in ("text", "pooled"))
    video = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(*(model.load_vae(**HOW).encode(video) for model in (one, other)))


@torch.no_grad()
def test_the_autoencoder_is_diffusers_without_tiles_in_time(folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    theirs: Any = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
    theirs.use_framewise_encoding = theirs.use_framewise_decoding = False
    video = torch.rand(1, 3, 21, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, expected = OpenSoraFolder(str(folder)).load_vae(**HOW), theirs.encode(video).latent_dist.mode() * 0.476986
    torch.testing.assert_close(ours.encode(video), expected)
    decoded = theirs.decode(expected / 0.476986, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(ours.decode(expected), decoded, atol=1e-4, rtol=1e-4)
    theirs.use_framewise_encoding = True
    assert (theirs.encode(video).latent_dist.mode() * 0.476986 - expected).abs().max() > 1e-3


def test_the_published_folder_is_a_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, there := tmp_path / "ckpts", ignore=shutil.ignore_patterns("transformer"))
    save_file(stored(make(SHOWN, seed=3)), there / "Open_Sora_v2.safetensors")
    config = loading.from_overrides([f"model.path={there}", "streams.seg=null", "lora.enabled=false"])
    opened = open_model(config.model)
    assert opened.family is FAMILY and OpenSoraConfig.read(opened.config) == OpenSoraConfig.read(SHOWN)
    load_weights(model := opened.build(streams=("rgb",)), base_weights(config, *opened.experts))
    expected = model_of(str(folder)).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())
    (there / "Open_Sora_v2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.path: .* does not say which model it is"):
        open_model(config.model)


def test_on_the_hub_the_weights_are_fetched_last(folder: Path, tmp_path: Path, server: Hub) -> None:
    save_file(stored(make(SHOWN, seed=3)), tmp_path / "weights")
    vae = (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    files = {"Open_Sora_v2.safetensors": (tmp_path / "weights").read_bytes(), VAE_FILE: vae}
    server.repos["hpcai-tech/Open-Sora-v2"] = files | {f"{T5_FOLDER}/config.json": b"{}", "README.md": b"-"}
    config = loading.from_overrides(
        ["model.path=hpcai-tech/Open-Sora-v2", "model.family=opensora", "streams.seg=null", "lora.enabled=false"]
    )
    opened = open_model(config.model)
    assert OpenSoraConfig.read(opened.config) == OpenSoraConfig.read(FAMILY.shapes["11b"]) and opened.fields
    assert not any("Open_Sora_v2" in request for request in server.requests)
    source = base_weights(config, *opened.experts)
    assert any("Open_Sora_v2" in request for request in server.requests)
    assert source.shape("blocks.0.img.qkv.weight") == (96, 32)
    again = open_model(config.model)  # whose file lies in the cache from now on
    assert OpenSoraConfig.read(again.config) == OpenSoraConfig.read(SHOWN)


def test_a_new_model_begins_without_conditions(folder: Path) -> None:
    made = dict(random_weights(OpenSoraFolder(str(folder)), seed=0))
    assert not made["embed.cond_in.weight"].any() and made["embed.img_in.weight"].any()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "is no Open-Sora 2"),
        ({"patch_size": 1, "in_channels": 128}, "another autoencoder"),
        ({"guidance_embed": True}, "distilled"),
        ({"axes_dim": [16, 56, 58]}, "do not add up to heads of 128"),
    ],
)
def test_what_is_no_plain_one_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        OpenSoraConfig.read(config)
    assert "\n" not in str(told.value)


def test_a_config_is_written_as_it_is_read(folder: Path) -> None:
    opened = OpenSoraFolder(str(folder))
    written = json.loads(json.dumps(opened.diffusers_config()))
    assert OpenSoraConfig.read(written) == OpenSoraConfig.read(SHOWN) and written["fused_qkv"] is False
