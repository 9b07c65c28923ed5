"""The formulas for FLOPs and memory, held against what torch counts and against Wan's published sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import inputs, move, tiny
from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.costs import Costs, activation_bytes, discarded_flops, forward_flops, step_flops
from transpixeler.models.lora import inject

UNIT = 32_760  # tokens of 81 frames at 480×832
SIZES = {"1.3B": (1536, 8960, 12, 30), "14B": (5120, 13824, 40, 40)}
# linear, attention, forward, LoRA step with full recompute, attention's outputs kept, nothing recomputed; in TFLOP
TABLE = {
    ("1.3B", "single"): (82, 201, 283, 1143, 942, 882),
    ("1.3B", "joint"): (164, 797, 962, 4066, 3269, 3149),
    ("14B", "single"): (785, 893, 1678, 6253, 5360, 4744),
    ("14B", "joint"): (1569, 3544, 5113, 20415, 16871, 15640),
}


def published(size: str) -> Costs:
    width, ffn, heads, blocks = SIZES[size]
    config = WanConfig(num_attention_heads=heads, attention_head_dim=width // heads, ffn_dim=ffn, num_layers=blocks)
    with torch.device("meta"):
        model = WanModel(config, streams=("rgb", "seg"))
        inject(model, LoraConfig(rank=128))
        apply_dtypes(model, torch.bfloat16)
    return Costs.of(model)


@pytest.mark.parametrize(("size", "kind"), TABLE)
def test_published_sizes_cost_what_the_table_says(size: str, kind: str) -> None:
    d = published(size)
    lengths = (UNIT, UNIT) if kind == "joint" else (UNIT // 2, UNIT // 2)  # the adapter on half of either
    forward = forward_flops(d, lengths)
    steps = [step_flops(d, lengths, recompute=mode) for mode in ("full", "attention", "none")]
    found = [forward.linear, forward.attention, forward.linear + forward.attention, *steps]
    assert [value / 1e12 for value in found] == pytest.approx(TABLE[size, kind], rel=0.01)


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize(("streams", "lora"), [(1, False), (2, False), (2, True), (3, True)])
def test_the_forward_pass_is_what_torch_counts(streams: int, lora: bool, attends: bool) -> None:
    model = tiny(streams, attends=attends)
    if lora:
        inject(model, LoraConfig(rank=3, targets=("*.q", "*.o", "ffn.*"), ranks={"ffn.2": 5}, scope=("seg",)))
    layout = model.layout((4, 4, 16, 16))

    def in_place(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    def flash(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    custom = {
        torch.ops.aten.baddbmm_: in_place,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counter, torch.no_grad():
        model(*inputs(layout, batch=1), layout=layout)
    assert forward_flops(Costs.of(model, kept=False), layout.lengths).total == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def kept(model: WanModel) -> tuple[float, tuple[int, ...]]:
    """Bytes that a block alone keeps for its backward pass, by storage, and each stream's tokens."""
    layout = model.layout((4, 4, 32, 32))
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    flow = model.embed(*inputs(layout, batch=1), layout=layout, dtype=model.matmul_dtype)
    storages, alive = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    tokens = model.positions(layout, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.blocks["0"](flow, tokens)
    shared = parameters | {tensor.untyped_storage()._cdata for tensor in (tokens.rope, *flow[model.carried :])}
    return sum(size for key, size in storages.items() if key not in shared), layout.lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["aux", "all", "full"])
def test_a_block_keeps_what_the_costs_say(mode: str, dtype: torch.dtype) -> None:
    model = tiny(2, ffn_dim=192, attention_head_dim=48)
    if mode != "full":
        inject(model, LoraConfig(rank=4, scope=mode))
        move(model, seed=1, names="stream")
    apply_dtypes(model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.float() if parameter.requires_grad else parameter.data  # as a stage is built
    found, lengths = kept(model)
    assert Costs.of(model).kept[0].eager.bytes(lengths) == pytest.approx(found, rel=0.01)


def test_no_block_runs_where_nobody_asks_what_it_keeps() -> None:
    """A training's engine does not, which made half of the time that it took to build."""
    model, ran = tiny(2), []
    model.blocks["0"].register_forward_pre_hook(lambda *_: ran.append(1))
    asked = Costs.of(model, kept=False)
    assert not ran and asked == dataclasses.replace(Costs.of(model), kept=()) and ran


def test_modes_of_recompute_stand_in_the_right_order() -> None:
    d = published("1.3B")
    modes = ["none", 3, 2, "attention", "full", "offload"]
    sizes = [activation_bytes(d, (UNIT, UNIT), size=2, recompute=mode, compiled=True) for mode in modes]
    assert sizes == sorted(sizes, reverse=True)
    flops = [step_flops(d, (UNIT, UNIT), recompute=mode) for mode in ("none", 3, 2, 1)]
    assert flops == sorted(flops)
    again = forward_flops(d, (UNIT, UNIT)).total - discarded_flops(d, (UNIT, UNIT))
    assert flops[1] - flops[0] == pytest.approx(again / 3)
    assert flops[-1] == step_flops(d, (UNIT, UNIT), recompute="full")
