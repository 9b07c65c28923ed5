"""Open-Sora 2: an MMDiT of videos, told T5's text and CLIP's one vector, and shown given frames beside the latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transpixeler.families.opensora.config import MASK_CHANNELS, PATCH, TEXT_LEN, TIME_FREQUENCIES, OpenSoraConfig
from transpixeler.models.conditions import shown_fields, with_channels
from transpixeler.models.family import Field
from transpixeler.models.mmdit import Embed, MMDiT, Sizes
from transpixeler.models.patches import patchify
from transpixeler.models.streams import Grid, StreamLayout


class ShownEmbed(Embed):
    """The ends of a model that may be shown masks and masked latents, embedded and added to the noisy ones."""

    def __init__(self, sizes: Sizes, patch: Grid, fields: Sequence[Field], streams: Sequence[str]) -> None:
        super().__init__(sizes, patch, fields, streams)
        self.shown_channels = sum(field.width for field in shown_fields(fields))
        self.cond_in = nn.Linear(self.shown_channels * math.prod(patch), sizes.width) if self.shown_channels else None

    def embed(self, x: Tensor, layout: StreamLayout, *shown: Tensor) -> Tensor:
        hidden = super().embed(x, layout)
        if self.cond_in is None:
            return hidden
        parts = with_channels(layout, self.shown_channels).unpack(*shown)
        return hidden + torch.cat([self.cond_in(patchify(part.float(), self.patch)) for part in parts], dim=1)


class OpenSoraModel(MMDiT):
    """Open-Sora 2, and anything of its shape."""

    family = "opensora"
    patch = PATCH
    embed_class = ShownEmbed
    zero_start = ("embed.cond_in.weight", "embed.cond_in.bias")

    def __init__(
        self, config: OpenSoraConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        sizes = Sizes(
            heads=config.num_heads,
            axes=config.axes_dim,
            layers=config.depth,
            single_layers=config.depth_single_blocks,
            inner=config.inner,
            channels=config.channels,
            time_frequencies=TIME_FREQUENCIES,
            halves=config.use_liger_rope,
        )
        super().__init__(sizes, fields(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=kernel)

    def end_reads(self, name: str) -> str:
        return "streams" if name == "embed.cond_in" else super().end_reads(name)


def fields(config: OpenSoraConfig) -> tuple[Field, ...]:
    """Return T5's text, whose padding is attended as any token, CLIP's one vector and, if taken, what is shown."""
    known = (
        Field("text", width=config.context_in_dim, length=TEXT_LEN),
        Field("pooled", width=config.vec_in_dim),
    )
    if not config.cond_embed:
        return known
    shown = Field("shown", width=MASK_CHANNELS + config.channels, source="clip", mask=MASK_CHANNELS, stills=True)
    return *known, shown
