"""What is decided for a GPU, as far as it can be told without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, _registry, restore_flash_attention_impl

from tests.support import tiny
from tests.support.ranks import run_ranks
from transpixeler.config.sections import UserError
from transpixeler.models import attention
from transpixeler.models.attention import KERNELS, allowed, pick_kernel
from transpixeler.parallel import devices
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.runtime import Runtime

CPU = torch.device("cpu")


def test_the_allocators_segments_grow_unless_the_user_says_otherwise() -> None:
    empty, own, newer = {}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "x:1"}
    for environment in (empty, own, newer):
        devices.prepare_allocator(environment)
    assert empty == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert own == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"} and newer == {"PYTORCH_ALLOC_CONF": "x:1"}


@pytest.mark.parametrize(("keys", "free"), [(65_520, True), (65_600, False), (28_080, True), (192, False), (512, True)])
def test_torch_chooses_the_kernel_but_not_cudnn_where_it_may_give_nan(keys: int, free: bool) -> None:
    """65,600 keys are those of 896×448 at 81 frames in two streams: 64 beyond a multiple of 128."""
    found = allowed("sdpa", keys)
    assert (found == []) is free and SDPBackend.CUDNN_ATTENTION not in found
    assert allowed("cudnn", keys) == [SDPBackend.CUDNN_ATTENTION]  # who asks for it gets it


def test_auto_leaves_the_choice_to_torch() -> None:
    assert pick_kernel("auto", CPU, torch.float32, 24) == "sdpa"


def test_a_kernel_of_a_package_takes_the_place_of_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is pretended and so is the package; torch's own register is the real one."""
    taken = []
    handle = SimpleNamespace(remove=lambda: taken.append("removed"))
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: taken.append("FA3") or handle)
    monkeypatch.setattr(attention, "available_kernels", lambda device: ("sdpa", "flash", "fa3"))
    for _ in range(2):  # each step asks; it is put there once
        assert pick_kernel("fa3", CPU, torch.float32, 24) == "fa3"
    assert taken == ["FA3"] and KERNELS["fa3"] == [SDPBackend.FLASH_ATTENTION]
    restore_flash_attention_impl()
    assert taken == ["FA3", "removed"]


def test_a_kernel_whose_package_is_not_there_is_refused_by_the_package_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "available_kernels", lambda device: ("sdpa", "flash", "fa3", "fa4"))
    for kernel, package in (("fa3", "flash_attn_interface"), ("fa4", r"flash_attn")):
        with pytest.raises(UserError, match=rf"model\.attention: {kernel} comes from the package {package}, .*install"):
            pick_kernel(kernel, CPU, torch.float32, 24)


@pytest.fixture
def as_it_was() -> Iterator[None]:
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if before is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _sums(rank: int, world_size: int, *overrides: str) -> tuple[bool, str | None, float]:
    """Train a step; tell whether algorithms are deterministic, cuBLAS's setting, and the gradients' sum."""
    config = tiny.config("train.global_batch=4", *overrides)
    mesh = meshes.build(meshes.resolve(config.parallel, 1), Runtime(rank, world_size, rank, CPU))
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    engine.forward_backward(tiny.example(config, 1, range(4)), 2)
    total = sum(float(p.grad.double().sum()) for _, p in engine.named_parameters() if p.grad is not None)
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"), total


@pytest.mark.usefixtures("as_it_was")
def test_a_deterministic_training_asks_torch_for_the_same_bits() -> None:
    """Nothing in a step refuses; the numbers are those of any training."""
    ((usual, _, expected),) = run_ranks(_sums, 1)
    ((strict, workspace, found),) = run_ranks(_sums, 1, "train.deterministic=true")
    assert not usual and strict and workspace == ":4096:8" and found == expected


def _groups(rank: int, world_size: int) -> tuple[bool, bool]:
    here = Runtime(rank, world_size, rank, CPU)
    built = [meshes.build(layout, here) for layout in (meshes.Layout(1, 2, 1), meshes.Layout(2, 1, 1))]
    return tuple(mesh.data_group is dist.group.WORLD for mesh in built)


def test_one_group_of_all_ranks_is_enough() -> None:
    assert run_ranks(_groups, 2) == [(True, False)] * 2
