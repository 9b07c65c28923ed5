"""The adapter: low-rank matrices beside frozen linears, on the tokens of some streams.

In: a model and a `LoraConfig`. Out: the same model whose targeted linears are `LoraLinear` under their old names, with
nothing trainable but the adapter (`….lora_A`, `….lora_B`, of a DoRA `….lora_magnitude`, the stream embeddings). Where
streams have matrices of their own, these are `….lora_A.STREAM` and so on. First values are a pure function of (seed,
name) and the base, so they are the same on any layout.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.models.backbone import Backbone, Block
from transpixeler.models.linear import (
    ALL,
    Linear,
    Pair,
    activated,
    adapted_norms,
    dequantize,
    full_weight,
    project,
    row_factors,
)
from transpixeler.models.shards import local
from transpixeler.models.streams import Scope, scope_span, span_slice

Setting = TypeVar("Setting")

Assign = Callable[[nn.Parameter, Tensor], None]
DOWN, UP, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
_OF_LINEAR = re.compile(rf"(?P<linear>.+)\.(?P<part>{DOWN}|{UP}|{MAGNITUDE})(?:\.(?P<stream>[\w-]+))?")


class LoraLinear(Linear):
    """A frozen linear and its fp32 adapter on the tokens of `span` (first and past the last stream; None for all).

    dora: the rows of the changed weight have trained norms, `lora_magnitude`, which start as the base's. Those stay
    beside it as `weight_norm`, a frozen parameter, so that they are sharded as the weight's rows are.
    own: the streams of the span, where each has matrices of its own; what trains is then held by their names.
    """

    lora_A: nn.Parameter | nn.ParameterDict
    lora_B: nn.Parameter | nn.ParameterDict
    lora_magnitude: nn.Parameter | nn.ParameterDict | None
    weight_norm: nn.Parameter | None

    def __init__(
        self,
        base: Linear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        span: tuple[int, int] | None = None,
        dora: bool = False,
        own: Sequence[str] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.quantized = base.in_features, base.out_features, base.quantized
        self._parameters.update(base._parameters)
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        like = {"device": next(base.parameters()).device, "dtype": torch.float32}
        self.own = tuple(own)
        self.lora_A = self._held(lambda: torch.empty(rank, base.in_features, **like))
        self.lora_B = self._held(lambda: torch.zeros(base.out_features, rank, **like))
        self.lora_magnitude = self.weight_norm = None
        if dora:
            self.lora_magnitude = self._held(lambda: torch.empty(base.out_features, **like))
            self.weight_norm = nn.Parameter(torch.empty(base.out_features, **like), requires_grad=False)
        self.rank, self.scale, self.dropout, self.span = rank, scale, dropout, span
        self.train(base.training)

    def _held(self, make: Callable[[], Tensor]) -> nn.Parameter | nn.ParameterDict:
        if not self.own:
            return nn.Parameter(make())
        return nn.ParameterDict({stream: nn.Parameter(make()) for stream in self.own})

    @property
    def pairs(self) -> list[Pair]:
        """Return the matrices, and a DoRA's norms: one pair, or one for each stream of the span."""
        parts = self.lora_A, self.lora_B, self.lora_magnitude
        if not self.own:
            return [cast(Pair, parts)]
        return [cast(Pair, tuple(part and part[name] for part in cast(Any, parts))) for name in self.own]

    def runs(self, scope: slice, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens of the scope that each pair acts on."""
        return lengths[slice(*cast(tuple, self.span))] if self.own else (scope.stop - scope.start,)

    def scope(self, x: Tensor, lengths: tuple[int, ...]) -> slice:
        """Return the slice of x's tokens that the adapter acts on; by its length, as some inputs are of text alone."""
        return slice(0, x.shape[1]) if self.span is None else span_slice(lengths, self.span)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        lengths: tuple[int, ...] = (),
        part: Tensor | None = None,
        *,
        gelu: bool = False,
        needs_output: bool = True,
        rows: slice = ALL,
    ) -> Tensor:
        scope = self.scope(x, lengths)
        if scope.start == scope.stop and not torch.is_grad_enabled():  # a run of tokens without any in scope
            return project(x, self, gelu=gelu, needs_output=needs_output, rows=rows)
        runs = self.runs(scope, lengths)
        if not (self.training and self.dropout):
            pairs, how = (self.pairs, self.weight_norm), {"gelu": gelu, "needs_output": needs_output, "rows": rows}
            return project(x, self, *pairs, scale=self.scale, start=scope.start, runs=runs, part=part, **how)
        x, bias = activated(x, gelu), None if self.bias is None else self.bias[rows]
        y = project(x, self, rows=rows) if self.quantized else F.linear(x, self.weight[rows], bias)
        each = zip(x[:, scope].split(runs, 1), y[:, scope].split(runs, 1), self.pairs, strict=True)
        changed = torch.cat([self._dropped(*one, rows) for one in each], dim=1)
        # in place, autograd refuses a y that needs no gradient itself, as of text
        return y.slice_scatter(changed.to(y.dtype), 1, scope.start, scope.stop)

    def _dropped(self, x: Tensor, y: Tensor, pair: Pair, rows: slice) -> Tensor:
        """Return what a pair makes of its tokens x and of the base's y, with some of its inputs dropped."""
        down, up, magnitude = pair
        inner = F.linear(F.dropout(x, self.dropout), down.to(x.dtype))
        changed = y + F.linear(inner, (up[rows] * self.scale).to(x.dtype))
        if magnitude is None:
            return changed
        norm = cast(Tensor, self.weight_norm)
        with torch.no_grad():
            norms = adapted_norms(full_weight(self, x.dtype), norm, down, up, self.scale)
        factor = row_factors(magnitude, norm, norms)[rows]
        return factor * changed + (0 if self.bias is None else (1 - factor) * self.bias[rows])


# -- which linears, with which rank and scope


def targets(model: Backbone) -> dict[str, Linear]:
    """Every linear that an adapter may be put on, by name."""
    named = model.blocks.named_modules(prefix="blocks")
    return {name: module for name, module in named if isinstance(module, Linear)}


def matches(name: str, pattern: str) -> bool:
    """`self_attn.q` and `*.o` match within a block, `blocks.3.ffn.0` in the model."""
    return fnmatchcase(name, pattern) or fnmatchcase(inside(name), pattern)


def inside(name: str) -> str:
    """`blocks.3.ffn.0` → `ffn.0`."""
    return name.split(".", 2)[2]


def _check(patterns: Mapping[str, str], names: list[str]) -> None:
    for pattern, key in patterns.items():
        if not any(matches(name, pattern) for name in names):
            there = ", ".join(dict.fromkeys(inside(name) for name in names))
            raise UserError(f"{key}: {pattern!r} matches no linear of the model; there are {there} in blocks.0 … ")


def _last_match(name: str, table: Mapping[str, Setting], default: Setting) -> Setting:
    return next((table[pattern] for pattern in reversed([*table]) if matches(name, pattern)), default)


def _span(name: str, scope: Scope, model: Backbone) -> tuple[int, int] | None:
    """Turn a scope into the first stream and the one past the last, or None for all; refuse what it cannot act on."""
    span = scope_span(scope, model.streams)
    if span == (0, len(model.streams)):
        return None
    block = model.blocks[name.split(".")[1]]
    assert isinstance(block, Block)
    if (read := block.reads(inside(name))) == "joined":
        raise UserError(
            f"lora.scope: {scope} has no tokens of its own, as this model joins its streams in channels; set it to all"
        )
    if read not in ("streams", "both"):
        what = "image" if read == "image" else "text"
        raise UserError(
            f"lora.targets: {inside(name)} acts on the {what}, which is the same for all streams: "
            f"it cannot have scope {scope!r}; leave it out or use `lora.scope: all`"
        )
    return span


def _own_streams(name: str, span: tuple[int, int] | None, model: Backbone) -> tuple[str, ...]:
    """Return the streams that get matrices of their own; none where one pair acts on a single stream anyway."""
    streams = model.streams[slice(*span)] if span else model.streams
    if len(streams) == 1:
        return ()
    block = model.blocks[name.split(".")[1]]
    assert isinstance(block, Block)
    if (read := block.reads(inside(name))) == "joined":
        raise UserError(
            "lora.per_stream: this model joins its streams in channels: no matrix acts on one alone; set it to false"
        )
    if span is None and read != "streams":
        what = {"both": "text too", "image": "image"}.get(read, "text")
        way_out = ", or use `lora.scope: aux`" if read == "both" else ""
        raise UserError(
            f"lora.per_stream: {inside(name)} acts on the {what}, which belongs to no stream; leave it out of "
            f"lora.targets{way_out}"
        )
    return tuple(streams)


def inject(
    model: Backbone, config: LoraConfig, *, seed: int = 0, scopes: Mapping[str, Scope] | None = None
) -> list[str]:
    """Put adapters on the targets and freeze the rest; returns the trainable names.

    Call it on the whole model, before `keep`: a pattern is then judged against all blocks, and on meta costs nothing.
    `scopes` overrides `lora.scope` by target pattern, for adapters that were made that way elsewhere.
    """
    linears, scopes = targets(model), scopes or {}
    chosen = config.targets or model.lora_targets
    patterns = dict.fromkeys(chosen, "lora.targets") | dict.fromkeys(config.ranks, "lora.ranks")
    _check(patterns | dict.fromkeys(scopes, "scopes"), list(linears))
    for name, linear in linears.items():
        if not any(matches(name, pattern) for pattern in chosen):
            continue
        rank = int(_last_match(name, config.ranks, config.rank))
        alpha = rank if config.alpha is None else config.alpha
        scale = alpha / (math.sqrt(rank) if config.rank_stabilized else rank)
        span = _span(name, _last_match(name, scopes, config.scope), model)
        own = _own_streams(name, span, model) if config.per_stream else ()
        span = span or ((0, len(own)) if own else None)
        how = {"rank": rank, "scale": scale, "dropout": config.dropout, "dora": config.kind == "dora"}
        model.set_submodule(name, LoraLinear(linear, **how, span=span, own=own))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    model.rgb_forward_only = _leaves_rgb_alone(model)
    reset_adapter(model, seed=seed)
    return list(adapter_parameters(model))


def _leaves_rgb_alone(model: Backbone) -> bool:
    """Tell whether what RGB computes depends on nothing that is trained: its backward pass is then left out."""
    spans = [linear.span for _, linear in lora_linears(model)]
    return not model.rgb_attends_aux and len(model.streams) > 1 and all(span and span[0] for span in spans)


def lora_linears(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


# -- values


def is_adapter(name: str) -> bool:
    return _OF_LINEAR.fullmatch(name) is not None or ".stream_embedding." in f".{name}"


def part_of(name: str) -> str:
    """`blocks.0.self_attn.q.lora_A.seg` → `lora_A`; nothing where the name is of no adapted linear."""
    found = _OF_LINEAR.fullmatch(name)
    return found["part"] if found else ""


def is_base(name: str) -> bool:
    """Tell whether a parameter is the base's; norms of the base's rows, which are small, belong to the adapter."""
    return not is_adapter(name) and not name.endswith(".weight_norm")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def first_value(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Make an adapter parameter's whole first value: A kaiming-uniform from (seed, name), all else zero."""
    if part_of(name) != DOWN:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    bound = 1 / math.sqrt(shape[1])  # kaiming_uniform with a = √5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _copy(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def reset_adapter(model: nn.Module, *, seed: int, assign: Assign = _copy) -> None:
    """First values; `assign` puts a whole tensor into a parameter that may hold a shard of it.

    Magnitudes are the norms of the base's rows: of this rank's, which are the same rows.
    """
    for name, parameter in adapter_parameters(model).items():
        if not parameter.is_meta:
            assign(parameter, first_value(name, parameter.shape, seed=seed))
    for _, module in lora_linears(model):
        if module.weight_norm is not None and not module.weight_norm.is_meta:
            magnitudes = [magnitude for *_, magnitude in module.pairs if magnitude is not None]
            for parameter in (module.weight_norm, *magnitudes):
                _copy(local(parameter), torch.linalg.vector_norm(_local_weight(module), dim=1))


def _local_weight(module: LoraLinear) -> Tensor:
    """Return the rows of a base's weight that are here, in fp32."""
    if module.quantized:
        data, scale = local(module.weight_data), local(module.weight_scale)
        return dequantize(data, scale, module.quantized, torch.float32)
    return local(module.weight).float()


def load_adapter(model: Backbone, tensors: Mapping[str, Tensor], *, assign: Assign = _copy) -> None:
    """Start from another adapter, by our names; stream embeddings that it lacks stay as they are.

    A DoRA that starts from a LoRA takes the norms that its rows have, so that it computes what that does.
    """
    ours = adapter_parameters(model)
    needed = [name for name in ours if part_of(name) in (DOWN, UP)]
    _check_kind(needed, ours, tensors)
    wrong = [f"{name} is missing" for name in needed if name not in tensors]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(parameter.shape)}"
        for name, parameter in ours.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    wrong += [f"{name} has no place" for name in tensors if name not in ours and _lives_here(model, name)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        downs = {name.partition(f".{DOWN}")[0]: len(t) for name, t in tensors.items() if part_of(name) == DOWN}
        parts = ", ".join(dict.fromkeys(target.split(".", 2)[-1] for target in downs))
        ranks = ", ".join(map(str, sorted(set(downs.values()))))
        raise UserError(
            f"lora.init_from: {'; '.join(wrong[:3])}{more}: make lora.targets and lora.rank fit the adapter, which has "
            f"rank {ranks} on {parts}"
        )
    for name, parameter in ours.items():
        if name in tensors:
            assign(parameter, tensors[name])
    for name, module in lora_linears(model):
        if module.lora_magnitude is not None:
            for place, pair in enumerate(module.pairs):
                end = f".{module.own[place]}" if module.own else ""
                if f"{name}.{MAGNITUDE}{end}" not in tensors:
                    _start_magnitude(module, pair, tensors[f"{name}.{DOWN}{end}"])


def _check_kind(needed: Sequence[str], ours: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter whose norms, or whose matrices for each stream, have no place at all in what is trained."""
    kinds = [
        ("the adapter is a DoRA: set lora.kind=dora", lambda name: part_of(name) == MAGNITUDE),
        (
            "the adapter has matrices for each stream: set lora.per_stream=true",
            lambda name: (found := _OF_LINEAR.fullmatch(name)) is not None and found["stream"] is not None,
        ),
    ]
    for told, is_one in kinds:
        if any(map(is_one, tensors)) and needed and not any(map(is_one, ours)):
            raise UserError(f"lora.init_from: {told}")


def _start_magnitude(module: LoraLinear, pair: Pair, down: Tensor) -> None:
    """Give the rows of a pair the norms that they have. down: its whole A, of which this rank may hold a part."""
    _, up, magnitude = pair
    assert magnitude is not None, "the pair of a DoRA"
    low = module.scale * local(up) @ down.to(up.device, torch.float32)
    weight = _local_weight(module).to(low.device)  # which may wait in host memory
    _copy(local(magnitude), torch.linalg.vector_norm(weight + low, dim=1))


def _lives_here(model: Backbone, name: str) -> bool:
    """Tell whether this stage would hold the name, were it in the model at all."""
    part, _, rest = name.partition(".")
    if part != "blocks":
        return getattr(model, part, None) is not None
    return rest.split(".")[0] in model.blocks
