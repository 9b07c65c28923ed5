"""Do all that comes before a training's first step, and make neither run nor records: `train --dry-run`.

In: what `train` takes. Out: what it would do, in the log; the same one line where it would refuse.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from transpixeler.config.sections import Config
from transpixeler.data.catalog import cache_folders
from transpixeler.data.dataset import Datasets
from transpixeler.data.encode import find_missing
from transpixeler.data.loader import Batch
from transpixeler.data.work import Work
from transpixeler.files import shown_path
from transpixeler.flow.objective import Example
from transpixeler.models.family import ModelFolder
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import opening
from transpixeler.runs.folder import STRAIGHT_ON, Going
from transpixeler.training import overview
from transpixeler.training.batches import open_loader
from transpixeler.training.parts import build_parts, check

logger = logging.getLogger("transpixeler")


def rehearse(config: Config, runtime: Runtime, *, resume: str | None = None, going: Going = STRAIGHT_ON) -> None:
    """Check, build and read as `train` does, up to the first batch. A collective call."""
    layout = check(config, runtime)
    run = opening.find_run(config, runtime, resume, going)
    missing = Work((), ())

    def find_clips(config: Config, model: ModelFolder, runtime: Runtime) -> Datasets:
        nonlocal missing
        data, missing = find_missing(config, model, runtime)
        return data

    parts = build_parts(config, runtime, layout, run, find_clips)
    model, state, schedule = parts.model, parts.state, parts.schedule
    overview.introduce(config, runtime, run, model, parts.engine, parts.data, schedule, state.step)
    if missing:
        verb, rest = str(missing).split(" ", 1)
        line = f"{verb:8} {rest} first; no batch was read"
    else:
        loader = open_loader(config, parts.data.train, model, parts.mesh, schedule, state.step)
        try:
            batch, examples = next(loader)
            line = _batch_line(batch, examples, model)
        finally:
            loader.close()
    if runtime.is_main:
        todo = schedule.total - state.step
        notes = ", ".join(map(shown_path, cache_folders(config)))
        said = f"{todo} steps would be trained. Nothing was made; what is known of the media files is kept in {notes}"
        logger.info("%s\ndry run: all is well; %s", line, said)


def _batch_line(batch: Batch, examples: Sequence[Example], model: ModelFolder) -> str:
    """Describe the first step's batch."""
    frames, height, width = model.geometry.pixels(batch.layout.shapes[0])
    times = torch.cat([example.timesteps.amax(1) for example in examples])
    clips = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in Counter(batch.ids).items())
    levels = f"{float(times.min()):.2f} to {float(times.max()):.2f}"
    return f"first    {width}×{height}×{frames} at noise levels {levels}: {clips}"
