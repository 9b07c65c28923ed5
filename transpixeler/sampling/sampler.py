"""Videos to make and an engine go in, their latents come out, in the same way on any layout.

Training's evaluations, `sample` and `eval` all sample here: each data rank takes its share of the videos, and a
pipeline's ranks work on one video together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from transpixeler.config.sections import SampleConfig
from transpixeler.data.progress import Progress
from transpixeler.data.prompts import follows_text
from transpixeler.flow.draws import draw_noise
from transpixeler.flow.objective import Fields
from transpixeler.flow.solver import Predict, denoise, fresh_noise, start_noise, with_trace
from transpixeler.models.conditions import shown_firsts, with_stills
from transpixeler.models.family import ModelFolder
from transpixeler.models.ladder import Ladder
from transpixeler.models.noising import Solver
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.mesh import Mesh
from transpixeler.sampling.guidance import Guidance
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
    ladder: Ladder | None = None  # of the model, where it makes a video at several sizes

    def each(
        self, videos: Sequence[Video], *, after_step: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the video, its latents [N] on the host) of this data rank's share, on all its ranks.

        `after_step` is called equally often on all ranks.
        """
        todo = turns(len(videos), self.mesh)
        most = [self._steps(videos, turn) for turn in range(len(todo))]
        steps = sum(most)
        shown = self.mesh.data_rank == 0 and self.mesh.speaks
        with Progress("steps", steps, shown=shown, verb="sampling") as progress, self.engine.evaluating():

            def stepped() -> None:
                progress.step()
                after_step()

            for (number, counts), most_of_turn in zip(todo, most, strict=True):
                latents = self._latents(videos[number], stepped, most_of_turn)
                if counts:
                    yield number, latents

    def _steps(self, videos: Sequence[Video], turn: int) -> int:
        """Return how often a turn asks the model, on the rank that asks most: all gather sharded weights as often."""
        if self.ladder is None:
            return self.config.steps
        data = self.mesh.layout.data
        made = [videos[number % len(videos)] for number in range(turn * data, (turn + 1) * data)]
        return max(self.ladder.calls(whole(one.layout), self.config.steps, one.given) for one in made)

    def _latents(self, video: Video, after_step: Callable[[], object], steps: int = 0) -> Tensor:
        if self.ladder is not None:
            return self._climbed(video, after_step, steps)
        solver = self._solver(video)
        noise = self._start(video).to(self.mesh.device)
        guidance = Guidance.of(self.config, self.model)
        texts = video.fields, self._negative(video)
        predict = guided(self.engine, video.layout, *texts, guidance=guidance, unshown=video.unshown)
        held = {"given": video.given, "beside": video.beside}
        with self._remembering(video):
            made = denoise(predict, noise, video.layout, solver, **held, after_step=after_step)[0].cpu()
        shown = video.shown or video.shown_last
        return with_stills(self.model.fields, video.layout, made, video.fields) if shown else made

    def _climbed(self, video: Video, after_step: Callable[[], object], steps: int) -> Tensor:
        """Return what a model makes at several sizes. steps: that other ranks take at least, perhaps for less."""
        ladder = self.ladder
        assert ladder is not None and not video.beside, "checked where videos are asked for"
        texts, guidance = (video.fields, self._negative(video)), Guidance.of(self.config, self.model)
        asked = 0

        def predict(layout: StreamLayout) -> Predict:
            scales, first = guidance, self.config.first_guidance
            if first is not None and ladder.goes_on and not layout.past:
                scales = replace(guidance, text=lambda _: first)
            model = guided(self.engine, layout, *texts, guidance=scales)

            def ask(x: Tensor, times: Tensor) -> Tensor:
                nonlocal asked
                found, asked = model(x, times), asked + 1
                after_step()
                return found

            return ask

        def noise(layout: StreamLayout, name: str) -> Tensor:
            parts = zip(layout.segments, layout.segment_sizes, strict=True)
            seed = video.seed if name == "start" else f"{video.seed}/{name}"
            return torch.cat([draw_noise(n, "sample", seed, layout.names[one.stream]) for one, n in parts])[None]

        clip, device = whole(video.layout), self.mesh.device
        settings = {"steps": self.config.steps, "given": video.given, "device": device}
        made = ladder.make(clip, predict, noise, **settings)[0].cpu()
        if asked < steps:
            idle, groups = predict(clip), len(clip.groups)
            for _ in range(steps - asked):
                idle(torch.zeros(1, clip.elements, device=device), torch.ones(1, groups, device=device))
        return made

    def _start(self, video: Video) -> Tensor:
        """Return the noise [1, N] that a video starts from, of some models with a trace of its given first frames."""
        noise, share = start_noise(video.layout, video.seed), self.model.image_trace
        if not share:
            return noise
        cut = [stream for stream in video.given if video.layout.cuts and video.layout.cuts[stream]]
        firsts = {stream: video.given[stream][:, :1] for stream in cut}
        firsts |= shown_firsts(self.model.fields, video.layout, video.fields) if video.shown else {}
        return with_trace(noise, video.layout, firsts, share)

    def _negative(self, video: Video) -> Fields | None:
        """Return the fields that guidance leads away from; None where it leads nowhere, as without any."""
        leads = follows_text(self.config) or video.unshown
        if self.negative is None or not leads:
            return None
        return self.negative if video.negative is None else video.negative

    def _remembering(self, video: Video) -> AbstractContextManager[None]:
        """Compute a video's RGB in the first step alone, where it is given whole and so the same in all of them."""
        frames = video.layout.shapes[0][1]
        whole = 0 in video.given and video.given[0].shape[1] == frames
        rows = 1 if self._negative(video) is None else 3 if video.unshown else 2
        where = self.config.rgb_memory if whole else "off"
        return self.engine.remembering_rgb(video.layout, rows=rows, where=where)

    def _solver(self, video: Video) -> Solver:
        name, steps, shift, grid = self.config.scheduler, self.config.steps, self.config.shift, video.layout.grids[0]
        fresh = partial(fresh_noise, video.layout, video.seed)
        solver = partial(self.model.noising.solver, name, steps=steps, fresh=fresh)
        if shift != "auto":
            return solver(shift=shift)
        levels = self.model.noise_levels(steps, math.prod(grid))
        return solver(shift=self.model.sampling_shift_of(grid), levels=levels)


def whole(layout: StreamLayout) -> StreamLayout:
    """Return the layout of whole videos, whatever of them is given."""
    return replace(layout, cuts=())


def guided(
    engine: AnyEngine,
    layout: StreamLayout,
    text: Fields,
    negative: Fields | None,
    *,
    guidance: Guidance | Callable[[Tensor], float],
    unshown: Fields | None = None,
) -> Predict:
    """Return a prediction that leads away from the negative prompt's fields, as far as `guidance` says for the times.

    Without them it is the model's own, at half the cost. unshown: the fields of nothing shown, which the
    negative prompt is also run beside, for guidance to given frames.
    """
    scales = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    texts = [text] if negative is None else [text, negative]
    if negative is not None and unshown:
        texts.append({**negative, **unshown})
    # what is shown of given frames stands beside either text
    fields = [torch.stack([found.get(name, text[name]) for found in texts]).to(engine.mesh.device) for name in text]
    rows, steps = len(texts), itertools.count()
    # Two microbatches fill a pipeline; on one stage a short sequence fills the device only when both run together.
    batch = rows if engine.config.pipeline == 1 and layout.tokens <= GUIDANCE_BATCH_TOKENS else 1

    def predict(x: Tensor, times: Tensor) -> Tensor:
        predicted = engine.forward(x.repeat(rows, 1), (times.repeat(rows, 1), *fields), layout, batch)
        if negative is None:
            return predicted
        scale, shown_scale = scales.at(next(steps), times, layout)
        wanted, unwanted, *unseen = predicted.chunk(rows)
        start = unseen[0] + shown_scale * (unwanted - unseen[0]) if unseen else unwanted
        return start + scale * (wanted - unwanted)

    return predict


def turns(count: int, mesh: Mesh) -> list[tuple[int, bool]]:
    """List which of `count` pieces of work this data rank does in turn, and whether the result counts.

    All ranks gather sharded weights together, so all take equally many turns and some repeat a piece for nothing.
    """
    data = mesh.layout.data
    numbers = range(mesh.data_rank, math.ceil(count / data) * data, data)
    return [(number % count, number < count) for number in numbers]
