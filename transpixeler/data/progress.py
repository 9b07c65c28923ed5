"""Show the progress of encoding and sampling: a bar on a terminal, else a line every few seconds.

The bar and lines of training steps are those of `runs.telemetry`.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger("transpixeler")
LINE_SECONDS = 10.0


class Progress:
    """Progress of rank 0's own share, which ends at about the same time as the others'."""

    def __init__(
        self, what: str, total: int, frames: int = 0, *, shown: bool, ranks: int = 1, verb: str = "encoding"
    ) -> None:
        self._what = f"{what} of rank 0" if ranks > 1 else what
        self._total, self._frames, self._verb = total, frames, verb
        self._done, self._done_frames = 0, 0
        self._start = self._logged = time.monotonic()
        self._shown = shown
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, unit=f" {what}", desc=f"{verb} {self._what}", smoothing=0.1, leave=verb == "encoding"
            )

    def step(self, count: int = 1, *, frames: int = 0) -> None:
        self._done += count
        self._done_frames += frames
        if self._bar is not None:
            self._bar.set_postfix_str(self._frame_rate(), refresh=False)
            self._bar.update(count)
        elif self._shown and (time.monotonic() - self._logged > LINE_SECONDS or self._ends_a_list):
            self._logged = time.monotonic()
            logger.info("%s", self.line())

    @property
    def _ends_a_list(self) -> bool:
        """Return whether the last of what is encoded is done; other work has results of its own to tell."""
        return self._done == self._total and self._verb == "encoding"

    def line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        # estimated from frames where there are any, as large clips take longer than small ones
        part = self._done_frames / self._frames if self._frames else self._done / self._total
        left = seconds / part - seconds if part else float("inf")
        rates = ", ".join(filter(None, [f"{self._done / seconds:.1f}/s", self._frame_rate(), f"{left:.0f} s left"]))
        return f"{self._verb} {self._what}: {self._done}/{self._total} ({rates})"

    def _frame_rate(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-6)
        return f"{self._done_frames / seconds:.0f} frames/s" if self._frames else ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Pulse:
    """Say in the log every few seconds how many files were looked at, where nobody knows how many there are."""

    def __init__(self, verb: str) -> None:
        self._verb, self._done = verb, 0
        self._start = self._logged = time.monotonic()

    def step(self) -> None:
        self._done += 1
        if (now := time.monotonic()) - self._logged > LINE_SECONDS:
            self._logged = now
            logger.info(
                "%s files: %d so far (%.0f/s)", self._verb, self._done, self._done / max(now - self._start, 1e-6)
            )
