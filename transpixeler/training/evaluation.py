"""Evaluate a run as it trains, when that is due, and leave training as it was, to the last bit.

In: an `Evaluator` and the number of steps done. Out: eval lines of metrics.jsonl, TensorBoard, samples/, the report.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transpixeler.data.dataset import Dataset
from transpixeler.evaluation.heldout import Evaluator
from transpixeler.evaluation.measures import read_video
from transpixeler.evaluation.results import scalars, summary
from transpixeler.parallel import devices
from transpixeler.parallel.experts import AnyEngine
from transpixeler.runs import metrics_file
from transpixeler.runs.boards import Clip
from transpixeler.runs.controls import Stopped
from transpixeler.runs.folder import METRICS, SAMPLES, Run, read_facts, sample_folder
from transpixeler.runs.telemetry import Telemetry
from transpixeler.sampling.files import FACTS
from transpixeler.training.live_page import LivePage
from transpixeler.training.schedule import Schedule
from transpixeler.training.state import TrainingState

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the training state; every rank calls it at the same time."""

    evaluator: Evaluator
    state: TrainingState
    run: Path
    telemetry: Telemetry | None  # on rank 0
    page: LivePage  # written on rank 0
    due: Callable[[int], bool]  # by the number of steps that are done
    on_eval: Callable[[int, Mapping[str, Any]], object] = lambda *_: None  # called on rank 0 with what was found

    def catch_up(self, step: int) -> None:
        """Evaluate the state that training begins with, unless an earlier process of this run did."""
        told = self.evaluator.runtime.is_main and step in self._evaluated_steps()
        if not self.evaluator.runtime.broadcast(told):
            self.if_due(step)

    def if_due(self, step: int, *, hurry: bool = False) -> bool:
        """Evaluate if that is due; return whether training shall stop.

        With `hurry`, or if someone asks to stop meanwhile, the evaluation is left to `catch_up`.
        """
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
            self._record(step, found, self.telemetry)
        gc.collect()
        devices.forget_peak(device)
        return False

    def _evaluate(self, step: int) -> dict[str, dict[str, Any]]:
        """Return losses of the raw and the averaged weights, and measures of videos by the averaged ones."""
        evaluator, ema = self.evaluator, self.state.ema
        averaged = ema.decay > 0
        found: dict[str, dict[str, Any]] = {name: {"loss": loss} for name, loss in evaluator.losses().items()}
        with ema.swapped() if averaged else nullcontext():
            if averaged:
                for name, loss in evaluator.losses().items():
                    found[name]["loss_ema"] = loss
            first = self.run / SAMPLES / sample_folder(0)
            facts = {"step": step, "ema": averaged}
            measured = evaluator.samples(self.run / SAMPLES / sample_folder(step), facts, first if step else None)
        for name, values in measured.items():
            found.setdefault(name, {})["metrics"] = values
        return found

    def _record(self, step: int, found: Mapping[str, Mapping[str, Any]], telemetry: Telemetry) -> None:
        """Write what was found to metrics.jsonl, TensorBoard, the log and the report."""
        telemetry.write({"step": step, "eval": found})
        telemetry.scalars(step, dict(scalars(found)))
        fps = self.evaluator.config.data.fps
        telemetry.samples(step, self._clips(step), read=read_video, fps=fps)
        for line in summary(found):
            logger.info("step %d, held out: %s", step, line)
        self.page.write()
        self.on_eval(step, found)

    def _clips(self, step: int) -> list[Clip]:
        """Return the samples of a step as boards show them."""
        found = []
        for path in sorted((self.run / SAMPLES / sample_folder(step)).glob(f"*/{FACTS}")):
            facts = read_facts(path)
            files = {file.stem: file for file in sorted(path.parent.glob("*.mp4"))}
            found.append(Clip(path.parent.name, facts.get("prompt") or "", files, facts.get("metrics") or {}))
        return found

    def _evaluated_steps(self) -> set[int]:
        """Return the steps whose evaluation is in metrics.jsonl."""
        records = metrics_file.read_records(self.run / METRICS)
        return {record["step"] for record in records if "eval" in record}


def open_evaluation(
    engine: AnyEngine,
    state: TrainingState,
    data: Dataset,
    schedule: Schedule,
    run: Run,
    telemetry: Telemetry | None,
    page: LivePage,
    *,
    pause: Callable[[], object],
    on_eval: Callable[[int, Mapping[str, Any]], object] = lambda *_: None,
) -> Evaluation:
    """Build what evaluates the state on `data`. pause: as `Evaluator` takes it. on_eval: called with what is found."""
    evaluator = Evaluator(state.config, state.runtime, engine, data, pause=pause)
    return Evaluation(evaluator, state, run.folder, telemetry, page, schedule.evaluation_due, on_eval)
