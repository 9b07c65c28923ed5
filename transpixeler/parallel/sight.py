"""Find out who sees a file that another rank made: hosts may share a folder, or have one each in the same place."""

from __future__ import annotations

import time
from pathlib import Path

SECONDS = 5.0  # until a network disk shows a new file to every host


def comes_in_sight(mark: Path) -> bool:
    """Return whether a file that another rank has made is seen here, now or in a moment."""
    deadline = time.monotonic() + SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen
