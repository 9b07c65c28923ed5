"""Find the layouts that fit a machine, the fastest first: an `Estimate` of a config goes in, `Fit`s come out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transpixeler.config import Config
from transpixeler.data.buckets import batch_sizes
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.pipeline import stage_count
from transpixeler.parallel.shard import splits_backward
from transpixeler.planning.estimates import Estimate, Load, Machine, Memory

RECOMPUTE_MODES = ("none", "attention", "full", "offload")  # of `parallel.recompute`, the fastest first
USABLE_MEMORY = 0.92  # share of a device's memory; the context and fragmentation take the rest


@dataclass(frozen=True)
class Fit:
    """A way to run that fits a machine."""

    settings: tuple[str, ...]  # the config keys to set for it
    memory: Memory
    seconds: float
    why: str


def layouts(config: Config, blocks: int, gpus: int) -> Iterator[Layout]:
    """Yield every layout that divides the batch and the model."""
    for pipeline in _divisors(gpus):
        parallel = replace(config.parallel, pipeline=pipeline)
        if stage_count(parallel) > blocks or (parallel.offload and splits_backward(parallel)):
            continue
        for shard in _divisors(gpus // pipeline):
            layout = Layout(pipeline, gpus // pipeline // shard, shard)
            mixed = config.optim.bf16_parameters and shard > 1
            if all(batch % layout.data == 0 for batch in batch_sizes(config)) and not mixed:
                yield layout


def fits(estimate: Estimate, loads: Sequence[Load], machine: Machine) -> list[Fit]:
    """Return the fastest fitting way of each layout, the best first; nothing where nothing fits."""
    found = []
    for layout in layouts(estimate.config, len(estimate.costs.blocks), machine.gpus):
        ways = [way(estimate, loads, layout, mode, machine) for mode in _modes(estimate.config)]
        fitting = [fit for fit in ways if fit.memory.total <= USABLE_MEMORY * machine.memory]
        if fitting:
            found.append(min(fitting, key=lambda fit: (fit.seconds, fit.memory.total)))
    return sorted(found, key=lambda fit: (fit.seconds, fit.memory.total))


def _modes(config: Config) -> tuple[str, ...]:
    """Return the words of `parallel.recompute` that go with the rest of a config."""
    return RECOMPUTE_MODES[1:] if config.parallel.keep_gb else RECOMPUTE_MODES


def fits_by_waiting(estimate: Estimate, loads: Sequence[Load], machine: Machine) -> list[Fit]:
    """Return the fastest way of each layout that fits if the fewest blocks that suffice wait in host memory."""
    found = []
    for layout in layouts(estimate.config, len(estimate.costs.blocks), machine.gpus):
        if estimate.config.lora.enabled or layout.shard > 1:
            ways = (_fewest_waiting(estimate, loads, layout, mode, machine) for mode in _modes(estimate.config))
            fitting = [way for way in ways if way]
            found += [min(fitting, key=lambda fit: (fit.seconds, fit.memory.total))] if fitting else []
    return sorted(found, key=lambda fit: (fit.seconds, fit.memory.total))


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
        f"parallel.recompute={mode}",
    )
    offload = estimate.config.parallel.offload
    if offload and offload is not True:
        settings = (*settings, f"parallel.offload={offload}")
    memory = estimate.memory(loads, layout, mode)
    return Fit(settings, memory, estimate.seconds(loads, layout, mode, machine), _why(estimate, loads, layout, mode))


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
    if layout.shard > 1:
        reasons.append(f"weights are sharded over {layout.shard} GPUs and gathered when used")
    elif layout.replicate > 1:
        reasons.append("every GPU has all weights, and only gradients are exchanged")
    return "; ".join(reasons)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
