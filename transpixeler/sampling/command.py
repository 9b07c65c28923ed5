"""The command `transpixeler sample`: a run, an adapter or a base and prompts go in, folders of videos come out.

No data set is needed. A clip may be given: its RGB, and the model makes the mattes of it; or its mattes, and the model
paints the RGB; or an image, which becomes the first frame. Under torchrun the prompts are shared
out, or one model is spread over the processes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transpixeler.config.sections import SampleConfig, UserError
from transpixeler.data.prompts import NOTHING_GIVEN, GivenFiles, Prompt, prompt_lines, read_prompts
from transpixeler.files import check_place, clear_unfinished, shown_path, writing_to
from transpixeler.models.family import ModelFolder
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.made import ASKED, asked_for, find_made
from transpixeler.sampling.requests import Request
from transpixeler.sampling.saves import SavedModel
from transpixeler.sampling.session import Session
from transpixeler.sampling.sheet import write_sheet
from transpixeler.sampling.video import write_video

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
    session, out = Session(source, runtime, asked_layout=options.asked_layout), Path(options.out)
    source = session.with_sample(source.config.sample)
    check_place(out, "--out")
    prompts = _prompts(source.config.sample, options)
    requests = session.requests(source, prompts, given=options.given, count=options.count)
    asked, made = runtime.broadcast(_begin(source, requests, session.model, options, main=runtime.is_main))
    own, left = [], [number for number in range(len(requests)) if number not in made]
    for one in session.make(source, [requests[number] for number in left]):
        request, digest = requests[left[one.number]], asked[left[one.number]]
        with writing_to(out, "--out"):
            facts = facts_of(source, request, digest)
            own.append(write_video(out, one.video, one.streams, source.config, facts, one.plate))
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


def facts_of(source: SavedModel, request: Request, asked: str) -> dict[str, object]:
    """Return what a video's sample.json says of its model, its files, and all that it was asked for."""
    given: dict[str, object] = {name: request.given.named.get(name, "") for name in ("rgb", "alpha", "image", "last")}
    facts = {"model": source.config.model.path, "adapter": source.name, "step": source.step, ASKED: asked}
    if course := request.course:
        given = {"between": request.given.between, "factor": course.every, "windows": request.windows}
        given = given if course.every else {"extend": request.given.extend, "windows": request.windows}
    return {**facts, **(given if any(given.values()) else {})}


def _prompts(config: SampleConfig, options: SampleOptions) -> tuple[Prompt, ...]:
    own = (Prompt(one) if isinstance(one, str) else one for one in options.prompts)
    prompts = (*own, *prompt_lines(options.prompts_file, key="--prompts")) or read_prompts(config)
    if prompts or options.given.named:
        return prompts or (Prompt(""),)
    raise UserError('sample: nothing to make; give --prompt "…", --prompts FILE, or set sample.prompts')
