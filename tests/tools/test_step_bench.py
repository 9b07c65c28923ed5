"""The benches of a step and of sampling: the limit is what a step multiplies, ours is no more, figures come last."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import TINY, wan_model
from transpixeler.config.sections import LoraConfig
from transpixeler.models.costs import Costs, step_flops
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout

BENCHES = Path(__file__).parents[2] / "tools/bench"
SMALL = ("--width", "48", "--head", "24", "--grid", "2", "4", "4", "--rank", "4", "--no-record", "--repeats", "1")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", BENCHES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHES))
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step() -> ModuleType:
    return loaded("step")


def figures(module: ModuleType, *argv: str) -> dict[str, float | str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main([*SMALL, *argv])
    return json.loads(said.getvalue().splitlines()[-1])


@pytest.fixture
def both(step: ModuleType) -> tuple[argparse.Namespace, torch.nn.Module, tuple[torch.Tensor, ...]]:
    args = step.arguments(SMALL)
    ours, _, inputs = step.both(args)
    return args, ours, inputs


def multiplied(step: ModuleType, ours: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """FLOPs of a step's products, counted operator by operator."""

    def in_place(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    def flash(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
        return 4 * q.numel() * k[2]

    def flash_backward(_: object, q: torch.Size, k: torch.Size, *__: object, **___: object) -> int:
        return 10 * q.numel() * k[2]

    ops = torch.ops.aten
    custom = {
        ops.baddbmm_: in_place,
        ops._scaled_dot_product_flash_attention_for_cpu: flash,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        step.step(ours, inputs)
    return counter.get_total_flops()


def test_our_step_multiplies_what_the_limit_does_and_nothing_else(step: ModuleType, both) -> None:
    args, ours, inputs = both
    limit = step.Limit(list(ours.blocks.values()), tokens=inputs[0].shape[1], batch=args.batch)
    assert multiplied(step, ours, inputs) == limit.flops
    ours.keep("full")  # the twin: attention once more
    assert multiplied(step, ours, inputs) > limit.flops


def test_the_limit_is_the_formula_of_the_costs_but_for_the_texts_gradient(step: ModuleType) -> None:
    layout = StreamLayout.equal(("rgb", "seg"), (4, 8, 32, 32), (1, 2, 2))
    model = wan_model(TINY, streams=layout.names)
    inject(model, LoraConfig(rank=4))
    without_ends = dataclasses.replace(Costs.of(model), ends=())
    limit = step.Limit(list(model.blocks.values()), tokens=layout.tokens, batch=1)
    text = 2 * TINY["num_layers"] * 2 * 48 * 48 * 512
    formula = step_flops(without_ends, layout.lengths, recompute="attention") - text
    assert limit.flops == pytest.approx(formula, rel=0.001)


def test_a_steps_bench_ends_with_its_figures(step: ModuleType) -> None:
    found = figures(step)
    ratios = {"x_limit", "x_rival_time", "x_rival_memory", "x_rival_memory_full", "x_half_time", "x_half_memory"}
    ratios |= {"x_forward_only", "x_forward_only_memory", "x_half_rival_time"}
    sizes = {"mib", "rival_mib", "gflop", "tokens"}
    assert found.keys() == {"seconds", "limit_seconds", "rival_seconds", "spread", *ratios, *sizes}
    assert min(found["x_rival_memory"], found["x_rival_memory_full"], found["seconds"]) > 0 and found["tokens"] == 64
    assert 0.4 < found["x_half_memory"] < 1
    for name in ("x_limit", "x_rival_time"):
        assert re.fullmatch(r"too noisy to tell: [01] of 1 rounds count, 6 are needed", str(found[name]))


def test_samplings_bench_ends_with_its_figures() -> None:
    found = figures(loaded("sample"), "--text", "16")
    ratios = {"x_forward", "x_forward_guided", "x_one_batch", "x_forward_short", "x_one_batch_short", "x_rgb_known"}
    ratios.add("x_half")
    assert found.keys() == {"step_seconds", *ratios, "spread", "tokens"}
    assert all("6 are needed" in str(found[name]) for name in ratios) and found["tokens"] == 64


def test_a_checkout_compared_with_itself_is_neither_faster_nor_slower(step: ModuleType) -> None:
    """Eight rounds in two processes, of which six must count, or else the bench says that it cannot tell."""
    found = figures(step, "--against", str(BENCHES.parents[1]), "--repeats", "8")
    assert found.keys() == {"x_against_limit", "x_against_ours"}
    for value in found.values():
        assert value == pytest.approx(1, abs=0.1) if isinstance(value, float) else value.startswith("too noisy to tell")


def test_a_folder_that_is_no_checkout_is_refused(step: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkout of this project"):
        step.main([*SMALL, "--against", str(tmp_path)])
