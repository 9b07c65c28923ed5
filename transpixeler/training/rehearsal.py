"""Do all that comes before a training's first step, and write nothing: `train --dry-run`.

In: what `train` takes. Out: what it would do, in the log; the same one line where it would refuse.
"""

from __future__ import annotations

import logging
from collections import Counter

from transpixeler.config import Config
from transpixeler.data.encode import find_missing
from transpixeler.data.loader import Batch
from transpixeler.flow.objective import Example
from transpixeler.models.family import ModelFolder, open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engines
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import opening, telemetry
from transpixeler.runs.folder import STRAIGHT_ON, Going
from transpixeler.sampling.model import make_model, weights_by_expert
from transpixeler.training import identity, optim, overview, preflight
from transpixeler.training.batches import open_loader
from transpixeler.training.schedule import make_schedule
from transpixeler.training.state import TrainingState, find_beginning

logger = logging.getLogger("transpixeler")


def rehearse(config: Config, runtime: Runtime, *, resume: str | None = None, going: Going = STRAIGHT_ON) -> None:
    """Check, build and read as `train` does, up to the first batch. A collective call."""
    layout = meshes.resolve(config.parallel, runtime.world_size)
    preflight.check(config, layout)
    optim.check(config.optim)
    telemetry.check(config.log)
    run = opening.find_run(config, runtime, resume, going)
    beginning = find_beginning(config, run.restored)
    model, sources = open_model(config.model), weights_by_expert(config)
    preflight.check_model(config, model, beginning.scopes)
    hosts = identity.check_hosts(config, runtime, [source.path for source in sources.values()])
    data, missing = find_missing(config, model, runtime)
    order = data.train.order(seed=config.seed, global_batch=config.train.global_batch)
    schedule, mesh = make_schedule(config, order), meshes.build(layout, runtime)
    found = identity.check(config, runtime, run, hosts, data)
    engine = build_engines(config, mesh, lambda _: make_model(config), sources, scopes=beginning.scopes)
    state = TrainingState(config, runtime, engine, beginning, found)
    state.resume(run)
    overview.introduce(config, runtime, run, model, engine, data, schedule, state.step)
    if any((missing.clips, missing.texts, missing.blanks)):
        line = f"encodes  {len(missing.clips)} clips and {len(missing.texts)} captions first; no batch was read"
    else:
        loader = open_loader(config, data.train, model, mesh, schedule, state.step)
        try:
            batch, example = next(loader)
            line = _batch_line(batch, example, model)
        finally:
            loader.close()
    if runtime.is_main:
        todo = schedule.total - state.step
        logger.info("%s\ndry run: all is well; %d steps would be trained, and nothing was written", line, todo)


def _batch_line(batch: Batch, example: Example, model: ModelFolder) -> str:
    """Describe the first step's batch."""
    frames, height, width = model.geometry.pixels(batch.layout.shapes[0])
    times = example.timesteps.amax(1)
    clips = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in Counter(batch.ids).items())
    levels = f"{float(times.min()):.2f} to {float(times.max()):.2f}"
    return f"first    {width}×{height}×{frames} at noise levels {levels}: {clips}"
