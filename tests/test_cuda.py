"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import restore_flash_attention_impl

from tests.support import tiny
from transpixeler import cli
from transpixeler.config.sections import UserError
from transpixeler.models import linear, lora
from transpixeler.models.attention import PACKAGES, attention, available_kernels, pick_kernel
from transpixeler.parallel import devices, runtime
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.devices import forget_peak
from transpixeler.parallel.runtime import Runtime
from transpixeler.training import ema

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def here() -> Iterator[Runtime]:
    with runtime.running(device="cuda") as found:
        yield found


def gradients(here: Runtime, *overrides: str) -> torch.Tensor:
    """Of one step's adapter, or of the base where that is trained."""
    config = tiny.config("train.global_batch=4", "parallel.compile=off", *overrides)
    mesh = meshes.build(meshes.resolve(config.parallel, 1), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    engine.forward_backward(tiny.example(config, 1, range(4)).pinned().to(here.device), 2)
    found = [p.grad for _, p in engine.named_parameters() if p.grad is not None]
    return torch.cat([ema.local(g).float().cpu().flatten() for g in found])


def alike(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, 0))


@pytest.mark.parametrize("recompute", ["full", "attention", "offload", "2"])
def test_what_is_recomputed_changes_no_gradient(here: Runtime, recompute: str) -> None:
    kept = gradients(here, "parallel.recompute=none")
    assert alike(kept, gradients(here, f"parallel.recompute={recompute}")) > 0.9999


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(here: Runtime, recompute: str) -> None:
    eager = gradients(here, f"parallel.recompute={recompute}")
    assert alike(eager, gradients(here, f"parallel.recompute={recompute}", "parallel.compile=on")) > 0.999


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_base_gives_nearly_the_same_gradients(here: Runtime, kind: str) -> None:
    assert alike(gradients(here), gradients(here, f"model.quantize={kind}")) > 0.99


def test_bf16_is_near_fp32(here: Runtime) -> None:
    for full in ("lora.enabled=true", "lora.enabled=false"):
        assert alike(gradients(here, full, "model.dtype=float32"), gradients(here, full)) > 0.999


def test_the_cpu_gives_the_same(here: Runtime) -> None:
    on_gpu = gradients(here, "model.dtype=float32")
    alone = dataclasses.replace(here, device=torch.device("cpu"))
    assert alike(on_gpu, gradients(alone, "model.dtype=float32")) > 0.9999


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "cudnn", "efficient", "flex", "fa3", "fa4"])
def test_every_kernel_runs_forward_and_backward(here: Runtime, kernel: str) -> None:
    assert kernel in available_kernels(here.device)
    try:
        pick_kernel(kernel, here.device, torch.bfloat16, 128)
    except UserError as error:
        if kernel not in PACKAGES:
            raise
        pytest.skip(str(error))
    q, k, v = (torch.randn(1, 256, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(attention(q, k, v, "math").float().square().sum(), (q, k, v))
    found = torch.autograd.grad(attention(q, k, v, kernel).float().square().sum(), (q, k, v))
    for ours, theirs in zip(found, expected):
        assert alike(ours.float().flatten(), theirs.float().flatten()) > 0.999
    restore_flash_attention_impl(_raise_warn=False)


def test_a_bias_on_keys_takes_no_row_for_each_query(here: Runtime) -> None:
    """4,000 queries and keys with a row each would take 31 MiB, and each head's as much where torch pads it."""
    q, k, v = (torch.randn(1, 3999, 2, 64, device=here.device, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.zeros(1, 3999, device=here.device)
    before = torch.cuda.memory_allocated()
    forget_peak(here.device)
    attention(q, k, v, "sdpa", bias)
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20


def test_offloaded_blocks_stream_and_train(here: Runtime) -> None:
    assert alike(gradients(here), gradients(here, "parallel.offload=true", "parallel.recompute=full")) > 0.999


@pytest.mark.parametrize("recompute", ["none", "full", "offload"])
@pytest.mark.parametrize("more", [(), ("model.quantize=int8",), ("parallel.compile=on",)])
def test_swapped_blocks_are_copied_in_time(here: Runtime, recompute: str, more: tuple[str, ...]) -> None:
    """A copy that came too late, or over weights still in use, would show in every gradient."""
    how = (f"parallel.recompute={recompute}", *more)
    for count in (3, 6):
        assert alike(gradients(here, *how), gradients(here, *how, f"parallel.offload={count}")) > 0.9999


def test_swapped_blocks_leave_the_gpu(here: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"ffn_dim": 4096, "num_layers": 24}.items():
        monkeypatch.setitem(tiny.WAN, key, value)
    gradients(here)
    kept, waiting = (peak(here, "parallel.recompute=full", f"parallel.offload={count}") for count in ("false", "24"))
    assert waiting < kept / 2


def peak(here: Runtime, *overrides: str) -> float:
    """Bytes at most of a step, without what was held before."""
    gc.collect()
    held = torch.cuda.memory_allocated()
    devices.forget_peak(here.device)
    gradients(here, *overrides)
    return devices.peak_memory(here.device) * 2**30 - held


def test_weights_that_wait_in_host_memory_leave_the_gpu(here: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"ffn_dim": 4096, "num_layers": 24}.items():
        monkeypatch.setitem(tiny.WAN, key, value)
    gradients(here)  # the matmuls' workspace
    kept, waiting = (peak(here, "parallel.recompute=full", f"parallel.offload={wait}") for wait in ("false", "true"))
    assert waiting < kept / 2


def test_inputs_that_wait_in_host_memory_leave_the_gpu(here: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.WAN, "num_layers", 48)
    monkeypatch.setattr(tiny, "SHAPES", ((4, 1, 4, 4), (4, 8, 32, 32)))
    gradients(here)
    kept, waiting = (peak(here, f"parallel.recompute={how}") for how in ("full", "offload"))
    tokens = 2 * 2 * math.prod((8, 16, 16))  # of a microbatch of two samples in two streams
    assert kept - waiting > 48 * tokens * 48 * 2 / 2  # half of all inputs in bf16


@pytest.mark.parametrize("recompute", ["none", "attention", "full", "offload"])
def test_rgb_that_runs_forward_only_gives_the_same_gradients(
    here: Runtime, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    blind = ("model.rgb_attends_aux=false", f"parallel.recompute={recompute}")
    found = gradients(here, *blind)
    monkeypatch.setattr(lora, "_leaves_rgb_alone", lambda model: False)
    assert alike(found, gradients(here, *blind)) > 0.9999


def test_rgb_that_runs_forward_only_compiles(here: Runtime) -> None:
    blind = ("model.rgb_attends_aux=false", "parallel.recompute=attention")
    assert alike(gradients(here, *blind), gradients(here, *blind, "parallel.compile=on")) > 0.999


@pytest.mark.parametrize("keys", [28_080, 65_520, 65_600])
def test_lengths_of_real_videos_give_finite_gradients_near_fp32(keys: int) -> None:
    """Of the kernel that auto picks, one head, on sampled queries; 65,600 is where cuDNN is not asked."""
    q, k, v, grad = (torch.randn(1, keys, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    kernel = pick_kernel("auto", q.device, q.dtype, 128)
    found = torch.autograd.grad(attention(*leaves, kernel), leaves, grad)
    assert all(bool(x.isfinite().all()) for x in found)
    some = q.detach()[:, :: keys // 64].float().requires_grad_()
    out = attention(some, k.detach().float(), v.detach().float(), "math")
    (exact,) = torch.autograd.grad(out, some, grad[:, :: keys // 64].float())
    assert alike(found[0][:, :: keys // 64].float().flatten(), exact.flatten()) > 0.999


def test_the_same_step_has_the_same_bits_where_they_are_asked_for(here: Runtime) -> None:
    try:
        first, second = (gradients(here, "train.deterministic=true") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_an_adapters_gradients_are_summed_in_fp32() -> None:
    a, b = (torch.randn(2, 8, 32_768, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = linear._summed_product(a, b.mT, torch.float32)
    exact = torch.bmm(a.double(), b.mT.double()).sum(0)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-2)


def test_buckets_by_turns_compile_once_each(here: Runtime) -> None:
    config = tiny.config("train.global_batch=2", "parallel.compile=on")
    mesh = meshes.build(meshes.resolve(config.parallel, 1), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    graphs = []
    for step in range(6):
        engine.forward_backward(tiny.example(config, step, range(2)).pinned().to(here.device), 1)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


def test_memory_is_told_with_what_the_allocator_holds(here: Runtime) -> None:
    gradients(here)
    told = devices.memory_facts(here.device)
    assert told["memory_reserved_gib"] >= devices.peak_memory(here.device) and told["allocation_retries"] == 0


def train(demo: Path, output: Path, *overrides: str, resume: bool = False) -> dict[str, torch.Tensor]:
    """Run the command; return the adapter that it saved last."""
    from safetensors.torch import load_file

    settings = ("checkpoint.every_steps=2", "save.every_steps=2", "save.every_epochs=0", "log.tensorboard=false")
    settings += ("eval.every_epochs=0", "eval.every_steps=2", "eval.samples=0", "train.deterministic=true")
    argv = ["train", str(demo / "config.yaml"), f"output_dir={output}", *settings, *overrides]
    try:
        assert cli.main([*argv, *(["--resume"] if resume else [])]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    (saved,) = [*(output / "latest").glob("step4/adapter_model.safetensors")] or [None]
    return load_file(saved) if saved else {}


def test_a_resumed_training_equals_one_that_never_stopped(demo: Path, tmp_path: Path) -> None:
    """Trainer, optimizer, mean, checkpoint and evaluation under compile, to the bit."""
    whole = train(demo, tmp_path / "whole", "train.max_steps=4")
    train(demo, tmp_path / "cut", "train.max_steps=2")
    resumed = train(demo, tmp_path / "cut", "train.max_steps=4", resume=True)
    assert whole and whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
