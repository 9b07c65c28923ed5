"""Noise levels are shifted by the count of tokens as diffusers' pipeline and scheduler shift them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from transpixeler.families.ltx.schedule import LAST, shift, stretched


@pytest.mark.parametrize("tokens", [240, 1024, 3000, 4096, 13376])
@pytest.mark.parametrize("terminal", [None, LAST])
def test_the_shift_is_that_of_diffusers(tokens: int, terminal: float | None) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    ranges: dict[str, Any] = {
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "base_shift": 0.95,
        "max_shift": 2.05,
    }
    ranges["shift_terminal"] = terminal
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **ranges)
    even = np.linspace(1.0, 1 / 20, 20)
    scheduler.set_timesteps(sigmas=list(even), mu=calculate_shift(tokens, 1024, 4096, 0.95, 2.05))
    s = shift(tokens)
    levels = [s * t / (1 + (s - 1) * t) for t in even]
    levels = levels if terminal is None else stretched(levels)
    torch.testing.assert_close(
        torch.tensor([*levels, 0.0], dtype=torch.float32), scheduler.sigmas, atol=1e-6, rtol=1e-6
    )


def test_more_tokens_shift_further() -> None:
    assert shift(1024) == pytest.approx(np.exp(0.95)) and shift(4096) == pytest.approx(np.exp(2.05))
    assert stretched([1.0, 0.5, 0.25])[-1] == pytest.approx(LAST)
