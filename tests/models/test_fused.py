"""A fused form is its formula: values, gradients, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import tiny
from transpixeler.families.wan.model import rope_table
from transpixeler.models.attention import attention, available_kernels, fold_padding, unfold_padding
from transpixeler.models.fused import norm_heads, norm_heads_plainly, rotate
from transpixeler.models.linear import Linear, project
from transpixeler.models.streams import StreamLayout

HEADS, EPS, SCOPE = 3, 1e-6, slice(5, 17)
PLACES = [torch.arange(n, dtype=torch.float64) for n in (2, 3, 4)]
ROPE = rope_table(PLACES, 8)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("rope", [None, ROPE], ids=["still", "turned"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_heads_are_normed_and_turned_as_the_formula_says(
    rope: Tensor | None, dtype: torch.dtype, tolerance: float
) -> None:
    (x,), (weight,) = tensors((2, 24, 24), dtype=dtype), tensors((24,), dtype=torch.float32)
    x = (100 * x).detach().requires_grad_()  # whatever its size
    expected = gradients(lambda *leaves: norm_heads_plainly(*leaves, rope, heads=HEADS, eps=EPS), [x, weight])
    found = gradients(lambda *leaves: norm_heads(*leaves, rope, heads=HEADS, eps=EPS), [x, weight])
    assert [f.dtype for f in found] == [dtype, dtype, torch.float32]
    assert distance(found, expected) < tolerance
    twin = gradients(lambda *leaves: norm_heads(*leaves, ROPE.flip(0), heads=HEADS, eps=EPS), [x, weight])
    assert distance(twin[:1], expected[:1]) > 0.1 and distance(twin[1:2], expected[1:2]) > 0.1


@pytest.mark.parametrize("rope", [None, ROPE.double()], ids=["still", "turned"])
def test_the_gradient_of_normed_heads_is_that_of_differences(rope: Tensor | None) -> None:
    assert torch.autograd.gradcheck(lambda *t: norm_heads(*t, rope, heads=HEADS, eps=0.1), tensors((1, 24, 24), (24,)))


def test_normed_heads_keep_what_they_take_in_and_no_wide_copy() -> None:
    kept: list[Tensor] = []
    (x,), (weight,) = tensors((2, 24, 24), dtype=torch.bfloat16), tensors((24,), dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_heads(x, weight.detach(), ROPE, heads=HEADS, eps=EPS)
    wide = [t for t in kept if t.shape == x.shape and t.data_ptr() != x.data_ptr()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept) and not wide


def test_rotation_is_one_rotation_however_it_is_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rope = torch.randn(2, 24, 3, 24), rope_table(PLACES, 24)
    complex_product = rotate(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rope), complex_product)


# --- GELU within a projection ----------------------------------------------------------------------------------------


@pytest.fixture
def linear() -> Linear:
    return Linear(24, 16).double().requires_grad_(False)


def within(linear: Linear, *, gelu: bool = True, needs_output: bool = True) -> Callable[..., Tensor]:
    how = {"scale": 1.5, "start": SCOPE.start, "runs": [SCOPE.stop - SCOPE.start]}
    return lambda x, down, up: project(
        x,
        linear,
        [(down, up, None)],
        **how,
        gelu=gelu,
        needs_output=needs_output,  # type: ignore[arg-type]
    )


def spelled_out(linear: Linear) -> Callable[..., Tensor]:
    def function(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        a = F.gelu(x, approximate="tanh")
        part = 1.5 * a[:, SCOPE] @ down.T @ up.T
        return linear(a) + F.pad(part, (0, 0, SCOPE.start, 24 - SCOPE.stop))

    return function


def test_a_projection_of_gelu_is_the_two_one_after_the_other(linear: Linear) -> None:
    leaves = tensors((2, 24, 24), (4, 24), (16, 4))
    expected = gradients(spelled_out(linear), leaves)
    assert distance(gradients(within(linear), leaves), expected) < 1e-12
    assert distance(gradients(within(linear, gelu=False), leaves), expected) > 0.1
    assert torch.autograd.gradcheck(within(linear), tensors((1, 24, 24), (2, 24), (16, 2)))


def test_what_enters_gelu_is_all_that_is_kept_of_it(linear: Linear) -> None:
    kept: list[Tensor] = []
    x, down, up = tensors((2, 24, 24), (4, 24), (16, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        within(linear)(x, down, up)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, linear.weight, down, up))


def test_without_a_wanted_result_the_same_is_kept_and_nothing_multiplied(linear: Linear) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    leaves = tensors((2, 24, 24), (4, 24), (16, 4))
    with FlopCounterMode(display=False) as counter:
        y = within(linear, needs_output=False)(*leaves)
    assert counter.get_total_flops() == 0 and y.shape == (2, 24, 16)


# --- the text's padding ----------------------------------------------------------------------------------------------


def padded_text(*, lengths: tuple[int, ...] = (9, 21), whole: int = 64) -> Tensor:
    """[B, whole, 16] whose rows from each length on are one and the same."""
    (text,) = tensors((len(lengths), whole, 16))
    return torch.stack([torch.cat([rows[:n], torch.ones(whole - n, 16)]) for rows, n in zip(text, lengths)]).detach()


def attended(text: Tensor, bias: Tensor | None = None, kernel: str = "sdpa") -> Callable[..., Tensor]:
    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, (text @ k).unflatten(-1, (3, 8)), (text @ v).unflatten(-1, (3, 8)), kernel, bias)

    return of


def test_equal_keys_fold_into_one_that_counts_for_all() -> None:
    text, leaves = padded_text(), tensors((2, 30, 3, 8), (16, 24), (16, 24))
    folded, bias = fold_padding(text)
    assert folded.shape == (2, 22, 16) and bias is not None
    expected = gradients(attended(text), leaves)
    assert distance(gradients(attended(folded, bias), leaves), expected) < 1e-12
    assert distance(gradients(attended(folded, torch.zeros(22).double()), leaves), expected) > 0.1
    assert torch.equal(unfold_padding(folded, 64), text)


class Masks(TorchDispatchMode):
    """Collects the masks that kernels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (mask := (kwargs or {}).get("attn_mask")) is not None:
            self.found.append(mask)
        return func(*args, **(kwargs or {}))


def test_a_bias_on_keys_is_one_row_for_all_queries() -> None:
    """A row for each query would be written out on a GPU where the keys are no multiple of eight: 1.7 GB at 28,876."""
    q, k, v = tensors((2, 50, 3, 8), (2, 51, 3, 8), (2, 51, 3, 8))
    bias = torch.randn(2, 51, dtype=torch.float64)
    with Masks() as masks:
        found = attention(q, k, v, bias=bias)
    assert masks.found and all(mask.shape[2] == 1 for mask in masks.found)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5 + bias[:, None, None]
    torch.testing.assert_close(found, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v))


@pytest.mark.parametrize("kernel", available_kernels(torch.device("cpu")))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_every_kernel_counts_a_folded_key_fully(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    text, leaves = padded_text().to(dtype), tensors((2, 30, 3, 8), (16, 24), (16, 24), dtype=dtype)
    folded, bias = fold_padding(text)
    expected = gradients(attended(text, kernel=kernel), leaves)
    assert distance(gradients(attended(folded, bias, kernel), leaves), expected) < tolerance


@pytest.mark.parametrize("lengths", [(0, 0), (64, 3), (63, 63)], ids=["nothing but padding", "full", "one row"])
def test_text_folds_as_far_as_its_longest_and_no_further(lengths: tuple[int, int]) -> None:
    text = padded_text(lengths=lengths)
    folded, bias = fold_padding(text)
    assert folded.shape[1] == min(max(lengths) + 1, 64) and (bias is None) == (folded.shape[1] == 64)
    assert torch.equal(unfold_padding(folded, 64), text)


def test_a_model_reads_a_caption_at_its_own_length() -> None:
    config = tiny.config()
    model, read = tiny.make(config), []
    model.blocks["0"].cross_attn.k.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    layout = StreamLayout.equal(("rgb", "seg"), tiny.SHAPES[0], model.patch)
    text = torch.cat([torch.randn(2, 20, 16), torch.zeros(2, 492, 16)], dim=1)
    model(torch.randn(2, layout.elements), torch.rand(2, 2), text, layout=layout)
    assert read == [21]
