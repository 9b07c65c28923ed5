"""What a model has learned: losses on held-out clips, sample videos and measures of them, without touching training.

In: an engine and the clips of `data.eval`. Out: numbers that depend on nothing but the weights. Every clip meets the
same noise at the same times at each evaluation, on any layout; clips are shared out over the data ranks and their
values are summed in one order. Each task that is trained is evaluated: joint under the name of the data set, another
under NAME/TASK.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transpixeler.config import Config, UserError
from transpixeler.data.dataset import Dataset
from transpixeler.data.loader import Assembler, Batch
from transpixeler.data.media import decode
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.prompts import negative_prompt, read_prompts
from transpixeler.data.sources.pairs import Sample, decode_pair
from transpixeler.evaluation import metrics
from transpixeler.flow import objective
from transpixeler.flow.objective import Example, mean_squared_errors
from transpixeler.models.backbone import Conditions, VideoModel, model_class
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling import generate
from transpixeler.sampling import sampler as samplers
from transpixeler.sampling.files import FACTS
from transpixeler.sampling.sampler import Frames, Request, Sampler

logger = logging.getLogger("transpixeler")

Losses = dict[str, dict[str, dict[str, float]]]  # set or set/task: stream: time: mean squared error
PROMPTS = "prompts"  # what samples of prompts are measured under; they have no data set


@dataclass(frozen=True)
class Piece:
    """One clip under one task."""

    item: int  # its place in the data set
    task: str
    given: frozenset[int]
    name: str  # of the data set, and of the task where it is not joint


class Evaluator:
    """Evaluates an engine as it is; every rank calls it at the same time."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        mesh: Mesh,
        engine: Engine,
        data: Dataset,
        *,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        """`pause` is called between pieces of work, equally often on all ranks; it ends an evaluation by raising."""
        self.config, self.runtime, self.mesh, self.engine, self.data = config, runtime, mesh, engine, data
        self.pause = pause
        self.model_cls: type[VideoModel] = model_class(config.model.family)
        self.prompts = read_prompts(config.sample)  # once: the file may be edited while a run goes on
        self.texts = self._prompt_texts()
        self.sampler = Sampler(
            engine, mesh, config.sample, self.texts.get(negative_prompt(config.sample, self.model_cls))
        )
        self.frames = Frames(self.model_cls, config.model.path, mesh.device)
        patch = engine.models()[0].patch
        self.assembler = Assembler(data, patch=patch, text_len=self.model_cls.text_len) if data.items else None
        self.pieces = pieces(data, config)
        if self.prompts or spread(self.pieces, config.eval.samples):  # as videos are made
            generate.check_background(config)
        self._floors: dict[int, dict[str, float]] = {}  # by clip; it does not change as the model learns

    def _prompt_texts(self) -> dict[str | None, Tensor]:
        """[text_len, text_dim] of each prompt, as the cache holds it."""
        if self.prompts:
            generate.video_layout(self.config, self.model_cls)  # a wrong size is told now
        texts = {prompt: self.data.cache.get(key) for prompt, key in self.data.prompts.items()}
        return {prompt: samplers.padded(text, self.model_cls.text_len) for prompt, text in texts.items()}

    @property
    def has_work(self) -> bool:
        return bool(self.pieces or self.prompts)

    # -- losses

    def losses(self) -> Losses:
        """Each stream's error at each time, mean over the clips. A collective call."""
        mine: dict[int, list[list[float]]] = {}
        with self.engine.evaluating():
            for number, counts in samplers.turns(len(self.pieces), self.mesh):
                self.pause()
                errors = self._errors(self.pieces[number])
                if counts and self.mesh.is_first_stage:
                    mine[number] = errors.tolist()
        values = {number: rows for part in self.runtime.gather(mine) for number, rows in part.items()}
        return {
            name: self._means([(self.pieces[n], values[n]) for n in sorted(values) if self.pieces[n].name == name])
            for name in dict.fromkeys(piece.name for piece in self.pieces)
        }

    def _errors(self, piece: Piece) -> Tensor:
        """[Q, S] of one clip at each of `eval.times`."""
        example = held_out(self.assembler.batch(np.array([piece.item]), slots=range(1)), self.config, piece.given)
        example = example.to(self.mesh.device)
        conditions = Conditions(example.timesteps, example.text)
        found = self.engine.forward(example.noisy(), conditions, example.layout, self.config.eval.micro_batch)
        return mean_squared_errors(found, example.velocity(), example.layout).double().cpu()

    def _means(self, rows: Sequence[tuple[Piece, list[list[float]]]]) -> dict[str, dict[str, float]]:
        free = [s for s in range(len(self.data.streams)) if s not in rows[0][0].given]
        return {
            self.data.streams[stream]: {
                f"{t:g}": math.fsum(values[q][stream] for _, values in rows) / len(rows)
                for q, t in enumerate(self.config.eval.times)
            }
            for stream in free
        }

    # -- samples

    def samples(self, folder: Path, facts: Mapping[str, Any], base: Path | None = None) -> dict[str, dict[str, float]]:
        """Writes FOLDER/NAME of each video and returns mean measures by set. A collective call.

        `base` holds the same videos of the model before training, from which the drift of its RGB is taken.
        """
        plan = self._requests()
        mine: dict[int, dict[str, float]] = {}
        for number, latents in self.sampler.each([request for request, _ in plan], pause=self.pause):
            if self.mesh.is_first_stage:
                request, piece = plan[number]
                streams = self.frames.decode(latents, request.layout)
                mine[number] = self._measures(piece, streams) | self._floor(piece)
                told = {**facts, "task": piece.task if piece else "joint", "metrics": mine[number]}
                self._write(folder, request, streams, told)
                mine[number] |= self._drift(request, folder, base)
        everyone = {number: found for part in self.runtime.gather(mine) for number, found in part.items()}
        names = [piece.name if piece else PROMPTS for _, piece in plan]
        return {
            name: _mean_of(everyone[n] for n in sorted(everyone) if names[n] == name) for name in dict.fromkeys(names)
        }

    def _requests(self) -> list[tuple[Request, Piece | None]]:
        """Held-out captions at their clips' sizes, then prompts at `sample.size`; seeds count up and never change."""
        seed, plan = self.config.sample.seed, []
        for piece in spread(self.pieces, self.config.eval.samples):
            item = self.data.items[piece.item]
            batch = self.assembler.batch(np.array([piece.item]), slots=range(1))
            streams = batch.layout.unpack(batch.latents)
            given = {stream: streams[stream][0] for stream in piece.given}
            name = f"{len(plan)}-{generate.named(item.sample_id)}" + (f"-{piece.task}" if piece.given else "")
            plan.append((Request(name, item.caption, batch.text[0], seed + len(plan), batch.layout, given), piece))
        for prompt in self.prompts:
            layout = generate.video_layout(self.config, self.model_cls)
            name = f"{len(plan)}-{generate.named(prompt)}"
            plan.append((Request(name, prompt, self.texts[prompt], seed + len(plan), layout), None))
        return plan

    def _measures(self, piece: Piece | None, streams: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Against the clip's own matte where its RGB was given; a video made from a caption has no reference."""
        rgb, *aux = (frames / np.float32(255) for frames in streams.values())
        if not aux or (piece and 1 in piece.given):
            return {}
        reference = self._reference(piece) if piece and 0 in piece.given else {}
        return metrics.alpha_metrics(rgb, aux[0], fill=fill_color(self.config), **reference)

    def _floor(self, piece: Piece | None) -> dict[str, float]:
        """How near the VAE alone brings a clip's RGB to itself; no model that works in its latents comes nearer."""
        origin = self.data.items[piece.item].origin if piece and not piece.given else None
        if origin is None:
            return {}
        if piece.item not in self._floors:
            self._floors[piece.item] = self._given_back_psnr(piece, *origin)
        return self._floors[piece.item]

    def _given_back_psnr(self, piece: Piece, sample: Sample, clip: Clip) -> dict[str, float]:
        try:
            rgb = next(iter(decode_pair(sample, clip, fill=Fill.of(self.config.data)).values()))
        except (OSError, BadMedia) as fault:  # the latents are all that training needs; it waits for no lost file
            logger.warning("%s is measured without vae_psnr: %s", sample.id, fault)
            return {}
        return {"vae_psnr": metrics.psnr(rgb / np.float32(255), self._given_back(piece)[0])}

    def _drift(self, request: Request, folder: Path, base: Path | None) -> dict[str, float]:
        """Of generated RGB from the base's; both as they were written, so that what the file costs is in neither.

        A resumed run may have other settings than it began with; then the two have nothing to do with each other.
        """
        files = [place / request.name / f"{self.data.streams[0]}.mp4" for place in (folder, base) if place is not None]
        if 0 in request.given or len(files) < 2 or not all(file.is_file() for file in files):
            return {}
        told = json.loads((base / request.name / FACTS).read_text(encoding="utf-8"))
        if not generate.settings(request, self.config.sample).items() <= told.items():
            return {}
        ours, theirs = (read_video(file) / np.float32(255) for file in files)
        return {"rgb_drift": metrics.rgb_drift(ours, theirs)} if ours.shape == theirs.shape else {}

    def _reference(self, piece: Piece) -> dict[str, np.ndarray]:
        """Of the matte alone: the RGB that was given comes back as it went in."""
        _, aux, *_ = self._given_back(piece)
        return {"reference_alpha": aux.mean(-1)}

    def _given_back(self, piece: Piece) -> list[np.ndarray]:
        """The clip's streams as the VAE decodes them: what latents could at best become, in [0, 1]."""
        batch = self.assembler.batch(np.array([piece.item]), slots=range(1))
        return [frames / np.float32(255) for frames in self.frames.decode(batch.latents[0], batch.layout).values()]

    def _write(self, folder: Path, request: Request, streams: Mapping[str, np.ndarray], facts: Mapping) -> None:
        try:
            generate.write_video(folder, request, streams, self.config, facts)
        except (OSError, UserError) as fault:  # the numbers stand; training waits for no disk and no lost background
            logger.error("%s was not written: %s", folder / request.name, fault)


# --- what is held out ------------------------------------------------------------------------------------------------


def pieces(data: Dataset, config: Config) -> tuple[Piece, ...]:
    """Every clip that is evaluated under every task that is trained, in the order of sets, tasks and ids."""
    known, found = objective.tasks(data.streams), []
    trained_tasks = [name for name in known if config.objective.tasks.get(name, 0) > 0]
    by_set: dict[str, list[int]] = {}
    for number in sorted(range(len(data.items)), key=lambda n: data.items[n].id):
        by_set.setdefault(data.items[number].source, []).append(number)
    for name, numbers in by_set.items():
        for task in trained_tasks:
            title = name if not known[task] else f"{name}/{task}"
            chosen = spread(numbers, config.eval.clips or len(numbers))
            found += [Piece(number, task, known[task], title) for number in chosen]
    return tuple(found)


def spread(things: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, from everywhere."""
    count = min(count, len(things))
    return [things[i * len(things) // count] for i in range(count)]


def held_out(batch: Batch, config: Config, given: frozenset[int]) -> Example:
    """One clip at every time, each with its own noise: a pure function of (clip, time)."""
    times = torch.tensor(config.eval.times, dtype=torch.float32)[:, None].repeat(1, len(batch.layout.names))
    times[:, sorted(given)] = 0
    rows = len(times)
    noise = [objective.draw_noise(batch.layout.elements, "eval", batch.ids[0], f"{t:g}") for t in config.eval.times]
    return Example(
        layout=batch.layout,
        latents=batch.latents.expand(rows, -1),
        noise=torch.stack(noise),
        timesteps=times,
        text=batch.text.expand(rows, -1, -1),
        weights=torch.ones_like(times),
    )


def fill_color(config: Config) -> tuple[float, ...] | None:
    """What the training clips show under zero alpha, where one colour is."""
    if config.data.fill not in ("black", "color"):
        return None
    return tuple(c / 255 for c in config.data.fill_color) if config.data.fill == "color" else (0.0, 0.0, 0.0)


def _mean_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each measure's mean over the videos that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def read_video(file: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]"""
    media = decode.probe(file)
    return decode.read_frames(file, range(media.frames), height=media.height, width=media.width)
