"""The config of a 3D U-Net, in this project's own words: no weights of it are published.

In: the keys of a `config.json`. Out: one frozen value; what does not go together is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Grid

CLASS = "VideoUNet3D"
MOST_LEVELS = 8  # that names of weights are made for


@dataclass(frozen=True)
class UnetConfig:
    """The sizes, and what the model learns."""

    dim: int = 64  # channels of the first level
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)  # channels of each level, in those of the first
    channels: int = 3  # of one stream
    cond_dim: int = 768  # of the vector that stands for a caption
    heads: int = 8
    head_dim: int = 32
    groups: int = 8  # that a norm cuts the channels into
    first_kernel: int = 7  # rows and columns that the first convolution sees
    space: Literal["pixels", "latents"] = "pixels"
    loss: Literal["absolute", "squared"] = "absolute"
    noise_steps: int = 1000

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level."""
        return tuple(self.dim * mult for mult in self.dim_mults)

    @property
    def side(self) -> int:
        """Return how many rows and columns of latents are one on the last level."""
        return 2 ** (len(self.dim_mults) - 1)

    @property
    def patch(self) -> Grid:
        return 1, self.side, self.side

    @property
    def inner(self) -> int:
        """Return the width of queries, keys and values."""
        return self.heads * self.head_dim

    @property
    def vector(self) -> int:
        """Return the width of what is told of a sample: its time and its caption."""
        return 4 * self.dim + self.cond_dim

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> UnetConfig:
        """Read the keys; what this code does not do is refused by name."""
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"model.path: {config['_class_name']} is no 3D U-Net; make one by `transpixeler init`")
        strange = [name for name in config if name not in cls.__dataclass_fields__ and not name.startswith("_")]
        if strange:
            known = ", ".join(cls.__dataclass_fields__)
            raise UserError(f"model.path: {strange[0]} is no size of a 3D U-Net; there are {known}")
        made = cls(**{name: value for name, value in config.items() if not name.startswith("_")})
        made = cls(**{**asdict(made), "dim_mults": tuple(made.dim_mults)})
        made.check()
        return made

    def check(self) -> None:
        """Refuse sizes that do not go together."""
        if not 1 <= len(self.dim_mults) <= MOST_LEVELS:
            raise UserError(f"model.path: dim_mults {list(self.dim_mults)} must be 1 to {MOST_LEVELS} levels")
        if any(width % self.groups for width in self.widths) or self.dim % 2:
            raise UserError(
                f"model.path: widths {list(self.widths)} must be multiples of groups {self.groups}, and dim even"
            )
        if self.first_kernel % 2 == 0 or self.head_dim % 2:
            raise UserError("model.path: first_kernel must be odd, and head_dim even")
        if self.space not in ("pixels", "latents") or self.loss not in ("absolute", "squared"):
            raise UserError("model.path: space must be pixels or latents, and loss absolute or squared")
        if self.space == "pixels" and self.channels != 3:
            raise UserError(
                f"model.path: channels {self.channels} are not those of pixels, 3 a stream; a companion, such as "
                "alpha, brings its own beside them"
            )


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as it is written beside weights."""
    values = asdict(UnetConfig.read(config))
    return {"_class_name": CLASS, **values, "dim_mults": list(values["dim_mults"])}
