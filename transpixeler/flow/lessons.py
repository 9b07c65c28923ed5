"""Define what samples learn of a model with a ladder: each by itself, on a rung of its own.

In: a batch's packed latents and fields, and a lesson for each sample. Out: an `Example` for each, of its own layout.
Nothing depends on the layout of ranks or on earlier calls, as in `objective`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig
from transpixeler.flow.draws import draw_noise, draw_times, generator
from transpixeler.flow.objective import Example, Fields, loss_weights, with_dropped_captions
from transpixeler.flow.tasks import Task, draw_task, tasks, tasks_of_step
from transpixeler.models.ladder import Lesson
from transpixeler.models.streams import StreamLayout


def prepare_lessons(
    config: ObjectiveConfig,
    lessons: Sequence[Lesson],
    *,
    seed: int,
    step: int,
    layout: StreamLayout,
    latents: Tensor,
    fields: Fields,
    empty: Fields,
    ids: Sequence[str],
    slots: Sequence[int],
    batch: int,
) -> tuple[Example, ...]:
    """Draw for the samples `ids` at `slots` of a global batch of `batch`, each with its lesson.

    layout: of their clips. empty: an empty caption's fields.
    """
    keys = [(seed, step, sample, slot) for sample, slot in zip(ids, slots, strict=True)]
    known, weights = tasks(layout.names, config), tasks_of_step(config, layout.names, seed=seed, step=step)
    times = draw_times(config, seed=seed, step=step, slots=slots, batch=batch, shift=1.0)
    fields = with_dropped_captions(config, fields, empty, keys)
    found = []
    for row, (lesson, key) in enumerate(zip(lessons, keys, strict=True)):
        one, task = slice(row, row + 1), known[draw_task(weights, *key)]
        past = lesson.past_noise * float(torch.rand((), generator=generator("past", *key)))
        noise = draw_noise(lesson.noises, *key)[None]
        own = {name: value[one] for name, value in fields.items()}
        found.append(example(config, lesson, latents[one], noise, times[one], past, own, task, batch=batch))
    return tuple(found)


def example(
    config: ObjectiveConfig,
    lesson: Lesson,
    latents: Tensor,
    noise: Tensor,
    times: Tensor,
    past: float,
    fields: Fields,
    task: Task,
    *,
    batch: int,
) -> Example:
    """Return samples [b, N] of a clip at places [b] of a lesson's way. past: the share of noise in earlier frames."""
    ends = lesson.ways(latents, noise, task.given)
    layout, places = lesson.layout, times[:, None].repeat(1, len(lesson.layout.groups))
    free = torch.ones_like(places)
    for number, group in enumerate(layout.groups):
        if group.past:
            places[:, number], free[:, number] = past, 0
        if group.stream in task.given:
            places[:, number] = free[:, number] = 0
    return Example(layout, *ends, places, fields, loss_weights(config, layout, free, batch), noising=lesson)
