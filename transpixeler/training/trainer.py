"""Train: batch → forward and backward → clip → optimizer → EMA → record → save → evaluate → next step, or stop.

In: a config and, perhaps, a checkpoint. Out: a run folder. The loop is in `Trainer.train`; the parts that it moves are
each in a module of this package.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transpixeler.config.sections import Config, UserError
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Batch
from transpixeler.flow.objective import Example
from transpixeler.parallel import devices
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.contact import naming_lost_ranks
from transpixeler.parallel.runtime import Runtime, log_to_file, steady_garbage
from transpixeler.runs import opening, telemetry
from transpixeler.runs.controls import Controls, Stopped, listening
from transpixeler.runs.folder import LOG, STRAIGHT_ON, Going, Run
from transpixeler.runs.manifest import write_manifest
from transpixeler.training import overview
from transpixeler.training.agreement import Facts, agree
from transpixeler.training.batches import micro_batch, open_loader
from transpixeler.training.callbacks import NO_CALLBACKS, Callbacks
from transpixeler.training.evaluation import open_evaluation
from transpixeler.training.keeping import Keeper, TrainingFailed
from transpixeler.training.live_page import LivePage
from transpixeler.training.parts import build_parts, check
from transpixeler.training.state import seed_torch
from transpixeler.training.step_record import Recorder, StepTimes

logger = logging.getLogger("transpixeler")


def train(
    config: Config,
    runtime: Runtime,
    *,
    resume: str | None = None,
    going: Going = STRAIGHT_ON,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Path:
    """Encode what the cache lacks, train, and return the run's folder.

    resume: None for a new run, "" to go on with the config's run, or a run or checkpoint folder. going: how.
    """
    layout = check(config, runtime)
    run = opening.open_run(config, runtime, resume, going)
    log = log_to_file(run.folder / LOG, runtime.rank) if runtime.is_main else None
    try:
        lost = naming_lost_ranks(runtime.timeout, way_on=partial(opening.resume_hint, run))
        with lost, listening(run, runtime) as controls:
            trainer = Trainer(config, runtime, layout, run, controls, callbacks)
            try:
                trainer.train()
            finally:
                trainer.close()
    except UserError:
        if runtime.is_main:
            opening.discard(run)
        raise
    finally:
        run.close()
        if log is not None:
            logging.getLogger("transpixeler").removeHandler(log)
            log.close()
    return run.folder


class Trainer:
    """One run on this rank. `train` is the loop; `__init__` builds what it moves."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        layout: meshes.Layout,
        run: Run,
        controls: Controls,
        callbacks: Callbacks = NO_CALLBACKS,
    ) -> None:
        self.config, self.controls, self.callbacks = config, controls, callbacks
        parts = build_parts(config, runtime, layout, run, encode_missing)
        model, self.data, self.schedule = parts.model, parts.data, parts.schedule
        self.mesh, self.engine, self.state = parts.mesh, parts.engine, parts.state
        if runtime.is_main:
            opening.set_aside(run, self.state.step, self.schedule.order.first_step)
            write_manifest(run.folder, **overview.manifest_facts(model, self.engine, self.data, self.schedule))
        self.keeper = Keeper(run, self.engine, self.state, self.schedule, on_save=callbacks.on_save)
        self.recorder = Recorder(config, self.engine, runtime.world_size)
        self.telemetry = telemetry.open_telemetry(run, config, self.state.step, self.schedule.total, runtime)
        self.page = LivePage(run.folder, config.log.report_seconds)
        self.evaluation = open_evaluation(
            self.engine,
            self.state,
            self.data.eval,
            self.schedule,
            run,
            self.telemetry,
            self.page,
            pause=self._stop_if_asked,
            on_eval=callbacks.on_eval,
        )
        overview.introduce(config, runtime, run, model, self.engine, self.data, self.schedule, self.state.step)
        if runtime.is_main:
            opening.begin(run, config)
        self.micro_batch = partial(micro_batch, config, model.geometry, layout.data)
        self.bad_steps = 0  # steps in a row that were not finite
        # last, so that a fault above leaves no thread behind
        self.loader = open_loader(config, self.data.train, model, self.mesh, self.schedule, self.state.step)

    def train(self) -> None:
        """Train to the end, or until someone asks to stop."""
        self.evaluation.catch_up(self.state.step)
        self.controls.started = True
        devices.forget_peak(self.mesh.device)
        with steady_garbage(self.config.train.gc_every) as collect:
            while self.state.step < self.schedule.total:
                started = time.perf_counter()
                batch, examples = next(self.loader)

                self._seed(batch.step, self.mesh.stage_rank)  # for dropout
                size, end = self.micro_batch(batch.layout), len(examples) - 1
                on_device = (example.to(self.mesh.device) for example in examples)
                run = self.engine.forward_backward
                errors = [run(example, size, last=n == end) for n, example in enumerate(on_device)]
                norm = self.state.gradient_norm()
                due = self.keeper.due(self.controls)
                facts = agree(errors, examples, norm, due, counts=self.mesh.speaks)

                lr = self.schedule.rate(batch.step)
                if facts.finite:
                    self._seed(batch.step)  # for stochastic rounding, the same on all replicas
                    self.state.update(lr, norm)
                self.state.zero_grad()
                self.state.step = batch.step + 1

                self._record(batch, examples, facts, lr, time.perf_counter() - started)
                self._report_not_finite(batch, facts)
                self.keeper.keep_what_is_due(batch, facts.due, self.controls)
                if self.evaluation.if_due(self.state.step, hurry=facts.due.quit):
                    break
                collect(self.state.step)
        self.keeper.finish(self.controls)

    def _seed(self, *key: int) -> None:
        """Seed what torch draws by itself."""
        seed_torch(self.config.seed, self.mesh.pipeline_rank, *key)

    def _record(self, batch: Batch, examples: Sequence[Example], facts: Facts, lr: float, seconds: float) -> None:
        """Write the line of a step, on rank 0."""
        if self.telemetry is not None:
            times = StepTimes(seconds, self.loader.wait_seconds, self.keeper.take_stall())
            size = self.micro_batch(batch.layout)
            what = {"lr": lr, "micro_batch": size, "expert": examples[0].expert}
            shares = [(example.layout, len(example.latents)) for example in examples]
            line = self.recorder.record(batch, shares, facts, times, **what)
            self.telemetry.step(line)
            self.page.if_due()
            if self.callbacks.on_step(line) is True:
                self.controls.save = self.controls.quit = True

    def _report_not_finite(self, batch: Batch, facts: Facts) -> None:
        """Name the samples of a step that was not finite, and end the run after too many in a row."""
        if facts.finite:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        step, ids = self.state.step, ", ".join(batch.ids)
        if self.state.runtime.is_main:
            message = "step %d: loss %s, gradient norm %s: the update was left out; samples %s"
            logger.error(message, step, facts.loss, facts.grad_norm, ids)
        if self.bad_steps >= self.config.train.nonfinite_limit:
            kept = self.keeper.checkpoint(wait=True) or f"the checkpoint of step {step} is written"
            raise TrainingFailed(
                f"{self.bad_steps} steps in a row were not finite; {kept}. "
                f"Lower optim.lr ({self.config.optim.lr:g}) or optim.clip, or look at the samples named above"
            )

    def _stop_if_asked(self) -> None:
        """Break off an evaluation, which may take longer than the machine waits after SIGTERM."""
        if self.controls.started and self.state.runtime.any(self.controls.poll()[1]):
            raise Stopped

    def close(self) -> None:
        """End the threads, whatever ended training."""
        self.loader.close()
        self.keeper.close()
        if self.telemetry is not None:
            self.telemetry.close()
            self.page.close()
