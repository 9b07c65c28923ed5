"""Teach a sample one stage, whole or frame by frame, and make a video from stage to stage.

In: the layout of a clip. Out: lessons, each with a layout of its own. Frame by frame, the sequence begins with the
frames before the one that is taught, at falling size the older they are: the newest at the stage's own, the ones before
at those of the stages below, and all that are older at the smallest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.families.pyramid.stages import STAGES, Stage, all_stages, ends_of, entered, levels_of
from transpixeler.flow.draws import generator
from transpixeler.models.ladder import Ladder, Lesson, Noise, Place, Predict
from transpixeler.models.streams import Past, StreamLayout

COLUMN = (0, 1, 2, 2)  # the stages of successive samples
PAST_NOISE = 1 / 3  # the largest share of noise in earlier frames while training, so that errors do not add up
SMALLEST_STEP = 1e-3  # place of a stage's last step: the published steps are thousandths of it
STAGE: tuple[Stage, ...] = all_stages()


def past_of(stage: int, unit: int) -> tuple[Past, ...]:
    """Return the frames before the unit-th, from 0, the oldest first; scales count from the stage's own size."""
    found: list[Past] = []
    level, left = stage, unit
    while left:
        frames = left if found and level == 0 else 1
        found.append(Past(frames, 2 ** (stage - level)))
        left, level = left - frames, max(level - 1, 0)
    return tuple(found[::-1])


@dataclass(frozen=True)
class StageLesson(Lesson):
    """A clip on one stage, or one latent frame of it after those before."""

    clip: StreamLayout
    stage: int
    unit: int | None = None  # the frame that is taught; None: all of them at once
    past_noise = PAST_NOISE

    @property
    def layout(self) -> StreamLayout:
        return self._layout

    @cached_property
    def _layout(self) -> StreamLayout:
        smaller = 2 ** (STAGES - 1 - self.stage)
        shapes = tuple((c, f, h // smaller, w // smaller) for c, f, h, w in self.clip.shapes)
        if self.unit is None:
            return replace(self.clip, shapes=shapes)
        one = tuple((c, 1, h, w) for c, _, h, w in shapes)
        return replace(self.clip, shapes=one, past=past_of(self.stage, self.unit))

    @property
    def noises(self) -> int:
        """Count the clip's own, and those that lie over earlier frames."""
        return self.clip.elements + self.layout.elements

    @property
    def frames(self) -> slice:
        """Return which latent frames are taught."""
        return slice(None) if self.unit is None else slice(self.unit, self.unit + 1)

    def told(self, times: Tensor) -> Tensor:
        """Tell all of a stream the stage's time; what is given whole is told 0."""
        own = [max(self.layout.groups_of(group.stream)) for group in self.layout.groups]
        places = times[:, own]
        return torch.where(places > 0, STAGE[self.stage].told(places), 0.0)

    def ways(self, clean: Tensor, noise: Tensor, given: Collection[int]) -> tuple[Tensor, Tensor]:
        whole, over = noise.split([self.clip.elements, self.layout.elements], dim=1)
        ends, starts = [], []
        older = self.layout.unpack(over)
        streams = zip(self.clip.unpack(clean.float()), self.clip.unpack(whole), strict=True)
        for stream, (latents, own) in enumerate(streams):
            levels = levels_of(latents)
            end, start = ends_of(STAGE, self.stage, levels, levels_of(own, noise=True))
            if stream in given:
                end = levels[self.stage]
            before = self.past(levels)
            ends += [*before, end[:, :, self.frames]]
            first = stream * (len(before) + 1)
            starts += [*older[first : first + len(before)], start[:, :, self.frames]]
        return self.layout.pack(ends), self.layout.pack(starts)

    def past(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the frames before the one that is taught. levels: a stream at the size of each stage."""
        found, begin = [], 0
        for frames, scale in self.layout.past:
            level = levels[self.stage - int(math.log2(scale))]
            found.append(level[:, :, begin : begin + frames])
            begin += frames
        return found


@dataclass(frozen=True)
class PyramidLadder(Ladder):
    """Three stages; with `by_frame` each latent frame goes through all of them after those before it."""

    by_frame: bool

    def run(self, group: int) -> int:
        return math.lcm(len(COLUMN), group)

    def lesson(self, clip: StreamLayout, place: Place) -> StageLesson:
        """Rotate what is taught among the runs that share clips, so that each has the same tokens.

        Of a step's lessons on one clip no two are alike, and every latent frame is taught as often as any other.
        """
        run = self.run(place.group)
        turn, number = divmod(place.slot, run)
        lesson = (number + turn % place.group * (run // place.group)) % run
        stage = COLUMN[lesson % len(COLUMN)]
        if not self.by_frame:
            return StageLesson(clip, stage)
        frames, columns = clip.shapes[0][1], run // len(COLUMN)
        begun, drawn = divmod(place.step * columns + lesson // len(COLUMN), frames)
        unit = int(torch.randperm(frames, generator=generator("units", place.seed, begun))[drawn])
        mirrored = lesson % len(COLUMN) in (1, 3)  # a later frame has more before it: a step's lengths even out
        return StageLesson(clip, stage, frames - 1 - unit if mirrored else unit)

    def longest(self, clip: StreamLayout) -> StreamLayout:
        return StageLesson(clip, STAGES - 1, clip.shapes[0][1] - 1 if self.by_frame else None).layout

    def held_out(self, clip: StreamLayout, name: str) -> list[StageLesson]:
        frames = clip.shapes[0][1]
        unit = int(torch.randint(frames, (1,), generator=generator("held out", name))) if self.by_frame else None
        return [StageLesson(clip, stage, unit) for stage in range(STAGES)]

    @property
    def goes_on(self) -> bool:
        return self.by_frame

    def calls(self, clip: StreamLayout, steps: int, given: Mapping[int, Tensor]) -> int:
        return len(self._units(clip, given)) * STAGES * steps

    def _units(self, clip: StreamLayout, given: Mapping[int, Tensor]) -> list[int | None]:
        """Return the latent frames that are left to make, one after the other; None: all at once."""
        there = min((given[s].shape[1] if s in given else 0 for s in range(len(clip.names))), default=0)
        return list(range(there, clip.shapes[0][1])) if self.by_frame else [None]

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
        made = clip.unpack(torch.zeros(1, clip.elements, device=device))
        for stream, latents in given.items():
            made[stream][:, :, : latents.shape[1]] = latents.to(device)[None]
        start = [levels_of(x.to(device), noise=True)[0] for x in clip.unpack(noise(clip, "start"))]
        for unit in self._units(clip, given):
            lessons = [StageLesson(clip, stage, unit) for stage in range(STAGES)]
            taught = lessons[0].frames
            held = [s for s, latents in given.items() if unit is None or unit < latents.shape[1]]
            known = [levels_of(x) for x in made]
            x = [part[:, :, taught] for part in start]
            for lesson in lessons:
                x = self._climb(lesson, x, known, held, predict, noise, steps=steps)
            for stream, part in enumerate(x):
                made[stream][:, :, taught] = part
        return clip.pack(made)

    def _climb(
        self,
        lesson: StageLesson,
        x: list[Tensor],
        known: Sequence[Sequence[Tensor]],
        held: Collection[int],
        predict: Callable[[StreamLayout], Predict],
        noise: Noise,
        *,
        steps: int,
    ) -> list[Tensor]:
        """Return what a stage makes of what the one before made. known: of each stream, at the size of each stage.

        held: streams that are given.
        """
        layout, past = lesson.layout, [lesson.past(levels) for levels in known]
        if lesson.stage:
            parts = replace(layout, past=()).unpack(noise(replace(layout, past=()), f"{lesson.stage}/{lesson.unit}"))
            x = [entered(one, STAGE[lesson.stage], part.to(one)) for one, part in zip(x, parts, strict=True)]
        for stream in held:
            x[stream] = known[stream][lesson.stage][:, :, lesson.frames]
        ask = predict(layout)
        places = [*torch.linspace(1, SMALLEST_STEP, steps, dtype=torch.float64).tolist(), 0.0]
        times = torch.ones(1, len(layout.groups), device=x[0].device)
        for stream in held:
            times[:, list(layout.groups_of(stream))] = 0
        for place, after in itertools.pairwise(places):
            packed = layout.pack([part for own, one in zip(past, x, strict=True) for part in (*own, one)])
            velocities = layout.videos(ask(packed, lesson.told(times * place)))
            moved = zip(x, velocities, strict=True)
            x = [one if s in held else one + (after - place) * v for s, (one, v) in enumerate(moved)]
        return x

    def fault(self, config: Config) -> str:
        title = "Pyramid Flow"
        if config.train.micro_batch > 1 or config.train.micro_tokens:
            key = "train.micro_batch" if config.train.micro_batch > 1 else "train.micro_tokens"
            return f"{key}: each sample of {title} has a layout of its own, so each goes by itself; leave it out"
        if name := next((n for n, s in zip(config.streams, config.scales, strict=True) if s > 1), ""):
            return f"streams.{name}.scale: the stages of {title} go by streams of one size; set it to 1"
        if config.parallel.pipeline > 1:
            return f"parallel.pipeline: the samples of {title} have many lengths, which no schedule takes; set it to 1"
        if config.parallel.context > 1:
            return f"parallel.context: ranks cannot share the samples of {title}, the smallest are short; set it to 1"
        rows = [*config.objective.tasks.items()]
        streams = {"joint", "rgb_to_aux", "aux_to_rgb"} | {f"{name}_to_rest" for name in config.streams}
        if task := next((name for name, weight in rows if weight and name not in streams), ""):
            return (
                f"objective.tasks.{task}: {title} learns to go on from earlier frames with every task (sample --image "
                "does it), and is given none otherwise; leave it out"
            )
        return ""
