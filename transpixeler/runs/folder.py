"""Name what stands in a run's folder, and find the folders of a config's runs.

In: a config or a run's path. Out: paths. Everything that writes or reads a run asks here for its names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transpixeler.adapters.saved import LATEST
from transpixeler.config.sections import Config, UserError
from transpixeler.files import read_json
from transpixeler.runs.lock import RunLock
from transpixeler.runs.restore import Restored

logger = logging.getLogger("transpixeler")

METRICS = "metrics.jsonl"
MANIFEST = "manifest.json"
LOG = "log.txt"
ORIGIN = "origin.json"  # the checkpoint that a run with restarted steps began with
JOB = ".job"  # names the job that trains a run, so that its restarts find it
SAMPLES = "samples"
ASIDE = "aside"  # where saves, samples and checkpoints go that a resumed run left behind


@dataclass(frozen=True)
class Going:
    """Say how training goes on from a checkpoint: by default as if it had never stopped."""

    restart_steps: bool = False  # in a new run, whose steps and order of samples begin at zero
    weights_only: bool = False  # the optimizer begins anew


STRAIGHT_ON = Going()


@dataclass(frozen=True)
class Run:
    """One run's folder, and the checkpoint that training goes on from."""

    folder: Path
    restored: Restored | None = None
    changed: Mapping[str, str] = field(default_factory=dict)  # by key, how its value differs from the checkpoint's
    made: bool = False  # by this process: before, the folder was empty or absent
    lock: RunLock | None = field(default=None, repr=False, compare=False)  # on rank 0
    going: Going = STRAIGHT_ON

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def name(self) -> str:
        return self.folder.name

    def close(self) -> None:
        """Let other processes train this run."""
        if self.lock is not None:
            self.lock.release()


def configured_run(config: Config) -> Path:
    """Return the folder of the run that `run_name` names, or of the latest run."""
    return Path(config.output_dir) / (config.run_name or LATEST)


def read_facts(path: Path) -> dict[str, Any]:
    """Return a JSON file of a run; nothing where it is missing or, with a warning, where it is damaged."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except UserError as fault:
        logger.warning("%s; it is left out", fault)
        return {}


def sample_folder(step: int) -> str:
    """Return the name of the folder that holds a step's videos."""
    return f"step{step:08}"


def sampled(run: Path) -> dict[int, Path]:
    """Return the folders of videos by their step, newest first; folders with other names are left out."""
    folders = filter(Path.is_dir, (run / SAMPLES).glob("step*"))
    named = [(re.fullmatch(r"step(\d+)", folder.name), folder) for folder in folders]
    return dict(sorted(((int(name[1]), folder) for name, folder in named if name), reverse=True))
