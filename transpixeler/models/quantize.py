"""A frozen base in eight bits: int8 or fp8 weights of the blocks' linears, one scale an output row.

In: a model. Out: the same model with `….weight_data` and `….weight_scale` in place of `….weight`. Torchao does the
quantizing; what it makes is kept as plain frozen parameters, because its tensors cannot be sharded and plain ones can.
Rows are independent, so quantizing a shard of rows gives the same as sharding the quantized rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transpixeler.models.backbone import Backbone
from transpixeler.models.linear import INT8
from transpixeler.models.lora import targets

# Sharding takes float parameters only. Integers go by the float8 that every GPU's compiler takes: e4m3fn needs sm89.
STORED_AS = {INT8: torch.float8_e5m2, "fp8": torch.float8_e4m3fn}


def quantize_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[out, in] → (data [out, in] under a float8 dtype, scale [out, 1] in fp32)."""
    if weight.is_meta:
        data = torch.empty_like(weight, dtype=STORED_AS[kind])
        return data, torch.empty(weight.shape[0], 1, device="meta")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # version 2 is the default of the newest releases only, and the one that shows its numbers
    config = Int8WeightOnlyConfig(set_inductor_config=False, version=2) if kind == INT8 else Float8WeightOnlyConfig()
    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    quantize_(holder, config)
    made: Any = holder.weight
    assert made.scale.numel() == weight.shape[0], "one scale a row, or shards would not be what they are a part of"
    return made.qdata.view(STORED_AS[kind]), made.scale.detach().float().reshape(-1, 1)


def quantize(model: Backbone, kind: str) -> None:
    """Quantize every linear of the blocks in place; on meta only the shapes change."""
    for linear in targets(model).values():
        assert not linear.weight.requires_grad, "only a frozen weight can be quantized"
        data, scale = quantize_weight(linear.weight, kind)
        del linear.weight
        linear.quantized = kind
        linear.weight_data = nn.Parameter(data, requires_grad=False)
        linear.weight_scale = nn.Parameter(scale, requires_grad=False)
