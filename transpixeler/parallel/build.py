"""Cut the model into this rank's stages and load them: built on meta, cut, adapted, wrapped, and only then filled.

In: how to make the model on meta, where its weights lie, and the mesh. Out: an `Engine`. No rank ever holds more of the
model than its own stages' shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from transpixeler.config.sections import Config, ParallelConfig, UserError
from transpixeler.models import lora, quantize
from transpixeler.models.backbone import Backbone, Block, apply_dtypes, set_trainable
from transpixeler.models.costs import Costs
from transpixeler.models.experts import Expert
from transpixeler.models.meta import on_meta
from transpixeler.models.shards import assign
from transpixeler.models.streams import Scope
from transpixeler.models.weights import Readable, load_weights
from transpixeler.parallel import pipeline, shard
from transpixeler.parallel.devices import be_deterministic
from transpixeler.parallel.experts import AnyEngine, Experts, resolve_wait
from transpixeler.parallel.hosted import HostInputs
from transpixeler.parallel.keeping import Keeping
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.replicas import read_once
from transpixeler.parallel.stage import Stage
from transpixeler.parallel.swap import Swap


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of matmuls: bf16 on a GPU, fp32 on a CPU, unless the config says."""
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_engine(
    config: Config,
    mesh: Mesh,
    make: Callable[[], Backbone],
    source: Readable,
    *,
    scopes: Mapping[str, Scope] | None = None,
    host: HostInputs | None = None,
) -> pipeline.Engine:
    """`make` builds the whole model on the current device: on meta, once a stage. `scopes`: what `inject` takes.

    host: the rank's memory for inputs of blocks, where several models share it.
    """
    if config.train.deterministic:
        be_deterministic()
    dtype = compute_dtype(config, mesh.device)
    whole = shape(config, make, dtype, scopes=scopes)
    config = replace(config, parallel=shard.settled(config.parallel, whole))
    costs = Costs.of(whole, kept=config.parallel.keep_gb > 0)
    ranges = pipeline.split_blocks(config.parallel, costs)
    chunk = shard.chunk_tokens(config.parallel, compiled=shard.wants_compile(config.parallel, mesh.device))
    away = shard.waiting_places(config.parallel, len(costs.blocks))
    stages, waiting, host = [], [], host or shard.host_inputs(config.parallel)
    for index in pipeline.local_stages(config.parallel, mesh):
        model = whole if len(ranges) == 1 else shape(config, make, dtype, scopes=scopes)
        model.context = mesh.context
        model.keep(embed=index == 0, blocks=ranges[index], head=index == len(ranges) - 1)
        stage = Stage(model)
        blocks = dict(zip(ranges[index], model.block_list(), strict=True))
        own = [block for place, block in blocks.items() if place in away]
        shard.set_chunk(model, chunk)
        shard.wrap(stage, model.block_list(), config.parallel, mesh, waiting=own, host=host)
        _make_room(stage, own, config.parallel, mesh.device)
        fill(model, config, read_once(source, mesh), mesh.device)
        stages.append(stage)
        waiting += own
    places = [place for index in pipeline.local_stages(config.parallel, mesh) for place in ranges[index]]
    keeping = _keeping(stages, places, config.parallel, mesh, costs) if config.parallel.keep_gb else None
    swap = _swap(stages, waiting, mesh.device) if shard.swaps(config.parallel, mesh.layout.shard) else None
    return pipeline.Engine(stages, config.parallel, mesh, dtype, costs, swap, keeping)


def _make_room(stage: Stage, waiting: list[Block], config: ParallelConfig, device: torch.device) -> None:
    """Give a stage memory, its waiting blocks the host's."""
    model = stage.model
    stage.to_empty(device=torch.device("cpu") if waiting or config.offload is True else device)
    if waiting and config.offload is not True:  # memory of the host that nothing was written to costs nothing
        for part in (model.embed, *model.block_list(), model.head):
            if part is not None and part not in waiting:
                part.to_empty(device=device)


def _keeping(stages: list[Stage], places: list[int], config: ParallelConfig, mesh: Mesh, costs: Costs) -> Keeping:
    """Let as many blocks of a rank keep everything as fit `parallel.keep_gb`. places: the rank's, in the model."""
    compiled = shard.wants_compile(config, mesh.device)
    kept = [costs.part(mesh.layout.context).kept[place].as_run(compiled=compiled) for place in places]
    blocks = [block for stage in stages for block in stage.model.block_list()]
    return Keeping(blocks, kept, config.keep_gb * 2**30)


def _swap(stages: list[Stage], waiting: list[Block], device: torch.device) -> Swap:
    """Let a rank's stages bring in the weights that wait, and move all else of those blocks to the device."""
    swap = Swap(waiting, device)
    for block in waiting:
        for tensor in (*block.parameters(), *block.buffers()):
            if not swap.holds(tensor):
                tensor.data = tensor.data.to(device)
    for stage in stages:
        stage.model.run_block = swap.run
    return swap


def build_engines(
    config: Config,
    mesh: Mesh,
    make: Callable[[Expert], Backbone],
    sources: Mapping[Expert, Readable],
    *,
    scopes: Mapping[str, Scope] | None = None,
) -> AnyEngine:
    """Build an engine for each expert, of its own weights; a model of one is an engine as it is."""
    built, host = Experts(), shard.host_inputs(config.parallel)
    for expert, source in sources.items():
        engine = build_engine(config, mesh, partial(make, expert), source, scopes=scopes, host=host)
        if len(sources) == 1:
            return engine
        wait = resolve_wait(config.parallel, engine, experts=len(sources))
        built.add(expert, engine, partial(_refill, engine, source), wait)
    return built


def _refill(engine: pipeline.Engine, source: Readable) -> None:
    for model in engine.models():
        load_weights(model, source, device=engine.mesh.device)


def shape(
    config: Config, make: Callable[[], Backbone], dtype: torch.dtype, *, scopes: Mapping[str, Scope] | None = None
) -> Backbone:
    """Make the whole model on meta: quantized, adapted, every parameter in its dtype and trainable or not."""
    with on_meta():
        model = make()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if config.quantized:
            quantize.quantize(model, config.model.quantize)
        if config.lora.enabled:
            lora.inject(model, config.lora, seed=config.seed, scopes=scopes)
        else:
            set_trainable(model, config.model.trainable)
        apply_dtypes(model, dtype)
        _check_divisible(model, config)
        _check_heads(model, config.parallel.context)
        if not config.optim.bf16_parameters:  # what is trained keeps its small steps
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    return model


def _check_divisible(model: Backbone, config: Config) -> None:
    """Refuse to share one sample out, and to quantize linears alone, where a model is not made for it."""
    if not model.undivided:
        return
    for key in ("pipeline", "context"):
        if (ranks := getattr(config.parallel, key)) > 1:
            raise UserError(
                f"parallel.{key}: {ranks} ranks cannot share a sample: {model.undivided}; set it to 1, and share "
                "weights by parallel.shard or samples by parallel.replicate"
            )
    if config.quantized:
        raise UserError(
            f"model.quantize: {config.model.quantize} is for linears, and this model is made of convolutions; set none"
        )


def _check_heads(model: Backbone, ranks: int) -> None:
    """Refuse ranks that cannot have equally many of a model's heads."""
    if model.heads % ranks:
        fit = [str(n) for n in range(1, model.heads + 1) if model.heads % n == 0]
        raise UserError(
            f"parallel.context: {ranks} ranks cannot share {model.heads} heads, {model.heads / ranks:.3g} each; set it "
            f"to {', '.join(fit[:-1])} or {fit[-1]}"
        )


def fill(model: Backbone, config: Config, source: Readable, device: torch.device) -> None:
    """Load base weights from the source, each rank its own slices; adapters from (seed, name). device: quantizes."""
    load_weights(model, source, device=device)
    model.rebuild_buffers()
    lora.reset_adapter(model, seed=config.seed, assign=assign)
