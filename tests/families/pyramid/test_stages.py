"""Ends of stages, times, noise and jumps are the paper's formulas, written out slowly here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig
from transpixeler.families.pyramid.lessons import PAST_NOISE, StageLesson, past_of
from transpixeler.families.pyramid.stages import all_stages, block_noise, entered, halved_noise
from transpixeler.flow.draws import draw_noise, draw_times, generator
from transpixeler.flow.lessons import prepare_lessons
from transpixeler.models.streams import StreamLayout

GAMMA = 1 / 3
CLIP = StreamLayout(("rgb", "seg"), ((3, 6, 8, 16),) * 2, (1, 2, 2))
UNIFORM = ObjectiveConfig(density="uniform", caption_dropout=0)
KEY = (1, 5, "a", 2)  # seed, step, sample, slot


def test_starts_are_corrected_and_times_go_by_the_length_of_the_way() -> None:
    bounds = [1.0, 0.667, 0.334, 0.0]  # thirds, in whole thousandths
    starts, lengths = [], []
    for stage in range(3):
        o = 1 - bounds[stage]
        starts.append(bounds[stage] if stage == 0 else 1 - o / (math.sqrt(1 + 1 / GAMMA) * (1 - o) + o))
        lengths.append(starts[-1] - bounds[stage + 1])
    begun = 0.0
    for stage, found in enumerate(all_stages()):
        first = (1000 - int(1000 * begun / sum(lengths))) / 1000
        begun += lengths[stage]
        last = (1000 - int(1000 * begun / sum(lengths))) / 1000 if stage < 2 else 0.001
        expected = (starts[stage], bounds[stage + 1], first, last)
        assert (found.start, found.end, found.first, found.last) == pytest.approx(expected, abs=1e-9)
        assert float(found.told(torch.tensor(0.25))) == pytest.approx(last + 0.25 * (first - last))
    assert starts == pytest.approx([1.0, 0.8, 0.5], abs=1e-3)  # at exact thirds, γ = 1/3


def test_a_jump_gives_the_noise_that_the_next_stage_starts_with() -> None:
    """α²·σ_e²·11ᵀ + β²·((1 + γ)·I − γ·11ᵀ) = σ_s²·I in each block of 2×2, and the mean is kept."""
    ones, one = torch.ones(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    stages = all_stages()
    for before, stage in itertools.pairwise(stages):
        block = (1 + GAMMA) * one - GAMMA * ones
        found = stage.keep**2 * before.end**2 * ones + stage.renew**2 * block
        torch.testing.assert_close(found, stage.start**2 * one, atol=1e-12, rtol=0)
        assert stage.keep * (1 - before.end) == pytest.approx(1 - stage.start, abs=1e-12)
        o = 1 - before.end
        alpha = 1 / (math.sqrt(1 + 1 / GAMMA) * (1 - o) + o)
        assert (stage.keep, stage.renew) == pytest.approx((alpha, alpha * (1 - o) / math.sqrt(GAMMA)))
        x, noise = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 4, 4)
        up = F.interpolate(x[:, :, 0], scale_factor=2, mode="nearest")[:, :, None]
        torch.testing.assert_close(entered(x, stage, noise), stage.keep * up + stage.renew * block_noise(noise))


def test_noise_has_the_variances_that_are_said() -> None:
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 1, 4, 4, generator=draws)
    assert float(halved_noise(halved_noise(noise)).var()) == pytest.approx(1, rel=0.05)
    expected = 2 * F.interpolate(noise[:, :, 0], scale_factor=0.5, mode="bilinear")
    torch.testing.assert_close(halved_noise(noise)[:, :, 0], expected)
    for gamma in (GAMMA, 0.2):
        blocks = block_noise(noise, gamma)[:, 0, 0].unflatten(1, (2, 2)).unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4)
        rows = blocks.reshape(-1, 4)
        covariance = (1 + gamma) * torch.eye(4) - gamma * torch.ones(4, 4)
        torch.testing.assert_close(rows.T @ rows / len(rows), covariance, atol=0.04, rtol=0)


# -- what a sample is taught


def resized(x: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    """[C, F, H, W] at 1/size, by halvings of each frame."""
    for _ in range(int(math.log2(size))):
        x = torch.stack([F.interpolate(f[None], scale_factor=0.5, mode=mode)[0] for f in x.unbind(1)], dim=1)
    return x


def slow_ends(clean: Tensor, noise: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """Return the ends of a stage's way [C, F, h, w] of a clip and noise of its size, by the paper."""
    size = 4 // 2**stage
    small, own = resized(clean, size), size * resized(noise, size)
    sigma_end = [0.667, 0.334, 0.0][stage]
    end = sigma_end * own + (1 - sigma_end) * small
    if stage == 0:
        return end, own
    below = resized(clean, 2 * size)
    up = torch.stack([F.interpolate(f[None], scale_factor=2, mode="nearest")[0] for f in below.unbind(1)], dim=1)
    o = 1 - [1.0, 0.667, 0.334][stage]
    start = 1 - o / (2 * (1 - o) + o)
    return end, start * own + (1 - start) * up


def taught(lesson: StageLesson, task: str = "joint"):
    latents = draw_noise(CLIP.elements, "latents")[None]
    config = ObjectiveConfig(density="uniform", caption_dropout=0, tasks={task: 1.0})
    facts = {"seed": KEY[0], "step": KEY[1], "ids": [KEY[2]], "slots": [KEY[3]], "batch": 4}
    (found,) = prepare_lessons(config, [lesson], layout=CLIP, latents=latents, fields={}, empty={}, **facts)
    place = float(draw_times(config, seed=KEY[0], step=KEY[1], slots=[KEY[3]], batch=4, shift=1.0))
    return found, [part[0] for part in CLIP.unpack(latents)], place


@pytest.mark.parametrize("stage", range(3))
def test_a_whole_clip_on_one_stage_lies_between_its_ends(stage: int) -> None:
    lesson = StageLesson(CLIP, stage)
    found, clean, place = taught(lesson)
    noise = CLIP.unpack(draw_noise(lesson.noises, *KEY)[None, : CLIP.elements])
    shown, target = (found.layout.unpack(x) for x in (found.noisy(), found.target()))
    for stream in range(2):
        end, start = slow_ends(clean[stream], noise[stream][0], stage)
        torch.testing.assert_close(shown[stream][0], place * start + (1 - place) * end, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(target[stream][0], start - end, atol=1e-5, rtol=1e-5)
    one = all_stages()[stage]
    told = torch.full((1, 2), one.last + place * (one.first - one.last))
    torch.testing.assert_close(found.inputs[0], told)
    assert found.weights.tolist() == [[1 / 8, 1 / 8]]


@pytest.mark.parametrize("unit", [0, 1, 2, 5])
@pytest.mark.parametrize("stage", range(3))
def test_a_frame_is_taught_behind_earlier_ones_of_falling_size(stage: int, unit: int) -> None:
    lesson = StageLesson(CLIP, stage, unit)
    found, clean, place = taught(lesson)
    layout, whole = found.layout, draw_noise(lesson.noises, *KEY)[None]
    noise, over = CLIP.unpack(whole[:, : CLIP.elements]), layout.unpack(whole[:, CLIP.elements :])
    sigma = float(torch.rand((), generator=generator("past", *KEY))) / 3
    assert 0 <= sigma <= PAST_NOISE
    pieces: list[tuple[int, int, int]] = []  # the paper's history: level, first and last frame, the newest first
    level, newest = stage, unit - 1
    while newest >= 0:
        oldest = 0 if pieces and level == 0 else newest
        pieces.append((level, oldest, newest))
        level, newest = max(level - 1, 0), oldest - 1
    shown, target = layout.unpack(found.noisy()), layout.unpack(found.target())
    assert len(shown) == 2 * (len(pieces) + 1)
    told = all_stages()[stage].told(torch.tensor(place))
    for stream in range(2):
        first = stream * (len(pieces) + 1)
        for at, (level, oldest, newest) in enumerate(reversed(pieces), start=first):
            history = resized(clean[stream], 4 // 2**level)[:, oldest : newest + 1]
            torch.testing.assert_close(shown[at][0], sigma * over[at][0] + (1 - sigma) * history, atol=1e-5, rtol=1e-5)
            assert not found.weights[0, at] and layout.segments[at].begin == oldest
        at = first + len(pieces)
        end, start = (x[:, unit : unit + 1] for x in slow_ends(clean[stream], noise[stream][0], stage))
        torch.testing.assert_close(shown[at][0], place * start + (1 - place) * end, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(target[at][0], start - end, atol=1e-5, rtol=1e-5)
        assert float(found.weights[0, at]) == pytest.approx(1 / 8)
    torch.testing.assert_close(found.inputs[0], torch.full((1, len(shown)), float(told)))


def test_twins_are_caught() -> None:
    found, clean, _place = taught(StageLesson(CLIP, 1))
    noise = CLIP.unpack(draw_noise(StageLesson(CLIP, 1).noises, *KEY)[None, : CLIP.elements])
    _end, start = slow_ends(clean[0], noise[0][0], 1)
    assert (found.layout.unpack(found.target())[0][0] - (start - resized(clean[0], 2))).abs().max() > 0.1
    assert past_of(2, 5) != past_of(1, 5) != past_of(0, 5)
    assert [(p.frames, p.scale) for p in past_of(2, 5)] == [(3, 4), (1, 2), (1, 1)]


def test_what_is_given_is_clean_at_the_stages_size_and_told_so() -> None:
    for unit in (None, 3):
        found, clean, _ = taught(StageLesson(CLIP, 1, unit), "rgb_to_aux")
        shown, groups = found.layout.unpack(found.noisy()), found.layout.groups
        own = resized(clean[0], 2)
        torch.testing.assert_close(shown[len(groups) // 2 - 1][0], own if unit is None else own[:, 3:4])
        for number, group in enumerate(groups):
            assert bool(found.inputs[0][0, number]) == (group.stream == 1)
        assert not found.weights[0, : len(groups) // 2].any() and float(found.weights.sum()) == pytest.approx(1 / 4)
