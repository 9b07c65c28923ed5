"""Read a checkpoint's tensors back, on any layout.

In: a valid checkpoint and the tensors of a built trainer. Out: the same tensors, filled in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors
from torch.optim import Optimizer

from transpixeler.config import UserError
from transpixeler.runs.checkpoint import Restored
from transpixeler.runs.training_state import codes, dequantized, quantize_into


@torch.no_grad()
def load(restored: Restored, tensors: Mapping[str, Tensor], *, same_layout: bool) -> None:
    """Fill the tensors in place from a checkpoint of any layout. A collective call.

    same_layout: also read the codes of 8-bit moments, which makes the resumed run bitwise the same.
    """
    plain = {name: dequantized(tensor) for name, tensor in tensors.items()}
    own_codes = codes(tensors) if same_layout else {}
    folder, stored = restored.folder, restored.stored
    missing = sorted({*plain, *own_codes} - stored)
    if missing:
        raise UserError(
            f"{folder}: holds no {missing[0]} ({len(missing)} tensors are missing); it was written under another config"
        )
    read_tensors(plain, checkpoint_id=folder)
    for name, tensor in tensors.items():
        quantize_into(tensor, plain[name])
    if same_layout and any(".codes." in name for name in stored):  # a rank that has none still takes part
        read_tensors(own_codes, checkpoint_id=folder)


def forget_unsaved(restored: Restored, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> None:
    """Drop the optimizer state of parameters that had none when the checkpoint was written, before a first update."""
    if optimizer is None:
        return
    known = {name.rpartition(".")[0] for name in restored.stored if name.startswith("optimizer.")}
    for name, parameter in parameters.items():
        if f"optimizer.{name}" not in known:
            optimizer.state.pop(parameter, None)
