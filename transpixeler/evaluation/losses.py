"""Measure the loss on held-out clips at fixed times, with fixed noise.

In: an engine and the held-out clips. Out: a mean error for each set, stream and time, the same on any layout: clips are
shared among the data ranks, and their values are summed in one order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.data.progress import Progress
from transpixeler.evaluation.clips import HeldOut, Piece
from transpixeler.flow.objective import Example, by_stream
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.sampler import turns

Losses = dict[str, dict[str, dict[str, float]]]  # SET or SET/TASK: stream: time: mean error


@dataclass(frozen=True)
class HeldOutLosses:
    """Measures losses with an engine as it is; every rank calls it at the same time."""

    runtime: Runtime
    engine: AnyEngine
    held_out: HeldOut
    pause: Callable[[], object]  # called before each clip, equally often on all ranks

    def measure(self) -> Losses:
        """Return each stream's error at each time, mean over the clips. A collective call."""
        found: Losses = {}
        with self.engine.evaluating():
            for expert in self.held_out.experts:  # one after the other, as all ranks gather its shards together
                found |= self._measure(self.held_out.of_expert(expert))
        return {title: found[title] for title in dict.fromkeys(piece.title for piece in self.held_out.pieces)}

    def _measure(self, pieces: Sequence[Piece]) -> Losses:
        """Return the losses of one expert's pieces."""
        mesh = self.engine.mesh
        mine: dict[int, list[list[float]]] = {}
        rounds = turns(len(pieces), mesh)
        with Progress("clips", len(rounds), shown=self.runtime.is_main, verb="measuring") as progress:
            for number, counts in rounds:
                self.pause()
                errors = self._errors(pieces[number])
                progress.step()
                if counts and mesh.speaks:
                    mine[number] = errors.tolist()
        values = {number: rows for part in self.runtime.gather(mine) for number, rows in part.items()}
        return {
            title: self._means([(pieces[n], values[n]) for n in sorted(values) if pieces[n].title == title])
            for title in dict.fromkeys(piece.title for piece in pieces)
        }

    def _errors(self, piece: Piece) -> Tensor:
        """Return the errors [times, streams] of one clip, mean over the sizes at which the model makes it."""
        return torch.stack([self._errors_of(example) for example in self.held_out.examples(piece)]).mean(0)

    def _errors_of(self, example: Example) -> Tensor:
        example = example.to(self.engine.mesh.device)
        micro_batch = self.held_out.config.eval.micro_batch
        found = self.engine.forward(example.noisy(), example.inputs, example.layout, micro_batch)
        errors = example.noising.errors(found, example.target(), example.layout).double()
        return by_stream(errors, (example.weights > 0).double(), example.layout)[0].cpu()

    def _means(self, rows: Sequence[tuple[Piece, list[list[float]]]]) -> dict[str, dict[str, float]]:
        """Return the mean over clips of one set and task, by stream and time, without the streams that are given."""
        streams, piece = self.held_out.data.streams, rows[0][0]
        return {
            name: {
                f"{piece.expert.within(t):g}": math.fsum(values[q][stream] for _, values in rows) / len(rows)
                for q, t in enumerate(self.held_out.config.eval.times)
            }
            for stream, name in enumerate(streams)
            if stream not in piece.task.given
        }
