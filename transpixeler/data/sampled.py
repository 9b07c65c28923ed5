"""Say how large and how fast the videos of a config's samples are, for all that reads or makes them."""

from __future__ import annotations

from fractions import Fraction

from transpixeler.config.sections import Config, Size, UserError
from transpixeler.data.buckets import first_bucket
from transpixeler.data.prompts import Prompt
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import StreamLayout


def video_layout(
    config: Config, model: ModelFolder, size: Size | None = None, *, key: str = "sample.size"
) -> StreamLayout:
    """Return the layout of a video of a size, of `sample.size`, or without either of the first bucket that is trained.

    key: what set the size, for an error.
    """
    geometry = model.geometry.over(config.scales)
    if wanted := size or config.sample.size:
        width, height, frames = wanted
    else:
        frames, height, width = first_bucket(config.data, geometry=geometry)
    if fault := geometry.fault(width, height, frames):
        raise UserError(f"{key}: {fault}")
    return geometry.layout(tuple(config.streams), config.scales, (frames, height, width))


def size_of(prompt: Prompt, config: Config, model: ModelFolder) -> tuple[int, int, int]:
    """Return the frames, height and width of a prompt's video; a size that cannot be used is named."""
    place = "sample.size" if prompt.size is None else f"{prompt.where}: size".removeprefix(": ")
    return model.geometry.pixels(video_layout(config, model, prompt.size, key=place).shapes[0])


def frame_rate(config: Config) -> Fraction:
    """Return the frames a second of videos that are made."""
    return Fraction(config.data.fps).limit_denominator(1001)
