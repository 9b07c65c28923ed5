"""Inputs of blocks wait in host memory within a budget: the same to the bit, in order, no byte more than allowed."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.conformance.test_layouts import (
    Result,
    _train_all,
    assert_no_bit_differs,
    difference,
    layout,
    train,
)
from tests.support.families.cases import CASES, STREAMS
from tests.support.ranks import run_ranks
from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.models.backbone import Backbone, Compute, Flow
from transpixeler.models.streams import StreamLayout
from transpixeler.models.tokens import Tokens
from transpixeler.parallel import hosted, shard
from transpixeler.parallel.hosted import HostInputs

SOME = "parallel.host_gb=0.00001"  # room for the inputs of some of the four tiny blocks
WAYS = {
    "one": (1, layout(1, 1, 1)),
    "stages": (2, (*layout(2, 1, 1), "parallel.schedule=1f1b")),
    "blind": (1, (*layout(1, 1, 1), "model.rgb_attends_aux=false")),
}


@cache
def results(name: str, ranks: int) -> dict[str, Result]:
    runs: dict[str, tuple[str, ...]] = {}
    for way, (count, overrides) in WAYS.items():
        if count == ranks:
            runs[f"{way} full"] = (*overrides, "parallel.recompute=full")
            runs[f"{way} some"] = (*overrides, "parallel.recompute=offload", SOME)
    return train(ranks, name, runs, steps=2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["wan", "toy"])
def test_inputs_that_wait_elsewhere_change_no_bit(name: str, way: str) -> None:
    ranks, _ = WAYS[way]
    assert_no_bit_differs(results(name, ranks)[f"{way} some"], results(name, ranks)[f"{way} full"])


def _compiled(rank: int, world_size: int, runs: dict[str, tuple[str, ...]], backend: str) -> dict[str, Result]:
    """Train a step with graphs that nothing may break."""
    compile_ = torch.compile
    torch.compile = lambda function, **how: compile_(function, backend=backend, fullgraph=True, **how)
    return _train_all(rank, world_size, "wan", runs, "", 1)


@cache
def plain(way: str) -> Result:
    """Return what a step learns without graphs."""
    return train(1, "wan", {"": (*WAYS[way][1], "parallel.recompute=full")}, steps=1)[""]


@pytest.mark.parametrize("way", ["one", "blind"])
def test_graphs_whose_inputs_wait_elsewhere_give_the_same_but_for_rounding(way: str) -> None:
    graphs = (*WAYS[way][1], "parallel.compile=on")
    runs = {"full": (*graphs, "parallel.recompute=full"), "some": (*graphs, "parallel.recompute=offload", SOME)}
    (found,) = run_ranks(_compiled, 1, runs, "eager")
    assert max(difference(found["some"], found["full"]), difference(found["some"], plain(way))) < 1e-6


def test_graphs_that_are_differentiated_whole_give_the_same_but_for_rounding() -> None:
    runs = {"some": (*WAYS["one"][1], "parallel.recompute=offload", SOME, "parallel.compile=on")}
    (found,) = run_ranks(_compiled, 1, runs, "aot_eager")
    assert difference(found["some"], plain("one")) < 1e-6


def run(model: Backbone, laid: StreamLayout, host: HostInputs) -> Flow:
    """Run a model's blocks forward, their inputs in host memory."""
    shard.set_recompute(model.block_list(), "offload", host)
    flow = tuple(
        torch.randn(t.shape).to(t.dtype) if t.is_floating_point() else torch.full(t.shape, 512, dtype=t.dtype)
        for t in model.divided(model.flow_meta(laid, 2, torch.float32), laid)
    )
    flow = tuple(t.requires_grad_(place < model.differentiated) for place, t in enumerate(flow))
    tokens = model.tokens(laid, flow[0].device)
    for block in model.block_list():
        flow = block(flow, tokens)
    return flow


def backward(model: Backbone, flow: Flow) -> None:
    sum((t.float().sum() for t in flow[: model.block_list()[0].carried]), torch.zeros(())).backward()
    gc.collect()


def wan(shape: int = 1) -> tuple[Backbone, StreamLayout, int]:
    """Return a model, a layout, and the bytes that one block's input takes."""
    case = CASES["wan"]
    model = case.make(streams=STREAMS[:2], rgb_attends_aux=True)
    laid = StreamLayout.equal(STREAMS[:2], case.shapes[shape], model.patch)
    return model, laid, hosted.taken(2 * laid.tokens * model.width * 4)


@pytest.mark.parametrize("blocks", [0, 1, 3, 4])
def test_as_many_inputs_leave_as_fit(blocks: int) -> None:
    model, laid, size = wan()
    host = HostInputs((blocks + 0.5) * size)
    flow = run(model, laid, host)
    assert (host.moved, host.stayed) == (blocks, len(model.block_list()) - blocks)
    assert host.pinned == blocks * size
    backward(model, flow)


def test_memory_is_used_again_and_given_to_another_length_of_clips() -> None:
    model, laid, size = wan()
    host = HostInputs(2.5 * size)
    for _ in range(3):
        flow = run(model, laid, host)
        backward(model, flow)
        del flow
    assert (host.moved, host.pinned) == (6, 2 * size)
    _, other, small = wan(0)
    assert small != size
    flow = run(model, other, host)
    assert host.pinned <= 2.5 * size and host.pinned % small == 0 and host.pinned >= small
    backward(model, flow)


def test_two_forward_passes_at_once_do_not_share_memory() -> None:
    """As a pipeline's microbatches are; a backward pass in another order than the last forward pass is right too."""
    model, laid, size = wan()
    host, plain = HostInputs(), {}
    torch.manual_seed(0)
    first, second = run(model, laid, host), run(model, laid, host)
    assert host.pinned == 2 * len(model.block_list()) * size
    for flow in (first, second):
        backward(model, flow)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(0)
    for flow in (run(model, laid, HostInputs(0)), run(model, laid, HostInputs(0))):
        backward(model, flow)
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == plain.keys() and found
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_the_inputs_of_the_block_before_come_back_while_a_block_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, laid, _ = wan()
    host, told = HostInputs(), []
    numbers: dict[int, int] = {}
    real, flat = HostInputs._bring, hosted.flat

    def bring(self: HostInputs, part: Any) -> None:
        if part.there is None:
            told.append(("copy", numbers.setdefault(id(part), len(model.block_list()) - 1 - len(numbers))))
        real(self, part)

    def watched(compute: Compute, tokens: Tokens) -> Any:
        place = next(n for n, block in enumerate(model.block_list()) if block is compute.compute.__self__)  # type: ignore[attr-defined]
        inner = flat(compute, tokens)

        def run_(*flow: Tensor) -> Flow:
            if torch.is_grad_enabled() and backwards:
                told.append(("compute", place))
            return inner(*flow)

        return run_

    backwards: list[bool] = []
    monkeypatch.setattr(HostInputs, "_bring", bring)
    monkeypatch.setattr(hosted, "flat", watched)
    flow = run(model, laid, host)
    backwards.append(True)
    backward(model, flow)
    wanted = [("copy", 3), ("copy", 2), ("compute", 3), ("copy", 1), ("compute", 2), ("copy", 0), ("compute", 1)]
    assert told == [*wanted, ("compute", 0)]


def test_a_budget_of_nothing_that_moves_is_told() -> None:
    parallel = loading.from_overrides(["parallel.host_gb=8", "parallel.recompute=full"]).parallel
    with pytest.raises(UserError, match=r"parallel.host_gb: 8 is for .* it is full; set recompute=offload"):
        shard.recompute_mode(parallel, torch.device("cpu"))
