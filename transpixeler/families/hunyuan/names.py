"""HunyuanVideo's names, as one table of its modules in the three spellings.

Files number double and single blocks each from 0; in our module the single ones are `blocks.s0`, `blocks.s1`, …. Our
linears are the original's; diffusers cuts queries, keys and values apart, and swaps the halves of the last modulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transpixeler.families.hunyuan.config import LATENT_CONCAT, MASK_CHANNELS
from transpixeler.models.mmdit_names import block_counts, block_rows
from transpixeler.models.names import Loaders, Names, Row

WIDTH = 3072  # of the published model

_DOUBLE = {  # internal → original
    "img.mod": "img_mod.linear",
    "img.qkv": "img_attn_qkv",
    "img.q_norm": "img_attn_q_norm.weight",
    "img.k_norm": "img_attn_k_norm.weight",
    "img.proj": "img_attn_proj",
    "img.mlp.0": "img_mlp.fc1",
    "img.mlp.2": "img_mlp.fc2",
    "txt.mod": "txt_mod.linear",
    "txt.qkv": "txt_attn_qkv",
    "txt.q_norm": "txt_attn_q_norm.weight",
    "txt.k_norm": "txt_attn_k_norm.weight",
    "txt.proj": "txt_attn_proj",
    "txt.mlp.0": "txt_mlp.fc1",
    "txt.mlp.2": "txt_mlp.fc2",
}
_SINGLE = {
    "mod": "modulation.linear",
    "linear1": "linear1",
    "heads.q_norm": "q_norm.weight",
    "heads.k_norm": "k_norm.weight",
    "linear2": "linear2",
}
_REFINER = {
    "norm1": ("norm1", "norm1"),
    "qkv": ("self_attn_qkv", "attn.(to_q+to_k+to_v)"),
    "proj": ("self_attn_proj", "attn.to_out.0"),
    "norm2": ("norm2", "norm2"),
    "mlp.0": ("mlp.fc1", "ff.net.0.proj"),
    "mlp.2": ("mlp.fc2", "ff.net.2"),
    "mod": ("adaLN_modulation.1", "norm_out.linear"),
}
_MLP, _LAYERS = ("mlp.0", "mlp.2"), ("in_layer", "out_layer")
_LINEARS = ("linear_1", "linear_2")
_EMBEDDERS = (  # internal, original with its two layers, diffusers
    ("time_in", "time_in", _MLP, "time_text_embed.timestep_embedder"),
    ("guidance_in", "guidance_in", _MLP, "time_text_embed.guidance_embedder"),
    ("vector_in", "vector_in", _LAYERS, "time_text_embed.text_embedder"),
    ("txt_in.time_in", "txt_in.t_embedder", _MLP, "context_embedder.time_text_embed.timestep_embedder"),
    ("txt_in.mean_in", "txt_in.c_embedder", _LINEARS, "context_embedder.time_text_embed.text_embedder"),
)

_ROWS = (
    *block_rows(_DOUBLE, _SINGLE),
    *(
        Row(
            f"embed.txt_in.blocks.{{n}}.{i}",
            f"txt_in.individual_token_refiner.blocks.{{n}}.{o}",
            f"context_embedder.token_refiner.refiner_blocks.{{n}}.{d}",
        )
        for i, (o, d) in _REFINER.items()
    ),
    Row("embed.img_in", "img_in.proj", "x_embedder.proj"),
    Row("embed.txt_in.input", "txt_in.input_embedder", "context_embedder.proj_in"),
    *(
        Row(f"embed.{ours}.{layer}", f"{original}.{stored}", f"{theirs}.{linear}")
        for ours, original, layers, theirs in _EMBEDDERS
        for layer, stored, linear in zip(_LAYERS, layers, _LINEARS, strict=True)
    ),
    Row("head.modulation", "final_layer.adaLN_modulation.1", "norm_out.linear~"),
    Row("head.linear", "final_layer.linear", "proj_out"),
)
NAMES = Names(
    rows=_ROWS,
    tables=frozenset(row.internal for row in _ROWS if row.internal.endswith("_norm")),
    loaders=Loaders(
        read_by={
            "transpixeler": ("ComfyUI", "diffusers"),
            "comfyui": ("ComfyUI", "diffusers"),
            "diffusers": ("diffusers",),
        },
        model_read_by={
            "file": ("ComfyUI (Load Diffusion Model)", "diffusers (from_single_file)"),
            "folder": ("diffusers (from_pretrained)",),
        },
        alpha_keys=False,  # diffusers takes every key of the original names for a matrix
        widths={"transpixeler": WIDTH, "comfyui": WIDTH},
    ),
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config of an original file, which comes without one, from shapes by internal name."""
    width, channels, *_ = shapes["embed.img_in.weight"]
    out = shapes["head.linear.weight"][0] // 4
    head_dim = shapes["blocks.0.img.q_norm"][0]
    double, single = block_counts(shapes)
    refiner = [int(name.split(".")[3]) for name in shapes if name.startswith("embed.txt_in.blocks.")]
    side = head_dim * 7 // 32 * 2  # rows and columns have seven sixteenths of a head each, time the rest
    return {
        "num_layers": double,
        "num_single_layers": single,
        "num_refiner_layers": 1 + max(refiner),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": out,
        "text_embed_dim": shapes["embed.txt_in.input.weight"][1],
        "pooled_projection_dim": shapes["embed.vector_in.in_layer.weight"][1],
        "guidance_embeds": "embed.guidance_in.in_layer.weight" in shapes,
        "rope_axes_dim": (head_dim - 2 * side, side, side),
        "image_condition_type": LATENT_CONCAT if channels == 2 * out + MASK_CHANNELS else None,
    }
