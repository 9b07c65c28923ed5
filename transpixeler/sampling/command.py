"""The command `transpixeler sample`: a run, an adapter or a base and prompts go in, folders of videos come out.

No data set is needed. A clip may be given: its RGB, and the model makes the mattes of it; or its mattes, and the model
paints the RGB; or an image, which becomes the first frame. Under torchrun the prompts are shared
out, or one model is spread over the processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from transpixeler.config import Config, SampleConfig, UserError
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import frame_numbers, probe, read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.prompts import prompt_lines, read_prompts
from transpixeler.files import check_place, writing_to
from transpixeler.flow.objective import Fields, Task, check_given, trained
from transpixeler.models.conditions import shows_frames
from transpixeler.models.family import ModelFolder, open_model
from transpixeler.models.geometry import Geometry
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.sampler import Sampler, check_guidance
from transpixeler.sampling.saves import SavedModel
from transpixeler.sampling.shown import show
from transpixeler.sampling.texts import encode_prompts
from transpixeler.sampling.video import (
    Video,
    check_background,
    frame_rate,
    name_part,
    video_layout,
    write_video,
)

logger = logging.getLogger("transpixeler")
GIVEN = ("rgb", "alpha", "image", "last")  # options that name a file


@dataclass(frozen=True)
class SampleOptions:
    """The command's options that are no keys of `sample.*`."""

    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    count: int = 1  # videos of each prompt
    out: str = "samples"
    rgb: str = ""  # a clip to make mattes of
    alpha: str = ""  # a clip of mattes to paint
    image: str = ""  # the first frame: of RGB, and of the alpha that it may have
    last: str = ""  # the last frame, likewise
    asked_layout: bool = False  # whether the user set parallel.*


def sample_command(source: SavedModel, runtime: Runtime, options: SampleOptions) -> list[Path]:
    """Make every prompt's videos; returns the folders that this rank wrote."""
    config, layout = fit_layout(source.config, runtime, asked=options.asked_layout)
    source = replace(source, config=config)
    model = open_model(config.model)
    check_given(config, model)
    check_guidance(config.sample, model)
    shape = video_layout(config, model)
    check_background(config)
    check_place(Path(options.out), "--out")
    prompts = _prompts(config.sample, options)
    frames = Frames(model, runtime.device, upsample=config.sample.upsample)
    size = model.geometry.pixels(shape.shapes[0])
    clips = _given_clips(config, options, model.geometry, size)
    first, last = (_given_frame(config, options, option, model, size) for option in ("--image", "--last"))
    if options.last and shows_frames(model.fields) and first.keys() != last.keys():
        raise UserError("--image, --last: one has an alpha channel and the other has not; give both one, or neither")
    texts = encode_prompts(config, prompts, model, runtime)
    shown = show(model, frames, shape, {n: np.concatenate([first[n], last.get(n, first[n])]) for n in first})
    parts = (clips, {}, {}) if shown else (clips, first, last)
    clip, begins, ends = (
        {stream: frames.encode(part, scale=config.scales[stream]) for stream, part in given.items()} for given in parts
    )
    shape = Task("", given=frozenset(clip), first=frozenset(begins), last=frozenset(ends)).cut(shape)
    fields = {prompt: {**text, **shown} for prompt, text in texts.by_prompt.items()}
    make = partial(Video, layout=shape, given=begins | clip, lasts=ends, shown=frozenset(first if shown else ()))
    videos = _videos(config.sample, prompts, fields, make, count=options.count)
    mesh = meshes.build(layout, runtime)
    sampler = Sampler(open_engine(source, mesh), mesh, config.sample, texts.negative, model)
    facts = {"model": config.model.path, "adapter": source.name, "step": source.step}
    facts |= {name: getattr(options, name) for name in GIVEN} if clips or first else {}
    written = []
    for number, latents in sampler.each(videos):
        if mesh.is_first_stage:
            streams = frames.decode(latents, shape, known=clips)
            with writing_to(Path(options.out), "--out"):
                written.append(write_video(Path(options.out), videos[number], streams, config, facts))
            logger.info("%s", written[-1])
    runtime.barrier()
    return written


def _prompts(config: SampleConfig, options: SampleOptions) -> Sequence[str]:
    asked = (*options.prompts, *prompt_lines(options.prompts_file, key="--prompts"))
    prompts = asked or read_prompts(config)
    if prompts or any(getattr(options, name) for name in GIVEN):
        return prompts or ("",)
    raise UserError('sample: nothing to make; give --prompt "…", --prompts FILE, or set sample.prompts')


def _videos(
    config: SampleConfig,
    prompts: Sequence[str],
    fields: Mapping[str, Fields],
    make: Callable[[str, str, Fields, int], Video],
    *,
    count: int,
) -> list[Video]:
    """List the videos to make. Each has a seed of its own, so that it can be made again by itself."""
    videos = []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(count)):
        seed = config.seed + number
        name = f"{number:03}-{name_part(prompt)}-seed{seed}"
        videos.append(make(name, prompt, fields[prompt], seed))
    return videos


# --- given clips -----------------------------------------------------------------------------------------------------


def _given_clips(
    config: Config, options: SampleOptions, geometry: Geometry, size: tuple[int, int, int]
) -> dict[int, np.ndarray]:
    """Return the frames uint8 [F, H, W, 3] of --rgb and --alpha by stream."""
    paths = {0: ("--rgb", options.rgb), 1: ("--alpha", options.alpha)}
    paths = {stream: (option, path) for stream, (option, path) in paths.items() if path}
    if paths and len(config.streams) < 2:
        raise UserError(f"{paths.popitem()[1][0]}: the model has one stream, and nothing to make from it")
    if len(paths) == len(config.streams):
        raise UserError("--rgb, --alpha: every stream is given and none is left to make; leave one out")
    return {
        stream: _read_clip(option, path, frame_rate(config), geometry, size) for stream, (option, path) in paths.items()
    }


def _given_frame(
    config: Config, options: SampleOptions, option: str, model: ModelFolder, size: tuple[int, int, int]
) -> dict[int, np.ndarray]:
    """Return the frame uint8 [1, H, W, 3] of --image or --last by stream: RGB, and the alpha that the file may have."""
    path, geometry = options.image if option == "--image" else options.last, model.geometry
    _check_ends(options, option, model, frames=size[0])
    if not path:
        return {}
    if options.rgb:
        raise UserError(f"{option}, --rgb: --rgb gives every frame; leave {option} out")
    if not geometry.first_alone:
        raise UserError(f"{option}: this model's latents hold no single frame, so none can be given; leave it out")
    frames = _read_clip(option, path, frame_rate(config), geometry, (1, *size[1:]))
    if len(config.streams) == 1 or options.alpha or not probe(Path(path)).alpha:
        return {0: frames}
    if not any(1 in task.first for task in trained(config.objective, tuple(config.streams))):
        logger.info("%s: the alpha of %s is left out: no trained task gives it (images_to_videos does)", option, path)
        return {0: frames}
    try:
        both = read_rgba(Path(path), (0,), height=size[1], width=size[2], fill=Fill.of(config.data))
    except BadMedia as fault:
        raise UserError(f"{option}: {path} {fault}") from None
    return dict(enumerate(both))


def _check_ends(options: SampleOptions, option: str, model: ModelFolder, *, frames: int) -> None:
    """Refuse ends that do not go together, or that the model cannot be given."""
    to_last = any(field.last for field in model.fields)
    if options.image and frames == 1 and shows_frames(model.fields):
        raise UserError("--image: a video of one frame leaves nothing to make; leave it out, or make --size longer")
    if option == "--image" and options.image and to_last and not options.last:
        raise UserError("--image: this model goes from a first frame to a last one; give --last too")
    if option != "--last" or not options.last:
        return
    if not options.image:
        raise UserError("--last: needs the first frame too; give it with --image")
    if frames == 1:
        raise UserError("--last: a video of one frame ends with its first; leave it out, or make --size longer")
    if shows_frames(model.fields) and not to_last:
        raise UserError("--last: this model is shown a first frame alone; leave it out")


def _read_clip(option: str, path: str, fps: Fraction, geometry: Geometry, size: tuple[int, int, int]) -> np.ndarray:
    """Read a clip's beginning at the rate and size that are sampled, and log what that leaves out."""
    frames, height, width = size
    try:
        media = probe(Path(path))
        there = media.frames_at(fps)
        if there < frames:
            fits = geometry.longest(there)
            raise BadMedia(
                f"has {there} frames at {float(fps):g} fps, not {frames}; try --size {width}x{height}x{fits}"
            )
        if (media.frames, media.width, media.height) != (frames, width, height):
            taken = f"the first {frames} of {there} frames at {float(fps):g} fps"
            fitted = f"scaled and cropped from {media.width}×{media.height} to {width}×{height}"
            logger.info("%s: %s: %s, %s (--size)", option, path, taken, fitted)
        clip = Clip(path, Fraction(0), frames, fps, height, width)
        return read_frames(Path(path), frame_numbers(Path(path), clip), height=height, width=width)
    except BadMedia as fault:
        raise UserError(f"{option}: {path} {fault}") from None
