"""Average the trained parameters over the steps, in fp32 and sharded as they are.

In: the parameters after each step. Out: their exponential moving average, swapped in for evaluation and saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from transpixeler.models.shards import local


class Ema:
    """Averages named parameters; with `decay` 0 it averages none."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters) if decay else {}
        self.shadow = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in what has a gradient, and so was updated: the averages of an idle expert stay."""
        names = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        if names:
            now = [local(self.parameters[name].detach()).float() for name in names]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  the stubs miss it
                [local(self.shadow[name]) for name in names], now, 1 - self.decay
            )

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Put the averages in place of the parameters, and give back exactly what they held before."""
        pairs = [(local(self.parameters[name].detach()), local(mean)) for name, mean in self.shadow.items()]
        kept = [p.clone() for p, _ in pairs]
        for parameter, mean in pairs:
            parameter.copy_(mean)
        try:
            yield
        finally:
            for (parameter, _), value in zip(pairs, kept, strict=True):
                parameter.copy_(value)
