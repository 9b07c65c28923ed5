"""Wan's other forms keep what the suite asks of a family, as far as a form could break it.

A form has other channels, a time for each token, or is shown pictures through channels and tokens of an image encoder.
"five" is TI2V-5B, "clip" 2.1's image-to-video model, "last" FLF2V, and "plain" an expert of 2.2's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.wan.pipelines import FIVE, image_to_video
from tests.support.families.cases import STREAMS, zero
from tests.support.models import move, wan_folder, wan_model
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of, apply_adapter
from transpixeler.adapters.readers import readers
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.family import FAMILY
from transpixeler.families.wan.model import WanModel
from transpixeler.families.wan.names import NAMES
from transpixeler.models.backbone import Backbone
from transpixeler.models.lora import adapter_parameters, inject
from transpixeler.models.streams import StreamLayout

FORMS = ("five", "clip", "last", "plain")
every_form = pytest.mark.parametrize("form", FORMS)


def config(form: str) -> dict[str, Any]:
    return FIVE if form == "five" else image_to_video(form)


def build(form: str, streams: int = 1, *, attends: bool = True) -> WanModel:
    model = wan_model(config(form), streams=STREAMS[:streams], rgb_attends_aux=attends)
    move(model, seed=0)
    return model


def base_of(form: str, model: Backbone) -> WanModel:
    single, state = build(form), model.state_dict()
    single.load_state_dict({name: state[name] for name in single.state_dict()})
    return single


def laid(model: Backbone, *, cut: bool = False) -> StreamLayout:
    channels = config("five" if model.fields[-1].source == "caption" else "plain")["out_channels"]
    layout = StreamLayout.equal(model.streams, (channels, 2, 4, 4), model.patch)
    return layout.cut([[1]] * len(model.streams)) if cut else layout


def inputs(model: Backbone, layout: StreamLayout) -> tuple[Tensor, ...]:
    """Draw latents, times and all fields of one stream, and give every stream the same."""
    draws, streams = torch.Generator().manual_seed(5), len(model.streams)
    cells = layout.elements // layout.shapes[0][0] // streams
    groups = len(layout.groups) // streams
    x = torch.randn(1, layout.elements // streams, generator=draws)
    fields = []
    for field in model.fields:
        size = (field.width * cells,) if field.source == "clip" else (field.length, field.width)
        value = torch.randn(1, *size, generator=draws)
        fields.append(value.repeat(1, streams) if field.source == "clip" else value)
    return x.repeat(1, streams), torch.rand(1, groups, generator=draws).repeat(1, streams), *fields


def adapted(form: str, streams: int, *, attends: bool = True, **lora: Any) -> WanModel:
    model = build(form, streams, attends=attends)
    inject(model, LoraConfig(**{"rank": 3, "alpha": 5.0, "scope": "aux" if streams > 1 else "all"} | lora))
    move(model, seed=1, names=".lora_")
    return model


# --- the truths ------------------------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_equal_streams_each_give_what_the_base_gives(form: str) -> None:
    """And none of them does once the adapter has learned something."""
    for attends in (True, False):
        model = build(form, 3, attends=attends)
        zero(model, "stream_embedding")
        inject(model, LoraConfig(rank=3))
        base = base_of(form, model)
        for cut in (False, True):
            layout, single = laid(model, cut=cut), laid(base, cut=cut)
            expected = base(*inputs(base, single), layout=single)
            found = model(*inputs(model, layout), layout=layout).split(layout.sizes, dim=1)
            for velocity in found:
                torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
        move(model, seed=1, names=".lora_B")
        moved = model(*inputs(model, layout), layout=layout).split(layout.sizes, dim=1)
        assert [float((one - expected).abs().max()) > 1e-3 for one in moved] == [attends, True, True]


def gradients(model: Backbone) -> list[Tensor]:
    layout = laid(model, cut=True)
    out = model(*inputs(model, layout), layout=layout)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in adapter_parameters(model).values())]  # type: ignore[misc]


@every_form
def test_a_blind_rgb_runs_forward_only_to_the_same_gradients(form: str) -> None:
    """Some processors round a product of a few rows otherwise than the same rows among others, so bits may differ."""
    model = adapted(form, 3, attends=False)
    assert model.rgb_forward_only
    slow = copy.deepcopy(model)
    slow.rgb_forward_only = False
    found = gradients(model)
    for mine, other in zip(found, gradients(slow), strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    assert all(gradient.any() for gradient in found)


# --- adapters, and the programs that read them -----------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@every_form
@torch.no_grad()
def test_an_adapter_comes_back_from_every_spelling(form: str, format: str, tmp_path: Path) -> None:
    """With those of the image's keys and values, which every token shares."""
    pictures = ("cross_attn.?_img",) if form in ("clip", "last") else ()
    model = adapted(form, 2, scope="all", targets=(*WanModel.lora_targets, *pictures))
    adapter = adapter_of(model, {"streams": "rgb,seg"})
    back = read_adapter(write_adapter(adapter, tmp_path, format=format))
    assert back.matches(adapter) and any("_img" in target for target in back.targets) == bool(pictures)
    other, layout = build(form, 2), laid(model)
    apply_adapter(other, back)
    given = inputs(model, layout)
    torch.testing.assert_close(other(*given, layout=layout), model(*given, layout=layout), atol=1e-5, rtol=1e-5)


def published(form: str, model: WanModel) -> tuple[Any, Any]:
    """Return diffusers' transformer with a model's base weights, and the pipeline that a card names, around it."""
    import diffusers

    transformer = diffusers.WanTransformer3DModel(**config(form))
    state = model.state_dict()
    names = NAMES.internal_names(transformer.state_dict())
    transformer.load_state_dict({stored: state[name] for name, stored in names.items()})
    shown = wan_folder(config(form)).pictures
    kind = getattr(diffusers, FAMILY.image_pipeline_class if shown else FAMILY.pipeline_class)
    assert set(shown) <= set(signature(kind.__call__).parameters)
    needed = [name for name, one in signature(kind).parameters.items() if one.default is one.empty]
    return transformer, kind(**{**dict.fromkeys(needed), "transformer": transformer})


def diffusers_velocity(form: str, transformer: Any, layout: StreamLayout, given: Sequence[Tensor]) -> Tensor:
    x, times, text, *more = given
    (latents,) = layout.unpack(x)
    if form != "five":
        latents = torch.cat([latents, more[0].unflatten(1, (20, *latents.shape[2:]))], dim=1)
    images = [image.unflatten(1, (-1, 257)).flatten(0, 1) for image in more[1:]]
    return transformer(latents, 1000 * times[:, 0], text, *images, return_dict=False)[0].flatten(1)


@pytest.mark.parametrize("format", FORMATS)
@every_form
@torch.no_grad()
def test_diffusers_pipeline_reads_a_plain_adapter_as_the_export_says(form: str, format: str, tmp_path: Path) -> None:
    model = adapted(form, 1)
    adapter = adapter_of(model, {})
    assert "diffusers" in readers(adapter, format)
    transformer, pipeline = published(form, build(form))
    layout = laid(model)
    given = inputs(model, layout)
    before = diffusers_velocity(form, transformer, layout, given)
    write_adapter(adapter, tmp_path / "pytorch_lora_weights.safetensors", format=format)
    pipeline.load_lora_weights(tmp_path)
    ours = model(*given, layout=layout)
    torch.testing.assert_close(diffusers_velocity(form, transformer, layout, given), ours, atol=1e-5, rtol=1e-5)
    assert (ours - before).abs().max() > 1e-3
