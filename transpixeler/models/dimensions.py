"""The sizes of a transformer that the formulas of cost need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transpixeler.models.streams import span_slice


class AdapterShape(NamedTuple):
    inputs: int
    outputs: int
    rank: int
    span: tuple[int, int] | None
    on_text: bool

    def tokens(self, lengths: Sequence[int], text_len: int) -> int:
        if self.on_text:
            return text_len
        scope = span_slice(lengths, self.span or (0, len(lengths)))
        return scope.stop - scope.start


@dataclass(frozen=True)
class Dimensions:
    """All that the formulas need to know of a transformer whose blocks are self-attention, cross-attention and ffn."""

    width: int
    ffn: int
    heads: int
    blocks: int
    text_len: int
    text_dim: int
    patch_in: int  # numbers in one patch
    patch_out: int
    first_attends_all: bool = True
    adapters: tuple[AdapterShape, ...] = ()
