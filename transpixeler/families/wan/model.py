"""Wan in three parts, with RoPE positions, over any number of streams.

In: packed noisy latents `[B, N]`, timesteps `[B, G]`, text `[B, 512, text_dim]`. Out: packed velocity `[B, N]`.
Parameters carry the published original names inside `embed`, `blocks` and `head`. Streams are concatenated on the
sequence and share RoPE positions. Each time group has its timestep: modulation is `[B, G, 6, D]`, never made per token.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.config.sections import UserError
from transpixeler.families.wan.config import MASK_CHANNELS, TEXT_LEN, WanConfig
from transpixeler.families.wan.names import NAMES
from transpixeler.models import backbone
from transpixeler.models.attention import cross_attention, fold_padding, pick_kernel, unfold_padding
from transpixeler.models.backbone import QKV, Backbone, Block, Flow
from transpixeler.models.conditions import with_channels
from transpixeler.models.family import Field
from transpixeler.models.fused import norm_heads
from transpixeler.models.linear import FeedForward, Linear, project_seen, project_shared
from transpixeler.models.modulation import add_gated, modulate, sinusoid
from transpixeler.models.patches import patchify
from transpixeler.models.streams import Grid, StreamLayout, stream_embeddings
from transpixeler.models.tokens import Tokens

THETA = 10000.0
MATMULS = ("q", "k", "v", "o", "k_img", "v_img")
IMAGE_TOKENS = 257  # of one image, by the encoder that Wan took


# -- positions


def rope_table(places: Sequence[Tensor], head_dim: int) -> Tensor:
    """[f·h·w, head_dim / 2, 2]: cosine and sine of each token's angles; the head splits over time, height and width.

    places: of the grid's frames, rows and columns, in fp64.
    """
    side = 2 * (head_dim // 6)
    axes = [
        place[:, None] * THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for place, dim in zip(places, (head_dim - 2 * side, side, side), strict=True)
    ]
    f, h, w = (len(place) for place in places)
    angles = torch.cat(
        [
            axes[0][:, None, None].expand(f, h, w, -1),
            axes[1][None, :, None].expand(f, h, w, -1),
            axes[2][None, None, :].expand(f, h, w, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


# -- the block


class Attention(nn.Module):
    """Projections and norms of one attention; q and k are normed over all heads together."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def normed(self, x: Tensor, norm: nn.RMSNorm, rope: Tensor | None = None) -> Tensor:
        return norm_heads(x, norm.weight, rope, heads=self.heads, eps=self.eps)


class SelfAttention(Attention):
    """Attention over the tokens of all streams."""

    def qkv(self, x: Tensor, tokens: Tokens) -> QKV:
        q, k, v = project_shared(x, tokens, self.q, self.k, self.v)
        q, k = self.normed(q, self.norm_q, tokens.rope), self.normed(k, self.norm_k, tokens.rope)
        return q, k, self.split(v), ()

    def forward(self, seen: Tensor, tokens: Tokens) -> Tensor:
        return project_seen(seen.flatten(2), tokens, self.o)


class CrossAttention(Attention):
    """Attention of every token to the text, its padding included, and beside it to an image's tokens."""

    def __init__(self, width: int, heads: int, eps: float, *, image: bool) -> None:
        super().__init__(width, heads, eps)
        self.image = image
        if image:
            self.k_img, self.v_img = Linear(width, width), Linear(width, width)
            self.norm_k_img = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, context: Tensor, image: Tensor | None, tokens: Tokens) -> Tensor:
        context, bias = fold_padding(context)
        (q,) = project_shared(x, tokens, self.q)
        q = self.normed(q, self.norm_q)
        k, v = self.normed(self.k(context), self.norm_k), self.split(self.v(context))
        y = cross_attention(q, k, v, tokens, bias)
        if image is not None:
            k, v = self.normed(self.k_img(image), self.norm_k_img), self.split(self.v_img(image))
            y = y + cross_attention(q, k, v, tokens)
        return self.o(y.flatten(2), tokens.lengths)


class WanBlock(Block):
    grouped = (1, 3)

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.eps = config.eps
        self.self_attn = SelfAttention(width, heads, config.eps)
        self.cross_attn = CrossAttention(width, heads, config.eps, image=config.image_dim is not None)
        if config.image_dim is not None:
            self.attends = (*Block.attends, "image")
        self.norm3 = nn.LayerNorm(width, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        hidden, modulation, *_ = flow
        shift, scale = (self.modulation[:, :2] + modulation[:, :, :2]).unbind(2)  # [B, G, D]
        x = modulate(hidden, shift, scale, groups=tokens.groups, eps=self.eps).to(hidden.dtype)
        return self.self_attn.qkv(x, tokens)

    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        hidden, modulation, context, _, *images = flow
        gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation[:, 2:] + modulation[:, :, 2:]).unbind(2)
        groups, dtype = tokens.groups, hidden.dtype
        hidden = add_gated(hidden, self.self_attn(seen, tokens), gate, groups=groups)
        image = images[0] if images else None
        hidden = hidden + self.cross_attn(self.norm3(hidden.float()).to(dtype), context, image, tokens)
        x = modulate(hidden, ffn_shift, ffn_scale, groups=groups, eps=self.eps).to(dtype)
        return (add_gated(hidden, self.ffn(x, tokens, gate=ffn_gate), ffn_gate, groups=groups),)

    def reads(self, linear: str) -> str:
        if linear in ("cross_attn.k_img", "cross_attn.v_img"):
            return "image"
        return "text" if linear in ("cross_attn.k", "cross_attn.v") else "streams"


# -- the ends


def unpatchify(x: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """[B, L, patch·C] → [B, C·F·H·W]; the head's channels come last within a patch."""
    return x.unflatten(2, (*patch, -1)).unflatten(1, grid).permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(1)


class ImageEmbedding(nn.Module):
    """An image encoder's tokens to the blocks' width; those of a first and a last image have learned positions."""

    def __init__(self, tokens: int | None, image_dim: int, width: int) -> None:
        super().__init__()
        self.emb_pos = nn.Parameter(torch.zeros(1, tokens, image_dim)) if tokens else None
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, width),
            nn.LayerNorm(width),
        )

    def forward(self, image: Tensor) -> Tensor:
        """[B, tokens, image_dim] → [B, tokens, D], in fp32."""
        return self.proj(image if self.emb_pos is None else image + self.emb_pos)


class Embed(nn.Module):
    """Latents, timesteps, text and, in image-to-video models, what is shown, to what the blocks take."""

    def __init__(self, config: WanConfig, streams: Sequence[str]) -> None:
        super().__init__()
        width = config.width
        self.freq_dim = config.freq_dim
        self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, width), nn.GELU(approximate="tanh"), Linear(width, width)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.condition_channels, self.img_emb = config.condition_channels, None
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.pos_embed_seq_len, config.image_dim, width)
        self.stream_embedding = stream_embeddings(streams[1:], width)

    def forward(
        self, x: Tensor, timesteps: Tensor, text: Tensor, *shown: Tensor, layout: StreamLayout, dtype: torch.dtype
    ) -> Flow:
        """shown: the fields `shown` [B, cells of all streams · channels], `image` [B, tokens, width], where taken."""
        temb = self.time_embedding(sinusoid(timesteps, self.freq_dim))
        modulation = self.time_projection(temb).unflatten(2, (6, -1))
        rows, _ = fold_padding(text.to(dtype))
        context = unfold_padding(self.text_embedding(rows), text.shape[1])
        hidden = self.embed(self.streams(x, shown, layout), layout).to(dtype)
        images = () if self.img_emb is None else (self.img_emb(shown[-1].float()).to(dtype),)
        return hidden, modulation, context, temb, *images

    def streams(self, x: Tensor, shown: Sequence[Tensor], layout: StreamLayout) -> Sequence[Tensor]:
        """Return each stream's latents, with what is shown of it beside them in the channels."""
        if not self.condition_channels:
            return layout.unpack(x)
        conditions = with_channels(layout, self.condition_channels).unpack(shown[0])
        return [torch.cat(pair, dim=1) for pair in zip(layout.unpack(x), conditions, strict=True)]

    def embed(self, streams: Sequence[Tensor], layout: StreamLayout) -> Tensor:
        """[B, C, F, H, W] each → [B, T, D]; a stream's embedding is nothing but another bias."""
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        biases = [bias, *(bias + self.stream_embedding[name] for name in layout.names[1:])]
        patches = [patchify(part.to(weight.dtype), layout.patch) for part in streams]
        pairs = zip(patches, layout.segments, strict=True)
        return torch.cat([F.linear(patch, weight, biases[segment.stream]) for patch, segment in pairs], dim=1)


class Head(backbone.Head):
    """Tokens to velocity, each stream by itself."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.width, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.width) / math.sqrt(config.width))

    def values(self, *flow: Tensor, groups: Sequence[int]) -> Tensor:
        hidden, _, _, temb, *_ = flow
        shift, scale = (self.modulation + temb[:, :, None]).unbind(2)  # [B, G, D]
        return self.head(modulate(hidden, shift, scale, groups=groups, eps=self.eps))

    def pack(self, values: Tensor, layout: StreamLayout) -> Tensor:
        parts = values.split(layout.segment_lengths, dim=1)
        return torch.cat([unpatchify(p, g, layout.patch) for p, g in zip(parts, layout.grids, strict=True)], dim=1)


def fields_of(config: WanConfig) -> tuple[Field, ...]:
    """Return what a model is conditioned on: the caption and, in image-to-video models, what is shown."""
    found = [Field("text", width=config.text_dim, length=TEXT_LEN)]
    if config.condition_channels:
        found.append(
            Field("shown", width=config.condition_channels, source="clip", mask=MASK_CHANNELS, last=config.shows_last)
        )
    if config.image_dim is not None:
        tokens = config.pos_embed_seq_len or IMAGE_TOKENS
        found.append(Field("image", width=config.image_dim, length=tokens, source="image", last=config.shows_last))
    return tuple(found)


class WanModel(Backbone):
    """Wan 2.1 T2V, 1.3B and 14B, Wan 2.2 TI2V-5B and anything of their shape."""

    family = "wan"
    grouped = WanBlock.grouped
    lora_targets = tuple(name for name in NAMES.block_linears if name not in ("cross_attn.k", "cross_attn.v"))

    def __init__(
        self, config: WanConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.config, self.streams, self.kernel = config, tuple(streams), kernel
        self.fields = fields_of(config)
        self.patch, self.width, self.heads = config.patch_size, config.width, config.num_attention_heads
        self.rgb_attends_aux = rgb_attends_aux
        self.embed = Embed(config, self.streams)
        self.blocks = nn.ModuleDict({str(index): WanBlock(config) for index in range(config.num_layers)})
        self.head = Head(config)
        self._ropes: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        limit = self.config.rope_max_seq_len
        if any(n > limit for grid in layout.grids for n in grid):
            raise UserError(f"data: a clip of {layout.grids} tokens is longer than the model's {limit} positions")
        key = (layout.segments, device)
        if key not in self._ropes:
            places = [segment.positions() for segment in layout.segments]
            self._ropes[key] = torch.cat([rope_table(p, self.config.attention_head_dim) for p in places]).to(device)
            if len(self._ropes) > 4:  # 34 MB each at 480×832×81, joint
                self._ropes.popitem(last=False)
        self._ropes.move_to_end(key)
        kernel = pick_kernel(self.kernel, device, self.matmul_dtype, self.config.attention_head_dim)
        return Tokens.of(layout, self._ropes[key], kernel=kernel, rgb_attends_aux=self.rgb_attends_aux)

    def flow_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        width, groups = self.config.width, len(layout.groups)
        with torch.device("meta"):
            return (
                torch.empty(batch, layout.tokens, width, dtype=dtype),
                torch.empty(batch, groups, 6, width),
                torch.empty(batch, TEXT_LEN, width, dtype=dtype),
                torch.empty(batch, groups, width),
                *(torch.empty(batch, f.length or 1, width, dtype=dtype) for f in self.fields if f.source == "image"),
            )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep norms, tables and time embedding in fp32, as diffusers does.

        The time projection too, as in the original, and the thin ends (patches, head), which meet fp32 latents.
        """
        parts = name.split(".")
        matmul = parts[-1] in ("weight", "bias") and (parts[-2] in MATMULS or "ffn" in parts)
        return dtype if matmul or "text_embedding" in parts else torch.float32

    def end_reads(self, name: str) -> str:
        if "img_emb" in name:
            return "image"
        return "text" if "text_embedding" in name else "vectors" if "time" in name else "streams"

    def rebuild_buffers(self) -> None:
        self._ropes.clear()
