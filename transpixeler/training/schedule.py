"""Decide the learning rate of a step, at which an epoch ends, and at which a save or evaluation is due.

All are functions of the step: a config and the order of its samples in; answers that a resumed run gives again, out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transpixeler.config.sections import Config, OptimConfig
from transpixeler.data.loader import Batch
from transpixeler.data.order import Order


@dataclass(frozen=True)
class Schedule:
    """Steps and epochs of one training, and what is due at each."""

    config: Config
    order: Order
    total: int  # steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; the first is 0."""
        return rate_at(self.config.optim, step + 1, self.total)

    def saves(self, batch: Batch) -> list[str]:
        """Return the names of the saves that are due after this batch, by epochs and by steps."""
        save, steps = self.config.save, batch.step + 1
        due = [epoch for epoch in self.order.ended(steps) if save.every_epochs and epoch % save.every_epochs == 0]
        names = [f"epoch{due[-1]}"] if due else []
        return names + ([f"step{steps}"] if save.every_steps and steps % save.every_steps == 0 else [])

    def checkpoint_due(self, batch: Batch) -> bool:
        """Return whether a checkpoint is due after this batch, by steps or by epochs."""
        every, steps = self.config.checkpoint, batch.step + 1
        by_steps = every.every_steps > 0 and steps % every.every_steps == 0
        return by_steps or self._epoch_due(steps, every.every_epochs)

    def _epoch_due(self, steps: int, every: int) -> bool:
        """Return whether an epoch that counts ends with so many steps."""
        return every > 0 and any(epoch % every == 0 for epoch in self.order.ended(steps))

    def evaluation_due(self, steps: int) -> bool:
        """Return whether the model is evaluated as it is after so many steps."""
        every = self.config.eval
        if steps == 0:
            return every.before_first_step
        last = steps == self.total
        by_steps = every.every_steps > 0 and (steps % every.every_steps == 0 or last)
        by_epochs = every.every_epochs > 0 and last
        return by_steps or by_epochs or self._epoch_due(steps, every.every_epochs)


def make_schedule(config: Config, order: Order) -> Schedule:
    return Schedule(config, order, int(order.total(config.train)))


def rate_at(config: OptimConfig, step: int, total: int) -> float:
    """Return the learning rate of a step; the first is 1."""
    if config.force_lr is not None:
        return config.force_lr
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, total - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr_min + (config.lr - config.lr_min) * left
