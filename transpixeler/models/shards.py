"""A parameter that may be sharded goes in; the part of it that this rank holds comes out.

FSDP2 makes each parameter a DTensor. What is done elementwise is done on its local part: a DTensor's own operators take
several times as long to call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Slices = tuple[slice, ...]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_slices(parameter: Tensor) -> Slices:
    """Locate the part of the whole tensor that this rank holds."""
    starts, sizes = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                whole, mesh = sizes[placement.dim], parameter.device_mesh
                chunk = -(-whole // mesh.size(axis))
                start = min(chunk * mesh.get_local_rank(axis), whole)
                starts[placement.dim] += start
                sizes[placement.dim] = min(chunk, whole - start)
        assert tuple(sizes) == tuple(parameter.to_local().shape), "a placement that torch.chunk does not describe"
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes))


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Put a whole tensor into a parameter that may hold a shard of it."""
    with torch.no_grad():
        local(parameter).copy_(whole[local_slices(parameter)])
