"""Wan's own VAE and text encoder files: a folder or `.pth` comes in, states for diffusers and transformers go out.

Wan publishes both as pickled tensors under its own names, without a config. `original_vae_state` fits
`AutoencoderKLWan`, of Wan 2.1's kind and of 2.2's, `original_t5_state` fits `UMT5EncoderModel`; the configs are read
off the tensors' shapes, so that nothing is assumed of the model's size. All of it stays memory-mapped until it is
copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.models.weights import load_pickled

VAE_FILE = "Wan2.1_VAE.pth"
VAE_22_FILE = "Wan2.2_VAE.pth"  # of the 5B alone
VAE_FILES = (VAE_FILE, VAE_22_FILE)
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
_VAE_22_LAYER = re.compile(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(.+)")  # in a level
_RESAMPLER = ("resample.1", "time_conv")
# of a latent's channels, as Wan 2.2's code scales them: its file does not hold them
LATENTS_MEAN_22 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
LATENTS_STD_22 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
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
    return _renamed(vae_file(path), vae_module)


def original_t5_state(path: Path) -> dict[str, Tensor]:
    """Read the text encoder's weights under the names of transformers' `UMT5EncoderModel`, tied embedding included."""
    state = _renamed(_file(path, T5_FILE), t5_module)
    return state | {"encoder.embed_tokens.weight": state["shared.weight"]}


def vae_module(module: str) -> str:
    """`decoder.upsamples.5.residual.2` → `decoder.up_blocks.1.resnets.1.conv1`; in 2.2 `….1.upsamples.1.residual.2`."""
    if nested := _VAE_22_LAYER.fullmatch(module):
        side, way, level, place, rest = nested.groups()
        part = f"{way}sampler" if rest in _RESAMPLER else f"resnets.{place}"
        return f"{side}.{way}_blocks.{level}.{part}.{_RESIDUAL.get(rest, rest)}"
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
    state = load_pickled(vae_file(path))
    if any(_VAE_22_LAYER.match(key) for key in state):
        return _vae_22_config(state)
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


def _vae_22_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments for Wan 2.2's kind: levels with shortcuts, and pixels that are folded into channels first."""
    base, channels = state["encoder.conv1.weight"].shape[:2]
    levels = [f"encoder.downsamples.{n}.downsamples" for n in range(_count(state, r"encoder\.downsamples\.(\d+)\."))]
    blocks = _count(state, r"encoder\.downsamples\.0\.downsamples\.(\d+)\.") - 1  # and a resampler
    multiples = [state[f"{level}.0.residual.2.weight"].shape[0] // base for level in levels]
    temporal = [f"{level}.{blocks}.time_conv.weight" in state for level in levels[:-1]]
    patch = math.isqrt(channels // 3)
    return {
        "base_dim": base,
        "decoder_base_dim": state["decoder.conv1.weight"].shape[0] // multiples[-1],
        "z_dim": state["conv2.weight"].shape[0],
        "dim_mult": multiples,
        "num_res_blocks": blocks,
        "temperal_downsample": temporal,
        "latents_mean": list(LATENTS_MEAN_22),
        "latents_std": list(LATENTS_STD_22),
        "is_residual": True,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** (len(levels) - 1) * patch,
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


def vae_file(path: Path) -> Path:
    """Return the VAE's file in a folder."""
    there = [name for name in VAE_FILES if (path / name).exists()]
    return _file(path, there[0] if there else VAE_FILE)


def _file(path: Path, name: str) -> Path:
    file = path / name if path.is_dir() else path
    if not file.exists():
        raise UserError(f"model.path: {file} is not there; Wan's own folder keeps {name} beside config.json")
    return file


def _renamed(file: Path, module_of: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in load_pickled(file).items():
        module, _, leaf = key.rpartition(".")
        try:
            renamed[f"{module_of(module)}.{leaf}"] = tensor
        except KeyError:
            raise UserError(f"{file} holds {key}, which Wan's file does not; is it another model's file?") from None
    return renamed


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.match(pattern, key) for key in state) if match)
