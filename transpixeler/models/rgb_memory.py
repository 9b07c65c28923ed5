"""Remember RGB's keys and values of the first denoising step, so that later steps run the companions alone.

Where RGB is given whole and sees itself alone, as in matting with `rgb_attends_aux: false`, its keys and values are the
same at every denoising step. The first step computes them in every block; the others run the companions' tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transpixeler.models.tokens import Tokens

Flow = tuple[Tensor, ...]
Known = tuple[Tensor, Tensor]  # RGB's keys and values in a block, text that flows after them


class RgbMemory:
    """Keys and values of RGB in each block of a stage, for each microbatch of a forward pass."""

    def __init__(self, *, on_host: bool = False) -> None:
        self.on_host = on_host
        self._known: list[list[Known]] = []  # by microbatch, then block
        self._next = 0

    def rewind(self) -> None:
        """Begin a forward pass: its microbatches come in the same order as before."""
        self._next = 0

    def forget(self) -> None:
        """Begin anew, as where another expert takes over."""
        self._known, self._next = [], 0

    def run(self, blocks: Sequence[Callable[..., Flow]], flow: Flow, tokens: Tokens) -> tuple[Flow, Tokens]:
        """Run a stage's blocks on the next microbatch; return its flow, and tokens that say how it was run."""
        assert not torch.is_grad_enabled()
        place, self._next = self._next, self._next + 1
        if place == len(self._known):
            known = []
            for block in blocks:
                *rest, k, v = block(flow, tokens._replace(rgb_returned=True))
                flow = tuple(rest)
                known.append((self._kept(k), self._kept(v)))
            self._known.append(known)
            return flow, tokens
        tokens = tokens._replace(rgb_known=True)
        for block, (k, v) in zip(blocks, self._known[place], strict=True):
            flow = block((*flow, self._back(k, flow[0]), self._back(v, flow[0])), tokens)
        return flow, tokens

    def _kept(self, x: Tensor) -> Tensor:
        if not (self.on_host and x.is_cuda):
            return x.contiguous()  # not a view, which would keep queries alive
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)

    @staticmethod
    def _back(x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.device, non_blocking=True)
