"""Train a scorer: a config's clips, encoded once into the cache, in; OUTPUT_DIR/scorer with the scorer's file out.

Ranks share each global batch, and each sample is compared with all others of it. Batches are a pure function of the
seed and the step, so a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transpixeler.config.sections import Config, UserError
from transpixeler.data.dataset import Dataset
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Assembler, Batch, Loader
from transpixeler.files import clear_unfinished, write_text
from transpixeler.models.family import ModelFolder, caption_fields, open_model
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import METRICS
from transpixeler.runs.lock import take_lock
from transpixeler.runs.metrics_file import reopen
from transpixeler.scoring.contrast import alike, contrast, gathered
from transpixeler.scoring.file import SCORER_FILE, STATE_FILE, Facts, read_state, text_field, write_scorer, write_state
from transpixeler.scoring.retrieval import Found, embed, retrieval
from transpixeler.scoring.towers import Scorer, Sizes

logger = logging.getLogger("transpixeler")

FOLDER = "scorer"
EVAL_FILE = "eval.json"
FREE_TO_CHANGE = ("steps", "every_steps")  # on a resume


def train_scorer(config: Config, runtime: Runtime, *, resume: bool = False) -> Path:
    """Train, measure retrieval on `data.eval`, and return the scorer's file. A collective call."""
    _check(config, runtime)
    config = replace(config, data=replace(config.data, draw="once"))
    model = open_model(config.model)
    sizes_of(config, model)  # refused before anything is encoded
    folder = Path(config.output_dir) / FOLDER
    with _held(folder, runtime):
        _check_begun(folder, resume=resume)
        data = encode_missing(config, model, runtime)
        training = Training(config, runtime, model, data.train, data.eval, folder)
        if resume:
            training.go_on()
        training.run()
    return folder / SCORER_FILE


def _check(config: Config, runtime: Runtime) -> None:
    if not config.data.train:
        raise UserError("data.train: set it to a folder of pairs or a manifest")
    if config.scorer.global_batch % runtime.world_size:
        raise UserError(
            f"scorer.global_batch: {config.scorer.global_batch} samples do not divide over {runtime.world_size} ranks"
        )
    if config.scorer.global_batch < 2:
        raise UserError("scorer.global_batch: a scorer learns by comparing samples of a batch; set 2 or more")


def _check_begun(folder: Path, *, resume: bool) -> None:
    begun = (folder / STATE_FILE).exists()
    if begun and not resume:
        raise UserError(f"{folder}: holds a scorer's training; go on with --resume, or choose another output_dir")
    if resume and not begun:
        raise UserError(f"{folder}: holds no scorer's training to go on with; leave out --resume")


@contextmanager
def _held(folder: Path, runtime: Runtime) -> Iterator[None]:
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder, runtime)
    try:
        if runtime.is_main:
            clear_unfinished(folder, (SCORER_FILE, STATE_FILE, EVAL_FILE, METRICS))
        yield
    finally:
        if lock is not None:
            lock.release()


@dataclass(frozen=True)
class Step:
    """Losses of one step by what was looked for, the same on all ranks."""

    losses: dict[str, float]
    lr: float


class Training:
    """One training of a scorer on this rank."""

    def __init__(
        self, config: Config, runtime: Runtime, model: ModelFolder, train: Dataset, held_out: Dataset, folder: Path
    ) -> None:
        self.config, self.runtime, self.folder = config, runtime, folder
        self.train, self.held_out, self.text = train, held_out, text_field(model).name
        self.fields, self.patch = caption_fields(model.fields), model.geometry.patch
        self.order = train.order(seed=config.seed, global_batch=config.scorer.global_batch)
        self.facts = Facts.of(config, model, sizes_of(config, model))
        torch.manual_seed(config.seed)
        self.scorer = Scorer(self.facts.sizes).to(runtime.device)
        self.optimizer = torch.optim.AdamW(
            self.scorer.parameters(), lr=config.scorer.lr, weight_decay=config.scorer.weight_decay
        )
        self.step = 0
        self.keys = {item.id: (item.text_keys, *train.video_keys(item)[1:]) for item in train.items}

    def go_on(self) -> None:
        """Take up the state in the folder; refuse other settings than it was trained with."""
        told = read_state(self.folder / STATE_FILE, self.optimizer, self.scorer)
        ours, self.step = self._told(), told["step"]
        for name in ours.keys() - {"step"}:
            if told.get(name) != ours[name]:
                raise UserError(
                    f"{name}: this training has {ours[name]}, and {self.folder} began with {told.get(name)}; "
                    "set it as it was, or choose another output_dir"
                )

    def run(self) -> None:
        """Train to the end."""
        steps, every = self.config.scorer.steps, self.config.scorer.every_steps
        epoch, within = self.order.locate(self.step)
        assembler = self._assembler(self.train)
        rank, ranks = self.runtime.rank, self.runtime.world_size
        started, since = time.perf_counter(), self.step
        with Loader(assembler, self.order, rank=rank, ranks=ranks, epoch=epoch, step=within) as loader:
            while self.step < steps:
                told = self.learn(next(loader))
                if self.step % every == 0 or self.step == steps:
                    left = (time.perf_counter() - started) / (self.step - since) * (steps - self.step)
                    self._keep(told, left)
        self._finish()

    def learn(self, batch: Batch) -> Step:
        """Learn from one global batch, of which this rank has its share."""
        lr = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros((), device=self.runtime.device)).backward()
        self._add_up([p.grad for p in self.scorer.parameters() if p.grad is not None])
        self.optimizer.step()
        self.step += 1
        values = torch.stack([loss.detach() for loss in losses.values()])
        self._add_up([values])
        return Step(dict(zip(losses, values.tolist(), strict=True)), lr)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return this rank's share of each loss: samples with captions, and RGB with each companion."""
        own = embed(self.scorer, batch, self.text, self.runtime.device)
        vectors, scales = gathered(own, self.runtime.world_size), self.scorer.temperatures()
        keys = [self.keys[name] for name in batch.ids]
        captions, samples, rgb, *companions = vectors
        pairs = [(samples, captions), *((rgb, companion) for companion in companions)]
        found = {}
        for place, (name, (ones, others)) in enumerate(zip(("caption", *self.train.streams[1:]), pairs, strict=True)):
            same = alike([key[place] for key in keys]).to(self.runtime.device)
            found[name] = contrast(ones, others, scales[place], own=batch.slots, same=same)
        return found

    def _add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the ranks, in one exchange."""
        if self.runtime.world_size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _rate(self) -> float:
        """Return the learning rate of the coming step: a warm-up, then half a cosine to zero."""
        scorer = self.config.scorer
        warm = min(1.0, (self.step + 1) / (scorer.warmup_steps + 1))
        return scorer.lr * warm * 0.5 * (1 + math.cos(math.pi * self.step / scorer.steps))

    def _keep(self, step: Step, left: float) -> None:
        """Measure on held-out clips, write a line of metrics, then the state."""
        found = self.measure()
        if self.runtime.is_main:
            losses = ", ".join(f"{name} {value:.4f}" for name, value in step.losses.items())
            told = "; ".join(one.line() for one in found)
            count = f"step {self.step}/{self.config.scorer.steps}"
            logger.info("%s: loss %s; %s; %s left", count, losses, told or "no data.eval", f"{left / 60:.0f} min")
            line = {"step": self.step, "lr": step.lr, "losses": step.losses}
            line["retrieval"] = {one.what: one.right for one in found}
            with reopen(self.folder / METRICS, self.step - 1) as file:
                file.write(json.dumps(line).encode() + b"\n")
            write_state(self.folder / STATE_FILE, self.optimizer, self.scorer, self._told())
        self.runtime.barrier()

    def measure(self) -> list[Found]:
        """Return how often the right one is found on the held-out clips. A collective call."""
        if not self.held_out.items:
            return []
        clips = self.config.eval.clips
        return retrieval(self.scorer, self._assembler(self.held_out), self.text, self.runtime, clips=clips)

    def _finish(self) -> None:
        found = self.measure()
        if self.runtime.is_main:
            write_scorer(self.folder / SCORER_FILE, self.scorer, replace(self.facts, step=self.step))
            said = {one.what: {"right": one.right, "chance": one.chance, "clips": one.clips} for one in found}
            write_text(self.folder / EVAL_FILE, json.dumps({"step": self.step, "retrieval": said}, indent=1))
            print("\n".join(one.line() for one in found) or "data.eval names no clips to measure on")
        self.runtime.barrier()

    def _assembler(self, data: Dataset) -> Assembler:
        return Assembler(data, patch=self.patch, fields=self.fields, device=self.runtime.device)

    def _told(self) -> dict[str, Any]:
        """Return the step and all that it depends on."""
        settings = {
            f"scorer.{name}": value for name, value in vars(self.config.scorer).items() if name not in FREE_TO_CHANGE
        }
        records = hashlib.sha256()
        for item in self.train.items:
            records.update(b"".join([item.id.encode("utf-8", "surrogateescape"), *item.latent_keys, *item.text_keys]))
        return {"step": self.step, "seed": self.config.seed, "data.train": records.hexdigest()[:16], **settings}


def sizes_of(config: Config, model: ModelFolder) -> Sizes:
    """Return the sizes that a config's scorer has for a model's latents and texts."""
    scorer, field = config.scorer, text_field(model)
    if scorer.width % scorer.heads:
        raise UserError(f"scorer.heads: {scorer.heads} do not divide scorer.width {scorer.width}")
    return Sizes(
        streams=tuple(config.streams),
        scales=config.scales,
        channels=model.geometry.channels,
        text_width=field.width,
        patch=scorer.patch,
        width=scorer.width,
        layers=scorer.layers,
        text_layers=scorer.text_layers,
        heads=scorer.heads,
    )
