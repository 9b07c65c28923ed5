"""A tiny LTX-Video, its inputs, and diffusers' class of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import move
from transpixeler.families.ltx.config import TEXT_LEN, LtxConfig
from transpixeler.families.ltx.model import LtxModel
from transpixeler.families.ltx.names import NAMES
from transpixeler.models.streams import StreamLayout

STREAMS = ("rgb", "seg", "depth")
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # one pair of the width, 32 = 6·5 + 2, does not turn
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "num_layers": 2,
}


def ltx(streams: int = 1, *, seed: int = 0, attends: bool = True, fps: float = 24.0, **overrides: Any) -> LtxModel:
    """Build a tiny model whose every parameter is moved."""
    config = LtxConfig.read(TINY | overrides)
    model = LtxModel(config, streams=STREAMS[:streams], rgb_attends_aux=attends, fps=fps)
    move(model, seed=seed)
    return model


def published(**overrides: Any) -> Any:
    """Build diffusers' class of the same shape with every parameter moved."""
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(**(TINY | overrides))
    move(model, seed=3)
    return model


def with_weights_of(other: nn.Module, **overrides: Any) -> LtxModel:
    """Build our model of diffusers' weights."""
    weights = other.state_dict()
    model = ltx(**overrides)
    model.load_state_dict({name: weights[stored] for name, stored in NAMES.internal_names(weights).items()})
    return model


def inputs(layout: StreamLayout, *, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed latents, timesteps of each group, text that goes on as noise beyond its lengths, and those."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, TEXT_LEN, TINY["caption_channels"], generator=generator)
    lengths = torch.tensor([7, TEXT_LEN, 1][:batch])
    x = torch.randn(batch, layout.elements, generator=generator)
    return x, torch.rand(batch, len(layout.groups), generator=generator), text, lengths


def without_embeddings(model: LtxModel) -> LtxModel:
    """Return the model with its stream embeddings at their start, zero."""
    assert model.embed is not None
    for parameter in model.embed.stream_embedding.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(parameter)
    return model


def base_of(joint: LtxModel) -> LtxModel:
    """Return the one-stream model with the joint model's base weights."""
    single, state = ltx(), joint.state_dict()
    single.load_state_dict({name: state[name] for name in single.state_dict()})
    return single
