"""Videos are those of diffusers' pipelines: at the same levels, with the same guidance, from a caption and an image."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families.ltx.pipeline import write_pipeline
from transpixeler.config.sections import SampleConfig
from transpixeler.families.ltx import schedule
from transpixeler.families.ltx.family import LtxFolder
from transpixeler.flow.solver import denoise, start_noise
from transpixeler.flow.tasks import Task
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling import sampler
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.video import Video

# as long as texts get: diffusers' pipeline lets the encoder attend the padding of shorter ones, as test_encoders says
PROMPT, NEGATIVE = "a long caption of many words, " * 9, "a worst quality of many words " * 9
STEPS, SCALE = 5, 3.0
PIXELS = (9, 64, 96)
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "shift_terminal": 0.1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write version 0.9.0, whose scheduler shifts by tokens."""
    folder = tmp_path_factory.mktemp("ltx")
    write_pipeline(folder)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | DYNAMIC))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from diffusers.pipelines.ltx.pipeline_ltx_image2video import LTXImageToVideoPipeline

    pipeline = LTXImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(
    folder: Path, layout: StreamLayout, *, shift: float | str = "auto", given: dict[int, Tensor] | None = None
) -> Tensor:
    """Return the latents [1, C, F, H, W] of our sampler with euler."""
    opened, how = LtxFolder(str(folder)), {"device": torch.device("cpu"), "dtype": torch.float32}
    model = opened.build(streams=("rgb",), fps=25.0)
    load_weights(model, WeightSource(str(folder), opened.family.internal_names))
    text, negative = opened.load_text_encoder(**how).encode([PROMPT, NEGATIVE])
    engine = SimpleNamespace(
        config=SimpleNamespace(pipeline=1),
        mesh=SimpleNamespace(device=torch.device("cpu")),
        forward=lambda x, inputs, layout, batch: model(x, *inputs, layout=layout),
    )
    fields = [{"text": one["text"], "lengths": torch.tensor(len(one["text"]))} for one in (text, negative)]
    velocity = sampler.guided(engine, layout, *fields, guidance=lambda _: SCALE)
    config = SampleConfig(steps=STEPS, shift=shift, scheduler="euler")
    solver = Sampler(engine, None, config, None, opened)._solver(Video("", "", {}, 0, layout))
    return layout.unpack(denoise(velocity, start_noise(layout, 3), layout, solver, given=given))[0]


def packed(video: Tensor) -> Tensor:
    """[1, C, F, H, W] → [1, tokens, C], as the pipelines hold latents."""
    return video.flatten(2).transpose(1, 2)


def run(pipeline: Any, **inputs: Any) -> Tensor:
    frames, height, width = PIXELS
    return pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_frames=frames,
        frame_rate=25,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
        **inputs,
    ).frames


def layout_of(folder: Path) -> StreamLayout:
    geometry = LtxFolder(str(folder)).geometry
    return StreamLayout.equal(("rgb",), geometry.latent(*PIXELS), geometry.patch)


@torch.no_grad()
def test_a_video_from_a_caption_equals_the_pipelines(folder: Path, theirs: Any) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

    pipeline = LTXPipeline(**dict(theirs.components))
    pipeline.set_progress_bar_config(disable=True)
    layout = layout_of(folder)
    expected = run(pipeline, latents=packed(layout.unpack(start_noise(layout, 3))[0]))
    assert (packed(made(folder, layout)) - expected).abs().max() < 1e-4
    assert (packed(made(folder, layout, shift=5.0)) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_a_video_from_an_image_equals_the_pipelines(folder: Path, theirs: Any) -> None:
    whole = layout_of(folder)
    layout = Task("", first=frozenset({0})).cut(whole)
    first = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(7))
    start = layout.unpack(start_noise(layout, 3))[0].clone()
    start[0, :, :1] = first
    expected = run(theirs, image=torch.zeros(1, 3, *PIXELS[1:]), latents=packed(start))
    ours = made(folder, layout, given={0: first})
    assert torch.equal(ours[0, :, :1], first)
    assert (packed(ours) - expected).abs().max() < 1e-4
    assert (packed(made(folder, whole)) - expected).abs().max() > 1e-2


def test_later_versions_have_levels_of_their_own() -> None:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    for steps in (1, 2, 5, 30, 41):
        expected = linear_quadratic_schedule(steps)
        np.testing.assert_allclose(schedule.linear_quadratic(steps), expected, atol=1e-6)
