"""The folder of one run: where it is, what stands in it, and what a user asks of it while it trains.

In: `output_dir`, `run_name`, a `--resume` argument. Out: a `Run` with its paths, and the requests (`save`, `save_quit`
files, signals) that the trainer honours at the next step boundary.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transpixeler import configfile
from transpixeler.config import Config, UserError
from transpixeler.files import write_text
from transpixeler.parallel.runtime import Runtime, run_stamp
from transpixeler.runs import checkpoint
from transpixeler.runs.telemetry import METRICS

logger = logging.getLogger("transpixeler")

LATEST = "latest"
SAMPLES = "samples"
ASIDE = "aside"  # what belongs to a course that was left
CONFIG = "config.yaml"
# A checkpoint of another value of these holds other tensors, or means something else.
FIXED = ("streams", "model.family", "model.trainable", "model.fuse", "lora", "optim.name", "optim.bf16_parameters")
FREE_IN_FIXED = ("lora.dropout", "lora.init_from")
REQUESTS = ("save", "save_quit")  # files that a user puts into a run's folder
# Where a run writes and on how many devices it runs says nothing about what it trains.
SILENT = ("output_dir", "run_name", "parallel", "log", "checkpoint", "save", "hub", "data.workers", "train.gc_every")


@dataclass(frozen=True)
class Run:
    """One run's folder, and the checkpoint that it goes on from."""

    folder: Path
    resume_from: Path | None = None
    changed: tuple[str, ...] = ()  # what its config has that the checkpoint's had not
    made: bool = False  # now: before, its folder was empty or not there

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def name(self) -> str:
        return self.folder.name


def open_run(config: Config, runtime: Runtime, resume: str | None) -> Run:
    """A new folder, or the one to resume; the same on every rank. A collective call."""
    if resume is None:
        return _new(config, runtime)
    folder, chosen = _find(config, resume)
    if chosen is not None:
        _insist_valid(chosen, runtime)
    found = chosen or checkpoint.latest(folder / "checkpoints", runtime)
    if runtime.is_main:
        for name in REQUESTS:  # of a job that was killed before it could see them
            (folder / name).unlink(missing_ok=True)
    if found is not None:
        return Run(folder, found, _changes(config, found))
    if runtime.broadcast(bool(checkpoint.candidates(folder / "checkpoints"))):
        raise UserError(
            f"--resume: none of the checkpoints in {folder} is whole, for the reasons above; "
            "start a new run without --resume, perhaps with lora.init_from set to one of this run's saves"
        )
    logger.info("%s: no checkpoint to resume yet; training starts from the beginning", folder)
    return Run(folder)


def meant(config: Config) -> Path:
    """The run that a config speaks of: of its name, or the latest."""
    return Path(config.output_dir) / (config.run_name or LATEST)


def _new(config: Config, runtime: Runtime) -> Run:
    name = str(runtime.broadcast(config.run_name or run_stamp()))
    folder = Path(config.output_dir) / name
    if runtime.broadcast((folder / CONFIG).exists()):
        raise UserError(f"{folder}: a run of this name exists; add --resume to go on with it, or change run_name")
    if runtime.broadcast(_is_filled(folder)):
        raise UserError(f"{folder}: holds something that is no run; change run_name or output_dir")
    if runtime.is_main:
        _make(folder)
        write_text(folder / CONFIG, configfile.dump(config))
    runtime.barrier()
    return Run(folder, made=True)


def begin(run: Run, config: Config) -> None:
    """From now on this is the latest run, and this its config. Rank 0 calls it when everything is built."""
    write_text(run.folder / CONFIG, configfile.dump(config))
    _point(run.folder.parent / LATEST, run.name)


def discard(run: Run) -> None:
    """A run that a mistake in its input kept from starting leaves nothing behind, its name least of all."""
    metrics = run.folder / METRICS
    if run.made and (not metrics.exists() or not metrics.stat().st_size):
        shutil.rmtree(run.folder, ignore_errors=True)


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and next(folder.iterdir(), None) is not None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be made: {error.strerror}") from None


def _point(link: Path, name: str) -> None:
    """`latest` changes in one move, so that nobody finds it missing."""
    fresh = link.with_name(f".{LATEST}.{os.getpid()}")
    fresh.symlink_to(name)
    fresh.replace(link)


def _find(config: Config, resume: str) -> tuple[Path, Path | None]:
    """(run folder, checkpoint) that a --resume argument means: nothing for the config's, a run, or one checkpoint."""
    path = Path(resume) if resume else meant(config)
    if not path.is_dir():
        wanted = f"{path} is no folder" if resume or config.run_name else f"{config.output_dir} holds no run yet"
        raise UserError(f"--resume: {wanted}; leave --resume out to start one, or give a run or checkpoint folder")
    path = path.resolve()
    chosen = path if path.name.startswith(checkpoint.PREFIX) else None
    folder = path.parents[1] if chosen else path
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume: {folder} is no run, as it has no {CONFIG}; give a run or checkpoint folder")
    return folder, chosen


def _insist_valid(folder: Path, runtime: Runtime) -> None:
    fault = checkpoint.fault_of(folder, runtime)
    if fault:
        raise UserError(f"--resume: {folder}: {fault}; give the run's folder to take its newest valid checkpoint")


def set_aside(run: Run, step: int, ends: Callable[[int], int]) -> None:
    """Moves what lies beyond the step that training goes on from to RUN/aside, and removes drafts.

    It is damaged, or of a course that was left, and under its old name it would pass for the newest. `ends`: the step
    at which so many epochs end.
    """
    for draft in run.folder.glob(".*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)
    beyond = [folder for folder in checkpoint.candidates(run.checkpoints) if checkpoint.step_of(folder) > step]
    for pattern in ("step*/", "epoch*/", "samples/step*/"):
        for folder in run.folder.glob(pattern):
            named = re.fullmatch(r"(step|epoch)(\d+)", folder.name)
            if named and (int(named[2]) if named[1] == "step" else ends(int(named[2]))) > step:
                beyond.append(folder)
    for folder in beyond:
        name = folder.relative_to(run.folder)
        aside = run.folder / ASIDE / name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(aside)
        logger.warning("%s is beyond step %d: it is kept as %s", name, step, aside.relative_to(run.folder))


def sample_folder(step: int) -> str:
    return f"step{step:08}"


def sampled(run: Path) -> dict[int, Path]:
    """The folders of videos by their step, the latest first; what a user put beside them is left alone."""
    named = [(re.fullmatch(r"step(\d+)", folder.name), folder) for folder in (run / SAMPLES).glob("step*/")]
    return dict(sorted(((int(name[1]), folder) for name, folder in named if name), reverse=True))


# --- another config --------------------------------------------------------------------------------------------------


def _changes(config: Config, folder: Path) -> tuple[str, ...]:
    """What differs from the checkpoint's config; refuses what its tensors cannot follow."""
    before, after = _flat(checkpoint.read_state(folder)["config"]), _flat(configfile.plain(config))
    changed = {
        key: (before.get(key), after.get(key))
        for key in after | before
        if before.get(key) != after.get(key) and not _under(key, SILENT)
    }
    refused = [key for key in changed if _under(key, FIXED) and not _under(key, FREE_IN_FIXED)]
    if refused:
        lines = "; ".join(f"{key}: {changed[key][0]!r} there, {changed[key][1]!r} here" for key in refused)
        raise UserError(
            f"--resume: {folder.name} was trained with another model: {lines}; start a new run without --resume"
        )
    return tuple(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Leaves by their dotted keys; an empty table has none."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{key}.{name}" if key else name).items()}


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


class Stopped(Exception):
    """Someone asked to stop within an evaluation; raised on every rank together."""


# --- requests --------------------------------------------------------------------------------------------------------


@dataclass
class Requests:
    """What was asked since the last step, by signal on any rank or by file on rank 0."""

    folder: Path
    is_main: bool
    save: bool = False
    quit: bool = False
    started: bool = False  # before, there is nothing to save

    def poll(self) -> tuple[bool, bool]:
        """(save, quit) of this rank; the trainer makes them everyone's."""
        if self.is_main:
            for name in REQUESTS:
                asked = self.folder / name
                if asked.exists():
                    asked.unlink()
                    self.save = True
                    self.quit |= name == "save_quit"
        return self.save, self.quit

    def done(self) -> None:
        self.save = False


@contextmanager
def listening(run: Run, runtime: Runtime) -> Iterator[Requests]:
    """SIGTERM saves and leaves, SIGUSR1 saves and goes on; both wait for the step boundary, but not for the first."""
    requests = Requests(run.folder, runtime.is_main)

    def terminate(number: int, _: object) -> None:
        if not requests.started:
            raise SystemExit(128 + number)
        requests.save = requests.quit = True

    def keep(*_: object) -> None:
        requests.save = True

    before = {
        number: signal.signal(number, act) for number, act in ((signal.SIGTERM, terminate), (signal.SIGUSR1, keep))
    }
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
