"""A video from given frames is what the published way of three predictions makes of the same noise."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families.opensora.folder import SHOWN, make, write_folder
from tests.families.opensora.reference import Formulas
from transpixeler.config.sections import SampleConfig
from transpixeler.families.opensora.family import OpenSoraFolder
from transpixeler.flow.solver import start_noise
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.shown import show
from transpixeler.sampling.video import Video

CPU = torch.device("cpu")
STEPS, TEXT, IMAGE, FREE = 6, 7.5, 3.0, 2  # scales of guidance, and steps before it comes and goes
CONFIG = SampleConfig(
    steps=STEPS,
    guidance=TEXT,
    image_guidance=IMAGE,
    image_falloff=True,
    oscillate=FREE,
    shift="auto",
    scheduler="euler",
)
PIXELS = (9, 64, 96)
ENDS = {"head": (True, False), "tail": (False, True), "loop": (True, True), "nothing": (False, False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("opensora") / "model", SHOWN)


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *PIXELS[1:], 3), dtype=np.uint8)


def texts(seed: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {"text": torch.randn(512, 24, generator=draws), "pooled": torch.randn(20, generator=draws)}


def ours(folder: Path, ends: tuple[bool, bool], config: SampleConfig = CONFIG) -> Tensor:
    """Return the latents [C, F, H, W] that the sampler makes."""
    model, opened = make(SHOWN, seed=3), OpenSoraFolder(str(folder))
    layout, frames = StreamLayout.equal(("rgb",), opened.geometry.latent(*PIXELS), (1, 2, 2)), Frames(opened, CPU)
    first, last = ({0: pictures()[place : place + 1]} if given else {} for place, given in enumerate(ends))
    shown, unshown = show(opened, frames, layout, first, last), show(opened, frames, layout, {})
    sets = {"shown": frozenset(first), "shown_last": frozenset(last), "unshown": unshown if any(ends) else {}}
    video = Video("v", "", {**texts(1), **shown}, 5, layout, **sets)
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(pipeline=1),
        mesh=SimpleNamespace(device=CPU),
        forward=lambda x, inputs, layout, batch: model(x, *inputs, layout=layout),
        remembering_rgb=lambda *_, **__: nullcontext(),
    )
    mesh: Any = SimpleNamespace(device=CPU)
    made = Sampler(engine, mesh, config, texts(2), opened)._latents(video, lambda: None)
    return layout.unpack(made[None])[0][0]


def slowly(folder: Path, ends: tuple[bool, bool], *, shifted_by_frames: bool = True) -> Tensor:
    """The published steps, one sample and one prediction at a time."""
    velocity, vae = Formulas(dict(make(SHOWN, seed=3).named_parameters()), SHOWN), None
    vae = OpenSoraFolder(str(folder)).load_vae(device=CPU, dtype=torch.float32)
    shape = (4, 3, 8, 12)
    mask, stills = torch.zeros(1, *shape[1:]), torch.zeros(shape)
    for place, given, picture in zip((0, -1), ends, torch.from_numpy(pictures()), strict=True):
        if given:
            mask[:, place] = 1
            stills[:, place] = vae.encode(picture[None, None])[0, :, 0]
    shown, nothing = torch.cat([mask, stills]), torch.zeros(5, *shape[1:])
    wanted, unwanted = texts(1), texts(2)

    def predict(x: Tensor, t: float, text: dict[str, Tensor], cond: Tensor) -> Tensor:
        return velocity(x[None], torch.tensor([t]), text["text"][None], text["pooled"][None], cond[None])[0]

    alpha = (1 + (24 - 256) * 2 / 3840) * (math.sqrt(3) if shifted_by_frames else 1)
    levels = [alpha * t / (1 + (alpha - 1) * t) for t in (1 - step / STEPS for step in range(STEPS + 1))]
    layout = StreamLayout.equal(("rgb",), shape, (1, 2, 2))
    x = layout.unpack(start_noise(layout, 5))[0][0]
    for step in range(STEPS):
        rests = step >= FREE and step % 2 == 1
        text, image = (1.0, torch.ones(3)) if rests else (TEXT, torch.full((3,), IMAGE))
        if not rests:
            most = IMAGE + (1 - IMAGE) * step / STEPS
            image = torch.tensor([1 + (most - 1) * frame / 2 for frame in range(3)])
        a, b, c = (
            predict(x, levels[step], words, cond)
            for words, cond in ((wanted, shown), (unwanted, shown), (unwanted, nothing))
        )
        v = c + image[None, :, None, None] * (b - c) + text * (a - b)
        x = x + (levels[step + 1] - levels[step]) * v
    return torch.where(mask > 0, stills, x)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@torch.no_grad()
def test_a_video_equals_the_slow_formulas(ends: tuple[bool, bool], folder: Path) -> None:
    found, expected = ours(folder, ends), slowly(folder, ends)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_broken_twins_are_caught(folder: Path) -> None:
    ends = ENDS["loop"]
    found = ours(folder, ends)
    twins = [
        replace(CONFIG, image_falloff=False),
        replace(CONFIG, oscillate=0),
        replace(CONFIG, oscillate=4),
        replace(CONFIG, image_guidance=2.0),
        replace(CONFIG, guidance=7.0),
        replace(CONFIG, shift=3.0),
    ]
    assert all((ours(folder, ends, twin) - found).abs().max() > 1e-3 for twin in twins)
    assert (ours(folder, ENDS["head"]) - found)[:, 1].abs().max() > 1e-3
    assert (slowly(folder, ends, shifted_by_frames=False) - found).abs().max() > 1e-3
