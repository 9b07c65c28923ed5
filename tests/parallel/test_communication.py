"""What ranks say to each other in a step, counted to the byte: an adapter's gradients once, and a few scalars.

Counted is what torch dispatches, so that nothing which goes over a wire is overlooked, whoever asked for it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import tiny
from tests.support.ranks import run_ranks
from transpixeler.config import loading
from transpixeler.flow import objective
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine, shape
from transpixeler.parallel.runtime import Runtime
from transpixeler.parallel.torch_stage import SENDS_WHAT_THERE_IS
from transpixeler.training import optim, trainer
from transpixeler.training.agreement import T_BINS, Due, agree

BASE = ("train.global_batch=4", "train.micro_batch=1", "parallel.recompute=none", "lora.rank=2")
FP32, FP64 = 4, 8
NORM = ("sum", FP32)  # of all gradients, over the pipeline's ranks
STREAMS = 2
# the loss; each stream's errors and their number; the same for each bin of t; "unsound"; four wishes
FACTS = ("sum", FP64 * (1 + 2 * STREAMS + 2 * T_BINS + 1 + len(astuple(Due()))))
KINDS = {
    "allreduce_": "sum",
    "all_reduce": "sum",
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "broadcast_": "broadcast",
    "send": "send",
}
SAYS_NOTHING = {"recv_", "wait_tensor", "_wrap_tensor_autograd"}
Said = Counter  # of (kind, bytes of the whole tensor)


class Listening(TorchDispatchMode):
    """Every collective that this thread begins, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is heard when its shards speak
        name = func.__name__.split(".")[0]
        if "c10d" in func.namespace and name not in SAYS_NOTHING:
            self.heard.append((KINDS.get(name, name), max(map(_bytes, args))))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _step(rank: int, world_size: int, overrides: tuple[str, ...], twin: str) -> Said:
    """What a rank says in its second step, as training takes it."""
    config = tiny.config(*BASE, *overrides)
    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    share = config.train.global_batch // mesh.layout.data
    engine.reduces_often |= twin == "reduces often"
    for step in (1, 3):  # of one bucket: the first makes a schedule, whose ranks greet each other
        first = mesh.data_rank * share
        example = tiny.example(config, step, range(first, first + share))
        parts = _halves(example) if twin == "reduces each half" else [example]
        with Listening() as listening:
            errors = torch.cat([engine.forward_backward(part, 1) for part in parts])
            norm = optim.gradient_norm(trained.values(), mesh.pipeline_group, here.device)
            agree([errors], [example], norm, Due(), counts=mesh.is_first_stage)
            optim.clip(trained.values(), config.optim.clip, norm)
        for parameter in trained.values():
            parameter.grad = None
    return Counter(listening.heard)


def _halves(example: objective.Example) -> list[objective.Example]:
    half = len(example.latents) // 2
    return [example.rows(slice(0, half)), example.rows(slice(half, None))]


def said(world_size: int, *overrides: str, twin: str = "") -> list[Said]:
    return run_ranks(_step, world_size, overrides, twin)


def layout(pipeline: int, replicate: int, shard: int) -> tuple[str, ...]:
    return (f"parallel.pipeline={pipeline}", f"parallel.replicate={replicate}", f"parallel.shard={shard}")


def groups() -> list[list[nn.Parameter]]:
    """The parameters that are gathered together: each block's, and the rest."""
    config = tiny.config(*BASE)
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in shape(config, lambda: tiny.make(config), torch.float32).named_parameters():
        part, index, *_ = name.split(".")
        found.setdefault(index if part == "blocks" else "rest", []).append(parameter)
    return list(found.values())


def trained(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def adapter_bytes() -> int:
    return FP32 * sum(parameter.numel() for group in groups() for parameter in trained(group))


def padded_bytes(parameters: list[nn.Parameter], shards: int) -> int:
    """FSDP2 cuts the first dimension into equal parts, the last ones padded."""
    return FP32 * sum(math.ceil(len(p) / shards) * shards * p[0].numel() for p in parameters)


# --- replicas --------------------------------------------------------------------------------------------------------


def replicas_say() -> Said:
    return Counter([("sum", adapter_bytes()), NORM, FACTS])


def test_one_rank_says_two_scalars_to_itself() -> None:
    assert said(1) == [Counter([NORM, FACTS])]


@pytest.mark.parametrize("count", [2, 4])
def test_replicas_send_the_adapters_gradients_once_and_nothing_of_the_base(count: int) -> None:
    assert said(count, *layout(1, count, 1)) == [replicas_say()] * count
    assert 0 < adapter_bytes() < FP32 * sum(p.numel() for group in groups() for p in group) / 10


def test_a_replica_that_reduces_each_half_of_its_batch_is_caught() -> None:
    heard = said(2, *layout(1, 2, 1), twin="reduces each half")[0]
    assert heard - replicas_say() == Counter([("sum", adapter_bytes())])


def test_frozen_weights_that_are_gathered_are_caught() -> None:
    heard = said(2, *layout(1, 1, 2))[0]
    assert {kind for kind, _ in heard - replicas_say()} == {"gather", "scatter", "sum"}


def test_a_training_step_says_no_more_than_its_engine_does(demo: Path, tmp_path: Path) -> None:
    for numbers, heard in run_ranks(_train, 2, demo / "config.yaml", tmp_path):
        assert Counter(heard) == Counter([("sum", FP32 * numbers), NORM, FACTS])


def _train(rank: int, world_size: int, path: Path, output: Path) -> tuple[int, list[tuple[str, int]]]:
    """Numbers that are trained, and what was said from one agreement on a step's facts to the next."""
    overrides = [f"output_dir={output}", "train.max_steps=4", "eval.before_first_step=false", "eval.every_epochs=0"]
    overrides += ["save.every_epochs=0", "save.every_steps=0", "checkpoint.every_steps=0", "log.tensorboard=false"]
    config = loading.load(path, [*overrides, "parallel.replicate=2", "parallel.shard=1"])
    agreements, numbers, listening = [], 0, Listening()

    def marked(*args: Any, **options: Any) -> Any:
        agreements.append(len(listening.heard))
        return agree(*args, **options)

    def counted(self: trainer.Trainer) -> None:
        nonlocal numbers
        numbers = sum(parameter.numel() for parameter in self.state.parameters.values())
        train(self)

    train = trainer.Trainer.train
    trainer.agree, trainer.Trainer.train = marked, counted
    with listening:
        trainer.train(config, Runtime(rank, world_size, rank, torch.device("cpu")))
    return numbers, listening.heard[agreements[1] : agreements[2]]


# --- shards ----------------------------------------------------------------------------------------------------------


def shards_say(replicate: int, shards: int) -> Said:
    """All weights gathered forward and backward in each microbatch; the adapter's gradients scattered once."""
    microbatches = 4 // (replicate * shards)
    expected = Counter([NORM, NORM, FACTS])  # of the shards, and of the stages
    for group in groups():
        expected["gather", padded_bytes(group, shards)] += 2 * microbatches
        expected["scatter", padded_bytes(trained(group), shards)] += 1
        if replicate > 1:  # then every shard is summed over its replicas
            expected["sum", padded_bytes(trained(group), shards) // shards] += 1
    return expected


@pytest.mark.parametrize(("replicate", "shards"), [(1, 2), (1, 4), (2, 2)])
def test_shards_gather_weights_twice_a_microbatch_and_scatter_gradients_once(replicate: int, shards: int) -> None:
    heard = said(replicate * shards, *layout(1, replicate, shards))
    assert heard == [shards_say(replicate, shards)] * (replicate * shards)


def test_shards_that_reduce_each_microbatch_are_caught() -> None:
    more = said(2, *layout(1, 1, 2), twin="reduces often")[0] - shards_say(1, 2)
    assert more == Counter(("scatter", padded_bytes(trained(group), 2)) for group in groups())


# --- stages ----------------------------------------------------------------------------------------------------------

sends_what_there_is = pytest.mark.skipif(
    torch.__version__ < SENDS_WHAT_THERE_IS, reason="this torch wants a gradient of each input, and is sent zeros"
)


@sends_what_there_is
def test_stages_send_their_state_on_and_only_the_gradient_of_hidden_back() -> None:
    config = tiny.config(*BASE)
    example = tiny.example(config, 1, range(4))
    with torch.device("meta"):
        state = tiny.make(config).flow_meta(example.layout, 1, torch.float32)
    forward = [("send", tensor.nbytes) for tensor in state] * 4  # of each microbatch
    backward = [("send", state[0].nbytes)] * 4
    errors = ("broadcast", FP32 * 4 * STREAMS)
    assert said(2, *layout(2, 1, 1)) == [Counter([*way, errors, NORM, FACTS]) for way in (forward, backward)]


@sends_what_there_is
def test_stages_send_no_gradient_of_rgb_back_that_runs_forward_only() -> None:
    """Both streams are equally long: half of hidden each."""
    config = tiny.config(*BASE)
    example = tiny.example(config, 1, range(4))
    with torch.device("meta"):
        hidden, *state = tiny.make(config).flow_meta(example.layout, 1, torch.float32)
    half = ("send", hidden.nbytes // 2)
    forward = [half, half, *(("send", tensor.nbytes) for tensor in state)] * 4
    errors = ("broadcast", FP32 * 4 * STREAMS)
    heard = said(2, *layout(2, 1, 1), "model.rgb_attends_aux=false")
    assert heard == [Counter([*way, errors, NORM, FACTS]) for way in (forward, [half] * 4)]
