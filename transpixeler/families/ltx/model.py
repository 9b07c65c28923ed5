"""LTX-Video in three parts, over any number of streams.

In: packed noisy latents `[B, N]`, timesteps `[B, G]`, text `[B, 128, caption_channels]` and its true lengths `[B]`.
Out: packed velocity `[B, N]`. Streams are concatenated on the sequence and share positions in seconds and pixels; each
time group has its own timestep: modulation is `[B, G, 6, D]` and never made per token.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.families.ltx.config import PATCH, SPAN, TEXT_LEN, THETA, TIME_FREQUENCIES, LtxConfig
from transpixeler.families.ltx.names import NAMES
from transpixeler.models import backbone
from transpixeler.models.attention import cross_attention, length_bias, pick_kernel
from transpixeler.models.backbone import QKV, Backbone, Block, Flow
from transpixeler.models.family import Field
from transpixeler.models.fused import norm_heads
from transpixeler.models.linear import FeedForward, Linear, project_seen, project_shared
from transpixeler.models.modulation import add_gated, modulate, sinusoid
from transpixeler.models.streams import Grid, Segment, StreamLayout, stream_embeddings
from transpixeler.models.tokens import Tokens

FPS = 24.0  # of the clips, where nothing says otherwise
STRIDE: Grid = (8, 32, 32)  # frames, rows and columns of pixels in one latent cell
QK_EPS = 1e-5


# -- positions


def positions_in_pixels(segment: Segment, *, fps: float, causal: bool, device: torch.device) -> Tensor:
    """[f·h·w, 3]: the second, row and column of pixels where each token begins.

    causal: the first latent frame lasts one frame, so the n-th one begins 8n − 7 frames in, not 8n. A last frame that
    stands alone begins where its latent frame's last one does.
    """
    frames, rows, columns = (places.float().to(device) for places in segment.positions())
    later = STRIDE[0] - 1 if segment.alone else 0
    if causal:
        seconds = (frames * STRIDE[0] + 1 - STRIDE[0] + later).clamp(min=0) * (1.0 / fps)
    else:
        seconds = frames * (STRIDE[0] / fps) + later / fps
    return torch.cartesian_prod(seconds, rows * STRIDE[1], columns * STRIDE[2])


def rope_table(positions: Tensor, width: int) -> Tensor:
    """[L, 3] → [L, width / 2, 2]: cosine and sine of each token's angles, over the inner width of all heads.

    Each frequency takes time, height and width in turn; pairs that are left over come first and do not turn. In fp32,
    as the published code does: angles reach 10⁴, where its rounding shows in the output.
    """
    device, count = positions.device, width // 6
    start, end = math.log(1.0, THETA), math.log(THETA, THETA)
    frequencies = THETA ** torch.linspace(start, end, count, device=device, dtype=torch.float32) * math.pi / 2
    fractions = torch.stack([positions[:, axis] / span for axis, span in enumerate(SPAN)], dim=-1)
    angles = (frequencies[:, None] * (fractions[:, None] * 2 - 1)).flatten(1)  # [L, 3 · count]
    angles = F.pad(angles, (width // 2 - angles.shape[1], 0))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


# -- the block


class Attention(nn.Module):
    """Projections and norms of one attention; q and k are normed over all heads together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(width, eps=QK_EPS), nn.RMSNorm(width, eps=QK_EPS)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    """Attention over the tokens of all streams."""

    def qkv(self, x: Tensor, tokens: Tokens) -> QKV:
        q, k, v = project_shared(x, tokens, self.to_q, self.to_k, self.to_v)
        q, k = self.turned(q, self.q_norm, tokens.rope), self.turned(k, self.k_norm, tokens.rope)
        return q, k, self.split(v), ()

    def forward(self, seen: Tensor, tokens: Tokens) -> Tensor:
        return project_seen(seen.flatten(2), tokens, self.to_out)

    def turned(self, x: Tensor, norm: nn.RMSNorm, rope: Tensor) -> Tensor:
        """Norm and rotate x. Angles differ from head to head, so the rotation takes all heads as one wide one."""
        return self.split(norm_heads(x, norm.weight, rope, heads=1, eps=QK_EPS).flatten(2))


class CrossAttention(Attention):
    """Attention of every token to the text up to its length."""

    def forward(self, x: Tensor, context: Tensor, lengths: Tensor, tokens: Tokens) -> Tensor:
        (q,) = project_shared(x, tokens, self.to_q)
        k, v = self.normed(self.to_k(context), self.k_norm), self.split(self.to_v(context))
        y = cross_attention(self.normed(q, self.q_norm), k, v, tokens, length_bias(lengths, context.shape[1]))
        return self.to_out(y.flatten(2), tokens.lengths)

    def normed(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        return norm_heads(x, norm.weight, heads=self.heads, eps=QK_EPS)


class LtxBlock(Block):
    grouped = (1, 4)

    def __init__(self, config: LtxConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.eps = config.norm_eps
        self.attn1 = SelfAttention(width, heads)
        self.attn2 = CrossAttention(width, heads)
        self.ff = FeedForward(width, 4 * width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        hidden, modulation, *_ = flow
        shift, scale = (self.scale_shift_table[:2] + modulation[:, :, :2]).unbind(2)  # [B, G, D]
        x = modulate(hidden, shift, scale, groups=tokens.groups, eps=self.eps, rms=True).to(hidden.dtype)
        return self.attn1.qkv(x, tokens)

    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        hidden, modulation, context, lengths, _ = flow
        gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table[2:] + modulation[:, :, 2:]).unbind(2)
        groups, dtype = tokens.groups, hidden.dtype
        hidden = add_gated(hidden, self.attn1(seen, tokens), gate, groups=groups)
        hidden = hidden + self.attn2(hidden, context, lengths, tokens)
        x = modulate(hidden, ff_shift, ff_scale, groups=groups, eps=self.eps, rms=True).to(dtype)
        return (add_gated(hidden, self.ff(x, tokens, gate=ff_gate), ff_gate, groups=groups),)

    def reads(self, linear: str) -> str:
        return "text" if linear in ("attn2.to_k", "attn2.to_v") else "streams"


# -- the ends


class TimeEmbedding(nn.Module):
    """One MLP for all blocks: a vector for the head, and six times as wide one for the blocks' tables."""

    def __init__(self, width: int) -> None:
        super().__init__()
        embedder = {"linear_1": nn.Linear(TIME_FREQUENCIES, width), "linear_2": nn.Linear(width, width)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedder)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G] in [0, 1] → [B, G, 6, D] and [B, G, D]."""
        embedder = self.emb["timestep_embedder"]
        assert isinstance(embedder, nn.ModuleDict)
        temb = embedder["linear_2"](F.silu(embedder["linear_1"](sinusoid(timesteps, TIME_FREQUENCIES))))
        return self.linear(F.silu(temb)).unflatten(2, (6, -1)), temb


class CaptionProjection(nn.Module):
    """Text to the model's width."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(inputs, width), Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class Embed(nn.Module):
    """Latents, timesteps and text to what the blocks take."""

    def __init__(self, config: LtxConfig, streams: Sequence[str]) -> None:
        super().__init__()
        self.patchify_proj = nn.Linear(config.in_channels, config.width)
        self.adaln_single = TimeEmbedding(config.width)
        self.caption_projection = CaptionProjection(config.caption_channels, config.width)
        self.stream_embedding = stream_embeddings(streams[1:], config.width)

    def forward(
        self, x: Tensor, timesteps: Tensor, text: Tensor, lengths: Tensor, *, layout: StreamLayout, dtype: torch.dtype
    ) -> Flow:
        modulation, temb = self.adaln_single(timesteps)
        context = self.caption_projection(text.to(dtype))
        return self.embed(x, layout).to(dtype), modulation, context, lengths.to(torch.int64), temb

    def embed(self, x: Tensor, layout: StreamLayout) -> Tensor:
        """[B, N] → [B, T, D]; a stream's embedding is nothing but another bias."""
        weight, bias = self.patchify_proj.weight, self.patchify_proj.bias
        biases = [bias, *(bias + self.stream_embedding[name] for name in layout.names[1:])]
        cells = [part.flatten(2).mT.to(weight.dtype) for part in layout.unpack(x)]  # [B, L, C]
        pairs = zip(cells, layout.segments, strict=True)
        return torch.cat([F.linear(cell, weight, biases[segment.stream]) for cell, segment in pairs], dim=1)


class Head(backbone.Head):
    """Tokens to velocity."""

    def __init__(self, config: LtxConfig) -> None:
        super().__init__()
        self.proj_out = nn.Linear(config.width, config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.width) / math.sqrt(config.width))

    def values(self, *flow: Tensor, groups: Sequence[int]) -> Tensor:
        hidden, *_, temb = flow
        shift, scale = (self.scale_shift_table + temb[:, :, None]).unbind(2)  # [B, G, D]
        return self.proj_out(modulate(hidden, shift, scale, groups=groups, eps=1e-6))

    def pack(self, values: Tensor, layout: StreamLayout) -> Tensor:
        return torch.cat([part.mT.flatten(1) for part in values.split(layout.segment_lengths, dim=1)], dim=1)


class LtxModel(Backbone):
    """LTX-Video 0.9.x, 2B and 13B and anything of their shape."""

    family = "ltx"
    grouped = LtxBlock.grouped
    lora_targets = tuple(name for name in NAMES.block_linears if name not in ("attn2.to_k", "attn2.to_v"))
    patch = PATCH

    def __init__(
        self,
        config: LtxConfig,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        kernel: str = "auto",
        fps: float = FPS,
    ) -> None:
        """fps: frames in a second of the clips, because positions are in seconds."""
        super().__init__()
        self.config, self.streams, self.kernel, self.fps = config, tuple(streams), kernel, fps
        self.fields = (text_field(config),)
        self.width, self.heads = config.width, config.num_attention_heads
        self.rgb_attends_aux = rgb_attends_aux
        self.embed = Embed(config, self.streams)
        self.blocks = nn.ModuleDict({str(index): LtxBlock(config) for index in range(config.num_layers)})
        self.head = Head(config)
        self._ropes: OrderedDict[tuple[tuple[Segment, ...], float, torch.device], Tensor] = OrderedDict()

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        key = (layout.segments, self.fps, device)
        if key not in self._ropes:
            places = [segment._replace(stream=0) for segment in layout.segments]  # equal streams share a table
            tables = {segment: self._rope(segment, device) for segment in set(places)}
            self._ropes[key] = torch.cat([tables[segment] for segment in places])
            if len(self._ropes) > 2:  # 219 MB each on 2B at 1216×704×121, joint
                self._ropes.popitem(last=False)
        self._ropes.move_to_end(key)
        kernel = pick_kernel(self.kernel, device, self.matmul_dtype, self.config.attention_head_dim)
        return Tokens.of(layout, self._ropes[key], kernel=kernel, rgb_attends_aux=self.rgb_attends_aux)

    def _rope(self, segment: Segment, device: torch.device) -> Tensor:
        causal = self.config.causal_temporal_positioning
        return rope_table(positions_in_pixels(segment, fps=self.fps, causal=causal, device=device), self.width)

    def flow_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        width, groups = self.width, len(layout.groups)
        with torch.device("meta"):
            return (
                torch.empty(batch, layout.tokens, width, dtype=dtype),
                torch.empty(batch, groups, 6, width),
                torch.empty(batch, TEXT_LEN, width, dtype=dtype),
                torch.empty(batch, dtype=torch.int64),
                torch.empty(batch, groups, width),
            )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep in fp32 norms, tables, the time embedding, and the thin ends, which meet fp32 latents."""
        parts = name.split(".")
        matmul = "ff" in parts or parts[-2] in ("to_q", "to_k", "to_v", "to_out") or "caption_projection" in parts
        return dtype if matmul and parts[-1] in ("weight", "bias") else torch.float32

    def end_reads(self, name: str) -> str:
        return "text" if "caption_projection" in name else "vectors" if "adaln_single" in name else "streams"

    def rebuild_buffers(self) -> None:
        self._ropes.clear()


def text_field(config: LtxConfig) -> Field:
    """Return the one field that LTX-Video is conditioned on: T5's text, its padding masked."""
    return Field("text", width=config.caption_channels, length=TEXT_LEN, masked=True)
