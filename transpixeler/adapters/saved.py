"""Find what training saved: names of what stands in a save, and which folders are one.

In: a run's folder, a save, or a part of one. Out: paths. A save holds an adapter, a folder of one for each expert, or a
whole model; averaged weights stand in a folder of their own within it, and its config beside both.
"""

from __future__ import annotations

import re
from pathlib import Path

from transpixeler.adapters.spelling import OURS
from transpixeler.adapters.tensorfile import open_tensors

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FOLDER = "transformer"  # a model that was trained in full
EMA = "ema"
CONFIG = "config.yaml"
LATEST = "latest"  # in an output folder, the newest run


def run_of(path: Path) -> Path | None:
    """Return the run, or the save, that a path means: itself, or the latest run in it."""
    return next((folder.resolve() for folder in (path / LATEST, path) if (folder / CONFIG).is_file()), None)


def config_of(save: Path) -> Path:
    """Return the path of a save's config: beside it, or beside what it is a part of."""
    folder = save
    while not (folder / CONFIG).is_file() and is_part(folder):
        folder = folder.parent
    return (folder if (folder / CONFIG).is_file() else save) / CONFIG


def averaged(save: Path) -> Path | None:
    """Return the folder of a save's averaged weights, or of those of its expert; None where they were not saved."""
    found = save.parent / EMA / save.name if is_part(save) else save / EMA
    return found if is_save(found) else None


def is_part(folder: Path) -> bool:
    """Return whether a folder holds the averaged weights of a save, or those of one of its experts."""
    return folder.name == EMA or folder in expert_folders(folder.parent).values()


def expert_folders(save: Path) -> dict[str, Path]:
    """Return the folders of a save that hold an adapter each, by expert; none where the save is of one."""
    if is_own(save) or not save.is_dir():
        return {}
    inner = [file.parent for file in sorted(save.glob(f"*/{ADAPTER_FILE}"))]
    return {folder.name: folder for folder in inner if not re.fullmatch(rf"{EMA}|(step|epoch)\d+", folder.name)}


def is_save(folder: Path) -> bool:
    """Return whether a folder holds what training saves: adapters, or a model that was trained in full."""
    return is_own(folder) or bool(expert_folders(folder))


def is_own(folder: Path) -> bool:
    """Return whether a folder holds one adapter or model itself, and not one for each expert."""
    return (folder / MODEL_FOLDER).is_dir() or (folder / ADAPTER_FILE).is_file()


def newest_save(run: Path) -> Path | None:
    """Return the save of a run's last step; None where nothing is saved yet."""
    saves = [folder for pattern in ("epoch*", "step*") for folder in run.glob(pattern) if is_save(folder)]
    return max(saves, key=lambda save: (saved_step(save), _weights_of(save).stat().st_mtime), default=None)


def saved_step(save: Path) -> int:
    """Return the step that a save's weights are of, as their header says; -1 where it does not."""
    weights = _weights_of(save)
    files = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    return step_of(files[0]) if files else -1


def _weights_of(save: Path) -> Path:
    if (save / MODEL_FOLDER).is_dir():
        return save / MODEL_FOLDER
    return next(iter(expert_folders(save).values()), save) / ADAPTER_FILE


def step_of(file: Path) -> int:
    """Return the step that a file's weights are of, as its header says; -1 where it does not."""
    return step_number(open_tensors(file)[1].get(f"{OURS}step", ""))


def step_number(text: str) -> int:
    """Return the step that a header's text says; -1 where it says none."""
    return int(text) if text.isdecimal() and len(text) < 19 else -1
