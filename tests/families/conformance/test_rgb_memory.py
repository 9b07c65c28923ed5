"""Where RGB is given whole and sees itself alone, one denoising step computes it, and the others give the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.families.conformance.test_forward_only import COUNTED, adapted
from tests.support.families.cases import CASES, Case, inputs
from transpixeler.models.backbone import Backbone
from transpixeler.models.rgb_memory import RgbMemory
from transpixeler.models.streams import StreamLayout

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def denoising(model: Backbone, layout: StreamLayout, steps: int = 3) -> list[tuple[Tensor, ...]]:
    """Return what goes into each step: RGB at time 0 and fields are the same, companions and their times are not."""
    (x, times, *fields), first, groups = inputs(model, layout), layout.sizes[0], layout.groups_of(0)
    times[:, groups] = 0
    found = []
    for step in range(steps):
        other_x, other_times, *_ = inputs(model, layout, seed=1 + step)
        other_x[:, :first], other_times[:, groups] = x[:, :first], 0
        found.append((other_x, other_times, *fields))
    return found


def run(model: Backbone, layout: StreamLayout, steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Run two microbatches of one sample in each step; return the companions' velocities."""
    found = []
    for step in steps:
        if model.rgb_memory is not None:
            model.rgb_memory.rewind()
        rows = [model(*(each[row : row + 1] for each in step), layout=layout) for row in range(2)]
        found.append(torch.cat(rows)[:, layout.sizes[0] :])
    return found


@every_family
@torch.no_grad()
def test_each_step_gives_what_it_gives_without(case: Case) -> None:
    """To the bit; and what is remembered is used: another RGB at a later step is not looked at."""
    model = adapted(case)
    plain = model.layout(case.shapes[1])
    for layout in (plain, plain.cut([[model.patch[0]], [], []]).with_lasts([0])):
        steps = denoising(model, layout)
        model.rgb_memory = None
        expected = run(model, layout, steps)
        model.rgb_memory = RgbMemory()
        for found, other in zip(run(model, layout, steps), expected, strict=True):
            assert torch.equal(found, other)
        changed = (steps[1][0].roll(1, 1), *steps[1][1:])
        changed[0][:, layout.sizes[0] :] = steps[1][0][:, layout.sizes[0] :]  # another RGB alone
        assert torch.equal(run(model, layout, [changed])[0], expected[1])
        model.rgb_memory.forget()
        assert not torch.equal(run(model, layout, [changed])[0], expected[1])


@every_family
@torch.no_grad()
def test_a_later_step_multiplies_a_third_less(case: Case) -> None:
    model = adapted(case, 2)
    layout = model.layout(case.large)
    model.rgb_memory, counts = RgbMemory(), []
    for step in denoising(model, layout, 2):
        model.rgb_memory.rewind()
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            model(*step, layout=layout)
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.65 * counts[0]
