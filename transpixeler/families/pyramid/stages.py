"""The arithmetic of the stages: where each begins and ends, what it is told, and the way from one to the next.

A share of noise σ is 1 in pure noise. Stage 0 is the smallest. Within a stage a straight way leads from its start,
noise σ_s over the stage before, enlarged, to its end, noise σ_e over its own clean latents. All sizes are halved and
doubled in rows and columns alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, SampleConfig
from transpixeler.models.noising import RectifiedFlow

STAGES = 3
GAMMA = 1 / 3  # how much neighbouring cells of the noise between stages take from each other
LEVELS = 1000  # of the published times, which are whole thousandths


@dataclass(frozen=True)
class Stage:
    """One size's part of the way."""

    start: float  # σ_s, corrected for the cells that are enlarged, which are alike
    end: float  # σ_e
    first: float  # time that the model is told at the start
    last: float  # and at the end
    keep: float = 1.0  # α: what is left of the stage before, enlarged
    renew: float = 0.0  # β: how much noise is added to it

    def told(self, place: Tensor) -> Tensor:
        """Return the time that the model is told, by the place on the way: 1 at the start, 0 at the end."""
        return self.last + (self.first - self.last) * place


def all_stages(count: int = STAGES, gamma: float = GAMMA) -> tuple[Stage, ...]:
    """Return the stages; times are shared out by the lengths of their ways."""
    plain = [1 - (LEVELS * stage // count) / LEVELS for stage in range(count)] + [0.0]
    spread = math.sqrt(1 + 1 / gamma)
    keeps = [1 / (spread * sigma + 1 - sigma) for sigma in plain]
    starts = [1.0, *(1 - keeps[stage] * (1 - plain[stage]) for stage in range(1, count))]
    lengths = [start - end for start, end in zip(starts, plain[1:])]
    times = [1 - math.floor(LEVELS * sum(lengths[:stage]) / sum(lengths) + 1e-9) / LEVELS for stage in range(count)]
    ends = [*times[1:], 1 / LEVELS]
    return tuple(
        Stage(
            starts[stage],
            plain[stage + 1],
            times[stage],
            ends[stage],
            keeps[stage] if stage else 1.0,
            keeps[stage] * plain[stage] / math.sqrt(gamma) if stage else 0.0,
        )
        for stage in range(count)
    )


class StageFlow(RectifiedFlow):
    """A straight way in each stage, whose times and steps are the stages' own."""

    schedulers = ("euler",)

    def fault(self, config: ObjectiveConfig) -> str:
        if config.shift not in ("auto", 1):
            return f"objective.shift: {config.shift:g} is for one way, and each stage of this model has its own; set 1"
        return ""

    def sampling_fault(self, config: SampleConfig) -> str:
        if config.shift not in ("auto", 1):
            return f"sample.shift: {config.shift:g} is for one way, and each stage of this model has its own; set auto"
        return super().sampling_fault(config)


# -- sizes; all of [B, C, F, H, W]


def halved(x: Tensor) -> Tensor:
    """Return it at half the rows and columns: a bilinear halving is the mean of four cells."""
    return F.avg_pool3d(x, (1, 2, 2))


def halved_noise(noise: Tensor) -> Tensor:
    """Return noise at half the rows and columns, again of unit variance."""
    return 2 * halved(noise)


def doubled(x: Tensor) -> Tensor:
    """Return it at twice the rows and columns, each cell four times."""
    return x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)


def levels_of(x: Tensor, count: int = STAGES, *, noise: bool = False) -> list[Tensor]:
    """Return it at the size of each stage, the smallest first."""
    found = [x]
    for _ in range(count - 1):
        found.append(halved_noise(found[-1]) if noise else halved(found[-1]))
    return found[::-1]


# -- the way


def ends_of(stages: tuple[Stage, ...], stage: int, clean: list[Tensor], noise: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the end and the start of a stage's way. clean, noise: at the size of each stage."""
    one = stages[stage]
    end = torch.lerp(clean[stage], noise[stage], one.end)
    if not stage:
        return end, noise[0]
    return end, torch.lerp(doubled(clean[stage - 1]), noise[stage], one.start)


def block_noise(noise: Tensor, gamma: float = GAMMA) -> Tensor:
    """Return noise whose 2×2 blocks have the covariance (1 + γ)·I − γ·11ᵀ, of independent noise.

    Its root is √(1 + γ)·(I − 11ᵀ/4) + √(1 − 3γ)·11ᵀ/4, so that at γ = 1/3 each block's mean is zero.
    """
    mean = doubled(halved(noise))
    return math.sqrt(1 + gamma) * (noise - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean


def entered(x: Tensor, stage: Stage, noise: Tensor) -> Tensor:
    """Return where a stage starts, of what the stage before ended with. noise: independent, of the stage's size."""
    return stage.keep * doubled(x) + stage.renew * block_noise(noise)
