"""Videos of a tiny model of two experts, as our sampler makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.families.wan.pipelines import CPU, NEGATIVE, PROMPT, STEPS, layout_of, texts
from tests.support.ranks import run_ranks
from transpixeler.config import loading
from transpixeler.models.family import open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.model import open_engine
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.saves import SavedModel, load_saved
from transpixeler.sampling.shown import show
from transpixeler.sampling.video import Video

PIXELS = (9, 64, 64)
SCALES = {"high": 4.0, "low": 3.0}
GUIDED = f"sample.guidance={{high: {SCALES['high']}, low: {SCALES['low']}}}"


def _video(rank: int, world_size: int, folder: Path, overrides: tuple[str, ...], images: dict[int, Any]) -> Tensor:
    here = Runtime(rank, world_size, rank, CPU)
    config = loading.from_overrides(
        [
            *(f"model.path={folder}", "streams={rgb: ''}", "lora.enabled=false", f"sample.steps={STEPS}"),
            *("sample.shift=auto", f"sample.negative_prompt={NEGATIVE}", *overrides),
        ]
    )
    model, layout = open_model(config.model), layout_of(folder, PIXELS)
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    text, negative = texts(model)
    fields = {**text, **show(model, Frames(model, CPU), layout, images)}
    engine = open_engine(SavedModel(config, "base"), mesh)
    sampler = Sampler(engine, mesh, config.sample, negative, model)
    (_, latents), *_ = sampler.each([Video("", PROMPT, fields, 3, layout)] * world_size)
    return latents


def video(folder: Path, *overrides: str, ranks: int = 1, images: dict[int, Any] | None = None) -> Tensor:
    """Return the latents [1, C, F, H, W] of our sampler."""
    found = run_ranks(_video, ranks, folder, overrides, images or {})[0]
    return layout_of(folder, PIXELS).unpack(found[None])[0]


def sampled(source: str, *, ema: bool | None = None) -> Tensor:
    found = run_ranks(_video_of_a_save, 1, source, ema)[0]
    path = Path(load_saved(source).config.model.path)
    return layout_of(path, PIXELS).unpack(found[None])[0]


def _video_of_a_save(rank: int, world_size: int, source: str, ema: bool | None) -> Tensor:
    here = Runtime(rank, world_size, rank, CPU)
    keys = [f"sample.steps={STEPS}", "sample.shift=auto", f"sample.negative_prompt={NEGATIVE}", GUIDED]
    saved = load_saved(source, keys, ema=ema)
    config = saved.config
    model, layout = open_model(config.model), layout_of(Path(config.model.path), PIXELS)
    mesh = meshes.build(meshes.resolve(config.parallel, world_size), here)
    text, negative = texts(model)
    sampler = Sampler(open_engine(saved, mesh), mesh, config.sample, negative, model)
    (_, latents), *_ = sampler.each([Video("", PROMPT, text, 3, layout)])
    return latents
