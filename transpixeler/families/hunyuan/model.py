"""HunyuanVideo 1.0: an MMDiT of videos, told a language model's text, CLIP's one vector and a guidance.

Its text is masked, and two blocks of its own read it before it meets the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.families.hunyuan.config import (
    EVERY,
    GUIDANCE,
    IMAGE_TOKENS,
    MASK_CHANNELS,
    PATCH,
    SHOWN_TEXT_LEN,
    TEXT_LEN,
    TIME_FREQUENCIES,
    TOKEN_REPLACE,
    HunyuanConfig,
)
from transpixeler.families.hunyuan.refiner import TokenRefiner
from transpixeler.models.conditions import with_channels
from transpixeler.models.family import Field
from transpixeler.models.mmdit import Embed, MMDiT, Sizes
from transpixeler.models.streams import Grid, StreamLayout


class Patches(nn.Conv3d):
    """A convolution over patches, as files hold it, given patches that are cut already."""

    def forward(self, patches: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(patches, self.weight.flatten(1), self.bias)


@dataclass(frozen=True)
class HunyuanSizes(Sizes):
    """The shape of a model, and of what reads its text."""

    refiner_layers: int = 2
    shown_channels: int = 0  # of the mask and the image's latents beside the noisy ones
    replaces: bool = False  # given latents take the place of noisy ones, at time 0 and without guidance


class HunyuanEmbed(Embed):
    """Patches by a convolution, text by the token refiner."""

    def __init__(self, sizes: HunyuanSizes, patch: Grid, fields: Sequence[Field], streams: Sequence[str]) -> None:
        super().__init__(sizes, patch, fields, streams)
        text = fields[0]
        self.shown_channels, self.replaces = sizes.shown_channels, sizes.replaces
        self.img_in = Patches(sizes.channels + sizes.shown_channels, sizes.width, patch, patch)
        self.txt_in = TokenRefiner(
            text.width,
            sizes.width,
            heads=sizes.heads,
            layers=sizes.refiner_layers,
            time_frequencies=sizes.time_frequencies,
        )

    def read_text(self, text: Tensor, lengths: Sequence[Tensor], times: Tensor) -> Tensor:
        return self.txt_in(text, *lengths, times)

    def latents(self, x: Tensor, layout: StreamLayout, *shown: Tensor) -> Sequence[Tensor]:
        """Return noisy latents, behind them the image's, and its mask last."""
        parts = layout.unpack(x)
        if not shown:
            return parts
        others = with_channels(layout, self.shown_channels).unpack(*shown)
        return [
            torch.cat([one, other[:, MASK_CHANNELS:], other[:, :MASK_CHANNELS]], dim=1)
            for one, other in zip(parts, others, strict=True)
        ]

    def guided(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """Tell what is given, at time 0, of no guidance where the model was trained so."""
        return guidance * (timesteps != 0)[..., None] if self.replaces else guidance


class HunyuanModel(MMDiT):
    """HunyuanVideo 1.0, text-to-video or image-to-video, and anything of its shape."""

    family = "hunyuan"
    patch = PATCH
    embed_class = HunyuanEmbed

    def __init__(
        self, config: HunyuanConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        sizes = HunyuanSizes(
            heads=config.num_attention_heads,
            axes=config.rope_axes_dim,
            layers=config.num_layers,
            single_layers=config.num_single_layers,
            inner=config.inner,
            channels=config.out_channels,
            time_frequencies=TIME_FREQUENCIES,
            guidance=GUIDANCE if config.guidance_embeds else None,
            theta=config.rope_theta,
            refiner_layers=config.num_refiner_layers,
            shown_channels=config.shown_channels,
            replaces=config.image_condition_type == TOKEN_REPLACE,
        )
        super().__init__(sizes, fields(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=kernel)
        self.text_attentions = config.num_refiner_layers

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return dtype if name.startswith("embed.txt_in.input.") else super().dtype_of(name, dtype)

    def end_reads(self, name: str) -> str:
        """Tell the refiner's linears that read text from those that make its gates."""
        inside = name.removeprefix("embed.txt_in.")
        if inside == name:
            return super().end_reads(name)
        return "text" if inside == "input" or (inside.startswith("blocks.") and inside[-4:] != ".mod") else "vectors"


def fields(config: HunyuanConfig) -> tuple[Field, ...]:
    """Return the language model's text, its padding masked, CLIP's one vector and, if taken, what is shown.

    An image-to-video model's language model sees the picture: some of its tokens stand before the text.
    """
    pooled = Field("pooled", width=config.pooled_projection_dim)
    if config.image_condition_type is None:
        return Field("text", width=config.text_embed_dim, length=TEXT_LEN, masked=True), pooled
    image = IMAGE_TOKENS // EVERY[config.image_condition_type]
    text = Field(
        "text",
        width=config.text_embed_dim,
        length=image + SHOWN_TEXT_LEN,
        masked=True,
        source="caption+image",
        least=image,
    )
    if not config.shown_channels:
        return text, pooled
    shown = Field("shown", width=config.shown_channels, source="clip", mask=MASK_CHANNELS, stills=True)
    return text, pooled, shown
