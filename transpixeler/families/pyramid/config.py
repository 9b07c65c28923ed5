"""The config of a published Pyramid Flow transformer; what this code cannot run is refused by name.

In: the keys of its `config.json`, or the sizes read off a file of weights. Out: one frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

CLASS = "PyramidFluxTransformer"
PATCH: Grid = (1, 2, 2)
STRIDE: Grid = (8, 8, 8)
TIME_FREQUENCIES = 256  # channels of the timestep's sinusoids
MLP_RATIO = 4
TEXT_LEN = 128

_OTHERS = {"PyramidDiffusionMMDiT": "the older model, of SD3's shape"}
_ONLY: dict[str, tuple[Any, str]] = {
    "patch_size": (1, "patches of another size"),
    "interp_condition_pos": (True, "a model whose history has positions of its own"),
}


@dataclass(frozen=True)
class PyramidConfig:
    """The sizes, as the published configs name them; the defaults are miniFLUX's."""

    num_layers: int = 8
    num_single_layers: int = 16
    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 64
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    axes_dims_rope: tuple[int, int, int] = (16, 24, 24)
    use_temporal_causal: bool = True  # no latent frame sees later ones

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

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> PyramidConfig:
        """Read the published keys; what this code does not do is refused by name."""
        name = config.get("_class_name", CLASS)
        if name != CLASS:
            kind = _OTHERS.get(name, "another model")
            raise UserError(f"model.path: {name} is {kind}, which cannot be trained here; use Pyramid Flow miniFLUX")
        for key, (only, other) in _ONLY.items():
            if config.get(key, only) != only:
                raise UserError(
                    f"model.path: {key} {config[key]} is of {other}, which cannot be trained here; use Pyramid Flow "
                    "miniFLUX"
                )
        known = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        made = cls(**{**known, "axes_dims_rope": tuple(known.get("axes_dims_rope", cls.axes_dims_rope))})
        if sum(made.axes_dims_rope) != made.attention_head_dim:
            raise UserError(
                f"model.path: axes_dims_rope {list(made.axes_dims_rope)} do not add up to heads of "
                f"{made.attention_head_dim}; use Pyramid Flow miniFLUX"
            )
        return made


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it is written beside weights."""
    values = asdict(PyramidConfig.read(config))
    fixed = {name: only for name, (only, _) in _ONLY.items()}
    return {"_class_name": CLASS, **values, "axes_dims_rope": list(values["axes_dims_rope"]), **fixed}
