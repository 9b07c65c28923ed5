"""Where RGB sees itself alone and the adapter leaves it alone, it runs forward only, and nothing else changes."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.bytes_held import kept_for_backward
from tests.support.families.cases import CASES, Case, inputs
from tests.support.models import move
from transpixeler.config.sections import LoraConfig
from transpixeler.models.backbone import Backbone, Block
from transpixeler.models.costs import Costs, step_flops
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.shard import set_recompute

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MODES = ["none", "full", "attention", "offload", 2]


def adapted(case: Case, streams: int = 3, *, attends: bool = False, scope: str = "aux") -> Backbone:
    model = case.model(streams, attends=attends)
    inject(model, LoraConfig(rank=4, scope=scope))
    move(model, seed=1, names="lora")
    move(model, seed=2, names="stream")
    return model


def slow_twin(model: Backbone) -> Backbone:
    """Return a copy that takes RGB through the backward pass, as where the adapter acts on it."""
    twin = copy.deepcopy(model)
    twin.rgb_forward_only = False
    return twin


def cut(model: Backbone, case: Case) -> StreamLayout:
    """Lay out streams whose first frames have a time of their own, and RGB's last frame as tokens of its own."""
    layout = model.layout(case.shapes[1])
    return layout.cut([[model.patch[0]], [], []][: len(layout.names)]).with_lasts([0])


def train(model: Backbone, layout: StreamLayout, mode: str | int = "none", steps: int = 2) -> list[torch.Tensor]:
    """Take steps of SGD; return predictions and what was learned."""
    set_recompute(model.block_list(), mode)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=0.01), []
    for step in range(steps):
        out = model(*inputs(model, layout, seed=step), layout=layout)
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.detach())
    return found + [parameter.detach() for parameter in trained]


def train_both(model: Backbone, case: Case, mode: str | int = "none") -> list[torch.Tensor]:
    """Train on one layout and then on another; return what each led to."""
    layouts = model.layout(case.shapes[0]), cut(model, case)
    return [tensor.clone() for layout in layouts for tensor in train(model, layout, mode)]


@cache
def learned_slowly(name: str) -> list[torch.Tensor]:
    """Return what the twin learns, which does not depend on what is recomputed."""
    return train_both(slow_twin(adapted(CASES[name])), CASES[name])


@every_family
@pytest.mark.parametrize("mode", MODES)
def test_what_is_learned_is_what_the_slow_way_learns(case: Case, mode: str | int) -> None:
    """To the bit, but where text flows: there one matmul takes RGB's vectors without the others'."""
    model, text_flows = adapted(case), case.text_flows()
    assert model.rgb_forward_only
    for mine, other in zip(train_both(model, case, mode), learned_slowly(case.name), strict=True):
        if text_flows:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(mine, other)


@every_family
def test_a_companion_of_half_the_size_learns_the_same(case: Case) -> None:
    model = adapted(case, 2)
    (channels, frames, height, width), slow = case.shapes[1], slow_twin(model)
    if height % (2 * model.patch[1]) or width % (2 * model.patch[2]):
        width = height = 4 * model.patch[1]
    shapes = (channels, frames, height, width), (channels, frames, height // 2, width // 2)
    layout = StreamLayout(tuple(model.streams), shapes, model.patch, scales=(1, 2))
    for mine, other in zip(train(model, layout), train(slow, layout), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@every_family
def test_only_an_adapter_that_leaves_rgb_alone_lets_it_run_forward_only(case: Case) -> None:
    assert not adapted(case, scope="all").rgb_forward_only
    assert not adapted(case, attends=True).rgb_forward_only
    mixed = case.model(2, attends=False)
    pattern = mixed.lora_targets[0]
    inject(mixed, LoraConfig(rank=4), scopes={pattern: "all"})
    assert not mixed.rgb_forward_only
    assert not case.model(2, attends=False).rgb_forward_only  # a base that trains whole


OPS = torch.ops.aten
COUNTED = {
    OPS.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2],
    OPS._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q.numel() * k[2],
    OPS._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 10 * q.numel() * k[2],
}


def multiplied(model: Backbone, layout: StreamLayout, mode: str | int) -> float:
    """Return torch's count of a step's FLOPs."""
    set_recompute(model.block_list(), mode)
    args = inputs(model, layout, batch=1, full=True)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(*args, layout=layout).square().sum().backward()
    return counter.get_total_flops()


@every_family
@pytest.mark.parametrize("mode", ["none", "full", "attention"])
def test_a_step_multiplies_what_the_sum_says(case: Case, mode: str) -> None:
    """And a quarter less than the slow way: no gradient of RGB is computed, nothing of it is recomputed but keys."""
    model = adapted(case, 2)
    layout = model.layout(case.large)
    found = multiplied(model, layout, mode)
    assert found == pytest.approx(step_flops(Costs.of(model, kept=False), layout.lengths, recompute=mode), rel=0.01)
    assert found < 0.78 * multiplied(slow_twin(model), layout, mode)


def kept(model: Backbone, layout: StreamLayout, mode: str | int) -> int:
    """Return the bytes of what a forward pass keeps for the backward one, without weights."""
    set_recompute(model.block_list(), mode)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with kept_for_backward() as sizes:
        model(*inputs(model, layout, batch=1, full=True), layout=layout)
    return sum(size for key, size in sizes.items() if key not in weights)


@every_family
@pytest.mark.parametrize("mode", ["none", "full"])
def test_nothing_of_rgb_is_kept_but_its_keys_or_what_makes_them(case: Case, mode: str) -> None:
    model = adapted(case, 2)
    layout = model.layout(case.large)
    mine, slow = kept(model, layout, mode), kept(slow_twin(model), layout, mode)
    assert mine < {"none": 0.7, "full": 1.01}[mode] * slow
    if mode == "none":
        said = sum(one.eager.bytes(layout.lengths) for one in Costs.of(model).kept)
        assert said == pytest.approx(mine, rel=0.1)  # beside the blocks there are the ends


def test_a_compiled_block_does_the_same_in_one_graph() -> None:
    model = adapted(CASES["wan"], 2)
    layout = model.layout(CASES["wan"].shapes[1])
    eager = train(copy.deepcopy(model), layout, "attention", steps=2)
    model.block_list()[1].compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for mine, other in zip(train(model, layout, "attention", steps=2), eager, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_rgb_has_no_gradient_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a block returns of it needs none, and the twin's does."""
    model = adapted(CASES["toy"], 2)
    layout, wanted = model.layout(CASES["toy"].large), []
    forward = Block.forward

    def watched(block: Block, flow, tokens):
        out = forward(block, flow, tokens)
        wanted.append([x.requires_grad for x in out])
        return out

    monkeypatch.setattr(Block, "forward", watched)
    model(*inputs(model, layout), layout=layout)
    assert wanted == [[True, False, False, False, False]] * 4
