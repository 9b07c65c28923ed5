"""Set how strongly each step of a sampling follows the prompt and the given frames.

In: `sample.guidance` and its companions. Out: for each step the two scales, of the text and of given frames. A step
mixes up to three predictions: the prompt with what is shown, the negative prompt with it, and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, SampleConfig, UserError
from transpixeler.models.experts import experts_at
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import StreamLayout


@dataclass(frozen=True)
class Guidance:
    """The scales of a run of steps; `text` by a step's times [B, G]."""

    text: Callable[[Tensor], float]
    image: float = 1.0
    oscillate: int = 0  # the step from which on every second one goes without; 0: none does
    falloff: bool = False  # that to given frames falls from step to step, and grows from frame to frame
    steps: int = 0

    @classmethod
    def of(cls, config: SampleConfig, model: ModelFolder) -> Guidance:
        text = guidance_by_time(config, model)
        return cls(text, config.image_guidance, config.oscillate, config.image_falloff, config.steps)

    def at(self, step: int, times: Tensor, layout: StreamLayout) -> tuple[float, float | Tensor]:
        """Return the scales of a step: of the text, and of given frames, a number or [1, N]."""
        if self.oscillate and step >= self.oscillate and step % 2:
            return 1.0, 1.0
        if not self.falloff or self.image <= 1:
            return self.text(times), self.image
        return self.text(times), self._by_frame(step, layout).to(times.device)

    def _by_frame(self, step: int, layout: StreamLayout) -> Tensor:
        """[1, N]: 1 in a stream's first latent frame; in its last one what the steps so far have left."""
        most = torch.linspace(self.image, 1.0, self.steps + 1)[step]
        parts = []
        for segment in layout.segments:
            frames = torch.linspace(1.0, float(most), segment.shape[1])
            parts.append(frames[None, None, :, None, None].expand(1, *segment.shape))
        return layout.pack(parts)


def guidance_by_time(config: SampleConfig, model: ModelFolder) -> Callable[[Tensor], float]:
    """Return the guidance of a step by its times [B, G]: one for all, or that of the expert that the step is for."""
    given = config.guidance
    if isinstance(given, dict):
        return lambda times: given[experts_at(model.experts, times.max()[None])[0].name]
    return lambda _: given


def check_sample(config: SampleConfig, model: ModelFolder) -> None:
    """Refuse a scheduler or a guidance of a first frame that does not suit the model, and experts that it has not."""
    if fault := model.noising.sampling_fault(config):
        raise UserError(fault)
    if config.first_guidance is not None and model.ladder(ObjectiveConfig()) is None:
        raise UserError(
            f"sample.first_guidance: {model.family.title} makes all frames at once, with one guidance; leave it out"
        )
    names = {expert.name for expert in model.experts if expert.name}
    if isinstance(config.guidance, dict) and config.guidance.keys() != names:
        known = f"the model's experts are {', '.join(sorted(names))}" if names else "the model is one: give a number"
        raise UserError(f"sample.guidance: is given for {', '.join(config.guidance)}, and {known}")
