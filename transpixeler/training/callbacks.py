"""Let a caller from Python follow a training: records, evaluations and saves go out to functions on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _nothing(*_: object) -> None:
    return


@dataclass(frozen=True)
class Callbacks:
    """Functions that rank 0 calls while training; an error in one ends the training."""

    # the line of metrics.jsonl: step, loss, lr, seconds, …; after True training ends with a checkpoint, one step later
    on_step: Callable[[Mapping[str, Any]], object] = _nothing
    on_eval: Callable[[int, Mapping[str, Any]], object] = _nothing  # the step, and losses and measures by set
    on_save: Callable[[Path], object] = _nothing  # the folder of the save


NO_CALLBACKS = Callbacks()
