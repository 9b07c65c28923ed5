"""Check a config, and build what a training moves: data, schedule, engine and state, in the one order that is right.

In: a config, the run and how its clips are found. Out: `Parts`, or a `UserError` before anything is written. A training
and its rehearsal are the same up to here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket
from transpixeler.data.dataset import Dataset, Datasets, training_order
from transpixeler.data.order import Order
from transpixeler.models.family import ModelFolder, open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engines
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.pipeline import check_microbatches
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import telemetry
from transpixeler.runs.folder import Run
from transpixeler.sampling.model import make_model, weights_by_expert
from transpixeler.training import identity, optim, preflight, room
from transpixeler.training.batches import micro_batch
from transpixeler.training.schedule import Schedule, make_schedule
from transpixeler.training.state import TrainingState, find_beginning

FindClips = Callable[[Config, ModelFolder, Runtime], Datasets]


@dataclass(frozen=True)
class Parts:
    """Hold what a training moves, on this rank."""

    model: ModelFolder
    data: Datasets
    schedule: Schedule
    mesh: meshes.Mesh
    engine: AnyEngine
    state: TrainingState


def check(config: Config, runtime: Runtime) -> meshes.Layout:
    """Refuse what cannot be trained, by the config alone; return how the ranks are laid out."""
    layout = meshes.resolve(config.parallel, runtime.world_size)
    preflight.check(config, layout)
    optim.check(config.optim)
    telemetry.check(config.log)
    return layout


def build_parts(config: Config, runtime: Runtime, layout: meshes.Layout, run: Run, find_clips: FindClips) -> Parts:
    """Build all parts, with the state that training begins or goes on with. A collective call."""
    beginning = find_beginning(config, run.restored)
    model, sources = open_model(config.model), weights_by_expert(config)
    preflight.check_model(config, layout, model, beginning.scopes)
    hosts = identity.check_hosts(config, runtime, [source.path for source in sources.values()])
    data = find_clips(config, model, runtime)
    order = training_order(config, data.train)
    _check_schedule(config, layout, model, data.train, order)
    schedule = make_schedule(config, order)
    mesh = meshes.build(layout, runtime)
    found = identity.check(config, runtime, run, hosts, data)
    chosen = room.with_recompute(config, runtime, layout, model, beginning.scopes, data.train)
    engine = build_engines(chosen, mesh, lambda _: make_model(config), sources, scopes=beginning.scopes)
    state = TrainingState(config, runtime, engine, beginning, found)
    state.resume(run)
    return Parts(model, data, schedule, mesh, engine, state)


def _check_schedule(config: Config, layout: meshes.Layout, model: ModelFolder, data: Dataset, order: Order) -> None:
    """Refuse buckets whose steps the pipeline's schedule cannot run, before the first of them comes."""
    for row in order.rows:
        bucket = Bucket(*data.items[row.items[0]].bucket)
        shape = model.geometry.over(config.scales).layout(tuple(config.streams), config.scales, bucket)
        count = (
            row.batch * config.data.sync_group // layout.data // micro_batch(config, model.geometry, layout.data, shape)
        )
        check_microbatches(config.parallel, count, of=f" of {bucket}")
