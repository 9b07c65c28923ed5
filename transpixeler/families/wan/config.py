"""The config of a published Wan transformer, read from either spelling; what this code cannot run is refused by name.

In: the keys of a diffusers or an original `config.json`. Out: one frozen value in diffusers' words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config import UserError
from transpixeler.models.streams import Grid

TEXT_LEN = 512
# original config.json key → the diffusers key that the rest of the code knows
ORIGINAL_KEYS = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
MODEL_TYPES = (
    "t2v",
    "ti2v",
)  # of original configs; the second is 2.2's 5B, to which a first frame is a time of its own
UNSUPPORTED = {
    "added_kv_proj_dim": "image conditioning (image-to-video)",
    "image_dim": "an image embedder (image-to-video)",
    "pos_embed_seq_len": "an image embedder (image-to-video)",
}


@dataclass(frozen=True)
class WanConfig:
    """The published transformer config, in diffusers' words."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    patch_size: Grid = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> WanConfig:
        """From either published spelling; what this code does not do is refused by name."""
        config = {ORIGINAL_KEYS.get(key, key): value for key, value in config.items()}
        if "dim" in config:
            config["attention_head_dim"] = config["dim"] // config["num_attention_heads"]
        for key, what in UNSUPPORTED.items():
            if config.get(key) is not None:
                raise UserError(f"model.path: {key} is set: {what} is not supported; use a Wan text-to-video model")
        if config.get("model_type", "t2v") not in MODEL_TYPES:
            raise UserError(f"model.path: model_type {config['model_type']!r} is not supported; use a Wan t2v model")
        if config.get("qk_norm", True) not in (True, "rms_norm_across_heads"):
            raise UserError(f"model.path: qk_norm {config['qk_norm']!r} is not supported, only rms_norm_across_heads")
        if config.get("text_len", TEXT_LEN) != TEXT_LEN:
            raise UserError(f"model.path: text_len {config['text_len']} is not supported, only {TEXT_LEN}")
        values = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        values["patch_size"] = tuple(values.get("patch_size", cls.patch_size))
        made = cls(**values)
        if made.in_channels != made.out_channels:
            raise UserError(
                f"model.path: in_channels {made.in_channels} and out_channels {made.out_channels} differ: "
                "image-to-video is not supported; use a Wan text-to-video model"
            )
        return made


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of either published spelling in diffusers' words."""
    fixed = {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads"}
    return fixed | asdict(WanConfig.read(config))
