"""The 3D U-Net does what its paper's formulas say, and its caption is dropped by a learned vector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.conformance.test_costs import counted, kept, larger
from tests.families.unet3d.folder import TINY
from tests.families.unet3d.reference import Reference
from tests.support.families.cases import JOINED
from tests.support.models import move
from transpixeler.config.sections import LoraConfig
from transpixeler.families.unet3d.config import UnetConfig
from transpixeler.families.unet3d.layers import distances
from transpixeler.families.unet3d.model import UnetModel
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.costs import Costs, forward_flops
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.shard import set_recompute
from transpixeler.sampling.sampler import guided

SHAPE = (3, 3, 4, 6)


def tiny(streams: tuple[str, ...] = ("rgb",), **sizes: Any) -> UnetModel:
    model = UnetModel(UnetConfig.read(TINY | sizes), streams=streams)
    move(model, seed=1)
    return model


def given(layout: StreamLayout, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    times = torch.tensor([[0.3], [0.9]]).repeat(1, len(layout.names))
    return (
        torch.randn(2, layout.elements, generator=generator),
        times,
        torch.randn(2, TINY["cond_dim"], generator=generator),
    )


def joined(layout: StreamLayout, x: Tensor) -> Tensor:
    return torch.cat(layout.unpack(x), dim=1)


@pytest.mark.parametrize("streams", [("rgb",), ("rgb", "seg", "depth")], ids=["one", "three"])
def test_it_is_the_formulas_forward_and_backward(streams: tuple[str, ...]) -> None:
    model = tiny(streams)
    layout = model.layout(SHAPE)
    x, times, text = given(layout)
    text[1] = 0  # no caption
    found = model(x, times, text, layout=layout)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = Reference(weights, TINY, streams[1:])(joined(layout, x), times[:, 0], text)
    torch.testing.assert_close(joined(layout, found), expected, atol=1e-5, rtol=1e-5)
    mix = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (joined(layout, found) * mix).sum().backward()
    (expected * mix).sum().backward()
    largest = max(float(w.grad.abs().max()) for w in weights.values())  # type: ignore[union-attr]
    for name, theirs in weights.items():
        mine = model.get_parameter(name).grad
        assert mine is not None and theirs.grad is not None and theirs.grad.any(), name
        assert float((mine - theirs.grad).abs().max()) < 1e-5 * largest, name


@torch.no_grad()
def test_a_focused_sample_sees_its_present_frame_alone() -> None:
    model = tiny()
    layout = model.layout(SHAPE)
    x, times, text = given(layout)
    found = joined(layout, model(x, times, text, torch.tensor([1.0, 0.0]), layout=layout))
    expected = Reference(model.state_dict(), TINY)(joined(layout, x), times[:, 0], text, [True, False])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = joined(layout, model(x, times, text, layout=layout))
    assert (found[0] - plain[0]).abs().max() > 1e-3 and torch.equal(found[1], plain[1])


def test_distances_in_time_are_t5s() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(50)
    theirs = T5Attention._relative_position_bucket(
        places[None] - places[:, None], bidirectional=True, num_buckets=32, max_distance=32
    )
    assert torch.equal(distances(50, torch.device("cpu")), theirs)


@torch.no_grad()
def test_rgb_is_the_bases_where_companions_are_zero() -> None:
    joint, alone = tiny(("rgb", "seg")), tiny()
    alone.load_state_dict({n: p for n, p in joint.state_dict().items() if "stream" not in n})
    joint.embed.stream_embedding["seg"].zero_()  # type: ignore[union-attr]
    layout, single = joint.layout(SHAPE), alone.layout(SHAPE)
    x, times, text = given(layout)
    rgb, seg = layout.unpack(joint(x, times, text, layout=layout))
    expected = alone(x[:, : single.elements], times[:, :1], text, layout=single)
    torch.testing.assert_close(rgb, single.unpack(expected)[0])
    assert not seg.any()
    joint.embed.stream_embedding["seg"].add_(0.1)  # type: ignore[union-attr]
    assert (layout.unpack(joint(x, times, text, layout=layout))[0] - rgb).abs().max() > 1e-3


@torch.no_grad()
def test_no_caption_is_a_vector_that_is_learned() -> None:
    model = tiny()
    layout = model.layout(SHAPE)
    x, times, text = given(layout)
    null = model.embed.null.expand(2, -1)  # type: ignore[union-attr]
    none = model(x, times, torch.zeros_like(text), layout=layout)
    assert torch.equal(none, model(x, times, null, layout=layout))
    assert (none - model(x, times, text, layout=layout)).abs().max() > 1e-3


@torch.no_grad()
def test_guidance_leads_away_from_that_vector() -> None:
    model = tiny(("rgb", "seg"))
    layout = model.layout(SHAPE)
    x, times, text = (each[:1] for each in given(layout))
    engine: Any = SimpleNamespace(
        mesh=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(pipeline=1),
        forward=lambda x, inputs, layout, size: model(x, *inputs, layout=layout),
    )
    fields, empty = {"text": text[0]}, {"text": torch.zeros_like(text[0])}
    found = guided(engine, layout, fields, empty, guidance=lambda _: 2.0)(x, times)
    formulas = Reference(model.state_dict(), TINY, ["seg"])
    wanted, none = (formulas(joined(layout, x), times[:, 0], each) for each in (text, torch.zeros_like(text)))
    torch.testing.assert_close(joined(layout, found), none + 2 * (wanted - none), atol=1e-5, rtol=1e-5)


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [("rgb",), ("rgb", "seg")], ids=["one", "two"])
def test_the_forward_pass_costs_what_torch_counts(streams: tuple[str, ...]) -> None:
    model = tiny(streams, dim=32, dim_mults=[1, 2, 4], groups=8)
    layout = model.layout((3, 4, 16, 16))
    x, times, text = (each[:1] for each in given(layout))
    said = forward_flops(Costs.of(model, kept=False), layout.lengths).total
    assert said == pytest.approx(counted(model, layout, (x, times, text)), rel=0.02)


@pytest.mark.parametrize("trains", ["all", "lora"])
def test_a_block_keeps_what_is_said(trains: str) -> None:
    model, case = tiny(("rgb", "seg")), JOINED["unet3d"]
    if trains == "lora":
        inject(model, LoraConfig(rank=4, scope="all"))
    said = Costs.of(model).kept[0].eager.bytes(model.layout(larger(case)).lengths)
    assert said == pytest.approx(kept(model, case, "0"), rel=0.2)  # attention with a bias keeps other things on a CPU


# --- as a GPU runs it ------------------------------------------------------------------------------------------------


def gradients(model: UnetModel, layout: StreamLayout) -> list[Tensor]:
    out = model(*given(layout), layout=layout)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["full", "attention"])
def test_levels_that_are_recomputed_learn_the_same(mode: str) -> None:
    layout, model = tiny().layout(SHAPE), tiny()
    set_recompute(model.block_list(), mode)
    for mine, other in zip(gradients(model, layout), gradients(tiny(), layout), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_matmuls_in_bf16_stay_near() -> None:
    model, exact = tiny(("rgb", "seg")), tiny(("rgb", "seg"))
    apply_dtypes(model, torch.bfloat16)
    layout = model.layout(SHAPE)
    found, expected = (one(*given(layout), layout=layout) for one in (model, exact))
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).square().mean().sqrt()) < 0.05 * float(expected.std())
