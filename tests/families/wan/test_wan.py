"""Wan on one stream is the published Wan; cut into stages it is itself; what it cannot be is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention_module
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from tests.support.models import TINY, inputs, move, tiny, wan_model
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.model import Tokens, WanBlock, WanModel
from transpixeler.families.wan.names import NAMES
from transpixeler.models.attention import KERNELS, SAVED_OPS, attention, available_kernels, pick_kernel
from transpixeler.models.backbone import apply_dtypes, set_trainable
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import shard
from transpixeler.training.room import KEEPS_FLEX

GRIDS = [(4, 1, 4, 4), (4, 3, 8, 6), (4, 5, 4, 10)]


@pytest.fixture(scope="module")
def published():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**TINY)
    move(model, seed=3)
    return model


def ours_with(weights: dict[str, torch.Tensor]) -> WanModel:
    model = tiny()
    model.load_state_dict({name: weights[stored] for name, stored in NAMES.internal_names(weights).items()})
    return model


def both(published, ours: WanModel, shape: tuple[int, ...], words: int) -> tuple[torch.Tensor, torch.Tensor]:
    layout = ours.layout(shape)
    x, timesteps, text = inputs(layout, words=words)
    theirs = published(x.unflatten(1, shape), 1000 * timesteps[:, 0], text, return_dict=False)[0]
    return theirs, ours(x, timesteps, text, layout=layout).unflatten(1, shape)


@pytest.mark.parametrize("words", [512, 77])
@pytest.mark.parametrize("shape", GRIDS)
@torch.no_grad()
def test_one_stream_equals_diffusers(published, shape: tuple[int, ...], words: int) -> None:
    theirs, ours = both(published, ours_with(published.state_dict()), shape, words)
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["blocks.1.norm3.weight", "blocks.0.modulation", "head.modulation", "blocks.1.self_attn.norm_k.weight"]
)
def test_one_moved_parameter_is_seen(published, name: str) -> None:
    ours = ours_with(published.state_dict())
    ours.get_parameter(name)[..., 0] += 0.01
    theirs, moved = both(published, ours, GRIDS[1], 512)
    assert (theirs - moved).abs().max() > 1e-4


def test_gradients_equal_diffusers(published) -> None:
    ours = ours_with(published.state_dict())
    theirs, mine = both(published, ours, GRIDS[1], 512)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    (theirs * weights).sum().backward()
    (mine * weights).sum().backward()
    parameters = dict(published.named_parameters())
    for name, stored in NAMES.internal_names(parameters).items():
        expected, found = parameters[stored].grad, ours.get_parameter(name).grad
        torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("streams", [1, 2])
def test_two_stages_equal_the_whole_bit_for_bit(streams: int) -> None:
    def stage(**kept):
        model = tiny(streams)
        model.keep(**kept)
        return model

    whole, first, last = (
        tiny(streams),
        stage(embed=True, blocks=[0], head=False),
        stage(embed=False, blocks=[1], head=True),
    )
    layout = whole.layout((4, 2, 4, 6))
    x, timesteps, text = inputs(layout)
    expected, state = whole(x, timesteps, text, layout=layout), first(x, timesteps, text, layout=layout)
    assert type(state) is tuple
    for part, meta in zip(state, whole.flow_meta(layout, 2, torch.float32), strict=True):
        assert (part.shape, part.dtype) == (meta.shape, meta.dtype)
    found = last(*state, layout=layout)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    grads = {name: p.grad for model in (first, last) for name, p in model.named_parameters()}
    assert grads.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(grads[name], p.grad) for name, p in whole.named_parameters())


def again_in_full(compute, *args):
    return checkpoint(compute, *args, use_reentrant=False)


def again_but_attention(compute, *args):
    kept = partial(create_selective_checkpoint_contexts, [op for op in SAVED_OPS if isinstance(op, OpOverload)])
    return checkpoint(compute, *args, use_reentrant=False, context_fn=kept)


def both_ways(recompute: Callable[..., torch.Tensor], lora: bool) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each parameter's name with its gradients when all is kept and when something is computed again."""
    plain, again = tiny(2), tiny(2)
    layout = plain.layout((4, 2, 4, 4))
    for model in (plain, again):
        if lora:
            inject(model, LoraConfig(rank=3))
            move(model, seed=1, names=".lora_")
        for block in model.blocks.values():
            block.recompute = recompute if model is again else None
        model(*inputs(layout), layout=layout).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert one.requires_grad == (one.grad is not None) == (other.grad is not None), name
        if one.requires_grad:
            yield name, one.grad, other.grad


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", [again_in_full, again_but_attention])
def test_recomputing_changes_no_bit_of_any_gradient(recompute: Callable[..., torch.Tensor], lora: bool) -> None:
    assert all(torch.equal(one, other) for _, one, other in both_ways(recompute, lora))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_result_that_is_not_made_again_is_never_read(poisoned: None, early_stop: bool) -> None:
    assert torch.empty(3).isnan().all()
    with set_checkpoint_early_stop(early_stop):
        assert all(torch.equal(one, other) for _, one, other in both_ways(again_but_attention, True))


def test_a_compiled_block_may_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    forward = WanBlock.forward
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(WanBlock, "forward", lambda block, *x: (compiled if block.recompute else forward)(block, *x))
    for name, one, other in both_ways(again_but_attention, True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("streams", "attends"), [(1, True), (2, False)])
def test_a_block_compiles_without_a_graph_break(streams: int, attends: bool) -> None:
    model = tiny(streams, attends=attends)
    layout = model.layout((4, 2, 4, 4))
    expected = model(*inputs(layout), layout=layout)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    for block in model.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    names = set(model.state_dict())
    found = model(*inputs(layout), layout=layout)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)
    assert names == set(tiny(streams).state_dict())


def test_the_islands_stay_in_fp32() -> None:
    model = tiny(2)
    apply_dtypes(model, torch.bfloat16)
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {"blocks.0.self_attn.q.weight", "blocks.1.ffn.2.bias", "embed.text_embedding.0.weight"} <= low
    assert not [name for name in low if "norm" in name or "modulation" in name or "time" in name or "stream" in name]
    layout = model.layout((4, 2, 4, 4))
    x, timesteps, text = inputs(layout)
    assert [part.dtype for part in model.embed(x, timesteps, text, layout=layout, dtype=torch.bfloat16)] == [
        part.dtype for part in model.flow_meta(layout, 2, torch.bfloat16)
    ]
    low_out, high_out = model(x, timesteps, text, layout=layout), tiny(2)(x, timesteps, text, layout=layout)
    assert low_out.dtype == torch.float32
    assert (low_out - high_out).norm() / high_out.norm() < 0.02


def test_every_kernel_that_is_there_agrees() -> None:
    q, k, v = (torch.randn(2, 10, 2, 24, requires_grad=True) for _ in range(3))
    expected = attention(q, k, v)
    for kernel in available_kernels(q.device):
        found = attention(q, k, v, pick_kernel(kernel, q.device, q.dtype, 24))
        torch.testing.assert_close(found, expected)
        assert found.shape == q.shape


def test_a_kernel_that_is_not_there_is_refused_by_name() -> None:
    model = wan_model(TINY, streams=("rgb",), attention="cudnn")
    layout = model.layout(GRIDS[0])
    said = "cudnn does not run in float32 and heads of 24 on this cpu; there are auto, sdpa, flash, math"
    with pytest.raises(UserError, match=rf"model\.attention: {said}$"):
        model(*inputs(layout), layout=layout)


def test_a_kernel_that_the_machine_lacks_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "flash", KERNELS["cudnn"])  # which no CPU has
    model = wan_model(TINY | {"attention_head_dim": 18}, streams=("rgb",), attention="flash")
    layout = model.layout(GRIDS[0])
    with torch.no_grad(), pytest.raises(UserError, match=r"flash does not run in .* there are auto, sdpa, math$"):
        model(*inputs(layout), layout=layout)


@pytest.mark.parametrize(
    ("recompute", "again"), [(shard._keep_attention, int(torch.__version__ < KEEPS_FLEX)), (shard._full, 1)]
)
def test_flex_keeps_its_output_in_a_compiled_block(
    recompute: Callable[..., torch.Tensor], again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_attention_module, "_validate_device", lambda *tensors: None)  # a CPU can trace it
    calls: list[int] = []

    def counted(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        calls.append(sum(node.target is torch.ops.higher_order.flex_attention for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def block(flow: tuple[torch.Tensor, ...], _: object) -> tuple[torch.Tensor]:
        x, weight = flow
        y = (x @ weight).sin()
        return (attention(y, y, y, "flex").cos(),)

    compiler = {"fw_compiler": counted, "bw_compiler": counted, "partition_fn": min_cut_rematerialization_partition}
    compiled = torch.compile(lambda *flow: recompute(block, flow, None)[0], backend=aot_autograd(**compiler))
    leaves = [torch.randn(1, 32, 2, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(*leaves).sum().backward()
    assert calls == [1, again]


def test_saved_ops_name_the_operator_that_runs() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    model = tiny()
    layout = model.layout(GRIDS[0])
    with Seen():
        model(*inputs(layout), layout=layout)
    assert sum(op in SAVED_OPS for op in seen) == 2 * len(model.blocks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_dim": 1280, "added_kv_proj_dim": 40}, "added_kv_proj_dim 40 is not the model's width"),
        ({"in_channels": 36}, "in_channels 36 beside out_channels 4 is no Wan"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
        ({"model_type": "other"}, "model_type 'other'"),
        ({"text_len": 226}, "text_len 226"),
    ],
)
def test_what_is_not_supported_is_named(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        WanConfig.read(TINY | change)


def test_the_original_config_means_the_same(tmp_path: Path) -> None:
    original = {"_class_name": "WanModel", "dim": 48, "num_heads": 2, "in_dim": 4, "out_dim": 4, "text_len": 512}
    original |= {"ffn_dim": 64, "num_layers": 2, "freq_dim": 32, "eps": 1e-6, "model_type": "t2v", "text_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(original))
    read = WanConfig.read(WanFolder(str(tmp_path)).config)
    assert read == WanConfig.read({key: value for key, value in TINY.items() if key != "rope_max_seq_len"})


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        _ = WanFolder(str(tmp_path)).config


def test_a_clip_beyond_the_positions_is_refused() -> None:
    model = tiny()
    with pytest.raises(UserError, match="64 positions"):
        model.positions(model.layout((4, 65, 4, 4)), torch.device("cpu"))


def test_positions_are_kept_for_a_few_layouts() -> None:
    model = tiny(2)
    layouts = [model.layout((4, n, 4, 4)) for n in range(1, 8)]
    first = [model.positions(layout, torch.device("cpu")) for layout in layouts]
    assert isinstance(first[0], Tokens)
    assert len(model._ropes) <= 4
    assert model.positions(layouts[-1], torch.device("cpu")).rope is first[-1].rope
    model.rebuild_buffers()
    assert not model._ropes


@pytest.mark.parametrize("second", [["diffusers", "WanTransformer3DModel"], [None, None], None, "folders"])
def test_two_experts_are_not_taken_for_one_model(second: object, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(TINY))
    if second == "folders":
        (tmp_path / "high_noise_model").mkdir()
    else:
        (tmp_path / "model_index.json").write_text(json.dumps({"transformer_2": second}))
    if not second or second == [None, None]:
        assert WanFolder(str(tmp_path)).config == TINY
        return
    with pytest.raises(UserError, match=r"model\.path: .* is a model of two experts and holds no .*/config\.json"):
        _ = WanFolder(str(tmp_path)).config


def test_it_builds_on_meta_and_fills_later() -> None:
    with torch.device("meta"):
        model = wan_model(TINY, streams=("rgb", "seg"))
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu")
    model.rebuild_buffers()
    model.load_state_dict(tiny(2).state_dict())
    layout = StreamLayout.equal(("rgb", "seg"), (4, 1, 4, 4), model.patch)
    assert torch.equal(model(*inputs(layout), layout=layout), tiny(2)(*inputs(layout), layout=layout))


def test_a_bias_may_train_alone() -> None:
    model, whole = tiny(), tiny()
    layout = model.layout(GRIDS[0])
    chosen = set_trainable(model, ["blocks.*.bias"])
    for each in (model, whole):
        each(*inputs(layout), layout=layout).square().sum().backward()
    assert all(torch.equal(model.get_parameter(name).grad, whole.get_parameter(name).grad) for name in chosen)


@pytest.mark.parametrize(
    "pattern", ["*.bias", "*.weight", "embed.text_embedding.0.bias", "embed.text_embedding.2.*", "blocks.1.ffn.2.bias"]
)
def test_any_part_of_a_layer_may_train_in_fp32_while_the_rest_is_bf16(pattern: str) -> None:
    low, high = tiny(2), tiny(2)
    apply_dtypes(low, torch.bfloat16)
    for model in (low, high):
        chosen = set_trainable(model, [pattern])
        for name in chosen:
            model.get_parameter(name).data = model.get_parameter(name).data.float()
        layout = model.layout(GRIDS[0])
        model(*inputs(layout), layout=layout).square().sum().backward()
    near, exact = (torch.cat([m.get_parameter(name).grad.flatten() for name in chosen]) for m in (low, high))
    assert near.dtype == torch.float32 and (near - exact).norm() / exact.norm() < 0.1


def test_names_choose_what_trains() -> None:
    model = tiny()
    chosen = set_trainable(model, ["blocks.*.self_attn.*", "head.*"])
    assert chosen == [name for name, p in model.named_parameters() if p.requires_grad]
    assert "blocks.0.self_attn.q.weight" in chosen
    assert "blocks.0.ffn.0.weight" not in chosen
    with pytest.raises(UserError, match=r"model\.trainable: 'attn1\.\*' matches no parameter; there are .*self_attn"):
        set_trainable(model, ["attn1.*"])
