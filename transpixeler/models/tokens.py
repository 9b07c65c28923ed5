"""Tell a block what it needs of the token sequence: a layout, or part of one, in; lengths, positions, groups out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from transpixeler.models.context import Context, Shared
from transpixeler.models.streams import Run, StreamLayout


class Tokens(NamedTuple):
    """Facts that a block needs of the sequence; plain values, so that a compiled block specialises on them.

    Where ranks share the sequence, they are those of this rank's part of it.
    """

    rope: Tensor  # [T, head_dim / 2, 2], cosine and sine; a family may shape it otherwise from the second dimension on
    lengths: tuple[int, ...]  # tokens of each stream, in the order of the sequence; text that flows comes after them
    groups: tuple[int, ...]  # tokens of each time group, in the order of the sequence
    kernel: str  # attention kernel
    rgb_attends_aux: bool = True
    text_group: int = 0  # the time group whose time text takes, where it flows
    copy_scope: bool = True  # copy what an adapter keeps for the backward pass, where that frees more than it takes
    recomputing: bool = False  # this is the recomputation: only what the backward pass keeps is needed
    rgb_forward_only: bool = False  # RGB has no backward pass: the flow holds its tokens beside the companions'
    rgb_returned: bool = False  # a block returns RGB's keys and values too, after the flow
    rgb_known: bool = False  # a block is given them, after the flow, and runs the companions alone
    rgb_groups: int = 1  # time groups of RGB, the first ones
    shared: Shared | None = None  # the whole sequence, where this rank holds a part of it
    runs: tuple[tuple[Run, ...], ...] = ()  # of each stream in the whole sequence, where no token sees a later frame

    @classmethod
    def of(
        cls, layout: StreamLayout, rope: Tensor, *, kernel: str, rgb_attends_aux: bool, causal: bool = False
    ) -> Tokens:
        """Return what a layout says, with the positions and the kernel of a model. causal: no frame sees later ones."""
        rgb_groups = len(layout.groups_of(0))
        return cls(
            rope,
            layout.lengths,
            layout.group_lengths,
            kernel,
            rgb_attends_aux,
            layout.text_group,
            rgb_groups=rgb_groups,
            runs=layout.frame_runs if causal else (),
        )

    def on_rank(self, layout: StreamLayout, context: Context, *, text: int) -> Tokens:
        """Return what holds of this rank's part of the sequence. text: tokens of it that flow."""
        by_stream = layout.segments_by_stream
        return self._replace(
            rope=context.cut(self.rope, layout.segment_lengths, dim=0),
            lengths=tuple(sum(map(context.count, own)) for own in by_stream),
            groups=context.group_counts(layout.group_lengths, layout.segment_lengths),
            shared=Shared(context, by_stream, text),
        )

    def piece(self, start: int, stop: int) -> Tokens:
        """Return what holds of a run of the streams' tokens; text may come after it."""
        return self._replace(
            rope=self.rope[start:stop],
            lengths=_overlaps(self.lengths, start, stop),
            groups=_overlaps(self.groups, start, stop),
        )

    def whole(self) -> Tokens:
        """Return what attention among streams must know, which sees the tokens of all ranks."""
        return self if self.shared is None else self._replace(lengths=self.shared.lengths, shared=None)

    @property
    def most(self) -> tuple[int, ...]:
        """Tokens of each stream on the rank that holds the most: ranks that share a sequence decide alike by these."""
        if self.shared is None:
            return self.lengths
        return tuple(sum(map(self.shared.context.most, own)) for own in self.shared.segments)

    def rgb(self) -> Tokens:
        """Return what holds of RGB's tokens alone."""
        first, count = self.lengths[0], self.rgb_groups
        return self._replace(
            rope=self.rope[:first],
            lengths=(first, *(0 for _ in self.lengths[1:])),
            groups=self.groups[:count],
            rgb_attends_aux=True,
            shared=self.shared and self.shared.rgb(),
            runs=self.runs[:1],
        )

    def companions(self) -> Tokens:
        """Return what holds of the other streams' tokens alone, beside which no text flows."""
        first, count = self.lengths[0], self.rgb_groups
        return self._replace(
            rope=self.rope[first:],
            lengths=(0, *self.lengths[1:]),
            groups=self.groups[count:],
            text_group=0,
            shared=self.shared and self.shared.companions(),
        )

    @property
    def text_weight(self) -> float:
        """Return how often a text key counts beside all streams' keys, so that more streams do not outweigh it."""
        return sum(self.lengths) / self.lengths[0]

    @property
    def keeps_inside(self) -> bool:
        """Return whether what a block makes on its way is kept for the backward pass, and not made again."""
        return self.copy_scope and torch.is_grad_enabled()

    def discards(self, gate: Tensor) -> bool:
        """Return whether a block's last output, which `gate` multiplies, is thrown away."""
        return self.recomputing and not gate.requires_grad  # a gate that trains needs what it multiplies


def _overlaps(lengths: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Count the tokens between two places that each of the runs has there."""
    ends = (0, *accumulate(lengths))
    return tuple(max(0, min(end, stop) - max(begin, start)) for begin, end in pairwise(ends))
