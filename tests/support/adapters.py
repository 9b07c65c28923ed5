"""A tiny Wan with an adapter that has moved, in our spelling and in diffusers', and what both give out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tests.support.models import wan_model, wan_source
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.on_model import adapter_of
from transpixeler.config import loading
from transpixeler.config.sections import Config, LoraConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.families.wan.model import WanModel
from transpixeler.models.lora import adapter_parameters, inject, lora_linears
from transpixeler.models.weights import load_weights
from transpixeler.sampling.model import base_weights
from transpixeler.training import saving

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


def compiles_to_the_same(model: WanModel, output: Callable[[WanModel], Tensor]) -> None:
    """Check that blocks compile whole, and that what comes out and all adapter gradients stay."""
    expected = output(model)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}  # type: ignore[union-attr]
    model.zero_grad()
    torch._dynamo.reset()
    for block in model.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = output(model)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-4, rtol=1e-4, msg=name)


def trained_over(base: Path, fuse: str, file: Path) -> tuple[WanModel, Config, Path]:
    """Return a model with an adapter over fused ones, its config, and the adapter's file as training writes it."""
    keys = [f"model.path={base}", f"model.fuse={fuse}", "streams={rgb: ''}", "lora.rank=4", "lora.scope=all"]
    config = loading.from_overrides(keys)
    model = wan_model(WanFolder(str(base)).config, streams=("rgb",))
    load_weights(model, base_weights(config))
    inject(model.eval(), config.lora)
    move_adapter(model)
    metadata = saving.Saver(config, *[None] * 2)._metadata(7, averaged=False)
    return model, config, write_adapter(adapter_of(model, metadata), file)
