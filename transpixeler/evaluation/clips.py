"""Choose the held-out clips and the tasks that each is evaluated under, and read them from the cache.

In: `data.eval` and a config. Out: pieces (a clip under a task) in a fixed order, and examples with fixed noise. Every
clip meets the same noise at the same times at each evaluation, on any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from transpixeler.config.sections import Config
from transpixeler.data.dataset import Dataset
from transpixeler.data.items import Item
from transpixeler.data.loader import Assembler, Batch
from transpixeler.flow import tasks
from transpixeler.flow.draws import draw_noise
from transpixeler.flow.lessons import example as taught
from transpixeler.flow.objective import Example, Fields, given_at_zero, told
from transpixeler.flow.tasks import Task, narrowed
from transpixeler.models.conditions import shows_frames, shows_stills
from transpixeler.models.experts import ONLY, Expert, chosen_experts
from transpixeler.models.family import Field, ModelFolder
from transpixeler.models.ladder import Lesson
from transpixeler.models.noising import RECTIFIED, Noising

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """One clip under one task."""

    item: int  # its place in the data set
    task: Task
    name: str  # SET, or SET/TASK where the task is not joint
    expert: Expert  # whose range of noise levels the losses are of

    @property
    def title(self) -> str:
        """Return the name that its losses are told under: the expert's, where there are several, comes last."""
        return f"{self.name}/{self.expert.name}" if self.expert.name else self.name


class HeldOut:
    """The clips of `data.eval`, as evaluations read them."""

    def __init__(self, config: Config, data: Dataset, model: ModelFolder) -> None:
        self.config, self.data = config, data
        self.assembler = Assembler(data, patch=model.geometry.patch, fields=model.fields) if data.items else None
        self.experts = chosen_experts(config.model, model.experts)
        self.noising, self.ladder = model.noising, model.ladder(config.objective)
        self.pieces = pieces(data, config, self.experts, fields=model.fields)

    def item(self, piece: Piece) -> Item:
        return self.data.items[piece.item]

    def batch(self, piece: Piece) -> Batch:
        """Return the clip's latents and caption as a batch of one."""
        assert self.assembler is not None, "without clips there are no pieces"
        return self.assembler.batch(np.array([piece.item]), slots=range(1))

    def examples(self, piece: Piece) -> list[Example]:
        """Return the clip at every one of `eval.times`, each with its own noise: a pure function of (clip, time).

        There is one example, or one for each size at which the model makes a video.
        """
        batch = self.batch(piece)
        if self.ladder is None:
            return [at_all_times(batch, self.config, piece.task, piece.expert, noising=self.noising)]
        lessons = self.ladder.held_out(batch.layout, batch.ids[0])
        return [taught_at_all_times(batch, self.config, piece.task, lesson) for lesson in lessons]

    def of_expert(self, expert: Expert) -> list[Piece]:
        """Return the pieces of one expert; each clip under each task is a piece of every expert."""
        return [piece for piece in self.pieces if piece.expert == expert]


def pieces(
    data: Dataset, config: Config, experts: Sequence[Expert] = (ONLY,), *, fields: Sequence[Field] = ()
) -> tuple[Piece, ...]:
    """Return every evaluated clip under every trained task for each expert, in the order of sets, tasks and ids.

    fields: of the model.
    """
    known = tasks.tasks(data.streams, config.objective, shows=shows_frames(fields), stills=shows_stills(fields))
    trained_tasks = [name for name in known if config.objective.tasks.get(name, 0) > 0]
    by_set: dict[str, list[int]] = {}
    for number in sorted(range(len(data.items)), key=lambda n: data.items[n].id):
        by_set.setdefault(data.items[number].source, []).append(number)
    found: list[Piece] = []
    for name, numbers in by_set.items():
        for task in trained_tasks:
            title = name if not known[task].gives else f"{name}/{task}"
            chosen = spread(numbers, config.eval.clips or len(numbers))
            found += [Piece(number, known[task], title, expert) for expert in experts for number in chosen]
    return tuple(found)


def spread(things: Sequence[T], count: int) -> list[T]:
    """Return at most `count` things, evenly spread over all of them."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def at_all_times(
    batch: Batch, config: Config, task: Task, expert: Expert = ONLY, *, noising: Noising = RECTIFIED
) -> Example:
    """Return the one clip of a batch, once for each of `eval.times` of an expert's range."""
    layout = task.cut(batch.layout)
    levels = [expert.within(t) for t in config.eval.times]
    times = noising.times(torch.tensor(levels, dtype=torch.float32))
    rows = len(times)
    times, weights = given_at_zero(times, layout, [task] * rows)
    noise = torch.stack([draw_noise(layout.elements, "eval", batch.ids[0], f"{t:g}") for t in config.eval.times])
    latents = narrowed(batch.latents, batch.layout, layout).expand(rows, -1)
    latents, noise = noising.ends(latents, noise, layout)
    return Example(
        layout=layout,
        latents=latents,
        noise=noise,
        timesteps=times,
        fields={name: value.expand(rows, *value.shape[1:]) for name, value in all_fields(batch, task).items()},
        weights=weights,
        expert=expert.name,
        noising=noising,
    )


def taught_at_all_times(batch: Batch, config: Config, task: Task, lesson: Lesson) -> Example:
    """Return the one clip of a batch under a lesson, once for each of `eval.times`; earlier frames have no noise."""
    levels = config.eval.times
    times, rows = torch.tensor(levels, dtype=torch.float32), len(levels)
    noise = torch.stack([draw_noise(lesson.noises, "eval", batch.ids[0], f"{t:g}") for t in levels])
    fields = {name: value.expand(rows, *value.shape[1:]) for name, value in batch.fields.items()}
    latents = batch.latents.expand(rows, -1)
    return taught(config.objective, lesson, latents, noise, times, 0.0, fields, task, batch=1)


def all_fields(batch: Batch, task: Task) -> Fields:
    """Return the fields of a batch's clips under a task: those of captions, and what is shown of given frames."""
    fields = told(batch.fields, batch.unseen, [task] * len(batch.latents), batch.layout)
    if batch.shown is None:
        return fields
    ends = ([streams] * len(batch.latents) for streams in (task.shown, task.shown_last))
    return {**fields, **batch.shown.values(batch.layout, *ends)}
