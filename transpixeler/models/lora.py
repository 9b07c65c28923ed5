"""The adapter: low-rank matrices beside frozen linears, on the tokens of some streams.

In: a model and a `LoraConfig`. Out: the same model whose targeted linears are `LoraLinear` under their old names, with
nothing trainable but the adapter (`….lora_A`, `….lora_B`, of a DoRA `….lora_magnitude`, the stream embeddings). First
values are a pure function of (seed, name) and the base, so they are the same on any layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.models.backbone import Backbone, Block
from transpixeler.models.linear import (
    Linear,
    activated,
    adapted_norms,
    dequantize,
    full_weight,
    project,
    row_factors,
)
from transpixeler.models.streams import Scope, scope_span, span_slice

Setting = TypeVar("Setting")

Assign = Callable[[nn.Parameter, Tensor], None]
MAGNITUDE = ".lora_magnitude"


class LoraLinear(Linear):
    """A frozen linear and its fp32 adapter on the tokens of `span` (first and past the last stream; None for all).

    dora: the rows of the changed weight have trained norms, `lora_magnitude`, which start as the base's. Those stay
    beside it as `weight_norm`, a frozen parameter, so that they are sharded as the weight's rows are.
    """

    lora_magnitude: nn.Parameter | None
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
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.quantized = base.in_features, base.out_features, base.quantized
        self._parameters.update(base._parameters)
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        self.lora_magnitude = self.weight_norm = None
        if dora:
            norms = torch.empty(2, base.out_features, device=device, dtype=torch.float32)
            self.lora_magnitude = nn.Parameter(norms[0].clone())
            self.weight_norm = nn.Parameter(norms[1].clone(), requires_grad=False)
        self.rank, self.scale, self.dropout, self.span = rank, scale, dropout, span
        self.train(base.training)

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
    ) -> Tensor:
        scope, how = self.scope(x, lengths), {"gelu": gelu, "needs_output": needs_output}
        if scope.start == scope.stop and not torch.is_grad_enabled():  # a run of tokens without any in scope
            return project(x, self, gelu=gelu, needs_output=needs_output)
        if not (self.training and self.dropout):
            adapter = self.lora_A, self.lora_B, self.lora_magnitude, self.weight_norm
            return project(x, self, *adapter, scale=self.scale, scope=scope, part=part, **how)
        x = activated(x, gelu)
        y = project(x, self) if self.quantized else F.linear(x, self.weight, self.bias)
        inner = F.linear(F.dropout(x[:, scope], self.dropout), self.lora_A.to(x.dtype))
        low = F.linear(inner, (self.lora_B * self.scale).to(x.dtype))
        changed = y[:, scope] + low
        if self.lora_magnitude is not None:
            factor = row_factors(self.lora_magnitude, cast(Tensor, self.weight_norm), self._norms(x.dtype))
            changed = factor * changed + (0 if self.bias is None else (1 - factor) * self.bias)
        # in place, autograd refuses a y that needs no gradient itself, as of text
        return y.slice_scatter(changed.to(y.dtype), 1, scope.start, scope.stop)

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        return adapted_norms(
            full_weight(self, dtype), cast(Tensor, self.weight_norm), self.lora_A, self.lora_B, self.scale
        )


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
    if (read := block.reads(inside(name))) not in ("streams", "both"):
        what = "image" if read == "image" else "text"
        raise UserError(
            f"lora.targets: {inside(name)} acts on the {what}, which is the same for all streams: "
            f"it cannot have scope {scope!r}; leave it out or use `lora.scope: all`"
        )
    return span


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
        dora = config.kind == "dora"
        adapted = LoraLinear(linear, rank=rank, scale=scale, dropout=config.dropout, span=span, dora=dora)
        model.set_submodule(name, adapted)
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
    return name.endswith((".lora_A", ".lora_B", ".lora_magnitude")) or ".stream_embedding." in f".{name}"


def is_base(name: str) -> bool:
    """Tell whether a parameter is the base's; norms of the base's rows, which are small, belong to the adapter."""
    return not is_adapter(name) and not name.endswith(".weight_norm")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def first_value(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Make an adapter parameter's whole first value: A kaiming-uniform from (seed, name), all else zero."""
    if not name.endswith(".lora_A"):
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
            for parameter in (module.weight_norm, module.lora_magnitude):
                _copy(_local(parameter), torch.linalg.vector_norm(_local_weight(module), dim=1))


def _local(parameter: Tensor | None) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _local_weight(module: LoraLinear) -> Tensor:
    """Return the rows of a base's weight that are here, in fp32."""
    if module.quantized:
        data, scale = _local(module.weight_data), _local(module.weight_scale)
        return dequantize(data, scale, module.quantized, torch.float32)
    return _local(module.weight).float()


def load_adapter(model: Backbone, tensors: Mapping[str, Tensor], *, assign: Assign = _copy) -> None:
    """Start from another adapter, by our names; stream embeddings that it lacks stay as they are.

    A DoRA that starts from a LoRA takes the norms that its rows have, so that it computes what that does.
    """
    ours = adapter_parameters(model)
    needed = [name for name in ours if name.endswith((".lora_A", ".lora_B"))]
    if any(name.endswith(MAGNITUDE) for name in tensors) and needed and not any(n.endswith(MAGNITUDE) for n in ours):
        raise UserError("lora.init_from: the adapter is a DoRA: set lora.kind=dora")
    wrong = [f"{name} is missing" for name in needed if name not in tensors]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, not {list(parameter.shape)}"
        for name, parameter in ours.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    wrong += [f"{name} has no place" for name in tensors if name not in ours and _lives_here(model, name)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        downs = {name.removesuffix(".lora_A"): t.shape[0] for name, t in tensors.items() if name.endswith(".lora_A")}
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
        if module.lora_magnitude is not None and f"{name}{MAGNITUDE}" not in tensors:
            down = tensors[f"{name}.lora_A"].to(module.lora_B.device, torch.float32)
            low = module.scale * _local(module.lora_B) @ down
            weight = _local_weight(module).to(low.device)  # which may wait in host memory
            _copy(_local(module.lora_magnitude), torch.linalg.vector_norm(weight + low, dim=1))


def _lives_here(model: Backbone, name: str) -> bool:
    """Tell whether this stage would hold the name, were it in the model at all."""
    part, _, rest = name.partition(".")
    if part != "blocks":
        return getattr(model, part, None) is not None
    return rest.split(".")[0] in model.blocks
