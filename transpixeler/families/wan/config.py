"""The config of a published Wan transformer, read from either spelling; what this code cannot run is refused by name.

In: the keys of a diffusers or an original `config.json`. Out: one frozen value in diffusers' words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

TEXT_LEN = 512
# original config.json key → the diffusers key that the rest of the code knows
ORIGINAL_KEYS = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
MODEL_TYPES = ("t2v", "ti2v", "i2v", "flf2v")  # of original configs
MASK_CHANNELS = 4  # of an image-to-video model's input: one for each frame of a latent one
# Wan's other models, by the class or model_type that their configs name, or by weights that no other model has
OTHERS = {
    "WanVACETransformer3DModel": "VACE",
    "VaceWanModel": "VACE",
    "vace": "VACE",
    "vace_patch_embedding": "VACE",
    "WanAnimateTransformer3DModel": "Animate",
    "WanAnimateModel": "Animate",
    "animate": "Animate",
    "motion_encoder": "Animate",
    "WanModel_S2V": "S2V",
    "s2v": "S2V",
    "casual_audio_encoder": "S2V",
    "control_adapter": "Fun-Control",
    "ref_conv": "Fun-Control",
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
    image_dim: int | None = None  # of an image encoder's tokens
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None  # tokens of a first and a last image, which have learned positions

    @property
    def condition_channels(self) -> int:
        """Count the input channels beside a noisy latent's: a mask and the latents of what is shown."""
        return self.in_channels - self.out_channels

    @property
    def shows_last(self) -> bool:
        """Tell whether the model goes from a first frame to a last one."""
        return self.pos_embed_seq_len is not None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> WanConfig:
        """From either published spelling; what this code does not do is refused by name."""
        config = {ORIGINAL_KEYS.get(key, key): value for key, value in config.items()}
        if "dim" in config:
            config["attention_head_dim"] = config["dim"] // config["num_attention_heads"]
        _check_kind(config)
        if config.get("qk_norm", True) not in (True, "rms_norm_across_heads"):
            raise UserError(f"model.path: qk_norm {config['qk_norm']!r} is not supported, only rms_norm_across_heads")
        if config.get("text_len", TEXT_LEN) != TEXT_LEN:
            raise UserError(f"model.path: text_len {config['text_len']} is not supported, only {TEXT_LEN}")
        values = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        values["patch_size"] = tuple(values.get("patch_size", cls.patch_size))
        made = cls(**values)
        if made.condition_channels not in (0, MASK_CHANNELS + made.out_channels):
            raise UserError(
                f"model.path: in_channels {made.in_channels} beside out_channels {made.out_channels} is no Wan that is "
                "known here (Fun-Control takes so many); use a text-to-video or an image-to-video model"
            )
        if made.image_dim and made.added_kv_proj_dim not in (None, made.width):
            raise UserError(f"model.path: added_kv_proj_dim {made.added_kv_proj_dim} is not the model's width")
        return made


def refuse_others(told: Iterable[str]) -> None:
    """Refuse Wan's models of other kinds by name, by anything that `OTHERS` knows them by."""
    if other := next((OTHERS[name] for name in told if name in OTHERS), None):
        raise UserError(
            f"model.path: this is Wan {other}, which cannot be trained here; use a text-to-video or an "
            "image-to-video model"
        )


def _check_kind(config: Mapping[str, Any]) -> None:
    told = [str(config.get(key)) for key in ("_class_name", "model_type")]
    refuse_others([*told, *(name for name in ("control_adapter", "ref_conv") if config.get(f"add_{name}"))])
    if config.get("model_type", "t2v") not in MODEL_TYPES:
        raise UserError(
            f"model.path: model_type {config['model_type']!r} is not supported; use one of {', '.join(MODEL_TYPES)}"
        )


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of either published spelling in diffusers' words."""
    fixed = {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads"}
    return fixed | asdict(WanConfig.read(config))
