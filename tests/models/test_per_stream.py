"""Streams with matrices of their own: held against the slow formula of each, and one matmul where they are alike."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.models import inputs, move, tiny, without_embeddings
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan.model import WanModel
from transpixeler.models import lowrank
from transpixeler.models.linear import Linear
from transpixeler.models.lora import LoraLinear, adapter_parameters, inject, load_adapter, lora_linears, reset_adapter
from transpixeler.models.streams import StreamLayout

SHAPE = (4, 2, 4, 6)
AUX = LoraConfig(rank=3, alpha=6.0, per_stream=True)
OWN = ("seg", "depth")
ALIKE, UNLIKE = (8, 10, 10), (8, 4, 12)


def adapted(*, dora: bool = False, bias: bool = True) -> LoraLinear:
    """Make a linear of 24 × 32 in float64, whose two companions have moved matrices of their own."""
    torch.manual_seed(0)
    base = Linear(24, 32, bias=bias).requires_grad_(False)
    module = LoraLinear(base, rank=4, scale=1.5, span=(1, 3), dora=dora, own=OWN)
    reset_adapter(torch.nn.ModuleDict({"linear": module}), seed=3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora" in name:
                parameter.normal_()
    module.double()
    if dora:
        module.weight_norm.data = module.weight.norm(dim=1)  # type: ignore[union-attr]
    return module


def slowly(module: LoraLinear, x: Tensor, leaves: dict[str, Tensor], lengths: tuple[int, ...], twin: str) -> Tensor:
    """Write y = m / ‖W + s·B A‖ ⊙ (W + s·B A) x + b out for each stream, from parameters by name."""
    weight, parts = module.weight, list(x.split(lengths, 1))
    norm = weight.norm(dim=1)
    plain = F.linear(parts[0], weight, module.bias)
    names = OWN[::-1] if twin == "another's matrices" else OWN
    found = [plain]
    for name, part in zip(names, parts[1:], strict=True):
        both = weight + module.scale * leaves[f"lora_B.{name}"] @ leaves[f"lora_A.{name}"]
        if f"lora_magnitude.{name}" in leaves:
            own = norm if twin == "the norm of the base" else both.detach().norm(dim=1)
            both = (leaves[f"lora_magnitude.{name}"] / own)[:, None] * both
        found.append(F.linear(part, both, module.bias))
    return torch.cat(found, dim=1)


def off(module: LoraLinear, lengths: tuple[int, ...], *, twin: str = "", **how: bool) -> float:
    """Return how far output and gradients are from the slow formula's, of their norms."""
    x = torch.randn(2, sum(lengths), 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, sum(lengths), 32, dtype=torch.float64)
    found = module(x, lengths, **how)
    found.backward(weights)
    ours = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
    slow_x = x.detach().clone().requires_grad_()
    a = F.gelu(slow_x, approximate="tanh") if how.get("gelu") else slow_x
    expected = slowly(module, a, leaves, lengths, twin)
    expected.backward(weights)
    pairs: list[Any] = [(x.grad, slow_x.grad), *((p.grad, leaves[name].grad) for name, p in ours.items())]
    pairs += [(found, expected)] * how.get("needs_output", True)
    module.zero_grad()
    return max(float(((a - b).norm() / b.norm().clamp_min(1e-9)).detach()) for a, b in pairs)


@pytest.mark.parametrize("lengths", [ALIKE, UNLIKE, (8, 0, 20)], ids=["alike", "unlike", "one-empty"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_output_and_all_gradients_are_those_of_the_slow_formula(dora: bool, lengths: tuple[int, ...]) -> None:
    for bias in (True, False):
        module = adapted(dora=dora, bias=bias)
        for gelu in (False, True):
            assert off(module, lengths, gelu=gelu) < 1e-12
            assert off(module, lengths, gelu=gelu, needs_output=False) < 1e-12  # as in a recomputation


@pytest.mark.parametrize(
    ("dora", "twin"), [(False, "another's matrices"), (True, "another's matrices"), (True, "the norm of the base")]
)
def test_a_twin_of_the_formula_is_caught(dora: bool, twin: str) -> None:
    for lengths in (ALIKE, UNLIKE):
        if twin != "another's matrices" or lengths == ALIKE:
            assert off(adapted(dora=dora), lengths, twin=twin) > 1e-3


def test_a_twin_that_batches_runs_of_unlike_lengths_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as many tokens for each companion."""
    real = lowrank.product
    monkeypatch.setattr(
        "transpixeler.models.linear.product",
        lambda x, matrices, runs: real(x, matrices, [sum(runs) // len(runs)] * len(runs)),
    )
    assert off(adapted(), ALIKE) < 1e-12
    assert off(adapted(), UNLIKE) > 1e-3


class _Matmuls(TorchDispatchMode):
    """Record the sizes of batched matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.baddbmm_.default, torch.ops.aten.bmm.default):
            self.found.append(tuple(args[-2].shape))
        return func(*args, **(kwargs or {}))


def test_companions_of_one_length_go_through_one_matmul_each_with_its_own() -> None:
    x = torch.randn(1, 28, 24, dtype=torch.float64, requires_grad=True)
    with _Matmuls() as alike:
        adapted()(x, ALIKE).sum().backward()
    assert alike.found == [(2, 10, 24), (2, 10, 4), (2, 10, 32), (2, 4, 10), (2, 32, 10), (2, 10, 4)]
    with _Matmuls() as unlike:
        adapted()(x[:, :24], UNLIKE).sum().backward()
    assert len(unlike.found) == 2 * len(alike.found) and {size[0] for size in unlike.found} == {1}


# --- on a model ------------------------------------------------------------------------------------------------------


def output(model: WanModel, layout: StreamLayout | None = None) -> Tensor:
    layout = layout or model.layout(SHAPE)
    return model(*inputs(layout), layout=layout)


def moved(config: LoraConfig, streams: int = 3) -> WanModel:
    model = tiny(streams)
    inject(model, config)
    move(model, seed=1, names="lora_A")
    move(model, seed=2, names="lora_B")
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_single_companion_is_a_plain_adapter_to_the_bit(kind: str) -> None:
    models = []
    for each in (True, False):
        model = tiny(2)
        inject(model, replace(AUX, kind=kind, per_stream=each), seed=4)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            output(model).square().sum().backward()
            optimizer.step()
        models.append(model)
    one, two = (adapter_parameters(model) for model in models)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_each_companion_alone_changes_its_own_tokens_as_an_adapter_of_its_scope_does() -> None:
    """With B zero for all but one, the model is that of an adapter whose scope is that one stream."""
    model, layout = moved(AUX), tiny(3).layout(SHAPE)
    with torch.no_grad():
        for _, module in lora_linears(model):
            module.lora_B["seg"].zero_()  # type: ignore[index]
    plain = tiny(3)
    inject(plain, replace(AUX, scope=("depth",)))
    assert not any(module.own for _, module in lora_linears(plain)), "one stream needs no matrices by name"
    given = {re.sub(r"(lora_.)\.depth", r"\1", name): p for name, p in adapter_parameters(model).items()}
    load_adapter(plain, {name: given[name] for name in adapter_parameters(plain)})
    torch.testing.assert_close(output(model, layout), output(plain, layout), atol=1e-5, rtol=1e-5)
    assert not torch.equal(output(model, layout), output(tiny(3), layout))


def test_a_zero_b_leaves_the_model_bit_identical() -> None:
    for kind in ("lora", "dora"):
        plain, model = without_embeddings(tiny(3)), tiny(3)
        inject(model, replace(AUX, kind=kind, scope="all"))  # type: ignore[arg-type]
        without_embeddings(model)
        assert torch.equal(output(plain), output(model))


def test_scopes_say_which_streams_have_their_own() -> None:
    for scope, own in (("aux", OWN), ("all", ("rgb", *OWN)), (("rgb", "seg"), ("rgb", "seg"))):
        model = tiny(3)
        inject(model, replace(AUX, scope=scope))  # type: ignore[arg-type]
        assert {module.own for _, module in lora_linears(model)} == {own}
        assert {n.rsplit(".", 1)[1] for n in adapter_parameters(model) if "lora_" in n} == set(own)
        values = [p for n, p in adapter_parameters(model).items() if ".0.self_attn.q.lora_A." in n]
        assert not torch.equal(values[0], values[1]), "they start apart"
    with pytest.raises(
        UserError, match=r"lora\.per_stream: cross_attn\.k acts on the text, which belongs to no stream"
    ):
        inject(tiny(3), replace(AUX, scope="all", targets=("cross_attn.k",)))
    inject(tiny(1), replace(AUX, scope="all", targets=("cross_attn.k",)))  # which has one stream alone


def test_it_starts_from_a_lora_of_its_own_and_another_kind_is_refused() -> None:
    source, model = moved(AUX), tiny(3)
    inject(model, replace(AUX, kind="dora"))
    load_adapter(model, adapter_parameters(source))
    torch.testing.assert_close(output(model), output(source), atol=1e-5, rtol=1e-5)
    shared = tiny(3)
    inject(shared, replace(AUX, per_stream=False))
    with pytest.raises(UserError, match=r"has matrices for each stream: set lora\.per_stream=true"):
        load_adapter(shared, adapter_parameters(source))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_acts_on_the_low_rank_parts_in_training_alone(dora: bool) -> None:
    module, x = adapted(dora=dora), torch.randn(1, 24, 24, dtype=torch.float64)
    module.dropout = 0.5
    kept = module.eval()(x, UNLIKE)
    drawn = module.train()(x, UNLIKE)
    assert torch.equal(drawn[:, :8], kept[:, :8]) and not torch.isclose(drawn[:, 8:], kept[:, 8:]).all()
    module.dropout = 1e-9
    torch.testing.assert_close(module(x, UNLIKE), kept)


def test_it_compiles_without_a_graph_break() -> None:
    module, x = adapted(dora=True), torch.randn(1, 28, 24, dtype=torch.float64)
    found = {}
    for name, run in (("eager", module), ("compiled", torch.compile(module, backend="aot_eager", fullgraph=True))):
        run(x, ALIKE).square().sum().backward()
        found[name] = [p.grad for p in module.parameters() if p.requires_grad]
        module.zero_grad()
    assert all(torch.allclose(one, two) for one, two in zip(*found.values(), strict=True))
