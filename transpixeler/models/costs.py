"""Count a step's FLOPs and bytes, summed over a model's modules for a layout.

In: a whole model on meta, so no weights are needed. Out: numbers for telemetry, `plan` and the choice of what to
recompute. A frozen layer costs its forward and its input's gradient, no weight gradient. Text counts at its padded
length, as a GPU computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from transpixeler.models.attention import text_copies
from transpixeler.models.backbone import Backbone, Block
from transpixeler.models.family import caption_fields
from transpixeler.models.kept import KeptBytes, measure
from transpixeler.models.linear import FeedForward, Linear
from transpixeler.models.lora import LoraLinear
from transpixeler.models.streams import span_slice

FLASH_BACKWARD = 2.5  # times its forward: five matmuls instead of two
Recompute = str | int  # as in `parallel.recompute`: "none", "full", "attention", "offload", or n for every n-th block


class LinearCost(NamedTuple):
    """One linear, and its adapter where it has one."""

    inputs: int
    outputs: int
    reads: str  # "streams", "joined", "text", "both", "image" or "vectors"
    rank: int = 0
    span: tuple[int, int] | None = None  # streams that the adapter acts on; None for all that is read
    discarded: bool = False  # the block's last projection: no backward pass asks for its output
    image: int = 0  # tokens of an image encoder, where it reads them
    dora: bool = False  # the adapter also has norms of the changed weight's rows
    pairs: int = 1  # the adapter's matrices: one pair, or one for each stream of the span
    repeats: int = 1  # times that it acts for each token

    def tokens(self, lengths: Sequence[int], text: int) -> int:
        streams, first = sum(lengths), lengths[0] if lengths else 0
        known = {"streams": streams, "joined": first, "text": text, "both": streams + text, "image": self.image}
        return self.repeats * known.get(self.reads, 0)

    def adapted(self, lengths: Sequence[int], text: int) -> int:
        """Return the tokens that the adapter acts on."""
        if not self.rank or self.span is None:
            return self.tokens(lengths, text) if self.rank else 0
        scope = span_slice(lengths, self.span)
        return scope.stop - scope.start

    def flops(self, lengths: Sequence[int], text: int) -> float:
        return 2 * self.inputs * self.outputs * self.tokens(lengths, text)

    def adapter_flops(self, lengths: Sequence[int], text: int) -> float:
        return 2 * self.rank * (self.inputs + self.outputs) * self.adapted(lengths, text)

    def norm_flops(self) -> float:
        """Return what the norms of a DoRA's rows take in a microbatch, whatever its tokens: W Aᵀ, A Aᵀ, B A Aᵀ."""
        products = self.inputs * self.outputs + self.rank * (self.inputs + self.outputs)
        return 2 * self.rank * products * self.pairs if self.dora else 0

    def discarded_flops(self, lengths: Sequence[int], text: int) -> float:
        """Return what a recomputation leaves out; a DoRA's gradient needs the scope's outputs."""
        if not self.discarded:
            return 0
        needed = self.adapted(lengths, text) if self.dora else 0
        return 2 * self.inputs * self.outputs * (self.tokens(lengths, text) - needed)


class BlockCost(NamedTuple):
    """One block."""

    linears: tuple[LinearCost, ...]
    attends: tuple[str, ...]  # as in `Block.attends`

    @property
    def inner(self) -> int:
        """Width of the feed-forward's inside."""
        return sum(linear.inputs for linear in self.linears if linear.discarded)


@dataclass(frozen=True)
class Costs:
    """All that the sums need to know of a model."""

    width: int
    heads: int
    blocks: tuple[BlockCost, ...]
    ends: tuple[LinearCost, ...]
    text: int  # tokens of the padded text
    text_masked: bool  # its padding is not attended, by a bias that also says how much its keys count
    field_numbers: int  # of one sample's fields
    kept: tuple[KeptBytes, ...]  # of each block; empty where it was not asked for
    streams: int
    rgb_attends_aux: bool = True
    rgb_forward_only: bool = False  # as in `Backbone`
    text_attentions: int = 0  # as in `Backbone`
    image: int = 0  # tokens of an image encoder
    cell_numbers: int = 0  # of one sample's fields, for each cell of the streams' latents

    @classmethod
    def of(cls, model: Backbone, *, kept: bool = True) -> Costs:
        """Read a whole model, before `keep`. kept=False: blocks do not run on meta, for who asks for no bytes."""
        assert model.embed is not None and model.head is not None, "costs are those of the whole model"
        lengths = [field.length for field in caption_fields(model.fields) if field.length]
        whole = [field for field in model.fields if field.source != "clip"]
        return cls(
            width=model.width,
            heads=model.heads,
            blocks=tuple(_block(block, _image_tokens(model)) for block in model.block_list()),
            ends=tuple(_ends(model)),
            text=max(lengths, default=0),
            text_masked=any(field.masked for field in model.fields),
            field_numbers=sum(field.width * (field.length or 1) for field in whole),
            kept=_kept(model) if kept else (),
            streams=len(model.streams),
            rgb_attends_aux=model.rgb_attends_aux,
            rgb_forward_only=model.rgb_forward_only,
            text_attentions=model.text_attentions,
            image=_image_tokens(model),
            cell_numbers=sum(field.width for field in model.fields if field.source == "clip"),
        )

    def part(self, ranks: int) -> Costs:
        """Return what counts for the memory of one of the ranks that share a sequence, and with it text that flows."""
        if ranks == 1 or "joint" not in self.blocks[0].attends:
            return self
        kept = tuple(KeptBytes(*(way.part(ranks) for way in each)) for each in self.kept)
        return replace(self, text=math.ceil(self.text / ranks), kept=kept)

    @property
    def linears(self) -> list[LinearCost]:
        return [linear for block in self.blocks for linear in block.linears]


def _kept(model: Backbone) -> tuple[KeptBytes, ...]:
    """Measure each block, those that are alike once."""
    found: dict[object, KeptBytes] = {}
    kinds = [(type(b), _block(b, 0), tuple(p.requires_grad for p in b.parameters())) for b in model.block_list()]
    for kind, block in zip(kinds, model.block_list(), strict=True):
        if kind not in found:
            found[kind] = measure(model, block)
    return tuple(found[kind] for kind in kinds)


def _image_tokens(model: Backbone) -> int:
    return sum(field.length or 1 for field in model.fields if field.source == "image")


def _block(block: Block, image: int) -> BlockCost:
    last = {id(module[2]) for module in block.modules() if isinstance(module, FeedForward)}
    found = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            inputs, outputs = module.weight.shape[:2]
            if isinstance(module, nn.Conv2d):
                inputs, outputs = outputs, inputs
            area = math.prod(module.kernel_size)
            found.append(LinearCost(inputs * area, outputs, block.reads(name), repeats=block.repeats(name)))
        if isinstance(module, Linear):
            cost = LinearCost(module.in_features, module.out_features, block.reads(name), image=image)
            cost = cost._replace(repeats=block.repeats(name))
            if isinstance(module, LoraLinear):
                dora, pairs = module.lora_magnitude is not None, len(module.pairs)
                cost = cost._replace(rank=module.rank, span=module.span, dora=dora, pairs=pairs)
            found.append(cost._replace(discarded=id(module) in last))
    return BlockCost(tuple(found), block.attends)


def _ends(model: Backbone) -> list[LinearCost]:
    """Linears of `embed` and `head`; a convolution over patches is one."""
    found = []
    for part in ("embed", "head"):
        for name, module in getattr(model, part).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                outputs = module.weight.shape[0]
                reads, image = model.end_reads(f"{part}.{name}"), _image_tokens(model)
                cost = LinearCost(module.weight.numel() // outputs, outputs, reads, image=image)
                found.append(cost._replace(repeats=model.end_repeats(name)))
    return found


class Flops(NamedTuple):
    """FLOPs of one sample's forward pass."""

    linear: float
    attention: float
    adapter: float
    norms: float = 0.0  # of a DoRA's rows, which have no backward pass

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.adapter + self.norms


# -- FLOPs


def attention_flops(costs: Costs, lengths: Sequence[int]) -> float:
    pairs = sum(_attended_pairs(block, costs, lengths) for block in costs.blocks)
    return 4 * costs.width * (pairs + costs.text_attentions * costs.text**2)


def _attended_pairs(block: BlockCost, costs: Costs, lengths: Sequence[int]) -> int:
    """Count the pairs of a query and a key in a block's attentions."""
    tokens, first, text, pairs = sum(lengths), lengths[0], costs.text, 0
    seen_by_first = tokens if costs.rgb_attends_aux else first
    if "streams" in block.attends:
        pairs += first * seen_by_first + (tokens - first) * tokens
    if "text" in block.attends:
        pairs += tokens * text
    if "image" in block.attends:
        pairs += tokens * costs.image
    if "joint" in block.attends:  # text sees what RGB sees
        keys = text * text_copies(tokens / first, masked=costs.text_masked)  # for who sees all streams
        pairs += (first + text) * (seen_by_first + (keys if costs.rgb_attends_aux else text))
        pairs += (tokens - first) * (tokens + keys)
    return pairs


def block_flops(costs: Costs, lengths: Sequence[int]) -> list[float]:
    """Return the forward FLOPs of each block, by which pipeline stages are balanced."""
    return [
        sum(
            linear.flops(lengths, costs.text) + linear.adapter_flops(lengths, costs.text) + linear.norm_flops()
            for linear in block.linears
        )
        + 4 * costs.width * _attended_pairs(block, costs, lengths)
        for block in costs.blocks
    ]


def forward_flops(costs: Costs, lengths: Sequence[int]) -> Flops:
    linears, text = costs.linears, costs.text
    linear = sum(one.flops(lengths, text) for one in (*linears, *costs.ends)) + _shared_keys_flops(costs)
    adapter = sum(one.adapter_flops(lengths, text) for one in linears)
    return Flops(linear, attention_flops(costs, lengths), adapter, sum(one.norm_flops() for one in linears))


def step_flops(costs: Costs, lengths: Sequence[int], *, recompute: Recompute = "none", full: bool = False) -> float:
    """Return FLOPs of one sample's forward and backward pass and recomputation; `full` trains the base as well."""
    forward = forward_flops(costs, lengths)
    back = _differentiated(costs, lengths)
    step = forward.total + back.linear * (2 if full else 1) + back.attention * FLASH_BACKWARD + back.adapter * 2
    again = back.total - (0 if full else discarded_flops(costs, lengths)) + _keys_flops(costs, lengths)
    if recompute == "attention":
        return step + again - back.attention
    return step + again * recomputed_share(len(costs.blocks), recompute)


def _differentiated(costs: Costs, lengths: Sequence[int]) -> Flops:
    """Return those of the forward FLOPs that a backward pass goes back through."""
    forward = forward_flops(costs, lengths)
    if not costs.rgb_forward_only:
        return forward
    near = forward_flops(replace(costs, streams=1, rgb_forward_only=False), lengths[:1])
    linear = sum(one.flops(lengths[1:], 0) for one in (*costs.linears, *costs.ends) if one.reads != "image")
    return Flops(linear, forward.attention - near.attention, forward.adapter, forward.norms)


def _shared_keys_flops(costs: Costs) -> float:
    """Return what it costs to make the keys of text and images once more, where RGB runs by itself."""
    apart = [block for block in costs.blocks if costs.rgb_forward_only and "joint" not in block.attends]
    return sum(one.flops((), costs.text) for block in apart for one in block.linears if one.reads != "vectors")


def _keys_flops(costs: Costs, lengths: Sequence[int]) -> float:
    """Return what a recomputation costs that makes RGB's queries, keys and values again, beside those of text.

    One linear may make the inside of the feed-forward with them.
    """
    if not costs.rgb_forward_only:
        return 0.0
    total = _shared_keys_flops(costs)
    for block in costs.blocks:
        wide = [one.outputs for one in block.linears if one.reads == "both" and one.inputs == costs.width]
        total += (
            2 * costs.width * max(3 * costs.width, *wide, 0) * (lengths[0] + costs.text * ("joint" in block.attends))
        )
    return total


def discarded_flops(costs: Costs, lengths: Sequence[int]) -> float:
    """Return the forward FLOPs that a recomputation leaves out: the last projection of every block."""
    text = 0 if costs.rgb_forward_only else costs.text
    lengths = lengths[1:] if costs.rgb_forward_only else lengths
    return sum(linear.discarded_flops(lengths, text) for linear in costs.linears)


def recomputed_share(blocks: int, recompute: Recompute) -> float:
    """Return the share of the blocks that run in full again."""
    if isinstance(recompute, int):
        return math.ceil(blocks / recompute) / blocks
    return 1.0 if recompute in ("full", "offload") else 0.0


def exchanged(costs: Costs, lengths: Sequence[int], ranks: int, *, recompute: Recompute = "none") -> float:
    """Count the numbers that one of the ranks that share a sequence exchanges in a sample's step, its own among them.

    They are queries, keys, values and what was seen, for each token: forward, backward, and where it is recomputed.
    Where RGB runs by itself, its keys and values go to the companions as well, and nothing of it comes back.
    """
    again = 1.0 if recompute == "attention" else recomputed_share(len(costs.blocks), recompute)
    total = 0.0
    for block in costs.blocks:
        near = lengths[0] + costs.text * ("joint" in block.attends)
        far = sum(lengths[1:])
        if costs.rgb_forward_only:
            total += (4 * far + 6 * near) + 4 * far + again * (4 * far + 2 * near)
        else:
            total += 4 * (near + far) * (2 + again)
    return costs.width * total / ranks if ranks > 1 else 0.0


# -- memory


def activation_bytes(
    costs: Costs,
    lengths: Sequence[int],
    *,
    size: int,
    recompute: Recompute = "none",
    compiled: bool = False,
    blocks: int | None = None,
    chunk: float = 0.0,
) -> int:
    """Return one sample's bytes at the worst moment: what all blocks keep, and the work of the one whose turn it is.

    blocks: how many a rank holds, all where None. chunk: tokens of a sample that a block's end takes at a time.
    """
    count = len(costs.blocks) if blocks is None else blocks
    tokens = sum(lengths) + costs.text * ("joint" in costs.blocks[0].attends)  # what flows from block to block
    each = [kept.as_run(compiled=compiled).bytes(lengths) for kept in costs.kept]
    mean, most = sum(each) / len(each), max(each)
    share = 1.0 if recompute == "none" or not chunk else min(1.0, chunk / tokens)  # of the sequence, in a piece
    if share < 1:
        pieces = [kept.as_run(compiled=compiled, pieces=True).bytes(lengths) for kept in costs.kept]
        most = max(piece + share * (whole - piece) for piece, whole in zip(pieces, each, strict=True))
    work = tokens * (2 * share * max(block.inner for block in costs.blocks) + 4 * costs.width) * size
    entry = tokens * costs.width * size
    if recompute == "attention":
        attentions = max(len(block.attends) for block in costs.blocks)
        kept = sum(lengths[1:]) if costs.rgb_forward_only else tokens
        outputs = attentions * kept * (costs.width * size + 4 * costs.heads)  # with their log-sum-exp
        return int(count * (entry + outputs) + most + work)
    if recompute == "offload":
        return int(2 * entry + most + work)
    again = recomputed_share(count, recompute) * count if count else 0
    at_once = again and (count - 1) % (recompute if isinstance(recompute, int) else 1) == 0
    # a last block that is kept is done with, and let go, before the first one is computed again
    return int(again * entry + (count - again) * mean + (most if at_once else 0) + work)
