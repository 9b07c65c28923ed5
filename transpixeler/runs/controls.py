"""Ways to steer a training run from outside: a file `save` or `save_quit` in its folder, Ctrl-C, SIGTERM, SIGUSR1.

In: files and signals. Out: flags that the trainer reads at each step boundary.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import Run

logger = logging.getLogger("transpixeler")

SAVE, SAVE_QUIT = "save", "save_quit"
CONTROL_FILES = (SAVE, SAVE_QUIT)  # a user puts one of these into a run's folder
# Under torchrun one Ctrl-C may arrive twice, from the terminal and from torchrun.
ONE_CTRL_C_SECONDS = 1.0


class Stopped(Exception):
    """A user asked to stop during an evaluation; raised on every rank together."""


class Interrupted(KeyboardInterrupt):
    """Training ended by Ctrl-C, with a checkpoint to go on from."""

    def __init__(self, run: Path, step: int) -> None:
        super().__init__(f"stopped at step {step}, whose checkpoint is written")
        self.run = run


@dataclass
class Controls:
    """Everything that this rank was asked since the last checkpoint: by signal on any rank, by file on rank 0."""

    folder: Path
    is_main: bool
    save: bool = False
    quit: bool = False
    interrupted: bool = False  # by Ctrl-C
    started: bool = False  # before the first step, there is nothing to save

    def poll(self) -> tuple[bool, bool]:
        """Return (save, quit) as this rank was asked; the trainer shares the answer with all ranks."""
        if self.is_main:
            for name in CONTROL_FILES:
                file = self.folder / name
                if file.exists():
                    file.unlink()
                    self.save = True
                    self.quit |= name == SAVE_QUIT
        return self.save, self.quit

    def saved(self) -> None:
        """Forget the wish for a checkpoint, which is written."""
        self.save = False


@contextmanager
def listening(run: Run, runtime: Runtime) -> Iterator[Controls]:
    """Handle signals: SIGTERM and Ctrl-C save and leave at the step boundary, SIGUSR1 saves and goes on.

    Before the first step there is nothing to save, and a second Ctrl-C asks not to wait: then they leave at once.
    """
    controls = Controls(run.folder, runtime.is_main)
    first_interrupt = math.inf

    def terminate(number: int, _: object) -> None:
        if not controls.started:
            raise SystemExit(128 + number)
        controls.save = controls.quit = True

    def interrupt(*_: object) -> None:
        nonlocal first_interrupt
        now = time.monotonic()
        if not controls.started or now - first_interrupt > ONE_CTRL_C_SECONDS:
            raise KeyboardInterrupt
        if not controls.interrupted:
            first_interrupt = now
            logger.info("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        controls.save = controls.quit = controls.interrupted = True

    def keep(*_: object) -> None:
        controls.save = True

    handlers = {signal.SIGTERM: terminate, signal.SIGINT: interrupt, signal.SIGUSR1: keep}
    # a training that a program starts in another thread hears none: Python gives signals to the main one alone
    mine = handlers if threading.current_thread() is threading.main_thread() else {}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    try:
        yield controls
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
