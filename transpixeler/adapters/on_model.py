"""Put an adapter onto a built model, or onto the part of it that a rank holds, and read it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transpixeler.adapters.adapter import TENSORS, Adapter, linear_of, stream_of, target_of
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.models.backbone import Backbone
from transpixeler.models.family import Family
from transpixeler.models.lora import LoraLinear, inject, is_adapter, load_adapter, lora_linears
from transpixeler.models.names import UnknownName
from transpixeler.models.shards import assign
from transpixeler.models.streams import Scope, scope_span

STREAM_EMBEDDING = "embed.stream_embedding."


def check_names(model: Backbone, family: Family) -> None:
    """Refuse a model that trains what no file of its family has a name for: it could not be saved."""
    trained = [target for target, _ in lora_linears(model)]
    whole = [name for name, parameter in model.named_parameters() if not name.startswith(STREAM_EMBEDDING)]
    whole = [] if trained else [name for name in whole if not is_adapter(name)]
    try:
        for target, spelling in product(trained, FORMATS.values()):
            spelling.module(target, family.names)
        for name, to in product(whole, ("original", "diffusers")):
            family.names.parameter(name, source="internal", to=to)
    except UnknownName as fault:
        raise UserError(
            f"lora.targets: {fault.args[0]} has no name in the files of {family.title}, so that it could not be saved; "
            "leave it out"
        ) from fault


def inject_adapter(model: Backbone, adapter: Adapter) -> None:
    """Give a whole model (on meta too) the linears that an adapter needs, with its ranks, strengths and scopes."""
    if not adapter.targets:
        return
    scopes, scales = linear_scopes(adapter, model.streams), {linear_of(t): adapter.scale(t) for t in adapter.targets}
    ranks = {linear_of(target): adapter.rank(target) for target in adapter.targets}
    own, kind = bool(adapter.own_streams), "dora" if adapter.is_dora else "lora"
    config = LoraConfig(targets=tuple(scopes), ranks=ranks, scope="all", kind=kind, per_stream=own)
    inject(model, config, scopes=scopes)
    for linear, module in lora_linears(model):
        module.scale = scales[linear]


def linear_scopes(adapter: Adapter, streams: Sequence[str]) -> dict[str, Scope]:
    """Return the scope of each linear: where streams have matrices of their own, all of these streams."""
    named: dict[str, list[str]] = {}
    for target in adapter.targets:
        if stream := stream_of(target):
            named.setdefault(linear_of(target), []).append(stream)
    own = {linear: _words(scope_span(tuple(names), streams), streams) for linear, names in named.items()}
    return {linear_of(target): own.get(linear_of(target), scope) for target, scope in adapter.scopes.items()}


def apply_adapter(model: Backbone, adapter: Adapter) -> None:
    """Fill a model's adapter, or its stage's or shard's part of it, so that it computes what the given one does.

    A whole model that has none yet gets the adapter's own; one that was injected by its config keeps its own strength.
    A stage without any linear that is adapted stays so. Stream embeddings alone leave the linears as they are.
    """
    embeddings = {STREAM_EMBEDDING + stream: tensor for stream, tensor in adapter.stream_embeddings.items()}
    if not adapter.targets:
        for name, parameter in model.named_parameters():
            if name in embeddings:
                assign(parameter, embeddings[name])
        return
    linears = dict(lora_linears(model))
    if not linears and model.embed is not None and model.head is not None:
        inject_adapter(model, adapter)
        linears = dict(lora_linears(model))
    tensors = {_parameter(target, kind): adapter.tensors[f"{target}.{kind}"] for target, kind in _held(adapter)}
    for linear, module in linears.items():
        for stream in module.own or ("",):
            own = target_of(linear, stream)
            target = own if own in adapter.alphas else linear  # from what all streams share, each starts with a copy
            if target not in adapter.alphas:
                continue
            for kind in TENSORS:
                if (given := adapter.tensors.get(f"{target}.{kind}")) is not None:
                    same = kind != "lora_B" or adapter.scale(target) == module.scale
                    tensors[_parameter(own, kind)] = given if same else given * (adapter.scale(target) / module.scale)
                if target != own:
                    tensors.pop(_parameter(target, kind), None)
    load_adapter(model, tensors | embeddings, assign=assign)


def _held(adapter: Adapter) -> list[tuple[str, str]]:
    """Return the (target, kind) of each tensor of an adapter."""
    return [(t, kind) for t in adapter.targets for kind in TENSORS if f"{t}.{kind}" in adapter.tensors]


def _parameter(target: str, kind: str) -> str:
    """`blocks.0.ffn.0@seg`, `lora_A` → `blocks.0.ffn.0.lora_A.seg`, as a model's parameter is named."""
    stream = stream_of(target)
    return f"{linear_of(target)}.{kind}" + (f".{stream}" if stream else "")


def adapter_of(model: Backbone, metadata: Mapping[str, str], *, values: Mapping[str, Tensor] | None = None) -> Adapter:
    """Collect the adapter of a model, or of its stage of a pipeline: its own values, or averages of them by name.

    Every rank of a shard calls it: whole tensors are gathered.
    """
    parameters = dict(model.named_parameters())
    given = values or {}
    linears = {target_of(name, own): m for name, m in lora_linears(model) for own in m.own or ("",)}
    names = {f"{t}.{kind}": _parameter(t, kind) for t, kind in product(linears, TENSORS)}
    names = {ours: there for ours, there in names.items() if there in parameters}
    names |= {name: name for name in parameters if name.startswith(STREAM_EMBEDDING)}
    held = {ours: whole_tensor(given.get(there, parameters[there])) for ours, there in names.items()}
    return Adapter(
        tensors={name: tensor for name, tensor in held.items() if not name.startswith(STREAM_EMBEDDING)},
        alphas={target: _single(module.scale * module.rank) for target, module in linears.items()},
        scopes={target: _scope(target, module, model.streams) for target, module in linears.items()},
        stream_embeddings={
            name.removeprefix(STREAM_EMBEDDING): tensor
            for name, tensor in held.items()
            if name.startswith(STREAM_EMBEDDING)
        },
        metadata={"family": model.family} | dict(metadata),
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", torch.float32, copy=True)


def _single(number: float) -> float:
    """Round a number as a file of fp32 does."""
    return torch.tensor(number, dtype=torch.float32).item()


def _scope(target: str, module: LoraLinear, streams: Sequence[str]) -> Scope:
    if stream := stream_of(target):
        return (stream,)
    return "all" if module.span is None else _words(module.span, streams)


def _words(span: tuple[int, int], streams: Sequence[str]) -> Scope:
    """Return the scope that a span of streams is, in the words of a config."""
    if span == (0, len(streams)):
        return "all"
    return "aux" if span == (1, len(streams)) else tuple(streams[slice(*span)])
