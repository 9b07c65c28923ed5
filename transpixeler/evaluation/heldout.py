"""Evaluate what a model has learned on held-out clips and prompts, without touching its training.

In: an engine and the clips of `data.eval`. Out: losses, sample videos and measures of them, which depend on nothing but
the weights. Each trained task is evaluated: joint under the name of the data set, another under NAME/TASK.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from transpixeler.config.sections import Config, UserError
from transpixeler.data.dataset import Dataset
from transpixeler.data.loader import Batch
from transpixeler.data.prompts import read_prompts
from transpixeler.evaluation.clips import HeldOut, Piece, all_fields, spread
from transpixeler.evaluation.losses import HeldOutLosses, Losses
from transpixeler.evaluation.measures import Measures
from transpixeler.flow.objective import Fields
from transpixeler.flow.tasks import Task, check_given
from transpixeler.models.family import open_model
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.guidance import check_sample
from transpixeler.sampling.requests import Maker, list_requests, seen_pictures
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.shown import ImageTokens, cached_tokens
from transpixeler.sampling.texts import cached_prompts
from transpixeler.sampling.video import Video, check_formats, name_part, write_video
from transpixeler.scoring.scores import Scores

logger = logging.getLogger("transpixeler")

PROMPTS = "prompts"  # the name that videos of prompts are measured under, as they have no data set


class Evaluator:
    """Evaluates an engine as it is; every rank calls it at the same time."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        engine: AnyEngine,
        data: Dataset,
        *,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        """`pause` is called between pieces of work, equally often on all ranks; it may end an evaluation by raising."""
        self.config, self.runtime, self.mesh, self.pause = config, runtime, engine.mesh, pause
        self.model = open_model(config.model)
        check_given(config, self.model)
        check_sample(config.sample, self.model)
        self.held_out = HeldOut(config, data, self.model)
        # once, as the file may be edited while a run goes on; a wrong size is refused before the first step
        shift = len(self._sampled_pieces())
        self.prompts = list_requests(config, read_prompts(config.sample), self.model, first=shift)
        if longer := next((one.given for one in self.prompts if one.course), None):
            raise UserError(f"{longer.label('between' if longer.between else 'extend')}: is for `sample` alone")
        # a video takes all experts, of which training may hold one
        self.makes_videos = len(engine.by_expert) == len(self.model.experts)
        if not self.makes_videos and runtime.is_main and (self.prompts or config.eval.samples):
            logger.info("evaluation: losses only, as videos need both experts; sample the run afterwards")
        if self.prompts or self._sampled_pieces():
            check_formats(config)
        self._losses = HeldOutLosses(runtime, engine, self.held_out, pause)
        self.texts = cached_prompts(config, data, self.model, beside=seen_pictures(config, self.prompts, self.model))
        self.sampler = Sampler(engine, self.mesh, config.sample, self.texts.negative, self.model, self.held_out.ladder)
        self.frames = Frames(self.model, self.mesh.device, upsample=config.sample.upsample)
        tokens = ImageTokens(self.model, self.mesh.device, cached_tokens(data))
        self.maker = Maker(config, self.model, self.frames, self.texts, tokens)
        self.measures = Measures(config, self.held_out, self.frames)
        file = config.eval.scorer
        self.scores = Scores(file, config, self.model, self.mesh.device) if file else None

    @property
    def has_work(self) -> bool:
        return bool(self.held_out.pieces or (self.prompts and self.makes_videos))

    def _sampled_pieces(self) -> list[Piece]:
        return spread(self.held_out.of_expert(self.held_out.experts[0]), self.config.eval.samples)

    def losses(self) -> Losses:
        """Return each stream's error at each time, mean over the clips. A collective call."""
        return self._losses.measure()

    def samples(
        self, folder: Path, facts: Mapping[str, object], base: Path | None = None
    ) -> dict[str, dict[str, float]]:
        """Write FOLDER/NAME of each video and return mean measures by set. A collective call.

        `base` holds the same videos by the model before training, from which the drift of RGB is taken.
        """
        plan = self._planned() if self.makes_videos else []
        mine: dict[int, dict[str, float]] = {}
        for number, latents in self.sampler.each([request for request, _ in plan], after_step=self.pause):
            if self.mesh.speaks:
                request, piece = plan[number]
                streams = self.frames.decode(latents, request.layout)
                mine[number] = self.measures.of_video(piece, streams, given=request.given)
                if self.scores is not None:
                    of = request.layout, request.fields
                    mine[number] |= self.scores.of_video(latents, *of, caption=request.prompt)
                said = {**facts, "task": _task(piece, request), "metrics": mine[number]}
                self._write(folder, request, streams, said)
                mine[number] |= self.measures.drift(request, folder, base)
        everyone = {number: found for part in self.runtime.gather(mine) for number, found in part.items()}
        names = [piece.name if piece else PROMPTS for _, piece in plan]
        return {
            name: _mean_of(everyone[n] for n in sorted(everyone) if names[n] == name) for name in dict.fromkeys(names)
        }

    def _planned(self) -> list[tuple[Video, Piece | None]]:
        """Return held-out captions at their clips' sizes, then prompts at `sample.size`; seeds count up."""
        seed, plan = self.config.sample.seed, []
        for piece in self._sampled_pieces():
            item, batch = self.held_out.item(piece), self.held_out.batch(piece)
            fields = {name: value[0] for name, value in all_fields(batch, piece.task).items()}
            given = given_latents(piece.task, batch)
            name = f"{len(plan)}-{name_part(item.sample_id)}" + (f"-{piece.task.name}" if piece.task.gives else "")
            layout, beside = piece.task.cut(batch.layout), latents_beside(piece.task, batch)
            ways = piece.task.shown, piece.task.shown_last, self._unshown(batch, piece.task)
            video = Video(name, item.caption, fields, seed + len(plan), layout, given, beside, *ways)
            plan.append((video, piece))
        for prompt in self.prompts:
            named = replace(prompt, name=f"{len(plan)}-{name_part(prompt.prompt)}")
            plan.append((self.maker.video(named), None))
        return plan

    def _unshown(self, batch: Batch, task: Task) -> Fields:
        """Return what a clip is shown of nothing, for guidance to what it is shown; {} where that is off."""
        if batch.shown is None or self.config.sample.image_guidance == 1 or not (task.shown or task.shown_last):
            return {}
        return {name: value[0] for name, value in batch.shown.values(batch.layout, [()]).items()}

    def _write(
        self, folder: Path, request: Video, streams: Mapping[str, np.ndarray], facts: Mapping[str, object]
    ) -> None:
        try:
            write_video(folder, request, streams, self.config, facts)
        except (OSError, UserError) as fault:  # a full disk or a lost background must not end a training
            logger.error("%s was not written: %s", folder / request.name, fault)


def given_latents(task: Task, batch: Batch) -> dict[int, Tensor]:
    """Return what a task gives of the videos [C, F, H, W] of a batch of one clip: whole, or how they begin."""
    streams = batch.layout.videos(batch.latents)
    first = {stream: streams[stream][0][:, :length] for stream, length in task.beginnings(batch.layout).items()}
    return first | {stream: streams[stream][0] for stream in task.given}


def latents_beside(task: Task, batch: Batch) -> dict[int, Tensor]:
    """Return the frames beside videos that a task gives of a clip, each encoded alone."""
    pairs = zip(batch.layout.segments, batch.layout.unpack(batch.latents), strict=True)
    return {one.stream: part[0] for one, part in pairs if one.beside and one.beside[:2] in task.beside}


def _task(piece: Piece | None, request: Video) -> str:
    """Return what a video's facts call its task; that of a prompt with files has no name."""
    if piece is not None:
        return piece.task.name
    return "given" if request.given or request.beside or request.shown or request.shown_last else "joint"


def _mean_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return each measure's mean over the videos that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}
