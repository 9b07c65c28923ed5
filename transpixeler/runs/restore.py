"""Read a checkpoint's tensors back, on any layout.

In: a valid checkpoint and the tensors of a built trainer. Out: the same tensors, filled in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.optim import Optimizer

from transpixeler.config.sections import UserError
from transpixeler.runs.checkpoint import CheckpointFault, read_state
from transpixeler.runs.metadata import CheckedReader, read_metadata
from transpixeler.runs.training_state import codes, dequantized, quantize_into


@dataclass(frozen=True)
class Restored:
    """A valid checkpoint that training goes on from: its folder, and what its small files say, read once."""

    folder: Path
    state: Mapping[str, Any]
    metadata: Metadata  # checked

    @classmethod
    def read(cls, folder: Path) -> Restored:
        """Read the state and the list of the tensors; `load` reads the tensors themselves."""
        try:
            return cls(folder, read_state(folder), read_metadata(folder))
        except CheckpointFault as fault:
            raise UserError(f"{folder}: {fault}; use another checkpoint") from fault

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def stored(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self.metadata.state_dict_metadata)

    @property
    def holds_averages(self) -> bool:
        """Return whether the checkpoint was written with `optim.ema` on."""
        return any(name.startswith("ema.") for name in self.stored)


@torch.no_grad()
def load(restored: Restored, tensors: Mapping[str, Tensor], *, same_layout: bool) -> None:
    """Fill the tensors in place from a checkpoint of any layout. A collective call.

    same_layout: also read the codes of 8-bit moments, which makes the resumed run bitwise the same.
    """
    plain = {name: dequantized(tensor) for name, tensor in tensors.items()}
    own_codes = codes(tensors) if same_layout else {}
    folder, metadata = restored.folder, restored.metadata
    _insist_fits(folder, metadata, plain | own_codes)
    _read(folder, metadata, plain)
    for name, tensor in tensors.items():
        quantize_into(tensor, plain[name])
    if same_layout and any(".codes." in name for name in metadata.state_dict_metadata):  # a rank without any joins in
        _read(folder, metadata, own_codes)


def _insist_fits(folder: Path, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    stored = metadata.state_dict_metadata
    missing = sorted(tensors.keys() - stored.keys())
    if missing:
        raise UserError(
            f"{folder}: holds no {missing[0]} ({len(missing)} tensors are missing); it was written under another config"
        )
    for name, tensor in tensors.items():
        entry = stored[name]
        assert isinstance(entry, TensorStorageMetadata), "read_metadata lets nothing else pass"
        if entry.size != tensor.shape:
            there, here = list(entry.size), list(tensor.shape)
            raise UserError(f"{folder}: {name} has shape {there}, not {here}; it was written under another config")


def _read(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    try:
        read_tensors(tensors, storage_reader=CheckedReader(folder, metadata))
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]  # torch's text may advise to load without `weights_only`
        raise UserError(
            f"{folder}: its tensors cannot be read ({type(cause).__name__}); use another checkpoint"
        ) from error


def forget_unsaved(restored: Restored, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
    """Drop the optimizer state of parameters that had none when the checkpoint was written, before a first update."""
    if optimizer is None:
        return
    known = {name.rpartition(".")[0] for name in restored.stored if name.startswith("optimizer.")}
    for name, parameter in parameters.items():
        if f"optimizer.{name}" not in known:
            optimizer.state.pop(parameter, None)
