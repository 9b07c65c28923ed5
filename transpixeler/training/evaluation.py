"""Evaluates a run as it trains, when that is due, and leaves training as it found it.

In: an `Evaluator` and the number of steps done. Out: eval lines of metrics.jsonl, TensorBoard, samples/, the report.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transpixeler.config import Config
from transpixeler.data.order import Order
from transpixeler.evaluation.heldout import Evaluator, read_video
from transpixeler.evaluation.results import scalars, summary
from transpixeler.publishing import report
from transpixeler.runs import telemetry
from transpixeler.runs.folder import SAMPLES, Stopped, sample_folder
from transpixeler.training.ema import Ema

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a run as it trains, and leaves training as it found it, to the last bit."""

    evaluator: Evaluator
    ema: Ema
    run: Path
    telemetry: telemetry.Telemetry | None  # on rank 0
    due: Callable[[int], bool]  # of the number of steps that are done

    def catch_up(self, step: int) -> None:
        """Before the first step, and after a resume that follows a stop between a step and its evaluation."""
        told = self.evaluator.runtime.is_main and step in _evaluated(self.run / telemetry.METRICS)
        if not self.evaluator.runtime.broadcast(told):
            self.if_due(step)

    def if_due(self, step: int, *, hurry: bool = False) -> bool:
        """Whether someone asked to stop meanwhile; then, and in a hurry, the evaluation is left to `catch_up`."""
        if hurry or not self.due(step) or not self.evaluator.has_work:
            return hurry
        device = self.evaluator.mesh.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                found = self._evaluate(step)
        except Stopped:
            logger.info("asked to stop: the evaluation of step %d is made when the run is resumed", step)
            return True
        if self.telemetry is not None:
            self._tell(step, found)
        gc.collect()
        telemetry.forget_peak(device)
        return False

    def _evaluate(self, step: int) -> dict[str, dict[str, Any]]:
        evaluator, averaged = self.evaluator, self.ema.decay > 0
        found: dict[str, dict[str, Any]] = {name: {"loss": loss} for name, loss in evaluator.losses().items()}
        with self.ema.swapped() if averaged else nullcontext():
            if averaged:
                for name, loss in evaluator.losses().items():
                    found[name]["loss_ema"] = loss
            first = self.run / SAMPLES / sample_folder(0)
            facts = {"step": step, "ema": averaged}
            measured = evaluator.samples(self.run / SAMPLES / sample_folder(step), facts, first if step else None)
        for name, values in measured.items():
            found.setdefault(name, {})["metrics"] = values
        return found

    def _tell(self, step: int, found: Mapping[str, Mapping[str, Any]]) -> None:
        self.telemetry.write({"step": step, "eval": found})
        self.telemetry.scalars(step, dict(scalars(found)))
        self._show(step)
        for line in summary(found):
            logger.info("step %d, held out: %s", step, line)
        try:
            report.write_report(self.run)
        except Exception as fault:  # training is worth more than a page, whatever went wrong with it
            logger.error("%s was not written: %s", self.run / report.PAGE, fault)

    def _show(self, step: int) -> None:
        """The videos that were written, on TensorBoard."""
        fps = self.evaluator.config.data.fps
        for file in sorted((self.run / SAMPLES / sample_folder(step)).glob("*/*.mp4")):
            self.telemetry.video(step, f"{file.parent.name}/{file.stem}", read_video(file), fps=fps)


def due_at(config: Config, order: Order, total: int) -> Callable[[int], bool]:
    """Whether the state after so many steps is evaluated: a pure function, so that a resumed run agrees."""
    every_steps, every_epochs = config.eval.every_steps, config.eval.every_epochs

    def due(step: int) -> bool:
        if step == 0:
            return config.eval.before_first_step
        by_steps = every_steps > 0 and (step % every_steps == 0 or step == total)
        ended = order.ended(step)
        by_epochs = every_epochs > 0 and (step == total or any(epoch % every_epochs == 0 for epoch in ended))
        return by_steps or by_epochs

    return due


def _evaluated(path: Path) -> set[int]:
    """The steps whose evaluation is told already."""
    if not path.is_file():
        return set()
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"eval"' in line)
    return {line["step"] for line in lines if "eval" in line}
