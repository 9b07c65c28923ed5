"""Compute a step's cost: FLOPs and bytes as pure functions of a model's dimensions and a layout.

In: dimensions (of a model on meta, so no weights are needed) and tokens of each stream. Out: numbers for telemetry,
`plan` and the choice of what to recompute. A frozen layer costs its forward and its input's gradient, no weight
gradient. Text counts at its padded length, as a GPU computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from transpixeler.models.dimensions import AdapterShape, Dimensions
from transpixeler.models.lora import TEXT_TARGETS, inside, lora_linears

FLASH_BACKWARD = 2.5  # times its forward: five matmuls instead of two
Recompute = str | int  # as in `parallel.recompute`: "none", "full", "attention", "offload", or n for every n-th block


class Flops(NamedTuple):
    """FLOPs of one sample's forward pass."""

    linear: float
    attention: float
    adapter: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.adapter


def adapter_shapes(model: nn.Module) -> tuple[AdapterShape, ...]:
    """List the shape of every adapter that is in the model."""
    return tuple(
        AdapterShape(linear.in_features, linear.out_features, linear.rank, linear.span, inside(name) in TEXT_TARGETS)
        for name, linear in lora_linears(model)
    )


# -- FLOPs


def linear_flops(d: Dimensions, tokens: int) -> float:
    """Projections of all blocks, and the ends."""
    block = tokens * (12 * d.width**2 + 4 * d.width * d.ffn) + 4 * d.width**2 * d.text_len
    ends = 2 * tokens * d.width * (d.patch_in + d.patch_out) + 2 * d.text_len * d.width * (d.text_dim + d.width)
    return d.blocks * block + ends


def attention_flops(d: Dimensions, lengths: Sequence[int]) -> float:
    tokens = sum(lengths)
    pairs = tokens**2 if d.first_attends_all else lengths[0] ** 2 + (tokens - lengths[0]) * tokens
    return 4 * d.blocks * d.width * (pairs + tokens * d.text_len)


def adapter_flops(d: Dimensions, lengths: Sequence[int]) -> float:
    return sum(2 * a.tokens(lengths, d.text_len) * a.rank * (a.inputs + a.outputs) for a in d.adapters)


def forward_flops(d: Dimensions, lengths: Sequence[int]) -> Flops:
    return Flops(linear_flops(d, sum(lengths)), attention_flops(d, lengths), adapter_flops(d, lengths))


def step_flops(d: Dimensions, lengths: Sequence[int], *, recompute: Recompute = "none", full: bool = False) -> float:
    """Forward, backward and what is recomputed, of one sample; `full` trains the base as well."""
    forward = forward_flops(d, lengths)
    step = forward.linear * (3 if full else 2) + forward.attention * (1 + FLASH_BACKWARD) + forward.adapter * 3
    again = forward.total - (0 if full else unwanted_flops(d, sum(lengths)))
    if recompute == "attention":
        return step + again - forward.attention
    return step + again * recomputed_share(d, recompute)


def unwanted_flops(d: Dimensions, tokens: int) -> float:
    """Count what recomputing a forward pass leaves out: every block's last projection, which is only added."""
    return 2 * d.blocks * tokens * d.ffn * d.width


def recomputed_share(d: Dimensions, recompute: Recompute) -> float:
    """Return the share of blocks that run in full again."""
    if isinstance(recompute, int):
        return math.ceil(d.blocks / recompute) / d.blocks
    return 1.0 if recompute in ("full", "offload") else 0.0


# -- memory


def kept_bytes(
    d: Dimensions, lengths: Sequence[int], *, size: int, full: bool = False, compiled: bool = False
) -> float:
    """Count what one block keeps for its backward pass for one sample, in `size` bytes a number.

    Without compiling, what norms take in is kept in fp32. Training the base keeps what linears, norms and
    gates take in.
    """
    tokens, wide = sum(lengths), 4 if not compiled else size
    into_norms = 3 * wide + 3 * size  # three layer norms'; q's, k's and cross q's
    matmul_operands = 6 * size  # q, k, v, out, cross q, cross out
    kept = tokens * d.width * (into_norms + matmul_operands) + tokens * d.ffn * size
    kept += d.text_len * d.width * 3 * size
    if full:
        normed = 5 * wide  # the layer norms' outputs, and what the gates multiply
        return kept + tokens * d.width * (normed + 3 * size) + tokens * d.ffn * size
    kept += sum(a.tokens(lengths, d.text_len) * a.rank for a in d.adapters) / max(d.blocks, 1) * size
    return kept + scope_tokens(d, lengths) * 3 * d.width * size


def scope_tokens(d: Dimensions, lengths: Sequence[int]) -> int:
    return max((a.tokens(lengths, d.text_len) for a in d.adapters if not a.on_text), default=0)


def activation_bytes(
    d: Dimensions,
    lengths: Sequence[int],
    *,
    size: int,
    recompute: Recompute = "none",
    full: bool = False,
    compiled: bool = False,
) -> int:
    """Count one sample's bytes at the worst moment: what all blocks keep, and the work of the one whose turn it is."""
    tokens = sum(lengths)
    block = kept_bytes(d, lengths, size=size, full=full, compiled=compiled)
    work = tokens * (2 * d.ffn + 4 * d.width) * size
    entry = tokens * d.width * size
    if recompute == "attention":
        outputs = 2 * tokens * (d.width * size + 4 * d.heads)  # both attentions', and their log-sum-exp
        return int(d.blocks * (entry + outputs) + block + work)
    if recompute == "offload":
        return int(2 * entry + block + work)
    again = recomputed_share(d, recompute) * d.blocks
    at_once = again and (d.blocks - 1) % (recompute if isinstance(recompute, int) else 1) == 0
    # a last block that is kept is done with, and let go, before the first one is computed again
    return int(again * entry + (d.blocks - again) * block + (block if at_once else 0) + work)
