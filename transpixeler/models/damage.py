"""Read files of a model folder; a damaged one becomes an error that names it, whatever a library raises over it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from transpixeler.config import UserError


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Raise `UserError` that names `path` for any error while it is read; diffusers and tokenizers raise all kinds."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as fault:
        said = (str(fault).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"model.path: {path} cannot be used ({type(fault).__name__}: {said}); copy or download it again"
        ) from fault


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    with naming_damage(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"expected a JSON object, found {type(found).__name__}")
    return found
