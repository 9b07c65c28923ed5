"""The adapter: what it touches, what it leaves, how it starts, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.support.adapters import compiles_to_the_same
from tests.support.models import inputs, move, tiny, wan_model, without_embeddings
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan.model import WanModel
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.linear import Linear, project
from transpixeler.models.lora import LoraLinear, adapter_parameters, inject, load_adapter, lora_linears, reset_adapter

SHAPE = (4, 2, 4, 6)
AUX = LoraConfig(rank=3, alpha=6.0)
ALL = replace(AUX, scope="all")


def output(model: WanModel) -> torch.Tensor:
    layout = model.layout(SHAPE)
    return model(*inputs(layout), layout=layout)


def moved(streams: int, config: LoraConfig) -> WanModel:
    model = tiny(streams)
    inject(model, config)
    move(model, seed=11, names=".lora_")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_b_leaves_the_model_bit_identical(dtype: torch.dtype) -> None:
    plain, adapted = without_embeddings(tiny(2)), tiny(2)
    inject(adapted, AUX)
    for model in (plain, adapted):
        apply_dtypes(model, dtype)
    assert torch.equal(output(plain), output(adapted))
    move(adapted, seed=1, names="lora_B")
    assert not torch.equal(output(plain), output(adapted))


def test_frozen_weights_get_no_gradient_and_every_adapter_weight_does() -> None:
    model = moved(2, AUX)
    output(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = ".lora_" in name or "stream_embedding" in name
        assert (parameter.grad is not None) == parameter.requires_grad == wanted, name
        assert not wanted or parameter.grad.abs().sum() > 0, name


def test_tokens_out_of_scope_see_the_bases_projections_exactly() -> None:
    base = Linear(24, 32)
    adapted = LoraLinear(base, rank=4, scale=2.0, span=(1, 2))
    move(adapted, seed=2, names="lora")
    x = torch.randn(2, 30, 24)
    found, plain = adapted(x, (8, 10, 12)), base(x)
    assert torch.equal(found[:, :8], plain[:, :8])
    assert torch.equal(found[:, 18:], plain[:, 18:])
    delta = 2.0 * x[:, 8:18] @ adapted.lora_A.T @ adapted.lora_B.T
    torch.testing.assert_close(found[:, 8:18], plain[:, 8:18] + delta)


def test_no_arithmetic_is_spent_out_of_scope_or_on_frozen_weights() -> None:
    base = Linear(24, 32)
    adapted, x = LoraLinear(base, rank=4, scale=2.0, span=(1, 2)), torch.randn(2, 30, 24, requires_grad=True)

    def in_place(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        adapted(x, (8, 10, 12)).sum().backward()
    whole, lora = 2 * 2 * 30 * 24 * 32, 2 * 2 * 10 * 4 * (24 + 32)
    assert counter.get_total_flops() == 2 * whole + 3 * lora


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_the_fused_projection_equals_the_spelled_out_one(dtype: torch.dtype, tolerance: float) -> None:
    linear = Linear(24, 32).to(dtype).requires_grad_(False)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    down, up = torch.randn(4, 24, dtype=wide) / 5, torch.randn(32, 4, dtype=wide)
    x, weights = torch.randn(2, 30, 24, dtype=dtype), torch.randn(2, 30, 32, dtype=wide)
    grads = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, down, up)]
        if fused:
            y = project(leaves[0], linear, [(leaves[1], leaves[2], None)], scale=1.5, start=10, runs=[15])
        else:
            part = 1.5 * leaves[0][:, 10:25].to(wide) @ leaves[1].T @ leaves[2].T
            y = F.linear(leaves[0].to(wide), linear.weight.to(wide), linear.bias.to(wide)) + F.pad(part, (0, 0, 10, 5))
        (y.to(wide) * weights).sum().backward()
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        grads.append([y, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*grads, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_default_targets_are_the_six_projections_and_the_feed_forward() -> None:
    model = tiny(2)
    inject(model, AUX)
    inside = {name.split(".", 2)[2] for name, _ in lora_linears(model)}
    assert inside == {f"self_attn.{x}" for x in "qkvo"} | {"cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ("self_attn.q", "attn1.to_q")}, r"lora\.targets: 'attn1.to_q' matches no linear.*self_attn\.q"),
        ({"ranks": {"ffn.1": 8}}, r"lora\.ranks: 'ffn.1' matches no linear"),
        ({"targets": ("cross_attn.k",)}, "cross_attn.k acts on the text"),
        ({"scope": ("alpha",)}, "no stream 'alpha'; there are rgb, seg"),
    ],
)
def test_what_cannot_be_injected_is_named(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        inject(tiny(2), replace(AUX, **change))


def test_text_projections_may_be_adapted_for_all_streams() -> None:
    model = moved(2, replace(ALL, targets=("cross_attn.k", "cross_attn.v")))
    output(model).square().sum().backward()
    assert all(module.lora_A.grad.abs().sum() > 0 for _, module in lora_linears(model))


def test_patterns_choose_targets_ranks_and_scopes() -> None:
    model = tiny(2)
    config = LoraConfig(rank=4, alpha=8.0, targets=("*.o", "blocks.1.ffn.0"), ranks={"*.o": 6, "blocks.1.*.o": 2})
    inject(model, config, scopes={"cross_attn.o": "all"})
    found = {name: (module.rank, module.scale, module.span) for name, module in lora_linears(model)}
    assert found == {
        "blocks.0.self_attn.o": (6, 8 / 6, (1, 2)),
        "blocks.0.cross_attn.o": (6, 8 / 6, None),
        "blocks.1.self_attn.o": (2, 4.0, (1, 2)),
        "blocks.1.cross_attn.o": (2, 4.0, None),
        "blocks.1.ffn.0": (4, 2.0, (1, 2)),
    }


@pytest.mark.parametrize(
    ("alpha", "stabilized", "scale"), [(None, False, 1.0), (4.0, False, 0.25), (4.0, True, 1.0), (None, True, 4.0)]
)
def test_scale_is_alpha_over_rank_or_over_its_root(alpha: float | None, stabilized: bool, scale: float) -> None:
    model = tiny(2)
    inject(model, LoraConfig(rank=16, alpha=alpha, rank_stabilized=stabilized))
    assert {module.scale for _, module in lora_linears(model)} == {scale}


def test_dropout_acts_in_training_alone_and_on_the_scope_alone() -> None:
    base = Linear(24, 32)
    adapted = LoraLinear(base, rank=4, scale=1.0, dropout=0.5, span=(1, 2))
    move(adapted, seed=2, names="lora")
    x = torch.randn(1, 20, 24)
    kept = adapted.eval()(x, (8, 12))
    assert torch.equal(kept, adapted(x, (8, 12)))
    drawn = torch.stack([adapted.train()(x, (8, 12)).detach() for _ in range(400)])
    assert torch.equal(drawn[:, :, :8], kept[:, :8].expand(400, -1, -1, -1))
    assert drawn[:, :, 8:].std(0).mean() > 0.1
    torch.testing.assert_close(drawn.mean(0), kept, atol=0.6, rtol=0)
    adapted(x, (8, 12)).sum().backward()
    assert adapted.lora_A.grad is not None
    assert adapted.weight.grad is None


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_on_text_too_which_needs_no_gradient(dora: bool) -> None:
    adapted = LoraLinear(Linear(24, 32), rank=4, scale=1.0, dropout=0.5, dora=dora)
    move(adapted, seed=2, names="lora")
    adapted.train()(torch.randn(1, 20, 24)).sum().backward()
    assert adapted.lora_A.grad is not None and adapted.lora_A.grad.any()


def test_first_values_depend_on_seed_and_name_alone() -> None:
    whole, cut, other = tiny(2), tiny(2), tiny(2)
    cut.keep(embed=False, blocks=[1], head=True)
    inject(whole, AUX, seed=5)
    inject(cut, replace(AUX, targets=AUX.targets[::-1]), seed=5)
    inject(other, AUX, seed=6)
    for name, parameter in adapter_parameters(cut).items():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    a = "blocks.0.self_attn.q.lora_A"
    assert not torch.equal(whole.get_parameter(a), other.get_parameter(a))
    assert not torch.equal(whole.get_parameter(a), whole.get_parameter("blocks.0.self_attn.k.lora_A"))
    assert whole.get_parameter(a).abs().max() <= 48**-0.5
    assert all(not p.any() for name, p in adapter_parameters(whole).items() if not name.endswith("lora_A"))


def test_an_adapter_on_meta_gets_its_first_values_later() -> None:
    with torch.device("meta"):
        model = wan_model(tiny().config.__dict__, streams=("rgb", "seg"))
    names = inject(model, AUX, seed=5)
    model.to_empty(device="cpu")
    reset_adapter(model, seed=5)
    expected = tiny(2)
    assert inject(expected, AUX, seed=5) == names
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in adapter_parameters(model).items())


def test_an_adapter_starts_from_another() -> None:
    source, model = moved(2, AUX), tiny(2)
    inject(model, AUX)
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(source).items()}
    load_adapter(model, tensors)
    assert torch.equal(output(model), output(source))
    stage = tiny(2)
    inject(stage, AUX)
    stage.keep(embed=False, blocks=[1], head=True)
    load_adapter(stage, tensors)
    assert all(torch.equal(p, tensors[name]) for name, p in adapter_parameters(stage).items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(AUX, targets=(*AUX.targets, "cross_attn.?"), scope="all"), "cross_attn.k.lora_A is missing"),
        (replace(AUX, rank=4), r"lora_A is \[3, 48\], not \[4, 48\]"),
        (replace(AUX, targets=("self_attn.*",)), "has no place"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(config: LoraConfig, words: str) -> None:
    tensors = adapter_parameters(moved(2, AUX))
    model = tiny(2)
    inject(model, config)
    with pytest.raises(UserError, match=rf"lora\.init_from: .*{words}"):
        load_adapter(model, tensors)


def test_an_adapted_block_compiles_without_a_graph_break() -> None:
    model = moved(2, AUX)
    compiles_to_the_same(model, output)
