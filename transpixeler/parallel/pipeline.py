"""Share blocks out over pipeline stages, and run a training step's forward and backward, whatever the layout.

In: an `Example`. Out: gradients summed over every data rank, and each sample's error per time group. With one stage it
is a loop over microbatches; with more, a schedule of `torch.distributed.pipelining`. Nothing above knows which.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from transpixeler.config.sections import ParallelConfig, UserError
from transpixeler.flow.objective import Example
from transpixeler.models.backbone import Backbone
from transpixeler.models.costs import Costs, block_flops
from transpixeler.models.noising import RECTIFIED, Noising
from transpixeler.models.rgb_memory import RgbMemory
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import devices, shard
from transpixeler.parallel.keeping import Keeping
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.stage import Stage, Streamed
from transpixeler.parallel.swap import Swap
from transpixeler.parallel.torch_stage import pipeline_stage

SCHEDULES = {  # names of torch's classes: importing them takes 30 MB and a second, and a plan needs none
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved-1f1b": "ScheduleInterleaved1F1B",
    "interleaved-zero-bubble": "ScheduleInterleavedZeroBubble",
}
INTERLEAVED = ("interleaved-1f1b", "interleaved-zero-bubble")
NOMINAL_TOKENS = 16_384  # of a stream, where blocks are weighed against each other: 49 frames of 832×464 or so
KEPT_SCHEDULES = 2  # each holds receive buffers: microbatches × hidden in both directions


def stage_count(config: ParallelConfig) -> int:
    """Stages in the whole pipeline."""
    interleaved = config.pipeline > 1 and config.schedule in INTERLEAVED
    return config.pipeline * (config.stages_per_rank if interleaved else 1)


def bubble(config: ParallelConfig, microbatches: int) -> float:
    """(p − 1) / (m·v + p − 1): the share of a step that a rank waits, with v pieces of the model on each."""
    pieces = config.stages_per_rank if config.schedule in INTERLEAVED else 1
    return (config.pipeline - 1) / (microbatches * pieces + config.pipeline - 1)


def in_flight(config: ParallelConfig, pipeline: int, rank: int, count: int) -> float:
    """Return how many microbatches' activations a pipeline rank holds at a time, at most."""
    if pipeline == 1:
        return 1
    if config.schedule in INTERLEAVED:
        pieces = stage_count(replace(config, pipeline=pipeline)) // pipeline
        return min(count * pieces, 2 * (pipeline - rank - 1) + (pieces - 1) * pipeline + 1) / pieces
    if config.schedule == "gpipe" or count < pipeline:
        return count
    return min(count, pipeline - rank)


def split_blocks(config: ParallelConfig, costs: Costs) -> list[range]:
    """Share out contiguous blocks over the stages, as `parallel.split` says or so that the dearest is cheapest.

    The ends cost next to nothing (under 1 % of one block at video sizes). Where blocks cost the same, one that is left
    over goes to the later stages, which hold fewer microbatches in memory.
    """
    stages, count = stage_count(config), len(costs.blocks)
    if config.split:
        if len(config.split) != stages or sum(config.split) != count or min(config.split) < 0:
            raise UserError(
                f"parallel.split: {list(config.split)} must be {stages} numbers whose sum is {count} blocks"
            )
        sizes = list(config.split)
    else:
        if stages > count:
            raise UserError(f"parallel.pipeline: {stages} stages for a model of {count} blocks; use fewer stages")
        flops = block_flops(costs, [NOMINAL_TOKENS] * costs.streams)
        sizes = balanced_sizes([round(1000 * each / min(flops)) for each in flops], stages)
    ends = [sum(sizes[: i + 1]) for i in range(stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def balanced_sizes(weights: Sequence[int], stages: int) -> list[int]:
    """Cut weights into runs whose heaviest is lightest, then the most even ones, then those with longer runs later."""
    ends = [0, *accumulate(weights)]
    best: list[tuple[int, int, list[int]]] = [(0, 0, [])] + [(ends[-1] + 1, 0, [])] * len(weights)  # by blocks so far
    for stage in range(stages):
        found = []
        for end in range(len(weights) + 1):
            runs = [(ends[end] - ends[start], best[start], end - start) for start in range(stage, end)]
            options = [(max(most, run), squares + run**2, [*sizes, n]) for run, (most, squares, sizes), n in runs]
            found.append(min(options, key=lambda option: option[:2], default=(ends[-1] + 1, 0, [])))
        best = found
    return best[-1][2]


def local_stages(config: ParallelConfig, mesh: Mesh) -> range:
    """Return the indices of the stages on this rank."""
    return range(mesh.pipeline_rank, stage_count(config), config.pipeline)


class _Key(NamedTuple):
    """Properties that a schedule is made for."""

    layout: StreamLayout
    size: int  # of a microbatch
    microbatches: int
    training: bool


class Engine:
    """Stages of this rank, and how they work together with everyone else's."""

    def __init__(
        self,
        stages: Sequence[Stage],
        config: ParallelConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        costs: Costs,
        swap: Swap | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.stages = list(stages)
        self.config = config
        self.mesh = mesh
        self.dtype = dtype
        self.costs = costs  # of the whole model
        self.keeping = keeping  # where some blocks recompute nothing
        self.swap = swap  # where some blocks' weights wait in host memory
        self.sharded = shard.is_sharded(config, mesh)
        counts = [(p.numel(), p.requires_grad) for _, p in self.named_parameters()]
        trained = sum(n for n, trains in counts if trains)
        self.reduces_often = shard.reduces_often(trained, sum(n for n, _ in counts))
        self._schedules: OrderedDict[_Key, Any] = OrderedDict()
        trains = any(stage.model.trains_conditions for stage in self.stages)
        self.inputs_need_grad = self._any(trains, self.mesh.pipeline_group)
        if mesh.device.type == "cuda" and config.pipeline > 1:
            dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.pipeline_group)  # warms the communicator

    @property
    def by_expert(self) -> dict[str, Engine]:
        """Return the engine of each expert: of a model of one, itself, without a name."""
        return {"": self}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what this rank holds, under names that no layout changes."""
        for stage in self.stages:
            yield from stage.model.named_parameters()

    def models(self) -> list[Backbone]:
        return [stage.model for stage in self.stages]

    def forward_backward(self, example: Example, micro_batch: int, *, last: bool = True) -> Tensor:
        """Add to every gradient and return [b, G] mean errors, the same on all ranks. last: the step's last example."""
        count, rest = divmod(len(example.latents), micro_batch)
        assert not rest, (len(example.latents), micro_batch)
        self._lay_out(example.layout, example.noising)
        if self.keeping is not None:
            self.keeping.microbatches = in_flight(self.config, self.config.pipeline, self.mesh.pipeline_rank, count)
        run = self._loop if self.config.pipeline == 1 else self._pipeline
        errors = run(example, count, last)
        if not self.sharded and last:
            shard.reduce_gradients((p for _, p in self.named_parameters()), self.mesh.data_group)
        return errors

    @torch.no_grad()
    def forward(
        self, x: Tensor, inputs: Sequence[Tensor], layout: StreamLayout, micro_batch: int | None = None
    ) -> Tensor:
        """Return what is predicted, [b, N], on every rank of the pipeline; `inputs`: timesteps and fields."""
        rows, size = len(x), micro_batch or len(x)
        self._lay_out(layout)
        if self.config.pipeline == 1:
            chunks = zip(x.split(size), *(c.split(size) for c in inputs), strict=True)
            return torch.cat([self.stages[0](*chunk) for chunk in chunks])
        unit = size * self.config.pipeline  # a schedule keeps what all its microbatches gave out
        full = unit if self.config.schedule in INTERLEAVED else size
        x, *others = (_extended(t, -rows % full) for t in (x, *inputs))
        parts = zip(x.split(unit), *(other.split(unit) for other in others), strict=True)
        return torch.cat([self._piped(part, rest, layout, size) for part, *rest in parts])[:rows]

    def _piped(self, x: Tensor, inputs: Sequence[Tensor], layout: StreamLayout, size: int) -> Tensor:
        schedule = self._schedule(layout, inputs, size, len(x) // size, training=False)
        out = schedule.step(*((x, *inputs) if self.mesh.is_first_stage else ()))
        return self._from_last(out, (len(x), layout.elements))

    def _lay_out(self, layout: StreamLayout, noising: Noising = RECTIFIED) -> None:
        for stage in self.stages:
            stage.layout, stage.noising = layout, noising
            if stage.model.rgb_memory is not None:
                stage.model.rgb_memory.rewind()

    @contextmanager
    def remembering_rgb(self, layout: StreamLayout, *, rows: int, where: str) -> Iterator[None]:
        """Compute RGB once in all forward passes inside, in which it and its times and fields are to be the same.

        rows: of a pass. where: as `sample.rgb_memory`.
        """
        models = [model for model in self.models() if model.rgb_forward_only]
        numbers = sum(2 * rows * model.lengths(layout)[0] * model.width * len(model.blocks) for model in models)
        place = devices.place(where, numbers * self.dtype.itemsize, self.mesh.device)
        if self.mesh.context is not None and self._any(place == "off", self.mesh.context.group):
            place = "off"  # what one computes is exchanged with all
        if place == "off" or not models:
            yield
            return
        for model in models:
            model.rgb_memory = RgbMemory(on_host=place == "host")
        try:
            yield
        finally:
            for model in models:
                model.rgb_memory = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn dropout off inside, and at the end let go of gathered weights and of schedules.

        Else a change of the weights' shards, such as the mean's in place of the parameters, would not be seen; and
        schedules keep what they gave out.
        """
        before = [stage.training for stage in self.stages]
        for stage in self.stages:
            stage.eval()
        try:
            yield
        finally:
            self._schedules = OrderedDict((key, made) for key, made in self._schedules.items() if key.training)
            for stage, training in zip(self.stages, before, strict=True):
                stage.train(training)
                for module in stage.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    # -- one stage

    def _loop(self, example: Example, count: int, last: bool) -> Tensor:
        stage, size = self.stages[0], len(example.latents) // count
        errors = []
        for i in range(count):
            if isinstance(stage, FSDPModule):
                reduces = (last and i == count - 1) or self.reduces_often
                stage.set_requires_gradient_sync(reduces)
                stage.set_is_last_backward(reduces)
            part = example.rows(slice(i * size, (i + 1) * size))
            error = stage(part.noisy(), *part.inputs, truth=part.target())
            (error * part.weights).sum().backward()
            errors.append(error.detach())
        return torch.cat(errors)

    # -- several stages

    def _pipeline(self, example: Example, count: int, last: bool) -> Tensor:
        layout, size = example.layout, len(example.latents) // count
        schedule = self._schedule(layout, example.inputs, size, count, training=True)
        inputs = (example.noisy(), *example.inputs) if self.mesh.is_first_stage else ()
        extra = {}
        if self.mesh.is_last_stage:
            extra = {"target": example.weights, "losses": [], "truth": example.target()}
        errors = schedule.step(*inputs, **extra)
        errors = None if errors is None else errors.detach()
        return self._from_last(errors, (len(example.latents), len(layout.groups)))

    def _schedule(
        self, layout: StreamLayout, inputs: Sequence[Tensor], size: int, count: int, *, training: bool
    ) -> Any:
        """Make a schedule, or find it: receive buffers have one shape, so each bucket has one over the same modules."""
        key = _Key(layout, size, count, training)
        if key not in self._schedules:
            self._schedules[key] = self._new_schedule(layout, inputs, size, count, training)
            if len(self._schedules) > KEPT_SCHEDULES:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return self._schedules[key]

    def _new_schedule(
        self, layout: StreamLayout, inputs: Sequence[Tensor], size: int, count: int, training: bool
    ) -> Any:
        from torch.distributed.pipelining import schedules

        total, name = stage_count(self.config), self._schedule_name(count, training)
        indices = local_stages(self.config, self.mesh)
        stages = [
            pipeline_stage(
                Streamed(stage) if self.config.offload else stage,
                index,
                total,
                self.mesh.device,
                input_args=self._meta(stage, layout, inputs, size, entering=index == 0),
                output_args=self._meta(stage, layout, inputs, size, leaving=index == total - 1, training=training),
                group=self.mesh.pipeline_group,
            )
            for index, stage in zip(indices, self.stages, strict=True)
        ]
        options = {"loss_fn": _weighted_sum, "scale_grads": False} if training else {}
        return getattr(schedules, SCHEDULES[name])(stages if name in INTERLEAVED else stages[0], count, **options)

    def _schedule_name(self, count: int, training: bool) -> str:
        name = self.config.schedule
        if name == "auto":
            return "1f1b" if training and count >= self.config.pipeline else "gpipe"
        if name == "gpipe" or (name == "1f1b" and not training):
            return "gpipe"
        if training:
            check_microbatches(self.config, count)
        return name

    def _meta(
        self,
        stage: Stage,
        layout: StreamLayout,
        inputs: Sequence[Tensor],
        size: int,
        *,
        entering: bool = False,
        leaving: bool = False,
        training: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return meta tensors of what enters or leaves a stage, with their need of gradients."""
        if entering:
            shapes = [torch.empty(size, layout.elements, device="meta")]
            return (*shapes, *(torch.empty(size, *c.shape[1:], dtype=c.dtype, device="meta") for c in inputs))
        if leaving:
            return (torch.empty(size, len(layout.groups) if training else layout.elements, device="meta"),)
        model = stage.model
        flow = model.meta(layout, size, self.dtype)
        for place, tensor in enumerate(flow):
            conditions = place >= model.changed and self.inputs_need_grad and tensor.is_floating_point()
            tensor.requires_grad_(place < model.differentiated or conditions)
        return flow

    def _from_last(self, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Send the last stage's result to all ranks of the pipeline, which hold the same samples."""
        if value is None:
            value = torch.empty(shape, device=self.mesh.device)
        group = self.mesh.pipeline_group
        source = dist.get_global_rank(group, self.config.pipeline - 1)
        value = value.float().contiguous()
        dist.broadcast(value, src=source, group=group)
        return value

    def _any(self, value: bool, group: dist.ProcessGroup) -> bool:
        flag = torch.tensor(float(value), device=self.mesh.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return bool(flag)


def _weighted_sum(errors: Tensor, weights: Tensor) -> Tensor:
    return (errors * weights).sum()


def _extended(tensor: Tensor, rows: int) -> Tensor:
    """Repeat the last row, where microbatches must be full."""
    return torch.cat([tensor, tensor[-1:].expand(rows, *tensor.shape[1:])]) if rows else tensor.contiguous()


def check_microbatches(config: ParallelConfig, count: int, of: str = "") -> None:
    """Refuse a step of so many microbatches a rank that the schedule cannot run."""
    name, ranks = config.schedule, config.pipeline
    if ranks == 1 or name in ("auto", "gpipe"):
        return
    if count < ranks or (name in INTERLEAVED and count % ranks):
        needs = f"{name} over {ranks} pipeline ranks needs a multiple of that many microbatches"
        ways = "raise train.global_batch, lower train.micro_batch, or set parallel.schedule=gpipe"
        raise UserError(f"parallel.schedule: {needs}, and a rank has {count} a step{of}; {ways}")
