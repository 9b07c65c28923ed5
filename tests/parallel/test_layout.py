"""Losses, gradients and parameters are the same on any layout, and what would make them differ is caught."""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.support import tiny
from tests.support.ranks import run_ranks
from transpixeler.config.sections import UserError
from transpixeler.flow import objective
from transpixeler.models.backbone import QKV, Block, Flow
from transpixeler.models.costs import Costs
from transpixeler.models.tokens import Tokens
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import pipeline, runtime, shard
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.stage import Stage
from transpixeler.training import optim

STEPS = 10
FEW = 3  # in which a broken twin is caught already, and the first bucket comes again after the second
BASE = ("train.global_batch=4", "train.micro_batch=1", "parallel.recompute=none", "seed=3")
FULL = ("lora.enabled=false",)
BLIND = ("model.rgb_attends_aux=false",)
MUON = (*FULL, "optim.name=muon", "optim.lr=1e-3")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _train(rank: int, world_size: int, overrides: tuple[str, ...], twin: str, steps: int = STEPS) -> dict[str, Any]:
    """SGD steps; a twin is broken in one named way."""
    config = tiny.config(*BASE, *overrides)
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    layout = meshes.resolve(config.parallel, world_size)
    mesh = meshes.build(layout, here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    optimizer = optim.build(trained, config.optim, mesh.data_group)
    share = config.train.global_batch // layout.data
    first = 0 if twin == "duplicated data" else mesh.data_rank * share
    losses = []
    for step in range(steps):
        example = tiny.example(config, step, range(first, first + share))
        if twin == "one stage's noise" and mesh.is_last_stage:
            example = objective.Example(**{**example.__dict__, "noise": example.noise.roll(1, 0)})
        errors = engine.forward_backward(example, config.train.micro_batch)
        loss = (errors * example.weights).sum() * (mesh.context_rank == 0)
        torch.distributed.all_reduce(loss, group=mesh.data_group)
        norm = optim.gradient_norm(trained.values(), mesh.pipeline_group, here.device)
        if twin == "gradient scale":
            for parameter in trained.values():
                parameter.grad.mul_(1 / layout.data)
        optim.clip(trained.values(), config.optim.clip, norm)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        losses.append((float(loss), float(norm)))
    return {"losses": losses, "parameters": {name: _whole(p) for name, p in trained.items()}}


def train(world_size: int, *overrides: str, twin: str = "", steps: int = STEPS) -> dict[str, Any]:
    results = run_ranks(_train, world_size, overrides, twin, steps)
    parameters: dict[str, torch.Tensor] = {}
    for result in results:
        assert result["losses"] == results[0]["losses"], "ranks disagree about the loss"
        parameters |= result["parameters"]
    return {"losses": results[0]["losses"], "parameters": parameters}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest over losses, norms and parameters; of what is above 1, its share."""
    assert one["parameters"].keys() == other["parameters"].keys()
    pairs = [(torch.tensor(one["losses"]), torch.tensor(other["losses"]))]
    pairs += [(tensor, other["parameters"][name]) for name, tensor in one["parameters"].items()]
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def reference() -> Callable[..., dict[str, Any]]:
    made: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}

    def get(*overrides: str, steps: int = STEPS) -> dict[str, Any]:
        if (steps, overrides) not in made:
            made[steps, overrides] = train(1, *overrides, steps=steps)
        return made[steps, overrides]

    return get


def layout(pipeline: int, replicate: int, shard: int) -> tuple[str, ...]:
    return (f"parallel.pipeline={pipeline}", f"parallel.replicate={replicate}", f"parallel.shard={shard}")


LAYOUTS = {
    "(2,1,1)": (2, layout(2, 1, 1)),
    "(1,2,1)": (2, layout(1, 2, 1)),
    "(1,1,2)": (2, layout(1, 1, 2)),
    "(2,1,2)": (4, layout(2, 1, 2)),
    "(2,2,1)": (4, layout(2, 2, 1)),
    "(1,2,2)": (4, layout(1, 2, 2)),
    "(4,1,1)": (4, layout(4, 1, 1)),
    "(2,1,1) gpipe": (2, (*layout(2, 1, 1), "parallel.schedule=gpipe")),
    "(2,1,1) interleaved": (2, (*layout(2, 1, 1), "parallel.schedule=interleaved-1f1b")),
    "(2,1,2) interleaved": (4, (*layout(2, 1, 2), "parallel.schedule=interleaved-1f1b")),
    "(2,1,1) zero bubble": (2, (*layout(2, 1, 1), "parallel.schedule=interleaved-zero-bubble")),
    "(3,1,1) split by hand": (3, (*layout(3, 1, 1), "parallel.split=[1,1,2]")),
    "offload": (1, ("parallel.offload=true",)),
    "(2,1,2) offload": (4, (*layout(2, 1, 2), "parallel.offload=true")),
    "(2,1,1) offload": (
        2,
        (*layout(2, 1, 1), "parallel.offload=true", "parallel.schedule=interleaved-1f1b"),
    ),
}


OLD = torch.__version__ < shard.SPLITS_BACKWARD  # which refuses zero bubble


def names(*given: str) -> list[str]:
    """Return the names of the layouts that this torch runs."""
    return [name for name in given if not (OLD and "zero bubble" in name)]


@pytest.mark.parametrize("name", names(*LAYOUTS))
def test_ten_steps_are_the_same_on_any_layout(reference: Callable[..., dict[str, Any]], name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    assert difference(train(world_size, *overrides), reference()) < 1e-6


@pytest.mark.parametrize(  # stages and shards together with each mode; shards alone with the two that differ most
    ("name", "mode"),
    [
        *(("(2,1,2)", mode) for mode in ("full", "attention", "offload", "2")),
        ("(1,1,2)", "full"),
        ("(1,1,2)", "offload"),
    ],
)
def test_steps_are_the_same_whatever_is_recomputed(
    reference: Callable[..., dict[str, Any]], name: str, mode: str
) -> None:
    world_size, overrides = LAYOUTS[name]
    found = train(world_size, *overrides, f"parallel.recompute={mode}", steps=FEW)
    assert difference(found, reference(steps=FEW)) < 1e-6


@pytest.mark.parametrize(
    "name", names("(1,2,1)", "(2,1,2)", "(2,1,1) interleaved", "(2,1,1) zero bubble", "(4,1,1)", "(2,1,1) offload")
)
def test_full_fine_tuning_is_the_same_on_any_layout(reference: Callable[..., dict[str, Any]], name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    assert difference(train(world_size, *overrides, *FULL, steps=FEW), reference(*FULL, steps=FEW)) < 1e-6


@pytest.mark.parametrize("name", names("(2,1,1) interleaved", "(2,1,1) zero bubble", "(4,1,1)", "(2,1,1) offload"))
def test_rgb_that_runs_forward_only_is_the_same_on_any_layout(
    reference: Callable[..., dict[str, Any]], name: str
) -> None:
    world_size, overrides = LAYOUTS[name]
    assert difference(train(world_size, *overrides, *BLIND, steps=FEW), reference(*BLIND, steps=FEW)) < 1e-6


@pytest.mark.parametrize("name", ["(1,2,1)", "(2,1,2)", "(1,2,2)"])
def test_orthogonal_steps_are_the_same_on_any_layout(reference: Callable[..., dict[str, Any]], name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    assert difference(train(world_size, *overrides, *MUON, steps=FEW), reference(*MUON, steps=FEW)) < 1e-6


def test_orthogonal_steps_of_doubled_samples_are_caught(reference: Callable[..., dict[str, Any]]) -> None:
    world_size, overrides = LAYOUTS["(1,2,1)"]
    doubled = train(world_size, *overrides, *MUON, twin="duplicated data", steps=FEW)
    assert difference(doubled, reference(*MUON, steps=FEW)) > 1e-4


def test_the_size_of_a_microbatch_does_not_matter(reference: Callable[..., dict[str, Any]]) -> None:
    assert difference(train(1, "train.micro_batch=4", steps=FEW), reference(steps=FEW)) < 1e-6


def test_stages_with_nothing_to_train_change_nothing() -> None:
    frozen = (*FULL, "model.trainable=[blocks.2.*]")
    assert difference(train(3, *layout(3, 1, 1), *frozen, steps=FEW), train(1, *frozen, steps=FEW)) < 1e-6


def test_the_parameters_really_move(reference: Callable[..., dict[str, Any]]) -> None:
    other = train(1, "optim.lr=0", steps=1)
    moved = [n for n, p in reference()["parameters"].items() if (p - other["parameters"][n]).abs().max() > 1e-4]
    assert len(moved) == len(other["parameters"]), set(other["parameters"]) - set(moved)


@pytest.mark.parametrize("twin", ["gradient scale", "duplicated data", "one stage's noise"])
def test_a_broken_twin_is_caught(reference: Callable[..., dict[str, Any]], twin: str) -> None:
    """Within a few steps."""
    broken = train(4, *layout(2, 1, 2), "optim.clip=0", twin=twin, steps=FEW)
    assert difference(broken, reference("optim.clip=0", steps=FEW)) > 1e-4


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_what_is_left_open_is_filled_in() -> None:
    parallel = tiny.config("parallel.pipeline=2", "parallel.shard=2").parallel
    assert meshes.resolve(parallel, 8) == meshes.Layout(2, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["parallel.pipeline=3"], 4, r"pipeline 3 × shard 1 = 3 must divide the number of processes, 4"),
        (["parallel.pipeline=2", "parallel.replicate=2"], 2, r"= 4 must equal the number of processes, 2"),
        (["parallel.replicate=0", "parallel.shard=0"], 2, r"set one of them"),
    ],
)
def test_a_misfit_does_the_arithmetic_for_the_user(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        meshes.resolve(tiny.config(*overrides).parallel, world_size)


def blocks(count: int) -> Costs:
    with torch.device("meta"):
        costs = Costs.of(tiny.make(tiny.config()))
    return dataclasses.replace(costs, blocks=costs.blocks[:1] * count, kept=costs.kept[:1] * count)


def test_blocks_are_split_evenly_or_by_hand() -> None:
    even = tiny.config("parallel.pipeline=4").parallel
    assert [len(r) for r in pipeline.split_blocks(even, blocks(30))] == [7, 7, 8, 8]
    by_hand = tiny.config("parallel.pipeline=2", "parallel.split=[10,20]").parallel
    assert pipeline.split_blocks(by_hand, blocks(30)) == [range(10), range(10, 30)]
    with pytest.raises(UserError, match=r"parallel.split: \[10, 20\] must be 2 numbers whose sum is 40"):
        pipeline.split_blocks(by_hand, blocks(40))


def test_stages_cost_the_same_where_blocks_do_not() -> None:
    assert pipeline.balanced_sizes([3, 3, 1, 1, 1, 1], 2) == [2, 4]
    assert pipeline.balanced_sizes([1, 1, 1, 1, 3, 3], 2) == [4, 2]
    for count, stages in ((30, 4), (30, 8), (40, 3), (5, 5)):
        sizes = pipeline.balanced_sizes([7] * count, stages)
        assert sizes == [(count + stage) // stages for stage in range(stages)]
    uneven, halves = blocks(4), tiny.config("parallel.pipeline=2").parallel
    linears = uneven.blocks[0].linears
    dear = uneven.blocks[0]._replace(linears=linears * 1000)
    uneven = dataclasses.replace(uneven, blocks=(dear, *uneven.blocks[1:]))
    assert [len(r) for r in pipeline.split_blocks(halves, uneven)] == [1, 3]


# --- what only shows elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["parallel.recompute=attention", "parallel.compile=on"])
def test_what_a_split_backward_pass_cannot_do_is_told_and_not_chosen(override: str) -> None:
    chosen = ("parallel.pipeline=2", "parallel.schedule=interleaved-zero-bubble")
    gpu, auto = torch.device("cuda", 0), tiny.config(*chosen).parallel
    assert shard.recompute_mode(auto, gpu) == "full" and not shard.wants_compile(auto, gpu)
    refused = tiny.config(*chosen, override).parallel
    with pytest.raises(UserError, match=override.partition("=")[0]):
        shard.recompute_mode(refused, gpu)
        shard.wants_compile(refused, gpu)


class _Doubling(Block):
    def compute(self, flow: Flow, tokens: Tokens) -> Flow:
        return (2 * flow[0] if tokens.kernel.isdigit() else flow[0],)

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        return flow[0], flow[0], flow[0], ()

    def finish(self, flow: Flow, seen: torch.Tensor, others: Flow, tokens: Tokens) -> Flow:
        return (seen,)


def test_a_block_stays_compiled_for_many_buckets_each_with_its_own_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(inputs)
        return graph.forward

    block, compile_ = _Doubling(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **kept: compile_(module, backend=backend, **kept))
    mesh = meshes.Mesh(meshes.Layout(1, 1, 1), torch.device("cpu"), 0, 0, None, None, None)
    shard.wrap(block, [block], tiny.config("parallel.compile=on").parallel, mesh)
    for bucket in range(20):
        lengths = (2, 2 + bucket)
        block((torch.ones(1, 4 + bucket, 2),), Tokens(torch.ones(1), lengths, lengths, str(bucket)))
    assert len(compiled) == 20
    lengths = [[n for tensor in inputs for n in getattr(tensor, "shape", (tensor,))] for inputs in compiled]
    assert all(type(n) is int for graph in lengths for n in graph), lengths


def _inputs_left(rank: int, world_size: int, overrides: tuple[str, ...]) -> list[int]:
    """Of the blocks whose inputs are to wait elsewhere, those whose inputs are still here after a forward pass."""
    config, here = tiny.config(*BASE, *overrides), runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    inputs: list[weakref.ref] = []
    for block in engine.models()[0].blocks.values():
        block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0][0].untyped_storage())))
    example = tiny.example(config, 1, range(1))
    engine.stages[0].layout = example.layout
    gc.disable()  # as training does between its own collections
    errors = engine.stages[0](example.noisy(), *example.inputs, truth=example.target())
    left = [index for index, storage in enumerate(inputs) if storage() is not None]
    errors.sum().backward()
    assert len(inputs) == len(engine.models()[0].blocks)
    return left


@pytest.mark.parametrize("kind", [(), ("parallel.offload=true",)])
def test_inputs_that_wait_in_host_memory_leave_the_device(kind: tuple[str, ...]) -> None:
    assert run_ranks(_inputs_left, 1, ("parallel.recompute=full", *kind)) == [list(range(4))]  # the twin
    assert run_ranks(_inputs_left, 1, ("parallel.recompute=offload", *kind)) == [[]]


def _gathered(rank: int, world_size: int, overrides: tuple[str, ...]) -> int:
    """The most blocks whose weights are whole on the device at a time in a backward pass."""
    config, here = tiny.config(*BASE, *overrides), runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    blocks = [block for model in engine.models() for block in model.blocks.values()]
    found = []
    for block in blocks:
        block.register_full_backward_pre_hook(
            lambda *_: found.append(sum(not isinstance(next(other.parameters()), DTensor) for other in blocks))
        )
    engine.forward_backward(tiny.example(config, 1, range(4)), 1)
    return max(found)


@pytest.mark.parametrize("kind", [(), FULL])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved-1f1b"])
def test_offloaded_blocks_are_gathered_one_at_a_time_in_a_pipeline_too(schedule: str, kind: tuple[str, ...]) -> None:
    overrides = (*layout(2, 1, 1), f"parallel.schedule={schedule}", "parallel.offload=true", *kind)
    assert max(run_ranks(_gathered, 2, overrides)) <= 2  # the one at work and the next


def test_a_schedule_is_given_tensors_alone() -> None:
    """Some look for the gradient of every argument."""
    assert all(run_ranks(_kinds, 2, layout(2, 1, 1)))


def _kinds(rank: int, world_size: int, overrides: tuple[str, ...]) -> bool:
    found: list[Any] = []
    forward = Stage.forward

    def seen(self: Stage, *state: Any, **extra: Any) -> Any:
        found.extend((*state, *extra.values()))
        return forward(self, *state, **extra)

    Stage.forward = seen
    _train(rank, world_size, overrides, "", steps=1)
    return bool(found) and all(isinstance(it, torch.Tensor) for it in found)


def _schedules(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[list[int], list[bool]]:
    """Microbatches of the schedules that an evaluation makes, and which are alive after it: those that train."""
    config, here = tiny.config(*BASE, *overrides), runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    example = tiny.example(config, 1, range(4))
    engine.forward_backward(example, 1)
    gc.disable()  # as training does between its own collections
    with engine.evaluating():
        conditions = example.inputs
        whole = engine.forward(example.noisy(), conditions, example.layout)
        parts = engine.forward(example.noisy(), conditions, example.layout, 1)
        torch.testing.assert_close(parts, whole)
        made = {key: weakref.ref(schedule) for key, schedule in engine._schedules.items()}
    return [key.microbatches for key in made if not key.training], [key.training for key, ref in made.items() if ref()]


@pytest.mark.parametrize("schedule", ["auto", "interleaved-1f1b"])
def test_an_evaluation_keeps_a_few_microbatches_and_leaves_none(schedule: str) -> None:
    for counts, alive in run_ranks(_schedules, 2, (*layout(2, 1, 1), f"parallel.schedule={schedule}")):
        assert max(counts) == 2 and all(alive)


def _warned(rank: int, world_size: int, overrides: tuple[str, ...]) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        _train(rank, world_size, overrides, "", 1)
    return [str(one.message) for one in told]


def test_shards_of_a_whole_model_warn_of_nothing() -> None:
    assert run_ranks(_warned, 2, (*layout(1, 1, 2), *FULL)) == [[], []]
