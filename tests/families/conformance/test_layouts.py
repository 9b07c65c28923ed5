"""Every family trains to the same losses and parameters on any layout, and text that flows carries gradients."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support.families.cases import CASES, EVERY, JOINED, example
from tests.support.ranks import run_ranks
from tests.support.seeded import SeededSource
from tests.support.tiny import config
from transpixeler.config.sections import Config
from transpixeler.models.backbone import Backbone, Flow
from transpixeler.models.meta import on_meta
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.parallel.build import build_engine
from transpixeler.training import optim

STEPS = 3  # from one bucket to the other and back: the last has schedules and shards that both left behind
BASE = (
    *("train.global_batch=4", "train.micro_batch=2", "parallel.recompute=none", "seed=3"),
    *("objective.caption_dropout=0", "objective.tasks={joint: 1, rgb_to_aux: 1, ends_to_video: 2, interpolate: 4}"),
    "objective.interpolate_every=2",  # the step of the longer bucket draws interpolate
)
KINDS = {
    "lora": (),
    "dora": ("lora.kind=dora",),
    "full": ("lora.enabled=false", "optim.lr=0.1"),
    "blind": ("model.rgb_attends_aux=false",),  # RGB runs forward only
}
# three streams, of which one is at half the size in every other step
OWN = ("lora.per_stream=true", "streams={rgb: '', seg: _seg, depth: _depth}")
CONTEXT = "parallel.context=2"
CHUNK = "parallel.chunk=18"  # of a step with tokens enough: pieces begin and end inside of streams and time groups
ONE_TEXT = "no gradient of the text crosses a cut"
Result = dict[str, Any]  # losses, norms of gradients, and parameters before the first step and after the last


def layout(pipeline: int, replicate: int, shard: int, *more: str) -> tuple[str, ...]:
    return (f"parallel.pipeline={pipeline}", f"parallel.replicate={replicate}", f"parallel.shard={shard}", *more)


# Adapters, DoRAs, whole models and models whose RGB runs forward only, each with every way to share work and every one
# to recompute; then each schedule, and ways together. What no family changes, such as each schedule with each other
# way, `tests/parallel` goes through for one family.
ADAPTED = {
    "(2,1,1)": layout(2, 1, 1),
    "(1,2,1) attention": layout(1, 2, 1, "parallel.recompute=attention"),
    "(1,1,2) full": layout(1, 1, 2, "parallel.recompute=full"),
    "(1,1,1,2) offload": layout(1, 1, 1, CONTEXT, "parallel.recompute=offload"),
}
OTHERS = {
    "(2,1,1)": layout(2, 1, 1),
    "(1,2,1) offload, pieces": layout(1, 2, 1, "parallel.recompute=offload", CHUNK),
    "(1,1,2) full, pieces": layout(1, 1, 2, "parallel.recompute=full", CHUNK),
    "(1,1,1,2) attention, pieces": layout(1, 1, 1, CONTEXT, "parallel.recompute=attention", CHUNK),
}
SCHEDULES = {name: layout(2, 1, 1, f"parallel.schedule={name}") for name in ("gpipe", "interleaved-1f1b")}
LAYOUTS = {
    ("lora", 2): ADAPTED | SCHEDULES,
    ("lora", 4): {"(2,1,2)": layout(2, 1, 2, "train.micro_batch=1"), "(2,1,1,2)": layout(2, 1, 1, CONTEXT)},
    ("dora", 2): ADAPTED,
    ("full", 2): OTHERS,
    ("full", 4): {"(1,1,2,2)": layout(1, 1, 2, CONTEXT)},
    ("blind", 2): OTHERS,
    ("blind", 4): {"(1,2,1,2)": layout(1, 2, 1, CONTEXT)},
}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _make(name: str, config: Config, twin: str) -> Backbone:
    model = EVERY[name].make(streams=tuple(config.streams), rgb_attends_aux=config.model.rgb_attends_aux)
    if twin == ONE_TEXT:
        model.carried = 1
        model.__class__ = _detaching(type(model))
    return model


def _detaching(kind: type[Backbone]) -> type[Backbone]:
    """Return a twin whose stages give on the text without its gradient."""

    def forward(self: Backbone, *flow: torch.Tensor, layout: StreamLayout) -> torch.Tensor | Flow:
        out = kind.forward(self, *flow, layout=layout)
        return (out[0], *(x.detach() for x in out[1:])) if isinstance(out, tuple) else out

    return type(f"Detaching{kind.__name__}", (kind,), {"forward": forward})


def _train(name: str, here: runtime.Runtime, overrides: tuple[str, ...], twin: str, steps: int) -> Result:
    more = [
        f"{at}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for at, own in EVERY[name].more.items()
        for key, value in own.items()
    ]
    settings = config(*BASE, *more, *overrides)
    layout = meshes.resolve(settings.parallel, here.world_size)
    mesh = meshes.build(layout, here)
    engine = build_engine(
        settings,
        mesh,
        lambda: _make(name, settings, twin),
        SeededSource(lambda: _make(name, settings, "")),
    )
    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    start = {name: _whole(p) for name, p in trained.items()} if here.world_size == 1 else {}
    optimizer = optim.build(trained, settings.optim, mesh.data_group)
    share = settings.train.global_batch // layout.data
    slots = range(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    with on_meta():
        model = _make(name, settings, "")
    losses = []
    for step in range(steps):
        given = example(EVERY[name], model, settings, step, slots)
        errors = engine.forward_backward(given, settings.train.micro_batch)
        loss = (errors * given.weights).sum() * (mesh.context_rank == 0)
        torch.distributed.all_reduce(loss, group=mesh.data_group)
        norm = optim.gradient_norm(trained.values(), mesh.pipeline_group, here.device)
        optim.clip(trained.values(), settings.optim.clip, norm)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        losses.append((float(loss), float(norm)))
    return {"losses": losses, "start": start, "parameters": {name: _whole(p) for name, p in trained.items()}}


def _train_all(
    rank: int, world_size: int, name: str, runs: dict[str, tuple[str, ...]], twin: str, steps: int
) -> dict[str, Result]:
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    return {run: _train(name, here, overrides, twin, steps) for run, overrides in runs.items()}


def train(
    world_size: int, name: str, runs: dict[str, tuple[str, ...]], *, twin: str = "", steps: int = STEPS
) -> dict[str, Result]:
    """Train once for each of several layouts of the same ranks; put together what the ranks hold."""
    by_rank = run_ranks(_train_all, world_size, name, runs, twin, steps)
    results = {}
    for run in runs:
        parts = [found[run] for found in by_rank]
        assert all(part["losses"] == parts[0]["losses"] for part in parts), f"{run}: ranks disagree about the loss"
        parameters = {name: value for part in parts for name, value in part["parameters"].items()}
        results[run] = {**parts[0], "parameters": parameters}
    return results


@cache
def alone(name: str, kind: str) -> Result:
    """Return what one process learns, which keeps everything."""
    return train(1, name, {"alone": KINDS[kind]})["alone"]


def assert_no_bit_differs(found: Result, expected: Result) -> None:
    assert found["losses"] == expected["losses"]
    assert all(torch.equal(found["parameters"][key], value) for key, value in expected["parameters"].items())


def difference(one: Result, other: Result) -> float:
    """Return the largest over losses, norms and parameters; of numbers beyond 1, their share."""
    assert one["parameters"].keys() == other["parameters"].keys()
    ours, theirs = torch.tensor(one["losses"]), torch.tensor(other["losses"])
    numbers = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max()
    moved = [(one["parameters"][n] - other["parameters"][n]).abs().max() for n in one["parameters"]]
    return float(torch.stack([numbers, *moved]).max())


@pytest.mark.parametrize(("kind", "ranks"), LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_same_on_any_layout(name: str, kind: str, ranks: int) -> None:
    runs = {run: (*overrides, *KINDS[kind]) for run, overrides in LAYOUTS[kind, ranks].items()}
    found = {run: difference(result, alone(name, kind)) for run, result in train(ranks, name, runs).items()}
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", JOINED)
def test_a_model_in_one_piece_learns_the_same_on_any_shards_and_replicas(name: str, kind: str) -> None:
    every = ADAPTED | OTHERS
    runs = {run: (*every[run], *KINDS[kind]) for run in every if run[:7] in ("(1,2,1)", "(1,1,2)")}
    assert len(runs) == 4
    found = {run: difference(result, alone(name, kind)) for run, result in train(2, name, runs).items()}
    assert max(found.values()) < 1e-6, found
    moved, start = alone(name, kind)["parameters"], alone(name, kind)["start"]
    # what is added before a norm may move by less than its last digit
    assert not [n for n, p in moved.items() if torch.equal(p, start[n]) and not n.endswith("conv1.bias")]


@pytest.mark.parametrize("name", [name for name in CASES if name in ("wan", "hunyuan")])
def test_streams_with_matrices_of_their_own_learn_the_same_on_any_layout(name: str) -> None:
    """The one with text in the sequence, the other without; a DoRA makes of them all that a LoRA does, and norms."""
    for kind, layouts in {"dora": LAYOUTS["dora", 2], "lora": {"(1,1,2)": layout(1, 1, 2)}}.items():
        keys = (*OWN, *KINDS[kind])
        one = train(1, name, {"alone": keys, "again": (*keys, "parallel.recompute=attention")})
        runs = {run: (*overrides, *keys) for run, overrides in layouts.items()}
        found = {run: difference(result, one["alone"]) for run, result in train(2, name, runs).items()}
        found["again"] = difference(one["again"], one["alone"])
        assert max(found.values()) < 1e-6, found
        learned = one["alone"]["parameters"]
        ups = [name for name in learned if name.endswith("lora_B.seg")]
        assert ups and all(learned[up].any() for up in ups)
        assert not any(torch.equal(learned[up], learned[up.replace(".seg", ".depth")]) for up in ups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_everything_that_trains_moves(name: str, kind: str) -> None:
    found = alone(name, kind)
    assert not [n for n, p in found["parameters"].items() if torch.equal(p, found["start"][n])]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.text_flows()])
def test_gradients_cross_a_cut_through_the_text(name: str) -> None:
    """The twin says that blocks change the streams alone, so no other gradient is sent back."""
    twin = train(2, name, {"cut": layout(2, 1, 1)}, twin=ONE_TEXT)["cut"]
    assert difference(twin, alone(name, "lora")) > 1e-4
