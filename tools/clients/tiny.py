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


RANK, ALPHA = 4, 6.0


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


def trained(
    tiny: Tiny, base: Path, streams: Sequence[str], *, attends: bool = True, **said: str
) -> tuple[Backbone, Adapter]:
    """Return a model whose adapter has moved, and the adapter: of every default linear, at a scale that is not 1.

    attends: whether RGB tokens see the companions. said: more of what its file's header tells.
    """
    import torch

    from transpixeler.adapters.on_model import adapter_of

    lora = LoraConfig(rank=RANK, alpha=ALPHA, scope="all" if len(streams) == 1 else "aux")
    model = _injected(tiny, base, streams, lora, attends=attends)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "stream_embedding" in name:
                parameter.normal_(std=0.1)
    return model.eval(), adapter_of(model, {"base_model": str(base), "streams": ",".join(streams), **said})


def chained(tiny: Tiny, base: Path, parts: Sequence[tuple[Backbone, float]]) -> Backbone:
    """Return a model with the sum of several models' adapters, each at its strength; their marks are averaged."""
    import torch

    rank, total = RANK * len(parts), sum(strength for _, strength in parts)
    model = _injected(tiny, base, parts[0][0].streams, LoraConfig(rank=rank, alpha=float(rank), scope="aux"))
    held = [dict(part.named_parameters()) for part, _ in parts]
    strengths = [strength for _, strength in parts]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values: list[Tensor] = [own[name] for own in held] if ".lora_" in name or "stream_embedding" in name else []
            if name.endswith(".lora_A"):
                parameter.copy_(torch.cat(values))
            elif name.endswith(".lora_B"):
                up = [ALPHA / RANK * by * value for value, by in zip(values, strengths, strict=True)]
                parameter.copy_(torch.cat(up, dim=1))
            elif values:
                marks = [by / total * value for value, by in zip(values, strengths, strict=True)]
                parameter.copy_(torch.stack(marks).sum(0))
    return model.eval()


def _injected(tiny: Tiny, base: Path, streams: Sequence[str], lora: LoraConfig, *, attends: bool = True) -> Backbone:
    from transpixeler.models.family import find_family
    from transpixeler.models.lora import inject
    from transpixeler.models.weights import WeightSource, load_weights

    family = find_family(tiny.family)
    model = family.open(str(base)).build(streams=streams, rgb_attends_aux=attends)
    load_weights(model, WeightSource(base, family.internal_names))
    inject(model, lora)
    return model


def original_weights(base: Path, family: Family) -> dict[str, Tensor]:
    """Return a base's weights under the names of the published files."""
    from transpixeler.models.weights import WeightSource

    source = WeightSource(base, family.internal_names)
    return {family.names.parameter(n, source="internal", to="original"): source.read(n) for n in source.names()}


def shrink_vaes() -> None:
    """Have ComfyUI's VAEs of Wan take few channels, where it takes 96 and more for granted: minutes on a CPU."""
    import comfy.ldm.wan.vae as wan  # pyright: ignore[reportMissingImports]  in the folder that the user gives
    import comfy.ldm.wan.vae2_2 as wan22  # pyright: ignore[reportMissingImports]

    first, second = wan.WanVAE, wan22.WanVAE
    wan.WanVAE = lambda **config: first(**config | {"dim": 8})
    wan22.WanVAE = lambda **config: second(**config | {"dim": 8, "dec_dim": 8})
