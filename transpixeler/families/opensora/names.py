"""Open-Sora 2's names, as one table of its modules in its two spellings.

Its authors use both. "original" has queries, keys and values in one linear. "diffusers" has them apart, as the
published weights do; the library of that name knows no such model. Files number double and single blocks each from 0;
in our module the single ones are `blocks.s0`, `blocks.s1`, ….
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transpixeler.models.mmdit_names import block_counts
from transpixeler.models.names import Names, Row

_PARTS = "(q_proj+k_proj+v_proj)"
_DOUBLE = {  # internal → together and apart
    "mod": ("mod.lin", "mod.lin"),
    "qkv": ("attn.qkv", f"attn.{_PARTS}"),
    "q_norm": ("attn.norm.query_norm.scale", "attn.norm.query_norm.scale"),
    "k_norm": ("attn.norm.key_norm.scale", "attn.norm.key_norm.scale"),
    "proj": ("attn.proj", "attn.proj"),
    "mlp.0": ("mlp.0", "mlp.0"),
    "mlp.2": ("mlp.2", "mlp.2"),
}
_SINGLE = {
    "mod": ("modulation.lin", "modulation.lin"),
    "linear1": ("linear1", "(q_proj+k_proj+v_mlp*5)"),  # values and, four times as many, the feed-forward's inside
    "heads.q_norm": ("norm.query_norm.scale", "norm.query_norm.scale"),
    "heads.k_norm": ("norm.key_norm.scale", "norm.key_norm.scale"),
    "linear2": ("linear2", "linear2"),
}
_ENDS = {  # internal → stored
    "embed.img_in": "img_in",
    "embed.cond_in": "cond_in",
    "embed.txt_in": "txt_in",
    "embed.time_in.in_layer": "time_in.in_layer",
    "embed.time_in.out_layer": "time_in.out_layer",
    "embed.vector_in.in_layer": "vector_in.in_layer",
    "embed.vector_in.out_layer": "vector_in.out_layer",
    "head.modulation": "final_layer.adaLN_modulation.1",
    "head.linear": "final_layer.linear",
}

_ROWS = (
    *(
        Row(f"blocks.{{n}}.{half}.{i}", *(f"double_blocks.{{n}}.{half}_{stored}" for stored in pair))
        for half in ("img", "txt")
        for i, pair in _DOUBLE.items()
    ),
    *(Row(f"blocks.s{{n}}.{i}", *(f"single_blocks.{{n}}.{stored}" for stored in pair)) for i, pair in _SINGLE.items()),
    *(Row(internal, stored, stored) for internal, stored in _ENDS.items()),
)
NAMES = Names(
    rows=_ROWS,
    tables=frozenset(row.internal for row in _ROWS if row.internal.endswith("_norm")),
)


def is_opensora(stored: Iterable[str]) -> bool:
    """Tell a file by names that no other model of its shape has: parts apart, or a place for conditions."""
    there = set(stored)
    known = {"double_blocks.0.img_attn.q_proj.weight", "cond_in.weight"}
    return not there.isdisjoint(known) and "single_blocks.0.linear2.weight" in there


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], *, apart: bool) -> dict[str, Any]:
    """Return the config of a file, which comes without one, from shapes by internal name.

    apart: queries, keys and values are, as published. In such a file a head's halves turn together; in one that is
    spelled as the image model that it began from, neighbouring channels do.
    """
    width, channels = shapes["embed.img_in.weight"]
    head_dim = shapes["blocks.0.img.q_norm"][0]
    double, single = block_counts(shapes)
    side = head_dim * 7 // 32 * 2  # rows and columns have seven sixteenths of a head each, time the rest
    return {
        "depth": double,
        "depth_single_blocks": single,
        "num_heads": width // head_dim,
        "hidden_size": width,
        "in_channels": channels,
        "context_in_dim": shapes["embed.txt_in.weight"][1],
        "vec_in_dim": shapes["embed.vector_in.in_layer.weight"][1],
        "axes_dim": (head_dim - 2 * side, side, side),
        "cond_embed": "embed.cond_in.weight" in shapes,
        "use_liger_rope": apart,
    }
