"""Write what was measured: to RUN/metrics.jsonl, TensorBoard and wandb, and as a bar or lines on the terminal.

In: records of steps and evaluations, on rank 0. Nothing here touches the device, so that it costs a step no time there.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from transpixeler.config.sections import LogConfig, UserError
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import metrics_file
from transpixeler.runs.folder import METRICS, Run

logger = logging.getLogger("transpixeler")

BOARD_SIDE = 480  # the longest side of a video on TensorBoard, in pixels
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal to draw a bar on


def check(config: LogConfig) -> None:
    """Refuse a missing package now, before clips are encoded and the model is built."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: needs wandb; pip install 'transpixeler[wandb]', or set log.wandb empty")


class Telemetry:
    """All that a run's numbers are written to. Only rank 0 has one."""

    def __init__(self, run: Path, config: LogConfig, *, step: int, total: int, name: str) -> None:
        self.config = config
        self.metrics: IO[bytes] = metrics_file.reopen(run / METRICS, step)
        self.unwritten = b""  # what a full disk refused so far
        self.board = _board(run, step) if config.tensorboard else None
        self.wandb = _wandb(config.wandb, run, name) if config.wandb else None
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
        """Draw points on TensorBoard and wandb."""

        def draw(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._on_board(draw)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def _on_board(self, draw: Callable[[Any], object]) -> None:
        """Draw, and give TensorBoard up on a full disk, which its writer's thread reports at a later call."""
        if self.board is None:
            return
        try:
            draw(self.board)
        except OSError as fault:
            logger.error("TensorBoard gets nothing more: %s", fault)
            self.board = None

    def video(self, step: int, name: str, frames: np.ndarray, *, fps: float) -> None:
        """Show uint8 [F,H,W,3] frames as a GIF, the only form in which TensorBoard plays videos."""
        if self.board is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  made at run time

        small = frames[:, :: (skip := 1 + max(frames.shape[1:3]) // (BOARD_SIDE + 1)), ::skip]
        image = Summary.Image(
            height=small.shape[1], width=small.shape[2], colorspace=3, encoded_image_string=_gif(small, fps)
        )
        shown = Summary(value=[Summary.Value(tag=name, image=image)])
        self._on_board(lambda board: board.file_writer.add_summary(shown, step))

    def close(self) -> None:
        if fault := self._flush():
            logger.error("%s: %s; its last %d lines are lost", METRICS, fault, self.unwritten.count(b"\n"))
        self.metrics.close()
        if self.bar is not None:
            self.bar.close()
        self._on_board(lambda board: board.close())
        if self.wandb is not None:
            self.wandb.finish()

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


def open_telemetry(run: Run, config: LogConfig, step: int, total: int, runtime: Runtime) -> Telemetry | None:
    """Open everything on rank 0 from a step on. Lines of later steps, which will be trained again, are removed."""
    return Telemetry(run.folder, config, step=step, total=total, name=run.name) if runtime.is_main else None


def _gif(frames: np.ndarray, fps: float) -> bytes:
    import io

    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return out.getvalue()


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


def _board(run: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run), purge_step=step + 1 if step else None)


def _wandb(project: str, run: Path, name: str) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]  an optional extra

    return wandb.init(project=project, name=name, id=name, dir=str(run), resume="allow")
