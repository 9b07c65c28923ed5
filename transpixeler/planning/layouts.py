"""Find the layouts that fit a machine, the fastest first: an `Estimate` of a config goes in, `Fit`s come out."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transpixeler.config.sections import Config
from transpixeler.data.buckets import batch_sizes
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.pipeline import stage_count
from transpixeler.parallel.shard import splits_backward
from transpixeler.training.estimates import Estimate, Load, Machine, Memory
from transpixeler.training.room import RECOMPUTE_MODES, USABLE_MEMORY


@dataclass(frozen=True)
class Fit:
    """A way to run that fits a machine."""

    settings: tuple[str, ...]  # the config keys to set for it
    memory: Memory
    seconds: float
    why: str
    layout: Layout


def layouts(config: Config, blocks: int, gpus: int, *, heads: int = 1) -> Iterator[Layout]:
    """Yield every layout that divides the batch and the model."""
    for pipeline in _divisors(gpus):
        parallel = replace(config.parallel, pipeline=pipeline)
        if stage_count(parallel) > blocks or (parallel.offload and splits_backward(parallel)):
            continue
        for context in _divisors(math.gcd(heads, gpus // pipeline)):
            data = gpus // pipeline // context
            for shard in _divisors(data):
                mixed = config.optim.bf16_parameters and shard > 1
                if all(batch % data == 0 for batch in batch_sizes(config)) and not mixed:
                    yield Layout(pipeline, data // shard, shard, context)


def _all_layouts(estimate: Estimate, gpus: int) -> Iterator[Layout]:
    return layouts(estimate.config, len(estimate.costs.blocks), gpus, heads=estimate.costs.heads)


def fits(estimate: Estimate, loads: Sequence[Load], machine: Machine) -> list[Fit]:
    """Return the fastest fitting way of each layout, the best first; nothing where nothing fits."""
    found = []
    for layout in _all_layouts(estimate, machine.gpus):
        ways = [way(estimate, loads, layout, mode, machine) for mode in _modes(estimate.config)]
        fitting = [fit for fit in ways if fit.memory.total <= USABLE_MEMORY * machine.memory]
        if fitting:
            found.append(min(fitting, key=_rank))
    return _ranked(found)


def _rank(fit: Fit) -> tuple[float, float]:
    return fit.seconds, fit.memory.total


def _ranked(found: Sequence[Fit]) -> list[Fit]:
    """Sort ways, the best first, without sharing samples where a way without it is as fast and takes no more memory."""
    plain = [fit for fit in found if fit.layout.context == 1]

    def gains(fit: Fit) -> bool:
        alike = (p.seconds <= fit.seconds and p.memory.total <= fit.memory.total for p in plain)
        return fit.layout.context == 1 or not any(alike)

    return sorted(filter(gains, found), key=_rank)


def _modes(config: Config) -> tuple[str, ...]:
    """Return the words of `parallel.recompute` that go with the rest of a config."""
    return RECOMPUTE_MODES[1:] if config.parallel.keep_gb else RECOMPUTE_MODES


def fits_by_waiting(estimate: Estimate, loads: Sequence[Load], machine: Machine) -> list[Fit]:
    """Return the fastest way of each layout that fits if the fewest blocks that suffice wait in host memory."""
    found = []
    for layout in _all_layouts(estimate, machine.gpus):
        if estimate.config.lora.enabled or layout.shard > 1:
            ways = (_fewest_waiting(estimate, loads, layout, mode, machine) for mode in _modes(estimate.config))
            fitting = [way for way in ways if way]
            found += [min(fitting, key=_rank)] if fitting else []
    return _ranked(found)


def _fewest_waiting(
    estimate: Estimate, loads: Sequence[Load], layout: Layout, mode: str, machine: Machine
) -> Fit | None:
    """Return one layout with one `parallel.recompute` and as many waiting blocks as it needs; None if none suffice."""

    def tried(count: int) -> Fit:
        config = estimate.config
        parallel = replace(config.parallel, offload=count)
        return way(replace(estimate, config=replace(config, parallel=parallel)), loads, layout, mode, machine)

    counts = range(1, len(estimate.costs.blocks) + 1)
    room = USABLE_MEMORY * machine.memory
    place = bisect_left(counts, True, key=lambda count: tried(count).memory.total <= room)
    return tried(counts[place]) if place < len(counts) else None


def way(estimate: Estimate, loads: Sequence[Load], layout: Layout, mode: str, machine: Machine) -> Fit:
    """Estimate one layout with one `parallel.recompute`."""
    settings = (
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.replicate={layout.replicate}",
        f"parallel.shard={layout.shard}",
        *([f"parallel.context={layout.context}"] if layout.context > 1 else []),
        f"parallel.recompute={mode}",
    )
    offload = estimate.config.parallel.offload
    if offload and offload is not True:
        settings = (*settings, f"parallel.offload={offload}")
    memory = estimate.memory(loads, layout, mode)
    seconds = estimate.seconds(loads, layout, mode, machine)
    return Fit(settings, memory, seconds, _why(estimate, loads, layout, mode), layout)


def _why(estimate: Estimate, loads: Sequence[Load], layout: Layout, mode: str) -> str:
    reasons = [
        {
            "none": "nothing is recomputed",
            "attention": "all but attention is recomputed",
            "full": "every block is recomputed",
            "offload": "every block is recomputed, and its input waits in host memory",
        }[mode]
    ]
    offload, blocks = estimate.config.parallel.offload, len(estimate.costs.blocks)
    if offload:
        count = blocks if offload is True else offload
        reasons.append(f"the weights of {count} of {blocks} blocks wait in host memory")
    if layout.pipeline > 1:
        passes = max(load.batch // layout.data // estimate.micro_batch(load, layout) for load in loads)
        lost = (layout.pipeline - 1) / (passes + layout.pipeline - 1)
        reasons.append(f"a GPU holds 1/{layout.pipeline} of the blocks and idles {lost:.0%} of the time")
    if layout.context > 1:
        sent = estimate.exchanged_bytes(loads, layout, mode) / 2**30
        reasons.append(f"{layout.context} GPUs share each sample's tokens and send {sent:.3g} GiB each a step for it")
    if layout.shard > 1:
        count = layout.shard * layout.context
        reasons.append(f"weights are sharded over {count} GPUs and gathered when used")
    elif layout.replicate > 1:
        reasons.append("every GPU has all weights, and only gradients are exchanged")
    return "; ".join(reasons)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
