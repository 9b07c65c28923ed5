"""Wan's own VAE and text encoder files: a folder or `.pth` comes in, states for diffusers and transformers go out.

Wan publishes both as pickled tensors under its own names, without a config. `original_vae_state` fits
`AutoencoderKLWan`, `original_t5_state` fits `UMT5EncoderModel`; the two configs are read off the tensors' shapes, so
that nothing is assumed of the model's size. All of it stays memory-mapped until it is copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from transpixeler.config import UserError
from transpixeler.models.weights import load_pickled

VAE_FILE = "Wan2.1_VAE.pth"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"

_RESNETS_DOWN = 2  # of a level of Wan's VAE: two residual blocks and a resampler
_RESNETS_UP = 3  # of a level of its decoder, likewise
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_TOP = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
_VAE_LAYER = re.compile(r"(encoder|decoder)\.(downsamples|middle|upsamples)\.(\d+)\.(.+)")
_T5_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_T5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_T5_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def original_vae_state(path: Path) -> dict[str, Tensor]:
    """Read the VAE's weights under the names of diffusers' `AutoencoderKLWan`."""
    return _renamed(path, VAE_FILE, vae_module)


def original_t5_state(path: Path) -> dict[str, Tensor]:
    """Read the text encoder's weights under the names of transformers' `UMT5EncoderModel`, tied embedding included."""
    state = _renamed(path, T5_FILE, t5_module)
    return state | {"encoder.embed_tokens.weight": state["shared.weight"]}


def vae_module(module: str) -> str:
    """`decoder.upsamples.5.residual.2` → `decoder.up_blocks.1.resnets.1.conv1`."""
    match = _VAE_LAYER.fullmatch(module)
    if not match:
        return _VAE_TOP[module]
    side, kind, index, rest = match.groups()
    rest = _RESIDUAL.get(rest, rest)
    if kind == "middle":
        return f"{side}.mid_block.{_MIDDLE[index]}.{rest}"
    if kind == "downsamples":
        return f"{side}.down_blocks.{index}.{rest}"
    level, place = divmod(int(index), _RESNETS_UP + 1)
    part = "upsamplers.0" if place == _RESNETS_UP else f"resnets.{place}"
    return f"{side}.up_blocks.{level}.{part}.{rest}"


def t5_module(module: str) -> str:
    """`blocks.3.ffn.gate.0` → `encoder.block.3.layer.1.DenseReluDense.wi_0`."""
    match = _T5_LAYER.fullmatch(module)
    return f"encoder.block.{match[1]}.{_T5_BLOCK[match[2]]}" if match else _T5_TOP[module]


def original_vae_config(path: Path) -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan`; its default latent means and deviations are Wan 2.1's own."""
    state = load_pickled(_file(path, VAE_FILE))
    base = state["encoder.conv1.weight"].shape[0]
    levels = _count(state, r"encoder\.downsamples\.(\d+)\.") // (_RESNETS_DOWN + 1) + 1
    firsts = [level * (_RESNETS_DOWN + 1) for level in range(levels)]
    return {
        "base_dim": base,
        "z_dim": state["conv2.weight"].shape[0],
        "dim_mult": [state[f"encoder.downsamples.{first}.residual.2.weight"].shape[0] // base for first in firsts],
        "num_res_blocks": _RESNETS_DOWN,
        "temperal_downsample": [
            f"encoder.downsamples.{first + _RESNETS_DOWN}.time_conv.weight" in state for first in firsts[:-1]
        ],
    }


def original_t5_config(path: Path) -> dict[str, Any]:
    """Arguments of transformers' `UMT5Config`."""
    state = load_pickled(_file(path, T5_FILE))
    buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    vocabulary, width = state["token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": state["blocks.0.attn.q.weight"].shape[0] // heads,
        "d_ff": state["blocks.0.ffn.fc1.weight"].shape[0],
        "num_layers": _count(state, r"blocks\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _file(path: Path, name: str) -> Path:
    file = path / name if path.is_dir() else path
    if not file.exists():
        raise UserError(f"model.path: {file} is not there; Wan's own folder keeps {name} beside config.json")
    return file


def _renamed(path: Path, name: str, module_of: Callable[[str], str]) -> dict[str, Tensor]:
    file = _file(path, name)
    renamed = {}
    for key, tensor in load_pickled(file).items():
        module, _, leaf = key.rpartition(".")
        try:
            renamed[f"{module_of(module)}.{leaf}"] = tensor
        except KeyError:
            raise UserError(
                f"{file} holds {key}, which Wan 2.1's {name} does not; is it another model's file?"
            ) from None
    return renamed


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.match(pattern, key) for key in state) if match)
