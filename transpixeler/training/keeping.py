"""Save what training made, adapters and checkpoints when they are due, and push it to the Hub.

In: the training state, the schedule and what users asked for. Out: RUN/epoch1, RUN/step1000 and RUN/checkpoints. Which
of them are due by the clock is rank 0's decision, which all ranks share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from transpixeler.config.sections import Fault
from transpixeler.data.loader import Batch
from transpixeler.parallel.experts import AnyEngine
from transpixeler.publishing import hub
from transpixeler.runs.checkpoint import folder_name
from transpixeler.runs.checkpointer import Checkpointer
from transpixeler.runs.controls import Controls, Interrupted
from transpixeler.runs.folder import Run
from transpixeler.runs.guard import guard
from transpixeler.runs.training_state import own_part
from transpixeler.training.agreement import Due
from transpixeler.training.saving import Saver
from transpixeler.training.schedule import Schedule
from transpixeler.training.state import TrainingState

logger = logging.getLogger("transpixeler")


class TrainingFailed(Fault):
    """Training cannot go on; the run's last checkpoint is valid."""


class Keeper:
    """Saves the state of one run. Every rank has one, and calls its methods together with the others."""

    def __init__(
        self,
        run: Run,
        engine: AnyEngine,
        state: TrainingState,
        schedule: Schedule,
        *,
        on_save: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """on_save: called on rank 0 with the folder of each save."""
        self.on_save = on_save
        self.run, self.state, self.schedule = run, state, schedule
        self.config, self.runtime = state.config, state.runtime
        self.saver = Saver(self.config, self.runtime, engine)
        self.checkpointer = Checkpointer(run.checkpoints, self.config.checkpoint, self.runtime)
        self.pusher = hub.pusher(self.config) if self.runtime.is_main else None
        self.last_save: Path | None = None
        self.guard = guard(run.folder)
        self.first_step = state.step  # where this process began
        self.saved_at = self.checkpointed_at = time.monotonic()

    def due(self, controls: Controls) -> Due:
        """Return what this rank wants at the step boundary. Only rank 0 looks at the clock, or ranks would differ."""
        save, quit = controls.poll()
        now, clock = time.monotonic(), self.runtime.is_main
        points, saves = self.config.checkpoint.every_minutes, self.config.save.every_minutes
        return Due(
            save=save,
            quit=quit,
            checkpoint=clock and points > 0 and now - self.checkpointed_at >= 60 * points,
            adapter=clock and saves > 0 and now - self.saved_at >= 60 * saves,
            lost=bool(self.guard.fault()),
        )

    def keep_what_is_due(self, batch: Batch, due: Due, controls: Controls) -> None:
        """Write the saves and the checkpoint that are due after this batch."""
        if due.lost:
            reason = self.guard.fault() or "another rank no longer finds the run's folder"
            raise TrainingFailed(
                f"training stopped after step {self.state.step}: {reason}; bring it back, and go on with --resume"
            )
        by_clock = [f"step{self.state.step}"] if due.adapter else []
        for name in dict.fromkeys([*self.schedule.saves(batch), *by_clock]):
            self.save(name)
        if due.save or due.quit or due.checkpoint or self.schedule.checkpoint_due(batch):
            self.checkpoint(wait=due.quit)
            controls.saved()

    def save(self, name: str, *, ends: bool = False) -> str:
        """Write RUN/NAME; return why it was not written, or "". ends: training ends with it."""
        folder = self.run.folder / name
        fault = self.saver.save(folder, self.state.ema, self.state.step)
        self.saved_at = time.monotonic()
        if fault:
            if self.runtime.is_main:
                logger.error("%s was not written: %s%s", folder, fault, "" if ends else "; training goes on")
            return fault
        self.last_save = folder
        if self.runtime.is_main:
            logger.info("saved %s", folder)
            self.on_save(folder)
        if self.pusher is not None:
            self.pusher.saved(folder)
        return ""

    def checkpoint(self, *, wait: bool = False) -> str:
        """Write a checkpoint beside training; return why it failed where that is known at once, or ""."""
        tensors = own_part(self.state.tensors(), self.state.mesh)
        fault = self.checkpointer.save(self.state.step, tensors, self.state.facts(self.schedule.order), wait=wait)
        self.checkpointed_at = time.monotonic()
        return fault

    def take_stall(self) -> float:
        """Return the seconds that saving kept training waiting since this was last asked."""
        return self.checkpointer.take_stall()

    def finish(self, controls: Controls) -> None:
        """Save and checkpoint the last state, whatever the intervals are. A collective call."""
        steps, total = self.state.step, self.schedule.total
        folder = self.run.folder / f"step{steps}"  # it may be there from a training that an older checkpoint left
        trained = steps > self.first_step or not folder.exists()
        unsaved = ""
        if steps >= total and trained and self.last_save != folder:
            unsaved = self.save(folder.name, ends=True)
        fault = self.checkpoint(wait=True)
        if fault:
            raise TrainingFailed(fault)
        if unsaved:
            raise TrainingFailed(
                f"{folder} was not written: {unsaved}; its weights are in the checkpoint {folder_name(steps)}: "
                f"mend that, and --resume {self.run.folder} writes it"
            )
        interrupted = self.runtime.any(bool(controls.interrupted))
        if steps < total and interrupted:
            raise Interrupted(self.run.folder, steps)
        if steps < total:
            logger.info("asked to stop: the checkpoint of step %d is written", steps)

    def close(self) -> None:
        self.checkpointer.close()
        if self.pusher is not None:
            self.pusher.close()
