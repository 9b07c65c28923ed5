"""Noise that grows in a thousand steps along a cosine, and the two ways back: what the U-Net learns and how it samples.

Time k/1000 is the k-th step, and 0 is clean. The model predicts the noise itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, SampleConfig
from transpixeler.flow.draws import shifted
from transpixeler.models.noising import Noising
from transpixeler.models.streams import StreamLayout

OFFSET, MOST = 0.008, 0.9999  # of the cosine; of one step's noise, by variance
ROUNDING = 1e-3  # of a step: what times in fp32 may be beyond it
KEPT = 0.9  # share of a prediction's values that the dynamic threshold leaves in [-1, 1]


@dataclass(frozen=True)
class CosineDiffusion(Noising):
    """x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε, of which ε is predicted. clips: x lies in [-1, 1], as pixels do."""

    steps: int = 1000
    error: Literal["squared", "absolute"] = "absolute"
    clips: bool = False

    schedulers = ("ddpm", "ddim")

    @cached_property
    def kept(self) -> Tensor:
        """ᾱ of each step, [steps + 1] in fp64, from 1 of what is clean down to nearly 0."""
        places = (torch.arange(self.steps + 1, dtype=torch.float64) / self.steps + OFFSET) / (1 + OFFSET)
        wave = torch.cos(places * math.pi / 2) ** 2
        added = (1 - wave[1:] / wave[:-1]).clamp(0, MOST)
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - added).cumprod(0)])

    def number(self, times: Tensor) -> Tensor:
        """Return the steps of times: the next one up, of those between."""
        return (times.double() * self.steps - ROUNDING).ceil().long().clamp(0, self.steps)

    def times(self, drawn: Tensor) -> Tensor:
        return (self.number(drawn).clamp(min=1) / self.steps).to(drawn.dtype)

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor, layout: StreamLayout) -> Tensor:
        kept = self.kept.to(times.device)[self.number(times)]
        signal, rest = (layout.spread(share.sqrt().float()) for share in (kept, 1 - kept))
        return signal * clean.float() + rest * noise.float()

    def target(self, clean: Tensor, noise: Tensor, times: Tensor, layout: StreamLayout) -> Tensor:
        return noise.float()

    def solver(
        self,
        name: str,
        *,
        steps: int,
        shift: float = 1.0,
        levels: Sequence[float] | None = None,
        fresh: Callable[[int], Tensor] | None = None,
    ) -> Backwards:
        """ddpm: a step adds fresh noise, as the noise was added; ddim: none."""
        even = levels or [shifted(1 - number / steps, shift) for number in range(steps)]
        numbers = self.number(self.times(torch.tensor(even, dtype=torch.float64))).tolist()
        numbers = list(dict.fromkeys(numbers))  # a step that goes nowhere is none
        return Backwards(self, numbers, fresh if name == "ddpm" else None)

    def fault(self, config: ObjectiveConfig) -> str:
        if config.density != "uniform":
            return f"objective.density: {config.density} is for flows, and this model's steps count alike; set uniform"
        if config.shift not in ("auto", 1):
            return f"objective.shift: {config.shift:g} is for flows, and each step of this model has its noise; set 1"
        return ""

    def sampling_fault(self, config: SampleConfig) -> str:
        if config.shift not in ("auto", 1):
            return f"sample.shift: {config.shift:g} is for flows, and each step of this model has its noise; set auto"
        if config.steps > self.steps:
            return f"sample.steps: {config.steps} are more than the {self.steps} that this model learns; set fewer"
        return super().sampling_fault(config)


class Backwards:
    """Steps from noise to what is clean, by what is predicted of the noise."""

    def __init__(self, noising: CosineDiffusion, numbers: Sequence[int], fresh: Callable[[int], Tensor] | None) -> None:
        """numbers: of the steps, from the last one down. fresh: noise that a step adds; None: it adds none."""
        self.clips, self.fresh = noising.clips, fresh
        self.times = [number / noising.steps for number in numbers]
        self.kept = noising.kept[[*numbers, 0]].tolist()

    def step(self, predicted: Tensor, number: int, x: Tensor) -> Tensor:
        now, then = self.kept[number], self.kept[number + 1]
        clean = (x - math.sqrt(1 - now) * predicted) / math.sqrt(now)
        if self.clips:
            clean = thresholded(clean)
        if self.fresh is None:
            noise = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
            return math.sqrt(then) * clean + math.sqrt(1 - then) * noise
        share = now / then  # of the signal before this step that is still there after it
        mean = math.sqrt(then) * (1 - share) * clean + math.sqrt(share) * (1 - then) * x
        mean, variance = mean / (1 - now), (1 - share) * (1 - then) / (1 - now)
        return mean + math.sqrt(variance) * self.fresh(number).to(x) if variance else mean


def thresholded(clean: Tensor) -> Tensor:
    """Scale each sample [B, N] so that most of its values lie in [-1, 1], and cut the rest."""
    place = KEPT * (clean.shape[1] - 1)
    ordered = clean.abs().sort(dim=1).values  # torch.quantile takes no more than 16 million values
    low, high = (ordered[:, round_(place), None] for round_ in (math.floor, math.ceil))
    most = torch.lerp(low, high, place - math.floor(place)).clamp(min=1)
    return clean.clamp(-most, most) / most
