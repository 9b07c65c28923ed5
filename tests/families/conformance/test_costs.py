"""For every family the sums over modules say what torch counts and what a block really keeps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.support.bytes_held import kept_for_backward
from tests.support.families.cases import CASES, Case, inputs
from tests.support.models import move
from transpixeler.config.sections import LoraConfig
from transpixeler.models.backbone import Backbone, apply_dtypes
from transpixeler.models.costs import Costs, forward_flops
from transpixeler.models.lora import inject
from transpixeler.models.streams import Shape, StreamLayout

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def counted(model: Backbone, layout: StreamLayout, given: Sequence[Tensor]) -> float:
    """Return torch's count of one sample's forward pass."""

    def in_place(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    def flash(q: torch.Size, k: torch.Size, *_: object, **__: object) -> int:
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    custom = {
        torch.ops.aten.baddbmm_: in_place,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counter, torch.no_grad():
        model(*given, layout=layout)
    return counter.get_total_flops()


@every_family
@pytest.mark.parametrize("attends", [True, False], ids=["seeing", "blind"])
@pytest.mark.parametrize(
    ("streams", "kind"), [(1, ""), (2, "lora"), (2, "dora")], ids=["one-stream", "adapted", "dora"]
)
def test_the_forward_pass_is_what_torch_counts(case: Case, streams: int, kind: str, attends: bool) -> None:
    model = case.model(streams, attends=attends)
    if kind:
        inject(model, LoraConfig(rank=3, kind=kind))  # type: ignore[arg-type]
    layout = model.layout(case.large)
    given = inputs(model, layout, batch=1, full=True)
    total = forward_flops(Costs.of(model, kept=False), layout.lengths).total
    assert total == pytest.approx(counted(model, layout, given), rel=0.01)


def larger(case: Case) -> Shape:
    """Return latents of 1024 tokens."""
    channels, frames, height, width = case.large
    return channels, frames, 2 * height, 2 * width


def kept(model: Backbone, case: Case, block: str) -> float:
    """Return the bytes that a block keeps for its backward pass, by storage, without what all blocks share."""
    layout = model.layout(larger(case))
    assert model.embed is not None
    shared = {p.untyped_storage()._cdata for p in model.parameters()}
    flow = model.embed(*inputs(model, layout, batch=1, full=True), layout=layout, dtype=model.matmul_dtype)
    seen = (x if x.requires_grad else x.detach().requires_grad_() for x in flow[: model.carried])
    flow = (*seen, *flow[model.carried :])  # as beyond the first block, where text that flows has seen the streams
    tokens = model.positions(layout, torch.device("cpu"))
    shared |= {tokens.rope.untyped_storage()._cdata, *(x.untyped_storage()._cdata for x in flow[model.carried :])}
    with kept_for_backward() as sizes:
        model.blocks[block](flow, tokens)
    return sum(size for key, size in sizes.items() if key not in shared)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["aux", "all", "dora", "full"])
def test_a_block_keeps_what_the_sum_says(case: Case, mode: str, dtype: torch.dtype) -> None:
    model = case.model(2)
    if mode != "full":
        dora = mode == "dora"
        inject(model, LoraConfig(rank=4, scope="aux" if dora else mode, kind="dora" if dora else "lora"))
        move(model, seed=1, names="stream")
    apply_dtypes(model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.float() if parameter.requires_grad else parameter.data  # as a stage is built
    lengths, said = model.layout(larger(case)).lengths, Costs.of(model).kept
    assert len(said) == len(model.blocks)
    kinds = {(type(model.blocks[block]), one.eager.bytes(lengths)): block for one, block in zip(said, model.blocks)}
    for (_, sum_of_parts), block in kinds.items():  # one of each kind
        assert sum_of_parts == pytest.approx(kept(model, case, block), rel=0.01), block


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_streams_with_matrices_of_their_own_cost_and_keep_what_is_said(kind: str) -> None:
    case = CASES["wan"]
    model = case.model(3)
    inject(model, LoraConfig(rank=4, kind=kind, per_stream=True))  # type: ignore[arg-type]
    layout = model.layout(case.large)
    given = inputs(model, layout, batch=1, full=True)
    total = forward_flops(Costs.of(model), layout.lengths).total
    assert total == pytest.approx(counted(model, layout, given), rel=0.01)
    lengths = model.layout(larger(case)).lengths
    for said, block in zip(Costs.of(model).kept, model.blocks, strict=True):
        assert said.eager.bytes(lengths) == pytest.approx(kept(model, case, block), rel=0.01), block
