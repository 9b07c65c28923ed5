"""Keep RUN/report.html up to date while training: seldom enough to cost next to nothing, and never a reason to stop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from transpixeler.publishing import report

logger = logging.getLogger("transpixeler")

MOST_TIME = 0.005  # of training that writing the page may take


class LivePage:
    """The report of a run that this process trains."""

    def __init__(self, run: Path, seconds: float) -> None:
        """seconds: between writings; 0: only when `write` is called."""
        self.run, self.seconds = run, seconds
        self.written = False
        self._due = time.monotonic() + seconds

    def if_due(self) -> None:
        """Write the page if that was long enough ago."""
        if self.seconds and time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write the page now."""
        started = time.monotonic()
        self._write(self.seconds or report.REFRESH)
        took = time.monotonic() - started
        self._due = started + max(self.seconds, took / MOST_TIME)

    def close(self) -> None:
        """Write the page for the last time, if there is one, so that it no longer waits for another."""
        if self.written:
            self._write(0.0)

    def _write(self, live: float) -> None:
        try:
            report.write_report(self.run, live=live)
            self.written = True
        except Exception as fault:  # a page that fails for any reason must not end a training
            logger.error("%s was not written: %s", self.run / report.PAGE, fault)
