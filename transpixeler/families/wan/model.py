"""Wan 2.1 text-to-video in three parts, with RoPE positions, over any number of streams.

In: packed noisy latents `[B, N]`, timesteps `[B, S]`, text `[B, 512, text_dim]`. Out: packed velocity `[B, N]`.
Parameters carry the published original names inside `embed`, `blocks` and `head`. Streams are concatenated on the
sequence, share RoPE positions, and have each its own timestep: modulation is `[B, S, 6, D]` and never made per token.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.config import UserError
from transpixeler.families.wan.config import TEXT_LEN, WanConfig
from transpixeler.families.wan.names import config_from_shapes, internal_names
from transpixeler.models.attention import attention, fold_padding, pick_kernel, unfold_padding
from transpixeler.models.backbone import (
    Block,
    Digest,
    SamplingDefaults,
    State,
    TextEncoder,
    Vae,
    VideoModel,
    file_digest,
)
from transpixeler.models.costs import adapter_shapes
from transpixeler.models.damage import read_config as read_object
from transpixeler.models.dimensions import Dimensions
from transpixeler.models.fused import norm_heads
from transpixeler.models.linear import Linear, scope_copy
from transpixeler.models.streams import Grid, StreamLayout, Tokens, stream_embeddings
from transpixeler.models.weights import WeightSource, resolve

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
THETA = 10000.0
PIPELINE = "model_index.json"  # of a diffusers pipeline


# -- positions


def rope_table(grid: Grid, head_dim: int) -> Tensor:
    """[f·h·w, head_dim / 2, 2]: cosine and sine of each token's angles; the head splits over time, height and width."""
    side = 2 * (head_dim // 6)
    axes = [
        torch.arange(n, dtype=torch.float64)[:, None] * THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for n, dim in zip(grid, (head_dim - 2 * side, side, side), strict=True)
    ]
    f, h, w = grid
    angles = torch.cat(
        [
            axes[0][:, None, None].expand(f, h, w, -1),
            axes[1][None, :, None].expand(f, h, w, -1),
            axes[2][None, None, :].expand(f, h, w, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def sinusoid(timesteps: Tensor, dim: int) -> Tensor:
    """[B, S] in [0, 1] → [B, S, dim]; in diffusers' fp32, because the rounding of 1000·t shows in the output."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    phase = (1000.0 * timesteps.float())[..., None] * torch.exp(-math.log(THETA) * steps / half)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


# -- one vector a stream, over that stream's tokens


def streamwise(
    function: Callable[..., Tensor], tokens: Sequence[Tensor], vectors: Sequence[Tensor], lengths: Sequence[int]
) -> Tensor:
    """Apply `function` to tokens `[B, T, D]` and vectors `[B, S, D]`, broadcast by views and never made per token."""
    if len(set(lengths)) == 1:
        views = [x.unflatten(1, (len(lengths), -1)) for x in tokens]
        return function(*views, *[vector[:, :, None] for vector in vectors]).flatten(1, 2)
    rows = zip(*[x.split(tuple(lengths), dim=1) for x in tokens], strict=True)
    return torch.cat([function(*row, *[v[:, i, None] for v in vectors]) for i, row in enumerate(rows)], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, lengths: Sequence[int], eps: float) -> Tensor:
    """Return norm(x)·(1 + scale) + shift in fp32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return streamwise(lambda n, a, b: torch.addcmul(a, n, b), [normed], [shift, 1 + scale], lengths)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, *, lengths: Sequence[int]) -> Tensor:
    """Return x + y·gate, computed in fp32, in the dtype of x."""
    return streamwise(lambda a, b, g: torch.addcmul(a, b, g), [x.float(), y.float()], [gate], lengths).to(x.dtype)


# -- the block


class Attention(nn.Module):
    """Projections and norms of one attention; q and k are normed over all heads together."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def normed(self, x: Tensor, norm: nn.RMSNorm, rope: Tensor | None = None) -> Tensor:
        return norm_heads(x, norm.weight, rope, heads=self.heads, eps=norm.eps)


class SelfAttention(Attention):
    """Every token attends every token, or stream 0 only itself."""

    first_attends_all: bool = True

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        lengths, part = tokens.lengths, scope_copy(x, tokens, self.q, self.k, self.v)
        q = self.normed(self.q(x, lengths, part), self.norm_q, tokens.rope)
        k = self.normed(self.k(x, lengths, part), self.norm_k, tokens.rope)
        v = self.split(self.v(x, lengths, part))
        if self.first_attends_all or len(lengths) == 1:
            y = attention(q, k, v, tokens.kernel)
        else:
            n = lengths[0]
            own = attention(q[:, :n], k[:, :n], v[:, :n], tokens.kernel)
            y = torch.cat([own, attention(q[:, n:], k, v, tokens.kernel)], dim=1)
        return self.o(y.flatten(2), lengths)


class CrossAttention(Attention):
    """Every token attends the text."""

    def forward(self, x: Tensor, context: Tensor, tokens: Tokens) -> Tensor:
        context, bias = fold_padding(context)
        text, part = (context.shape[1],), scope_copy(x, tokens, self.q)
        q = self.normed(self.q(x, tokens.lengths, part), self.norm_q)
        k = self.normed(self.k(context, text), self.norm_k)
        y = attention(q, k, self.split(self.v(context, text)), tokens.kernel, bias)
        return self.o(y.flatten(2), tokens.lengths)


class FeedForward(nn.Sequential):
    """The activation is the second projection's, which keeps what goes into it; its place keeps the published names."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(Linear(width, inner), nn.Identity(), Linear(inner, width))

    def forward(self, x: Tensor, tokens: Tokens, *, wanted: bool) -> Tensor:
        inner = self[0](x, tokens.lengths, scope_copy(x, tokens, self[0]))
        return self[2](inner, tokens.lengths, gelu=True, wanted=wanted)


class WanBlock(Block):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.eps = config.eps
        self.self_attn = SelfAttention(width, heads, config.eps)
        self.cross_attn = CrossAttention(width, heads, config.eps)
        self.norm3 = nn.LayerNorm(width, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))

    def compute(self, hidden: Tensor, modulation: Tensor, context: Tensor, tokens: Tokens) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + modulation).unbind(2)  # [B, S, D]
        lengths, dtype = tokens.lengths, hidden.dtype
        x = modulate(hidden, shift, scale, lengths=lengths, eps=self.eps).to(dtype)
        hidden = add_gated(hidden, self.self_attn(x, tokens), gate, lengths=lengths)
        hidden = hidden + self.cross_attn(self.norm3(hidden.float()).to(dtype), context, tokens)
        x = modulate(hidden, ffn_shift, ffn_scale, lengths=lengths, eps=self.eps).to(dtype)
        wanted = not tokens.again or ffn_gate.requires_grad  # a gate that trains keeps what it multiplies
        return add_gated(hidden, self.ffn(x, tokens, wanted=wanted), ffn_gate, lengths=lengths)


# -- the ends


def patchify(x: Tensor, patch: Grid) -> Tensor:
    """[B, C, F, H, W] → [B, L, C·patch]."""
    (_, _, f, h, w), (pf, ph, pw) = x.shape, patch
    split = x.unflatten(4, (w // pw, pw)).unflatten(3, (h // ph, ph)).unflatten(2, (f // pf, pf))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """[B, L, patch·C] → [B, C·F·H·W]; the head's channels come last within a patch."""
    return x.unflatten(2, (*patch, -1)).unflatten(1, grid).permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(1)


class Embed(nn.Module):
    """Latents, timesteps and text to what the blocks take."""

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
        self.stream_embedding = stream_embeddings(streams[1:], width)

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor, *, layout: StreamLayout, dtype: torch.dtype) -> State:
        temb = self.time_embedding(sinusoid(timesteps, self.freq_dim))
        modulation = self.time_projection(temb).unflatten(2, (6, -1))
        rows, _ = fold_padding(text.to(dtype))
        context = unfold_padding(self.text_embedding(rows), text.shape[1])
        return self.embed(x, layout).to(dtype), modulation, context, temb

    def embed(self, x: Tensor, layout: StreamLayout) -> Tensor:
        """[B, N] → [B, T, D]; a stream's embedding is nothing but another bias."""
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        biases = [bias, *(bias + self.stream_embedding[name] for name in layout.names[1:])]
        patches = [patchify(stream.to(weight.dtype), layout.patch) for stream in layout.unpack(x)]
        return torch.cat([F.linear(p, weight, b) for p, b in zip(patches, biases, strict=True)], dim=1)


class Head(nn.Module):
    """Tokens to velocity, each stream by itself."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.width, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.width) / math.sqrt(config.width))

    def forward(self, hidden: Tensor, temb: Tensor, *, layout: StreamLayout) -> Tensor:
        shift, scale = (self.modulation + temb[:, :, None]).unbind(2)  # [B, S, D]
        y = self.head(modulate(hidden, shift, scale, lengths=layout.lengths, eps=self.eps))
        parts = y.split(layout.lengths, dim=1)
        return torch.cat([unpatchify(p, g, layout.patch) for p, g in zip(parts, layout.grids, strict=True)], dim=1)


def _has_two_experts(folder: Path) -> bool:
    """In diffusers' layout by the pipeline's own list, in Wan's by its folders."""
    index = read_object(folder / PIPELINE) if (folder / PIPELINE).is_file() else {}
    return any(index.get("transformer_2") or ()) or (folder / "high_noise_model").is_dir()


class WanModel(VideoModel):
    """Wan 2.1 T2V, 1.3B and 14B and anything of their shape."""

    text_len = TEXT_LEN
    sampling: ClassVar[SamplingDefaults] = SamplingDefaults(negative_prompt=NEGATIVE_PROMPT)

    def __init__(
        self, config: WanConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.config, self.streams, self.kernel = config, tuple(streams), kernel
        self.embed = Embed(config, self.streams)
        self.blocks = nn.ModuleDict({str(index): WanBlock(config) for index in range(config.num_layers)})
        self.head = Head(config)
        self.rgb_attends_aux = rgb_attends_aux
        for block in self.blocks.values():
            block.self_attn.first_attends_all = rgb_attends_aux
        self._ropes: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, streams: Sequence[str], rgb_attends_aux: bool = True, attention: str = "auto"
    ) -> WanModel:
        return cls(WanConfig.read(config), streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    @classmethod
    def stored_names(cls, stored: Iterable[str]) -> dict[str, str]:
        return internal_names(stored)

    @classmethod
    def read_config(cls, path: str | Path) -> dict[str, Any]:
        """From a diffusers pipeline, its transformer folder, an original folder, or a single file's shapes."""
        folder = resolve(path, only=("config.json", "transformer/config.json", PIPELINE))
        if folder.is_file():
            source = WeightSource(folder, internal_names)
            try:
                return config_from_shapes({name: source.shape(name) for name in source.names()})
            except KeyError as fault:
                raise UserError(f"model.path: {folder} holds no Wan model: {fault.args[0]} is not in it") from fault
        if _has_two_experts(folder):
            raise UserError(
                f"model.path: {path} holds two models, each for a range of noise (Wan 2.2 A14B), of which one would be "
                "trained; use a Wan of one transformer, such as Wan-AI/Wan2.1-T2V-14B-Diffusers"
            )
        found = [file for file in (folder / "transformer" / "config.json", folder / "config.json") if file.is_file()]
        if not found:
            raise UserError(f"model.path: {path} holds neither transformer/config.json nor config.json")
        return read_object(found[0])

    @property
    def patch(self) -> Grid:
        return self.config.patch_size

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels

    @property
    def text_dim(self) -> int:
        return self.config.text_dim

    @property
    def vae_stride(self) -> Grid:
        return (4, 16, 16) if self.config.in_channels == 48 else (4, 8, 8)

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        limit = self.config.rope_max_seq_len
        if any(n > limit for grid in layout.grids for n in grid):
            raise UserError(f"data: a clip of {layout.grids} tokens is longer than the model's {limit} positions")
        key = (layout.grids, device)
        if key not in self._ropes:
            table = torch.cat([rope_table(grid, self.config.attention_head_dim) for grid in layout.grids])
            self._ropes[key] = table.to(device)
            if len(self._ropes) > 4:  # 34 MB each at 480×832×81, joint
                self._ropes.popitem(last=False)
        self._ropes.move_to_end(key)
        kernel = pick_kernel(self.kernel, device, self.matmul_dtype, self.config.attention_head_dim)
        return Tokens(self._ropes[key], layout.lengths, kernel)

    def state_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> State:
        width, streams = self.config.width, len(layout.names)
        with torch.device("meta"):
            return (
                torch.empty(batch, layout.tokens, width, dtype=dtype),
                torch.empty(batch, streams, 6, width),
                torch.empty(batch, self.text_len, width, dtype=dtype),
                torch.empty(batch, streams, width),
            )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep norms, tables and time embedding in fp32, as diffusers does.

        The time projection too, as in the original, and the thin ends (patches, head), which meet fp32 latents.
        """
        parts = name.split(".")
        matmul = parts[-1] in ("weight", "bias") and (parts[-2] in ("q", "k", "v", "o") or "ffn" in parts)
        return dtype if matmul or "text_embedding" in parts else torch.float32

    def dimensions(self) -> Dimensions:
        config, patch = self.config, math.prod(self.config.patch_size)
        return Dimensions(
            width=config.width,
            ffn=config.ffn_dim,
            heads=config.num_attention_heads,
            blocks=config.num_layers,
            text_len=self.text_len,
            text_dim=config.text_dim,
            patch_in=config.in_channels * patch,
            patch_out=config.out_channels * patch,
            first_attends_all=self.rgb_attends_aux,
            adapters=adapter_shapes(self),
        )

    def rebuild_buffers(self) -> None:
        self._ropes.clear()

    @classmethod
    def load_vae(cls, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Vae:
        from transpixeler.families.wan import encoders

        return encoders.load_vae(path, device=device, dtype=dtype)

    @classmethod
    def load_text_encoder(cls, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        from transpixeler.families.wan import encoders

        return encoders.load_text_encoder(path, device=device, dtype=dtype)

    @classmethod
    def clean_caption(cls, text: str) -> str:
        from transpixeler.families.wan import encoders

        return encoders.clean_caption(text)

    @classmethod
    def vae_fingerprint(cls, path: str | Path, digest: Digest = file_digest) -> str:
        from transpixeler.families.wan import encoders

        return encoders.vae_fingerprint(path, digest)

    @classmethod
    def text_fingerprint(cls, path: str | Path, digest: Digest = file_digest) -> str:
        from transpixeler.families.wan import encoders

        return encoders.text_fingerprint(path, digest)

    @classmethod
    def vae_geometry(cls, path: str | Path) -> tuple[Grid, int]:
        from transpixeler.families.wan import encoders

        return encoders.vae_geometry(path)
