"""A toy MMDiT: blocks of two kinds, through which masked text flows."""

from __future__ import annotations

from collections.abc import Sequence

from transpixeler.families.toy.config import PATCH, TIME_FREQUENCIES, ToyConfig

from transpixeler.models.family import Field
from transpixeler.models.mmdit import MMDiT, Sizes


class ToyModel(MMDiT):
    """Double blocks `0, 1, …`, then single blocks `s0, s1, …`."""

    family = "toy"
    patch = PATCH

    def __init__(
        self, config: ToyConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        side = 2 * (config.attention_head_dim // 6)
        sizes = Sizes(
            heads=config.num_attention_heads,
            axes=(config.attention_head_dim - 2 * side, side, side),
            layers=config.num_layers,
            single_layers=config.num_single_layers,
            inner=config.inner,
            channels=config.channels,
            time_frequencies=TIME_FREQUENCIES,
            guidance=config.guidance,
        )
        super().__init__(sizes, fields(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=kernel)


def fields(config: ToyConfig) -> tuple[Field, Field]:
    return (
        Field("text", width=config.text_dim, length=config.text_length, masked=True),
        Field("pooled", width=config.pooled_dim),
    )
