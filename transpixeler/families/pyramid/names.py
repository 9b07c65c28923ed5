"""Pyramid Flow's names, as one table of its modules in its two spellings.

"diffusers" is what is published: it has queries, keys and values apart, and the words of diffusers' FLUX.1. "original"
has the same words with them in one linear, as our modules do, so that no other family's file is taken for one of these.
Files number double and single blocks each from 0; in our module the single ones are `blocks.s0`, `blocks.s1`, ….
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transpixeler.models.mmdit_names import DOUBLE, SINGLE, block_counts, block_rows
from transpixeler.models.names import Names, Row

_DOUBLE = DOUBLE | {"img.qkv": "attn.to_qkv", "txt.qkv": "attn.add_qkv_proj"}  # internal → together
_SINGLE = SINGLE | {"linear1": "attn.to_qkv_mlp"}
_FOLDERS = ("transformer_blocks", "single_transformer_blocks")
_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
_ENDS = {
    "embed.img_in": ("x_embedder", "x_embedder"),
    "embed.txt_in": ("context_embedder", "context_embedder"),
    **{
        f"embed.{ours}.{layer}": (f"time_text_embed.{theirs}.{linear}",) * 2
        for ours, theirs in _EMBEDDERS.items()
        for layer, linear in _LAYERS.items()
    },
    "head.modulation": ("norm_out.modulation", "norm_out.linear~"),
    "head.linear": ("proj_out", "proj_out"),
}

_ROWS = (
    *block_rows(_DOUBLE, _SINGLE, folders=_FOLDERS),
    *(Row(internal, *pair) for internal, pair in _ENDS.items()),
)
NAMES = Names(
    rows=_ROWS,
    tables=frozenset(row.internal for row in _ROWS if row.internal.endswith("_norm")),
)


def is_pyramid(stored: Iterable[str]) -> bool:
    """Tell a file by the names that it has when its linears are together; apart, they are those of FLUX.1."""
    return {"transformer_blocks.0.attn.to_qkv.weight", "norm_out.modulation.weight"} <= set(stored)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config of a file, which comes without one, from shapes by internal name."""
    width, channels = shapes["embed.img_in.weight"]
    head_dim = shapes["blocks.0.img.q_norm"][0]
    double, single = block_counts(shapes)
    side = head_dim * 3 // 16 * 2  # rows and columns have three eighths of a head each, time the rest
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "joint_attention_dim": shapes["embed.txt_in.weight"][1],
        "pooled_projection_dim": shapes["embed.vector_in.in_layer.weight"][1],
        "axes_dims_rope": (head_dim - 2 * side, side, side),
    }
