"""The training loop: batch → forward and backward → clip → optimizer → EMA → tell → eval → save → checkpoint → stop?

In: a config and, perhaps, a checkpoint. Out: a run folder. The order of samples, their noise and their timesteps are
pure functions of the step, so the whole state is what `_tensors` lists and the number of the step.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler import configfile
from transpixeler.adapters import export
from transpixeler.adapters.adapter import Adapter
from transpixeler.config import Config, Fault, UserError
from transpixeler.data.buckets import Bucket, micro_batch_for
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Assembler, Batch, Loader
from transpixeler.data.order import Order
from transpixeler.evaluation.heldout import Evaluator
from transpixeler.flow import objective
from transpixeler.flow.objective import Example
from transpixeler.models import lora
from transpixeler.models.backbone import VideoModel, model_class
from transpixeler.models.streams import Scope, StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.runtime import Runtime, log_to_file, steady_garbage
from transpixeler.publishing import hub
from transpixeler.runs import checkpoint, telemetry
from transpixeler.runs import folder as run_folder
from transpixeler.runs.checkpoint import Checkpointer
from transpixeler.runs.folder import Requests, Run, Stopped
from transpixeler.sampling.trained import base_weights, first_adapter, first_scopes, make_model
from transpixeler.training import ema, optim, preflight
from transpixeler.training.account import Account
from transpixeler.training.agreement import Facts, Wishes, agree
from transpixeler.training.evaluation import Evaluation, due_at
from transpixeler.training.saving import Saver

logger = logging.getLogger("transpixeler")


class TrainingFailed(Fault):
    """Training cannot go on; the run's last checkpoint is whole."""


def train(config: Config, runtime: Runtime, *, resume: str | None = None) -> Path:
    """Caches what is missing, trains, and returns the run's folder. `resume`: "" for the config's run, or a folder."""
    layout = meshes.resolve(config.parallel, runtime.world_size)
    preflight.check(config, layout)
    telemetry.check(config.log)
    run = run_folder.open_run(config, runtime, resume)
    log = log_to_file(run.folder / "log.txt", runtime.rank) if runtime.is_main else None
    try:
        with run_folder.listening(run, runtime) as requests:
            trainer = Trainer(config, runtime, layout, run, requests)
            try:
                trainer.train()
            finally:
                trainer.close()
    except UserError:
        if runtime.is_main:
            run_folder.discard(run)
        raise
    finally:
        if log is not None:
            logging.getLogger("transpixeler").removeHandler(log)
            log.close()
    return run.folder


def total_steps(config: Config, order: Order) -> int:
    """Return the steps of a whole run: so many epochs or steps, whichever are fewer."""
    by_epoch = order.first_step(config.train.epochs) if config.train.epochs else math.inf
    return int(min(by_epoch, config.train.max_steps or math.inf))


class Trainer:
    """Everything a run holds; `train` reads top to bottom."""

    def __init__(self, config: Config, runtime: Runtime, layout: meshes.Layout, run: Run, requests: Requests) -> None:
        self.config, self.runtime, self.run, self.requests = config, runtime, run, requests
        self.model_cls: type[VideoModel] = model_class(config.model.family)
        start, self.scopes = self._beginning()
        self.data = encode_missing(config, self.model_cls, runtime)
        self.order = self.data.train.order(seed=config.seed, global_batch=config.train.global_batch)
        self.total = total_steps(config, self.order)
        self.mesh = meshes.build(layout, runtime)
        make, source = partial(make_model, config), base_weights(config)
        self.engine = build_engine(config, self.mesh, make, source, scopes=self.scopes)
        self.trained = {name: p for name, p in self.engine.named_parameters() if p.requires_grad}
        optim.check_groups([name for names in runtime.gather(list(self.trained)) for name in names], config.optim)
        self.optimizer = optim.build(self.trained, config.optim, self.mesh.data_group)
        for model in self.engine.models() if start is not None else ():
            export.apply_adapter(model, start)
        self.ema = ema.Ema(self.trained, config.optim.ema)
        self.checkpointer = Checkpointer(run.checkpoints, config.checkpoint, runtime)
        self.saver = Saver(config, runtime, self.mesh, self.engine, self.model_cls)
        self.step = self.first_step = self._restore()  # steps that are done
        self.saved: Path | None = None  # the last save
        self.bad_steps = 0  # steps in a row that were not finite
        self.saved_at = self.checkpointed_at = time.monotonic()
        self.account = Account(config, runtime, run, self.engine, self.data, self.order, self.total)
        self.telemetry = self._open_telemetry() if runtime.is_main else None
        self.pusher = hub.pusher(config) if runtime.is_main else None
        self.evaluation = self._open_evaluation()
        self.account.introduce(self.step)
        if runtime.is_main:
            run_folder.begin(run, config)
        self.loader = self._open_loader()  # last: a fault above leaves no thread behind

    # -- the loop

    def train(self) -> None:
        self.evaluation.catch_up(self.step)
        self.requests.started = True
        telemetry.forget_peak(self.mesh.device)
        with steady_garbage(self.config.train.gc_every) as collect:
            while self.step < self.total:
                started = time.perf_counter()
                batch, example = next(self.loader)

                self._seed(batch.step, self.mesh.data_rank)  # dropout
                errors = self.engine.forward_backward(example.to(self.mesh.device), self._micro_batch(batch.layout))
                norm = optim.gradient_norm(self.trained.values(), self.mesh.pipeline_group, self.mesh.device)
                facts = agree(errors, example, norm, self._wishes(), counts=self.mesh.is_first_stage)

                lr = optim.rate(self.config.optim, batch.step + 1, self.total)
                if facts.finite:
                    self._seed(batch.step)  # stochastic rounding, the same on all replicas
                    self._update(lr, norm)
                self._zero_grad()
                self.step = batch.step + 1

                self._tell(batch, facts, lr, time.perf_counter() - started)
                self._guard(batch, facts)
                self._save_what_is_due(batch, facts)
                if self.evaluation.if_due(self.step, hurry=facts.wishes.quit):
                    break
                collect(self.step)
        self._finish()

    def _seed(self, *key: int) -> None:
        """What torch draws by itself is a function of the step too, so that a resumed run draws the same."""
        torch.manual_seed(objective.generator(self.config.seed, self.mesh.pipeline_rank, *key).initial_seed())

    def _update(self, lr: float, norm: Tensor) -> None:
        if self.optimizer is None:  # a stage where nothing is trained
            return
        optim.clip(self.trained.values(), self.config.optim.clip, norm)
        optim.set_rate(self.optimizer, self.config.optim, lr)
        self.optimizer.step()
        self.ema.update()

    def _zero_grad(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = None

    # -- what the ranks agree on

    def _wishes(self) -> Wishes:
        """Of this rank; the clock is rank 0's, or ranks would differ."""
        save, quit = self.requests.poll()
        now, clock = time.monotonic(), self.runtime.is_main
        points, saves = self.config.checkpoint.every_minutes, self.config.save.every_minutes
        return Wishes(
            save=save,
            quit=quit,
            checkpoint=clock and points > 0 and now - self.checkpointed_at >= 60 * points,
            adapter=clock and saves > 0 and now - self.saved_at >= 60 * saves,
        )

    def _leave_if_asked(self) -> None:
        """An evaluation may take longer than the machine waits after SIGTERM."""
        if self.requests.started and any(self.runtime.gather(self.requests.poll()[1])):
            raise Stopped

    def _guard(self, batch: Batch, facts: Facts) -> None:
        """A step that is not finite changed nothing; too many in a row end the run with a checkpoint."""
        if facts.finite:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        if self.runtime.is_main:
            logger.error(
                "step %d: loss %s, gradient norm %s: the update was left out; samples %s",
                self.step,
                facts.loss,
                facts.grad_norm,
                ", ".join(batch.ids),
            )
        if self.bad_steps >= self.config.train.nonfinite_limit:
            kept = self._checkpoint(wait=True) or f"the checkpoint of step {self.step} is written"
            raise TrainingFailed(
                f"{self.bad_steps} steps in a row were not finite; {kept}. "
                f"Lower optim.lr ({self.config.optim.lr:g}) or optim.clip, or look at the samples named above"
            )

    # -- saving

    def _save_what_is_due(self, batch: Batch, facts: Facts) -> None:
        save, points = self.config.save, self.config.checkpoint
        ended = self.order.ended(self.step)
        if due := [epoch for epoch in ended if save.every_epochs and epoch % save.every_epochs == 0]:
            self._save(f"epoch{due[-1]}")
        if facts.wishes.adapter or (save.every_steps and self.step % save.every_steps == 0):
            self._save(f"step{self.step}")
        by_step = points.every_steps and self.step % points.every_steps == 0
        by_epoch = points.every_epochs and any(epoch % points.every_epochs == 0 for epoch in ended)
        asked = facts.wishes.save or facts.wishes.quit or facts.wishes.checkpoint
        if asked or by_step or by_epoch:
            self._checkpoint(wait=facts.wishes.quit)
            self.requests.done()

    def _save(self, name: str) -> str:
        """Writes RUN/NAME; returns why it was not written."""
        fault = self.saver.save(self.run.folder / name, self.ema, self.step)
        self.saved_at = time.monotonic()
        if fault:
            return fault
        self.saved = self.run.folder / name
        if self.runtime.is_main:
            logger.info("saved %s", self.run.folder / name)
        if self.pusher is not None:
            self.pusher.saved(self.run.folder / name)
        return ""

    def _checkpoint(self, *, wait: bool = False) -> str:
        """Why it could not be written, where that is known already."""
        tensors = checkpoint.own_part(self._tensors(), self.mesh)
        fault = self.checkpointer.save(self.step, tensors, self._state(), wait=wait)
        self.checkpointed_at = time.monotonic()
        return fault

    def _tensors(self) -> dict[str, Tensor]:
        """All of training's state that is made of numbers, under names that no layout changes."""
        moments = checkpoint.optimizer_tensors(self.trained, self.optimizer)
        parameters = {f"model.{name}": p.detach() for name, p in self.trained.items()}
        return parameters | moments | {f"ema.{name}": mean for name, mean in self.ema.shadow.items()}

    def _state(self) -> dict[str, Any]:
        epoch, epoch_step = self.order.locate(self.step)
        return {
            "step": self.step,
            "epoch": epoch,
            "epoch_step": epoch_step,
            "layout": dataclasses.asdict(self.mesh.layout),
            "config": configfile.plain(self.config),
            "optimizer": self._optimizer_numbers(),
            "scopes": dict(self.scopes),
        }

    def _optimizer_numbers(self) -> dict[str, dict[str, float]]:
        """Of all stages; our own optimizers keep tensors alone."""
        if "." not in self.config.optim.name:
            return {}
        parts = self.runtime.gather(optim.numbers(self.trained, self.optimizer))
        return {name: values for part in reversed(parts) for name, values in part.items()}

    def _restore(self) -> int:
        """Fills everything from the run's checkpoint; the number of steps that are done."""
        folder, step = self.run.resume_from, 0
        if folder is not None:
            state = checkpoint.read_state(folder)
            step = state["step"]
            self._load(folder, state)
            logger.info("resumed %s at step %d", folder, step)
            for change in self.run.changed:
                logger.info("resumed with another config: %s", change)
        if self.runtime.is_main:
            run_folder.set_aside(self.run, step, self.order.first_step)
        return step

    def _load(self, folder: Path, state: Mapping[str, Any]) -> None:
        checkpoint.materialize(self.optimizer)
        checkpoint.forget_unsaved(folder, self.trained, self.optimizer)
        tensors, means = self._tensors(), checkpoint.holds_means(folder)
        wanted = {name: tensor for name, tensor in tensors.items() if means or not name.startswith("ema.")}
        checkpoint.load(folder, wanted, same_layout=state["layout"] == dataclasses.asdict(self.mesh.layout))
        optim.set_numbers(self.trained, self.optimizer, state.get("optimizer", {}))
        if not means:  # they begin where they are turned on
            self.ema = ema.Ema(self.trained, self.config.optim.ema)

    def _finish(self) -> None:
        """The last state is saved and checkpointed, whatever the intervals were."""
        folder = self.run.folder / f"step{self.step}"  # which may be there from a course that was left
        trained = self.step > self.first_step or not folder.exists()
        if self.step >= self.total and trained and self.saved != folder:
            self._save(folder.name)
        fault = self._checkpoint(wait=True)
        if fault:
            raise TrainingFailed(fault)
        if self.step < self.total:
            logger.info("asked to stop: the checkpoint of step %d is written", self.step)

    # -- telling

    def _tell(self, batch: Batch, facts: Facts, lr: float, seconds: float) -> None:
        if self.telemetry is not None:
            micro_batch = self._micro_batch(batch.layout)
            record = self.account.record(batch, facts, lr=lr, seconds=seconds, micro_batch=micro_batch)
            waits = {"data_wait": self.loader.wait_seconds, "checkpoint_stall": self.checkpointer.take_stall()}
            self.telemetry.step(record | waits)

    # -- making

    def _beginning(self) -> tuple[Adapter | None, Mapping[str, Scope]]:
        """The adapter that training starts from, and the scopes that it brought, which stay when it is resumed."""
        if self.run.resume_from is not None:
            return None, checkpoint.read_state(self.run.resume_from).get("scopes", {})
        start = first_adapter(self.config)
        scopes = first_scopes(self.config, start)
        if scopes:
            parts = dict.fromkeys(f"{lora.inside(target)}: {scope}" for target, scope in scopes.items())
            logger.info("lora.init_from: scopes of the adapter in place of lora.scope: %s", ", ".join(parts))
        return start, scopes

    def _open_loader(self) -> Loader:
        epoch, epoch_step = self.order.locate(self.step)
        patch, text_len = self.engine.models()[0].patch, self.model_cls.text_len
        assembler = Assembler(self.data.train, patch=patch, text_len=text_len, device=self.mesh.device)
        return Loader(
            assembler,
            self.order,
            rank=self.mesh.data_rank,
            ranks=self.mesh.layout.data,
            epoch=epoch,
            step=epoch_step,
            prepare=partial(_prepare, self.config, assembler.pin),
        )

    def _open_telemetry(self) -> telemetry.Telemetry:
        self.account.write_manifest()
        return telemetry.Telemetry(
            self.run.folder, self.config.log, step=self.step, total=self.total, name=self.run.name
        )

    def _open_evaluation(self) -> Evaluation:
        evaluator = Evaluator(
            self.config, self.runtime, self.mesh, self.engine, self.data.eval, pause=self._leave_if_asked
        )
        due = due_at(self.config, self.order, self.total)
        return Evaluation(evaluator, self.ema, self.run.folder, self.telemetry, due)

    def _micro_batch(self, layout: StreamLayout) -> int:
        (_, frames, height, width), (tf, th, tw) = layout.shapes[0], self.engine.models()[0].vae_stride
        bucket = Bucket((frames - 1) * tf + 1, height * th, width * tw)
        share = self.config.train.global_batch // self.mesh.layout.data
        rules = self.config.data.buckets
        return micro_batch_for(bucket, per_rank_batch=share, train=self.config.train, rules=rules, tokens=layout.tokens)

    def close(self) -> None:
        self.loader.close()
        self.checkpointer.close()
        if self.telemetry is not None:
            self.telemetry.close()
        if self.pusher is not None:
            self.pusher.close()


def _prepare(config: Config, pin: bool, batch: Batch) -> tuple[Batch, Example]:
    """Runs in the loader's thread, a few steps ahead of the device."""
    example = objective.prepare(
        config.objective,
        seed=config.seed,
        step=batch.step,
        layout=batch.layout,
        latents=batch.latents,
        text=batch.text,
        empty_text=batch.empty_text,
        ids=[batch.ids[slot] for slot in batch.slots],
        slots=batch.slots,
        batch=config.train.global_batch,
    )
    return batch, example.pinned() if pin else example
