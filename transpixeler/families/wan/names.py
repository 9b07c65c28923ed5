"""Names of Wan's weights: in goes a name of one spelling, out comes the same weight's name in another.

Three spellings exist. *Original*: Wan's own checkpoints and ComfyUI files (`blocks.0.self_attn.q.weight`). *Diffusers*:
`WanTransformer3DModel` (`blocks.0.attn1.to_q.weight`). *Internal*: our module's parameters, the original names with
what belongs to the embedding kept under `embed.`. Each map is a bijection over the names of one table; a name outside
the table raises `UnknownName`, so that nothing is loaded or saved under a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_BLOCK = (
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
    ("norm3", "norm2"),  # the affine norm before cross-attention: the two numberings differ
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
BLOCK_LINEARS = {  # with what goes in and what comes out
    **{f"{attention}.{part}": ("width", "width") for attention in ("self_attn", "cross_attn") for part in "qkvo"},
    "ffn.0": ("width", "inner"),
    "ffn.2": ("inner", "width"),
}
_EMBED = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
)
_HEAD = (("head.head", "proj_out"), ("head.modulation", "scale_shift_table"))

_BLOCK_TO_DIFFUSERS = dict(_BLOCK)
_BLOCK_TO_ORIGINAL = {diffusers: original for original, diffusers in _BLOCK}
_TOP_TO_DIFFUSERS = dict(_EMBED + _HEAD)
_TOP_TO_ORIGINAL = {diffusers: original for original, diffusers in _EMBED + _HEAD}
_EMBED_MODULES = frozenset(original for original, _ in _EMBED)
_TABLES = frozenset({"modulation", "head.modulation", "scale_shift_table"})  # parameters themselves, not modules
_BLOCK_FROM_FLAT = {original.replace(".", "_"): original for original, _ in _BLOCK}
_TOP_FROM_FLAT = {original.replace(".", "_"): original for original, _ in _EMBED + _HEAD}
_BLOCK_NAME = re.compile(r"(blocks\.(?:0|[1-9]\d*)\.)(.+)")
_FLAT_BLOCK_NAME = re.compile(r"blocks_(0|[1-9]\d*)_(.+)")


class UnknownName(KeyError):
    """The name is not one of Wan's in the spelling asked for."""


def _split(name: str) -> tuple[str, str]:
    match = _BLOCK_NAME.fullmatch(name)
    return (match[1], match[2]) if match else ("", name)


def module_to_diffusers(module: str) -> str:
    """`blocks.0.self_attn.q` → `blocks.0.attn1.to_q`."""
    block, rest = _split(module)
    table = _BLOCK_TO_DIFFUSERS if block else _TOP_TO_DIFFUSERS
    if rest not in table:
        raise UnknownName(module)
    return block + table[rest]


def module_from_diffusers(module: str) -> str:
    """`blocks.0.attn1.to_q` → `blocks.0.self_attn.q`."""
    block, rest = _split(module)
    table = _BLOCK_TO_ORIGINAL if block else _TOP_TO_ORIGINAL
    if rest not in table:
        raise UnknownName(module)
    return block + table[rest]


def _parameter(name: str) -> tuple[str, str]:
    """Split a parameter's name into its module and `.weight` or `.bias`; a modulation table is its own module."""
    if _split(name)[1] in _TABLES:
        return name, ""
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias") or _split(module)[1] in _TABLES:
        raise UnknownName(name)
    return module, dot + leaf


def to_diffusers(original: str) -> str:
    """`blocks.0.norm3.weight` → `blocks.0.norm2.weight`."""
    module, leaf = _parameter(original)
    return module_to_diffusers(module) + leaf


def from_diffusers(diffusers: str) -> str:
    """`blocks.0.norm2.weight` → `blocks.0.norm3.weight`."""
    module, leaf = _parameter(diffusers)
    return module_from_diffusers(module) + leaf


def to_internal(original: str) -> str:
    """`patch_embedding.weight` → `embed.patch_embedding.weight`; blocks and head stay. Takes modules as well."""
    module = original if original in _TOP_TO_DIFFUSERS else original.rpartition(".")[0]
    return f"embed.{original}" if module in _EMBED_MODULES else original


def from_internal(internal: str) -> str:
    """`embed.patch_embedding.weight` → `patch_embedding.weight`. Takes modules as well."""
    return internal.removeprefix("embed.")


def module_to_flat(original: str) -> str:
    """`blocks.0.self_attn.q` → `blocks_0_self_attn_q`, as kohya's tools spell modules."""
    module_to_diffusers(original)
    return original.replace(".", "_")


def module_from_flat(flat: str) -> str:
    """`blocks_0_self_attn_q` → `blocks.0.self_attn.q`."""
    match = _FLAT_BLOCK_NAME.fullmatch(flat)
    table, rest = (_BLOCK_FROM_FLAT, match[2]) if match else (_TOP_FROM_FLAT, flat)
    if rest not in table:
        raise UnknownName(flat)
    return f"blocks.{match[1]}.{table[rest]}" if match else table[rest]


def internal_names(stored: Iterable[str]) -> dict[str, str]:
    """Map the internal name of each weight of a file, of either spelling, to the name it is stored under.

    A name that is not Wan's stays what it is, for whoever compares the names with a model's to complain about.
    """
    stored = list(stored)
    spelled_by_diffusers = any(name.startswith("condition_embedder.") or ".attn1." in name for name in stored)
    names = {}
    for name in stored:
        try:
            names[to_internal(from_diffusers(name) if spelled_by_diffusers else name)] = name
        except UnknownName:
            names[name] = name
    return names


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
    }
