"""What acts on tokens by themselves runs over pieces of a sequence: the same is learned, and less is held at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from tests.families.conformance.test_forward_only import adapted, cut
from tests.support.bytes_held import BytesHeld
from tests.support.families.cases import CASES, Case, inputs
from tests.support.models import move
from transpixeler.config.sections import LoraConfig
from transpixeler.models import pieces
from transpixeler.models.backbone import Backbone
from transpixeler.models.lora import inject, lora_linears
from transpixeler.models.pieces import Piece
from transpixeler.models.quantize import quantize
from transpixeler.models.streams import StreamLayout
from transpixeler.models.tokens import Tokens
from transpixeler.parallel.shard import set_chunk, set_recompute

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SEVEN = 14  # tokens of a batch of two, so that pieces begin and end inside of streams, time groups and text


def gradients(model: Backbone, layout: StreamLayout, mode: str) -> list[torch.Tensor]:
    """Return predictions and the gradients of all that trains."""
    set_recompute(model.block_list(), mode)
    torch.manual_seed(0)  # for dropout
    out = model(*inputs(model, layout), layout=layout)
    out.square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out.detach(), *(torch.zeros(1) if p.grad is None else p.grad for p in trained)]


def same(model: Backbone, layout: StreamLayout, mode: str = "full", chunk: int = SEVEN) -> bool:
    """Return whether pieces of seven tokens of each sample give what all tokens at once do."""
    twin = copy.deepcopy(model)
    set_chunk(twin, chunk)
    pairs = zip(gradients(twin, layout, mode), gradients(model, layout, mode), strict=True)
    return all((mine - other).abs().max() <= max(5e-6, 5e-6 * other.abs().max()) for mine, other in pairs)


@every_family
def test_the_gradients_are_the_same(case: Case) -> None:
    """On other layouts of ranks, in other modes and kinds of training, see `test_layouts`."""
    model = adapted(case, 2, attends=True)
    assert same(model, cut(model, case))


def dora(case: Case) -> Backbone:
    model = case.model(2)
    inject(model, LoraConfig(rank=4, kind="dora"))
    move(model, seed=1, names="lora")
    return model


def per_stream(case: Case) -> Backbone:
    model = case.model(3)
    inject(model, LoraConfig(rank=4, per_stream=True))
    move(model, seed=1, names="lora")
    return model


def quantized(case: Case) -> Backbone:
    model = adapted(case, 2, attends=True)
    quantize(model, "int8")
    return model


@pytest.mark.parametrize(
    "make", [dora, per_stream, quantized, lambda case: case.model(2)], ids=["dora", "own", "int8", "full"]
)
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_the_gradients_of_other_kinds_are_the_same(family: str, make: Callable[[Case], Backbone]) -> None:
    model = make(CASES[family])
    assert same(model, cut(model, CASES[family]))


def test_a_companion_of_half_the_size_is_cut_as_well() -> None:
    model = adapted(CASES["wan"], 2, attends=True)
    shapes = (4, 2, 8, 8), (4, 2, 4, 4)
    assert same(model, StreamLayout(tuple(model.streams), shapes, model.patch, scales=(1, 2)))


def test_dropout_draws_the_same_in_the_backward_pass() -> None:
    """Pieces draw in another order than all tokens at once, so the gradient is held against differences."""
    model = adapted(CASES["wan"], 2, attends=True).train()
    for _, linear in lora_linears(model):
        linear.dropout = 0.5
    set_chunk(model, SEVEN)
    layout, name = cut(model, CASES["wan"]), "blocks.1.ffn.2.lora_B"
    gradients(model, layout, "full")
    up = model.get_parameter(name)
    grad, step = up.grad, torch.randn(up.shape, generator=torch.Generator().manual_seed(1))
    assert grad is not None
    grad = grad.clone()  # further calls add to it
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            up += sign * 1e-2 * step
        losses.append(gradients(model, layout, "full")[0].double().square().mean())
        with torch.no_grad():
            up -= sign * 1e-2 * step
    assert float((losses[0] - losses[1]) / 2e-2) == pytest.approx(float((grad * step).sum()), rel=1e-2)


CUT = Tokens.piece


def _one_group(tokens: Tokens, start: int, stop: int) -> Tokens:
    return CUT(tokens, start, stop)._replace(groups=(stop - start, *[0] * (len(tokens.groups) - 1)))


def _last_alone(self: pieces._Sum, cut: Piece, grad: torch.Tensor | None) -> None:
    if grad is not None:
        self.total = torch.zeros_like(self.of) if self.total is None else self.total
        self.job.part(cut, self.place, self.total).copy_(grad)


@pytest.mark.parametrize(
    ("where", "name", "broken"), [(Tokens, "piece", _one_group), (pieces._Sum, "add", _last_alone)]
)
def test_pieces_that_are_cut_or_summed_wrong_are_caught(where: type, name: str, broken: object, monkeypatch) -> None:
    model = adapted(CASES["wan"], 2, attends=True)
    layout = cut(model, CASES["wan"])
    monkeypatch.setattr(where, name, broken)
    assert not same(model, layout)


# --- memory ----------------------------------------------------------------------------------------------------------


def beyond(model: Backbone, frames: int, chunk: int) -> int:
    """Return the bytes that a block's end and the head take at the worst moment beyond what goes in and comes out."""
    set_chunk(model, chunk)
    channels, _, height, width = CASES["wan"].large
    layout = model.layout((channels, frames, height, width))
    tokens = model.tokens(layout, torch.device("cpu"))._replace(copy_scope=False)
    assert model.embed is not None and model.head is not None
    with torch.no_grad():
        flow = model.embed(*inputs(model, layout, batch=1), layout=layout, dtype=torch.float32)
    hidden, seen = flow[0].requires_grad_(), torch.randn(1, layout.tokens, model.heads, model.width // model.heads)
    seen.requires_grad_()
    with BytesHeld() as bytes_held:
        (out,) = model.block_list()[0].finish_by_token((hidden, *flow[1:]), seen, (), tokens)
        values = model.head.values_by_token((out, *flow[1:]), tokens, model)
        values.backward(torch.ones_like(values))
    at_ends = 6 * hidden.nbytes + 3 * values.nbytes  # the three and their gradients; values, ones and theirs
    return bytes_held.peak - at_ends


def test_memory_beyond_the_ends_does_not_grow_with_the_sequence() -> None:
    model = adapted(CASES["wan"], 2, attends=True)
    whole = [beyond(model, frames, 0) for frames in (4, 8, 16)]
    flat = [beyond(model, frames, 256) for frames in (4, 8, 16)]
    assert whole[2] > 3 * whole[0]
    assert flat[2] < 1.1 * flat[0]


def test_compiled_blocks_learn_the_same() -> None:
    model = adapted(CASES["wan"], 2, attends=True)
    layout, twin = cut(model, CASES["wan"]), copy.deepcopy(model)
    set_chunk(twin, layout.tokens)  # two pieces
    twin.block_list()[1].compile(dynamic=False, fullgraph=True, backend="aot_eager")
    pairs = zip(gradients(twin, layout, "full"), gradients(model, layout, "full"), strict=True)
    assert all((mine - other).abs().max() <= 5e-6 for mine, other in pairs)
