"""A base in eight bits under an adapter: near the full one, half the memory, eight bits in the backward pass too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.models import inputs, move, tiny, wan_model
from tests.support.ranks import run_ranks
from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.models.backbone import apply_dtypes
from transpixeler.models.linear import Linear, dequantize
from transpixeler.models.lora import adapter_parameters, inject, lora_linears, targets
from transpixeler.models.quantize import STORED_AS, quantize, quantize_weight

KINDS = ["int8", "fp8"]
EXPECTED_ERROR = {"int8": 0.012, "fp8": 0.06}  # of one projection: 8 bits of a row's range, 4 bits of mantissa
CONFIG = LoraConfig(rank=3, alpha=6.0)


def model_of(kind: str, *, dtype: torch.dtype = torch.bfloat16) -> WanModel:
    model = tiny(2, num_attention_heads=4)
    if kind == "trained":  # itself, in fp32
        model.matmul_dtype = dtype
        return model
    inject(model, CONFIG)
    move(model, seed=4, names=".lora_")
    apply_dtypes(model, dtype)
    if kind:
        quantize(model, kind)
        apply_dtypes(model, dtype)
    return model


def run(model: WanModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and all gradients of the adapter in a row."""
    layout = model.layout((4, 2, 4, 6))
    out = model(*inputs(layout), layout=layout)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()])


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_torchaos_own(kind: str) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    weight = torch.randn(48, 64)
    holder = nn.Linear(64, 48, bias=False)
    holder.weight = nn.Parameter(weight.clone())
    quantize_(
        holder,
        Int8WeightOnlyConfig(set_inductor_config=False, version=2) if kind == "int8" else Float8WeightOnlyConfig(),
    )
    data, scale = quantize_weight(weight, kind)
    torch.testing.assert_close(dequantize(data, scale, kind, torch.float32), holder.weight.dequantize())
    assert (data.dtype, scale.dtype, scale.shape) == (STORED_AS[kind], torch.float32, (48, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_is_within_the_expected_error(kind: str) -> None:
    full, low = model_of(""), model_of(kind)
    x = torch.randn(2, 24, 96, dtype=torch.bfloat16)
    one = full.blocks["0"].self_attn.q(x, (12, 12)).float()
    other = low.blocks["0"].self_attn.q(x, (12, 12)).float()
    assert 0 < (one - other).norm() / one.norm() < EXPECTED_ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_adapter_gradients_stay_near(kind: str) -> None:
    (out, grads), (low_out, low_grads) = run(model_of("")), run(model_of(kind))
    assert (out - low_out).norm() / out.norm() < 2 * EXPECTED_ERROR[kind]
    assert torch.cosine_similarity(grads, low_grads, dim=0) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_weights_take_half_the_memory(kind: str) -> None:
    def bytes_of(model: WanModel) -> int:
        return sum(
            p.numel() * p.element_size()
            for linear in targets(model).values()
            for name, p in linear.named_parameters()
            if name.startswith("weight")
        )

    assert bytes_of(model_of(kind)) / bytes_of(model_of("")) < 0.53  # the rest is one scale a row of only 96


@pytest.mark.parametrize("kind", [*KINDS, "trained"])
def test_no_weight_is_kept_in_another_form_for_the_backward_pass(kind: str) -> None:
    model, kept = model_of(kind), []
    shapes = {(linear.out_features, linear.in_features) for linear in targets(model).values()}
    layout = model.layout((4, 2, 4, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(*inputs(layout), layout=layout)
    assert not [t for t in kept if tuple(t.shape) in shapes and t.dtype == torch.bfloat16]
    assert [t for t in kept if tuple(t.shape) in shapes and t.dtype == STORED_AS.get(kind, torch.float32)]


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_shards_of_rows_gives_the_same_as_sharding(kind: str) -> None:
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    whole = quantize_weight(weight, kind)
    parts = [quantize_weight(part, kind) for part in weight.chunk(4)]
    for index in range(2):
        found = torch.cat([part[index].view(torch.uint8) for part in parts])
        assert torch.equal(found, whole[index].view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_known_on_meta(kind: str) -> None:
    with torch.device("meta"):
        model = wan_model(tiny().config.__dict__, streams=("rgb", "seg"))
    inject(model, CONFIG)
    apply_dtypes(model, torch.bfloat16)
    quantize(model, kind)
    real = tiny(2)
    inject(real, CONFIG)
    quantize(real, kind)
    apply_dtypes(real, torch.bfloat16)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in real.named_parameters()
    }
    assert "blocks.0.self_attn.q.weight_data" in model.state_dict()
    assert "blocks.0.self_attn.q.weight" not in model.state_dict()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model))


def test_quantizing_before_or_after_the_adapter_is_the_same() -> None:
    before, after = tiny(2), tiny(2)
    before.requires_grad_(False)
    quantize(before, "int8")
    inject(before, CONFIG)
    inject(after, CONFIG)
    quantize(after, "int8")
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, value in before.state_dict().items():  # by bits: eight bits of an integer may read as a NaN
        assert torch.equal(value.view(torch.uint8), after.state_dict()[name].view(torch.uint8)), name


def sharded_gradients(rank: int, world: int, kind: str) -> torch.Tensor:
    """The adapter's gradients with every block's parameters, quantized ones too, spread over the ranks."""
    model = model_of(kind, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (world,))
    for part in (*model.blocks.values(), model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    data = model.blocks["0"].self_attn.q.weight_data
    assert data.to_local().shape[0] == data.shape[0] // world
    layout = model.layout((4, 2, 4, 6))
    (model(*inputs(layout), layout=layout).square().mean() / world).backward()
    return torch.cat([p.grad.full_tensor().flatten() for p in adapter_parameters(model).values()])


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_shards_like_any_other(kind: str) -> None:
    _, expected = run(model_of(kind, dtype=torch.float32))
    for found in run_ranks(sharded_gradients, 2, kind):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


CODES = torch.arange(-128, 128).to(torch.int8)  # as floats, some are NaN


def test_int8_is_stored_under_a_float_that_every_gpu_compiles() -> None:
    assert STORED_AS["int8"] == torch.float8_e5m2, "Triton takes e4m3fn from sm89 on only"


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_every_code_comes_back_as_the_number_it_is(compiler: str) -> None:
    def values(data: torch.Tensor) -> torch.Tensor:
        return dequantize(data, torch.ones(256, 1), "int8", torch.float32)

    data = CODES.view(STORED_AS["int8"])[:, None]
    found = values(data) if compiler == "eager" else torch.compile(values, backend=compiler, dynamic=False)(data)
    assert torch.equal(found[:, 0], CODES.float())


class Holder(nn.Module):
    """Gives back its quantized parameter as it is where it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.data = nn.Parameter(torch.empty(16, 16, dtype=STORED_AS["int8"], device="meta"), requires_grad=False)
        self.wide = nn.Parameter(torch.empty(16, device="meta"))

    def forward(self) -> torch.Tensor:
        return self.data.view(torch.int8).clone()


def codes_through_shards(rank: int, world: int) -> bool:
    """Filled from a part of a wider tensor, sharded, and gathered where it is used."""
    whole = CODES.view(16, 16).repeat(1, 2)[:, 8:24]
    holder = Holder()
    fully_shard(holder, mesh=init_device_mesh("cpu", (world,)))
    holder.to_empty(device="cpu")
    with torch.no_grad():
        holder.data.to_local().copy_(whole.view(STORED_AS["int8"])[rank * 8 : (rank + 1) * 8])
    return torch.equal(holder(), whole)


def test_every_code_survives_sharding() -> None:
    assert run_ranks(codes_through_shards, 2) == [True, True]


def test_a_quantized_block_compiles_without_a_graph_break() -> None:
    model = model_of("int8", dtype=torch.float32)
    out, grads = run(model)
    model.zero_grad()
    torch._dynamo.reset()
    model.blocks["0"].compile(backend="aot_eager", fullgraph=True, dynamic=False)
    compiled, compiled_grads = run(model)
    torch.testing.assert_close(compiled, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled_grads, grads, atol=1e-5, rtol=1e-4)
    assert len(lora_linears(model)) == 16
    assert isinstance(model.blocks["0"].cross_attn.k, Linear)


def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> tuple[torch.fx.GraphModule, ...]:
    """What a compiled block keeps is decided here, as for a GPU."""
    return min_cut_rematerialization_partition(joint_graph_passes(joint), inputs, compiler="inductor", **options)


def kept_when_compiled(model: WanModel) -> list[Tensor]:
    decomposed = {"decompositions": select_decomp_table(), "partition_fn": partition}
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=lambda graph, _: graph, **decomposed)
    torch._dynamo.reset()
    model.blocks["1"].compile(backend=backend, fullgraph=True, dynamic=False)
    layout = model.layout((4, 2, 4, 6))
    nodes, seen, kept = [model(*inputs(layout), layout=layout).grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            kept += node.saved_tensors if "CompiledFunction" in node.name() else []
            nodes += [following for following, _ in node.next_functions]
    return kept


@pytest.mark.parametrize("kind", ["int8", "trained"])
def test_a_compiled_block_keeps_no_weight_in_another_form(kind: str) -> None:
    model = model_of(kind)
    shapes = {(linear.out_features, linear.in_features) for linear in targets(model).values()}
    kept = kept_when_compiled(model)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    others = {tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in held}
    assert len(others) < len({tuple(t.shape) for t in kept})
    assert not shapes & (others | {shape[::-1] for shape in others})
