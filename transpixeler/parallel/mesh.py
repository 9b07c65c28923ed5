"""Arrange ranks as (pipeline, replicate, shard, context), from the config and the number of processes.

In: `parallel.*` and the world size. Out: this rank's coordinates and the groups that the floors above reduce over.
Context and shard are the innermost axes, so that their traffic stays inside a machine; pipeline is the outermost, where
it is least. Weights are sharded over the ranks of both: those of a context hold the same ones, and work at one time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from transpixeler.config.sections import ParallelConfig, UserError
from transpixeler.models.context import Context
from transpixeler.parallel.launch import launch
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")
set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # public from torch 2.14 on
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The four numbers whose product is the world size."""

    pipeline: int
    replicate: int
    shard: int
    context: int = 1

    @property
    def data(self) -> int:
        """Ranks that train on different samples."""
        return self.replicate * self.shard

    @property
    def stage(self) -> int:
        """Ranks that work with the same weights."""
        return self.data * self.context

    @property
    def ranks(self) -> int:
        return self.pipeline * self.stage

    def __str__(self) -> str:
        context = f" × context {self.context}" if self.context > 1 else ""
        return f"pipeline {self.pipeline} × replicate {self.replicate} × shard {self.shard}{context}"


def resolve(config: ParallelConfig, world_size: int) -> Layout:
    """Fill in what the config leaves open (0), and do the arithmetic for the user where it does not fit."""
    fixed = [config.pipeline, config.replicate, config.shard]
    if config.replicate == config.shard == 0:
        raise UserError("parallel.replicate: 0 means what is left over, and so does parallel.shard; set one of them")
    known = config.pipeline * max(config.replicate, 1) * max(config.shard, 1) * config.context
    if 0 in fixed:
        if world_size % known:
            raise UserError(_misfit(config, world_size, known))
        fixed = [n or world_size // known for n in fixed]
    layout = Layout(*fixed, config.context)
    if layout.ranks != world_size:
        raise UserError(_misfit(config, world_size, known))
    return layout


def _misfit(config: ParallelConfig, world_size: int, product: int) -> str:
    parts = {"pipeline": config.pipeline, "replicate": config.replicate, "shard": config.shard}
    parts |= {"context": config.context} if config.context > 1 else {}
    said = " × ".join(f"{name} {n}" for name, n in parts.items() if n)
    verb = "must divide" if 0 in parts.values() else "must equal"
    return (
        f"parallel.*: {said} = {product} {verb} the number of processes, {world_size}; "
        f"launch torchrun with {product} processes in all, or change parallel.pipeline, replicate, shard or context"
    )


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the layout, and its groups; every rank of a run has one."""

    layout: Layout
    device: torch.device
    pipeline_rank: int
    data_rank: int  # its share of the samples
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup  # the ranks of its stage, whose gradients are summed
    shards: DeviceMesh  # what FSDP2 shards over: 1-D, or (replicate, shard); the ranks of a context are shards too
    context: Context | None = None  # the ranks that share its samples' tokens

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def context_rank(self) -> int:
        return self.context.rank if self.context is not None else 0

    @property
    def stage_rank(self) -> int:
        """Return its place among the ranks that work with the same weights."""
        return self.data_rank * self.layout.context + self.context_rank

    @property
    def speaks(self) -> bool:
        """Tell one rank of all that work on the same samples, and so know the same of them."""
        return self.is_first_stage and not self.context_rank

    def gather_stages(self, value: T) -> list[T]:
        """Return the values of this rank's pipeline, by stage: the ranks of a stage know the same. Collective."""
        values: list[Any] = [value] * self.layout.pipeline
        if len(values) > 1:
            dist.all_gather_object(values, value, group=self.pipeline_group)
        return values


def crossing(layout: Layout, on_a_machine: int) -> str:
    """Return what to say of shards that lie on several machines, whose traffic then leaves these in every step."""
    width = layout.shard * layout.context
    if width <= on_a_machine or not on_a_machine:
        return ""
    return (
        f"parallel.shard: {layout.shard}{f' × context {layout.context}' * (layout.context > 1)} takes {width} ranks, a "
        f"machine has {on_a_machine}: weights cross machines in every step. Where memory allows, shard over "
        f"{on_a_machine} and let parallel.replicate be 0"
    )


def build(layout: Layout, runtime: Runtime) -> Mesh:
    """Join the groups; a collective call."""
    if runtime.is_main and (told := crossing(layout, launch().ranks_here)):
        logger.warning("%s", told)
    p, r, s = layout.pipeline, layout.replicate, layout.shard * layout.context
    mesh = init_device_mesh(runtime.device.type, (p, r, s), mesh_dim_names=("pipeline", "replicate", "shard"))
    for group in mesh.get_all_groups():
        set_timeout(runtime.timeout, group)  # a mesh makes its groups with torch's own
    ranks = torch.arange(p * r * s).view(p, r * s)
    pipeline_rank, stage_rank = divmod(runtime.rank, r * s)
    if p == 1:  # all ranks, which have a group already: another is one more communicator, with buffers of its own
        data_group = dist.group.WORLD
    else:
        data_group = [dist.new_group(row, timeout=runtime.timeout) for row in ranks.tolist()][pipeline_rank]
    assert isinstance(data_group, dist.ProcessGroup)  # this rank is in it
    return Mesh(
        layout=layout,
        device=runtime.device,
        pipeline_rank=pipeline_rank,
        data_rank=stage_rank // layout.context,
        pipeline_group=mesh["pipeline"].get_group(),
        data_group=data_group,
        shards=mesh["replicate", "shard"] if r > 1 else mesh["shard"],
        context=_context(layout, runtime, mesh) if layout.context > 1 else None,
    )


def _context(layout: Layout, runtime: Runtime, mesh: DeviceMesh) -> Context:
    """Join the group of the ranks that share the same samples, which are next to each other."""
    if layout.shard == 1:  # the mesh has it already
        group = mesh["shard"].get_group()
    else:
        rows = torch.arange(layout.ranks).view(-1, layout.context).tolist()
        group = [dist.new_group(row, timeout=runtime.timeout) for row in rows][runtime.rank // layout.context]
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return Context(group, runtime.rank % layout.context, layout.context)
