"""A tiny Pyramid Flow of random weights, in a pipeline's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.families.opensora.folder import write_encoders as write_opensora_encoders
from tests.support.models import move
from transpixeler.families.pyramid.config import PyramidConfig, published_config
from transpixeler.families.pyramid.model import PyramidModel
from transpixeler.families.pyramid.names import NAMES
from transpixeler.families.pyramid.vae import CausalVae, VaeConfig
from transpixeler.models.names import split_rows

TINY: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
VAE: dict[str, Any] = {
    "_class_name": "CausalVideoVAE",
    "encoder_out_channels": 4,
    "encoder_block_out_channels": (4, 4, 4, 4),
    "encoder_layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "encoder_spatial_down_sample": (True, True, True, False),
    "encoder_temporal_down_sample": (True, True, True, False),
    "encoder_norm_num_groups": 2,
}


def make(*, streams: tuple[str, ...] = ("rgb",), seed: int = 0, **changed: Any) -> PyramidModel:
    """Build a tiny model with every parameter moved."""
    model = PyramidModel(PyramidConfig.read(TINY | changed), streams=streams)
    move(model, seed=seed)
    return model


def stored(model: PyramidModel, spelling: str = "diffusers") -> dict[str, torch.Tensor]:
    """Return the weights as a file has them, apart as published or together."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        spelled = NAMES.parameter(name, source="internal", to=spelling)
        found |= {part: rows.contiguous() for part, rows in split_rows(value, spelled).items()}
    return found


def write_folder(folder: Path) -> Path:
    write_opensora_encoders(folder)
    for file in (folder / "vae").iterdir():
        file.unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vae = CausalVae(VaeConfig.read(VAE))
    for place, config, weights in (
        (folder / "vae", VAE, vae.state_dict()),
        (folder / "transformer", published_config(TINY), stored(make(seed=3))),
    ):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(config))
        save_file(
            {name: value.contiguous() for name, value in weights.items()}, place / "diffusion_pytorch_model.safetensors"
        )
    return folder
