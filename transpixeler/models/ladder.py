"""The contract of models that make a video at several sizes, one after another: a ladder, and a lesson on one rung.

In: the layout of a clip and who asks (seed, step, place in the batch). Out: what a sample is taught, which is a layout
of its own and the two ends of a way; and, while sampling, the latents that noise becomes from rung to rung.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.models.noising import RectifiedFlow
from transpixeler.models.streams import StreamLayout

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [B, N], told times [B, G]) → [B, N]
Noise = Callable[[StreamLayout, str], Tensor]  # (layout, what for) → [1, N], a pure function of both and a video


class Lesson(RectifiedFlow, ABC):
    """Teach one sample a part of the way to a clip, at one size, perhaps of one frame after others."""

    past_noise: float = 0.0  # the largest share of noise in frames before the one that is taught

    @property
    @abstractmethod
    def layout(self) -> StreamLayout:
        """Return what the model sees."""

    @property
    @abstractmethod
    def noises(self) -> int:
        """Count the numbers of noise that its ends are made of."""

    @abstractmethod
    def ways(self, clean: Tensor, noise: Tensor, given: Collection[int]) -> tuple[Tensor, Tensor]:
        """Return the ends [b, N] of the way at places 0 and 1, of a whole clip's latents and noise. given: streams."""


@dataclass(frozen=True)
class Place:
    """A sample's place in a step."""

    seed: int
    step: int
    slot: int  # in the global batch
    group: int = 1  # samples that share a clip


class Ladder(ABC):
    """The sizes at which a model makes a video."""

    @property
    @abstractmethod
    def goes_on(self) -> bool:
        """Tell whether it makes frames after others, so that the first ones may be given."""

    @abstractmethod
    def run(self, group: int) -> int:
        """Return how many successive samples cover the rungs as often as each is trained. group: that share a clip."""

    @abstractmethod
    def lesson(self, clip: StreamLayout, place: Place) -> Lesson:
        """Return what a sample is taught of a clip, as a pure function of its place."""

    @abstractmethod
    def longest(self, clip: StreamLayout) -> StreamLayout:
        """Return the longest sequence that a lesson on a clip has."""

    @abstractmethod
    def held_out(self, clip: StreamLayout, name: str) -> Sequence[Lesson]:
        """Return the lessons that a held-out clip is measured by, one on each rung."""

    @abstractmethod
    def calls(self, clip: StreamLayout, steps: int, given: Mapping[int, Tensor]) -> int:
        """Return how often `make` asks the model."""

    @abstractmethod
    def make(
        self,
        clip: StreamLayout,
        predict: Callable[[StreamLayout], Predict],
        noise: Noise,
        *,
        steps: int,
        given: Mapping[int, Tensor],
        device: torch.device,
    ) -> Tensor:
        """Return the latents [1, N] that noise becomes. given: those of whole streams, or of their first frames."""

    @abstractmethod
    def fault(self, config: Config) -> str:
        """Return which setting makes no sense for it, and the way out; or nothing."""


def slots_fault(ladder: Ladder, batch: int, group: int, ranks: int = 1) -> str:
    """Return why a step's samples cannot be shared out over the rungs, clips and ranks, and the way out; or nothing.

    Samples stand in runs that cover the rungs; `group` runs have the same clips. ranks: that share the step.
    """
    run = ladder.run(group)
    if batch % (run * group):
        near = run * group * max(1, round(batch / (run * group)))
        of = f"{group} runs of {run} that share their clips" if group > 1 else f"runs of {run}, which cover the sizes"
        return f"train.global_batch: {batch} samples are no {of}; {near} would be"
    if group > 1 and batch // ranks % run:
        fit = [n for n in range(1, batch // run + 1) if batch % (n * run) == 0]
        return (
            f"data.sync_group: {batch} samples over {ranks} data ranks are {batch / ranks:g} each, and each takes "
            f"whole runs of {run}; launch {' or '.join(map(str, fit[-4:]))} data ranks, or raise train.global_batch"
        )
    return ""
