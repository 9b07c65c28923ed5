"""`transpixeler sample`: prompts in, folders of videos out, from a run, an adapter or the base model alone.

No data set is needed. A clip may be given: its RGB, and the model makes the mattes of it; or its mattes, and the model
paints the RGB. Under torchrun the prompts are shared out, or one model is spread over the processes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from transpixeler.config import Config, SampleConfig, UserError
from transpixeler.data.buckets import first_bucket
from transpixeler.data.catalog import patch_of
from transpixeler.data.media import decode
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.prompts import negative_prompt, prompt_lines, read_prompts
from transpixeler.models.backbone import VideoModel, model_class
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling import sampler as samplers
from transpixeler.sampling import trained
from transpixeler.sampling.files import read_background, write_sample
from transpixeler.sampling.sampler import Frames, Request, Sampler
from transpixeler.sampling.trained import Trained

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class Wish:
    """What is asked for besides `sample.*`."""

    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    count: int = 1
    out: str = "samples"
    rgb: str = ""  # a clip to make mattes of
    alpha: str = ""  # a clip of mattes to paint
    asked_layout: bool = False  # whether the user set parallel.*


def sample_command(source: Trained, runtime: Runtime, wish: Wish) -> list[Path]:
    """Makes every prompt `count` times; returns the folders that this rank wrote."""
    config, layout = trained.arranged(source.config, runtime, asked=wish.asked_layout)
    source = replace(source, config=config)
    model_cls = model_class(config.model.family)
    shape = video_layout(config, model_cls)
    check_background(config)
    prompts = _prompts(config.sample, wish)
    frames = Frames(model_cls, config.model.path, runtime.device)
    clips = _given_clips(config, wish)
    texts, negative = encode_prompts(config, prompts, model_cls, runtime)
    given = {stream: frames.encode(clip) for stream, clip in clips.items()}
    requests = _requests(config.sample, prompts, texts, shape, given, count=wish.count)
    mesh = meshes.build(layout, runtime)
    engine = trained.open_engine(source, mesh)
    sampler = Sampler(engine, mesh, config.sample, negative)
    written = []
    for number, latents in sampler.each(requests):
        if mesh.is_first_stage:
            request = requests[number]
            facts = {"model": config.model.path, "adapter": source.name, "step": source.step}
            facts |= {"rgb": wish.rgb, "alpha": wish.alpha} if given else {}
            streams = frames.decode(latents, shape)
            streams |= {shape.names[stream]: clip for stream, clip in clips.items()}  # as it came, not by the VAE
            written.append(write_video(Path(wish.out), request, streams, config, facts))
            logger.info("%s", written[-1])
    runtime.barrier()
    return written


def encode_prompts(
    config: Config, prompts: Sequence[str], model_cls: type[VideoModel], runtime: Runtime
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The text of each prompt, and the one that guidance leads away from: an empty prompt is one too, None is not."""
    negative = negative_prompt(config.sample, model_cls)
    wanted = [*prompts, *([] if negative is None else [negative])]
    texts = samplers.encode_texts(wanted, model_cls, config.model.path, runtime)
    return texts, None if negative is None else texts[negative]


def video_layout(config: Config, model_cls: type[VideoModel]) -> StreamLayout:
    """Of a video of `sample.size`."""
    geometry, patch = model_cls.vae_geometry(config.model.path), patch_of(config, model_cls)
    return samplers.layout_of(video_size(config), tuple(config.streams), geometry=geometry, patch=patch)


def video_size(config: Config) -> tuple[int, int, int]:
    """(width, height, frames): as asked, or of the first bucket."""
    if config.sample.size:
        return config.sample.size
    model_cls = model_class(config.model.family)
    stride, _ = model_cls.vae_geometry(config.model.path)
    bucket = first_bucket(config.data, vae_stride=stride, patch=patch_of(config, model_cls))
    return bucket.width, bucket.height, bucket.frames


def write_video(
    folder: Path, request: Request, streams: Mapping[str, Any], config: Config, facts: Mapping[str, Any]
) -> Path:
    """FOLDER/NAME with what `sample.formats` asks for, and beside it what it was made with."""
    sample = config.sample
    write_sample(
        folder / request.name,
        streams,
        fps=_fps(config),
        formats=sample.formats,
        alpha_mode=sample.alpha_mode,
        background=sample.background,
        facts=settings(request, sample) | dict(facts),
    )
    return folder / request.name


def check_background(config: Config) -> None:
    """One that cannot be read is told before there is a video to lay over it."""
    if "composite" in config.sample.formats and len(config.streams) > 1:
        read_background(config.sample.background, fps=_fps(config), frames=1, height=16, width=16)


def _fps(config: Config) -> Fraction:
    return Fraction(config.data.fps).limit_denominator(1001)


def settings(request: Request, sample: SampleConfig) -> dict[str, Any]:
    """What makes this video again."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": sample.steps,
        "guidance": sample.guidance,
        "shift": sample.shift,
        "scheduler": sample.scheduler,
        "negative_prompt": sample.negative_prompt,
        "given": [request.layout.names[stream] for stream in sorted(request.given)],
    }


def named(prompt: str) -> str:
    """A part of a folder's name that says which prompt it was."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "empty"


# --- parts -----------------------------------------------------------------------------------------------------------


def _prompts(config: SampleConfig, wish: Wish) -> Sequence[str]:
    asked = (*wish.prompts, *prompt_lines(wish.prompts_file, key="--prompts"))
    prompts = asked or read_prompts(config)
    if prompts or wish.rgb or wish.alpha:
        return prompts or ("",)
    raise UserError('sample: nothing to make; give --prompt "…", --prompts FILE, or set sample.prompts')


def _requests(
    config: SampleConfig,
    prompts: Sequence[str],
    texts: Mapping[str, Tensor],
    layout: StreamLayout,
    given: Mapping[int, Tensor],
    *,
    count: int,
) -> list[Request]:
    """Seeds count up, so that each video can be made again by itself."""
    requests = []
    for number, prompt in enumerate(prompt for prompt in prompts for _ in range(count)):
        seed = config.seed + number
        name = f"{number:03}-{named(prompt)}-seed{seed}"
        requests.append(Request(name, prompt, texts[prompt], seed, layout, given))
    return requests


def _given_clips(config: Config, wish: Wish) -> dict[int, Any]:
    """uint8 [F, H, W, 3] by stream."""
    paths = {0: ("--rgb", wish.rgb), 1: ("--alpha", wish.alpha)}
    paths = {stream: (option, path) for stream, (option, path) in paths.items() if path}
    if paths and len(config.streams) < 2:
        raise UserError(f"{paths.popitem()[1][0]}: the model has one stream, and nothing to make from it")
    if len(paths) == len(config.streams):
        raise UserError("--rgb, --alpha: every stream is given and none is left to make; leave one out")
    return {stream: _read_clip(option, path, config) for stream, (option, path) in paths.items()}


def _read_clip(option: str, path: str, config: Config) -> Any:
    """The clip's beginning at the rate and the size that are sampled; what that leaves out is said."""
    width, height, frames = video_size(config)
    fps = _fps(config)
    try:
        media = decode.probe(Path(path))
        there = media.frames_at(fps)
        if there < frames:
            fits = max(0, there - 1) // 4 * 4 + 1
            raise BadMedia(
                f"has {there} frames at {float(fps):g} fps, not {frames}; try --size {width}x{height}x{fits}"
            )
        if (media.frames, media.width, media.height) != (frames, width, height):
            taken = f"the first {frames} of {there} frames at {float(fps):g} fps"
            fitted = f"scaled and cropped from {media.width}×{media.height} to {width}×{height}"
            logger.info("%s: %s: %s, %s (--size)", option, path, taken, fitted)
        clip = Clip(path, Fraction(0), frames, fps, height, width)
        return decode.read_frames(Path(path), decode.frame_numbers(Path(path), clip), height=height, width=width)
    except BadMedia as fault:
        raise UserError(f"{option}: {path} {fault}") from None
