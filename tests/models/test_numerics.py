"""Numbers that a bf16 model must not round: an adapter's gradients, a quantized weight's scale."""

from __future__ import annotations

import pytest
import torch

from transpixeler.models.linear import Linear, dequantize
from transpixeler.models.lora import LoraLinear
from transpixeler.models.quantize import quantize_weight

TOKENS = 4096


def gradients(linear: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the gradients of a linear's fp32 parameters for one long row of tokens that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, 16, generator=generator).bfloat16().to(dtype)
    back = torch.ones(1, TOKENS, 16, dtype=dtype)
    linear(x, (TOKENS,)).backward(back)
    return [parameter.grad for parameter in linear.parameters() if parameter.grad is not None]


def adapted() -> LoraLinear:
    base = Linear(16, 16, bias=False)
    base.weight.data = torch.eye(16)
    linear = LoraLinear(base, rank=2, scale=1.0)
    linear.lora_A.data, linear.lora_B.data = torch.ones(2, 16), torch.ones(16, 2)  # which bf16 holds too
    return linear


def test_gradients_of_an_adapter_are_not_rounded_to_bf16() -> None:
    """grad_A = Bᵀ·1 xᵀ: sums of x, which bf16 holds to three digits alone."""
    for exact, found in zip(gradients(adapted(), torch.float32)[:1], gradients(adapted(), torch.bfloat16)[:1]):
        assert not torch.equal(exact, exact.bfloat16().float())
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)


def test_gradients_of_a_trained_weight_are_not_rounded_to_bf16() -> None:
    weight = Linear(16, 16, bias=False)
    with torch.no_grad():
        weight.weight.copy_(torch.eye(16))
    (exact,), weight.weight.grad = gradients(weight, torch.float32), None
    (found,) = gradients(weight, torch.bfloat16)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_weight_is_rounded_once(kind: str) -> None:
    """In bf16 the product of value and scale is that of fp32, rounded: a rounded scale would shift whole rows."""
    data, scale = quantize_weight(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)), kind)
    wide = dequantize(data, scale, kind, torch.float32)
    assert torch.equal(dequantize(data, scale, kind, torch.bfloat16), wide.bfloat16())
