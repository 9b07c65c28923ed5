"""One video to make: its size, its name, and the folder that it is written to.

A config says how large videos are and which files they become; `sample`, `eval` and training's evaluations ask here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from transpixeler.config import Config, SampleConfig, UserError
from transpixeler.data.buckets import first_bucket
from transpixeler.data.catalog import patch_of
from transpixeler.models.backbone import VideoModel
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.files import read_background, write_sample


@dataclass(frozen=True, eq=False)
class Video:
    """One video to make."""

    name: str  # of its folder
    prompt: str
    text: Tensor  # [text_len, text_dim]
    seed: int
    layout: StreamLayout
    given: Mapping[int, Tensor] = field(default_factory=dict)  # clean latents [C, F, H, W] by stream


@dataclass(frozen=True)
class VideoShape:
    """The size of a video, in pixels and in latents."""

    width: int
    height: int
    frames: int
    layout: StreamLayout


def video_shape(config: Config, model_cls: type[VideoModel]) -> VideoShape:
    """Return the shape of `sample.size`, or where that is not set of the first bucket that is trained."""
    stride, channels = model_cls.vae_geometry(config.model.path)
    patch = patch_of(config, model_cls)
    if config.sample.size:
        width, height, frames = config.sample.size
    else:
        frames, height, width = first_bucket(config.data, vae_stride=stride, patch=patch)
    _check_size((width, height, frames), stride, patch)
    latents = (channels, (frames - 1) // stride[0] + 1, height // stride[1], width // stride[2])
    return VideoShape(width, height, frames, StreamLayout.equal(tuple(config.streams), latents, patch))


def _check_size(size: tuple[int, int, int], stride: Sequence[int], patch: Sequence[int]) -> None:
    """Refuse a [width, height, frames] whose latents do not divide into patches, and name the nearest that do."""
    (width, height, frames), (per_latent, tall, wide) = size, stride
    across, down = wide * patch[2], tall * patch[1]
    if width % across or height % down or min(width, height) < 1:
        near = [max(1, round(n / unit)) * unit for n, unit in ((width, across), (height, down))]
        raise UserError(
            f"sample.size: {width}x{height} is not a multiple of {across}x{down} pixels; {near[0]}x{near[1]} would be"
        )
    if frames < 1 or (frames - 1) % per_latent:
        fits = max(0, round((frames - 1) / per_latent)) * per_latent + 1
        raise UserError(f"sample.size: {frames} frames are not {per_latent}k+1; {fits} would be")


def frame_rate(config: Config) -> Fraction:
    """Return the frames a second of videos that are made."""
    return Fraction(config.data.fps).limit_denominator(1001)


def name_part(text: str) -> str:
    """Return a part of a folder's name that tells a prompt or an id from others."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:40].strip("-") or "empty"


def settings(video: Video, sample: SampleConfig) -> dict[str, Any]:
    """Return what makes this video again."""
    return {
        "prompt": video.prompt,
        "seed": video.seed,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "shift": sample.shift,
        "scheduler": sample.scheduler,
        "negative_prompt": sample.negative_prompt,
        "given": [video.layout.names[stream] for stream in sorted(video.given)],
    }


def write_video(
    folder: Path, video: Video, streams: Mapping[str, np.ndarray], config: Config, facts: Mapping[str, Any]
) -> Path:
    """Write FOLDER/NAME with the files of `sample.formats` and the settings that made it; returns that folder."""
    sample = config.sample
    write_sample(
        folder / video.name,
        streams,
        fps=frame_rate(config),
        formats=sample.formats,
        alpha_mode=sample.alpha_mode,
        background=sample.background,
        facts=settings(video, sample) | dict(facts),
    )
    return folder / video.name


def check_background(config: Config) -> None:
    """Refuse a background that cannot be read, before there is a video to lay over it."""
    if "composite" in config.sample.formats and len(config.streams) > 1:
        read_background(config.sample.background, fps=frame_rate(config), frames=1, height=16, width=16)
