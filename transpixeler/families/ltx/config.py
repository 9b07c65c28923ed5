"""The config of a published LTX-Video transformer, from either spelling; what this code cannot run is refused by name.

In: the keys of a diffusers `config.json`, or of the config in the header of an original file. Out: one frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

TEXT_LEN = 128
PATCH: Grid = (1, 1, 1)  # one latent cell is one token
TIME_FREQUENCIES = 256  # channels of the timestep's sinusoids
HEADS = 32  # of every published LTX-Video
THETA = 10000.0
SPAN = (20.0, 2048.0, 2048.0)  # seconds, rows and columns of pixels that a position is a fraction of

# What every published LTX-Video has, in diffusers' words or the original's; another value is another architecture.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "adaptive_norm": ("single_scale_shift",),
    "attention_bias": (True,),
    "attention_out_bias": (True,),
    "double_self_attention": (False,),
    "norm_elementwise_affine": (False,),
    "only_cross_attention": (False,),
    "patch_size": (1,),
    "patch_size_t": (1,),
    "positional_embedding_max_pos": (list(SPAN), tuple(SPAN)),
    "positional_embedding_theta": (THETA,),
    "positional_embedding_type": ("rope",),
    "qk_norm": ("rms_norm_across_heads", "rms_norm"),
    "standardization_norm": ("rms_norm",),
    "timestep_scale_multiplier": (1000,),
}


@dataclass(frozen=True)
class LtxConfig:
    """The published transformer config, in diffusers' words, and one of the original's."""

    num_attention_heads: int = HEADS
    attention_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    cross_attention_dim: int = 2048
    caption_channels: int = 4096
    num_layers: int = 28
    norm_eps: float = 1e-6
    causal_temporal_positioning: bool = False  # from 0.9.5 on: the first latent frame lasts one frame, the others eight

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LtxConfig:
        """Read either published spelling; what this code does not do is refused by name."""
        for key, allowed in REQUIRED.items():
            if config.get(key) is not None and config[key] not in allowed:
                raise UserError(
                    f"model.path: {key} {config[key]!r} is not supported, only {allowed[0]!r}; "
                    "use a published LTX-Video"
                )
        made = cls(**{name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None})
        if made.in_channels != made.out_channels:
            raise UserError(
                f"model.path: in_channels {made.in_channels} and out_channels {made.out_channels} differ, which is not "
                "supported; use a published LTX-Video"
            )
        if made.cross_attention_dim != made.width:
            raise UserError(
                f"model.path: cross_attention_dim {made.cross_attention_dim} is not the model's width {made.width}, "
                "which is not supported; use a published LTX-Video"
            )
        return made


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of either published spelling in diffusers' words."""
    fixed = {
        "_class_name": "LTXVideoTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_out_bias": True,
        "norm_elementwise_affine": False,
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm_across_heads",
    }
    values = asdict(LtxConfig.read(config))
    del values["causal_temporal_positioning"]  # diffusers leaves it to the pipeline's class
    return fixed | values
