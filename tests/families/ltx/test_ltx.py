"""LTX-Video on one stream is the published LTX-Video; cut into stages it is itself; what it cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.ltx.tiny import inputs, ltx, published, with_weights_of
from transpixeler.families.ltx.config import LtxConfig
from transpixeler.families.ltx.model import LtxModel, positions_in_pixels, rope_table
from transpixeler.families.ltx.names import NAMES
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.streams import LAST, Beside, Segment, StreamLayout

FPS = 24.0
SHAPES = [(4, 1, 3, 4), (4, 3, 4, 5), (4, 5, 2, 7)]
WIDER = {"attention_head_dim": 32, "cross_attention_dim": 64}  # 64 = 6·10 + 4: two pairs do not turn


def theirs_of(
    model: torch.nn.Module,
    layout: StreamLayout,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    causal: bool = False,
    fps: float = FPS,
) -> Tensor:
    """Run diffusers' class on our inputs, as its pipelines call it."""
    x, timesteps, text, lengths = given
    (_, f, h, w), tokens = layout.shapes[0], layout.tokens
    times = 1000 * timesteps
    if layout.cuts:  # one for each token
        times = times.repeat_interleave(torch.tensor(layout.group_lengths), dim=1)
    kwargs: dict[str, Any] = {"rope_interpolation_scale": (8 / fps, 32, 32)}
    if causal:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline as Pipeline

        coordinates = Pipeline._scale_video_ids(Pipeline._prepare_video_ids(len(x), f, h, w)).float()
        coordinates[:, 0] = coordinates[:, 0] * (1.0 / fps)
        kwargs = {"video_coords": coordinates}
    velocity = model(
        hidden_states=x.unflatten(1, (4, tokens)).mT,
        encoder_hidden_states=text,
        timestep=times if layout.cuts else times[:, 0],
        encoder_attention_mask=torch.arange(text.shape[1]) < lengths[:, None],
        num_frames=f,
        height=h,
        width=w,
        return_dict=False,
        **kwargs,
    )[0]
    return velocity.mT.flatten(1)


def laid_out(model: LtxModel, shape: tuple[int, ...], *, first_given: bool = False) -> StreamLayout:
    layout = model.layout(shape)
    return layout.cut([[1]]) if first_given else layout


def held_first(given: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same inputs with the first time group at t = 0."""
    x, timesteps, text, lengths = given
    return x, torch.cat([torch.zeros(len(x), 1), timesteps[:, 1:]], dim=1), text, lengths


@pytest.mark.parametrize("sizes", [{}, WIDER], ids=["one-pair-left", "two-pairs-left"])
@pytest.mark.parametrize("causal", [False, True], ids=["0.9.0", "from-0.9.5"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_one_stream_equals_diffusers(shape: tuple[int, ...], causal: bool, sizes: dict[str, int]) -> None:
    model = published(**sizes)
    ours = with_weights_of(model, causal_temporal_positioning=causal, fps=FPS, **sizes)
    layout = laid_out(ours, shape)
    given = inputs(layout)
    expected = theirs_of(model, layout, given, causal=causal)
    torch.testing.assert_close(ours(*given, layout=layout), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_first_frame_with_a_time_of_its_own_equals_diffusers(causal: bool) -> None:
    model = published()
    ours = with_weights_of(model, causal_temporal_positioning=causal)
    layout = laid_out(ours, SHAPES[1], first_given=True)
    given = held_first(inputs(layout))
    expected = theirs_of(model, layout, given, causal=causal)
    torch.testing.assert_close(ours(*given, layout=layout), expected, atol=1e-5, rtol=1e-5)
    whole = laid_out(ours, SHAPES[1])
    one_time = given[0], given[1][:, 1:], *given[2:]
    assert (ours(*one_time, layout=whole) - expected).abs().max() > 1e-3  # the twin that does not hold the frame


@pytest.mark.parametrize("first_given", [False, True])
def test_gradients_equal_diffusers(first_given: bool) -> None:
    model = published()
    ours = with_weights_of(model)
    layout = laid_out(ours, SHAPES[1], first_given=first_given)
    given = held_first(inputs(layout)) if first_given else inputs(layout)
    expected, found = theirs_of(model, layout, given), ours(*given, layout=layout)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    parameters = dict(model.named_parameters())
    for name, stored in NAMES.internal_names(parameters).items():
        theirs, mine = parameters[stored].grad, ours.get_parameter(name).grad
        assert theirs is not None and mine is not None and theirs.any(), name
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.attn1.k_norm.weight",
        "blocks.0.attn2.q_norm.weight",
        "blocks.0.scale_shift_table",
        "blocks.1.ff.2.bias",
        "blocks.1.attn2.to_out.weight",
        "embed.adaln_single.linear.weight",
        "embed.caption_projection.linear_1.weight",
        "head.scale_shift_table",
    ],
)
@torch.no_grad()
def test_one_moved_parameter_is_seen(name: str) -> None:
    model = published()
    ours = with_weights_of(model)
    ours.get_parameter(name)[..., 0] += 0.03
    layout = laid_out(ours, SHAPES[1])
    given = inputs(layout)
    assert (ours(*given, layout=layout) - theirs_of(model, layout, given)).abs().max() > 1e-4


@torch.no_grad()
def test_padding_is_not_attended() -> None:
    """The twin shows that text within the length is."""
    model = ltx()
    layout = laid_out(model, SHAPES[1])
    x, timesteps, text, lengths = inputs(layout)
    before = model(x, timesteps, text, lengths, layout=layout)
    text[0, 7:] = 99
    assert torch.equal(model(x, timesteps, text, lengths, layout=layout), before)
    text[0, 6] = 99
    assert (model(x, timesteps, text, lengths, layout=layout) - before)[0].abs().max() > 1e-2


@torch.no_grad()
def test_positions_are_in_seconds() -> None:
    model, slower = ltx(fps=24.0), ltx(fps=12.0)
    layout = laid_out(model, SHAPES[1])
    given = inputs(layout)
    assert (model(*given, layout=layout) - slower(*given, layout=layout)).abs().max() > 1e-3
    still = laid_out(model, SHAPES[0])
    given = inputs(still)
    assert torch.equal(model(*given, layout=still), slower(*given, layout=still))  # the first frame is at 0 s


def test_a_token_begins_where_its_pixels_do() -> None:
    cpu = torch.device("cpu")
    places = positions_in_pixels(Segment(0, (1, 3, 2, 2), (1, 1, 1)), fps=8.0, causal=True, device=cpu).view(3, 2, 2, 3)
    assert places[:, 0, 0, 0].tolist() == [0.0, 1 / 8, 9 / 8]
    assert places[0, :, 0, 1].tolist() == [0.0, 32.0] and places[0, 0, :, 2].tolist() == [0.0, 32.0]
    plain = positions_in_pixels(Segment(0, (1, 3, 2, 2), (1, 1, 1)), fps=8.0, causal=False, device=cpu).view(3, 2, 2, 3)
    assert plain[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    last = Segment(0, (1, 1, 2, 2), (1, 1, 1), beside=Beside(0, LAST, (2.0,)))
    ends = [positions_in_pixels(last, fps=8.0, causal=causal, device=cpu)[0, 0].item() for causal in (True, False)]
    assert ends == [16 / 8, 2.0 + 7 / 8]  # where the last of the clip's 17 or 24 frames begins
    half = positions_in_pixels(Segment(1, (1, 3, 1, 1), (1, 1, 1), scale=2), fps=8.0, causal=True, device=cpu)
    assert half[:, 1:].tolist() == [[16.0, 16.0]] * 3  # half a cell on, in the middle of the two that it covers
    table = rope_table(places.flatten(0, 2), 32)
    assert table.shape == (12, 16, 2) and torch.equal(table[:, 0], torch.tensor([1.0, 0.0]).expand(12, 2))


def test_positions_are_kept_for_a_few_layouts() -> None:
    model, cpu = ltx(), torch.device("cpu")
    first = model.positions(model.layout(SHAPES[0]), cpu).rope
    assert model.positions(model.layout(SHAPES[0]), cpu).rope is first
    for shape in SHAPES[1:]:
        model.positions(model.layout(shape), cpu)
    assert model.positions(model.layout(SHAPES[0]), cpu).rope is not first
    model.rebuild_buffers()
    assert not model._ropes


@pytest.mark.parametrize("streams", [1, 2])
def test_two_stages_equal_the_whole_bit_for_bit(streams: int) -> None:
    whole, first, last = (ltx(streams) for _ in range(3))
    first.keep(embed=True, blocks=[0], head=False)
    last.keep(embed=False, blocks=[1], head=True)
    layout = whole.layout((4, 2, 4, 6)).cut([[1], *[[]] * (streams - 1)])
    given = inputs(layout)
    expected, flow = whole(*given, layout=layout), first(*given, layout=layout)
    assert type(flow) is tuple
    for part, meta in zip(flow, whole.flow_meta(layout, 2, torch.float32), strict=True):
        assert (part.shape, part.dtype) == (meta.shape, meta.dtype)
    found = last(*flow, layout=layout)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: p.grad for model in (first, last) for name, p in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        grad = grads.pop(name)
        assert grad is not None and parameter.grad is not None and torch.equal(grad, parameter.grad), name
    assert not grads


def test_the_islands_stay_in_fp32() -> None:
    model = ltx(2)
    apply_dtypes(model, torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    thin = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert all(
        "norm" in name or "scale_shift_table" in name or "adaln" in name or "patchify" in name or "proj_out" in name
        for name in thin - {"embed.stream_embedding.seg"}
    )
    assert kinds["blocks.0.attn1.to_q.weight"] == kinds["embed.caption_projection.linear_1.bias"] == torch.bfloat16
    assert kinds["blocks.1.ff.2.weight"] == torch.bfloat16 and "blocks.0.attn2.k_norm.weight" in thin
    layout = model.layout(SHAPES[1])
    given = inputs(layout)
    found = model(*given, layout=layout)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ltx(2)(*given, layout=layout), atol=0.1, rtol=0.1)


def test_it_builds_on_meta_and_fills_later() -> None:
    with torch.device("meta"):
        model = LtxModel(LtxConfig(), streams=("rgb", "seg"))
    assert sum(p.numel() for p in model.parameters()) == 1_923_385_472 + 2048  # the published 2B and one embedding
    small = ltx()
    with torch.device("meta"):
        filled = LtxModel(small.config, streams=("rgb",))
    filled.to_empty(device="cpu")
    filled.rebuild_buffers()
    filled.load_state_dict(small.state_dict())
    layout = small.layout(SHAPES[1])
    given = inputs(layout)
    assert torch.equal(filled(*given, layout=layout), small(*given, layout=layout))
