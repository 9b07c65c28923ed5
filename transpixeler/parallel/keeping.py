"""Keep the activations of as many blocks as fit a budget; the others are recomputed, as `parallel.recompute` says.

In: what each block of a rank keeps, and bytes. Out: for each length of clips, the blocks that recompute nothing. Every
rank with the same blocks chooses the same, whatever memory it has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transpixeler.models.backbone import Block, Flow
from transpixeler.models.kept import Kept, fitting
from transpixeler.models.tokens import Tokens


class Keeping:
    """The budget of a rank, and its blocks in the order of a forward pass."""

    def __init__(self, blocks: Sequence[Block], kept: Sequence[Kept], budget: float) -> None:
        self.kept, self.budget = kept, budget
        self.microbatches = 1.0  # whose activations are held at a time, at most
        for place, block in enumerate(blocks):
            block.keeps = partial(self.keeps, place)

    def count(self, batch: int, lengths: Sequence[int]) -> int:
        """Count the blocks that keep everything, for a microbatch of this size and length."""
        return fitting(self.kept, lengths, self.budget / (batch * self.microbatches))

    def keeps(self, place: int, flow: Flow, tokens: Tokens) -> bool:
        return place >= len(self.kept) - self.count(len(flow[0]), tokens.most)
