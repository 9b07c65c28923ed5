"""Pyramid Flow miniFLUX: an MMDiT of videos in which no latent frame sees later ones.

It is told T5's text and CLIP's one vector. A sequence may hold earlier frames at coarser resolutions before the video.
"""

from __future__ import annotations

from collections.abc import Sequence

from transpixeler.families.pyramid.config import PATCH, TEXT_LEN, TIME_FREQUENCIES, PyramidConfig
from transpixeler.models.family import Field
from transpixeler.models.mmdit import MMDiT, Sizes


class PyramidModel(MMDiT):
    """Pyramid Flow, and anything of its shape."""

    family = "pyramid"
    patch = PATCH
    many_layouts = True

    def __init__(
        self, config: PyramidConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        sizes = Sizes(
            heads=config.num_attention_heads,
            axes=config.axes_dims_rope,
            layers=config.num_layers,
            single_layers=config.num_single_layers,
            inner=config.inner,
            channels=config.channels,
            time_frequencies=TIME_FREQUENCIES,
            causal=config.use_temporal_causal,
            channels_last=True,
        )
        super().__init__(sizes, fields(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=kernel)


def fields(config: PyramidConfig) -> tuple[Field, Field]:
    """Return T5's text, whose padding is masked, and CLIP's one vector."""
    return (
        Field("text", width=config.joint_attention_dim, length=TEXT_LEN, masked=True, spelled=("prompt_embed",)),
        Field("pooled", width=config.pooled_projection_dim, spelled=("pooled_prompt_embed",)),
    )
