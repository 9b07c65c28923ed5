"""A checkpoint on disk: a folder that is named for its step and valid only when its manifest lists every file's hash.

`checkpointer` writes such folders, `restore` reads their tensors; here they are named, found and checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader

from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "global_step"


class CheckpointFault(Exception):
    """A folder is not a valid checkpoint, or a save failed; the text says why."""


@dataclass(frozen=True)
class Restored:
    """A valid checkpoint that training goes on from: its folder, and what its small files say, read once."""

    folder: Path
    state: Mapping[str, Any]
    stored: frozenset[str]  # the names of all tensors

    @classmethod
    def read(cls, folder: Path) -> Restored:
        """Read the state and the names of the tensors; `restore` reads the tensors themselves."""
        return cls(folder, read_state(folder), frozenset(FileSystemReader(folder).read_metadata().state_dict_metadata))

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def holds_averages(self) -> bool:
        """Return whether the checkpoint was written with `optim.ema` on."""
        return any(name.startswith("ema.") for name in self.stored)


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
    found = [f for f in checkpoints.iterdir() if f.name.removeprefix(PREFIX).isdigit() and f.name.startswith(PREFIX)]
    return sorted(found, key=step_of, reverse=True)


def check(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Raise `CheckpointFault` unless every file has its listed size; hash every `parts`-th file, from `part` on."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointFault(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointFault(f"{MANIFEST} cannot be read: {error}") from None
    if manifest["format"] > FORMAT:
        raise CheckpointFault(f"written by a newer transpixeler (format {manifest['format']}); update this one")
    for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise CheckpointFault(f"{name} is missing or has another size")
        if i % parts == part and digest(path) != entry["blake2b"]:
            raise CheckpointFault(f"{name} has changed since it was written")


def fault_of(folder: Path, runtime: Runtime) -> str:
    """Return why a folder is not a valid checkpoint, or "". A collective call: each rank hashes its share."""
    fault = ""
    try:
        check(folder, part=runtime.rank, parts=runtime.world_size)
    except (CheckpointFault, OSError) as error:
        fault = str(error)
    return next((found for found in runtime.gather(fault) if found), "")


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
    return json.loads((folder / STATE).read_text())


def digest(path: Path) -> str:
    """Return the hash that the manifest lists for a file."""
    made = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            made.update(part)
    return made.hexdigest()
