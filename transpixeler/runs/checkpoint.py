"""A checkpoint on disk: a folder that is named for its step and valid only when its manifest lists every file's hash.

`checkpointer` writes such folders, `restore` reads their tensors; here they are named, found and checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
METADATA = ".metadata"  # torch's list of tensors and where they are
PREFIX = "global_step"
_STATE = (("step", int), ("config", dict), ("layout", dict), ("optimizer", dict), ("scopes", dict))


class CheckpointFault(Exception):
    """A folder is not a valid checkpoint, or a save failed; the text says why."""


@dataclass(frozen=True)
class ListedFile:
    """A file as the manifest lists it."""

    size: int
    blake2b: str


def folder_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(folder.name.removeprefix(PREFIX))


def candidates(checkpoints: Path) -> list[Path]:
    """List finished folders, newest first; what is still being written has another name."""
    if not checkpoints.is_dir():
        return []
    found = [folder for folder in checkpoints.iterdir() if re.fullmatch(f"{PREFIX}[0-9]+", folder.name)]
    return sorted(found, key=step_of, reverse=True)


def check(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Raise `CheckpointFault` unless every file has its listed size; hash every `parts`-th file, from `part` on."""
    files = read_manifest(folder)
    for i, (name, listed) in enumerate(sorted(files.items())):
        path = folder / name
        if not path.is_file() or path.stat().st_size != listed.size:
            raise CheckpointFault(f"{name} is missing or has another size")
        if i % parts == part and digest(path) != listed.blake2b:
            raise CheckpointFault(f"{name} has changed since it was written")
    for name in (STATE, METADATA):
        if name not in files:
            raise CheckpointFault(f"{MANIFEST} does not list {name}")


def read_manifest(folder: Path) -> dict[str, ListedFile]:
    """Return the files that the manifest lists, by name; raise `CheckpointFault` for anything but a manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointFault(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFault(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise CheckpointFault(f"{MANIFEST} names no format")
    if manifest["format"] > FORMAT:
        raise CheckpointFault(f"written by a newer transpixeler (format {manifest['format']}); update this one")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointFault(f"{MANIFEST} lists no files")
    return {name: _listed(name, entry) for name, entry in files.items()}


def _listed(name: str, entry: object) -> ListedFile:
    if Path(name).name != name or name == ".." or "\0" in name:
        raise CheckpointFault(f"{MANIFEST} lists {name!r}, which is not a plain file name")
    if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("blake2b"), str):
        raise CheckpointFault(f"{MANIFEST} lists no size and hash of {name}")
    return ListedFile(entry["size"], entry["blake2b"])


def fault_of(folder: Path, runtime: Runtime) -> str:
    """Return why a folder is not a valid checkpoint, or "". A collective call: each rank hashes its share."""
    fault = ""
    try:
        check(folder, part=runtime.rank, parts=runtime.world_size)
    except (CheckpointFault, OSError) as error:
        fault = str(error)
    return next(iter(runtime.faults(fault)), "")


def latest(checkpoints: Path, runtime: Runtime) -> Path | None:
    """Return the newest valid checkpoint, and log why newer ones are passed over. A collective call."""
    for folder in runtime.broadcast([str(f) for f in candidates(checkpoints)]):
        fault = fault_of(Path(folder), runtime)
        if not fault:
            return Path(folder)
        if runtime.is_main:
            logger.warning("checkpoint %s is passed over: %s", Path(folder).name, fault)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return what the checkpoint holds besides tensors: its step, config and layout."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / STATE}: cannot be read: {error}") from None
    if not isinstance(state, dict) or any(name in state and type(state[name]) is not kind for name, kind in _STATE):
        raise UserError(f"{folder / STATE}: is not the state of a training run; resume from another checkpoint")
    return state


def digest(path: Path) -> str:
    """Return the hash that the manifest lists for a file."""
    made = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            made.update(part)
    return made.hexdigest()
