"""Ranks that share a sequence learn what one does alone; what they exchange and what each keeps is counted."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parallel import test_layout
from tests.parallel.test_communication import FP32, Listening
from tests.parallel.test_layout import BASE, BLIND, FEW, FULL, MUON, STEPS, difference
from tests.support import tiny
from tests.support.bytes_held import BytesHeld
from tests.support.ranks import run_ranks
from transpixeler.config.sections import UserError
from transpixeler.models import context, costs
from transpixeler.models.context import Context, Shared
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime, shard
from transpixeler.parallel.build import build_engine, shape
from transpixeler.parallel.pipeline import Engine


def layout(pipeline: int, replicate: int, shard: int, context: int) -> tuple[str, ...]:
    return (*test_layout.layout(pipeline, replicate, shard), f"parallel.context={context}")


LAYOUTS = {  # by name: ranks, and what is set for it
    "(1,1,1,2)": (2, layout(1, 1, 1, 2)),
    "(1,1,1,4)": (4, layout(1, 1, 1, 4)),
    "(2,1,1,2)": (4, layout(2, 1, 1, 2)),
    "(1,2,1,2)": (4, layout(1, 2, 1, 2)),
    "(1,1,2,2)": (4, layout(1, 1, 2, 2)),
}
MORE = {
    **{f"recompute {how}": (2, (*layout(1, 1, 1, 2), f"parallel.recompute={how}")) for how in ("full", "attention")},
    "inputs wait": (2, (*layout(1, 1, 1, 2), "parallel.recompute=offload")),
    "all weights wait": (2, (*layout(1, 1, 1, 2), "parallel.offload=true")),
    "half of the weights wait": (2, (*layout(1, 1, 1, 2), "parallel.offload=3")),
    "some blocks kept": (2, (*layout(1, 1, 1, 2), "parallel.recompute=full", "parallel.keep_gb=0.0013")),
    "interleaved": (4, (*layout(2, 1, 1, 2), "parallel.schedule=interleaved-1f1b")),
    "zero bubble": (4, (*layout(2, 1, 1, 2), "parallel.schedule=interleaved-zero-bubble")),
}


WAYS = ("none", "attention", "full")  # to recompute

FOUR_HEADS = {"num_attention_heads": 4}  # which up to four ranks share
TWO = "train.global_batch=2"  # samples, of which each replica has one or each stage a microbatch after the other


@pytest.fixture(autouse=True)
def _four_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.WAN, *next(iter(FOUR_HEADS.items())))


def _train(rank: int, world_size: int, runs: dict[str, tuple[str, ...]], twin: str, steps: int) -> dict[str, Any]:
    tiny.WAN |= FOUR_HEADS  # of this process alone
    if twin:
        TWINS[twin](rank)
    return {name: test_layout._train(rank, world_size, (*how, TWO), "", steps) for name, how in runs.items()}


def train(ranks: int, runs: dict[str, tuple[str, ...]], *, twin: str = "", steps: int = STEPS) -> dict[str, Any]:
    """Train once for each of several layouts of the same ranks; put together what the ranks hold."""
    by_rank = run_ranks(_train, ranks, runs, twin, steps)
    results = {}
    for name in runs:
        parts = [found[name] for found in by_rank]
        assert twin or all(part["losses"] == parts[0]["losses"] for part in parts), f"{name}: ranks disagree"
        parameters = {key: value for part in parts for key, value in part["parameters"].items()}
        results[name] = {"losses": parts[0]["losses"], "parameters": parameters}
    return results


@cache
def alone(*overrides: str, steps: int = STEPS) -> dict[str, Any]:
    return train(1, {"alone": overrides}, steps=steps)["alone"]


@cache
def together(kind: tuple[str, ...], ranks: int, steps: int) -> dict[str, Any]:
    runs = {name: (*how, *kind) for name, (count, how) in LAYOUTS.items() if count == ranks}
    return train(ranks, runs, steps=steps)


@pytest.mark.parametrize(("kind", "steps"), [((), STEPS), (FULL, FEW), (BLIND, FEW)], ids=["lora", "full", "blind"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_the_same_where_ranks_share_a_sequence(name: str, kind: tuple[str, ...], steps: int) -> None:
    assert difference(together(kind, LAYOUTS[name][0], steps)[name], alone(*kind, steps=steps)) < 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shared_sequence_goes_with_all_that_saves_memory(ranks: int) -> None:
    runs = {name: how for name, (count, how) in MORE.items() if count == ranks}
    if torch.__version__ < shard.SPLITS_BACKWARD:
        runs.pop("zero bubble", None)  # it is refused
    found = train(ranks, runs, steps=FEW)
    assert max(difference(each, alone(steps=FEW)) for each in found.values()) < 1e-6


def test_orthogonal_steps_are_the_same_where_ranks_share_a_sequence() -> None:
    runs = {name: (*LAYOUTS[name][1], *MUON) for name in ("(1,2,1,2)", "(1,1,2,2)")}
    found = train(4, runs, steps=FEW).values()
    assert max(difference(each, alone(*MUON, steps=FEW)) for each in found) < 1e-6


def _compiled(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train with each block as one graph, which nothing may break."""
    compile_ = nn.Module.compile
    nn.Module.compile = lambda self, **how: compile_(self, backend="aot_eager", fullgraph=True, **how)
    return _train(rank, world_size, {"compiled": (*overrides, "parallel.compile=on")}, "", FEW)["compiled"]


@pytest.mark.skipif(torch.__version__ < shard.SHARED_COMPILE, reason="this torch gives wrong gradients there")
def test_compiled_blocks_exchange_inside_of_one_graph() -> None:
    for found in run_ranks(_compiled, 2, (*layout(1, 1, 1, 2), "parallel.recompute=attention")):
        assert difference(found, alone(steps=FEW)) < 1e-6


def test_a_torch_that_cannot_split_the_backward_pass_is_told_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tiny.config("parallel.pipeline=2", "parallel.schedule=interleaved-zero-bubble").parallel
    monkeypatch.setattr(shard, "SPLITS_BACKWARD", "2.0")
    shard.check_torch(chosen)
    monkeypatch.setattr(shard, "SPLITS_BACKWARD", "99.0")
    with pytest.raises(UserError, match=r"parallel.schedule: interleaved-zero-bubble needs torch 99.0 or newer"):
        shard.check_torch(chosen)
    shard.check_torch(tiny.config("parallel.pipeline=2", "parallel.schedule=interleaved-1f1b").parallel)


def test_a_torch_that_compiles_them_wrongly_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, asked = torch.device("cuda"), ("parallel.context=2", "parallel.compile=on")
    monkeypatch.setattr(shard, "SHARED_COMPILE", "2.0")
    assert shard.wants_compile(tiny.config(*asked).parallel, gpu)
    monkeypatch.setattr(shard, "SHARED_COMPILE", "99.0")
    assert not shard.wants_compile(tiny.config(asked[0]).parallel, gpu)
    assert shard.wants_compile(tiny.config(asked[1]).parallel, gpu)
    with pytest.raises(UserError, match=r"parallel.compile: on does not go with parallel.context=2 .*torch 99.0 or"):
        shard.wants_compile(tiny.config(*asked).parallel, gpu)


def _scaled(rank: int) -> None:
    """Give on the sum of all ranks' equal gradients, as an all-gather's own backward pass would."""
    once = context._Gather.backward
    context._Gather.backward = staticmethod(lambda ctx, grad: (2 * once(ctx, grad)[0], None))


def _shifted(rank: int) -> None:
    """Let rank 1 hold its tokens one place from where it says."""
    cut = Context.cut
    Context.cut = lambda self, x, runs, dim=1: cut(self, x, runs, dim).roll(int(rank == 1 and dim == 1), dim)


def _elsewhere(rank: int) -> None:
    """Take the positions of rank 0's tokens for one's own."""
    cut = Context.cut
    Context.cut = lambda self, x, runs, dim=1: cut(self if dim else replace(self, rank=0), x, runs, dim)


def _apart(rank: int) -> None:
    """Sum gradients over the ranks of other samples alone."""
    build = meshes.build

    def built(layout: meshes.Layout, here: runtime.Runtime) -> meshes.Mesh:
        own = [dist.new_group([each]) for each in range(here.world_size)][here.rank]
        return replace(build(layout, here), data_group=own)

    meshes.build = built


def _other_heads(rank: int) -> None:
    """Send back the heads of another rank's place."""
    back = Shared.to_tokens
    Shared.to_tokens = lambda self, seen: back(self, seen).roll(seen.shape[2], 2)


TWINS: dict[str, Callable[[int], None]] = {
    "gradient scale": _scaled,
    "shifted tokens": _shifted,
    "another's positions": _elsewhere,
    "gradients not summed": _apart,
    "another's heads": _other_heads,
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_exchange_is_caught(twin: str) -> None:
    """Within a few steps."""
    broken = train(2, {"broken": (*layout(1, 1, 1, 2), "optim.clip=0")}, twin=twin, steps=FEW)["broken"]
    assert difference(broken, alone("optim.clip=0", steps=FEW)) > 1e-4


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_of_any_length_are_whole_together_and_differ_by_one_at_most() -> None:
    for ranks in (1, 2, 3, 4, 8):
        for length in (0, 1, 5, 8, 1000, 1001):
            each = Context(None, 0, ranks)
            parts = [each.part(length, rank) for rank in range(ranks)]
            assert [n for part in parts for n in range(part.start, part.stop)] == list(range(length))
            counts = [each.count(length, rank) for rank in range(ranks)]
            assert max(counts) - min(counts) <= 1 and max(counts) == each.most(length)


def test_a_cut_through_a_time_group_leaves_each_rank_its_share() -> None:
    laid = StreamLayout(("rgb", "seg"), ((4, 3, 4, 6), (4, 3, 2, 2)), (1, 2, 2), ((1,), (2,)), (1, 2)).with_lasts((0,))
    assert laid.segment_lengths == (18, 6, 3) and laid.group_lengths == (6, 12, 6, 2, 1)
    found = [Context(None, rank, 2).group_counts(laid.group_lengths, laid.segment_lengths) for rank in (0, 1)]
    assert found == [(6, 3, 3, 1, 0), (0, 9, 3, 1, 1)]


def _there_and_back(rank: int, world_size: int, runs: tuple[int, ...]) -> bool:
    here = Context(dist.group.WORLD, rank, world_size)
    whole = torch.arange(2.0 * sum(runs) * 4 * 3).view(2, sum(runs), 4, 3)
    own = here.cut(whole, runs).requires_grad_()
    shared = Shared(here, (runs[:1], runs[1:-1]), runs[-1])
    some, doubled = shared.to_heads(own, 2 * own)
    heads = 4 // world_size
    assert torch.equal(some, whole[:, :, rank * heads : (rank + 1) * heads]) and torch.equal(doubled, 2 * some)
    back = shared.to_tokens(some)
    (back * own.detach()).sum().backward()
    return torch.equal(back, own) and torch.equal(own.grad, own)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("runs", [(8, 4, 4), (5, 3, 1), (7, 1, 2, 6)])
def test_what_is_exchanged_comes_back_with_its_gradient(ranks: int, runs: tuple[int, ...]) -> None:
    assert all(run_ranks(_there_and_back, ranks, runs))


def _short(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of a step on streams of which some ranks hold no token."""
    config, engine = _engine(rank, world_size, overrides)
    share = 4 // engine.mesh.layout.data
    example = tiny.example(config, 0, range(engine.mesh.data_rank * share, (engine.mesh.data_rank + 1) * share))
    laid = replace(example.layout, shapes=((4, 1, 4, 6), (4, 1, 2, 2)), scales=(1, 2))
    x, noise = (value[:, : laid.elements] for value in (example.latents, example.noise))
    engine.forward_backward(replace(example, layout=laid, latents=x, noise=noise), 1)
    return {name: test_layout._whole(p.grad) for name, p in engine.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(2, layout(1, 1, 1, 2)), (4, layout(1, 1, 1, 4)), (4, layout(1, 1, 2, 2))]
)
def test_a_rank_without_a_token_in_scope_joins_in(ranks: int, overrides: tuple[str, ...]) -> None:
    (expected,) = run_ranks(_short, 1, ())
    assert all(value.any() for name, value in expected.items() if name.endswith("lora_B"))
    for found in run_ranks(_short, ranks, overrides):
        assert found.keys() == expected.keys()
        assert max(float((g - expected[name]).abs().max()) for name, g in found.items()) < 1e-6


# --- what is said and kept -------------------------------------------------------------------------------------------


def _engine(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[Any, Engine]:
    tiny.WAN |= FOUR_HEADS  # of this process alone
    config, here = tiny.config(*BASE, *overrides), runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    return config, build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))


def _said(rank: int, world_size: int, overrides: tuple[str, ...], *ways: str) -> Counter | list[Counter]:
    """What a rank says in a step; with each of several ways to recompute."""
    if ways:
        return [_said(rank, world_size, (*overrides, f"parallel.recompute={way}")) for way in ways]
    config, engine = _engine(rank, world_size, overrides)
    with Listening() as listening:
        engine.forward_backward(tiny.example(config, 1, range(4)), 1)
    return Counter(listening.heard)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_exchange_is_four_tensors_a_block_each_way(ranks: int) -> None:
    """Queries, keys and values in one message, and what was seen: T/ranks · width numbers each."""
    config = tiny.config(*BASE)
    model, example = shape(config, lambda: tiny.make(config), torch.float32), tiny.example(config, 1, range(4))
    part = FP32 * example.layout.tokens * model.width // ranks
    velocity = FP32 * example.layout.elements
    adapter = FP32 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    again = {"none": 0, "full": 1, "attention": 1}  # times that a block runs once more
    expected = []
    for more in again.values():
        times = 4 * len(model.blocks) * (2 + more)  # of a microbatch: forward, backward, and where it is recomputed
        found = Counter({("alltoall_base_", 3 * part): times, ("alltoall_base_", part): times})
        expected.append(found + Counter({("alltoall_base_", velocity): 4, ("sum", adapter): 1}))
    assert run_ranks(_said, ranks, layout(1, 1, 1, ranks), *again) == [expected] * ranks


@pytest.mark.parametrize("kind", [(), BLIND], ids=["lora", "blind"])
def test_what_is_planned_is_exchanged(kind: tuple[str, ...]) -> None:
    config, ways = tiny.config(*BASE, *kind), ("none", "full", "3")
    counts = costs.Costs.of(shape(config, lambda: tiny.make(config), torch.float32), kept=False)
    laid = tiny.example(config, 1, range(4)).layout
    (heard, _) = run_ranks(_said, 2, (*layout(1, 1, 1, 2), *kind), *ways)
    for way, said in zip(ways, heard, strict=True):
        how = int(way) if way.isdigit() else way
        planned = 4 * FP32 * costs.exchanged(counts, laid.lengths, 2, recompute=how)
        found = sum(size * count for (name, size), count in said.items() if name == "alltoall_base_")
        assert found - 4 * FP32 * laid.elements == planned, way


def test_one_rank_alone_exchanges_nothing() -> None:
    assert run_ranks(_said, 1, ()) == [Counter()]


def _kept(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Bytes that a rank's blocks keep for the backward pass, by what is recomputed."""
    return {way: _kept_by_token(rank, world_size, (*overrides, f"parallel.recompute={way}")) for way in WAYS}


def _kept_by_token(rank: int, world_size: int, overrides: tuple[str, ...]) -> float:
    """For each token of the whole sequence."""
    config, engine = _engine(rank, world_size, overrides)
    (model,) = engine.models()
    found = []
    for frames in (2, 4):
        laid = StreamLayout.equal(tuple(config.streams), (4, frames, 32, 32), (1, 2, 2))
        given = model.embed(torch.randn(1, laid.elements), torch.rand(1, 2), torch.randn(1, 512, 16), layout=laid,
                            dtype=torch.float32)  # fmt: skip
        flow, tokens = model.between_ends(given, laid), model.tokens(laid, torch.device("cpu"))
        with BytesHeld() as bytes_held:
            for block in model.block_list():
                flow = block(flow, tokens)
            gc.collect()  # what only circles of references hold is not kept
        found.append((laid.tokens, bytes_held.held))
    (fewer, less), (more, most) = found
    return (most - less) / (more - fewer)


@pytest.mark.parametrize("kind", [(), FULL, BLIND], ids=["lora", "full", "blind"])
def test_a_rank_keeps_its_share(kind: tuple[str, ...]) -> None:
    """Exactly where blocks are recomputed.

    Else attention keeps what was seen by some heads of all tokens, and its projection all heads of what it acts on.
    """
    (whole,) = run_ranks(_kept, 1, kind)
    for ranks in (2, 4):
        for found in run_ranks(_kept, ranks, (*layout(1, 1, 1, ranks), *kind)):
            for way, limit in {"none": 0.06 if kind == BLIND else 0.05, "attention": 0.005, "full": 0.005}.items():
                assert found[way] * ranks == pytest.approx(whole[way], rel=limit), way


# --- what is refused -------------------------------------------------------------------------------------------------


def test_ranks_that_cannot_share_the_heads_are_refused_with_the_arithmetic_done() -> None:
    config = tiny.config("parallel.context=3")
    with pytest.raises(
        UserError, match=r"parallel.context: 3 ranks cannot share 4 heads, 1.33 each; set it to 1, 2 or 4"
    ):
        shape(config, lambda: tiny.make(config), torch.float32)


def test_a_misfit_counts_the_ranks_that_share_a_sequence() -> None:
    parallel = tiny.config("parallel.context=4", "parallel.shard=2").parallel
    assert meshes.resolve(parallel, 16) == meshes.Layout(1, 2, 2, 4)
    with pytest.raises(UserError, match=r"shard 2 × context 4 = 8 must divide the number of processes, 12"):
        meshes.resolve(parallel, 12)
