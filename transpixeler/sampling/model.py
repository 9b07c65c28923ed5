"""A config, or a saved model, goes in; the model that it describes comes out: on meta, its weights, or an engine.

Training takes its model from the same functions, so that a config becomes a model in one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter
from transpixeler.adapters.merge import FusedSource, read_fused
from transpixeler.adapters.on_model import apply_adapter, inject_adapter
from transpixeler.config import Config, UserError
from transpixeler.models import lora
from transpixeler.models.backbone import Backbone
from transpixeler.models.family import open_model
from transpixeler.models.streams import Scope, scope_span
from transpixeler.models.weights import Readable, WeightSource
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.saves import SavedModel, trained_scales

# --- a config's model ------------------------------------------------------------------------------------------------


def make_model(config: Config) -> Backbone:
    """Build the whole model on the current default device, without weights."""
    return open_model(config.model).build(
        streams=tuple(config.streams),
        rgb_attends_aux=config.model.rgb_attends_aux,
        attention=config.model.attention,
        fps=config.data.fps,
    )


def base_weights(config: Config) -> Readable:
    """Return the source of the base's weights, with `model.fuse`'s adapters added as they are read."""
    source = WeightSource(config.model.path, open_model(config.model).family.internal_names)
    fused = read_fused(config.model.fuse)
    return FusedSource(source, fused) if fused else source


def initial_adapter(config: Config) -> Adapter | None:
    """Read `lora.init_from`, which training starts from; refuse one that does not fit the model."""
    path = config.lora.init_from
    if not path:
        return None
    companion = next(iter([*config.streams][1:]), "seg")  # the published code's files do not name theirs
    adapter = read_adapter(path, stream=companion, key="lora.init_from")
    if adapter.must_fuse:
        raise UserError(
            f"lora.init_from: {path} changes {adapter.must_fuse}, which no adapter beside a frozen base can go on "
            "from; name it in model.fuse"
        )
    with torch.device("meta"):
        _check_fits(adapter, make_model(config), f"lora.init_from: {path}", config.model.path)
    return adapter


def initial_scopes(config: Config, adapter: Adapter | None) -> dict[str, Scope]:
    """Return, by target, the scopes of the initial adapter that differ from `lora.scope`."""
    own = adapter.scopes if adapter is not None else {}
    return {target: scope for target, scope in own.items() if scope != config.lora.scope}


# --- a saved model's engine ------------------------------------------------------------------------------------------


def fit_layout(config: Config, runtime: Runtime, *, asked: bool) -> tuple[Config, meshes.Layout]:
    """Return the config's layout where it fits the processes at hand; else, unless the user asked for it, replicas."""
    try:
        return config, meshes.resolve(config.parallel, runtime.world_size)
    except UserError:
        if asked:
            raise
    parallel = replace(config.parallel, pipeline=1, replicate=0, shard=1, split=(), schedule="auto")
    return replace(config, parallel=parallel), meshes.resolve(parallel, runtime.world_size)


def open_engine(source: SavedModel, mesh: meshes.Mesh) -> Engine:
    """Build an engine that computes a saved model and trains nothing.

    The adapter has the ranks, strengths and scopes that its file says. One of another program that changes whole
    weights is added to the base.
    """
    config, adapter = _for_inference(source.config), source.adapter
    fused = [adapter] if adapter is not None and adapter.must_fuse else []
    adapter = None if fused else adapter
    if adapter is not None and "streams" in adapter.metadata:
        _check_scales(trained_scales(adapter, adapter.metadata["streams"].split(","), source.name), config, source.name)

    def make() -> Backbone:
        model = make_model(config)
        if adapter is not None:
            _check_fits(adapter, model, source.name, config.model.path)
            inject_adapter(model, adapter)
        return model

    names = open_model(config.model).family.internal_names
    weights = WeightSource(source.weights, names) if source.weights else base_weights(config)
    engine = build_engine(config, mesh, make, FusedSource(weights, fused) if fused else weights)
    if adapter is not None:
        for model in engine.models():
            apply_adapter(model, adapter)
    return engine


def _for_inference(config: Config) -> Config:
    """Keep nothing for a backward pass, and do not compile unasked: that takes longer than it saves."""
    compile = "on" if config.parallel.compile == "on" else "off"
    return replace(
        config,
        model=replace(config.model, trainable=()),
        lora=replace(config.lora, enabled=False),
        parallel=replace(config.parallel, recompute="none", compile=compile),
    )


# --- whether an adapter fits -----------------------------------------------------------------------------------------


def _check_scales(scales: tuple[int, ...], config: Config, name: str) -> None:
    if scales != config.scales:
        raise UserError(
            f"{name}: was trained with streams of scales {', '.join(map(str, scales))}, not "
            f"{', '.join(map(str, config.scales))}; set streams.NAME.scale as it was then"
        )


def _check_fits(adapter: Adapter, model: Backbone, name: str, base: str) -> None:
    _check_streams(adapter, model.streams, name)
    linears, parameters = lora.targets(model), dict(model.named_parameters())
    wanted: dict[str, tuple[int, ...]] = {
        target: (adapter.up(target).shape[0], adapter.down(target).shape[1]) for target in adapter.targets
    }
    found: dict[str, tuple[int, ...]] = {
        target: (linears[target].out_features, linears[target].in_features)
        for target in adapter.targets
        if target in linears
    }
    for stream, embedding in adapter.stream_embeddings.items():
        name_there = f"embed.stream_embedding.{stream}"
        wanted[name_there], found[name_there] = tuple(embedding.shape), tuple(parameters[name_there].shape)
    for target, shape in wanted.items():
        if found.get(target) != shape:
            has = "×".join(map(str, found[target])) if target in found else "absent"
            raise UserError(
                f"{name}: the adapter is for another base: its {target} is {'×'.join(map(str, shape))}, which in "
                f"{base} is {has}; set model.path to the base that it was trained on"
            )


def _check_streams(adapter: Adapter, streams: Sequence[str], name: str) -> None:
    way_out = f"streams are {', '.join(streams)}: name them in `streams` as they were then"
    for stream in adapter.stream_embeddings:
        if stream not in streams[1:]:
            raise UserError(f"{name}: was trained for the stream {stream}; {way_out}")
    for target, scope in adapter.scopes.items():
        try:
            scope_span(scope, streams)
        except UserError:
            text = scope if isinstance(scope, str) else ", ".join(scope)
            raise UserError(f"{name}: its {target} has the scope {text}; {way_out}") from None
