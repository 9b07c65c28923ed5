"""Train the runs of an experiment on the demo, each as far as it is not there yet, and time their steps.

In: a run's name, its config's keys and a step. Out: the save of that step, and the CPU seconds that a step took.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from transpixeler.config.sections import Config, UserError
from transpixeler.files import write_text
from transpixeler.parallel.runtime import Runtime
from transpixeler.training import trainer
from transpixeler.training.callbacks import Callbacks

log = logging.getLogger("transpixeler")

# of all runs: nothing is made but checkpoints and the save of the last step
KEYS = (
    "eval.every_epochs=0",
    "eval.before_first_step=false",
    "save.every_steps=0",
    "checkpoint.every_steps=100",
    "train.micro_batch=8",
)


class Trainings:
    """Runs of one folder, which the same command goes on with."""

    def __init__(self, out: Path, runtime: Runtime, config: Callable[..., Config]) -> None:
        """config: makes the config of a run of its keys."""
        self.out, self.runtime, self.config = out.resolve(), runtime, config

    def until(self, name: str, steps: int, *keys: str) -> Path:
        """Train a run until a step, from where it stopped, and return the save of that step."""
        folder = self.out / "demo/output" / name
        save = folder / f"step{steps}"
        if not save.is_dir():
            resume = any(folder.glob("checkpoints/global_step*[0-9]"))
            if not resume:  # what was stopped before its first checkpoint begins anew
                shutil.rmtree(folder, ignore_errors=True)
            log.info("%s: learns until step %d", name, steps)
            moments: list[float] = []
            callbacks = Callbacks(on_step=lambda _: moments.append(time.process_time()))
            config = self.config(f"run_name={name}", f"train.max_steps={steps}", *keys)
            trainer.train(config, self.runtime, resume=str(folder) if resume else None, callbacks=callbacks)
            if not save.is_dir():
                raise UserError(f"{folder}: is not at step {steps}: the training was stopped, or went further before")
            self._keep_seconds(name, moments)
        return save

    def seconds(self, name: str) -> float:
        """Return the CPU seconds of a step of a run."""
        return json.loads(self._place(name).read_text())["step"]

    def _keep_seconds(self, name: str, moments: Sequence[float]) -> None:
        """Keep the CPU seconds of a step, the median, of a run's first training that had two steps or more."""
        steps = [after - before for before, after in itertools.pairwise(moments)]
        if steps and not self._place(name).is_file():
            write_text(self._place(name), json.dumps({"step": statistics.median(steps), "steps": len(steps)}))

    def _place(self, name: str) -> Path:
        return self.out / f"{name}.seconds.json"
