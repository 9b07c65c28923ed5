"""One video to make: its size, its name, and the folder that it is written to.

A config says how large videos are and which files they become; `sample`, `eval` and training's evaluations ask here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from transpixeler.config.sections import Config, SampleConfig
from transpixeler.data.media.exr import check_library
from transpixeler.data.parts import named
from transpixeler.data.sampled import frame_rate
from transpixeler.flow.objective import Fields
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.files import Plate, read_background, write_sample


@dataclass(frozen=True, eq=False)
class Video:
    """One video to make."""

    name: str  # of its folder
    prompt: str
    fields: Fields  # of its prompt, without the batch
    seed: int
    layout: StreamLayout
    given: Mapping[int, Tensor] = field(
        default_factory=dict
    )  # clean latents [C, F, H, W] by stream; F may be the first frame alone
    beside: Mapping[int, Tensor] = field(default_factory=dict)  # likewise, of frames beside the videos, encoded alone
    shown: frozenset[int] = frozenset()  # streams whose given frames are in the fields
    shown_last: frozenset[int] = frozenset()  # the same of last frames, where each end is shown by itself
    unshown: Fields = field(default_factory=dict)  # of nothing shown, for guidance to what is
    negative_prompt: str | None = None  # its own; None: the config's
    negative: Fields | None = None  # the fields of its own negative prompt
    fps: Fraction | None = None  # None: the config's


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
        **({"image_guidance": sample.image_guidance, "image_falloff": sample.image_falloff} if video.unshown else {}),
        **({"oscillate": sample.oscillate} if sample.oscillate else {}),
        "shift": sample.shift,
        "scheduler": sample.scheduler,
        "negative_prompt": sample.negative_prompt if video.negative_prompt is None else video.negative_prompt,
        "given": _given(video),
    }


def _given(video: Video) -> list[str]:
    """Name what a video is made from besides its prompt."""
    names, frames = video.layout.names, [shape[1] for shape in video.layout.shapes]
    found = {stream: latents.shape[1] for stream, latents in video.given.items()} | dict.fromkeys(video.shown, 1)
    start = {1: "first frame of "} | {
        count: f"first {count} latent frames of " for count in found.values() if count > 1
    }
    parts = [f"{'' if n == frames[stream] else start[n]}{names[stream]}" for stream, n in sorted(found.items())]
    parts += [f"{named(one.every)} of {names[one.stream]}" for one in video.layout.beside if one.stream in video.beside]
    return parts + [f"last frame of {names[stream]}" for stream in sorted(video.shown_last)]


def write_video(
    folder: Path,
    video: Video,
    streams: Mapping[str, np.ndarray],
    config: Config,
    facts: Mapping[str, Any],
    plate: Plate | None = None,
) -> Path:
    """Write FOLDER/NAME with the files of `sample.formats` and the settings that made it; returns that folder.

    plate: the light of a given first stream, which EXR files then keep.
    """
    sample = config.sample
    write_sample(
        folder / video.name,
        streams,
        fps=video.fps or frame_rate(config),
        formats=sample.formats,
        alpha_mode=sample.alpha_mode,
        background=sample.background,
        transfer=config.data.transfer,
        plate=plate,
        facts=settings(video, sample) | dict(facts),
    )
    return folder / video.name


def check_formats(config: Config) -> None:
    """Refuse a format that cannot be written and a background that cannot be read, before there is a video."""
    if "exr" in config.sample.formats and len(config.streams) > 1:
        check_library("sample.formats")
    if "composite" in config.sample.formats and len(config.streams) > 1:
        read_background(config.sample.background, fps=frame_rate(config), frames=1, height=16, width=16)
