"""Measure one call: wall time, this process's CPU time, and the share of the machine that others took meanwhile."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PROC_STAT = Path("/proc/stat")
BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)  # of /proc/stat's first line: user, nice, system, irq, softirq, steal
IDLE_COLUMNS = (3, 4)  # idle, iowait


@dataclass(frozen=True)
class Reading:
    """One call's seconds, and the share of all cores' time that other programs and the hypervisor took during it."""

    wall: float
    cpu: float
    others: float = 0.0

    def seconds(self, clock: str) -> float:
        """Return the seconds by `clock`: wall or cpu."""
        return self.cpu if clock == "cpu" else self.wall


def measure(action: Callable[[], object]) -> Reading:
    """Run `action` once, with the accelerator's queue emptied before and after."""
    gc.collect()
    _synchronize()
    machine, cpu, start = _machine_seconds(), time.process_time(), time.perf_counter()
    action()
    _synchronize()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    busy, total = (after - before for after, before in zip(_machine_seconds(), machine, strict=True))
    return Reading(wall, cpu, min(1.0, max(0.0, busy - cpu) / total) if total else 0.0)


def _machine_seconds() -> tuple[float, float]:
    """Return busy and all seconds of the machine's cores since it started; zeros where the kernel does not tell."""
    if not PROC_STAT.exists():
        return 0.0, 0.0
    ticks = [int(word) for word in PROC_STAT.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks[column] for column in BUSY_COLUMNS)
    total = busy + sum(ticks[column] for column in IDLE_COLUMNS)
    return busy / os.sysconf("SC_CLK_TCK"), total / os.sysconf("SC_CLK_TCK")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
