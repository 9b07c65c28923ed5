"""Say which job started this process, and whether torchrun started it again after a failure.

In: torchrun's environment. Out: a name that all attempts of one job share, and the number of the attempt.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """One attempt of a job."""

    job: str
    restarts: int  # attempts before this one
    ranks_here: int = 0  # processes that torchrun started on this machine; 0: it did not


def launch() -> Launch:
    """Return this process's attempt. Without torchrun each process is a job of its own."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    here = os.environ.get("LOCAL_WORLD_SIZE", "0")
    return Launch(_job(), *(int(text) if text.isdigit() else 0 for text in (restarts, here)))


def _job() -> str:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run_id not in ("", "none"):
        return run_id
    # torchrun's default id is `none`; its agent, the parent of every attempt on this machine, tells jobs apart
    process = os.getppid() if run_id else os.getpid()
    return f"{platform.node()}-{process}-{_start_time(process)}"


def _start_time(process: int) -> str:
    """Return when a process began, since numbers of processes are used again; "" where that is not told."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
