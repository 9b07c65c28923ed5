"""Feed the loop: batches from the cache, with their noise and timesteps drawn a few steps ahead of the device.

In: the data set, its order and the step to begin at. Out: an endless iterator of (batch, examples).
"""

from __future__ import annotations

from functools import partial

from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket, batch_for, micro_batch_for
from transpixeler.data.dataset import Dataset
from transpixeler.data.loader import Assembler, Batch, Loader
from transpixeler.flow import objective
from transpixeler.flow.experts import cut, draw_expert, training_shift
from transpixeler.flow.lessons import prepare_lessons
from transpixeler.flow.objective import Example
from transpixeler.models.experts import chosen_experts
from transpixeler.models.family import ModelFolder
from transpixeler.models.geometry import Geometry
from transpixeler.models.ladder import Ladder, Place
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.mesh import Mesh
from transpixeler.training.schedule import Schedule


def open_loader(config: Config, data: Dataset, model: ModelFolder, mesh: Mesh, schedule: Schedule, step: int) -> Loader:
    """Start the loader's thread at a step; the caller closes it."""
    epoch, epoch_step = schedule.order.locate(step)
    ladder, group = model.ladder(config.objective), config.data.sync_group
    assembler = Assembler(data, patch=model.geometry.patch, fields=model.fields, device=mesh.device)
    return Loader(
        assembler,
        schedule.order,
        rank=mesh.data_rank,
        ranks=mesh.layout.data,
        epoch=epoch,
        step=epoch_step,
        group=(group, ladder.run(group) if ladder else 1),
        prepare=partial(_prepare, config, model, assembler.pin),
    )


def _prepare(config: Config, model: ModelFolder, pin: bool, batch: Batch) -> tuple[Batch, tuple[Example, ...]]:
    """Draw the noise and timesteps of a batch, in the loader's thread; an example for each layout that it takes."""
    if ladder := model.ladder(config.objective):
        examples = _lessons(config, ladder, batch)
    else:
        examples = (_example(config, model, batch),)
    return batch, tuple(one.pinned() for one in examples) if pin else examples


def _lessons(config: Config, ladder: Ladder, batch: Batch) -> tuple[Example, ...]:
    """Return each sample by itself, on its own rung."""
    places = [Place(config.seed, batch.step, slot, config.data.sync_group) for slot in batch.slots]
    return prepare_lessons(
        config.objective,
        [ladder.lesson(batch.layout, place) for place in places],
        seed=config.seed,
        step=batch.step,
        layout=batch.layout,
        latents=batch.latents,
        fields=batch.fields,
        empty=batch.empty,
        ids=[batch.ids[slot] for slot in batch.slots],
        slots=batch.slots,
        batch=len(batch.ids),
    )


def _example(config: Config, model: ModelFolder, batch: Batch) -> Example:
    shift = training_shift(config.objective, model, batch.layout.grids[0])
    known, run = chosen_experts(config.model, model.experts), config.train.expert_steps
    expert = draw_expert(config.objective, known, seed=config.seed, step=batch.step, run=run, shift=shift)
    return objective.prepare(
        cut(config.objective, expert),
        seed=config.seed,
        step=batch.step,
        layout=batch.layout,
        latents=batch.latents,
        fields=batch.fields,
        empty=batch.empty,
        ids=[batch.ids[slot] for slot in batch.slots],
        slots=batch.slots,
        batch=len(batch.ids),
        unseen=batch.unseen,
        shown=batch.shown,
        shift=shift,
        expert=expert.name,
        noising=model.noising,
    )


def micro_batch(config: Config, geometry: Geometry, ranks: int, layout: StreamLayout) -> int:
    """Return how many samples of a layout one forward pass takes. `ranks`: data ranks."""
    bucket = Bucket(*geometry.pixels(layout.shapes[0]))
    rules = config.data.buckets
    share = batch_for(bucket, config.train.global_batch, rules) // ranks
    return micro_batch_for(bucket, per_rank_batch=share, train=config.train, rules=rules, tokens=layout.tokens)
