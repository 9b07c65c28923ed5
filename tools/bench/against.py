"""Compare a bench's actions in this checkout with those in another one, in a single run that takes turns.

In: a bench that has a function `actions(argv)`, and the path of the other checkout. Out: the rounds of each action, one
here and one there. The sides are two processes, each in its own process group, of which one works at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from readings import Reading
from rounds import PRECISION, Clock, Ratio, Rounds

BENCHES = Path(__file__).parent
ROOT = BENCHES.parents[1]


class Side:
    """One checkout's process, which runs an action when asked."""

    def __init__(self, root: Path, bench: str, argv: Sequence[str]) -> None:
        """Start the process; its bench is the checkout's own where that can be compared, else ours."""
        own = root / "tools/bench" / f"{bench}.py"
        folder = own.parent if own.exists() and "\ndef actions(" in own.read_text() else BENCHES
        command = [sys.executable, BENCHES / "side.py", root, folder, bench, *argv]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True
        )
        self.root = root

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def names(self) -> list[str]:
        """Return the names of its actions, once it is ready."""
        return self._answer()

    def run(self, name: str) -> Reading:
        """Run an action once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return Reading(**self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.root}: its side of the bench ended with the error above")
        return json.loads(line)


def compare(bench: str, argv: Sequence[str], other: Path, *, repeats: int, clock: Clock) -> dict[str, Rounds]:
    """Return the rounds of every action that both checkouts have; a round is once here and once there."""
    if not (other / "transpixeler").is_dir():
        raise SystemExit(f"--against {other}: no checkout of this project, it has no folder transpixeler")
    with Side(ROOT, bench, argv) as here, Side(other.resolve(), bench, argv) as there:
        known = there.names()
        names = [name for name in here.names() if name in known]
        found: dict[str, list[Mapping[str, Reading]]] = {name: [] for name in names}
        for turn in range(-1, repeats):  # the first round warms both up
            for name in names:
                order = (here, there) if turn % 2 else (there, here)
                taken = {side: side.run(name) for side in order}
                if turn >= 0:
                    found[name].append({"here": taken[here], "there": taken[there]})
    return {name: Rounds(tuple(rounds), clock) for name, rounds in found.items()}


def verdict(ratio: Ratio) -> str:
    """Say in words what a ratio of this checkout's time over the other's means."""
    if ratio.interval is None or not ratio.tells:
        return str(ratio)
    low, high = ratio.interval
    if low >= 1 - PRECISION and high <= 1 + PRECISION:
        return f"the same within {PRECISION:.0%}: {ratio}"
    return f"{'slower' if low > 1 else 'faster' if high < 1 else 'perhaps not the same'}: {ratio}"
