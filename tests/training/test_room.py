"""`parallel.recompute: auto` is the fastest way that fits by `plan`'s figures, the same on ranks of unequal memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import wan_model
from tests.support.ranks import run_ranks
from tests.training import trainings
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import build, devices, shard
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.runtime import Runtime
from transpixeler.training import room
from transpixeler.training.estimates import Estimate, Load, Machine

LOAD = Load(Bucket(81, 480, 832), StreamLayout.equal(("rgb", "seg"), (16, 21, 60, 104), (1, 2, 2)), 1.0, 1)
SIZES = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}


def config(*keys: str) -> Config:
    return loading.from_overrides(["lora.rank=32", *keys])


@pytest.fixture(scope="module")
def estimate() -> Estimate:
    """Return the estimate of a Wan of 1.3B and one pair of 81 frames at 832×480."""
    model = build.shape(config(), lambda: wan_model(SIZES, streams=("rgb", "seg")), torch.bfloat16)
    return Estimate.of(model, config(), dtype=torch.bfloat16, compiled=True)


def chosen(estimate: Estimate, memory: float, *keys: str, **more: Any) -> room.Choice:
    settings = config(*keys)
    return room.choose(replace(estimate, config=settings), [LOAD], Layout(1, 1, 1), Machine(1, memory, 1.0, **more))


def totals(estimate: Estimate) -> dict[str, float]:
    return {mode: estimate.memory([LOAD], Layout(1, 1, 1), mode).total for mode in room.RECOMPUTE_MODES}


def test_the_fastest_way_that_fits_is_chosen_and_the_reason_is_told(estimate: Estimate) -> None:
    needed = totals(estimate)
    assert sorted(needed, key=lambda mode: -needed[mode]) == [*room.RECOMPUTE_MODES]
    for mode, slower in zip(room.RECOMPUTE_MODES, room.RECOMPUTE_MODES[1:], strict=False):
        least = needed[mode] / (room.SURE_MEMORY if mode == "none" else room.USABLE_MEMORY)
        just, short = chosen(estimate, 1.0001 * least), chosen(estimate, 0.9999 * least)
        assert (just.mode, short.mode) == (mode, slower)
        assert f"takes {needed[mode] / 2**30:.3g} GiB" in just.why
        assert f"{mode} would take {needed[mode] / 2**30:.3g} GiB" in short.why
    nothing = chosen(estimate, 2**30)
    assert nothing.mode == "offload" and "nothing is estimated to fit 1 GiB" in nothing.why


def test_inputs_go_to_host_memory_unasked_only_where_it_has_room(estimate: Estimate) -> None:
    hosted, memory = estimate.hosted([LOAD], Layout(1, 1, 1)), totals(estimate)["offload"] / room.USABLE_MEMORY
    assert hosted == 30 * 2**28  # 65,520 × 1,536 × 2 bytes of each block, as torch pins them
    assert chosen(estimate, 1.001 * memory, host=2.01 * hosted).mode == "offload"
    assert chosen(estimate, 1.001 * memory, host=1.99 * hosted).mode == "full"


@pytest.mark.parametrize(
    ("keys", "kind", "left_out"),
    [
        (("parallel.keep_gb=1",), "cuda", "none"),
        (("model.attention=flex", "parallel.compile=off"), "cuda", "attention"),
        (("parallel.pipeline=2", "parallel.schedule=interleaved-zero-bubble"), "cuda", "attention"),
        ((), "cpu", "offload"),
    ],
)
def test_what_does_not_go_with_the_rest_is_not_chosen(
    estimate: Estimate, keys: tuple[str, ...], kind: str, left_out: str
) -> None:
    needed = totals(estimate)
    sizes = [size * factor for size in needed.values() for factor in (0.5, 1.1, 1.3)]
    every = {chosen(estimate, size, *keys, kind=kind).mode for size in sizes}
    assert left_out not in every and len(every) > 1
    assert left_out in {chosen(estimate, size).mode for size in sizes}


@pytest.mark.parametrize("mode", ["none", "full", 4])
def test_what_a_config_says_is_kept(estimate: Estimate, mode: str | int) -> None:
    assert chosen(estimate, 2**20, f"parallel.recompute={mode}") == room.Choice(mode)
    assert chosen(estimate, 0.0).mode == "attention"  # where no memory is known


def _agreed(rank: int, world_size: int) -> int:
    return Runtime(rank, world_size, rank, torch.device("cpu")).least(10 - rank)


def test_ranks_go_by_the_one_with_the_least_memory() -> None:
    assert run_ranks(_agreed, 3) == [8, 8, 8]


def _trained(rank: int, world_size: int, path: Path, overrides: tuple[str, ...], memory: int) -> tuple[str, list[Any]]:
    devices.memory = lambda device: memory
    set_recompute, modes = shard.set_recompute, []
    shard.set_recompute = lambda blocks, mode, host: (modes.append(mode), set_recompute(blocks, mode, host))[1]
    return trainings.run_here(rank, world_size, path, overrides, None), modes


def test_a_training_with_little_memory_recomputes_says_so_and_learns_the_same(demo: Path, tmp_path: Path) -> None:
    told = {}
    for memory in (2**20, 2**40):
        keys = (f"output_dir={tmp_path / str(memory)}", *trainings.FAST, "train.max_steps=1", "data.frames=[17]")
        ((folder, modes),) = run_ranks(_trained, 1, demo / "config.yaml", keys, memory)
        assert modes == ["full" if memory == 2**20 else "none"]
        told[memory] = (Path(folder) / "log.txt").read_text(), trainings.exact(Path(folder))
    (little, learned), (much, same) = told[2**20], told[2**40]
    assert "parallel.recompute: auto is full here: nothing is estimated to fit" in little
    assert "parallel.recompute: auto is none here: so small a model" in much
    assert [line["loss"] for line in learned] == [line["loss"] for line in same]
