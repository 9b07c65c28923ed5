"""Wan's names, as one table of its modules in the three spellings; norm2 and norm3 are numbered differently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transpixeler.models.names import Loaders, Names, Row

_IN_BLOCKS = (
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.k_img", "attn2.add_k_proj"),  # to an image's tokens, in 2.1's image-to-video models
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("norm3", "norm2"),  # the affine norm before cross-attention
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
_ENDS = (
    Row("embed.patch_embedding", "patch_embedding", "patch_embedding"),
    Row("embed.text_embedding.0", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    Row("embed.text_embedding.2", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    Row("embed.time_embedding.0", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    Row("embed.time_embedding.2", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    Row("embed.time_projection.1", "time_projection.1", "condition_embedder.time_proj"),
    Row("embed.img_emb.proj.0", "img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    Row("embed.img_emb.proj.1", "img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    Row("embed.img_emb.proj.3", "img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    Row("embed.img_emb.proj.4", "img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    Row("embed.img_emb.emb_pos", "img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    Row("head.head", "head.head", "proj_out"),
    Row("head.modulation", "head.modulation", "scale_shift_table"),
)
NAMES = Names(
    rows=(
        *(Row(f"blocks.{{n}}.{ours}", f"blocks.{{n}}.{ours}", f"blocks.{{n}}.{d}") for ours, d in _IN_BLOCKS),
        *_ENDS,
    ),
    tables=frozenset({"blocks.{n}.modulation", "head.modulation", "embed.img_emb.emb_pos"}),
    block_linears={
        **{f"{attention}.{part}": ("width", "width") for attention in ("self_attn", "cross_attn") for part in "qkvo"},
        "ffn.0": ("width", "inner"),
        "ffn.2": ("inner", "width"),
    },
    loaders=Loaders(
        read_by={
            "transpixeler": ("ComfyUI", "diffusers"),
            "comfyui": ("ComfyUI", "diffusers"),
            "diffusers": ("diffusers",),
            "kohya": ("ComfyUI", "diffusers", "musubi-tuner"),
        },
        joint_read_by=dict.fromkeys(("transpixeler", "comfyui"), ("ComfyUI with the nodes in tools/comfyui",)),
        model_read_by={
            "file": ("ComfyUI (Load Diffusion Model)", "diffusers (from_single_file)"),
            "folder": ("diffusers (from_pretrained)",),
        },
        whole_blocks=frozenset({"kohya"}),
    ),
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer a config that a file lacks from shapes by internal name: Wan's heads are all 128 wide."""
    width, channels, *patch = shapes["embed.patch_embedding.weight"]
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    return {
        "num_attention_heads": width // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch),
        "text_dim": shapes["embed.text_embedding.0.weight"][1],
        "freq_dim": shapes["embed.time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": max(blocks) + 1,
        "patch_size": patch,
        **image_settings(shapes),
    }


def image_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return a config's keys about image tokens, which original configs leave out, from shapes by internal name."""
    first, positions = shapes.get("embed.img_emb.proj.1.weight"), shapes.get("embed.img_emb.emb_pos")
    if first is None:
        return {}
    width = shapes["embed.patch_embedding.weight"][0]
    return {"image_dim": first[1], "added_kv_proj_dim": width} | (
        {"pos_embed_seq_len": positions[1]} if positions else {}
    )
