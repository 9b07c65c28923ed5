"""The command `transpixeler sample`: a run, an adapter or a base and prompts go in, folders of videos come out.

No data set is needed. A clip may be given: its RGB, and the model makes the mattes of it; or its mattes, and the model
paints the RGB; or an image, which becomes the first frame. Under torchrun the prompts are shared
out, or one model is spread over the processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from transpixeler.config import SampleConfig, UserError
from transpixeler.data.prompts import NOTHING_GIVEN, GivenFiles, Prompt, prompt_lines, read_prompts, texts_of
from transpixeler.files import check_place, clear_unfinished, shown_path, writing_to
from transpixeler.flow.objective import check_given
from transpixeler.models.family import ModelFolder, open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.given import given_light
from transpixeler.sampling.made import ASKED, asked_for, find_made
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.requests import Maker, Request, Videos, list_requests
from transpixeler.sampling.sampler import Sampler, check_guidance
from transpixeler.sampling.saves import SavedModel
from transpixeler.sampling.sheet import write_sheet
from transpixeler.sampling.texts import encode_prompts
from transpixeler.sampling.video import check_formats, write_video

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class SampleOptions:
    """The command's options that are no keys of `sample.*`."""

    prompts: tuple[str | Prompt, ...] = ()
    prompts_file: str = ""
    count: int = 1  # videos of each prompt
    out: str = "samples"
    resume: bool = False  # keep what OUT holds of what is asked for
    given: GivenFiles = NOTHING_GIVEN  # for prompts that name no files of their own
    asked_layout: bool = False  # whether the user set parallel.*


@dataclass(frozen=True)
class Sampled:
    """The folders of a call's videos."""

    folders: list[Path]  # of all that were asked for, in their order
    own: list[Path]  # that this rank wrote


def sample_command(source: SavedModel, runtime: Runtime, options: SampleOptions) -> Sampled:
    """Make every prompt's videos, and a sheet of them."""
    config, layout = fit_layout(source.config, runtime, asked=options.asked_layout)
    source, out = replace(source, config=config), Path(options.out)
    model = open_model(config.model)
    check_given(config, model)
    check_guidance(config.sample, model)
    check_formats(config)
    check_place(out, "--out")
    prompts = _prompts(config.sample, options)
    requests = list_requests(config, prompts, model, given=options.given, count=options.count)
    asked, made = runtime.broadcast(_begin(source, requests, model, options, main=runtime.is_main))
    own, left = [], [number for number in range(len(requests)) if number not in made]
    if left:
        texts = encode_prompts(config, texts_of(config.sample, prompts), model, runtime)
        maker = Maker(config, model, Frames(model, runtime.device, upsample=config.sample.upsample), texts)
        videos = Videos(maker, [requests[number] for number in left])
        maker.known(videos.requests[0])  # the VAE's work comes before the model takes its memory
        mesh = meshes.build(layout, runtime)
        sampler = Sampler(open_engine(source, mesh), mesh, config.sample, texts.negative, model)
        for number, latents in sampler.each(videos):
            if mesh.is_first_stage:
                facts = {**_facts(source, videos.requests[number]), ASKED: asked[left[number]]}
                with writing_to(out, "--out"):
                    own.append(_write(maker, videos.requests[number], latents, out, facts))
                logger.info("%s", shown_path(own[-1]))
    runtime.barrier()
    folders = [made.get(number, out / request.name) for number, request in enumerate(requests)]
    if runtime.is_main:
        with writing_to(out, "--out"):
            write_sheet(out, folders, columns=options.count if options.count > 1 else 0)
    return Sampled(folders, own)


def _begin(
    source: SavedModel, requests: Sequence[Request], model: ModelFolder, options: SampleOptions, *, main: bool
) -> tuple[list[str], dict[int, Path]]:
    """Return on rank 0 the digest of each request, and which of them are made already where that is asked."""
    if not main:
        return [], {}
    asked, out = asked_for(requests, source, model), Path(options.out)
    if not options.resume:
        return asked, {}
    with writing_to(out, "--out"):
        clear_unfinished(out, {request.name for request in requests})
    made = find_made(out, requests, asked)
    logger.info("%d of %d videos are made already", len(made), len(requests))
    return asked, made


def _write(maker: Maker, request: Request, latents: Tensor, out: Path, facts: Mapping[str, object]) -> Path:
    video = maker.video(request)
    streams = maker.frames.decode(latents, video.layout, known=maker.known(request))
    frames, height, width = maker.model.geometry.pixels(video.layout.shapes[0])
    plate = given_light(request.given, maker.config, (frames, height, width))
    return write_video(out, video, streams, maker.config, facts, plate)


def _facts(source: SavedModel, request: Request) -> dict[str, object]:
    given: dict[str, object] = {name: request.given.named.get(name, "") for name in ("rgb", "alpha", "image", "last")}
    facts: dict[str, object] = {"model": source.config.model.path, "adapter": source.name, "step": source.step}
    return facts | (given if any(given.values()) else {})


def _prompts(config: SampleConfig, options: SampleOptions) -> tuple[Prompt, ...]:
    own = (Prompt(one) if isinstance(one, str) else one for one in options.prompts)
    prompts = (*own, *prompt_lines(options.prompts_file, key="--prompts")) or read_prompts(config)
    if prompts or options.given.named:
        return prompts or (Prompt(""),)
    raise UserError('sample: nothing to make; give --prompt "…", --prompts FILE, or set sample.prompts')
