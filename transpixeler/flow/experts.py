"""Draw which expert of a model a step trains: a pure function of the step, by the share of noise levels that it has.

In: an objective, the experts and the step. Out: one expert, and the objective cut to its range. Steps come in runs of
one expert, because the weights of the others may have to wait in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from transpixeler.config.sections import Config, ObjectiveConfig, UserError
from transpixeler.flow.draws import distribution, generator
from transpixeler.models.experts import Expert, chosen_experts
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import Grid

FEW = 0.05  # share of the steps below which an expert hardly learns
GOLDEN = 0.6180339887498949  # multiples of it, without their whole parts, fill [0, 1) as evenly as any can


def training_shift(config: ObjectiveConfig, model: ModelFolder, grid: Grid) -> float:
    """Return how far the noise levels of a video of a grid of tokens are shifted while training."""
    return model.shift_of(grid) if config.shift == "auto" else config.shift


def shares(config: ObjectiveConfig, experts: Sequence[Expert], *, shift: float) -> list[float]:
    """Return the share of the noise levels, within the objective's own limits, that falls to each expert."""
    parts = []
    for expert in experts:
        limits = cut(config, expert)
        low, high = (distribution(config, t, shift=shift) for t in (limits.t_min, limits.t_max))
        parts.append(max(0.0, high - low))
    if not sum(parts):
        raise UserError(
            f"objective.t_min, objective.t_max: no noise level from {config.t_min:g} to {config.t_max:g} is for "
            f"{' or '.join(expert.name for expert in experts)}; widen them, or leave them out"
        )
    return [part / sum(parts) for part in parts]


def cut(config: ObjectiveConfig, expert: Expert) -> ObjectiveConfig:
    """Return the objective within an expert's range."""
    return replace(config, t_min=max(config.t_min, expert.low), t_max=min(config.t_max, expert.high))


def draw_expert(
    config: ObjectiveConfig, experts: Sequence[Expert], *, seed: int, step: int, run: int, shift: float
) -> Expert:
    """Return the expert that a step trains. run: how many steps go to one before another may come.

    The draws of successive runs are spread evenly, so that after few of them each expert has had its share.
    """
    if len(experts) == 1:
        return experts[0]
    phase = float(torch.rand((), generator=generator("experts", seed), dtype=torch.float64))
    place = (phase + step // run * GOLDEN) % 1
    for expert, share in zip(experts, shares(config, experts, shift=shift), strict=True):
        if place < share:
            return expert
        place -= share
    return experts[-1]


@dataclass(frozen=True)
class Split:
    """Share a run's steps out over the experts that it trains."""

    experts: tuple[Expert, ...]
    shares: tuple[float, ...]
    shift: float
    usual: float  # the shift that `auto` stands for

    @classmethod
    def of(cls, config: Config, model: ModelFolder, grid: Grid) -> Split:
        """Split the steps of videos of a grid of tokens."""
        experts = chosen_experts(config.model, model.experts)
        shift = training_shift(config.objective, model, grid)
        usual = training_shift(replace(config.objective, shift="auto"), model, grid)
        return cls(experts, tuple(shares(config.objective, experts, shift=shift)), shift, usual)

    @property
    def by_name(self) -> dict[str, float]:
        return {expert.name: share for expert, share in zip(self.experts, self.shares, strict=True) if expert.name}

    def lines(self, *, run: int) -> list[str]:
        """Say it, with a warning of experts that few steps would train; nothing of a model of one. run: of steps."""
        if len(self.experts) == 1:
            only = self.experts[0]
            return [f"{only.name} alone, at noise levels from {only.low:g} to {only.high:g}"] if only.name else []
        parts = ", ".join(f"{name} {share:.1%}" for name, share in self.by_name.items())
        said = [f"{parts} of the steps (shift {self.shift:g}), in runs of {run}"]
        few = [name for name, share in self.by_name.items() if share < FEW]
        if few and self.shift != self.usual:
            way_out = f"the model's own shift is {self.usual:g}: set objective.shift=auto"
            said.append(f"warning: {', '.join(few)} would hardly be trained; {way_out}")
        return said
