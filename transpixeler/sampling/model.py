"""A config, or a saved model, goes in; the model that it describes comes out: on meta, its weights, or an engine.

Training takes its model from the same functions, so that a config becomes a model in one way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transpixeler.adapters.adapter import Adapter, linear_of
from transpixeler.adapters.bases import over_base
from transpixeler.adapters.files import read_adapter, read_experts
from transpixeler.adapters.merge import FusedSource, read_fused
from transpixeler.adapters.on_model import apply_adapter, inject_adapter, linear_scopes
from transpixeler.config.sections import Config, UserError
from transpixeler.models import lora
from transpixeler.models.backbone import Backbone
from transpixeler.models.experts import ONLY, Expert, chosen_experts
from transpixeler.models.family import open_model
from transpixeler.models.meta import on_meta
from transpixeler.models.streams import Scope, scope_span
from transpixeler.models.weights import Readable, WeightSource
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engines
from transpixeler.parallel.experts import AnyEngine
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


def base_weights(config: Config, expert: Expert = ONLY) -> Readable:
    """Return the source of an expert's base weights, with `model.fuse`'s adapters added as they are read."""
    names = open_model(config.model).family.internal_names
    source = WeightSource(config.model.path, names, part=expert.folder)
    fused = read_fused(config.model.fuse, expert.name)
    return FusedSource(source, fused) if fused else source


def weights_by_expert(config: Config) -> dict[Expert, Readable]:
    """Return the sources of the base's weights of the experts that are trained."""
    known = open_model(config.model).experts
    return {expert: base_weights(config, expert) for expert in chosen_experts(config.model, known)}


def initial_adapters(config: Config) -> dict[str, Adapter]:
    """Read by expert what training starts from: `lora.init_from`, and the base's stream embeddings."""
    wanted = chosen_experts(config.model, open_model(config.model).experts)
    found = _read_initial(config, wanted) if config.lora.init_from else {}
    if len(wanted) == 1:  # its engine stands alone, without a name
        return over_base(config, {"": found[wanted[0].name]} if found else {}, [""])
    names = [expert.name for expert in wanted]
    return over_base(config, {name: adapter for name, adapter in found.items() if name in names}, names)


def _read_initial(config: Config, wanted: Sequence[Expert]) -> dict[str, Adapter]:
    """Read `lora.init_from` by expert; refuse what does not fit the model, or is of none that is trained."""
    path = config.lora.init_from
    companion = next(iter([*config.streams][1:]), "seg")  # the published code's files do not name theirs
    read = partial(read_adapter, stream=companion, key="lora.init_from")
    found, source = read_experts(Path(path), read), f"lora.init_from: {path}"
    for adapter in found.values():
        if adapter.must_fuse:
            raise UserError(
                f"{source} changes {adapter.must_fuse}, which no adapter beside a frozen base can go on from; name it "
                "in model.fuse"
            )
    with on_meta():
        for adapter in found.values():
            _check_fits(adapter, make_model(config), source, config.model.path)
    by_expert = adapters_by_expert(found, open_model(config.model).experts, source)
    if not any(expert.name in by_expert for expert in wanted):
        trained = ", ".join(expert.name for expert in wanted)
        raise UserError(f"{source}: is of the expert {' and '.join(by_expert)}, and {trained} is trained")
    return by_expert


def initial_scopes(config: Config, adapters: Mapping[str, Adapter]) -> dict[str, Scope]:
    """Return, by target, the scopes of the initial adapters that differ from `lora.scope`."""
    streams = [*config.streams]
    own = {t: scope for adapter in adapters.values() for t, scope in linear_scopes(adapter, streams).items()}
    return {target: scope for target, scope in own.items() if scope != config.lora.scope}


# --- a saved model's engine ------------------------------------------------------------------------------------------


def fit_layout(config: Config, runtime: Runtime, *, asked: bool) -> tuple[Config, meshes.Layout]:
    """Return the config's layout where it fits the processes at hand; else, unless the user asked for it, replicas."""
    try:
        return config, meshes.resolve(config.parallel, runtime.world_size)
    except UserError:
        if asked:
            raise
    parallel = replace(config.parallel, pipeline=1, replicate=0, shard=1, context=1, split=(), schedule="auto")
    return replace(config, parallel=parallel), meshes.resolve(parallel, runtime.world_size)


def open_engine(source: SavedModel, mesh: meshes.Mesh) -> AnyEngine:
    """Build an engine that computes a saved model, with all its experts, and trains nothing.

    An adapter has the ranks, strengths and scopes that its file says. One of another program that changes whole
    weights is added to the base.
    """
    config, model = _for_inference(source.config), open_model(source.config.model)
    adapters = adapters_by_expert(source.adapters, model.experts, source.name)
    fused = {name: [adapters.pop(name)] for name in list(adapters) if adapters[name].must_fuse}
    if source.weights is None:
        adapters = over_base(config, adapters, [expert.name for expert in model.experts])
    for adapter in adapters.values():
        if "streams" in adapter.metadata:
            scales = trained_scales(adapter, adapter.metadata["streams"].split(","), source.name)
            _check_scales(scales, config, source.name)

    def make(expert: Expert) -> Backbone:
        made = make_model(config)
        if expert.name in adapters:
            _check_fits(adapters[expert.name], made, source.name, config.model.path)
            inject_adapter(made, adapters[expert.name])
        return made

    sources = {expert: base_weights(config, expert) for expert in model.experts}
    if source.weights is not None:
        trained = chosen_experts(source.config.model, model.experts)[0]
        sources[trained] = WeightSource(source.weights, model.family.internal_names)
    for expert in sources:
        if expert.name in fused:
            sources[expert] = FusedSource(sources[expert], fused[expert.name])
    engine = build_engines(config, mesh, make, sources)
    for name, one in engine.by_expert.items():
        for made in one.models() if name in adapters else ():
            apply_adapter(made, adapters[name])
    return engine


def _for_inference(config: Config) -> Config:
    """Keep nothing for a backward pass, and do not compile unasked: that takes longer than it saves."""
    compile = "on" if config.parallel.compile == "on" else "off"
    return replace(
        config,
        model=replace(config.model, trainable=()),
        lora=replace(config.lora, enabled=False),
        parallel=replace(config.parallel, recompute="none", keep_gb=0, host_gb=0, compile=compile),
    )


# --- whether an adapter fits -----------------------------------------------------------------------------------------


def adapters_by_expert(found: Mapping[str, Adapter], experts: Sequence[Expert], name: str) -> dict[str, Adapter]:
    """Return the adapter of each expert that has one; one that names no expert is for all. name: for an error."""
    known = [expert.name for expert in experts]
    if list(found) == [""]:
        return dict.fromkeys(known, found[""])
    if strange := [expert for expert in found if expert not in known]:
        has = f"which has {', '.join(known)}" if any(known) else "which is one; set model.path to a folder of both"
        raise UserError(f"{name}: is of the expert {', '.join(strange)} of a model, {has}")
    return dict(found)


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
        target: (linears[linear_of(target)].out_features, linears[linear_of(target)].in_features)
        for target in adapter.targets
        if linear_of(target) in linears
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
