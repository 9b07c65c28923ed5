"""A video is made from stage to stage, and frame by frame, as the paper's formulas make it one step at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families.pyramid.folder import TINY, make
from tests.families.pyramid.reference import Formulas
from transpixeler.config.sections import SampleConfig
from transpixeler.families.pyramid.family import PyramidFolder
from transpixeler.families.pyramid.lessons import PyramidLadder
from transpixeler.flow.draws import draw_noise
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.video import Video

CPU, STEPS, GUIDANCE, FIRST = torch.device("cpu"), 2, 3.0, 5.0
SHAPE = (4, 3, 8, 8)
# σ at the start and the end of each stage, and the times that are told there
SIGMAS = [(1.0, 0.667), (1 - 0.333 / (2 * 0.667 + 0.333), 0.334), (1 - 0.666 / (2 * 0.334 + 0.666), 0.0)]
TOLD = [(1.0, 0.744), (0.744, 0.386), (0.386, 0.001)]


def texts(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        "text": torch.randn(128, 24, generator=draws),
        "text_length": torch.tensor(4 + seed),
        "pooled": torch.randn(20, generator=draws),
    }


def sampler(ladder: PyramidLadder, *, rank: int = 0, ranks: int = 1, guided: bool = True) -> tuple[Sampler, list[int]]:
    """Return a sampler on a rank, and a list that counts how often the model is asked."""
    model, asked = make(seed=3), [0]

    @contextmanager
    def evaluating() -> Iterator[None]:
        yield

    def forward(x: Tensor, inputs: Any, layout: StreamLayout, batch: int) -> Tensor:
        asked[0] += 1
        return model(x, *inputs, layout=layout)

    where: Any = SimpleNamespace(device=CPU, layout=SimpleNamespace(data=ranks), data_rank=rank, speaks=False)
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(pipeline=1), mesh=where, forward=forward, evaluating=evaluating
    )
    config = SampleConfig(steps=STEPS, guidance=GUIDANCE, first_guidance=FIRST, shift="auto", scheduler="euler")
    return Sampler(engine, where, config, texts(2) if guided else None, PyramidFolder("none"), ladder), asked


def video(shape: tuple[int, int, int, int] = SHAPE, given: dict[int, Tensor] | None = None) -> Video:
    layout = StreamLayout(("rgb",), (shape,), (1, 2, 2))
    return Video("v", "a", texts(1), 5, layout.cut([[1]]) if given else layout, given or {})


def smaller(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = torch.stack([F.interpolate(f[None], scale_factor=0.5, mode="bilinear")[0] for f in x.unbind(1)], dim=1)
    return x


def slowly(by_frame: bool, first: Tensor | None = None) -> Tensor:
    """Return [C, F, H, W], one step and one prediction at a time."""
    formulas = Formulas(dict(make(seed=3).named_parameters()), TINY)
    wanted, unwanted = texts(1), texts(2)

    def predict(parts: list[Tensor], told: float, scale: float) -> Tensor:
        found = []
        for one in (wanted, unwanted):
            words = one["text"][: int(one["text_length"])]
            found.append(formulas.sequence(parts, torch.tensor(told), words, one["pooled"])[-1])
        return found[1] + scale * (found[0] - found[1])

    noise = draw_noise(math.prod(SHAPE), "sample", 5, "rgb").reshape(SHAPE)
    made = torch.zeros(SHAPE) if first is None else torch.cat([first, torch.zeros(4, 2, 8, 8)], dim=1)
    for unit in range(0 if first is None else 1, 3) if by_frame else (None,):
        frames = slice(None) if unit is None else slice(unit, unit + 1)
        x = 4 * smaller(noise, 2)[:, frames]
        for stage in range(3):
            if stage:
                x = jumped(x, stage, unit)
            history: list[Tensor] = []
            level, newest = stage, (unit or 0) - 1
            while newest >= 0:
                oldest = 0 if history and level == 0 else newest
                history.insert(0, smaller(made, 2 - level)[:, oldest : newest + 1])
                level, newest = max(level - 1, 0), oldest - 1
            scale = FIRST if by_frame and unit == 0 else GUIDANCE
            places = [1.0, 0.001, 0.0]  # of two steps
            for place, after in itertools.pairwise(places):
                told = TOLD[stage][1] + place * (TOLD[stage][0] - TOLD[stage][1])
                x = x + (after - place) * predict([*history, x], told, scale)
        made[:, frames] = x
    return made


def jumped(x: Tensor, stage: int, unit: int | None) -> Tensor:
    """Enlarge what a stage made, and renew its noise: α·up + β·n, with n of negative covariance in blocks of 2×2."""
    up = torch.stack([F.interpolate(f[None], scale_factor=2, mode="nearest")[0] for f in x.unbind(1)], dim=1)
    o, gamma = 1 - SIGMAS[stage - 1][1], 1 / 3
    alpha = 1 / (math.sqrt(1 + 1 / gamma) * (1 - o) + o)
    raw = draw_noise(up.numel(), "sample", f"5/{stage}/{unit}", "rgb").reshape(up.shape)
    n = torch.zeros_like(raw)
    root = math.sqrt(1 + gamma) * (torch.eye(4) - torch.full((4, 4), 1 / 4))  # its square is (1 + γ)·I − γ·11ᵀ
    for row in range(0, up.shape[2], 2):
        for column in range(0, up.shape[3], 2):
            block = raw[:, :, row : row + 2, column : column + 2].reshape(4, -1, 4)
            n[:, :, row : row + 2, column : column + 2] = (block @ root).reshape(4, -1, 2, 2)
    return alpha * up + alpha * (1 - o) / math.sqrt(gamma) * n


@pytest.mark.parametrize("by_frame", [False, True], ids=["whole", "by frame"])
@torch.no_grad()
def test_a_video_equals_the_slow_formulas(by_frame: bool) -> None:
    made = sampler(PyramidLadder(by_frame=by_frame))[0]._latents(video(), lambda: None)
    torch.testing.assert_close(made.reshape(SHAPE), slowly(by_frame), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_first_frame_is_gone_on_from() -> None:
    first = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    it, asked = sampler(PyramidLadder(by_frame=True))
    made = it._latents(video(given={0: first}), lambda: None).reshape(SHAPE)
    assert torch.equal(made[:, :1], first) and asked[0] == 2 * 3 * STEPS
    torch.testing.assert_close(made, slowly(True, first), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_ranks_ask_their_model_equally_often_whatever_they_make() -> None:
    """Sharded weights are gathered by all ranks at once."""
    videos = [video(), video((4, 1, 8, 8)), video((4, 2, 8, 8))]
    alone, asked = sampler(PyramidLadder(by_frame=True), guided=False)
    expected = dict(alone.each(videos))
    assert asked[0] == (3 + 1 + 2) * 3 * STEPS
    counts, found = [], {}
    for rank in range(2):
        it, asked = sampler(PyramidLadder(by_frame=True), rank=rank, ranks=2, guided=False)
        steps: list[int] = []
        found |= dict(it.each(videos, after_step=lambda steps=steps: steps.append(1)))
        counts.append((asked[0], len(steps)))
    assert counts[0] == counts[1] == ((3 + 3) * 3 * STEPS,) * 2  # the last turn repeats the first video
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
