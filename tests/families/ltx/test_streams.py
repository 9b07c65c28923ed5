"""LTX-Video over several streams: what an untrained adapter leaves as it is, and what a trained one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.families.ltx.tiny import base_of, inputs, ltx, without_embeddings
from tests.support.models import move
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.ltx.model import LtxModel
from transpixeler.models.costs import Costs, forward_flops
from transpixeler.models.lora import adapter_parameters, inject
from transpixeler.models.streams import StreamLayout

SHAPE = (4, 3, 4, 2)


def alike(layout: StreamLayout, single: StreamLayout) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs in which all streams of `layout` have the same latents and times, and those of one stream alone."""
    x, timesteps, text, lengths = inputs(single)
    streams = len(layout.names)
    return (x.repeat(1, streams), timesteps.repeat(1, streams), text, lengths), (x, timesteps, text, lengths)


@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("cut", [False, True], ids=["one-time", "first-frame-given"])
@torch.no_grad()
def test_equal_streams_each_give_what_the_base_gives(streams: int, cut: bool) -> None:
    """The twins: an adapter that acts, and a stream embedding that is not zero."""
    joint = ltx(streams)
    base = base_of(joint)
    inject(without_embeddings(joint), LoraConfig(rank=3))
    layout, single = joint.layout(SHAPE), base.layout(SHAPE)
    if cut:
        layout, single = layout.cut([[1]] * streams), single.cut([[1]])
    together, alone = alike(layout, single)
    expected = base(*alone, layout=single)
    for velocity in joint(*together, layout=layout).split(single.elements, dim=1):
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    for names in (".lora_B", "stream_embedding"):
        move(joint, seed=1, names=names)
        moved = joint(*together, layout=layout).split(single.elements, dim=1)
        assert all((velocity - expected).abs().max() > 1e-3 for velocity in moved)
        for name, parameter in joint.named_parameters():
            if names in name:
                parameter.zero_()


@torch.no_grad()
def test_rgb_that_does_not_see_its_companions_is_the_bases_under_any_adapter() -> None:
    """The twin is the same adapter where RGB sees them."""
    blind, seeing = (ltx(2, attends=attends) for attends in (False, True))
    for model in (blind, seeing):
        inject(model, LoraConfig(rank=3, scope="aux"))
        move(model, seed=1, names=".lora_")
        move(model, seed=2, names="stream_embedding")
    base = base_of(blind)
    layout, single = blind.layout(SHAPE), base.layout(SHAPE)
    x, timesteps, text, lengths = inputs(layout)
    first = slice(0, single.elements)
    expected = base(x[:, first], timesteps[:, :1], text, lengths, layout=single)
    found = blind(x, timesteps, text, lengths, layout=layout)
    torch.testing.assert_close(found[:, first], expected, atol=1e-5, rtol=1e-5)
    assert (seeing(x, timesteps, text, lengths, layout=layout)[:, first] - expected).abs().max() > 1e-3
    assert (found[:, single.elements :] - expected).abs().max() > 1e-2


def test_an_adapter_trains_on_every_default_target_and_nothing_else() -> None:
    model = ltx(2)
    names = inject(model, LoraConfig(rank=3))
    move(model, seed=1, names=".lora_")
    layout = model.layout(SHAPE)
    model(*inputs(layout), layout=layout).square().sum().backward()
    targets = {name.split(".", 2)[2].rpartition(".")[0] for name in names if name.startswith("blocks.0.")}
    assert targets == set(LtxModel.lora_targets) and "attn2.to_k" not in targets
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(names) == set(adapter_parameters(model))
    assert all(model.get_parameter(name).grad.any() for name in names)  # type: ignore[union-attr]


def test_a_linear_that_reads_the_text_belongs_to_no_stream() -> None:
    with pytest.raises(UserError, match=r"attn2\.to_k acts on the text"):
        inject(ltx(2), LoraConfig(rank=3, targets=("attn2.to_k",)))
    inject(ltx(2), LoraConfig(rank=3, targets=("attn2.to_k",), scope="all"))


def test_recomputing_changes_no_bit_of_any_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    grads = []
    for recompute in (None, lambda compute, *args: checkpoint(compute, *args, use_reentrant=False)):
        model = ltx(2)
        inject(model, LoraConfig(rank=3))
        move(model, seed=1, names=".lora_")
        for block in model.blocks.values():
            block.recompute = recompute  # type: ignore[assignment]
        layout = model.layout(SHAPE)
        model(*inputs(layout), layout=layout).square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in adapter_parameters(model).items()})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_costs_count_each_matmul_once() -> None:
    model = ltx(2)
    layout = model.layout(SHAPE)
    tokens, width, text, blocks = layout.tokens, 32, 128, 2
    streams = tokens * width * (6 * width + 8 * width) * blocks + tokens * width * 4 * 2
    words = text * (2 * width * width * blocks + 24 * width + width * width)
    flops = forward_flops(Costs.of(model, kept=False), layout.lengths)
    assert flops.linear == 2 * (streams + words)
    assert flops.attention == 4 * width * blocks * (tokens * tokens + tokens * text)


def test_a_block_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = ltx(2)
    layout = model.layout(SHAPE)
    given = inputs(layout)
    expected = model(*given, layout=layout)
    for block in model.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(*given, layout=layout), expected, atol=1e-5, rtol=1e-5)
