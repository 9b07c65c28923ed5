"""When a model is evaluated and how it is told: while it trains, and by `transpixeler eval` on what was trained.

In: an `Evaluator`. Out: the eval lines of metrics.jsonl, TensorBoard, samples/, the report; or a table and eval.json.
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transpixeler.config import Config, UserError
from transpixeler.data.encode import encode_missing
from transpixeler.data.order import Order
from transpixeler.evaluation.heldout import Evaluator, read_video
from transpixeler.files import write_text
from transpixeler.models.backbone import model_class
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.publishing import report
from transpixeler.runs import telemetry
from transpixeler.runs.folder import SAMPLES, Stopped, sample_folder
from transpixeler.sampling import generate, trained
from transpixeler.sampling.trained import Trained
from transpixeler.training.ema import Ema

logger = logging.getLogger("transpixeler")


# --- while training --------------------------------------------------------------------------------------------------


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
        epochs, within = order.locate(step)
        by_steps = every_steps > 0 and (step % every_steps == 0 or step == total)
        by_epochs = every_epochs > 0 and ((within == 0 and epochs % every_epochs == 0) or step == total)
        return by_steps or by_epochs

    return due


def _evaluated(path: Path) -> set[int]:
    """The steps whose evaluation is told already."""
    if not path.is_file():
        return set()
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if '"eval"' in line)
    return {line["step"] for line in lines if "eval" in line}


def scalars(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Every number by a name for TensorBoard."""
    for name, values in found.items():
        for kind in ("loss", "loss_ema"):
            for stream, by_time in values.get(kind, {}).items():
                yield f"eval/{name}/{kind}_{stream}", _mean(by_time)
                yield from ((f"eval/{name}/{kind}_{stream}/t{t}", value) for t, value in by_time.items())
        yield from ((f"eval/{name}/{metric}", value) for metric, value in values.get("metrics", {}).items())


def summary(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each set."""
    for name, values in found.items():
        parts = [f"{kind}_{s} {_mean(t):.4f}" for kind in ("loss", "loss_ema") for s, t in values.get(kind, {}).items()]
        yield f"{name}: {', '.join([*parts, *(f'{m} {v:.4g}' for m, v in values.get('metrics', {}).items())])}"


def _mean(by_time: Mapping[str, float]) -> float:
    return math.fsum(by_time.values()) / len(by_time)


# --- the command -----------------------------------------------------------------------------------------------------


def eval_command(source: Trained, runtime: Runtime, *, out: str = "", asked_layout: bool = False) -> Path:
    """Evaluates a run, an adapter or the base on `data.eval`; prints a table and writes OUT/eval.json."""
    config, layout = trained.arranged(source.config, runtime, asked=asked_layout)
    if not config.data.eval:
        raise UserError("data.eval: set it to a folder of pairs or a manifest that training does not see")
    config = replace(config, data=replace(config.data, train=()))
    data = encode_missing(config, model_class(config.model.family), runtime).eval
    mesh = meshes.build(layout, runtime)
    engine = trained.open_engine(replace(source, config=config), mesh)
    evaluator = Evaluator(config, runtime, mesh, engine, data)
    folder = Path(out) if out else _default_folder(source)
    found: dict[str, dict[str, Any]] = {name: {"loss": loss} for name, loss in evaluator.losses().items()}
    facts = {"model": config.model.path, "adapter": source.name, "step": source.step}
    for name, values in evaluator.samples(folder / SAMPLES, facts).items():
        found.setdefault(name, {})["metrics"] = values
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "eval.json", json.dumps(facts | {"eval": found}, indent=1))
        print(table(found))
        print(folder / "eval.json")
    runtime.barrier()
    return folder


def _default_folder(source: Trained) -> Path:
    """A place of its own for all that can be evaluated: in its run by step, elsewhere by where it comes from."""
    saved = Path(source.name)
    if source.run is None:
        name = generate.named("-".join(saved.parts[-2:]))
    elif source.step is not None:
        name = sample_folder(source.step)
    else:
        name = saved.parent.name if saved.name == trained.EMA else saved.name
    return (source.run or Path(source.config.output_dir)) / "eval" / f"{name}{'-raw' if source.raw else ''}"


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Losses by time, a row for each set and stream, then measures of the samples."""
    losses = {f"{name} {s}": times for name, values in found.items() for s, times in values.get("loss", {}).items()}
    measured = {f"{name} {m}": v for name, values in found.items() for m, v in values.get("metrics", {}).items()}
    width = max((len(name) for name in (*losses, *measured)), default=0)
    lines = []
    if losses:
        times = [*next(iter(losses.values()))]
        lines.append(" ".join([f"{'loss at t':{width}}", *(f"{t:>7}" for t in times), "   mean"]))
        for name, by_time in losses.items():
            lines.append(
                " ".join([f"{name:{width}}", *(f"{by_time[t]:7.4f}" for t in times), f"{_mean(by_time):7.4f}"])
            )
    lines += [f"{name:{width}} {value:7.4g}" for name, value in measured.items()]
    return "\n".join(lines)
