"""Blocks whose weights wait in host memory: the same to the bit, two of them on the device at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.families.conformance.test_layouts import Result, assert_no_bit_differs, layout, train
from tests.support import tiny
from tests.support.ranks import run_ranks
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.models.lora import is_base
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime, shard, swap
from transpixeler.parallel.build import build_engine
from transpixeler.training import overview, preflight

FAMILIES = ("wan", "toy")  # the toy's blocks are of two kinds, and carry text
ONE = layout(1, 1, 1)
ALIKE = {  # by name: ranks, and what is set besides
    "lora": (1, ONE),
    "full": (1, (*ONE, "parallel.recompute=full")),
    "attention": (1, (*ONE, "parallel.recompute=attention")),
    "offload": (1, (*ONE, "parallel.recompute=offload")),
    "int8": (1, (*ONE, "model.quantize=int8")),
    "dora": (1, (*ONE, "lora.kind=dora", "parallel.recompute=full")),
    "blind": (1, (*ONE, "model.rgb_attends_aux=false")),
    "1f1b": (2, (*layout(2, 1, 1), "parallel.schedule=1f1b", "parallel.split=[3,1]")),
    "gpipe": (2, (*layout(2, 1, 1), "parallel.schedule=gpipe", "parallel.split=[3,1]", "parallel.recompute=full")),
    "interleaved": (2, (*layout(2, 1, 1), "parallel.schedule=interleaved-1f1b")),
    "shards": (2, layout(1, 1, 2)),
    "shards, all trained": (2, (*layout(1, 1, 2), "lora.enabled=false", "optim.lr=0.1")),
    "replicas": (2, layout(1, 2, 1)),
}


@cache
def both(name: str, ranks: int) -> dict[str, Result]:
    """Train all that so many ranks are asked for, with blocks that wait and without."""
    runs = {run: overrides for run, (count, overrides) in ALIKE.items() if count == ranks}
    runs |= {f"{run} swapped": (*overrides, "parallel.offload=4") for run, overrides in runs.items()}
    return train(ranks, name, runs, steps=2)


@pytest.mark.parametrize("how", ALIKE)
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_wait_change_no_bit(name: str, how: str) -> None:
    ranks, _ = ALIKE[how]
    assert_no_bit_differs(both(name, ranks)[f"{how} swapped"], both(name, ranks)[how])


# --- what is where, of a tiny model of six blocks --------------------------------------------------------------------

BLOCKS = 4
MICROBATCHES = 2


class Watch:
    """Notes, whenever a block begins its forward or backward pass, whose weights are elsewhere than in host memory."""

    def __init__(self, blocks: list[Any], waiting: swap.Swap) -> None:
        self.swap = waiting
        self.base = [[p for name, p in block.named_parameters() if is_base(name)] for block in blocks]
        self.host = {p.untyped_storage().data_ptr() for weights in self.base for p in weights}
        self.seen: list[set[int]] = []
        for place, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, place=place: self.note(place))
            block.register_full_backward_pre_hook(lambda *_, place=place: self.note(place))

    def note(self, place: int) -> None:
        away = [{p.untyped_storage().data_ptr() for p in weights} - self.host for weights in self.base]
        self.seen.append({index for index, storages in enumerate(away) if storages})
        waits = any(self.swap.holds(weight) for weight in self.base[place])
        assert place in self.seen[-1] or not waits, f"block {place} runs on weights in host memory"


def _watched(rank: int, world_size: int, overrides: tuple[str, ...], slots: int) -> dict[str, Any]:
    """Train a step and evaluate; tell how many blocks were on the device, how many bytes, and how often one came."""
    swap.SLOTS = slots
    config = tiny.config("train.global_batch=2", "train.micro_batch=1", "seed=3", *overrides)
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    example = tiny.example(config, 1, range(2))
    if engine.swap is None:
        return {"swap": None, "runs": [model.run_block for model in engine.models()]}
    watch = Watch([block for model in engine.models() for block in model.blocks.values()], engine.swap)
    came, come = [], swap.Waiting.come
    swap.Waiting.come = lambda waiting, stream: came.append(waiting) or come(waiting, stream)
    engine.forward_backward(example, 1)
    trained = len(came)
    with engine.evaluating():
        out = [engine.forward(example.noisy(), example.inputs, example.layout, 1) for _ in range(2)]
    held = [waiting.held for waiting in engine.swap.waiting]
    engine.swap.clear()
    return {
        "most": max(map(len, watch.seen)), "came": (trained, len(came) - trained), "out": out[1], "held": held,
        "each": [waiting.bytes for waiting in engine.swap.waiting],
        "said": overview.memory_lines(config, engine),
        "left": sum(waiting.held for waiting in engine.swap.waiting),
        "frozen": [sum(p.numel() * p.element_size() for p in weights) for weights in watch.base],
    }  # fmt: skip


def watched(*overrides: str, slots: int = 2) -> dict[str, Any]:
    (found,) = run_ranks(_watched, 1, overrides, slots)
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_blocks_at_a_time_are_on_the_device(recompute: str) -> None:
    found = watched("parallel.offload=4", f"parallel.recompute={recompute}")
    assert found["most"] == 2
    assert found["said"]["offload"].startswith("the weights of 4 of 4 blocks wait in host memory, ")
    assert sum(size > 0 for size in found["held"]) == 2 and not found["left"]
    assert all(0 <= room - size < 0.1 * size for room, size in zip(found["each"], found["frozen"])), (
        "whole, and no more"
    )


def test_a_third_block_on_the_device_is_seen() -> None:
    assert watched("parallel.offload=4", slots=3)["most"] == 3


def test_a_block_is_copied_no_more_often_than_it_must() -> None:
    """Backward begins with the two that the forward pass left, and forward with the two that backward left."""
    found = watched("parallel.offload=4")
    assert found["came"][0] == BLOCKS + (BLOCKS - 2) + (MICROBATCHES - 1) * 2 * (BLOCKS - 2)
    assert found["came"][1] <= 2 * MICROBATCHES * BLOCKS
    some = watched("parallel.offload=3")
    assert some["came"][0] == 3 + 1 + (MICROBATCHES - 1) * 2 and len(some["held"]) == 3


def test_nothing_is_swapped_that_nobody_asked_for() -> None:
    assert watched() == {"swap": None, "runs": [None]}


def test_waiting_blocks_are_spread_over_a_model_and_its_stages() -> None:
    assert swap.spread(40, 0) == [] and swap.spread(6, 6) == list(range(6))
    for count in range(41):
        places = swap.spread(40, count)
        halves = [sum(place in half for place in places) for half in (range(20), range(20, 40))]
        assert len(places) == count and abs(halves[0] - halves[1]) <= 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


def check(*overrides: str) -> Config:
    config = loading.from_overrides(["model.path=a", "data.train=[b]", "train.max_steps=1", *overrides])
    preflight.check(config, meshes.Layout(config.parallel.pipeline, 1, 1))
    return config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.offload=0"], r"parallel.offload: .* a whole number ≥ 1"),
        (["parallel.offload=-3"], r"parallel.offload: .* a whole number ≥ 1"),
        (["parallel.offload=some"], r"parallel.offload: .* true or false"),
        (["parallel.offload=3", "lora.enabled=false"], r"parallel.offload: 3 moves frozen weights alone.* set true"),
        (
            ["parallel.offload=3", "parallel.pipeline=2", "parallel.schedule=interleaved-zero-bubble"],
            r"parallel.offload: 3 does not go with parallel.schedule=interleaved-zero-bubble",
        ),
    ],
)
def test_what_cannot_wait_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(*overrides)


def test_more_blocks_than_there_are_are_told() -> None:
    parallel = check("parallel.offload=41", "optim.bf16_parameters=true").parallel
    with pytest.raises(UserError, match=r"parallel.offload: 41 of the 40 blocks that the model has; set up to 40"):
        shard.waiting_places(parallel, 40)
    assert shard.waiting_places(check("parallel.offload=true").parallel, 4) == [0, 1, 2, 3]
