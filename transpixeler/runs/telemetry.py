"""Write what was measured: to RUN/metrics.jsonl, TensorBoard and wandb, and as a bar or lines on the terminal.

In: records of steps and evaluations, on rank 0. Nothing here touches the device, so that it costs a step no time there.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from transpixeler.config import loading
from transpixeler.config.sections import Config, LogConfig, UserError
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import metrics_file
from transpixeler.runs.boards import NO_SETTINGS, Board, Clip, Settings, TensorBoard, Wandb
from transpixeler.runs.folder import METRICS, Run

logger = logging.getLogger("transpixeler")

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal to draw a bar on


def check(config: LogConfig) -> None:
    """Refuse a missing package now, before clips are encoded and the model is built."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: needs wandb; pip install 'transpixeler[wandb]', or set log.wandb empty")


class Telemetry:
    """All that a run's numbers are written to. Only rank 0 has one."""

    def __init__(
        self, run: Path, config: LogConfig, *, step: int, total: int, name: str, settings: Settings = NO_SETTINGS
    ) -> None:
        self.config = config
        self.metrics: IO[bytes] = metrics_file.reopen(run / METRICS, step)
        self.unwritten = b""  # what a full disk refused so far
        self.boards: list[Board] = []
        if config.tensorboard:
            self.boards.append(TensorBoard(run, settings, step))
        if config.wandb:
            self.boards.append(Wandb(config.wandb, run, name, settings))
        self.bar = _bar(step, total)
        self.total = total
        self.trained_seconds, self.first_step = 0.0, step  # for the pace
        self._line_at = 0.0  # when the last line of progress was written

    def step(self, record: Mapping[str, Any]) -> None:
        """Write the record of a step that ended."""
        self.write(record)
        step = record["step"]
        if step % self.config.every_steps == 0:
            own = {f"train/loss/{record['expert']}": record["loss"]} if "expert" in record else {}
            self.scalars(step, own | {f"train/{key}": value for key, value in record.items() if _is_number(key, value)})
        self._progress(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line unbuffered, so that a kill loses none; try again later what a full disk refuses."""
        refused = bool(self.unwritten)
        self.unwritten += (json.dumps(record) + "\n").encode()
        fault = self._flush()
        if fault and not refused:
            logger.error("%s: %s; its lines are kept until there is room, and training goes on", METRICS, fault)

    def _flush(self) -> OSError | None:
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.metrics.write(self.unwritten) :]
        except OSError as fault:
            return fault
        return None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Draw points on the boards."""
        for board in self.boards:
            board.scalars(step, values)

    def samples(self, step: int, clips: Sequence[Clip], *, read: Callable[[Path], np.ndarray], fps: float) -> None:
        """Show videos on the boards. read: a file's frames, uint8 [F,H,W,3]."""
        for board in self.boards if clips else ():
            board.samples(step, clips, read=read, fps=fps)

    def close(self) -> None:
        if fault := self._flush():
            logger.error("%s: %s; its last %d lines are lost", METRICS, fault, self.unwritten.count(b"\n"))
        self.metrics.close()
        if self.bar is not None:
            self.bar.close()
        for board in self.boards:
            board.close()

    def _progress(self, record: Mapping[str, Any]) -> None:
        self.trained_seconds += record["seconds"]
        shown = {"epoch": record["epoch"], "loss": f"{record['loss']:.4f}", "lr": f"{record['lr']:.2e}"}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(1)
            return
        now, step = time.monotonic(), record["step"]
        if now - self._line_at >= SECONDS_BETWEEN_LINES or step in (self.first_step + 1, self.total):
            self._line_at = now
            pace = self.trained_seconds / (step - self.first_step)
            left = _clock(pace * (self.total - step))
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
            logger.info("step %d of %d, %s, %.3g s a step, %s left", step, self.total, text, pace, left)


def open_telemetry(run: Run, config: Config, step: int, total: int, runtime: Runtime) -> Telemetry | None:
    """Open everything on rank 0 from a step on. Lines of later steps, which will be trained again, are removed."""
    if not runtime.is_main:
        return None
    settings = Settings(loading.dump(config), loading.changed(config))
    return Telemetry(run.folder, config.log, step=step, total=total, name=run.name, settings=settings)


def _is_number(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and key not in ("step",)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _bar(step: int, total: int) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)
