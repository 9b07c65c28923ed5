"""Predict the memory and time of a run, for any layout, from a model on meta, a config and a data set's buckets.

`models.costs` has the formulas for one sample, and `models.kept` measures what a block keeps; here they are applied to
stages, shards and microbatches. Out: bytes of each kind on the fullest rank, FLOPs and seconds of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from transpixeler.config.sections import Config, OptimConfig, ParallelConfig
from transpixeler.data.buckets import Bucket, micro_batch_for
from transpixeler.models import costs
from transpixeler.models.backbone import Backbone
from transpixeler.models.costs import Costs
from transpixeler.models.kept import fitting
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.experts import DEVICE_SHARE
from transpixeler.parallel.hosted import taken
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.pipeline import in_flight, split_blocks, stage_count
from transpixeler.parallel.shard import by_fsdp, chunk_tokens, compiles_shared, reduces_often, waiting_places
from transpixeler.parallel.swap import SLOTS

UTILISATION = 0.45  # share of a device's peak that steps are assumed to reach, counting recomputation as work
GPU_LINK = 50e9  # bytes a second between GPUs
HOST_LINK = 20e9  # bytes a second between a GPU and its host
UNHIDDEN_GATHER = 0.1  # share of all-gather time that compute does not overlap
FP32_BYTES = 4
# Bytes of optimizer state for a trained number of n bytes. torchao's optimizers keep a scale for each block of numbers.
STATE_BYTES = {
    "adamw": lambda n, config: 2 * n,
    "sgd": lambda n, config: n if config.momentum else 0,
    "muon": lambda n, config: n,
    "adafactor": lambda n, config: 0,
    "adamw8bit": lambda n, config: 2 * (1 + 4 / 256),
    "adamw4bit": lambda n, config: 2 * (0.5 + 4 / 128),
    "adamw_fp8": lambda n, config: 2 * (1 + 4 / 256),
}


class Memory(NamedTuple):
    """Bytes that one rank holds."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Load:
    """A bucket, as the model sees it."""

    bucket: Bucket
    layout: StreamLayout
    steps: float  # in an epoch
    batch: int  # samples of a step, on all ranks


@dataclass(frozen=True)
class Machine:
    """The GPUs that a plan is for."""

    gpus: int
    memory: float  # bytes of one GPU
    flops: float  # a second at its peak
    kind: str = "cuda"
    host: float = 0.0  # bytes of host memory for each GPU; 0 where it is not known


class KeptWhole(NamedTuple):
    """Blocks of a rank that recompute nothing, and the bytes that this takes more."""

    blocks: int
    bytes: int


class Part(NamedTuple):
    """The size of a part of a model."""

    weights: int = 0  # bytes
    numbers: int = 0
    trainable: int = 0  # numbers
    trainable_bytes: int = 0

    @property
    def frozen_bytes(self) -> int:
        return self.weights - self.trainable_bytes

    def __add__(self, other: Part) -> Part:  # type: ignore[override]
        return Part(*(a + b for a, b in zip(self, other)))


def parts_of(model: Backbone) -> dict[str, Part]:
    """Measure `embed`, `head` and each block, under its number."""
    parts: dict[str, Part] = {}
    for name, p in model.named_parameters():
        kind, index, *_ = name.split(".")
        key = index if kind == "blocks" else kind
        trainable = p.numel() if p.requires_grad else 0
        part = Part(p.numel() * p.element_size(), p.numel(), trainable, trainable * p.element_size())
        parts[key] = parts.get(key, Part()) + part
    return parts


@dataclass(frozen=True)
class Estimate:
    """Estimates the memory and time that a config's model takes on some ranks."""

    config: Config
    parts: dict[str, Part]
    costs: Costs
    size: int  # bytes of a number in matmuls
    compiled: bool
    experts: int = 1  # models of these parts
    device_memory: float = 0.0  # bytes, which decide where an idle expert waits

    @classmethod
    def of(
        cls,
        model: Backbone,
        config: Config,
        *,
        dtype: torch.dtype,
        compiled: bool,
        experts: int = 1,
        device_memory: float = 0.0,
    ) -> Estimate:
        return cls(config, parts_of(model), Costs.of(model), dtype.itemsize, compiled, experts, device_memory)

    def micro_batch(self, load: Load, layout: Layout) -> int:
        return micro_batch_for(
            load.bucket,
            per_rank_batch=load.batch // layout.data,
            train=self.config.train,
            rules=self.config.data.buckets,
            tokens=load.layout.tokens,
        )

    # -- memory

    def memory(self, loads: Sequence[Load], layout: Layout, recompute: costs.Recompute) -> Memory:
        """Return what the fullest rank holds in the largest bucket."""
        ranges = self._ranges(layout)
        found = []
        for rank in range(layout.pipeline):
            own = ranges[rank :: layout.pipeline]
            stages = [self._stage(own_range, ranges) for own_range in own]
            blocks = sum(len(r) for r in own)
            kept = max(
                self._activations(load, layout, rank, blocks, recompute)
                + self.kept_whole(load, layout, rank, recompute).bytes
                for load in loads
            )
            found.append(self._state(stages, self._waiting(own), layout, kept))
        return max(found, key=lambda memory: memory.total)

    def _ranges(self, layout: Layout) -> list[range]:
        """Return the blocks of each stage; `parallel.split` counts only for the pipeline that the config names."""
        parallel = self.config.parallel
        split = parallel.split if layout.pipeline == parallel.pipeline else ()
        return split_blocks(replace(parallel, pipeline=layout.pipeline, split=split), self.costs)

    def _stage(self, blocks: range, ranges: Sequence[range]) -> Part:
        part = sum((self._blocks()[index] for index in blocks), Part())
        part += self.parts["embed"] if blocks is ranges[0] else Part()
        return part + (self.parts["head"] if blocks is ranges[-1] else Part())

    def _waiting(self, own: Sequence[range]) -> list[Part]:
        """Return those of a rank's blocks whose weights wait in host memory."""
        away = set(waiting_places(self.config.parallel, len(self._blocks())))
        return [self._blocks()[place] for blocks in own for place in blocks if place in away]

    def _state(self, stages: Sequence[Part], waiting: Sequence[Part], layout: Layout, activations: int) -> Memory:
        """Return what a rank holds of its stages: its shard, and what it gathers while it works."""
        whole, away = sum(stages, Part()), sum(waiting, Part())
        optim, offload = self.config.optim, self.config.parallel.offload
        if offload is True:  # weights, optimizer state and averages are kept in host memory
            return Memory(self._gathered(), self._unreduced(whole, layout), 0, 0, activations)
        if layout.shard > 1:  # what is trained of a waiting block is there as well
            here = Part(*(all_ - gone for all_, gone in zip(whole, away)))
        else:
            here = whole
        shard = Part(*(math.ceil(n / self._shards(layout)) for n in here))
        state = self.experts * optimizer_bytes(optim, shard)
        ema = self.experts * FP32_BYTES * shard.trainable if optim.ema else 0
        if layout.shard == 1:
            weights = whole.weights - away.frozen_bytes
            brought = sum(sorted((part.frozen_bytes for part in waiting), reverse=True)[:SLOTS])
            idle = weights if self.idle_on_device(layout) else whole.trainable_bytes
            return Memory(weights + brought + (self.experts - 1) * idle, whole.trainable_bytes, state, ema, activations)
        gathered = whole.weights if layout.pipeline > 1 and not offload else self._gathered()
        gradients = shard.trainable_bytes + self._unreduced(whole, layout)
        return Memory(self.experts * shard.weights + gathered, gradients, state, ema, activations)

    def _shards(self, layout: Layout) -> int:
        """Return how many ranks the weights are sharded over; those that share samples are among them."""
        return layout.shard * layout.context if by_fsdp(self.config.parallel, layout.shard) else 1

    def idle_on_device(self, layout: Layout) -> bool:
        """Tell whether the weights of idle experts stay on the device, as `parallel.experts` decides it."""
        parallel = self.config.parallel
        if layout.shard > 1 or parallel.offload is True or parallel.idle_expert != "auto":
            return parallel.offload is not True and (layout.shard > 1 or parallel.idle_expert == "device")
        frozen = self.experts * (self._whole().frozen_bytes - self.waiting_bytes()) / layout.pipeline
        return frozen <= DEVICE_SHARE * self.device_memory

    def _whole(self) -> Part:
        return sum(self.parts.values(), Part())

    def waiting_bytes(self) -> int:
        """Return bytes of the frozen weights that wait in host memory, of a whole model."""
        return sum(part.frozen_bytes for part in self._waiting([range(len(self._blocks()))]))

    def _unreduced(self, whole: Part, layout: Layout) -> int:
        """Return bytes of gradients that are not sharded yet: all until the last microbatch, or one block's."""
        if layout.pipeline > 1:
            waits = not self.config.parallel.offload
        else:
            waits = not reduces_often(whole.trainable, whole.numbers)
        return whole.trainable_bytes if waits else self._largest().trainable_bytes

    def _gathered(self) -> int:
        """Return bytes of gathered weights: the block at work, the next one, and embed and head, which stay."""
        return 2 * self._largest().weights + self.parts["embed"].weights + self.parts["head"].weights

    def _largest(self) -> Part:
        return max(self._blocks())

    def _blocks(self) -> list[Part]:
        return [part for name, part in self.parts.items() if name not in ("embed", "head")]

    def _activations(self, load: Load, layout: Layout, rank: int, blocks: int, recompute: costs.Recompute) -> int:
        micro = self.micro_batch(load, layout)
        share = load.batch // layout.data
        lengths = part(load.layout.lengths, layout)
        mode = "full" if isinstance(recompute, int) else recompute
        chunk = chunk_tokens(self.config.parallel, compiled=self._is_compiled(recompute, layout)) / micro
        once, twice = (self._of_blocks(count, lengths, mode, layout, chunk) for count in (1, 2))
        work = max(0, 2 * once - twice)
        if layout.context > 1:  # embed makes all tokens, in fp32 and in the matmuls' dtype
            work = max(work, load.layout.tokens * self.costs.width * (FP32_BYTES + self.size))
        kept = max(0, self._of_blocks(blocks, lengths, recompute, layout, chunk) - work)
        held = in_flight(self.config.parallel, layout.pipeline, rank, share // micro)
        ending = min(sum(lengths[self.costs.rgb_forward_only :]), chunk or math.inf)
        head = 3 * FP32_BYTES * ending * self.costs.width  # its input, normed and modulated
        outer = 3 * FP32_BYTES * load.layout.elements  # the noisy input, the target and their difference
        hidden = sum(lengths) * self.costs.width * self.size
        received = share * receive_buffers(self.config.parallel, layout.pipeline, rank) * hidden
        stay = micro * held * blocks * hidden * self._share_that_stays(load, layout) if recompute == "offload" else 0
        each = max(work, head) + held * kept + outer
        return int(micro * each + received + share * self._example(load.layout) + stay)

    def _share_that_stays(self, load: Load, layout: Layout) -> float:
        """Return the share of blocks' inputs that `parallel.host_gb` has no room for."""
        budget = self.config.parallel.host_gb * 2**30
        each, count = self._hosted(load, layout)
        return max(0.0, 1 - budget // each / count) if budget else 0.0

    def hosted(self, loads: Sequence[Load], layout: Layout) -> float:
        """Return bytes of host memory that blocks' inputs take on a rank, in the largest bucket."""
        return max(each * count for each, count in (self._hosted(load, layout) for load in loads))

    def _hosted(self, load: Load, layout: Layout) -> tuple[int, float]:
        """Return bytes of host memory that the inputs of one block take, and the most that wait at a time."""
        micro = self.micro_batch(load, layout)
        blocks = max(sum(map(len, self._ranges(layout)[rank :: layout.pipeline])) for rank in range(layout.pipeline))
        held = in_flight(self.config.parallel, layout.pipeline, 0, load.batch // layout.data // micro)
        token = micro * self.costs.width * self.size
        text = self.costs.part(layout.context).text * ("joint" in self.costs.blocks[0].attends)  # which flows, too
        return taken(sum(part(load.layout.lengths, layout)) * token) + taken(text * token), held * blocks

    def kept_whole(self, load: Load, layout: Layout, rank: int, recompute: costs.Recompute) -> KeptWhole:
        """Return the blocks of a pipeline rank that recompute nothing, and what that takes more than without."""
        budget = self.config.parallel.keep_gb * 2**30
        if not budget or recompute == "none" or isinstance(recompute, int):
            return KeptWhole(0, 0)
        micro, lengths = self.micro_batch(load, layout), part(load.layout.lengths, layout)
        count = load.batch // layout.data // micro
        at_once = micro * in_flight(self.config.parallel, layout.pipeline, rank, count)
        places = [place for own in self._ranges(layout)[rank :: layout.pipeline] for place in own]
        compiled, own = self._is_compiled(recompute, layout), self.costs.part(layout.context)
        kept = [own.kept[place].as_run(compiled=compiled) for place in places]
        blocks = fitting(kept, lengths, budget / at_once)
        held = at_once * sum(each.bytes(lengths) for each in kept[len(kept) - blocks :])
        one = micro * max(each.bytes(lengths) for each in kept)  # that is computed anew, after those are done with
        return KeptWhole(blocks, int(max(0, held - one)))

    def _of_blocks(
        self, blocks: int, lengths: Sequence[int], recompute: costs.Recompute, layout: Layout, chunk: float
    ) -> int:
        return costs.activation_bytes(
            self.costs.part(layout.context),
            lengths,
            size=self.size,
            recompute=recompute,
            compiled=self._is_compiled(recompute, layout),
            blocks=blocks,
            chunk=chunk,
        )

    def _is_compiled(self, recompute: costs.Recompute, layout: Layout) -> bool:
        shared = layout.context == 1 or compiles_shared()
        return self.compiled and shared and (recompute != "offload" or self.config.parallel.compile == "on")

    def _example(self, layout: StreamLayout) -> int:
        """Return bytes of one sample's latents, noise and fields."""
        cells = sum(math.prod(shape[1:]) for shape in layout.shapes)
        return FP32_BYTES * (2 * layout.elements + self.costs.field_numbers + cells * self.costs.cell_numbers)

    # -- time

    def flops(self, loads: Sequence[Load], layout: Layout, recompute: costs.Recompute = "none") -> float:
        """Return FLOPs of a mean step, on all ranks."""
        steps = sum(load.steps for load in loads)
        return sum(load.steps * load.batch * self.sample_flops(load, layout, recompute) for load in loads) / steps

    def sample_flops(self, load: Load, layout: Layout, recompute: costs.Recompute) -> float:
        """Return FLOPs of one sample's step; blocks that `parallel.keep_gb` lets keep everything recompute nothing."""
        full, lengths = not self.config.lora.enabled, load.layout.lengths
        all_of_it = costs.step_flops(self.costs, lengths, recompute=recompute, full=full)
        kept = sum(self.kept_whole(load, layout, rank, recompute).blocks for rank in range(layout.pipeline))
        least = costs.step_flops(self.costs, lengths, full=full) if kept else 0.0
        return all_of_it - kept / len(self.costs.blocks) * (all_of_it - least)

    def seconds(self, loads: Sequence[Load], layout: Layout, recompute: costs.Recompute, machine: Machine) -> float:
        """Return seconds of a mean step; 0 where the machine's peak is not known.

        Compute, lengthened by the pipeline's bubbles, overlaps all-gathers: the longer of the two counts.
        """
        if not machine.flops:
            return 0.0
        passes = max(load.batch // layout.data // self.micro_batch(load, layout) for load in loads)
        ranges = self._ranges(layout)
        uneven = max(map(len, ranges)) * len(ranges) / len(self.costs.blocks)
        waiting = (passes + layout.pipeline - 1) / passes
        work = self.flops(loads, layout, recompute) / (machine.gpus * machine.flops * UTILISATION)
        work = (work + self.exchanged_bytes(loads, layout, recompute) / GPU_LINK) * uneven * waiting
        if recompute == "offload":
            work += self._offloaded_inputs(loads, layout) / layout.stage / HOST_LINK
        whole = self._whole()
        gathered = 0.0
        if self.config.parallel.offload:
            moved = whole.weights if self.config.parallel.offload is True else self.waiting_bytes()
            gathered = 2 * passes * moved / layout.pipeline / HOST_LINK
        elif layout.shard > 1:
            times = 1 if layout.pipeline > 1 else 2 * passes
            gathered = times * whole.weights / layout.pipeline * (1 - 1 / self._shards(layout)) / GPU_LINK
        reduced = 2 * whole.trainable_bytes / layout.pipeline / GPU_LINK if layout.stage > 1 else 0.0
        return max(work, gathered) + UNHIDDEN_GATHER * gathered + reduced

    def exchanged_bytes(self, loads: Sequence[Load], layout: Layout, recompute: costs.Recompute) -> float:
        """Return bytes that a rank sends to those that it shares samples with, in a mean step."""
        steps = sum(load.steps for load in loads)
        each = (
            load.steps
            * (load.batch // layout.data)
            * costs.exchanged(self.costs, load.layout.lengths, layout.context, recompute=recompute)
            for load in loads
        )
        return sum(each) / steps / layout.pipeline * self.size * (1 - 1 / layout.context)

    def _offloaded_inputs(self, loads: Sequence[Load], layout: Layout) -> float:
        """Return bytes of block inputs that a mean step moves to host memory and back."""
        steps = sum(load.steps for load in loads)
        moved = [load.steps * load.batch * (1 - self._share_that_stays(load, layout)) for load in loads]
        tokens = sum(share * load.layout.tokens for share, load in zip(moved, loads, strict=True)) / steps
        d = self.costs
        return 2 * tokens * d.width * len(d.blocks) * self.size


def part(lengths: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Return the tokens of each stream on the rank that holds the most."""
    return tuple(math.ceil(length / layout.context) for length in lengths)


def optimizer_bytes(config: OptimConfig, part: Part) -> int:
    """Return bytes of optimizer state; an unknown optimizer is taken to keep two moments."""
    per = part.trainable_bytes // part.trainable if part.trainable else 0
    return int(part.trainable * STATE_BYTES.get(config.name.lower(), STATE_BYTES["adamw"])(per, config))


def receive_buffers(config: ParallelConfig, pipeline: int, rank: int) -> int:
    """Return how many hidden states a rank has buffers for in each microbatch: one a side of each of its stages."""
    if pipeline == 1:
        return 0
    pieces = stage_count(replace(config, pipeline=pipeline)) // pipeline
    return 2 * pieces - (rank == 0) - (rank == pipeline - 1)
