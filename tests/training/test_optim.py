"""Optimizers, rates, clipping and the mean of the weights; that a run learns."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import tiny
from tests.support.ranks import run_ranks
from transpixeler.config.sections import UserError
from transpixeler.models.noising import RECTIFIED
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.parallel.build import build_engine
from transpixeler.runs import training_state
from transpixeler.training import optim
from transpixeler.training.ema import Ema
from transpixeler.training.schedule import rate_at


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.ffn.0.lora_A": (64, 96), "blocks.0.ffn.0.lora_B": (96, 64), "embed.stream_embedding.seg": (96,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["adamw", "muon", "torch.optim.RMSprop"])
def test_an_argument_that_an_optimizer_does_not_take_is_named(name: str) -> None:
    config = tiny.config(f"optim.name={name}", "optim.args={d_coef: 1}").optim
    with pytest.raises(UserError, match=r"optim\.args: .* does not take .*d_coef"):
        optim.build({"a": torch.nn.Parameter(torch.ones(2, 2))}, config)


@pytest.mark.parametrize(
    "name", ["adamw", "sgd", "adafactor", "muon", "adamw8bit", "adamw4bit", "adamw_fp8", "torch.optim.RMSprop"]
)
def test_every_optimizer_lowers_a_simple_loss_and_resumes_from_its_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    config = tiny.config(f"optim.name={name}", "optim.lr=0.05", "optim.weight_decay=0").optim

    def step(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
        loss = sum((p**2).mean() for p in params.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    ours = parameters()
    optimizer = optim.build(ours, config)
    losses = [step(ours, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]
    other = {n: nn.Parameter(p.detach().clone()) for n, p in ours.items()}
    copied = optim.build(other, config)
    training_state.materialize(copied)
    assert all(torch.equal(other[n], ours[n]) for n in ours), "making the state moved a parameter"
    from_, into = training_state.optimizer_tensors(ours, optimizer), training_state.optimizer_tensors(other, copied)
    assert from_.keys() == into.keys()
    for key, tensor in into.items():
        tensor.copy_(from_[key])
    assert step(ours, optimizer) == step(other, copied)
    assert all(torch.equal(other[n], ours[n]) for n in ours)


def test_compiled_updates_of_one_family_are_not_kept_for_another() -> None:
    """Runs in a process of its own, as a user's: the tests' others turn that cache off before torch is loaded."""
    program = (
        "import torch; from tests.support import tiny; from transpixeler.training import optim, trainer\n"
        "from torch._functorch import config\n"
        "assert config.enable_autograd_cache, 'it is off whatever is built'\n"
        "optim.build({'a': torch.nn.Parameter(torch.ones(8, 8))}, tiny.config('optim.name=adamw8bit').optim)\n"
        "raise SystemExit(config.enable_autograd_cache)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_AUTOGRAD_CACHE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0


def test_vectors_do_not_decay_and_a_rule_goes_first() -> None:
    rule = "optim.groups=[{pattern: '*stream_embedding*', lr: 0.02}]"
    config = tiny.config("optim.name=adamw", "optim.lr=0.01", "optim.weight_decay=0.5", rule).optim
    optimizer = optim.build(parameters(), config)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.02, 0.0, 1),
        (0.01, 0.5, 2),
    ]
    optim.set_rate(optimizer, config, 0.005)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.005]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=adam", "optim.name: 'adam' is not one of adamw, sgd"),
        ("optim.name=torch.optim.Nothing", "cannot be imported"),
        ("optim.bf16_parameters=true", "only adamw, adamw8bit"),
    ],
)
def test_an_optimizer_that_is_not_there_is_told(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        optim.build(parameters(), tiny.config(override).optim)


def test_a_rule_that_matches_nothing_is_told() -> None:
    config = tiny.config("optim.groups=[{pattern: head.*}]").optim
    with pytest.raises(UserError, match=r"optim.groups.0.pattern: 'head.\*' matches no trained parameter"):
        optim.check_groups(parameters(), config)


def test_rates_follow_their_curves() -> None:
    def at(step: int, *overrides: str) -> float:
        return rate_at(tiny.config("optim.lr=1", "optim.warmup_steps=10", *overrides).optim, step, 110)

    assert at(1) == pytest.approx(0.1) and at(10) == 1 and at(11) == 1
    assert at(60, "optim.schedule=linear") == pytest.approx(0.5)
    assert at(60, "optim.schedule=cosine", "optim.lr_min=0.2") == pytest.approx(0.6)
    assert at(110, "optim.schedule=cosine") == pytest.approx(0) and at(500, "optim.schedule=cosine") == 0
    assert at(60, "optim.schedule=cosine", "optim.force_lr=0.3") == 0.3


def test_clipping_scales_to_the_limit_and_zero_clips_nothing() -> None:
    for limit, expected in ((1.0, 1.0), (0.0, math.sqrt(3 * 16))):
        params = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
        for p in params:
            p.grad = torch.full((4,), 2.0)
        optim.clip(params, limit, torch.tensor(math.sqrt(3 * 16)))
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        assert float(norm) == pytest.approx(expected, rel=1e-5)


def test_the_mean_follows_its_formula_and_leaves_what_it_was_swapped_for() -> None:
    params = parameters()
    mean, by_hand = Ema(params, 0.9), {n: p.detach().clone() for n, p in params.items()}
    idle = min(params)  # what has no gradient was not updated, and its mean stays
    for _ in range(3):
        for n, p in params.items():
            p.data += 1
            if n == idle:
                continue
            p.grad = torch.zeros_like(p)
            by_hand[n] = 0.9 * by_hand[n] + 0.1 * p.detach()
        mean.update()
    raw = {n: p.detach().clone() for n, p in params.items()}
    with mean.swapped():
        for n, p in params.items():
            torch.testing.assert_close(p.detach(), by_hand[n])
    assert all(torch.equal(raw[n], p) for n, p in params.items())


def test_orthogonalized_singular_values_are_near_one() -> None:
    values = torch.linalg.svdvals(optim.orthogonalize(torch.randn(20, 50, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.6 and values.max() < 1.3


def _shared_steps(rank: int, world_size: int) -> tuple[bool, list[int]]:
    """Check that parameters that steps share are those that each rank steps alone, and how many matrices each made."""
    made: list[int] = []
    orthogonalize = optim.orthogonalize

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        made.append(matrix.numel())
        return orthogonalize(matrix)

    optim.orthogonalize = counted
    config = tiny.config("optim.name=muon", "optim.lr=0.05").optim
    moved, counts = [], []
    for ranks in (None, torch.distributed.group.WORLD):
        ours = parameters()
        optimizer = optim.build(ours, config, ranks)
        for _ in range(3):
            sum((p**3).mean() for p in ours.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(ours)
        counts.append(len(made))
        made.clear()
    return all(torch.equal(one, other) for one, other in zip(*(m.values() for m in moved))), counts


def test_ranks_share_the_orthogonal_steps() -> None:
    for same, (alone, shared) in run_ranks(_shared_steps, 2):
        assert same
        assert (alone, shared) == (6, 3), "two matrices, three steps"


class _Sharded(TorchDispatchMode):
    """Counts the operators that run on sharded tensors as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(isinstance(x, DTensor) for x in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _steps_of_shards(rank: int, world_size: int, name: str) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Operators on sharded tensors by step, and the parameters after it, whole."""
    mesh = init_device_mesh("cpu", (world_size,))
    ours = {n: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for n, p in parameters().items()}
    config = tiny.config("optim.name=adamw", "optim.lr=0.05", "optim.weight_decay=0").optim
    whole = torch.optim.AdamW(ours.values(), lr=0.05, betas=config.betas, eps=config.eps, weight_decay=0, fused=True)
    optimizer = whole if name == "torch" else optim.build(ours, config)
    counts = []
    for _ in range(3):
        for p in ours.values():
            p.grad = p.detach().clone()
        with _Sharded() as seen:
            optimizer.step()
        counts.append(seen.count)
    return counts, {n: p.detach().full_tensor() for n, p in ours.items()}


def test_a_step_is_of_the_shards_themselves() -> None:
    ours, theirs = (run_ranks(_steps_of_shards, 2, name) for name in ("ours", "torch"))
    for (counts, moved), (others, expected) in zip(ours, theirs, strict=True):
        assert counts[1:] == [0, 0], "the first one makes the moments"
        assert min(others) > 0, "torch's own takes them for whole tensors"
        assert all(torch.equal(moved[name], p) for name, p in expected.items())


# --- learning --------------------------------------------------------------------------------------------------------


def _learn(rank: int, world_size: int, overrides: tuple[str, ...], steps: int) -> tuple[float, float]:
    """Mean error on fixed samples and noise before and after training on other draws of the same samples."""
    config = tiny.config("train.global_batch=4", "optim.name=adamw", "optim.clip=1", *overrides)
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    optimizer = optim.build(trained, config.optim)

    def held_out() -> float:
        it = tiny.example(config, 0, range(4))
        out = engine.forward(it.noisy(), it.inputs, it.layout)
        return float(RECTIFIED.errors(out, it.target(), it.layout).mean())

    before = held_out()
    for _ in range(steps):
        engine.forward_backward(tiny.example(config, 0, range(4)), 4)
        optimizer.step()
        optimizer.zero_grad()
    return before, held_out()


@pytest.mark.parametrize(("kind", "factor"), [("lora.rank=16", 1.5), ("lora.enabled=false", 3.0)])
def test_a_run_learns(kind: str, factor: float) -> None:
    ((before, after),) = run_ranks(_learn, 1, (kind, "optim.lr=0.01", "lora.scope=all"), 60)
    assert before / after > factor, (before, after)
