"""Tiny models of random weights, as other programs take them, and adapters on them that have moved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transpixeler.config.sections import LoraConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from transpixeler.adapters.adapter import Adapter
    from transpixeler.models.backbone import Backbone
    from transpixeler.models.family import Family


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family; ComfyUI takes the widths of heads, texts and times for granted."""

    family: str
    config: Mapping[str, Any]
    shape: tuple[int, int, int, int]  # of latents: channels, frames, height, width
    text: tuple[int, int]
    more: Mapping[str, Any] = field(default_factory=dict)  # keys of config.json that diffusers does not know


WAN = Tiny(
    "wan",
    {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 64},
    (16, 2, 4, 4),
    (512, 4096),
)
LTX = Tiny(
    "ltx",
    {"num_attention_heads": 32, "attention_head_dim": 4, "cross_attention_dim": 128, "num_layers": 2},
    (128, 2, 3, 4),
    (128, 4096),
    {"causal_temporal_positioning": True},  # of 0.9.5 on, which ComfyUI reads from the header of a checkpoint alone
)
HUNYUAN = Tiny(
    "hunyuan",
    {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2},
    (16, 2, 4, 4),
    (256, 4096),
)
FLUX = Tiny(
    "flux",
    {"num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
    (16, 1, 4, 6),
    (512, 4096),
)


def write_base(tiny: Tiny, folder: Path, *, seed: int = 0) -> Path:
    """Write a transformer of random weights in diffusers' layout, and return its folder."""
    import diffusers
    import torch

    from transpixeler.models.family import find_family

    torch.manual_seed(seed)
    model: nn.Module = getattr(diffusers, find_family(tiny.family).transformer_class)(**tiny.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "transformer")  # pyright: ignore[reportCallIssue]  diffusers' own method
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(tiny.more)))
    return folder


def trained(tiny: Tiny, base: Path, streams: Sequence[str], **said: str) -> tuple[Backbone, Adapter]:
    """Return a model whose adapter has moved, and the adapter: of every default linear, at a scale that is not 1.

    said: more of what its file's header tells.
    """
    import torch

    from transpixeler.adapters.on_model import adapter_of
    from transpixeler.models.family import find_family
    from transpixeler.models.lora import inject
    from transpixeler.models.weights import WeightSource, load_weights

    family = find_family(tiny.family)
    model = family.open(str(base)).build(streams=streams)
    load_weights(model, WeightSource(base, family.internal_names))
    inject(model, LoraConfig(rank=4, alpha=6.0, scope="all" if len(streams) == 1 else "aux"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "stream_embedding" in name:
                parameter.normal_(std=0.1)
    return model.eval(), adapter_of(model, {"base_model": str(base), "streams": ",".join(streams), **said})


def original_weights(base: Path, family: Family) -> dict[str, Tensor]:
    """Return a base's weights under the names of the published files."""
    from transpixeler.models.weights import WeightSource

    source = WeightSource(base, family.internal_names)
    return {family.names.parameter(n, source="internal", to="original"): source.read(n) for n in source.names()}


def shrink_vae() -> None:
    """Have ComfyUI's Wan VAE take few channels, where it takes 96 for granted: those need minutes on a CPU."""
    import comfy.ldm.wan.vae as wan  # pyright: ignore[reportMissingImports]  in the folder that the user gives

    whole = wan.WanVAE
    wan.WanVAE = lambda **config: whole(**config | {"dim": 8})
