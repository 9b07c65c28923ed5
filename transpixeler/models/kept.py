"""Measure what a block keeps for its backward pass: the block runs on meta, and what autograd saves is summed.

In: a model as it will train, and one of its blocks. Out: bytes of one sample by stream. No weight is needed, and no
family writes a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transpixeler.models.attention import text_copies
from transpixeler.models.backbone import Backbone, Block
from transpixeler.models.family import caption_fields
from transpixeler.models.streams import StreamLayout

PIECE = 24  # tokens: less than the shortest sequence here, so that each is cut, and no more calls than that takes
META = torch.device("meta")


class Kept(NamedTuple):
    """Bytes that one block keeps for one sample: they grow in proportion to each stream's tokens."""

    fixed: float  # of the text
    by_stream: tuple[float, ...]  # of one token of each stream
    copies: Copies | None = None

    def bytes(self, lengths: Sequence[int]) -> float:
        copied = self.copies.bytes(sum(lengths), lengths[0]) if self.copies else 0.0
        return self.fixed + copied + sum(each * length for each, length in zip(self.by_stream, lengths, strict=True))

    def part(self, ranks: int) -> Kept:
        """Return what one of the ranks that share a sequence keeps, where the text is a part of it."""
        copies = self.copies and self.copies._replace(each=self.copies.each / ranks, fixed=self.copies.fixed / ranks)
        return self._replace(fixed=self.fixed / ranks, copies=copies)


class Copies(NamedTuple):
    """Bytes more where text's keys count by copies of them, and are joined with those of the streams anew."""

    each: float  # of one more copy
    fixed: float
    by_token: float

    def bytes(self, tokens: int, first: int) -> float:
        """first: tokens of the first stream, by which the text is weighed."""
        copies = text_copies(tokens / first, masked=False)
        return (copies - 1) * self.each + self.fixed + self.by_token * tokens if copies > 1 else 0.0


def fitting(kept: Sequence[Kept], lengths: Sequence[int], room: float) -> int:
    """Count the last blocks that together keep no more than `room` bytes of a sample.

    The last ones, because their memory is free again before the first block is recomputed.
    """
    sums = accumulate(each.bytes(lengths) for each in reversed(kept))
    return sum(held <= room for held in sums)


class KeptBytes(NamedTuple):
    """The same block as it runs, and compiled: what norms keep in fp32 is then kept in the matmuls' dtype."""

    eager: Kept
    compiled: Kept
    eager_pieces: Kept  # where it is recomputed, and its end piece by piece, of which nothing is kept
    compiled_pieces: Kept

    def as_run(self, *, compiled: bool, pieces: bool = False) -> Kept:
        if pieces:
            return self.compiled_pieces if compiled else self.eager_pieces
        return self.compiled if compiled else self.eager


def measure(model: Backbone, block: nn.Module) -> KeptBytes:
    """Run a block at two lengths of each stream; what it keeps grows along straight lines.

    At none of them do text's keys count by copies, whose bytes come beside.
    """
    if any(not parameter.is_meta for parameter in block.parameters()):
        block = deepcopy(block).to(META)
    count = len(model.streams)
    shortest = [count + 1, *[1] * (count - 1)]
    layouts = [
        _layout(model, [own + (place == longer) for place, own in enumerate(shortest)]) for longer in range(-1, count)
    ]
    wide = model.matmul_dtype.itemsize / torch.float32.itemsize
    whole, pieces = (cache(partial(_saved, model, each)) for each in (block, _in_pieces(block)))
    lines = [
        _kept(model, block, layouts, partial(_bytes, saved, share))
        for saved in (whole, pieces)
        for share in (1.0, wide)
    ]
    return KeptBytes(*lines)


def _in_pieces(block: nn.Module) -> nn.Module:
    """Return a block as it is in its recomputation, where that goes piece by piece."""
    found = deepcopy(block)
    if isinstance(found, Block):
        found.chunk, found.recompute = PIECE, lambda compute, flow, tokens: compute(flow, tokens)
    return found


def _kept(
    model: Backbone, block: nn.Module, layouts: Sequence[StreamLayout], bytes_of: Callable[[StreamLayout], float]
) -> Kept:
    """Draw the lines; the first layout has no longer stream."""
    line = _line(layouts, [bytes_of(layout) for layout in layouts])
    copy = _text_copy(model, block)
    if not copy or len(model.streams) == 1:
        return line
    equal = [_layout(model, [frames] * len(model.streams)) for frames in (1, 2)]
    more = [bytes_of(layout) - line.bytes(layout.lengths) for layout in equal]
    by_token = (more[1] - more[0]) / (equal[1].tokens - equal[0].tokens)
    fixed = more[0] - by_token * equal[0].tokens - (len(model.streams) - 1) * copy
    return line._replace(copies=Copies(copy, fixed, by_token))


def _bytes(saved: Callable[[StreamLayout], tuple[int, int]], share: float, layout: StreamLayout) -> float:
    """Add up what is saved. share: of the bytes that are wider than matmuls."""
    narrow, rest = saved(layout)
    return narrow + share * rest


def _text_copy(model: Backbone, block: nn.Module) -> int:
    """Return the bytes of keys and values of text that flows and has no mask; of a mask, one number counts for all."""
    if not isinstance(block, Block) or "joint" not in block.attends or any(field.masked for field in model.fields):
        return 0
    text = max(field.length or 0 for field in caption_fields(model.fields))
    return 2 * text * model.width * model.matmul_dtype.itemsize


def _line(layouts: Sequence[StreamLayout], found: Sequence[float]) -> Kept:
    start, base = found[0], layouts[0]
    by_stream = tuple((more - start) / (layout.tokens - base.tokens) for more, layout in zip(found[1:], layouts[1:]))
    return Kept(start - sum(each * length for each, length in zip(by_stream, base.lengths)), by_stream)


def _layout(model: Backbone, counts: Sequence[int]) -> StreamLayout:
    """Lay out streams of one frame and so many times 4×4 patches; their channels do not matter to a block."""
    frames, rows, columns = model.patch
    shapes = tuple((1, frames, 4 * rows, 4 * columns * count) for count in counts)
    return StreamLayout(tuple(model.streams), shapes, model.patch)


def _saved(model: Backbone, block: nn.Module, layout: StreamLayout) -> tuple[int, int]:
    """Sum the storages that a block keeps, in the matmuls' dtype and wider, without weights and what blocks share."""
    flow = model.meta(layout, 1, model.matmul_dtype)
    for place, tensor in enumerate(flow):
        conditions = place >= model.changed and model.trains_conditions
        tensor.requires_grad_(tensor.is_floating_point() and (place < model.differentiated or conditions))
    tokens = model.tokens(layout, META)
    shared = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *flow[model.changed :], tokens.rope)}
    kept: dict[int, tuple[int, bool]] = {}
    alive: list[Tensor] = []  # else a storage's address could be that of an earlier one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor.itemsize > model.matmul_dtype.itemsize)
        alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(tuple(flow), tokens)
    sizes = [(size, wide) for key, (size, wide) in kept.items() if key not in shared]
    return sum(size for size, wide in sizes if not wide), sum(size for size, wide in sizes if wide)
