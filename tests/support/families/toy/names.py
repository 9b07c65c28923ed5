"""The toy's names, as one table of its modules in the three spellings.

Files number double and single blocks each from 0; in our module the single ones are `blocks.s0`, `blocks.s1`, ….
"""

from __future__ import annotations

from transpixeler.models.names import Names, Row

_DOUBLE = {  # internal → original and diffusers
    "img.mod": ("img_mod.lin", "norm1.linear"),
    "img.qkv": ("img_attn.qkv", "attn.to_qkv"),
    "img.q_norm": ("img_attn.norm.query_norm.weight", "attn.norm_q.weight"),
    "img.k_norm": ("img_attn.norm.key_norm.weight", "attn.norm_k.weight"),
    "img.proj": ("img_attn.proj", "attn.to_out.0"),
    "img.mlp.0": ("img_mlp.0", "ff.net.0.proj"),
    "img.mlp.2": ("img_mlp.2", "ff.net.2"),
    "txt.mod": ("txt_mod.lin", "norm1_context.linear"),
    "txt.qkv": ("txt_attn.qkv", "attn.add_qkv_proj"),
    "txt.q_norm": ("txt_attn.norm.query_norm.weight", "attn.norm_added_q.weight"),
    "txt.k_norm": ("txt_attn.norm.key_norm.weight", "attn.norm_added_k.weight"),
    "txt.proj": ("txt_attn.proj", "attn.to_add_out"),
    "txt.mlp.0": ("txt_mlp.0", "ff_context.net.0.proj"),
    "txt.mlp.2": ("txt_mlp.2", "ff_context.net.2"),
}
_SINGLE = {
    "mod": ("modulation.lin", "norm.linear"),
    "linear1": ("linear1", "proj_qkv_mlp"),
    "heads.q_norm": ("norm.query_norm.weight", "attn.norm_q.weight"),
    "heads.k_norm": ("norm.key_norm.weight", "attn.norm_k.weight"),
    "linear2": ("linear2", "proj_out"),
}
_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}

_ROWS = (
    *(
        Row(f"blocks.{{n}}.{i}", f"paired_blocks.{{n}}.{o}", f"paired_transformer_blocks.{{n}}.{d}")
        for i, (o, d) in _DOUBLE.items()
    ),
    *(
        Row(f"blocks.s{{n}}.{i}", f"mixed_blocks.{{n}}.{o}", f"mixed_transformer_blocks.{{n}}.{d}")
        for i, (o, d) in _SINGLE.items()
    ),
    Row("embed.img_in", "img_in", "x_embedder"),
    Row("embed.txt_in", "txt_in", "context_embedder"),
    *(
        Row(f"embed.{ours}.{layer}", f"{ours}.{layer}", f"time_text_embed.{theirs}.{linear}")
        for ours, theirs in _EMBEDDERS.items()
        for layer, linear in _LAYERS.items()
    ),
    Row("head.modulation", "final_layer.adaLN_modulation.1", "norm_out.linear"),
    Row("head.linear", "final_layer.linear", "proj_out"),
)
NAMES = Names(rows=_ROWS, tables=frozenset(row.internal for row in _ROWS if row.internal.endswith("_norm")))
