"""Put an adapter onto a built model, or onto the part of it that a rank holds, and read it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transpixeler.adapters.adapter import TENSORS, Adapter
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.models.backbone import Backbone
from transpixeler.models.family import Family
from transpixeler.models.lora import LoraLinear, inject, is_adapter, load_adapter, lora_linears
from transpixeler.models.names import UnknownName
from transpixeler.models.streams import Scope
from transpixeler.models.weights import assign

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
    ranks = {target: adapter.rank(target) for target in adapter.targets}
    kind = "dora" if adapter.is_dora else "lora"
    config = LoraConfig(targets=adapter.targets, ranks=ranks, scope="all", kind=kind)
    inject(model, config, scopes=adapter.scopes)
    for target, module in lora_linears(model):
        module.scale = adapter.scale(target)


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
    tensors = dict(adapter.tensors)
    for target, module in linears.items():
        if target in adapter.alphas and adapter.scale(target) != module.scale:
            tensors[f"{target}.lora_B"] = adapter.up(target) * (adapter.scale(target) / module.scale)
    load_adapter(model, tensors | embeddings, assign=assign)


def adapter_of(model: Backbone, metadata: Mapping[str, str], *, values: Mapping[str, Tensor] | None = None) -> Adapter:
    """Collect the adapter of a model, or of its stage of a pipeline: its own values, or averages of them by name.

    Every rank of a shard calls it: whole tensors are gathered.
    """
    parameters = dict(model.named_parameters())
    given = values or {}
    linears = dict(lora_linears(model))
    names = [f"{target}.{kind}" for target in linears for kind in TENSORS if f"{target}.{kind}" in parameters]
    embeddings = [name for name in parameters if name.startswith(STREAM_EMBEDDING)]
    held = {name: whole_tensor(given.get(name, parameters[name])) for name in names + embeddings}
    return Adapter(
        tensors={name: held[name] for name in names},
        alphas={target: _single(module.scale * module.rank) for target, module in linears.items()},
        scopes={target: _scope(module, model.streams) for target, module in linears.items()},
        stream_embeddings={name.removeprefix(STREAM_EMBEDDING): held[name] for name in embeddings},
        metadata={"family": model.family} | dict(metadata),
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", torch.float32, copy=True)


def _single(number: float) -> float:
    """Round a number as a file of fp32 does."""
    return torch.tensor(number, dtype=torch.float32).item()


def _scope(module: LoraLinear, streams: Sequence[str]) -> Scope:
    if module.span is None:
        return "all"
    return "aux" if module.span == (1, len(streams)) else tuple(streams[slice(*module.span)])
