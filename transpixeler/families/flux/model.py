"""FLUX.1 dev and schnell: an MMDiT of images, told T5's text, CLIP's one vector and, if distilled so, a guidance."""

from __future__ import annotations

from collections.abc import Sequence

from transpixeler.families.flux.config import GUIDANCE, PATCH, TIME_FREQUENCIES, FluxConfig
from transpixeler.models.family import Field
from transpixeler.models.mmdit import MMDiT, Sizes


class FluxModel(MMDiT):
    """FLUX.1, and anything of its shape."""

    family = "flux"
    patch = PATCH

    def __init__(
        self, config: FluxConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        sizes = Sizes(
            heads=config.num_attention_heads,
            axes=config.axes_dims_rope,
            layers=config.num_layers,
            single_layers=config.num_single_layers,
            inner=config.inner,
            channels=config.channels,
            time_frequencies=TIME_FREQUENCIES,
            guidance=GUIDANCE if config.guidance_embeds else None,
        )
        super().__init__(sizes, fields(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=kernel)


def fields(config: FluxConfig) -> tuple[Field, Field]:
    """Return T5's text, whose padding is attended as any token, and CLIP's one vector."""
    return (
        Field("text", width=config.joint_attention_dim, length=config.text_length),
        Field("pooled", width=config.pooled_projection_dim),
    )
