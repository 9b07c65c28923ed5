"""Open a run's folder: make a new one, or find the one to resume and the checkpoint to go on from.

In: `output_dir`, `run_name` and the argument of `--resume`. Out: a `Run`, the same on every rank, whose folder holds
nothing beyond the step that training starts at.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from transpixeler.adapters.saved import CONFIG, LATEST
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.files import read_json, write_text
from transpixeler.models.family import open_model
from transpixeler.parallel.launch import launch
from transpixeler.parallel.runtime import Runtime, run_stamp
from transpixeler.parallel.sight import comes_in_sight
from transpixeler.runs import checkpoint
from transpixeler.runs.controls import CONTROL_FILES
from transpixeler.runs.folder import ASIDE, JOB, METRICS, ORIGIN, STRAIGHT_ON, Going, Run, configured_run
from transpixeler.runs.lock import LOCK, take_lock
from transpixeler.runs.restore import Restored

logger = logging.getLogger("transpixeler")

# With another value of these, the tensors of a checkpoint have other names or shapes, or another meaning.
FIXED = (
    "streams",
    "model.family",
    "model.expert",
    "model.trainable",
    "model.fuse",
    "lora",
    "optim.name",
    "optim.bf16_parameters",
)
FREE_IN_FIXED = ("lora.dropout", "lora.init_from")
OF_OPTIMIZER = ("optim.name", "optim.bf16_parameters")  # free where the optimizer begins anew
SHARED = ".shared"  # a file that shows which hosts see a run's folder
# These say where a run writes and what it runs on; they do not change what it trains.
UNTOLD = (
    "output_dir",
    "run_name",
    "parallel",
    "log",
    "checkpoint",
    "save",
    "hub",
    "data.workers",
    "train.gc_every",
    "train.allow_changed",
)


def open_run(config: Config, runtime: Runtime, resume: str | None, going: Going = STRAIGHT_ON) -> Run:
    """Make a new run, or find the one to resume; the same on every rank. A collective call."""
    _check_going(going, resume)
    link = Path(config.output_dir) / LATEST
    if runtime.broadcast(link.exists() and not link.is_symlink()):
        raise UserError(f"{link}: is not the link to the newest run that belongs there; move it away or rename it")
    folder, chosen, mine = _place(config, runtime, resume)
    if folder is None:
        return _new(config, runtime)
    if going.restart_steps and not mine:
        return _restarted(config, runtime, folder, chosen, going)
    lock = take_lock(folder, runtime)
    try:
        _check_shared(folder, runtime)
        if runtime.is_main:
            for name in CONTROL_FILES:  # left from a job that was killed before it saw them
                (folder / name).unlink(missing_ok=True)
        return replace(_resumed(config, runtime, folder, chosen, replace(going, restart_steps=False)), lock=lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def find_run(config: Config, runtime: Runtime, resume: str | None, going: Going = STRAIGHT_ON) -> Run:
    """Find what `open_run` would open, and make and change nothing. A collective call."""
    _check_going(going, resume)
    fresh = Path(config.output_dir) / (config.run_name or "RUN")
    if resume is None or going.restart_steps:
        _check_free(fresh, runtime)
    if resume is None:
        return Run(fresh)
    folder, chosen = _find(config, resume)
    if going.restart_steps:
        restored = _beginning(folder, chosen, runtime)
        return Run(fresh, restored, changes(config, restored, going), going=going)
    return _resumed(config, runtime, folder, chosen, going)


def _check_going(going: Going, resume: str | None) -> None:
    for option, asked in (("--restart-steps", going.restart_steps), ("--weights-only", going.weights_only)):
        if asked and resume is None:
            raise UserError(f"{option}: says how --resume goes on; add --resume RUN")


def _beginning(folder: Path, chosen: Path | None, runtime: Runtime) -> Restored:
    """Return the checkpoint that a new run begins with."""
    found = _checkpoint(folder, chosen, runtime)
    if found is None:
        raise UserError(
            f"--restart-steps: {folder} has no checkpoint to begin with; leave out --resume, or train it on"
        )
    return Restored.read(found)


def _restarted(config: Config, runtime: Runtime, folder: Path, chosen: Path | None, going: Going) -> Run:
    """Make a new run that begins with a checkpoint of another one."""
    restored = _beginning(folder, chosen, runtime)
    changed = changes(config, restored, going)
    origin = {"checkpoint": str(restored.folder), "weights_only": going.weights_only}
    return replace(_new(config, runtime, origin=origin), restored=restored, changed=changed, going=going)


def _checkpoint(folder: Path, chosen: Path | None, runtime: Runtime) -> Path | None:
    """Return the chosen checkpoint, or the newest valid one of a run."""
    if chosen is not None:
        _check_valid(chosen, runtime)
    found = chosen or checkpoint.latest(folder / "checkpoints", runtime)
    if found is None and runtime.broadcast(bool(checkpoint.candidates(folder / "checkpoints"))):
        raise UserError(
            f"--resume: no checkpoint in {folder} is valid, for the reasons above; "
            "start a new run without --resume, perhaps with lora.init_from set to one of this run's saves"
        )
    return found


def _resumed(config: Config, runtime: Runtime, folder: Path, chosen: Path | None, going: Going) -> Run:
    """Return the run to resume, at the chosen or its newest valid checkpoint."""
    found = _checkpoint(folder, chosen, runtime)
    if found is None and (folder / ORIGIN).is_file():  # it was killed before its first checkpoint
        origin = read_json(folder / ORIGIN)
        found = Path(origin["checkpoint"])
        _check_valid(found, runtime)
        going = Going(restart_steps=True, weights_only=origin["weights_only"])
    if found is not None:
        restored = Restored.read(found)
        return Run(folder, restored, changes(config, restored, going), going=going)
    logger.info("%s: there is no checkpoint to resume yet; training starts from the beginning", folder)
    return Run(folder)


def _place(config: Config, runtime: Runtime, resume: str | None) -> tuple[Path | None, Path | None, bool]:
    """Return (run folder, chosen checkpoint, whether this job trained it before), or nothing for a new run.

    When torchrun starts its processes again after a failure, they go on with the newest checkpoint of the run that
    this job trained before, whatever the command says; also on a host that came in the place of a lost one. In a first
    attempt, what rank 0 was told holds for all.
    """
    again, resume = max(runtime.gather(launch().restarts)) > 0, runtime.broadcast(resume)
    mine = str(runtime.broadcast(str((_run_of_this_job(config) if again and runtime.is_main else None) or "")))
    if mine:
        logger.info("started again by torchrun: going on with %s", mine)
        return Path(mine), None, True
    return (None, None, False) if resume is None else (*_find(config, resume), False)


def _run_of_this_job(config: Config) -> Path | None:
    """Return the run that earlier attempts of this job trained."""
    marks = Path(config.output_dir).glob(f"*/{JOB}")
    mine = [mark for mark in marks if mark.read_text() == launch().job and mark.with_name(CONFIG).is_file()]
    return max(mine, key=lambda mark: mark.stat().st_mtime).parent.resolve() if mine else None


def _new(config: Config, runtime: Runtime, *, origin: dict[str, Any] | None = None) -> Run:
    name = str(runtime.broadcast(config.run_name or run_stamp()))
    folder = Path(config.output_dir) / name
    _check_free(folder, runtime)
    if runtime.is_main:
        _make(folder)
    lock = take_lock(folder, runtime)
    if runtime.broadcast((folder / CONFIG).exists()):  # made by another while this one looked
        raise UserError(f"{folder}: a run of this name exists; add --resume to go on with it, or change run_name")
    if runtime.is_main:
        _remove_drafts(folder)
        write_text(folder / JOB, launch().job)
        (folder / ORIGIN).unlink(missing_ok=True)
        if origin is not None:
            write_text(folder / ORIGIN, json.dumps(origin))
        write_text(folder / CONFIG, loading.dump(config))
    runtime.barrier()
    run = Run(folder, made=True, lock=lock)
    try:
        _check_shared(folder, runtime)
    except UserError:
        if runtime.is_main:
            discard(run)
        raise
    return run


def _check_free(folder: Path, runtime: Runtime) -> None:
    """Refuse a new run where another one or other files are."""
    if runtime.broadcast((folder / CONFIG).exists()):
        raise UserError(f"{folder}: a run of this name exists; add --resume to go on with it, or change run_name")
    if runtime.broadcast(_holds_other_files(folder)):
        raise UserError(f"{folder}: holds files that are not a run's; change run_name or output_dir")


def _check_shared(folder: Path, runtime: Runtime) -> None:
    """Refuse hosts that do not see the run's folder, as each rank writes its part of a checkpoint there."""
    if runtime.world_size == 1:
        return
    mark = folder / SHARED
    if runtime.is_main:
        mark.touch()
    runtime.barrier()
    blind = [host for host, sees in runtime.gather((platform.node(), comes_in_sight(mark))) if not sees]
    if runtime.is_main:
        mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"output_dir: {folder}, which rank 0 sees, is not there for {len(blind)} ranks on "
            f"{', '.join(dict.fromkeys(blind))}; all hosts must share the folder"
        )


def begin(run: Run, config: Config) -> None:
    """Write the run's config and job, and point `latest` to it. Rank 0 calls this once everything is built."""
    write_text(run.folder / JOB, launch().job)
    write_text(run.folder / CONFIG, loading.dump(config))
    _point(run.folder.parent / LATEST, run.name)


def discard(run: Run) -> None:
    """Remove a new run that a user's mistake kept from starting, so that its name stays free."""
    metrics = run.folder / METRICS
    if run.made and (not metrics.exists() or not metrics.stat().st_size):
        shutil.rmtree(run.folder, ignore_errors=True)


def _holds_other_files(folder: Path) -> bool:
    """Return whether a folder holds more than what a process leaves that is killed before it wrote its config."""
    return folder.is_dir() and any(
        not _is_draft(path) and path.name not in (JOB, LOCK, ORIGIN) for path in folder.iterdir()
    )


def _is_draft(path: Path) -> bool:
    """Return whether a file or folder was being written when its process was killed, as `files.whole` names it."""
    return re.fullmatch(r"\..+\.(tmp|old|new)", path.name) is not None or path.name == SHARED


def _remove_drafts(folder: Path) -> None:
    for draft in filter(_is_draft, list(folder.iterdir())):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def resume_hint(run: Run) -> str:
    """Return how to go on after training has failed."""
    found = checkpoint.candidates(run.checkpoints)
    return f"--resume goes on from {found[0].name}" if found else "there is no checkpoint yet to go on from"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot make {folder}: {error.strerror}") from None


def _point(link: Path, name: str) -> None:
    """Replace the link in one move, so that it is never missing."""
    fresh = link.with_name(f".{LATEST}.{os.getpid()}")
    fresh.symlink_to(name)
    fresh.replace(link)


def _find(config: Config, resume: str) -> tuple[Path, Path | None]:
    """Return (run folder, checkpoint or None) for an argument of --resume; "" stands for the config's own run."""
    path = Path(resume) if resume else configured_run(config)
    if not path.is_dir():
        wanted = f"{path} is no folder" if resume or config.run_name else f"{config.output_dir} holds no run yet"
        raise UserError(f"--resume: {wanted}; leave --resume out to start one, or give a run or checkpoint folder")
    path = path.resolve()
    chosen = path if path.name.startswith(checkpoint.PREFIX) else None
    folder = path.parents[1] if chosen else path
    if not (folder / CONFIG).is_file():
        raise UserError(f"--resume: {folder} is no run, as it has no {CONFIG}; give a run or checkpoint folder")
    return folder, chosen


def _check_valid(folder: Path, runtime: Runtime) -> None:
    fault = checkpoint.fault_of(folder, runtime)
    if fault:
        raise UserError(f"--resume: {folder}: {fault}; give the run's folder to take its newest valid checkpoint")


def set_aside(run: Run, step: int, first_step: Callable[[int], int]) -> None:
    """Move saves, samples and checkpoints of later steps to RUN/aside, in place of older ones there; remove drafts.

    They are damaged, or belong to a training that was left when an older checkpoint was resumed; under their old names
    they would be taken for the newest. `first_step`: the number of steps in so many epochs.
    """
    _remove_drafts(run.folder)
    later = [folder for folder in checkpoint.candidates(run.checkpoints) if checkpoint.step_of(folder) > step]
    for pattern in ("step*", "epoch*", "samples/step*"):
        for folder in filter(Path.is_dir, run.folder.glob(pattern)):
            named = re.fullmatch(r"(step|epoch)(\d+)", folder.name)
            if named and (int(named[2]) if named[1] == "step" else first_step(int(named[2]))) > step:
                later.append(folder)
    for folder in later:
        name = folder.relative_to(run.folder)
        aside = run.folder / ASIDE / name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(aside)
        logger.warning("%s is later than step %d: it is kept as %s", name, step, aside.relative_to(run.folder))


# --- another config --------------------------------------------------------------------------------------------------


def changes(config: Config, restored: Restored, going: Going = STRAIGHT_ON) -> dict[str, str]:
    """Return by key what differs from the checkpoint's config; refuse a model that its tensors do not fit."""
    before, after = dict(_defaults(Config())) | _flat(restored.state["config"]), _flat(loading.plain(config))
    _fill_defaults(config, before, after)
    changed = {
        key: (before.get(key), after.get(key))
        for key in after | before
        if before.get(key) != after.get(key) and not _under(key, UNTOLD)
    }
    free = (*FREE_IN_FIXED, *(OF_OPTIMIZER if going.weights_only else ()))
    refused = [key for key in changed if _under(key, FIXED) and not _under(key, free)]
    if refused:
        lines = "; ".join(f"{key}: {changed[key][0]!r} there, {changed[key][1]!r} here" for key in refused)
        raise UserError(
            f"--resume: {restored.folder.name} was trained with another model: {lines}; "
            "start a new run without --resume"
        )
    return {key: f"was {old!r}, is {new!r}" for key, (old, new) in changed.items()}


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by their dotted keys; an empty dict has none."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{key}.{name}" if key else name).items()}


def _defaults(section: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what older versions, which did not know all keys, left out; tables of the user's own names have none."""
    for field in fields(section):
        value, name = getattr(section, field.name), f"{key}.{field.name}" if key else field.name
        if is_dataclass(value):
            yield from _defaults(value, name)
        elif not isinstance(value, dict):
            yield name, loading.plain(value)


def _fill_defaults(config: Config, *sides: dict[str, Any]) -> None:
    """Write out what is left to the family, where only one side names it."""
    for key in ("model.family", "lora.targets"):
        given = [bool(side.get(key)) for side in sides]
        if any(given) and not all(given):
            family = open_model(config.model).family
            default = {"model.family": family.name, "lora.targets": list(family.lora_targets)}[key]
            for side in sides:
                side[key] = side.get(key) or default


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
