"""Experts: the whole transformers of a model that has several, each for a range of noise levels.

In: what a family says of its folder, and `model.expert`. Out: the experts to train, and which one a noise level is for.
Most models are one expert, without a name and for every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config.sections import ModelConfig, UserError

ALL = "all"


@dataclass(frozen=True)
class Expert:
    """One of a model's whole transformers."""

    name: str = ""
    low: float = 0.0  # it is for noise levels from here on
    high: float = 1.0
    folder: str = ""  # of its weights, in the model's own

    def within(self, part: float) -> float:
        """Return the noise level at a part of its range, from 0 to 1."""
        return self.low + part * (self.high - self.low)


ONLY = Expert()


def chosen_experts(config: ModelConfig, experts: Sequence[Expert]) -> tuple[Expert, ...]:
    """Return the experts that `model.expert` asks for."""
    names = [expert.name for expert in experts if expert.name]
    if config.expert == ALL:
        return tuple(experts)
    if config.expert not in names:
        known = f"it has {', '.join(names)}, and {ALL} stands for both" if names else f"it has one: say {ALL}"
        raise UserError(f"model.expert: {config.path} has no expert {config.expert!r}; {known}")
    return tuple(expert for expert in experts if expert.name == config.expert)


def experts_at(experts: Sequence[Expert], levels: Tensor) -> list[Expert]:
    """Return the expert that each noise level [n] is for; at a boundary that is the one above."""
    upwards = sorted(experts, key=lambda expert: expert.low)
    lows = torch.tensor([expert.low for expert in upwards], dtype=levels.dtype)  # rounded as the levels are
    return [upwards[number - 1] for number in (levels.cpu()[:, None] >= lows).sum(1).clamp(min=1).tolist()]
