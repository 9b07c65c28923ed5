"""Tasks that are given several frames: the beginning of a video, and every k-th frame of one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.flow.test_objective import IDS, latents_of
from transpixeler.config.loading import from_overrides
from transpixeler.config.sections import ObjectiveConfig, UserError
from transpixeler.flow import objective
from transpixeler.flow.tasks import all_beside, beside_by_step, check_given, narrowed, tasks, tasks_of_step
from transpixeler.models.geometry import USUAL
from transpixeler.models.streams import LAST, StreamLayout

NAMES = ("rgb", "seg")
VIDEO = StreamLayout(NAMES, ((2, 5, 4, 4), (2, 5, 2, 2)), (1, 2, 2), scales=(1, 2))  # 17 frames by a stride of 4
EVERY = ((0, 4), (1, 4))
SLOTS = list(range(len(IDS)))


def example(config: ObjectiveConfig, layout: StreamLayout, *, step: int = 0) -> objective.Example:
    batch, latents = len(IDS), latents_of(SLOTS, layout)
    facts = {"ids": IDS, "slots": SLOTS, "batch": batch, "shift": 1.0, "seed": 1, "step": step}
    return objective.prepare(config, layout=layout, latents=latents, fields={}, empty={}, **facts)


def is_clean(it: objective.Example) -> list[bool]:
    """Tell of each time group whether its latents are those that were given."""
    pairs = zip(it.layout.split_groups(it.noisy()), it.layout.split_groups(it.latents), strict=True)
    return [torch.equal(noisy, clean) for noisy, clean in pairs]


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_a_video_is_extended_from_as_many_latent_frames_as_are_set(latents: int) -> None:
    it = example(ObjectiveConfig(tasks={"extend": 1}, extend_latents=latents), VIDEO)
    assert it.layout == VIDEO.cut([[latents], [latents]])
    assert is_clean(it) == [True, False, True, False]
    assert not it.timesteps[:, [0, 2]].any() and (it.timesteps[:, [1, 3]] > 0).all()
    assert not it.weights[:, [0, 2]].any()
    torch.testing.assert_close(it.weights.sum(1), torch.full((len(IDS),), 1 / len(IDS)))


def test_nothing_is_given_where_it_would_be_all() -> None:
    for config in (ObjectiveConfig(tasks={"extend": 1}, extend_latents=5), ObjectiveConfig(tasks={"interpolate": 1})):
        it = example(config, VIDEO)  # which holds no frames of their own, as a clip that is too short for any
        assert it.layout == VIDEO and (it.timesteps > 0).all()


def test_every_kth_frame_is_given_clean_beside_the_video_and_costs_nothing() -> None:
    read = VIDEO.with_beside(EVERY, 17)
    assert {one.times for one in read.beside} == {(1.0, 2.0, 3.0, 4.0)}
    it = example(ObjectiveConfig(tasks={"interpolate": 1}), read)
    assert it.layout == read.cut([[1], [1]])
    assert is_clean(it) == [True, False, True] * 2
    assert [bool(weight) for weight in it.weights[0]] == [False, True, False] * 2
    rgb = example(ObjectiveConfig(tasks={"interpolate_rgb": 1}), VIDEO.with_beside([(0, 4)], 17))
    assert is_clean(rgb) == [True, False, True, False], "the companion is made whole"


def test_steps_take_turns_by_what_stands_beside_and_by_k() -> None:
    weights = {"joint": 1.0, "extend": 1.0, "interpolate": 1.0, "ends_to_videos": 1.0}
    config = ObjectiveConfig(tasks=weights, interpolate_every=(2, 8))
    beside = all_beside(config, NAMES)
    assert beside == ((0, LAST), (0, 2), (0, 8), (1, LAST), (1, 2), (1, 8))
    assert beside_by_step(config, NAMES) == {frozenset({(0, k), (1, k)}) for k in (LAST, 2, 8)} | {frozenset()}
    read = VIDEO.with_beside(beside, 17)
    seen: dict[tuple[int, ...], int] = {}
    for step in range(120):
        it = example(config, read, step=step)
        kind = tuple(sorted({one.every for one in it.layout.beside}))
        names = tasks_of_step(config, NAMES, seed=1, step=step)
        assert set(names) in ({"joint", "extend"}, {"interpolate"}, {"ends_to_videos"})
        assert (kind in ((2,), (8,))) == ("interpolate" in names)
        seen[kind] = seen.get(kind, 0) + 1
    assert seen.keys() == {(), (LAST,), (2,), (8,)} and 45 < seen[()] < 75 and min(seen.values()) > 5


def test_mixed_beginnings_have_one_layout_and_each_its_own_groups() -> None:
    config = ObjectiveConfig(tasks={"extend_rgb": 1, "image_to_video": 1, "joint": 1})
    it = example(config, VIDEO)
    assert it.layout == VIDEO.cut([[1, 2], []])
    given = {tuple(row) for row in (it.timesteps == 0).tolist()}
    assert given == {(False,) * 4, (True, False, False, False), (True, True, False, False)}


def test_latents_are_narrowed_to_what_a_step_gives() -> None:
    read = VIDEO.with_beside([(0, LAST), (0, 4), (1, 4)], 17)
    latents = latents_of([0], read)
    parts = dict(zip(read.segments, read.unpack(latents), strict=True))
    for wanted in ([], [(0, LAST)], EVERY):
        to = VIDEO.with_beside(wanted, 17)
        kept = to.unpack(narrowed(latents, read, to))
        assert all(torch.equal(parts[segment], part) for segment, part in zip(to.segments, kept, strict=True))


def test_draws_of_old_configs_are_as_they_were() -> None:
    """What stands beside a video was once the last frames of some streams, by whose numbers a step was drawn."""
    config = ObjectiveConfig(tasks={"joint": 1, "ends_to_videos": 1, "last_to_video": 1})
    drawn = [next(iter(tasks_of_step(config, NAMES, seed=1, step=step))).split("_")[0] for step in range(9)]
    assert drawn == ["joint", "last", "ends", "last", "ends", "last", "ends", "last", "joint"]


def test_clips_that_are_too_short_for_a_task_are_refused() -> None:
    family = SimpleNamespace(title="Any")
    model: Any = SimpleNamespace(geometry=USUAL, fields=(), joins=False, family=family, ladder=lambda _: None)
    for task, frames, needed in (("interpolate", 4, 5), ("extend_rgb", 5, 6)):
        asked = ["data.train=[/clips]", "streams={rgb: '', seg: _seg}", f"objective.tasks={{{task}: 1}}"]
        short, long = (from_overrides([*asked, f"data.frames=[1,{n}]"]) for n in (frames, frames + 4))
        check_given(long, model)
        with pytest.raises(UserError, match=rf"objective.tasks.{task}: takes clips of {needed} frames or more"):
            check_given(short, model)


def test_one_stream_has_one_task_of_each_kind() -> None:
    assert {"extend", "interpolate"} <= tasks(("rgb",)).keys() and "extend_rgb" not in tasks(("rgb",))
    assert {"extend_rgb", "interpolate_rgb"} <= tasks(NAMES).keys()
    for shows in ({"shows": True}, {"shows": True, "stills": True}):
        assert not {"extend", "interpolate_rgb"} & tasks(NAMES, **shows).keys()
    assert replace(tasks(NAMES)["interpolate"], every=2).beside == {(0, 2), (1, 2)}
