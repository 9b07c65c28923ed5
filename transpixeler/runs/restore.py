"""Read a checkpoint's tensors back, on any layout.

In: a valid checkpoint folder and the tensors of a built trainer. Out: the same tensors, filled in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.optim import Optimizer

from transpixeler.config import UserError
from transpixeler.runs.checkpoint import CheckpointFault
from transpixeler.runs.metadata import CheckedReader, read_metadata
from transpixeler.runs.training_state import codes, dequantized, quantize_into


@torch.no_grad()
def load(folder: Path, tensors: Mapping[str, Tensor], *, same_layout: bool) -> None:
    """Fill the tensors in place from a checkpoint of any layout. A collective call.

    same_layout: also read the codes of 8-bit moments, which makes the resumed run bitwise the same.
    """
    plain = {name: dequantized(tensor) for name, tensor in tensors.items()}
    own_codes = codes(tensors) if same_layout else {}
    metadata = _metadata(folder)
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


def forget_unsaved(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
    """Drop the optimizer state of parameters that had none when the checkpoint was written, before a first update."""
    if optimizer is None:
        return
    known = {name.rpartition(".")[0] for name in _metadata(folder).state_dict_metadata if name.startswith("optimizer.")}
    for name, parameter in parameters.items():
        if f"optimizer.{name}" not in known:
            optimizer.state.pop(parameter, None)


def holds_means(folder: Path) -> bool:
    """Return whether the checkpoint was written with `optim.ema` on."""
    return any(name.startswith("ema.") for name in _metadata(folder).state_dict_metadata)


def _metadata(folder: Path) -> Metadata:
    try:
        return read_metadata(folder)
    except CheckpointFault as fault:
        raise UserError(f"{folder}: {fault}; use another checkpoint") from fault
