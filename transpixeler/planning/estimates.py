"""What a rank holds and how long a step takes, for any layout, known before anything is loaded.

In: the whole model on meta, the config and what a step is made of. Out: bytes by part, seconds, and the layouts that
fit a machine, the fastest first. For one sample `models.costs` has the formulas; here they meet stages, shards and
microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from transpixeler.config import Config, OptimConfig, ParallelConfig
from transpixeler.data.buckets import Bucket, micro_batch_for
from transpixeler.models import costs
from transpixeler.models.backbone import VideoModel
from transpixeler.models.dimensions import Dimensions
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.pipeline import INTERLEAVED, split_blocks, stage_count
from transpixeler.parallel.shard import reduces_often, splits_backward

MODES = ("none", "attention", "full", "offload")  # of `parallel.recompute`, the fastest first
UTILISATION = 0.45  # of a device's peak that steps are taken to reach, recomputing counted as work
LINK = 50e9  # bytes a second between GPUs, and between a GPU and its host
HOST_LINK = 20e9
SHOWING = 0.1  # of gathering, even where work hides it
USABLE = 0.92  # of a device's memory: the rest is the context's and lost between allocations
FP32 = 4
# bytes of state for each trained number of n bytes; those of torchao hold a scale for each block of numbers beside them
STATE = {
    "adamw": lambda n, config: 2 * n,
    "sgd": lambda n, config: n if config.momentum else 0,
    "muon": lambda n, config: n,
    "adafactor": lambda n, config: 0,
    "adamw8bit": lambda n, config: 2 * (1 + 4 / 256),
    "adamw4bit": lambda n, config: 2 * (0.5 + 4 / 128),
    "adamw_fp8": lambda n, config: 2 * (1 + 4 / 256),
}


class Memory(NamedTuple):
    """Bytes of one rank."""

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
    """One bucket, as the model sees it."""

    bucket: Bucket
    layout: StreamLayout
    steps: float  # an epoch


@dataclass(frozen=True)
class Machine:
    gpus: int
    memory: float  # bytes of one GPU
    flops: float  # a second at its peak
    kind: str = "cuda"


@dataclass(frozen=True)
class Fit:
    """One way to run, with what to set for it."""

    settings: tuple[str, ...]
    memory: Memory
    seconds: float
    why: str


class Part(NamedTuple):
    """Bytes of a model's part, its numbers, and how many of them are trained in how many bytes."""

    weights: int = 0
    numbers: int = 0
    trained: int = 0
    trained_bytes: int = 0

    def __add__(self, other: Part) -> Part:  # type: ignore[override]
        return Part(*(a + b for a, b in zip(self, other)))


def parts_of(model: VideoModel) -> dict[str, Part]:
    """`embed`, `head` and each block by its number."""
    parts: dict[str, Part] = {}
    for name, p in model.named_parameters():
        kind, index, *_ = name.split(".")
        key = index if kind == "blocks" else kind
        trained = p.numel() if p.requires_grad else 0
        part = Part(p.numel() * p.element_size(), p.numel(), trained, trained * p.element_size())
        parts[key] = parts.get(key, Part()) + part
    return parts


@dataclass(frozen=True)
class Estimate:
    """A config's model on some ranks; asked for memory and time."""

    config: Config
    parts: dict[str, Part]
    dimensions: Dimensions
    size: int  # bytes of a number in matmuls
    compiled: bool

    @classmethod
    def of(cls, model: VideoModel, config: Config, *, dtype: torch.dtype, compiled: bool) -> Estimate:
        return cls(config, parts_of(model), model.dimensions(), dtype.itemsize, compiled)

    def micro_batch(self, load: Load, layout: Layout) -> int:
        return micro_batch_for(
            load.bucket,
            per_rank_batch=self.config.train.global_batch // layout.data,
            train=self.config.train,
            rules=self.config.data.buckets,
            tokens=load.layout.tokens,
        )

    # -- memory

    def memory(self, loads: Sequence[Load], layout: Layout, recompute: costs.Recompute) -> Memory:
        """Of the rank that holds the most, in the bucket that takes the most."""
        ranges = self._ranges(layout)
        found = []
        for rank in range(layout.pipeline):
            own = ranges[rank :: layout.pipeline]
            stages = [self._stage(own_range, ranges) for own_range in own]
            blocks = sum(len(r) for r in own)
            kept = max(self._activations(load, layout, rank, blocks, recompute) for load in loads)
            found.append(self._state(stages, layout, kept))
        return max(found, key=lambda memory: memory.total)

    def _ranges(self, layout: Layout) -> list[range]:
        """Blocks of each stage; a split by hand is for the pipeline that the config names."""
        parallel = self.config.parallel
        split = parallel.split if layout.pipeline == parallel.pipeline else ()
        return split_blocks(replace(parallel, pipeline=layout.pipeline, split=split), self.dimensions.blocks)

    def _stage(self, blocks: range, ranges: Sequence[range]) -> Part:
        part = sum((self.parts[str(index)] for index in blocks), Part())
        part += self.parts["embed"] if blocks is ranges[0] else Part()
        return part + (self.parts["head"] if blocks is ranges[-1] else Part())

    def _state(self, stages: Sequence[Part], layout: Layout, activations: int) -> Memory:
        """What is sharded, and what a shard gathers while it works."""
        whole = sum(stages, Part())
        optim, offload = self.config.optim, self.config.parallel.offload
        trained = Part(*(math.ceil(n / layout.shard) for n in whole))
        state = optimizer_bytes(optim, trained)
        ema = FP32 * trained.trained if optim.ema else 0
        if offload:  # weights and optimizer wait in host memory, the means beside them
            return Memory(self._gathered(), self._unreduced(whole, layout), 0, 0, activations)
        if layout.shard == 1:
            return Memory(whole.weights, whole.trained_bytes, state, ema, activations)
        gathered = whole.weights if layout.pipeline > 1 else self._gathered()
        gradients = trained.trained_bytes + self._unreduced(whole, layout)
        return Memory(trained.weights + gathered, gradients, state, ema, activations)

    def _unreduced(self, whole: Part, layout: Layout) -> int:
        """Gradients that are not cut into shards yet: all until the last microbatch, or a block's."""
        if layout.pipeline > 1:
            waits = not self.config.parallel.offload
        else:
            waits = not reduces_often(whole.trained, whole.numbers)
        return whole.trained_bytes if waits else self._largest().trained_bytes

    def _gathered(self) -> int:
        """Two blocks, the one at work and the next, and the ends, which stay."""
        return 2 * self._largest().weights + self.parts["embed"].weights + self.parts["head"].weights

    def _largest(self) -> Part:
        return max(part for name, part in self.parts.items() if name.isdigit())

    def _activations(self, load: Load, layout: Layout, rank: int, blocks: int, recompute: costs.Recompute) -> int:
        micro = self.micro_batch(load, layout)
        share = self.config.train.global_batch // layout.data
        lengths = load.layout.lengths
        once = self._of_blocks(1, lengths, "full" if isinstance(recompute, int) else recompute)
        twice = self._of_blocks(2, lengths, "full" if isinstance(recompute, int) else recompute)
        work = max(0, 2 * once - twice)
        kept = max(0, self._of_blocks(blocks, lengths, recompute) - work)
        held = in_flight(self.config.parallel, layout.pipeline, rank, share // micro)
        head = 3 * FP32 * load.layout.tokens * self.dimensions.width  # taken in, normed, modulated: before any block
        outer = 3 * FP32 * load.layout.elements  # the noisy input, the target and how far off it is
        hidden = load.layout.tokens * self.dimensions.width * self.size
        received = share * receive_buffers(self.config.parallel, layout.pipeline, rank) * hidden
        return int(micro * (max(work, head) + held * kept + outer) + received + share * self._example(load.layout))

    def _of_blocks(self, blocks: int, lengths: Sequence[int], recompute: costs.Recompute) -> int:
        d = self.dimensions
        cut = replace(d, blocks=blocks, adapters=d.adapters[: len(d.adapters) * blocks // d.blocks])
        full = not self.config.lora.enabled
        compiled = self.compiled and recompute != "offload"  # hooks on saved tensors cannot be compiled
        return costs.activation_bytes(cut, lengths, size=self.size, recompute=recompute, full=full, compiled=compiled)

    def _example(self, layout: StreamLayout) -> int:
        """Of one sample: latents, noise and text."""
        d = self.dimensions
        return FP32 * (2 * layout.elements + d.text_len * d.text_dim)

    # -- time

    def flops(self, loads: Sequence[Load], recompute: costs.Recompute = "none") -> float:
        """Of a mean step, on all ranks."""
        full, steps = not self.config.lora.enabled, sum(load.steps for load in loads)
        each = (
            load.steps * costs.step_flops(self.dimensions, load.layout.lengths, recompute=recompute, full=full)
            for load in loads
        )
        return self.config.train.global_batch * sum(each) / steps

    def seconds(self, loads: Sequence[Load], layout: Layout, recompute: costs.Recompute, machine: Machine) -> float:
        """Of a mean step: work, stretched by the pipeline's waiting, or gathering, whichever takes longer; 0 where the
        machine's peak is not known."""
        if not machine.flops:
            return 0.0
        share = self.config.train.global_batch // layout.data
        passes = max(share // self.micro_batch(load, layout) for load in loads)
        ranges = self._ranges(layout)
        uneven = max(map(len, ranges)) * len(ranges) / self.dimensions.blocks
        waiting = (passes + layout.pipeline - 1) / passes
        work = self.flops(loads, recompute) / (machine.gpus * machine.flops * UTILISATION) * uneven * waiting
        if recompute == "offload":
            work += self._carried(loads) / layout.data / HOST_LINK
        whole = sum(self.parts.values(), Part())
        gathered = 0.0
        if self.config.parallel.offload:
            gathered = 2 * passes * whole.weights / layout.pipeline / HOST_LINK
        elif layout.shard > 1:
            times = 1 if layout.pipeline > 1 else 2 * passes
            gathered = times * whole.weights / layout.pipeline * (1 - 1 / layout.shard) / LINK
        reduced = 2 * whole.trained_bytes / layout.pipeline / LINK if layout.data > 1 else 0.0
        return max(work, gathered) + SHOWING * gathered + reduced

    def _carried(self, loads: Sequence[Load]) -> float:
        """Bytes of blocks' inputs that a mean step takes to host memory and back."""
        steps = sum(load.steps for load in loads)
        tokens = sum(load.steps * load.layout.tokens for load in loads) / steps
        d = self.dimensions
        return 2 * self.config.train.global_batch * tokens * d.width * d.blocks * self.size


def optimizer_bytes(config: OptimConfig, trained: Part) -> int:
    """Of optimizers that we do not know, two moments are taken."""
    per = trained.trained_bytes // trained.trained if trained.trained else 0
    return int(trained.trained * STATE.get(config.name.lower(), STATE["adamw"])(per, config))


def in_flight(config: ParallelConfig, pipeline: int, rank: int, count: int) -> float:
    """Microbatches whose activations a rank of the pipeline holds at a time, at most."""
    if pipeline == 1:
        return 1
    if config.schedule in INTERLEAVED:
        pieces = stage_count(replace(config, pipeline=pipeline)) // pipeline
        return min(count * pieces, 2 * (pipeline - rank - 1) + (pieces - 1) * pipeline + 1) / pieces
    if config.schedule == "gpipe" or count < pipeline:
        return count
    return min(count, pipeline - rank)


def receive_buffers(config: ParallelConfig, pipeline: int, rank: int) -> int:
    """Hidden states of each microbatch that a rank has room for: one from either side of each of its stages."""
    if pipeline == 1:
        return 0
    pieces = stage_count(replace(config, pipeline=pipeline)) // pipeline
    return 2 * pieces - (rank == 0) - (rank == pipeline - 1)


# --- layouts for a machine -------------------------------------------------------------------------------------------


def layouts(config: Config, blocks: int, gpus: int) -> Iterator[Layout]:
    """Every one that the batch and the model can be divided by."""
    for pipeline in _divisors(gpus):
        parallel = replace(config.parallel, pipeline=pipeline)
        if stage_count(parallel) > blocks or (parallel.offload and splits_backward(parallel)):
            continue
        for shard in _divisors(gpus // pipeline):
            layout = Layout(pipeline, gpus // pipeline // shard, shard)
            mixed = config.optim.bf16_parameters and shard > 1
            if config.train.global_batch % layout.data == 0 and not mixed:
                yield layout


def fits(estimate: Estimate, loads: Sequence[Load], machine: Machine) -> list[Fit]:
    """For each layout its fastest way that fits, the best first; nothing where nothing fits."""
    found = []
    for layout in layouts(estimate.config, estimate.dimensions.blocks, machine.gpus):
        ways = [way(estimate, loads, layout, mode, machine) for mode in MODES]
        fitting = [fit for fit in ways if fit.memory.total <= USABLE * machine.memory]
        if fitting:
            found.append(min(fitting, key=lambda fit: (fit.seconds, fit.memory.total)))
    return sorted(found, key=lambda fit: (fit.seconds, fit.memory.total))


def way(estimate: Estimate, loads: Sequence[Load], layout: Layout, mode: str, machine: Machine) -> Fit:
    settings = (
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.replicate={layout.replicate}",
        f"parallel.shard={layout.shard}",
        f"parallel.recompute={mode}",
    )
    memory = estimate.memory(loads, layout, mode)
    return Fit(settings, memory, estimate.seconds(loads, layout, mode, machine), _why(estimate, loads, layout, mode))


def _why(estimate: Estimate, loads: Sequence[Load], layout: Layout, mode: str) -> str:
    reasons = [
        {
            "none": "nothing is recomputed",
            "attention": "all but attention is recomputed",
            "full": "every block is recomputed",
            "offload": "every block is recomputed, its input waits in host memory",
        }[mode]
    ]
    if layout.pipeline > 1:
        share = estimate.config.train.global_batch // layout.data
        passes = max(share // estimate.micro_batch(load, layout) for load in loads)
        lost = (layout.pipeline - 1) / (passes + layout.pipeline - 1)
        reasons.append(f"a GPU holds 1/{layout.pipeline} of the blocks and waits {lost:.0%} of the time")
    if layout.shard > 1:
        reasons.append(f"weights are cut over {layout.shard} GPUs and gathered when used")
    elif layout.replicate > 1:
        reasons.append("weights are whole on each GPU, only gradients travel")
    return "; ".join(reasons)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
