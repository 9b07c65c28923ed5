"""Decide what happens at which step: epochs, rates, saves and evaluations, all pure functions of the step.

In: a config and the order of its samples. Out: answers that a resumed run gives again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transpixeler.config import Config, UserError
from transpixeler.data.loader import Batch
from transpixeler.data.order import Order
from transpixeler.training import optim


@dataclass(frozen=True)
class Schedule:
    """When things happen in one training."""

    config: Config
    order: Order
    total: int  # steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; the first is 0."""
        return optim.rate(self.config.optim, step + 1, self.total)

    def ended_epoch(self, batch: Batch) -> int:
        """Return the number of epochs that are done after this batch if it is the last of one, else 0."""
        return batch.epoch + 1 if batch.epoch_step + 1 == self.order.steps(batch.epoch) else 0

    def saves(self, batch: Batch) -> list[str]:
        """Return the names of the saves that are due after this batch, by epochs and by steps."""
        save, epoch, steps = self.config.save, self.ended_epoch(batch), batch.step + 1
        names = [f"epoch{epoch}"] if epoch and save.every_epochs and epoch % save.every_epochs == 0 else []
        return names + ([f"step{steps}"] if save.every_steps and steps % save.every_steps == 0 else [])

    def checkpoint_due(self, batch: Batch) -> bool:
        """Return whether a checkpoint is due after this batch, by steps or by epochs."""
        every, epoch = self.config.checkpoint, self.ended_epoch(batch)
        by_steps = every.every_steps > 0 and (batch.step + 1) % every.every_steps == 0
        by_epochs = epoch > 0 and every.every_epochs > 0 and epoch % every.every_epochs == 0
        return by_steps or by_epochs

    def evaluation_due(self, steps: int) -> bool:
        """Return whether the model is evaluated as it is after so many steps."""
        every = self.config.eval
        if steps == 0:
            return every.before_first_step
        (epoch, within), last = self.order.locate(steps), steps == self.total
        by_steps = every.every_steps > 0 and (steps % every.every_steps == 0 or last)
        by_epochs = every.every_epochs > 0 and ((within == 0 and epoch % every.every_epochs == 0) or last)
        return by_steps or by_epochs


def make_schedule(config: Config, order: Order) -> Schedule:
    return Schedule(config, order, total_steps(config, order))


def total_steps(config: Config, order: Order) -> int:
    """Return when training ends: by epochs or by steps, whichever comes first."""
    by_epoch = order.first_step(config.train.epochs) if config.train.epochs else math.inf
    total = min(by_epoch, config.train.max_steps or math.inf)
    if total < 1:
        clips = sum(len(row.items) for row in order.rows)
        raise UserError(
            f"train.epochs: {config.train.epochs} epochs of {clips} clips do not fill one batch of "
            f"train.global_batch={config.train.global_batch}; train longer or lower the batch"
        )
    return int(total)
