"""LTX-Video's names, as one table of its modules in the three spellings; diffusers renames but a few."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transpixeler.families.ltx.config import HEADS
from transpixeler.models.names import Loaders, Names, Row

_ATTENTIONS = ("attn1", "attn2")
_SAME_IN_BLOCKS = (  # internal, and as both kinds of file spell it
    *((f"{attention}.to_{part}", f"{attention}.to_{part}") for attention in _ATTENTIONS for part in "qkv"),
    *((f"{attention}.to_out", f"{attention}.to_out.0") for attention in _ATTENTIONS),
    ("ff.0", "ff.net.0.proj"),
    ("ff.2", "ff.net.2"),
    ("scale_shift_table", "scale_shift_table"),
)
_NORMS = tuple((f"{attention}.{part}_norm", f"{attention}.norm_{part}") for attention in _ATTENTIONS for part in "qk")
_TIME = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_FILED = "transformer_blocks.{n}"  # a block in either kind of file


def _file_header(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the header of Lightricks' own files: ComfyUI and this project read from it what no shape tells."""
    return {"config": json.dumps({"transformer": {key: value for key, value in config.items() if key[0] != "_"}})}


NAMES = Names(
    rows=(
        *(Row(f"blocks.{{n}}.{ours}", f"{_FILED}.{name}", f"{_FILED}.{name}") for ours, name in _SAME_IN_BLOCKS),
        *(Row(f"blocks.{{n}}.{name}", f"{_FILED}.{name}", f"{_FILED}.{d}") for name, d in _NORMS),
        Row("embed.patchify_proj", "patchify_proj", "proj_in"),
        *(Row(f"embed.adaln_single.{name}", f"adaln_single.{name}", f"time_embed.{name}") for name in _TIME),
        *(Row(f"embed.{name}", name, name) for name in ("caption_projection.linear_1", "caption_projection.linear_2")),
        Row("head.proj_out", "proj_out", "proj_out"),
        Row("head.scale_shift_table", "scale_shift_table", "scale_shift_table"),
    ),
    tables=frozenset({"blocks.{n}.scale_shift_table", "head.scale_shift_table"}),
    block_linears={
        **{
            f"{attention}.to_{part}": ("width", "width") for attention in _ATTENTIONS for part in ("q", "k", "v", "out")
        },
        "ff.0": ("width", "inner"),
        "ff.2": ("inner", "width"),
    },
    loaders=Loaders(
        read_by={
            "transpixeler": ("ComfyUI", "diffusers"),
            "comfyui": ("ComfyUI", "diffusers"),
            "diffusers": ("diffusers",),
            "kohya": ("ComfyUI",),
        },
        model_read_by={
            "file": ("ComfyUI (Load Checkpoint)", "diffusers (from_single_file)"),
            "folder": ("diffusers (from_pretrained)",),
        },
        alpha_keys=False,  # diffusers takes every key of the original names for a matrix
        file_prefix="model.diffusion_model.",
        file_header=_file_header,
    ),
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config of a file that comes without one, from shapes by internal name."""
    width, channels = shapes["embed.patchify_proj.weight"]
    blocks = [int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")]
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": width // HEADS,
        "in_channels": channels,
        "out_channels": shapes["head.proj_out.weight"][0],
        "cross_attention_dim": shapes["blocks.0.attn2.to_k.weight"][1],
        "caption_channels": shapes["embed.caption_projection.linear_1.weight"][1],
        "num_layers": max(blocks) + 1,
    }
