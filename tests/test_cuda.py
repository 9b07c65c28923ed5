"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator

import pytest
import torch

from tests.support import tiny
from transpixeler.models.attention import attention, available_kernels
from transpixeler.parallel import devices, runtime
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
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


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "cudnn", "efficient", "flex"])
def test_every_kernel_runs_forward_and_backward(here: Runtime, kernel: str) -> None:
    assert kernel in available_kernels(here.device)
    q, k, v = (torch.randn(1, 256, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(attention(q, k, v, "math").float().square().sum(), (q, k, v))
    found = torch.autograd.grad(attention(q, k, v, kernel).float().square().sum(), (q, k, v))
    for ours, theirs in zip(found, expected):
        assert alike(ours.float().flatten(), theirs.float().flatten()) > 0.999


def test_offloaded_blocks_stream_and_train(here: Runtime) -> None:
    assert alike(gradients(here), gradients(here, "parallel.offload=true", "parallel.recompute=full")) > 0.999


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
