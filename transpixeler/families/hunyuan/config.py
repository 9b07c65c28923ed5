"""The config of a published HunyuanVideo transformer; what this code cannot run is refused by name.

In: the keys of a diffusers `config.json`, or the sizes read off an original file. Out: one frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

CLASS = "HunyuanVideoTransformer3DModel"
PIPELINE = "HunyuanVideoPipeline"
IMAGE_PIPELINE = "HunyuanVideoImageToVideoPipeline"
LATENT_CONCAT, TOKEN_REPLACE = "latent_concat", "token_replace"  # how a model takes the image that it goes on from
MASK_CHANNELS = 1  # of what is shown beside each stream's latents
PATCH: Grid = (1, 2, 2)
STRIDE: Grid = (4, 8, 8)
MLP_RATIO = 4
TIME_FREQUENCIES = 256  # channels of the sinusoids of timestep and guidance
GUIDANCE = 6.0  # that the model is told of, as its pipeline does by default
TEXT_LEN = 256  # after the template's tokens are cut off
IMAGE_TOKENS = 576  # that a picture is to the language model
SHOWN_TEXT_LEN = TEXT_LEN - 4  # of a model that sees the picture: four tokens of the template's end are left out
EVERY = {LATENT_CONCAT: 2, TOKEN_REPLACE: 4}  # of the picture's tokens, every second or fourth is kept
IMAGE_TRACE = 0.001  # of the given image's latents in the noise that a video starts from
SHIFT = 7.0  # of the published model's noise levels
USE = "use HunyuanVideo 1.0, such as hunyuanvideo-community/HunyuanVideo or hunyuanvideo-community/HunyuanVideo-I2V"

# What the published model has, in diffusers' words; another value is another architecture.
REQUIRED: dict[str, Any] = {"mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1, "qk_norm": "rms_norm"}


@dataclass(frozen=True)
class HunyuanConfig:
    """The published transformer config, in diffusers' words."""

    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    image_condition_type: str | None = None

    @property
    def shown_channels(self) -> int:
        """Count the channels beside the noisy ones: the mask and the image's latents."""
        return MASK_CHANNELS + self.out_channels if self.image_condition_type == LATENT_CONCAT else 0

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        return MLP_RATIO * self.width

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> HunyuanConfig:
        """Read diffusers' keys; what this code does not do is refused by name."""
        _refuse_others(config)
        known = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        made = cls(**{**known, "rope_axes_dim": tuple(known.get("rope_axes_dim", cls.rope_axes_dim))})
        if made.in_channels != made.out_channels + made.shown_channels:
            kind = "SkyReels V1 image-to-video" if made.in_channels == 32 else "a model that is shown something else"
            raise UserError(
                f"model.path: {made.in_channels} channels in and {made.out_channels} out: this is {kind}, which cannot "
                f"be trained here; {USE}"
            )
        if sum(made.rope_axes_dim) != made.attention_head_dim:
            raise UserError(
                f"model.path: rope_axes_dim {list(made.rope_axes_dim)} do not add up to heads of "
                f"{made.attention_head_dim}; {USE}"
            )
        return made


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Refuse what is no HunyuanVideo, takes images otherwise, or is built otherwise than the published models."""
    if config.get("_class_name", CLASS) != CLASS:
        raise UserError(f"model.path: {config['_class_name']} is not HunyuanVideo 1.0; {USE}")
    if (kind := config.get("image_condition_type")) not in (None, *EVERY):
        raise UserError(f"model.path: image_condition_type {kind!r} is not known, only {' and '.join(EVERY)}; {USE}")
    for key, value in REQUIRED.items():
        if config.get(key, value) != value:
            raise UserError(f"model.path: {key} {config[key]!r} is not supported, only {value!r}; {USE}")


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as diffusers writes it."""
    values = asdict(HunyuanConfig.read(config))
    return {"_class_name": CLASS} | REQUIRED | values | {"rope_axes_dim": list(values["rope_axes_dim"])}
