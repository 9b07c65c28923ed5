"""A local path or a Hub id goes in, a local path comes out: what a model's or an adapter's readers open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transpixeler.config.sections import UserError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path: str | Path, *, only: Sequence[str], key: str = "model.path") -> Path:
    """Return a local path as it is, or where a Hub id lies after downloading what matches `only`."""
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"{key}: {path} does not exist; give a folder, a .safetensors file or a Hub id like user/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(only)))
    except (OSError, ValueError) as fault:  # no network, offline mode, no such repository, or no valid id
        raise UserError(
            f"{key}: {path} is no local path, and the Hub does not give it ({type(fault).__name__}); download it where "
            f"there is network (hf download {path} --local-dir FOLDER) and set {key} to that folder"
        ) from fault
