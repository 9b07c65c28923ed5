"""Videos to make and an engine go in, their latents come out, in the same way on any layout.

Training's evaluations, `sample` and `eval` all sample here: each data rank takes its share of the videos, and a
pipeline's ranks work on one video together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transpixeler.config import SampleConfig, UserError
from transpixeler.data.progress import Progress
from transpixeler.flow.objective import Fields
from transpixeler.flow.solver import Velocity, denoise, make_solver, start_noise
from transpixeler.models.experts import experts_at
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.mesh import Mesh
from transpixeler.sampling.video import Video

# Up to so many tokens both halves of guidance run in one batch; a longer sequence fills a device by itself.
GUIDANCE_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Sampler:
    """Makes videos with an engine as it is; every rank calls it with the same videos."""

    engine: AnyEngine
    mesh: Mesh
    config: SampleConfig
    negative: Fields | None  # of the config's negative prompt; None: without guidance
    model: ModelFolder

    def each(
        self, videos: Sequence[Video], *, after_step: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the video, its latents [N] on the host) of this data rank's share, on its whole pipeline.

        `after_step` is called equally often on all ranks.
        """
        steps = self.config.steps * -(-len(videos) // self.mesh.layout.data)
        shown = self.mesh.data_rank == 0 and self.mesh.is_first_stage
        with Progress("steps", steps, shown=shown, verb="sampling") as progress, self.engine.evaluating():

            def stepped() -> None:
                progress.step()
                after_step()

            for number, counts in turns(len(videos), self.mesh):
                latents = self._latents(videos[number], stepped)
                if counts:
                    yield number, latents

    def _latents(self, video: Video, after_step: Callable[[], object]) -> Tensor:
        solver = self._solver(video.layout.segment_lengths[0])
        noise = start_noise(video.layout, video.seed).to(self.mesh.device)
        guidance = guidance_by_time(self.config, self.model)
        negative = self.negative if self.negative is None or video.negative is None else video.negative
        velocity = guided(self.engine, video.layout, video.fields, negative, guidance=guidance)
        held = {"given": video.given, "lasts": video.lasts}
        with self._remembering(video):
            return denoise(velocity, noise, video.layout, solver, **held, after_step=after_step)[0].cpu()

    def _remembering(self, video: Video) -> AbstractContextManager[None]:
        """Compute a video's RGB in the first step alone, where it is given whole and so the same in all of them."""
        frames = video.layout.shapes[0][1]
        whole = 0 in video.given and video.given[0].shape[1] == frames
        rows = 1 if self.negative is None else 2
        where = self.config.rgb_memory if whole else "off"
        return self.engine.remembering_rgb(video.layout, rows=rows, where=where)

    def _solver(self, tokens: int) -> Any:
        name, steps, shift = self.config.scheduler, self.config.steps, self.config.shift
        if shift != "auto":
            return make_solver(name, steps=steps, shift=shift)
        levels = self.model.noise_levels(steps, tokens)
        return make_solver(name, steps=steps, shift=self.model.sampling_shift(tokens), levels=levels)


def guidance_by_time(config: SampleConfig, model: ModelFolder) -> Callable[[Tensor], float]:
    """Return the guidance of a step by its times [B, G]: one for all, or that of the expert that the step is for."""
    given = config.guidance
    if isinstance(given, dict):
        return lambda times: given[experts_at(model.experts, times.max()[None])[0].name]
    return lambda _: given


def check_guidance(config: SampleConfig, model: ModelFolder) -> None:
    """Refuse a guidance by expert that does not name the model's experts."""
    names = {expert.name for expert in model.experts if expert.name}
    if isinstance(config.guidance, dict) and config.guidance.keys() != names:
        known = f"the model's experts are {', '.join(sorted(names))}" if names else "the model is one: give a number"
        raise UserError(f"sample.guidance: is given for {', '.join(config.guidance)}, and {known}")


def guided(
    engine: AnyEngine,
    layout: StreamLayout,
    text: Fields,
    negative: Fields | None,
    *,
    guidance: Callable[[Tensor], float],
) -> Velocity:
    """Return a velocity that leads away from the negative prompt's fields, as far as `guidance` says for the times.

    Without them it is the model's own velocity, at half the cost.
    """
    both = [text] if negative is None else [text, negative]
    # what is shown of given frames stands beside either text
    fields = [torch.stack([found.get(name, text[name]) for found in both]).to(engine.mesh.device) for name in text]
    rows = len(both)
    # Two microbatches fill a pipeline; on one stage a short sequence fills the device only when both run together.
    batch = rows if engine.config.pipeline == 1 and layout.tokens <= GUIDANCE_BATCH_TOKENS else 1

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        predicted = engine.forward(x.repeat(rows, 1), (times.repeat(rows, 1), *fields), layout, batch)
        if negative is None:
            return predicted
        wanted, unwanted = predicted.chunk(2)
        return unwanted + guidance(times) * (wanted - unwanted)

    return velocity


def turns(count: int, mesh: Mesh) -> list[tuple[int, bool]]:
    """List which of `count` pieces of work this data rank does in turn, and whether the result counts.

    All ranks gather sharded weights together, so all take equally many turns and some repeat a piece for nothing.
    """
    data = mesh.layout.data
    numbers = range(mesh.data_rank, math.ceil(count / data) * data, data)
    return [(number % count, number < count) for number in numbers]
