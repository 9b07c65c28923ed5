"""Name the tensors of the training state so that no layout changes the names, and make them fit to be stored.

In: parameters, their optimizer, its 8-bit moments. Out: plain tensors by name, which `checkpointer` writes and
`restore` fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transpixeler.models.shards import local
from transpixeler.parallel.mesh import Mesh


class _Quantized(Protocol):
    """A tensor subclass that holds integer codes and their scales, as 8-bit optimizers keep their moments."""

    codes: Tensor

    def __tensor_flatten__(self) -> tuple[Sequence[str], object]: ...
    def dequantize(self) -> Tensor: ...
    def copy_(self, source: Tensor) -> Tensor: ...


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return every tensor of the optimizer's state as `optimizer.PARAMETER.KEY`."""
    if optimizer is None:
        return {}
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def materialize(optimizer: Optimizer | None) -> None:
    """Make the state that a first step would make, for a load to fill; no parameter changes."""
    if optimizer is None:
        return
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0  # a product, because a rate may be a tensor
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, (lr, decay) in zip(optimizer.param_groups, kept, strict=True):
        group["lr"], group["weight_decay"] = lr, decay


def own_part(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Return this rank's part of the tensors: replicas hold the same ones, so each of them writes a part."""
    layout = mesh.layout
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        replica, replicas = mesh.data_rank // layout.shard, layout.replicate
    else:  # every rank of the stage has them whole
        replica, replicas = mesh.stage_rank, layout.stage
    names = sorted(tensors)[replica::replicas]
    return {name: tensors[name] for name in names}


def dequantized(tensor: Tensor) -> Tensor:
    """Return 8-bit moments as numbers, because their blocks fit no other sharding; other tensors as they are."""
    own = local(tensor)
    if not _is_quantized(own):
        return tensor
    values = own.dequantize()
    if isinstance(tensor, DTensor):
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(values, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
    return values


def quantize_into(tensor: Tensor, values: Tensor) -> None:
    """Copy numbers back into the 8-bit moments that `dequantized` read them from; do nothing for other tensors."""
    own = local(tensor)
    if _is_quantized(own):
        own.copy_(local(values))


def codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the codes and scales of 8-bit moments, named by their shard, so that the same layout resumes bitwise."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = local(tensor)
        if _is_quantized(own):
            place = _shard(tensor)
            found |= {f"{name}.{part}.{place}": getattr(own, part) for part in own.__tensor_flatten__()[0]}
    return found


def _shard(tensor: Tensor) -> str:
    """Return this rank's coordinates on the mesh axes that the tensor is sharded over, such as `1-0`."""
    if not isinstance(tensor, DTensor):
        return "0"
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None, "a rank outside the mesh holds no shard"
    axes = zip(coordinates, tensor.placements, strict=True)
    return "-".join(str(at) for at, placement in axes if placement.is_shard())


def _is_quantized(tensor: Tensor) -> TypeGuard[_Quantized]:
    return hasattr(type(tensor), "__tensor_flatten__") and hasattr(tensor, "codes")
