"""Define the way between latents and noise: what a model learns of it, and the solver of each `sample.scheduler`.

In: clean latents, noise and times. Out: what the model is shown and is to predict, the error of a prediction, and
solvers that lead from noise to latents. A time is a place on the way: 0 is clean, 1 is noise. A model folder gives it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, SampleConfig
from transpixeler.models.streams import StreamLayout

TRAIN_TIMESTEPS = 1000  # diffusers' schedulers count a flow's times from 1000 to 0


class Solver(Protocol):
    """A way from noise to latents, in steps."""

    @property
    def times(self) -> Sequence[float]:
        """Return the time of each step, as the model is told it."""
        ...

    def step(self, predicted: Tensor, number: int, x: Tensor) -> Tensor:
        """Return what x [B, N] becomes in a step, by its number, of what the model predicted."""
        ...


class Noising(ABC):
    """The way between clean latents and noise, and what a model learns on it.

    It goes between two ends, which are the latents and the noise unless a model makes others of them. Nothing here
    is drawn: whoever draws is a function of (seed, step, sample).
    """

    error: Literal["squared", "absolute"] = "squared"
    schedulers: ClassVar[tuple[str, ...]]  # of `sample.scheduler`

    def of_step(self, seed: int, step: int) -> Noising:
        """Return what a step learns, where steps differ."""
        return self

    def ends(self, clean: Tensor, noise: Tensor, layout: StreamLayout) -> tuple[Tensor, Tensor]:
        """Return the ends [b, N] of the way at times 0 and 1, of clean latents and noise [b, N]."""
        return clean, noise

    def times(self, drawn: Tensor) -> Tensor:
        """Return the times that the model knows, of any in [0, 1]."""
        return drawn

    def told(self, times: Tensor) -> Tensor:
        """Return what the model is told of times [b, G]."""
        return times

    @abstractmethod
    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor, layout: StreamLayout) -> Tensor:
        """Return what the model is shown at times [b, G] between two ends [b, N], in fp32."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, times: Tensor, layout: StreamLayout) -> Tensor:
        """Return what it is to predict there, [b, N] in fp32."""

    def errors(self, predicted: Tensor, target: Tensor, layout: StreamLayout) -> Tensor:
        """[b, N] twice → [b, G], each time group's mean error over its elements, in fp32."""
        apart = predicted.float() - target.float()
        each = apart.square() if self.error == "squared" else apart.abs()
        return torch.stack([part.mean(1) for part in layout.split_groups(each)], dim=1)

    @abstractmethod
    def solver(
        self,
        name: str,
        *,
        steps: int,
        shift: float = 1.0,
        levels: Sequence[float] | None = None,
        fresh: Callable[[int], Tensor] | None = None,
    ) -> Solver:
        """Return what a `sample.scheduler` stands for.

        levels: the times of its steps, from 1 down to 0, which is left out; None: even ones, shifted. fresh: noise
        [1, N] that a step adds, by its number, where it adds any.
        """

    def fault(self, config: ObjectiveConfig) -> str:
        """Return which setting of training makes no sense for it, and the way out; or nothing."""
        return ""

    def sampling_fault(self, config: SampleConfig) -> str:
        """Return which setting of sampling makes none; or nothing."""
        if config.scheduler in self.schedulers:
            return ""
        known = " or ".join(self.schedulers)
        return f"sample.scheduler: {config.scheduler} does not go with what this model learns; set it to {known}"


class RectifiedFlow(Noising):
    """A straight line from latents to noise; the model predicts its velocity."""

    schedulers = ("unipc", "euler", "dpm++")

    def noisy(self, clean: Tensor, noise: Tensor, times: Tensor, layout: StreamLayout) -> Tensor:
        """x_t = (1 − t)·x + t·ε."""
        return torch.lerp(clean.float(), noise.float(), layout.spread(times))

    def target(self, clean: Tensor, noise: Tensor, times: Tensor, layout: StreamLayout) -> Tensor:
        """Return ε − x."""
        return noise.float() - clean.float()

    def solver(
        self,
        name: str,
        *,
        steps: int,
        shift: float = 1.0,
        levels: Sequence[float] | None = None,
        fresh: Callable[[int], Tensor] | None = None,
    ) -> FlowSolver:
        """Return it with diffusers' scheduler. Only euler takes levels other than even ones, shifted."""
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        if name == "euler":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0 if levels else shift)
            # Without explicit levels it applies the shift twice, and the last steps start where almost no noise is.
            scheduler.set_timesteps(sigmas=list(levels or np.linspace(1, 0, steps + 1)[:-1].tolist()))
        else:
            kind = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[name]
            scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
            scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        return FlowSolver(scheduler)


class FlowSolver:
    """A scheduler of diffusers' that counts a flow's times."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.times = [float(t) / TRAIN_TIMESTEPS for t in scheduler.timesteps]

    def step(self, predicted: Tensor, number: int, x: Tensor) -> Tensor:
        return self.scheduler.step(predicted, self.scheduler.timesteps[number], x, return_dict=False)[0]


RECTIFIED = RectifiedFlow()
