"""A DoRA: rows of the changed weight with norms of their own, on the tokens in scope, held against the slow formula."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.adapters import compiles_to_the_same
from tests.support.models import inputs, move, tiny, without_embeddings
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan.model import WanModel
from transpixeler.models import linear as linears
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.linear import Linear, full_weight, project
from transpixeler.models.lora import (
    LoraLinear,
    adapter_parameters,
    inject,
    load_adapter,
    lora_linears,
    reset_adapter,
)
from transpixeler.models.quantize import quantize, quantize_weight

SHAPE = (4, 2, 4, 6)
AUX = LoraConfig(rank=3, alpha=6.0, kind="dora")
LENGTHS, SCOPE = (8, 10, 12), slice(8, 18)
TRAINED = ("lora_A", "lora_B", "lora_magnitude")


def adapted(dtype: torch.dtype = torch.float32, *, bias: bool = True, quantized: str = "") -> LoraLinear:
    """A linear of 24 × 32 with a DoRA on the middle stream, as it starts."""
    torch.manual_seed(0)
    base = Linear(24, 32, bias=bias).requires_grad_(False)
    if quantized:
        data, scale = quantize_weight(base.weight, quantized)
        del base.weight
        base.quantized = quantized
        base.weight_data = torch.nn.Parameter(data, requires_grad=False)
        base.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.itemsize > 1 and not quantized else parameter.data
    module = LoraLinear(base, rank=4, scale=1.5, span=(1, 2), dora=True)
    reset_adapter(torch.nn.ModuleDict({"linear": module}), seed=3)
    if dtype == torch.float64:
        for name in (*TRAINED, "weight_norm"):
            parameter = module.get_parameter(name)
            parameter.data = parameter.double()
        module.weight_norm.data = module.weight.norm(dim=1)  # type: ignore[union-attr]
        module.lora_magnitude.data = module.weight.norm(dim=1)  # type: ignore[union-attr]
    return module


def moved(module: LoraLinear) -> LoraLinear:
    torch.manual_seed(1)
    with torch.no_grad():
        module.lora_A.normal_()
        module.lora_B.normal_()
        module.lora_magnitude.mul_(1 + 0.3 * torch.randn_like(module.lora_magnitude))  # type: ignore[union-attr]
    return module


def slowly(module: LoraLinear, x: Tensor, leaves: list[Tensor], *, gelu: bool, twin: str = "") -> Tensor:
    """y = m / ‖W + s·B A‖ ⊙ (W a + s·B A a) + b in the scope, W a + b beyond it; the norm is a constant."""
    down, up, magnitude = leaves
    weight = full_weight(module, torch.float32).detach().to(down.dtype)
    bias = 0 if module.bias is None else module.bias.detach().to(down.dtype)
    a = F.gelu(x, approximate="tanh") if gelu else x
    both = weight + (1.0 if twin == "no scale" else module.scale) * up @ down
    norms = both.norm(dim=1) if twin == "a norm that learns" else both.detach().norm(dim=1)
    if twin == "the norm of the base":
        norms = weight.norm(dim=1)
    middle = magnitude / norms * (a[:, SCOPE] @ both.T) + (bias * magnitude / norms if twin == "bias inside" else bias)
    plain = a @ weight.T + bias
    return torch.cat([plain[:, : SCOPE.start], middle, plain[:, SCOPE.stop :]], dim=1)


def off(module: LoraLinear, *, gelu: bool, twin: str = "", needs_output: bool = True) -> float:
    """Return how far output and gradients are from the slow formula's, of their norms."""
    wide = module.lora_A.dtype
    dtype = torch.float32 if module.quantized else module.weight.dtype
    x = torch.randn(2, 30, 24, dtype=dtype, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weights = torch.randn(2, 30, 32, dtype=wide, generator=torch.Generator().manual_seed(3))
    found = module(x, LENGTHS, gelu=gelu, needs_output=needs_output)
    found.backward(weights.to(found.dtype))
    leaves = [p.detach().to(wide).clone().requires_grad_() for p in (x, *(module.get_parameter(n) for n in TRAINED))]
    expected = slowly(module, leaves[0], leaves[1:], gelu=gelu, twin=twin)
    expected.backward(weights)
    pairs = [(p.grad, leaf.grad) for p, leaf in zip((x, *(module.get_parameter(n) for n in TRAINED)), leaves)]
    pairs += [(found, expected)] * needs_output
    module.zero_grad()
    return max(float((a.detach().to(wide) - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_output_and_all_gradients_are_those_of_the_slow_formula(
    gelu: bool, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    module = moved(adapted(dtype, bias=bias))
    assert off(module, gelu=gelu) < tolerance
    assert off(module, gelu=gelu, needs_output=False) < tolerance  # as in a recomputation


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_base_gives_the_slow_formula_of_what_it_holds(kind: str) -> None:
    assert off(moved(adapted(quantized=kind)), gelu=False) < 1e-5


@pytest.mark.parametrize("twin", ["no scale", "a norm that learns", "the norm of the base", "bias inside"])
def test_a_twin_of_the_formula_is_caught(twin: str) -> None:
    assert off(moved(adapted()), gelu=False, twin=twin) > 1e-3


def test_a_twin_without_the_cross_term_of_the_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(weight: Tensor, norm: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        return (norm.square() + scale**2 * (up @ down).square().sum(1)).sqrt()

    monkeypatch.setattr(linears, "adapted_norms", twin)
    assert off(moved(adapted()), gelu=False) > 1e-3


@pytest.mark.parametrize("quantized", ["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["aux", "all"])
def test_a_zero_b_leaves_the_model_bit_identical(scope: str, dtype: torch.dtype, quantized: str) -> None:
    plain, model = without_embeddings(tiny(2)), tiny(2)
    for one in (plain, model):
        one.requires_grad_(False)
        if quantized:
            quantize(one, quantized)
    inject(model, replace(AUX, scope=scope))  # type: ignore[arg-type]
    for one in (plain, model):
        apply_dtypes(one, dtype)
    reset_adapter(model, seed=0)  # with the norms of the weights as they are now
    assert torch.equal(output(plain), output(model))
    with torch.no_grad():
        for _, module in lora_linears(model):
            module.lora_magnitude.mul_(1.1)  # type: ignore[union-attr]
    assert not torch.equal(output(plain), output(model))


def output(model: WanModel) -> Tensor:
    layout = model.layout(SHAPE)
    return model(*inputs(layout), layout=layout)


def test_tokens_out_of_scope_see_the_bases_projections_exactly() -> None:
    module, x = moved(adapted()), torch.randn(2, 30, 24)
    found, plain = module(x, LENGTHS), project(x, module)
    assert torch.equal(found[:, :8], plain[:, :8]) and torch.equal(found[:, 18:], plain[:, 18:])
    assert not torch.isclose(found[:, SCOPE], plain[:, SCOPE], atol=1e-3).all()


def test_rows_of_zeros_have_no_norm_to_keep_and_learn_as_a_loras() -> None:
    module = adapted()
    with torch.no_grad():
        module.weight[3] = 0
    reset_adapter(torch.nn.ModuleDict({"linear": module}), seed=3)
    x = torch.randn(2, 30, 24)
    module(x, LENGTHS).sum().backward()
    assert torch.isfinite(module(x, LENGTHS)).all()
    assert module.lora_B.grad[3].any() and not module.lora_magnitude.grad[3]  # type: ignore[index,union-attr]


def test_what_is_kept_for_the_backward_pass_does_not_keep_itself() -> None:
    module, x = adapted(), torch.randn(2, 30, 24, requires_grad=True)
    y = module(x, LENGTHS)
    alive = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_dropout_acts_on_the_low_rank_part_in_training_alone() -> None:
    module, x = moved(adapted()), torch.randn(1, 30, 24)
    module.dropout = 0.5
    kept = module.eval()(x, LENGTHS)
    drawn = torch.stack([module.train()(x, LENGTHS).detach() for _ in range(400)])
    assert torch.equal(drawn[:, :, :8], kept[:, :8].expand(400, -1, -1, -1))
    assert drawn[:, :, SCOPE].std(0).mean() > 0.1
    torch.testing.assert_close(drawn.mean(0), kept, atol=0.6, rtol=0)
    module(x, LENGTHS).sum().backward()
    assert all(module.get_parameter(name).grad.any() for name in TRAINED)  # type: ignore[union-attr]
    module.dropout = 1e-9
    torch.testing.assert_close(module(x, LENGTHS), kept)


def test_it_starts_from_a_lora_as_it_is_and_a_lora_starts_from_none() -> None:
    source, model = tiny(2), tiny(2)
    inject(source, replace(AUX, kind="lora"))
    move(source, seed=11, names=".lora_")
    inject(model, AUX)
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(source).items()}
    load_adapter(model, tensors)
    torch.testing.assert_close(output(model), output(source))
    with pytest.raises(UserError, match=r"the adapter is a DoRA: set lora\.kind=dora"):
        load_adapter(source, adapter_parameters(model))


def test_a_block_compiles_without_a_graph_break() -> None:
    model = tiny(2)
    inject(model, AUX)
    for _, module in lora_linears(model):
        moved(module)
    compiles_to_the_same(model, output)
