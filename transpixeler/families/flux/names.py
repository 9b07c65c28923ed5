"""FLUX.1's names, as one table of its modules in the three spellings.

Files number double and single blocks each from 0; in our module the single ones are `blocks.s0`, `blocks.s1`, …. Our
linears are the original's; diffusers cuts queries, keys and values apart, and swaps the halves of the last modulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transpixeler.models.mmdit_names import block_counts, block_rows
from transpixeler.models.names import Loaders, Names, Row

_DOUBLE = {  # internal → original
    "img.mod": "img_mod.lin",
    "img.qkv": "img_attn.qkv",
    "img.q_norm": "img_attn.norm.query_norm.scale",
    "img.k_norm": "img_attn.norm.key_norm.scale",
    "img.proj": "img_attn.proj",
    "img.mlp.0": "img_mlp.0",
    "img.mlp.2": "img_mlp.2",
    "txt.mod": "txt_mod.lin",
    "txt.qkv": "txt_attn.qkv",
    "txt.q_norm": "txt_attn.norm.query_norm.scale",
    "txt.k_norm": "txt_attn.norm.key_norm.scale",
    "txt.proj": "txt_attn.proj",
    "txt.mlp.0": "txt_mlp.0",
    "txt.mlp.2": "txt_mlp.2",
}
_SINGLE = {
    "mod": "modulation.lin",
    "linear1": "linear1",
    "heads.q_norm": "norm.query_norm.scale",
    "heads.k_norm": "norm.key_norm.scale",
    "linear2": "linear2",
}
_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}

_ROWS = (
    *block_rows(_DOUBLE, _SINGLE),
    Row("embed.img_in", "img_in", "x_embedder"),
    Row("embed.txt_in", "txt_in", "context_embedder"),
    *(
        Row(f"embed.{ours}.{layer}", f"{ours}.{layer}", f"time_text_embed.{theirs}.{linear}")
        for ours, theirs in _EMBEDDERS.items()
        for layer, linear in _LAYERS.items()
    ),
    Row("head.modulation", "final_layer.adaLN_modulation.1", "norm_out.linear~"),
    Row("head.linear", "final_layer.linear", "proj_out"),
)
NAMES = Names(
    rows=_ROWS,
    tables=frozenset(row.internal for row in _ROWS if row.internal.endswith("_norm")),
    loaders=Loaders(
        read_by={
            "transpixeler": ("ComfyUI",),
            "comfyui": ("ComfyUI",),
            "diffusers": ("diffusers", "ComfyUI"),
            "kohya": ("ComfyUI",),  # diffusers cuts it by the published sizes alone
        },
        model_read_by={
            "file": ("ComfyUI (Load Diffusion Model)", "diffusers (from_single_file)"),
            "folder": ("diffusers (from_pretrained)",),
        },
    ),
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config of an original file, which comes without one, from shapes by internal name."""
    width, channels = shapes["embed.img_in.weight"]
    head_dim = shapes["blocks.0.img.q_norm"][0]
    double, single = block_counts(shapes)
    side = head_dim * 7 // 32 * 2  # rows and columns have seven sixteenths of a head each, the index the rest
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shapes["head.linear.weight"][0],
        "joint_attention_dim": shapes["embed.txt_in.weight"][1],
        "pooled_projection_dim": shapes["embed.vector_in.in_layer.weight"][1],
        "guidance_embeds": "embed.guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": (head_dim - 2 * side, side, side),
    }
