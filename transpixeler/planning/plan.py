"""The command `transpixeler plan`: a config goes in; what its training will take comes out, before anything is loaded.

Media are probed, not decoded, and of the model config.json is enough. The plan holds the buckets, the clips that are
dropped and why, steps, parameters, FLOPs, time, memory, and the layouts that fit a machine.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from transpixeler.config.sections import Config, UserError
from transpixeler.data.buckets import Bucket, Dropped
from transpixeler.data.cache.records import Cache
from transpixeler.data.catalog import surveyed
from transpixeler.data.dataset import Dataset, training_order
from transpixeler.data.items import Items, captions_of, coded_buckets
from transpixeler.data.sources.pairs import source_names
from transpixeler.data.work import clips_used
from transpixeler.flow.experts import Split
from transpixeler.flow.tasks import all_beside, views
from transpixeler.models.backbone import Backbone
from transpixeler.models.conditions import kept_layout
from transpixeler.models.family import Field, ModelFolder, caption_fields, open_model, sees_frames
from transpixeler.parallel import devices
from transpixeler.parallel import mesh as meshes
from transpixeler.planning.caching import text_encoder_bytes
from transpixeler.planning.layouts import Fit, fits, fits_by_waiting
from transpixeler.sampling.model import initial_adapters, initial_scopes
from transpixeler.training import estimates, preflight, room
from transpixeler.training.estimates import Estimate, KeptWhole, Load, Machine, Memory, Part

GIB = 2**30
DEFAULT_DEVICE = "H100"  # where there is no GPU and none is named
LETTERS_PER_TOKEN = 4
BF16_BYTES = 2
LETTERS = 20  # bits of a number that stands for a text: the others are of its hash
MOST_LETTERS, MOST_BITS = (1 << LETTERS) - 1, (1 << 64) - 1


class Row(NamedTuple):
    """One bucket of the training set."""

    bucket: Bucket
    clips: int
    seen: float  # in a mean epoch, with repeats
    batch: int  # samples of a step
    micro_batch: int
    steps: float  # in a mean epoch
    tokens: int  # of a sample, in all streams
    tflop: float  # of a sample's step, with recomputation


@dataclass(frozen=True)
class Plan:
    """Everything that is known before training."""

    config: Config
    device: str
    machine: Machine
    layout: meshes.Layout
    trainable_parameters: int
    parameters: int
    experts: Split
    idle_on_device: bool  # the weights of experts that do not work
    rows: tuple[Row, ...]
    dropped: Mapping[str, Dropped]  # by set
    notes: Mapping[str, tuple[str, ...]]  # by set: on files in no sample, and on how others were understood
    steps_first_epoch: int
    steps_epoch: float
    steps: int
    whole_epochs: bool  # the run ends with its last epoch, not before
    flop_step: float  # of all ranks, with recomputation
    seconds_step: float
    recompute: str | int  # the config's, with `auto` resolved
    why: str  # `auto` was resolved so; empty where the config says it
    kept_whole: tuple[KeptWhole, ...]  # on the first rank, in each bucket
    memory: Mapping[str, Memory]  # by `parallel.recompute`
    drawn: int  # clips of the training set that the run's epochs take
    cache_latents: int
    cache_texts: int
    caching: Mapping[str, int]  # bytes of each network that reads captions, by folder; one is on the device at a time
    fits: tuple[Fit, ...]
    scan_seconds: float


# --- from a config ---------------------------------------------------------------------------------------------------


def make_plan(config: Config, device: str, machine: Machine) -> Plan:
    """Plan a config on a machine, as its own layout would run there, and find the layouts that fit."""
    layout = meshes.resolve(config.parallel, machine.gpus)
    folder = _checked_model(config, layout)
    clips = _clips(config, folder)  # first, as they are many and leave memory before anything else comes into it
    loads = clips.loads
    estimate = room.estimate_of(config, folder, _model(config, machine), machine)
    mode, why = room.choose(estimate, loads, layout, machine)
    whole = sum(estimate.parts.values(), Part())
    return Plan(
        config=config,
        device=device,
        machine=machine,
        layout=layout,
        trainable_parameters=estimate.experts * whole.trainable,
        parameters=estimate.experts * whole.numbers,
        experts=_split(config, folder, loads),
        idle_on_device=estimate.idle_on_device(layout),
        rows=tuple(_row(load, clips, estimate, layout, mode) for load in loads),
        dropped=clips.dropped,
        notes=clips.notes,
        steps_first_epoch=clips.steps_first_epoch,
        steps_epoch=sum(load.steps for load in loads),
        steps=clips.steps,
        whole_epochs=clips.whole_epochs,
        flop_step=estimate.flops(loads, layout, mode),
        seconds_step=estimate.seconds(loads, layout, mode, machine),
        recompute=mode,
        why=why,
        kept_whole=tuple(estimate.kept_whole(load, layout, 0, mode) for load in loads),
        memory={str(way): estimate.memory(loads, layout, way) for way in dict.fromkeys([mode, *room.RECOMPUTE_MODES])},
        drawn=clips.drawn,
        cache_latents=clips.cache_latents,
        cache_texts=clips.cache_texts,
        caching=text_encoder_bytes(folder, config.model.quantize_encoders),
        fits=tuple(_fits(config, folder, estimate, loads, machine)),
        scan_seconds=clips.scan_seconds,
    )


@dataclass(frozen=True)
class ClipFacts:
    """All that a plan asks of the clips, as in `Plan`."""

    loads: list[Load]  # of the buckets, in training's order
    counts: Mapping[tuple[int, int, int], int]  # clips of the training set, by bucket
    dropped: Mapping[str, Dropped]
    notes: Mapping[str, tuple[str, ...]]
    steps_first_epoch: int
    steps: int
    whole_epochs: bool
    drawn: int
    cache_latents: int
    cache_texts: int
    scan_seconds: float


def _clips(config: Config, folder: ModelFolder) -> ClipFacts:
    train, evaluation, scan_seconds = _datasets(config, folder)
    order = training_order(config, train)
    used, steps = replace(train, items=clips_used(config, train, order)), int(order.total(config.train))
    return ClipFacts(
        loads=room.loads_of(config, folder, order, train),
        counts=train.buckets(),
        dropped={"train": train.skipped, "eval": evaluation.skipped},
        notes={"train": train.notes, "eval": evaluation.notes},
        steps_first_epoch=order.steps(0),
        steps=steps,
        whole_epochs=steps == order.first_step(config.train.epochs),
        drawn=len(used.items),
        cache_latents=sum(_latent_bytes(config, folder, data) for data in (used, evaluation)),
        cache_texts=_text_bytes(config, folder, [train, evaluation]),
        scan_seconds=scan_seconds,
    )


def _checked_model(config: Config, layout: meshes.Layout) -> ModelFolder:
    """Open the model; refuse what training would refuse, and tasks and experts that it has not."""
    preflight.check(config, layout)
    folder = open_model(config.model)
    preflight.check_settings(config, layout, folder)
    return folder


def _split(config: Config, folder: ModelFolder, loads: Sequence[Load]) -> Split:
    """Share training out over the model's experts, at the noise of its largest clips."""
    return Split.of(config, folder, max((load.layout.grids[0] for load in loads), key=prod, default=(0, 0, 0)))


def _model(config: Config, machine: Machine) -> Backbone:
    """Build the model as a rank of a machine does, on meta."""
    scopes = initial_scopes(config, initial_adapters(config))
    return room.shape_of(config, torch.device(machine.kind), scopes)


def _datasets(config: Config, model: ModelFolder) -> tuple[Dataset, Dataset, float]:
    """Return the clips of both sets, and the seconds that it took to probe them."""
    started = time.perf_counter()
    train, evaluation = (_dataset(config, model, key) for key in ("train", "eval"))
    return train, evaluation, time.perf_counter() - started


def _dataset(config: Config, model: ModelFolder, key: str) -> Dataset:
    """Return the clips of `data.KEY`, without cache records."""
    sources, found = getattr(config.data, key), surveyed(config, model, key)
    items = Items(found.clips, source_names(sources), [one.repeats for one in sources])
    return Dataset(items, tuple(config.streams), (), Cache(), key, found.skipped, notes=found.told)


def _row(load: Load, facts: ClipFacts, estimate: Estimate, layout: meshes.Layout, mode: str | int) -> Row:
    flop = estimate.sample_flops(load, layout, mode)
    clips = facts.counts[load.bucket]
    seen, micro_batch = load.steps * load.batch, estimate.micro_batch(load, layout)
    return Row(load.bucket, clips, seen, load.batch, micro_batch, load.steps, load.layout.tokens, flop / 1e12)


def _latent_bytes(config: Config, folder: ModelFolder, data: Dataset) -> int:
    streams, geometry, fields = tuple(config.streams), folder.geometry.over(config.scales), folder.fields
    beside = all_beside(config.objective, streams, fields)
    plain = {bucket: geometry.layout(streams, config.scales, bucket) for bucket in data.buckets()}
    layouts = {bucket: layout.with_beside(beside, bucket[0]) for bucket, layout in plain.items()}
    shown = [field for field in fields if field.source == "clip"]
    latents = sum(
        count * sum(layout.elements for layout in (one, *(kept_layout(field, one) for field in shown)))
        for one, count in ((layouts[bucket], count) for bucket, count in data.buckets().items())
    )
    tokens = sum((field.length or 1) * field.width for field in fields if field.source == "image")
    return BF16_BYTES * (latents + tokens * len(data.items))


def _text_bytes(config: Config, folder: ModelFolder, sets: Sequence[Dataset]) -> int:
    """Estimate the records of captions: one row a token, or one a caption; beside pictures, of each clip."""
    beside = Counter[int]()  # how many texts have so many letters
    every = [_texts([""], 1)]
    for data in sets:
        offered, numbers = coded_buckets(data.items)
        kinds = [views(config.objective, tuple(config.streams), video=bucket[0] > 1) for bucket in offered]
        texts = _texts(captions_of(data.items), len(data.items))
        seen, unseen = (np.array([kind[which] for kind in kinds], bool)[numbers] for which in (0, 1))
        beside.update(_counted(texts[seen]))
        every.append(texts[unseen] if sees_frames(folder.fields) else texts)
    texts = np.concatenate(every)
    texts.sort()
    plain = _counted(texts[np.append(True, texts[1:] != texts[:-1])])
    size = 0
    for field in caption_fields(folder.fields):
        texts = plain + beside if field.source == "caption+image" else plain
        size += BF16_BYTES * field.width * sum(_rows(field, letters) * count for letters, count in texts.items())
    return size


def _texts(texts: Iterable[str], count: int) -> np.ndarray:
    """Return a number for each text, uint64 [n]: of its hash and its letters, as texts themselves take much memory."""
    numbers = ((hash(text) << LETTERS & MOST_BITS) | min(len(text), MOST_LETTERS) for text in texts)
    return np.fromiter(numbers, np.uint64, count)


def _counted(texts: np.ndarray) -> Counter[int]:
    """Count how many texts have so many letters."""
    counts = np.bincount((texts & np.uint64(MOST_LETTERS)).astype(np.int32))
    return Counter({letters: int(counts[letters]) for letters in np.flatnonzero(counts).tolist()})


def _rows(field: Field, letters: int) -> int:
    """Estimate the rows of a text's record."""
    return min(field.length, field.least + 1 + letters // LETTERS_PER_TOKEN) if field.length else 1


def _suits(config: Config, folder: ModelFolder, layout: meshes.Layout) -> bool:
    """Tell whether a model that makes a video at several sizes can be trained on a layout."""
    if (ladder := folder.ladder(config.objective)) is None:
        return True
    parallel = replace(config.parallel, pipeline=layout.pipeline, context=layout.context)
    return not ladder.fault(replace(config, parallel=parallel))


def _fits(
    config: Config, folder: ModelFolder, estimate: Estimate, loads: Sequence[Load], machine: Machine
) -> list[Fit]:
    """Return the ways that fit; where none does, those of what changes least of `_memory_savers`.

    With each, as few blocks as it takes may wait in host memory, which costs no precision.
    """
    for key, changed in [("", config), *_memory_savers(config)]:
        if key:
            estimate = room.estimate_of(changed, folder, _model(changed, machine), machine)
        found = fits(estimate, loads, machine)
        if not found and changed.parallel.offload is not True:
            found = fits_by_waiting(estimate, loads, machine)
        if found := [fit for fit in found if _suits(changed, folder, fit.layout)]:
            return [replace(way, settings=(*way.settings, *key.split())) for way in found]
    return []


def _memory_savers(config: Config) -> list[tuple[str, Config]]:
    """Return what takes less memory, the least change first: (overrides, the config with them)."""
    eight = replace(config, model=replace(config.model, quantize="int8"))
    found = [("model.quantize=int8", eight)] if config.lora.enabled and not config.quantized else []
    for keys, changed in [("", config), *found]:
        if config.parallel.offload is not True:
            offloaded = replace(changed, parallel=replace(changed.parallel, offload=True))
            found.append((f"{keys} parallel.offload=true".strip(), offloaded))
    return found


# --- the machine -----------------------------------------------------------------------------------------------------


def find_machine(config: Config, *, gpus: int, memory: float, device: str, peak: float) -> tuple[str, Machine]:
    """Return the machine that is asked for, else the GPU that is here, else a common one. 0 and "" leave it open."""
    parallel = config.parallel
    gpus = gpus or parallel.pipeline * max(1, parallel.replicate) * max(1, parallel.shard) * parallel.context
    if device.lower() == "cpu":
        return "cpu", Machine(gpus, memory * GIB, 1e12 * (peak or config.log.peak_tflops), "cpu")
    here = torch.cuda.is_available() and not device
    asked = device or (torch.cuda.get_device_name() if here else DEFAULT_DEVICE)
    memory = memory or _memory(asked, here=here)
    known = devices.find(asked) or devices.Device(asked, peak, 0)
    if not known.tflops or not (memory or known.memory):
        raise UserError(f"--device: {asked!r} is not known; give --peak TFLOPS and --memory GB, or one of {_listed()}")
    peak = peak or config.log.peak_tflops or known.tflops
    return known.name, Machine(gpus, (memory or known.memory) * GIB, 1e12 * peak)


def _memory(asked: str, *, here: bool) -> float:
    """Return GiB of the GPU that is here, or that a name such as A100-SXM4-40GB says; else 0."""
    if here:
        return torch.cuda.get_device_properties(0).total_memory / GIB
    said = re.search(r"(\d+) ?GB", asked, re.IGNORECASE)
    return float(said[1]) if said else 0.0


def _listed() -> str:
    return ", ".join(name.lower() for name, *_ in devices.KNOWN)


# --- as values --------------------------------------------------------------------------------------------------------


def plain(plan: Plan) -> dict[str, Any]:
    """Return a plan for other programs: bytes, seconds, FLOP."""
    return {
        "parameters": {"trained": plan.trainable_parameters, "all": plan.parameters},
        "experts": plan.experts.by_name,
        "device": {"name": plan.device, "gpus": plan.machine.gpus, "memory": plan.machine.memory,
                   "peak": plan.machine.flops, "utilisation": estimates.UTILISATION},
        "layout": str(plan.layout),
        "buckets": [row._asdict() | {"bucket": list(row.bucket)} for row in plan.rows],
        "dropped": {key: [list(pair) for pair in pairs] for key, pairs in plan.dropped.items()},
        "notes": {key: list(notes) for key, notes in plan.notes.items()},
        "steps": {"first_epoch": plan.steps_first_epoch, "epoch": plan.steps_epoch, "all": plan.steps},
        "flop_step": plan.flop_step,
        "seconds": {"step": plan.seconds_step or None, "all": plan.seconds_step * plan.steps or None,
                    "scan": plan.scan_seconds},
        "recompute": plan.recompute,
        "kept_whole": [kept._asdict() for kept in plan.kept_whole],
        "memory": {mode: memory._asdict() | {"total": memory.total} for mode, memory in plan.memory.items()},
        "cache": {"latents": plan.cache_latents, "texts": plan.cache_texts, "encoders": dict(plan.caching)},
        "layouts": [
            {"settings": list(way.settings), "memory": way.memory.total, "seconds_step": way.seconds, "why": way.why}
            for way in plan.fits
        ],
    }  # fmt: skip
