"""What a run says of itself: one line of metrics a step, TensorBoard, a bar, and a manifest of what it was made from.

In: numbers that the trainer measured, on rank 0. Out: RUN/metrics.jsonl, event files, the terminal. Nothing here
touches the device, so that telling costs no step anything.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from transpixeler.config import LogConfig, UserError
from transpixeler.files import write_text

logger = logging.getLogger("transpixeler")

METRICS = "metrics.jsonl"
BOARD_SIDE = 480  # pixels at most of a video on TensorBoard
PLAIN_SECONDS = 10.0  # between lines where there is no terminal to draw a bar on
# dense bf16 TFLOP/s of one device, by a part of its name; the first that fits
PEAKS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX PRO 6000", 504.0),
    ("5090", 209.0),
    ("4090", 165.0),
    ("3090", 71.0),
    ("A6000", 155.0),
)


def peak_tflops(config: LogConfig, device: torch.device) -> float:
    """The device's peak, or 0 where it is not known."""
    if config.peak_tflops or device.type != "cuda":
        return config.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), 0.0)


def peak_memory(device: torch.device) -> float:
    """GiB at most since `forget_peak`; of the process, since it began, where there is no device of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    scale = 2**10 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale / 2**20


def check(config: LogConfig) -> None:
    """What is needed to tell is missed before clips are encoded and the model is built, not after."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb: needs wandb; pip install 'transpixeler[wandb]', or set log.wandb empty")


def forget_peak(device: torch.device) -> None:
    """What encoders and evaluations took says nothing of a step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Telemetry:
    """Rank 0's voice in numbers; on other ranks there is none."""

    def __init__(self, run: Path, config: LogConfig, *, step: int, total: int, name: str) -> None:
        self.config = config
        self.metrics: IO[bytes] = _reopen(run / METRICS, step)
        self.unwritten = b""  # what a full disk has not taken yet
        self.board = _board(run, step) if config.tensorboard else None
        self.wandb = _wandb(config.wandb, run, name) if config.wandb else None
        self.bar = _bar(step, total)
        self.total = total
        self.trained_seconds, self.first_step = 0.0, step
        self._said = 0.0

    def step(self, record: Mapping[str, Any]) -> None:
        """One line for the step that just ended."""
        self.write(record)
        step = record["step"]
        if step % self.config.every_steps == 0:
            self.scalars(step, {f"train/{key}": value for key, value in record.items() if _is_number(key, value)})
        self._progress(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """A killed process loses no line; what a full disk refuses is kept and tried again at the next."""
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
        def draw(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)

        self._on_board(draw)
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def _on_board(self, draw: Callable[[Any], object]) -> None:
        """Its writer's thread meets a full disk, and tells of it at a later call; training needs no board."""
        if self.board is None:
            return
        try:
            draw(self.board)
        except OSError as fault:
            logger.error("TensorBoard is told no more: %s", fault)
            self.board = None

    def video(self, step: int, name: str, frames: np.ndarray, *, fps: float) -> None:
        """uint8 [F,H,W,3] frames as an animated picture, which is how the board plays videos."""
        if self.board is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

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
        if now - self._said >= PLAIN_SECONDS or step in (self.first_step + 1, self.total):
            self._said = now
            pace = self.trained_seconds / (step - self.first_step)
            left = _clock(pace * (self.total - step))
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
            logger.info("step %d of %d, %s, %.3g s a step, %s left", step, self.total, text, pace, left)


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
    import wandb

    return wandb.init(project=project, name=name, id=name, dir=str(run), resume="allow")


def _reopen(path: Path, step: int) -> IO[bytes]:
    """Metrics after a resume go on from its step: what was written beyond it is trained, and written, again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
    return path.open("ab", buffering=0)


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifest(**facts: Any) -> dict[str, Any]:
    """What made the run: versions, code, machine, and the given facts of data, model and layout."""
    packages = ["transpixeler", "torch", "diffusers", "transformers", "safetensors", "torchao", "av"]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "git": _commit(),
        "machine": {
            "host": platform.node(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        },
        "command": sys.argv,
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this code where it is a checkout; an installed package has none."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
