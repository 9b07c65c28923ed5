"""Who is taught what: every frame as often, as many tokens on each rank, and the same losses on any layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tests.families.pyramid.folder import make
from tests.support.ranks import run_ranks
from tests.support.seeded import SeededSource
from tests.support.tiny import config
from transpixeler.data.order import shared_out
from transpixeler.families.pyramid.lessons import PyramidLadder, StageLesson
from transpixeler.flow.draws import draw_noise, generator
from transpixeler.flow.lessons import prepare_lessons
from transpixeler.models.ladder import Place, slots_fault
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.shard import settled, wants_compile
from transpixeler.training import optim
from transpixeler.training.agreement import Due, agree

CLIP = StreamLayout(("rgb",), ((4, 5, 8, 8),), (1, 2, 2))
BY_FRAME, WHOLE = PyramidLadder(by_frame=True), PyramidLadder(by_frame=False)
BATCH = 16


def lessons(ladder: PyramidLadder, step: int, group: int, batch: int = BATCH) -> list[StageLesson]:
    return [ladder.lesson(CLIP, Place(3, step, slot, group)) for slot in range(batch)]


def clips(step: int, group: int, batch: int = BATCH) -> list[str]:
    """Name the clip of each sample of a step, as the loader shares clips out."""
    run = BY_FRAME.run(group)
    return [f"clip{step}-{n}" for n in shared_out(np.arange(batch // group), group, run)]


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("ladder", [BY_FRAME, WHOLE], ids=["by frame", "whole"])
def test_each_rank_has_the_same_tokens_and_each_clip_other_lessons(ladder: PyramidLadder, group: int) -> None:
    run, batch = ladder.run(group), 64
    assert run % 4 == 0 and run % group == 0
    for step in range(6):
        found, names = lessons(ladder, step, group, batch), clips(step, group, batch)
        for ranks in (2, 4):
            share = batch // ranks
            assert share % run == 0 and not slots_fault(ladder, batch, group, ranks)
            tokens = [sum(one.layout.tokens for one in found[n * share : n * share + share]) for n in range(ranks)]
            assert len(set(tokens)) == 1, tokens
        assert Counter(one.stage for one in found) == {0: batch // 4, 1: batch // 4, 2: batch // 2}
        assert len(set(names)) == batch // group and set(Counter(names).values()) == {group}
        for name in names:
            own = [lesson for lesson, clip in zip(found, names, strict=True) if clip == name]
            assert len(own) == group
            if ladder.by_frame and group <= 4 and len({one.unit for one in found}) > 1:
                assert len({(one.stage, one.unit) for one in own}) >= min(group, 3)


@pytest.mark.parametrize("group", [1, 8])
def test_every_frame_is_taught_as_often_on_every_stage(group: int) -> None:
    counts = Counter((one.stage, one.unit) for step in range(15) for one in lessons(BY_FRAME, step, group))
    assert set(counts) == {(stage, unit) for stage in range(3) for unit in range(5)}
    for stage in range(3):
        assert len({counts[stage, unit] for unit in range(5)}) == 1


def test_lessons_are_pure_functions_of_their_place() -> None:
    again = [BY_FRAME.lesson(CLIP, Place(3, 7, slot, 2)) for slot in reversed(range(BATCH))][::-1]
    assert again == lessons(BY_FRAME, 7, 2)
    assert again != lessons(BY_FRAME, 8, 2)


def test_the_arithmetic_is_checked() -> None:
    for batch, group, ranks, told in (
        (6, 1, 1, "train.global_batch: 6 samples are no runs of 4, which cover the sizes; 8 would be"),
        (12, 2, 1, "train.global_batch: 12 samples are no 2 runs of 4 that share their clips; 16 would be"),
        (16, 2, 8, "data.sync_group: 16 samples over 8 data ranks are 2 each, and each takes whole runs of 4; launch"),
        (32, 8, 2, "train.global_batch: 32 samples are no 8 runs of 8 that share their clips; 64 would be"),
    ):
        assert slots_fault(BY_FRAME, batch, group, ranks).startswith(told)
    assert not slots_fault(BY_FRAME, 4, 1, 4)


# -- layouts of ranks

BASE = ("train.micro_batch=1", "parallel.recompute=none", "seed=3", "lora.scope=all")
RUNS = {  # by frame or not, samples that share a clip, samples of a step
    "by frame": (True, 1, 8),
    "shared by 2": (True, 2, 8),
    "shared by 4": (True, 4, 16),
    "whole": (False, 1, 4),
}
LAYOUTS = {
    2: {"(1,2,1)": tuple(RUNS), "(1,1,2)": ("by frame", "shared by 2")},
    4: {"(1,4,1)": tuple(RUNS), "(1,2,2)": ("shared by 4",)},
}
STEPS = 2


def _train(here: runtime.Runtime, layout: str, by_frame: bool, group: int, batch: int) -> list[float]:
    replicate, shard = layout[3:6].split(",")
    keys = (f"parallel.replicate={replicate}", f"parallel.shard={shard}", f"train.global_batch={batch}")
    settings = config(*BASE, *keys, "objective.caption_dropout=0.3")
    mesh = meshes.build(meshes.resolve(settings.parallel, here.world_size), here)
    streams = tuple(settings.streams)
    engine = build_engine(settings, mesh, lambda: make(streams=streams), SeededSource(lambda: make(streams=streams)))
    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    optimizer = optim.build(trained, settings.optim, mesh.data_group)
    ladder, layout = PyramidLadder(by_frame=by_frame), StreamLayout(streams, ((4, 3, 8, 8),) * 2, (1, 2, 2))
    share = batch // mesh.layout.data
    slots, losses = range(mesh.data_rank * share, (mesh.data_rank + 1) * share), []
    for step in range(STEPS):
        ids = [clips(step, group, batch)[slot] for slot in slots]
        texts = [torch.randn(6, 24, generator=generator("text", name)) for name in ids]
        examples = prepare_lessons(
            settings.objective,
            [ladder.lesson(layout, Place(settings.seed, step, slot, group)) for slot in slots],
            seed=settings.seed,
            step=step,
            layout=layout,
            latents=torch.stack([draw_noise(layout.elements, "latents", name) for name in ids]),
            fields={
                "text": torch.nn.functional.pad(torch.stack(texts), (0, 0, 0, 122)),
                "text_length": torch.full((len(ids),), 6),
                "pooled": torch.ones(len(ids), 20),
            },
            empty={"text": torch.zeros(128, 24), "text_length": torch.tensor(1), "pooled": torch.zeros(20)},
            ids=ids,
            slots=slots,
            batch=batch,
        )
        run, end = engine.forward_backward, len(examples) - 1
        errors = [run(one, 1, last=number == end) for number, one in enumerate(examples)]
        norm = optim.gradient_norm(trained.values(), mesh.pipeline_group, here.device)
        facts = agree(errors, examples, norm, Due(), counts=True)
        assert optimizer is not None
        optimizer.step()
        optimizer.zero_grad()
        losses += [facts.loss, facts.grad_norm, *(value or 0.0 for value in facts.by_stream.values())]
    return losses


def _all(rank: int, world_size: int, layouts: dict[str, tuple[str, ...]]) -> dict[tuple[str, str], list[float]]:
    here = runtime.Runtime(rank, world_size, rank, torch.device("cpu"))
    return {(name, run): _train(here, name, *RUNS[run]) for name, runs in layouts.items() for run in runs}


@cache
def _alone() -> dict[str, list[float]]:
    return {run: losses for (_, run), losses in run_ranks(_all, 1, {"(1,1,1)": tuple(RUNS)})[0].items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_are_the_same_on_any_layout(ranks: int) -> None:
    expected = _alone()
    for (name, run), losses in run_ranks(_all, ranks, LAYOUTS[ranks])[0].items():
        assert losses == pytest.approx(expected[run], abs=1e-6, rel=1e-6), (name, run)
    assert expected["shared by 2"] != expected["by frame"]


def test_dozens_of_layouts_are_compiled_only_where_that_is_asked() -> None:
    model, gpu = make(), torch.device("cuda")
    asked = [config(f"parallel.compile={word}").parallel for word in ("auto", "on", "off")]
    assert [wants_compile(settled(one, model), gpu) for one in asked] == [False, True, False]
    assert [wants_compile(one, gpu) for one in asked] == [True, True, False]


def test_another_slot_draws_other_noise_for_the_same_clip() -> None:
    """What ranks share of a clip is its latents alone."""
    layout = replace(CLIP)
    facts = {"seed": 1, "step": 2, "layout": layout, "fields": {}, "empty": {}, "batch": 8, "ids": ["a", "a"]}
    same = [StageLesson(layout, 2), StageLesson(layout, 2)]
    latents = draw_noise(layout.elements, "latents")[None].expand(2, -1)
    one, other = prepare_lessons(config(*BASE).objective, same, slots=[0, 4], latents=latents, **facts)
    assert not torch.equal(one.noise, other.noise) and not torch.equal(one.timesteps, other.timesteps)
    assert torch.equal(one.latents, other.latents)
