"""Turn a library's error over a damaged file of a model folder into one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from transpixeler.config.sections import UserError


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


def read_config(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder."""
    with naming_damage(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content
