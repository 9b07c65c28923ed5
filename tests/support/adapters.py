"""A tiny Wan with an adapter that has moved, in our spelling and in diffusers', and what both give out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.support.models import wan_model, wan_source
from transpixeler.config import LoraConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.model import WanModel
from transpixeler.models.lora import inject, lora_linears
from transpixeler.models.weights import load_weights

WIDTH, FFN, LAYERS = 24, 40, 2
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": LAYERS,
    "ffn_dim": FFN,
    "text_dim": 16,
    "freq_dim": 16,
}
TARGETS = WanModel.lora_targets
TEXT_TARGETS = ("cross_attn.k", "cross_attn.v")
METADATA = {
    "family": "wan",
    "base_model": "user/tiny",
    "streams": '["rgb", "seg"]',
    "fill": "keep",
    "step": "7",
    "ema": "false",
}


def diffusers_wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def our_model(base: Path, *streams: str) -> WanModel:
    model = wan_model(WanFolder(str(base)).config, streams=("rgb", *streams))
    load_weights(model, wan_source(base))
    return model.eval().requires_grad_(False)


def moved(shape: tuple[int, ...], name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.2 * torch.randn(shape, generator=generator)


def move_adapter(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "stream_embedding" in name:
                parameter.copy_(moved(tuple(parameter.shape), name))


def trained(base: Path, *streams: str, **lora: Any) -> WanModel:
    """A model whose adapter has moved away from its first values."""
    model = our_model(base, *streams)
    inject(model, LoraConfig(rank=4, **{"scope": "aux" if streams else "all"} | lora))
    move_adapter(model)
    return model.eval()


def sample(streams: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    torch.manual_seed(1)
    shape = (16, 2, 4, 4)
    return torch.randn(1, streams, *shape), torch.full((1, streams), 0.4), torch.randn(1, 512, 16), shape


@torch.no_grad()
def output(model: WanModel) -> Tensor:
    latents, timesteps, text, shape = sample(len(model.streams))
    return model(latents.flatten(1), timesteps, text, layout=model.layout(shape))


@torch.no_grad()
def diffusers_output(model: nn.Module) -> Tensor:
    latents, timesteps, text, _ = sample(1)
    return model(latents[:, 0], timestep=1000 * timesteps[:, 0], encoder_hidden_states=text).sample.flatten(1)


def pipeline() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=diffusers_wan(), scheduler=UniPCMultistepScheduler()
    )


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def lora_names(model: nn.Module) -> list[str]:
    return [name for name, _ in lora_linears(model)]
