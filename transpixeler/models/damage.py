"""Name the file of a model folder that cannot be read, in place of what a library raises over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
