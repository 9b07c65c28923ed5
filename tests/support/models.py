"""Tiny models with every parameter moved, so that no test passes because something is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.model import WanModel
from transpixeler.families.wan.names import NAMES as wan_names
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource

NAMES = ("rgb", "seg", "depth")
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def move(module: nn.Module, *, seed: int, names: str = "") -> None:
    """Random values of a size that keeps signals near one, in every parameter whose name holds `names`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if names in name and parameter.itemsize > 1:
            value = torch.randn(parameter.shape, generator=generator)
            width = value[0].numel() if value.ndim > 1 else 10
            value = value / width**0.5 + (
                1.0 if "norm" in name and name.endswith(("weight", "q_norm", "k_norm")) else 0.0
            )
            with torch.no_grad():
                parameter.copy_(value)


def wan_model(
    config: Mapping[str, Any], *, streams: Sequence[str], rgb_attends_aux: bool = True, attention: str = "auto"
) -> WanModel:
    """Build a Wan from the keys of its config.json, on the current default device."""
    return WanModel(WanConfig.read(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)


def wan_folder(config: Mapping[str, Any]) -> WanFolder:
    """Return a model folder that holds nothing but a config."""
    folder = WanFolder("nowhere")
    folder.__dict__["config"] = config  # in place of what it would read
    return folder


def tiny(streams: int = 1, *, seed: int = 0, attends: bool = True, **overrides: Any) -> WanModel:
    model = wan_model(TINY | overrides, streams=NAMES[:streams], rgb_attends_aux=attends)
    move(model, seed=seed)
    return model


def inputs(layout: StreamLayout, *, batch: int = 2, seed: int = 0, words: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Packed latents, timesteps of each time group, and text that is padded with zeros after `words`."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 512, TINY["text_dim"], generator=generator)
    text[:, words:] = 0
    x = torch.randn(batch, layout.elements, generator=generator)
    return x, torch.rand(batch, len(layout.groups), generator=generator), text


def without_embeddings(model: WanModel) -> WanModel:
    """The model with its stream embeddings at their start, zero."""
    for parameter in model.embed.stream_embedding.values():
        torch.nn.init.zeros_(parameter)
    return model


def base_of(joint: WanModel) -> WanModel:
    """The one-stream model with the joint model's base weights."""
    single = tiny()
    state = joint.state_dict()
    single.load_state_dict({name: state[name] for name in single.state_dict()})
    return single


def wan_source(path: str | Path) -> WeightSource:
    """Read a model's weights by internal name, whatever spelling its files have."""
    return WeightSource(path, wan_names.internal_names)
