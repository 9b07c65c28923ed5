"""The step's bench: its limit is what a step multiplies, ours multiplies no more, and it ends with its figures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models import TINY
from transpixeler.config import LoraConfig
from transpixeler.models.costs import step_flops
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout
from transpixeler.models.wan import WanModel

BENCHES = Path(__file__).parents[1] / "tools/bench"
SMALL = ("--width", "48", "--head", "24", "--grid", "2", "4", "4", "--rank", "4", "--no-record", "--repeats", "1")


@pytest.fixture(scope="module")
def step() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHES))
    spec = importlib.util.spec_from_file_location("tools_step", BENCHES / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHES))


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
    model = WanModel.from_config(TINY, streams=layout.names)
    inject(model, LoraConfig(rank=4))
    without_ends = dataclasses.replace(model.dimensions(), patch_in=0, patch_out=0, text_dim=-48)
    limit = step.Limit(list(model.blocks.values()), tokens=layout.tokens, batch=1)
    text = 2 * TINY["num_layers"] * 2 * 48 * 48 * 512
    formula = step_flops(without_ends, layout.lengths, recompute="attention") - text
    assert limit.flops == pytest.approx(formula, rel=0.001)


def test_it_ends_with_its_figures(step: ModuleType) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        step.main(SMALL)
    found = json.loads(said.getvalue().splitlines()[-1])
    ratios = {"x_limit", "x_rival_time", "x_rival_memory", "x_rival_memory_full"}
    sizes = {"mib", "rival_mib", "gflop", "tokens"}
    assert found.keys() == {"seconds", "limit_seconds", "rival_seconds", "spread", *ratios, *sizes}
    assert all(found[name] > 0 for name in ratios) and found["tokens"] == 64
