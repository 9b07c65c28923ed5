"""Share the names of models of double and single blocks: rows of blocks for a family's table; a file's counts of them.

Files number double and single blocks each from 0; in our module the single ones are `blocks.s0`, `blocks.s1`, ….
"""

from __future__ import annotations

from collections.abc import Mapping

from transpixeler.models.names import Row

DOUBLE = {  # internal → diffusers
    "img.mod": "norm1.linear",
    "img.qkv": "attn.(to_q+to_k+to_v)",
    "img.q_norm": "attn.norm_q.weight",
    "img.k_norm": "attn.norm_k.weight",
    "img.proj": "attn.to_out.0",
    "img.mlp.0": "ff.net.0.proj",
    "img.mlp.2": "ff.net.2",
    "txt.mod": "norm1_context.linear",
    "txt.qkv": "attn.(add_q_proj+add_k_proj+add_v_proj)",
    "txt.q_norm": "attn.norm_added_q.weight",
    "txt.k_norm": "attn.norm_added_k.weight",
    "txt.proj": "attn.to_add_out",
    "txt.mlp.0": "ff_context.net.0.proj",
    "txt.mlp.2": "ff_context.net.2",
}
SINGLE = {
    "mod": "norm.linear",
    "linear1": "(attn.to_q+attn.to_k+attn.to_v+proj_mlp*4)",
    "heads.q_norm": "attn.norm_q.weight",
    "heads.k_norm": "attn.norm_k.weight",
    "linear2": "proj_out",
}


def block_rows(
    double: Mapping[str, str],
    single: Mapping[str, str],
    *,
    folders: tuple[str, str] = ("double_blocks", "single_blocks"),
) -> tuple[Row, ...]:
    """Return the rows of all blocks. double, single: the original names by internal ones. folders: before them."""
    doubles, singles = folders
    return (
        *(
            Row(f"blocks.{{n}}.{i}", f"{doubles}.{{n}}.{o}", f"transformer_blocks.{{n}}.{DOUBLE[i]}")
            for i, o in double.items()
        ),
        *(
            Row(f"blocks.s{{n}}.{i}", f"{singles}.{{n}}.{o}", f"single_transformer_blocks.{{n}}.{SINGLE[i]}")
            for i, o in single.items()
        ),
    )


def block_counts(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Count double and single blocks of a file, from shapes by internal name."""
    numbers = [name.split(".")[1] for name in shapes if name.startswith("blocks.")]
    double = 1 + max(int(number) for number in numbers if number[0] != "s")
    return double, 1 + max((int(number[1:]) for number in numbers if number[0] == "s"), default=-1)
