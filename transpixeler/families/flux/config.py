"""The config of a published FLUX.1 transformer; what this code cannot run is refused by name.

In: the keys of a diffusers `config.json`, or the sizes read off an original file. Out: one frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

CLASS = "FluxTransformer2DModel"
PATCH: Grid = (1, 2, 2)
STRIDE: Grid = (1, 8, 8)  # an image has one frame
TIME_FREQUENCIES = 256  # channels of the sinusoids of timestep and guidance
MLP_RATIO = 4
GUIDANCE = 3.5  # that dev is told of, as its pipeline does by default
TEXT_LEN, SCHNELL_TEXT_LEN = 512, 256

_KINDS = {  # what other models of this shape take in, by their channels
    384: "FLUX.1 Fill",
    128: "FLUX.1 Canny or Depth",
    196: "a control model of FLUX.1",
}


@dataclass(frozen=True)
class FluxConfig:
    """The published transformer config, in diffusers' words."""

    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    in_channels: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        return MLP_RATIO * self.width

    @property
    def channels(self) -> int:
        """Count the channels of a latent, of which a token packs 2×2."""
        return self.in_channels // (PATCH[1] * PATCH[2])

    @property
    def text_length(self) -> int:
        """Return how many tokens of text the model was trained with: the distilled one without guidance has half."""
        return TEXT_LEN if self.guidance_embeds else SCHNELL_TEXT_LEN

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Read diffusers' keys; what this code does not do is refused by name."""
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"model.path: {config['_class_name']} is no FLUX.1; use FLUX.1-dev or FLUX.1-schnell")
        known = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        made = cls(**{**known, "axes_dims_rope": tuple(known.get("axes_dims_rope", cls.axes_dims_rope))})
        outputs = config.get("out_channels") or made.in_channels
        if outputs != made.in_channels or config.get("patch_size", 1) != 1:
            kind = _KINDS.get(made.in_channels, "a model that takes more than noise")
            raise UserError(
                f"model.path: {made.in_channels} channels in and {outputs} out: this is {kind}, which cannot be "
                "trained here; use FLUX.1-dev or FLUX.1-schnell"
            )
        if sum(made.axes_dims_rope) != made.attention_head_dim:
            raise UserError(
                f"model.path: axes_dims_rope {list(made.axes_dims_rope)} do not add up to heads of "
                f"{made.attention_head_dim}; use FLUX.1-dev or FLUX.1-schnell"
            )
        return made


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as diffusers writes it."""
    values = asdict(FluxConfig.read(config))
    return (
        {"_class_name": CLASS, "patch_size": 1, "out_channels": None}
        | values
        | {"axes_dims_rope": list(values["axes_dims_rope"])}
    )
