"""Compute what acts on each token by itself over pieces of a long sequence, and keep nothing of it but its inputs.

In: a block's end or a head, and its inputs. Out: what it gives for all tokens at once. Forward and backward pass hold
the inside of one piece at a time; the backward pass computes each piece once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transpixeler.models.tokens import Tokens

Inputs = tuple[Tensor, ...]


class Piece(NamedTuple):
    """A run of the streams' tokens; the last one takes with it what comes after these, which is text that flows."""

    start: int
    stop: int
    last: bool

    def of(self, x: Tensor) -> Tensor:
        return x[:, self.start : None if self.last else self.stop]

    def of_text(self, text: Tensor) -> Tensor:
        return text if self.last else text[:, :0]

    def ways(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield what finds its part of each output: of tokens, then of texts."""
        return chain([self.of], repeat(self.of_text))


def pieces(tokens: int, size: int) -> list[Piece]:
    """Cut a sequence into pieces of at most so many tokens, as even as can be."""
    count = -(-tokens // size)
    ends = [tokens * n // count for n in range(count + 1)]
    return [Piece(start, stop, stop == tokens) for start, stop in pairwise(ends)]


def is_cut(x: Tensor, chunk: int) -> bool:
    """Tell whether tokens [B, T, …] are more than are to be computed at a time. chunk: of a batch; 0 for all."""
    return 0 < chunk < len(x) * x.shape[1]


@dataclass(eq=False)  # not frozen: compiled code makes one, and older compilers cannot follow how a frozen one is set
class ByToken:
    """A function of each token, and where among its inputs the tokens are.

    It returns tokens, and a block its texts after them.
    """

    run: Callable[[Tokens, Inputs], Inputs]
    module: nn.Module  # whose parameters it reads
    tokens: Tokens
    places: frozenset[int]  # of the inputs [B, T, …]; the first input is one
    texts: frozenset[int] = frozenset()  # places of text that flows
    changes: tuple[int, ...] = ()  # places of the inputs that the outputs stand for, in order; of none, outputs differ
    chunk: int = 0  # tokens of a batch that are computed at a time; 0 for all

    def __call__(self, *inputs: Tensor) -> Inputs:
        """Compute all tokens."""
        first = inputs[0]
        if not is_cut(first, self.chunk):
            return self.run(self.tokens, inputs)
        cuts = pieces(first.shape[1], max(1, self.chunk // len(first)))
        if torch.compiler.is_compiling():  # a compiler orders by itself what it recomputes
            made = [self.piece(cut, self.parts(cut, inputs)) for cut in cuts]
            return torch.cat([out[0] for out in made], dim=1), *made[-1][1:]
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return _Pieces.apply(self, cuts, len(inputs), *inputs, *trained)

    def piece(self, cut: Piece, inputs: Inputs, *, again: bool = False) -> Inputs:
        """Compute one piece. again: for the backward pass, which needs no output of it."""
        tokens = self.tokens.piece(cut.start, cut.stop)
        return self.run(tokens._replace(copy_scope=False, recomputing=again), inputs)

    def parts(self, cut: Piece, inputs: Sequence[Tensor]) -> Inputs:
        return tuple(self.part(cut, place, x) for place, x in enumerate(inputs))

    def part(self, cut: Piece, place: int, x: Tensor) -> Tensor:
        """Return what a piece takes of an input, or of its gradient."""
        if place in self.places:
            return cut.of(x)
        return cut.of_text(x) if place in self.texts else x


class _Pieces(torch.autograd.Function):
    """Piece by piece in both directions."""

    @staticmethod
    def forward(ctx, job, cuts, count, *tensors):
        inputs, ctx.job, ctx.cuts, ctx.trained = tensors[:count], job, cuts, tensors[count:]
        ctx.random = _random_states(inputs[0].device) if job.module.training else ()
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        outs = tuple(torch.empty_like(inputs[place]) for place in job.changes)
        if job.tokens.recomputing:  # nobody reads them
            return outs
        for cut in cuts:
            made = job.piece(cut, job.parts(cut, inputs))
            outs = outs or tuple(x.new_empty(len(x), inputs[0].shape[1], *x.shape[2:]) for x in made)
            for way, out, x in zip(cut.ways(), outs, made):
                way(out).copy_(x)
        return outs

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        job, inputs, asked = ctx.job, ctx.saved_tensors, ctx.needs_input_grad[3:]
        sums = [_Sum(job, place, x) for place, x in enumerate((*inputs, *ctx.trained))]
        with _drawing(ctx.random, inputs[0].device):
            for cut in ctx.cuts:
                parts = [part.detach().requires_grad_(w) for part, w in zip(job.parts(cut, inputs), asked)]
                with torch.enable_grad():
                    made = job.piece(cut, tuple(parts), again=True)
                wanted = [pair for pair, w in zip(zip(sums, (*parts, *ctx.trained)), asked, strict=True) if w]
                found = _gradients(cut, made, grads, [leaf for _, leaf in wanted])
                for (total, _), grad in zip(wanted, found, strict=True):
                    total.add(cut, grad)
        return None, None, None, *[total.value() for total in sums]


class _Sum:
    """The gradient of one input or parameter; of what all pieces share, it is summed in fp32 or wider."""

    def __init__(self, job: ByToken, place: int, of: Tensor) -> None:
        self.job, self.place, self.of = job, place, of
        self.total: Tensor | None = None

    def add(self, cut: Piece, grad: Tensor | None) -> None:
        if grad is None:
            return
        if self.total is None:
            own = self.place in self.job.places | self.job.texts
            dtype = self.of.dtype if own else torch.promote_types(self.of.dtype, torch.float32)
            self.total = torch.zeros_like(self.of, dtype=dtype)
        self.job.part(cut, self.place, self.total).add_(grad)

    def value(self) -> Tensor | None:
        return None if self.total is None else self.total.to(self.of.dtype)


def _gradients(cut: Piece, made: Inputs, grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> Inputs:
    """Return the gradients of a piece's leaves, None for what it does not read. grads: of all tokens, then of texts."""
    ends = [
        (out, way(grad)) for way, out, grad in zip(cut.ways(), made, grads) if grad is not None and out.requires_grad
    ]
    return torch.autograd.grad([out for out, _ in ends], leaves, [grad for _, grad in ends], allow_unused=True)


def _random_states(device: torch.device) -> tuple[Tensor, ...]:
    """Return what dropout draws from, on the CPU and on the device."""
    here = torch.get_rng_state()
    return (here, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (here,)


@contextmanager
def _drawing(states: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    """Draw inside what was drawn from these states, and go on outside as if nothing was."""
    if not states:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
