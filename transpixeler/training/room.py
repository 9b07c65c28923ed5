"""Choose what is recomputed by the memory that there is: `parallel.recompute: auto`.

In: a config, its buckets, its model on meta and the memory of a device. Out: the fastest way that fits, and the reason
in one line. It depends on nothing that differs between ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket
from transpixeler.data.dataset import Dataset, training_order
from transpixeler.data.order import Order
from transpixeler.flow.tasks import beside_by_step
from transpixeler.models.backbone import Backbone
from transpixeler.models.costs import Costs
from transpixeler.models.experts import chosen_experts
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import Scope, StreamLayout
from transpixeler.parallel import build, devices, shard
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.model import make_model
from transpixeler.training.estimates import FP32_BYTES, Estimate, Load, Machine

logger = logging.getLogger("transpixeler")

RECOMPUTE_MODES = ("none", "attention", "full", "offload")  # of `parallel.recompute`, the fastest first
USABLE_MEMORY = 0.92  # share of a device's memory; the context and fragmentation take the rest
# `none` holds the most that is estimated, and where it is mistaken a run ends that `attention` would not have ended
SURE_MEMORY = 0.8
SMALL = 0.1  # share of memory below which nothing is measured
HOST_SHARE = 0.5  # of host memory that inputs of blocks may take unasked


class Choice(NamedTuple):
    """A word or number of `parallel.recompute`, and why it was chosen; no reason where the config says it."""

    mode: str | int
    why: str = ""


def loads_of(config: Config, folder: ModelFolder, order: Order, train: Dataset) -> list[Load]:
    """Return the buckets in training's order, each with its share of the steps."""
    loads = []
    for row in order.rows:
        bucket = Bucket(*train.items[row.items[0]].bucket)
        layout, batch = _largest_layout(config, folder, bucket), row.batch * config.data.sync_group
        loads.append(Load(bucket, layout, row.steps, batch))
    return loads


def _largest_layout(config: Config, folder: ModelFolder, bucket: Bucket) -> StreamLayout:
    """Return the largest layout that a step of this bucket may have."""
    streams, ladder = tuple(config.streams), folder.ladder(config.objective)
    layout = folder.geometry.over(config.scales).layout(streams, config.scales, bucket)
    if ladder:
        return ladder.longest(layout)
    kinds = beside_by_step(config.objective, streams, folder.fields)
    return max((layout.with_beside(kind, bucket.frames) for kind in kinds), key=lambda one: one.tokens)


def shape_of(config: Config, device: torch.device, scopes: Mapping[str, Scope]) -> Backbone:
    """Build the model as a rank has it, on meta. scopes: by target, those of the adapter that training starts from."""
    return build.shape(config, partial(make_model, config), build.compute_dtype(config, device), scopes=scopes)


def estimate_of(config: Config, folder: ModelFolder, model: Backbone, machine: Machine) -> Estimate:
    """Return the estimate of a model as a rank has it, on meta."""
    device = torch.device(machine.kind)
    return Estimate.of(
        model,
        config,
        dtype=build.compute_dtype(config, device),
        compiled=shard.wants_compile(shard.settled(config.parallel, model), device),
        experts=len(chosen_experts(config.model, folder.experts)),
        device_memory=machine.memory,
    )


def choose(estimate: Estimate, loads: Sequence[Load], layout: Layout, machine: Machine) -> Choice:
    """Return what is recomputed: as the config says, or for `auto` the first way that fits the machine."""
    parallel = estimate.config.parallel
    default = shard.recompute_mode(parallel, torch.device(machine.kind))
    if parallel.recompute != "auto" or not machine.memory:
        return Choice(default)
    found: dict[str, int] = {}
    for mode in _candidates(estimate.config, machine.kind):
        if mode == "offload" and machine.host and estimate.hosted(loads, layout) > HOST_SHARE * machine.host:
            continue
        found[mode] = estimate.memory(loads, layout, mode).total
        room = (SURE_MEMORY if mode == "none" else USABLE_MEMORY) * machine.memory
        if found[mode] <= room:
            said = f"it takes {_gib(found[mode])} by `plan`'s estimate, and {_gib(room)} may be taken"
            more = [f"{other} would take {_gib(size)}" for other, size in found.items() if other != mode]
            return Choice(mode, "; ".join([said, *more]))
    least = min(found, key=lambda mode: found[mode])
    said = f"nothing is estimated to fit {_gib(machine.memory)}, and it takes the least, {_gib(found[least])}"
    return Choice(least, f"{said}; `transpixeler plan` names what does fit")


def _candidates(config: Config, kind: str) -> list[str]:
    """Return the ways that go with the rest of a config, the fastest first."""
    parallel, out = config.parallel, set[str]()
    if parallel.keep_gb:
        out |= {"none"} if kind == "cuda" else {"none", "attention"}
    if shard.splits_backward(parallel) or not keeps_attention(config, torch.device(kind)):
        out |= {"attention"}
    if kind == "cpu":  # whose memory is the host's
        out |= {"offload"}
    return [mode for mode in RECOMPUTE_MODES if mode not in out]


KEEPS_FLEX = "2.13"  # the oldest torch whose compiled blocks keep what flex gives; older ones compute it again


def keeps_attention(config: Config, device: torch.device) -> bool:
    """Tell whether outputs of attention can be kept: those of flex only where blocks are compiled."""
    if config.model.attention != "flex":
        return True
    return torch.__version__ >= KEEPS_FLEX and shard.wants_compile(config.parallel, device)


def with_recompute(
    config: Config, runtime: Runtime, layout: Layout, folder: ModelFolder, scopes: Mapping[str, Scope], data: Dataset
) -> Config:
    """Return a config whose `parallel.recompute` is no longer `auto`, and log why. A collective call.

    scopes: by target, those of the adapter that training starts from. data: the training set.
    """
    if config.parallel.recompute != "auto":
        return config
    memory, host = (runtime.least(size) for size in (devices.memory(runtime.device), devices.host_memory()))
    machine = Machine(layout.ranks, memory, 0.0, runtime.device.type, host)
    model = shape_of(config, runtime.device, scopes)
    loads = loads_of(config, folder, training_order(config, data), data)
    if _is_small(config, model, loads, layout, machine):
        choice = Choice("none", "so small a model leaves most of the memory free")
    else:
        choice = choose(estimate_of(config, folder, model, machine), loads, layout, machine)
    if runtime.is_main:
        logger.info("parallel.recompute: auto is %s here: %s", choice.mode, choice.why)
    return replace(config, parallel=replace(config.parallel, recompute=choice.mode))


def _is_small(config: Config, model: Backbone, loads: Sequence[Load], layout: Layout, machine: Machine) -> bool:
    """Tell whether nothing needs recomputing by a count that is far too high, and takes no time: not half a second."""
    costs = Costs.of(model, kept=False)
    numbers = sum(one.inputs + one.outputs for one in costs.linears)  # of a token: of each, what goes in and comes out
    tokens = max(load.batch // layout.data * (load.layout.tokens + costs.text) for load in loads)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())  # with gradients and two moments
    most = FP32_BYTES * (2 * tokens * numbers + weights)  # norms and what is added keep no more than the linears
    return "none" in _candidates(config, machine.kind) and most <= SMALL * machine.memory


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
