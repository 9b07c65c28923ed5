"""Bases of 36 channels, Wan 2.1 I2V, FLF2V and 2.2 I2V: diffusers' class and pipeline, and Wan's own files, agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.families.wan.pipelines import (
    CLIP,
    CPU,
    FIVE,
    PIXELS,
    image_to_video,
    layout_of,
    made,
    pictures,
    run,
    write_image_to_video,
)
from tests.support.models import move, wan_model
from transpixeler import cli
from transpixeler.config.sections import LoraConfig, ModelConfig, UserError
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.images import CLIP_FILE, load_image_encoder
from transpixeler.families.wan.names import NAMES
from transpixeler.models import lora
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.costs import Costs, attention_flops, forward_flops
from transpixeler.models.family import open_model
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.shown import show

FORMS = ("clip", "last", "plain")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_image_to_video(tmp_path_factory.mktemp(form), form) for form in FORMS}


# --- the transformer -------------------------------------------------------------------------------------------------


def both(form: str, change: Callable[[Tensor], Tensor] = lambda image: image) -> tuple[Any, Any, Tensor, Tensor]:
    """Return diffusers' model and ours, and the velocity of each; `change` is done to what ours is shown first."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    published = WanTransformer3DModel(**image_to_video(form))
    move(published, seed=3)
    model = wan_model(image_to_video(form), streams=("rgb",))
    weights = published.state_dict()
    model.load_state_dict({name: weights[stored] for name, stored in NAMES.internal_names(weights).items()})
    layout = StreamLayout.equal(("rgb",), (16, 2, 4, 6), model.patch)
    draws = torch.Generator().manual_seed(1)
    x, shown = (torch.randn(2, c, *layout.shapes[0][1:], generator=draws) for c in (16, 20))
    text = torch.randn(2, 512, FIVE["text_dim"], generator=draws)
    times = torch.tensor([0.3, 0.9])
    images = [] if form == "plain" else [torch.randn(2, 257 * (1 + (form == "last")), 160, generator=draws)]
    # diffusers takes the two pictures of each sample one after the other
    theirs = [image.unflatten(1, (-1, 257)).flatten(0, 1) for image in images]
    expected = published(torch.cat([x, shown], 1), 1000 * times, text, *theirs, return_dict=False)[0].flatten(1)
    inputs = [x.flatten(1), times[:, None], text, change(shown).flatten(1), *images]
    return published, model, expected, model(*inputs, layout=layout)


@pytest.mark.parametrize("form", FORMS)
def test_it_equals_diffusers_forward_and_gradients(form: str) -> None:
    published, model, expected, found = both(form)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    parameters = dict(published.named_parameters())
    names = NAMES.internal_names(parameters)
    assert ("blocks.1.cross_attn.k_img.weight" in names) == (form != "plain")
    assert ("embed.img_emb.emb_pos" in names) == (form == "last")
    for name, stored in names.items():
        there, here = parameters[stored].grad, model.get_parameter(name).grad
        torch.testing.assert_close(here, there, atol=1e-5 * float(there.abs().max()) + 1e-6, rtol=1e-4, msg=name)


def test_channels_in_another_order_are_seen() -> None:
    *_, expected, found = both("plain", change=lambda shown: shown.roll(4, 1))
    assert (found - expected).abs().max() > 1e-2


@torch.no_grad()
def test_an_image_that_is_not_added_is_seen() -> None:
    _, model, expected, _ = both("clip")
    assert model.blocks["0"].attends == ("streams", "text", "image")
    for block in model.block_list():
        block.cross_attn.v_img.weight.zero_()
    layout = StreamLayout.equal(("rgb",), (16, 2, 4, 6), model.patch)
    found = model(*_inputs(model, layout), layout=layout)
    for block in model.block_list():
        block.cross_attn.v_img.bias.zero_()
    assert (model(*_inputs(model, layout), layout=layout) - found).abs().max() > 1e-3 and expected.isfinite().all()


def _inputs(model: Any, layout: StreamLayout) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(4)
    x, shown = (torch.randn(1, c * layout.elements // 16, generator=draws) for c in (16, 20))
    text, image = torch.randn(1, 512, 64, generator=draws), torch.randn(1, 257, 160, generator=draws)
    return x, torch.full((1, len(layout.groups)), 0.5), text, shown, image


# --- several streams, several stages ---------------------------------------------------------------------------------


def joint(streams: int = 2, *, attends: bool = True) -> Any:
    """Build a tiny joint model of the form with an image encoder, every parameter moved."""
    config = {**image_to_video("clip"), "text_dim": 64}
    model = wan_model(config, streams=("rgb", "seg")[:streams], rgb_attends_aux=attends)
    move(model, seed=0)
    return model


@torch.no_grad()
def test_alike_streams_without_embeddings_are_the_bases() -> None:
    model, single = joint(), joint(1)
    torch.nn.init.zeros_(model.embed.stream_embedding["seg"])
    single.load_state_dict({name: value for name, value in model.state_dict().items() if "stream" not in name})
    one = StreamLayout.equal(("rgb",), (16, 2, 4, 6), model.patch)
    x, times, text, shown, image = _inputs(single, one)
    base = single(x, times, text, shown, image, layout=one)
    layout = StreamLayout.equal(("rgb", "seg"), (16, 2, 4, 6), model.patch)
    found = model(x.repeat(1, 2), times.repeat(1, 2), text, shown.repeat(1, 2), image, layout=layout)
    torch.testing.assert_close(found, base.repeat(1, 2), atol=1e-5, rtol=1e-5)
    other = torch.cat([shown, 0 * shown], dim=1)
    moved = model(x.repeat(1, 2), times.repeat(1, 2), text, other, image, layout=layout)
    assert (moved - found).abs().max() > 1e-2, "what a companion is shown is its own"


def test_two_stages_equal_the_whole_bit_for_bit() -> None:
    whole, first, last = joint(), joint(), joint()
    first.keep(embed=True, blocks=[0], head=False)
    last.keep(embed=False, blocks=[1], head=True)
    layout = StreamLayout.equal(("rgb", "seg"), (16, 2, 4, 6), whole.patch)
    x, times, text, shown, image = _inputs(whole, layout)
    expected = whole(x, times, text, shown, image, layout=layout)
    flow = first(x, times, text, shown, image, layout=layout)
    for part, meta in zip(flow, whole.flow_meta(layout, 1, torch.float32), strict=True):
        assert (part.shape, part.dtype) == (meta.shape, meta.dtype)
    found = last(*flow, layout=layout)
    assert torch.equal(found, expected)
    for value in (found, expected):
        value.square().sum().backward()
    grads = {name: p.grad for model in (first, last) for name, p in model.named_parameters()}
    assert all(torch.equal(grads[name], p.grad) for name, p in whole.named_parameters())


def test_costs_count_the_image_and_an_adapter_spells_its_linears() -> None:
    model, plain = joint(), wan_model({**image_to_video("plain")}, streams=("rgb", "seg"))
    with_image, without = Costs.of(model), Costs.of(plain)
    lengths = (12, 12)
    extra = attention_flops(with_image, lengths) - attention_flops(without, lengths)
    assert extra == 4 * 48 * 2 * 24 * 257  # width, blocks, queries, keys
    inside = forward_flops(with_image, lengths).linear - forward_flops(without, lengths).linear
    assert inside == 2 * 257 * (2 * 2 * 48 * 48 + 160 * 160 + 160 * 48)  # k_img and v_img, and the ends
    assert with_image.cell_numbers == 20 and with_image.kept[0].eager.fixed > without.kept[0].eager.fixed
    for name, theirs in (("k_img", "add_k_proj"), ("v_img", "add_v_proj")):
        spelled = NAMES.module(f"blocks.1.cross_attn.{name}", source="internal", to="diffusers")
        assert spelled == f"blocks.1.attn2.{theirs}"
        flat = NAMES.module(f"blocks_1_cross_attn_{name}", source="flat", to="internal")
        assert flat == f"blocks.1.cross_attn.{name}"
    with pytest.raises(UserError, match=r"cross_attn\.k_img acts on the image, which is the same for all streams"):
        lora.inject(model, LoraConfig(rank=2, targets=("cross_attn.k_img",)))
    chosen = lora.inject(model, LoraConfig(rank=2, targets=("cross_attn.*_img",), scope="all"))
    assert len([name for name in chosen if "lora" in name]) == 8


def test_the_islands_stay_in_fp32_and_low_precision_is_near() -> None:
    low, high = joint(), joint()
    apply_dtypes(low, torch.bfloat16)
    narrow = {name for name, p in low.named_parameters() if p.dtype == torch.bfloat16}
    assert "blocks.0.cross_attn.k_img.weight" in narrow
    assert not [name for name in narrow if "norm" in name or "img_emb" in name]
    layout = StreamLayout.equal(("rgb", "seg"), (16, 2, 4, 6), low.patch)
    inputs = _inputs(low, layout)
    one, other = low(*inputs, layout=layout), high(*inputs, layout=layout)
    assert one.dtype == torch.float32 and (one - other).norm() / other.norm() < 0.03


# --- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_video_from_given_frames_equals_the_pipelines(form: str, folders: dict[str, Path]) -> None:
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from PIL import Image

    folder, given = folders[form], pictures()
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    layout, model = layout_of(folder, PIXELS), WanFolder(str(folder))
    images = {"image": Image.fromarray(given[0])}
    if form == "last":
        images["last_image"] = Image.fromarray(given[1])
    expected = run(pipeline, PIXELS, layout, **images)
    frames = Frames(model, CPU)
    shown = show(model, frames, layout, {0: given if form == "last" else given[:1]})
    assert (made(folder, layout, shown=shown) - expected).abs().max() < 1e-4
    unmasked = shown["shown"].clone()
    layout_in = StreamLayout.equal(("rgb",), (20, *layout.shapes[0][1:]), layout.patch)
    layout_in.unpack(unmasked[None])[0][:, :4] = 0
    assert (made(folder, layout, shown={**shown, "shown": unmasked}) - expected).abs().max() > 1e-2
    nothing = show(model, frames, layout, {})
    assert (made(folder, layout, shown=nothing) - expected).abs().max() > 1e-2


# --- what cannot be trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "WanVACETransformer3DModel", "vace_layers": [0]}, "this is Wan VACE"),
        ({"_class_name": "VaceWanModel", "model_type": "vace"}, "this is Wan VACE"),
        ({"_class_name": "WanAnimateTransformer3DModel"}, "this is Wan Animate"),
        ({"_class_name": "WanModel_S2V", "model_type": "s2v"}, "this is Wan S2V"),
        ({"_class_name": "WanModel", "model_type": "i2v", "add_control_adapter": True}, "this is Wan Fun-Control"),
        ({"in_channels": 52}, r"in_channels 52 beside out_channels 16 .*Fun-Control"),
    ],
)
def test_wans_other_models_are_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=said):
        WanConfig.read({**FIVE, "in_channels": 36, "out_channels": 16, **config})
    (tmp_path / "transformer").mkdir()
    whole = {"_class_name": "WanTransformer3DModel", **FIVE, "in_channels": 36, "out_channels": 16, **config}
    (tmp_path / "transformer/config.json").write_text(json.dumps(whole))
    (tmp_path / "data").mkdir()
    if "model_type" not in config:
        assert cli.main(["cache", *_bare(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("transpixeler: model.path: ") and told.count("\n") == 1


def _bare(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("{}")
    return [str(folder / "config.yaml"), f"model.path={folder}", f"data.train={folder / 'data'}"]


def test_a_single_file_of_another_model_is_refused_by_its_weights(tmp_path: Path) -> None:
    save_file(
        {"patch_embedding.weight": torch.zeros(1), "vace_patch_embedding.weight": torch.zeros(1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UserError, match="this is Wan VACE"):
        _ = WanFolder(str(tmp_path / "a.safetensors")).config


# --- Wan's own files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_original_files_are_the_same_model(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    theirs = WanFolder(str(folders[form]))
    source = WeightSource(theirs.path, NAMES.internal_names)
    spelled = {
        NAMES.parameter(n, source="internal", to="original"): source.read(n).contiguous() for n in source.names()
    }
    save_file(spelled, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 48, "num_heads": 2, "in_dim": 36, "out_dim": 16, "text_len": 512}
    config |= {"ffn_dim": 96, "num_layers": 2, "freq_dim": 32, "eps": 1e-6, "text_dim": 64}
    config |= {"model_type": "flf2v" if form == "last" else "i2v"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = open_model(ModelConfig(path=str(tmp_path)))
    assert ours.fields == theirs.fields and ours.diffusers_config() == theirs.diffusers_config()
    assert ours.sampling_shift(100) == (16 if form == "last" else 5)
    models = [one.build(streams=("rgb", "seg")) for one in (ours, theirs)]
    for one, model in zip((ours, theirs), models):
        load_weights(model, WeightSource(one.path, one.family.internal_names))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_wans_own_image_encoder_file_gives_the_same_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    theirs: Any = load_image_encoder(folders["clip"], device=CPU, dtype=torch.float32)
    # transformers before 5 wraps the network
    state = {name.removeprefix("vision_model."): value for name, value in theirs.network.state_dict().items()}
    renamed = {
        "visual.cls_embedding": state["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(160, 32),
        "textual.norm.weight": torch.ones(4),
        "log_scale": torch.zeros(()),
    }
    for leaf in ("weight", "bias"):
        for ours, name in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm")):
            renamed[f"visual.{ours}.{leaf}"] = state[f"{name}.{leaf}"]
        for n in range(CLIP["num_hidden_layers"]):
            here, there = f"visual.transformer.{n}", f"encoder.layers.{n}"
            parts = [state[f"{there}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            renamed[f"{here}.attn.to_qkv.{leaf}"] = torch.cat(parts)
            for ours, name in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("attn.proj", "self_attn.out_proj"),
                ("mlp.0", "mlp.fc1"),
                ("mlp.2", "mlp.fc2"),
            ):
                renamed[f"{here}.{ours}.{leaf}"] = state[f"{there}.{name}.{leaf}"]
    torch.save(renamed, tmp_path / CLIP_FILE)
    ours = load_image_encoder(tmp_path, device=CPU, dtype=torch.float32)
    square = torch.from_numpy(pictures()[:, :64, :64])
    found = ours.encode(square)
    assert found.shape == (514, 160) and torch.equal(found, theirs.encode(square))
    assert ours.fingerprint != theirs.fingerprint
    wide = torch.from_numpy(pictures())  # which Wan's code squeezes and diffusers' crops
    assert not torch.equal(ours.encode(wide), theirs.encode(wide))
    with pytest.raises(UserError, match=rf"holds no image encoder: neither image_encoder/config\.json nor {CLIP_FILE}"):
        load_image_encoder(folders["plain"], device=CPU, dtype=torch.float32)
