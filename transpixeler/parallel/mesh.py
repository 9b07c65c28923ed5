"""Arrange ranks as (pipeline, replicate, shard), from the config and the number of processes.

In: `parallel.*` and the world size. Out: this rank's coordinates and the groups that the floors above reduce over.
Shard is the innermost axis, so that its traffic stays inside a machine; pipeline the outermost, where it is least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from transpixeler.config import ParallelConfig, UserError
from transpixeler.parallel.runtime import Runtime


@dataclass(frozen=True)
class Layout:
    """The three numbers whose product is the world size."""

    pipeline: int
    replicate: int
    shard: int

    @property
    def data(self) -> int:
        """Ranks that train on different samples."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"pipeline {self.pipeline} × replicate {self.replicate} × shard {self.shard}"


def resolve(config: ParallelConfig, world_size: int) -> Layout:
    """Fill in what the config leaves open (0), and do the arithmetic for the user where it does not fit."""
    fixed = [config.pipeline, config.replicate, config.shard]
    if config.replicate == config.shard == 0:
        raise UserError("parallel.replicate: 0 means what is left over, and so does parallel.shard; set one of them")
    known = config.pipeline * max(config.replicate, 1) * max(config.shard, 1)
    if 0 in fixed:
        if world_size % known:
            raise UserError(_misfit(config, world_size, known))
        fixed = [n or world_size // known for n in fixed]
    layout = Layout(*fixed)
    if layout.pipeline * layout.data != world_size:
        raise UserError(_misfit(config, world_size, known))
    return layout


def _misfit(config: ParallelConfig, world_size: int, product: int) -> str:
    parts = {"pipeline": config.pipeline, "replicate": config.replicate, "shard": config.shard}
    said = " × ".join(f"{name} {n}" for name, n in parts.items() if n)
    verb = "must divide" if 0 in parts.values() else "must equal"
    return (
        f"parallel.*: {said} = {product} {verb} the number of processes, {world_size}; "
        f"launch torchrun with {product} processes in all, or change parallel.pipeline, replicate or shard"
    )


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the layout, and its groups; every rank of a run has one."""

    layout: Layout
    device: torch.device
    pipeline_rank: int
    data_rank: int
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    shards: DeviceMesh  # what FSDP2 shards over: 1-D, or (replicate, shard)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1


def build(layout: Layout, runtime: Runtime) -> Mesh:
    """Join the groups; a collective call."""
    p, r, s = layout.pipeline, layout.replicate, layout.shard
    mesh = init_device_mesh(runtime.device.type, (p, r, s), mesh_dim_names=("pipeline", "replicate", "shard"))
    for group in mesh.get_all_groups():
        _set_pg_timeout(runtime.timeout, group)  # a mesh makes its groups with torch's own
    ranks = torch.arange(p * r * s).view(p, r * s)
    pipeline_rank, data_rank = divmod(runtime.rank, r * s)
    if p == 1:  # all ranks, which have a group already: another is one more communicator, with buffers of its own
        data_group = dist.group.WORLD
    else:
        data_group = [dist.new_group(row, timeout=runtime.timeout) for row in ranks.tolist()][pipeline_rank]
    assert isinstance(data_group, dist.ProcessGroup)  # this rank is in it
    return Mesh(
        layout=layout,
        device=runtime.device,
        pipeline_rank=pipeline_rank,
        data_rank=data_rank,
        pipeline_group=mesh["pipeline"].get_group(),
        data_group=data_group,
        shards=mesh["replicate", "shard"] if r > 1 else mesh["shard"],
    )
