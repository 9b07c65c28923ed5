"""Show a run on TensorBoard and Weights & Biases: numbers, samples with their prompts, and the settings.

Tags: train/…, eval/SET/…, samples/NAME/STREAM, samples/prompts, run/config, and the settings that are no defaults as
hyperparameters. Both boards get the same.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger("transpixeler")

SIDE = 480  # the longest side of a video on TensorBoard, in pixels
PROMPTS = "samples/prompts"


@dataclass(frozen=True)
class Clip:
    """A sample as boards show it."""

    name: str
    prompt: str
    files: Mapping[str, Path]  # mp4 by stream or format
    measures: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Hold what made a run: its whole config as text, and the values that are no defaults."""

    text: str = ""
    changed: Mapping[str, Any] = field(default_factory=dict)


NO_SETTINGS = Settings()


class Board(Protocol):
    """Show a run somewhere."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, clips: Sequence[Clip], *, read: Callable[[Path], np.ndarray], fps: float) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. They are given up on a full disk, which the writer's thread reports later."""

    def __init__(self, run: Path, settings: Settings, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(run), purge_step=step + 1 if step else None)
        if settings.text and not step:
            self._draw(lambda writer: writer.add_text("run/config", verbatim(settings.text), 0))
            self._draw(lambda writer: _write_hyperparameters(writer, settings.changed))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        def draw(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._draw(draw)

    def samples(self, step: int, clips: Sequence[Clip], *, read: Callable[[Path], np.ndarray], fps: float) -> None:
        """Show prompts as text, and videos as GIFs, the only form in which TensorBoard plays them."""
        lines = "\n".join(f"{clip.name}  {' '.join(clip.prompt.split())}  {_measured(clip)}".rstrip() for clip in clips)
        self._draw(lambda writer: writer.add_text(PROMPTS, verbatim(lines), step))
        for clip in clips:
            for stream, file in clip.files.items():
                if self.writer is not None:
                    self._video(step, f"samples/{clip.name}/{stream}", read(file), fps=fps)

    def _video(self, step: int, tag: str, frames: np.ndarray, *, fps: float) -> None:
        """Write uint8 [F,H,W,3] frames."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  made at run time

        small = frames[:, :: (skip := 1 + max(frames.shape[1:3]) // (SIDE + 1)), ::skip]
        size = {"height": small.shape[1], "width": small.shape[2], "colorspace": 3}
        image = Summary.Image(**size, encoded_image_string=gif(small, fps))
        shown = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._draw(lambda writer: writer.file_writer.add_summary(shown, step))

    def _draw(self, draw: Callable[[Any], object]) -> None:
        if self.writer is None:
            return
        try:
            draw(self.writer)
        except OSError as fault:
            logger.error("TensorBoard gets nothing more: %s", fault)
            self.writer = None

    def close(self) -> None:
        self._draw(lambda writer: writer.close())


class Wandb:
    """A run of a project of Weights & Biases."""

    def __init__(self, project: str, run: Path, name: str, settings: Settings) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  an optional extra

        self.wandb: Any = wandb
        how = {"project": project, "name": name, "id": name, "dir": str(run), "resume": "allow"}
        self.run: Any = wandb.init(**how, config=dict(settings.changed))
        self.rows: list[list[Any]] = []  # of all samples so far: a table is logged whole

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def samples(self, step: int, clips: Sequence[Clip], *, read: Callable[[Path], np.ndarray], fps: float) -> None:
        """Show videos under their tags, and with their prompts and measures in one table."""
        streams = list(dict.fromkeys(stream for clip in clips for stream in clip.files))
        names = list(dict.fromkeys(name for clip in clips for name in clip.measures))
        shown: dict[str, Any] = {}
        for clip in clips:
            videos = {name: self.wandb.Video(str(file), caption=clip.prompt) for name, file in clip.files.items()}
            shown |= {f"samples/{clip.name}/{stream}": video for stream, video in videos.items()}
            cells = [*(videos.get(stream) for stream in streams), *(clip.measures.get(name) for name in names)]
            self.rows.append([step, clip.name, clip.prompt, *cells])
        heads = ["step", "sample", "prompt", *streams, *names]
        rows = [row for row in self.rows if len(row) == len(heads)]
        self.run.log(shown | {PROMPTS: self.wandb.Table(columns=heads, data=rows)}, step=step)

    def close(self) -> None:
        self.run.finish()


def _write_hyperparameters(writer: Any, changed: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard.summary import hparams

    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in changed.items()}
    for summary in hparams(plain, {"train/loss": 0.0}):
        writer.file_writer.add_summary(summary)


def verbatim(text: str) -> str:
    """Return Markdown that shows a text as it is: an indented block, which nothing in it can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _measured(clip: Clip) -> str:
    known = {name: value for name, value in clip.measures.items() if value is not None}
    return ", ".join(f"{name} {value:.4g}" for name, value in known.items())


def gif(frames: np.ndarray, fps: float) -> bytes:
    """Encode uint8 [F,H,W,3] frames."""
    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return out.getvalue()
