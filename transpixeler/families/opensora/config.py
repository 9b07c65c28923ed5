"""The config of an Open-Sora 2 transformer, in its authors' words; what this code cannot run is refused by name.

In: the keys of a `config.json`, or the sizes read off a file of weights. Out: one frozen value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

CLASS = "OpenSoraTransformer"
PATCH: Grid = (1, 2, 2)
STRIDE: Grid = (4, 8, 8)
TIME_FREQUENCIES = 256  # channels of the timestep's sinusoids
TEXT_LEN = 512
MASK_CHANNELS = 1  # of what is shown beside each stream's latents

# what this code takes for granted, and what another value is of
_ONLY: dict[str, tuple[Any, str]] = {
    "mlp_ratio": (4.0, "a feed-forward of another width"),
    "theta": (10_000, "positions of another period"),
    "qkv_bias": (True, "projections without biases"),
    "guidance_embed": (False, "a distilled model, which is told its guidance"),
    "patch_size": (2, "the model for another autoencoder, of a high compression"),
}


@dataclass(frozen=True)
class OpenSoraConfig:
    """The sizes, as the published configs name them."""

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, int, int] = (16, 56, 56)
    cond_embed: bool = False
    use_liger_rope: bool = True  # a head's halves turn together, and not its neighbouring channels

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def inner(self) -> int:
        return 4 * self.hidden_size

    @property
    def channels(self) -> int:
        """Count the channels of a latent, of which a token packs 2×2."""
        return self.in_channels // (PATCH[1] * PATCH[2])

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> OpenSoraConfig:
        """Read the published keys; what this code does not do is refused by name."""
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"model.path: {config['_class_name']} is no Open-Sora 2; use hpcai-tech/Open-Sora-v2")
        for name, (only, other) in _ONLY.items():
            if config.get(name, only) != only:
                raise UserError(
                    f"model.path: {name} {config[name]} is of {other}, which cannot be trained here; use "
                    "hpcai-tech/Open-Sora-v2"
                )
        known = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        made = cls(**{**known, "axes_dim": tuple(known.get("axes_dim", cls.axes_dim))})
        if sum(made.axes_dim) != made.head_dim or made.hidden_size % made.num_heads:
            raise UserError(
                f"model.path: axes_dim {list(made.axes_dim)} do not add up to heads of "
                f"{made.hidden_size / made.num_heads:g}; use hpcai-tech/Open-Sora-v2"
            )
        return made


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it is written beside weights, whose projections stand apart."""
    values = asdict(OpenSoraConfig.read(config))
    fixed = {name: only for name, (only, _) in _ONLY.items()}
    return {"_class_name": CLASS, **values, "axes_dim": list(values["axes_dim"]), **fixed, "fused_qkv": False}
