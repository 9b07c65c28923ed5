"""FLUX.1 in three parts, over any number of streams: text flows through its blocks, beside the streams and among them.

In: packed noisy latents `[B, N]` of images, timesteps `[B, G]`, text `[B, L, joint_attention_dim]` and pooled text `[B,
pooled_projection_dim]`. Out: packed velocity `[B, N]`. The sequence is the streams' tokens, then the text's: the
published code has the text first, which a softmax does not mind. Text stands at position 0, where nothing turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.families.flux.config import EPS, GUIDANCE, PATCH, THETA, TIME_FREQUENCIES, FluxConfig
from transpixeler.models.attention import pick_kernel
from transpixeler.models.backbone import QKV, Backbone, Block, Flow
from transpixeler.models.family import Field
from transpixeler.models.fused import rotate
from transpixeler.models.linear import FeedForward, Linear, project_shared
from transpixeler.models.modulation import add_gated, modulate
from transpixeler.models.streams import Grid, Segment, StreamLayout, Tokens, stream_embeddings

# -- positions and times


def rope_table(segment: Segment, axes: Sequence[int], device: torch.device) -> Tensor:
    """[f·h·w, head_dim / 2, 2]: cosine and sine of each token's angles. axes: a head's channels for each position."""
    places = torch.cartesian_prod(*segment.positions())
    parts = []
    for axis, dim in enumerate(axes):
        frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts.append(places[:, axis, None] * frequencies)
    angles = torch.cat(parts, dim=1).to(device)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def sinusoid(values: Tensor) -> Tensor:
    """[…] → […, 256] of 1000 times the values, in fp32."""
    half = TIME_FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    phase = (1000.0 * values.float())[..., None] * torch.exp(-math.log(THETA) * steps / half)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


# -- blocks


class Heads(nn.Module):
    """Split, norm and rotate queries and keys, each head by itself."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_norm = nn.Parameter(torch.ones(config.attention_head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.attention_head_dim))

    def split(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, 3·D] → q, k and v [B, T, H, d]; the first tokens turn, as many as `rope` has."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, dim=-1))
        return self._turned(q, self.q_norm, rope).to(v.dtype), self._turned(k, self.k_norm, rope).to(v.dtype), v

    @staticmethod
    def _turned(x: Tensor, norm: Tensor, rope: Tensor | None) -> Tensor:
        x = F.rms_norm(x.float(), norm.shape, norm, EPS)
        if rope is None:
            return x
        if len(rope) == x.shape[1]:
            return rotate(x, rope)
        return torch.cat([rotate(x[:, : len(rope)], rope), x[:, len(rope) :]], dim=1)


class Branch(Heads):
    """One half of a double block: what acts on the streams alone, or on the text alone."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        width = config.width
        self.mod = Linear(width, 6 * width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.mlp = FeedForward(width, config.inner)


class DoubleBlock(Block):
    """Streams and text have weights of their own and meet in one softmax."""

    carried = 2
    grouped = (2,)
    attends = ("joint",)

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.img, self.txt = Branch(config), Branch(config)

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        hidden, text, vectors = flow
        active, img, txt = F.silu(vectors), self.img, self.txt
        modulation, t_modulation = img.mod(active), txt.mod(active[:, tokens.text_group, None])
        shift, scale, *_ = modulation.chunk(6, dim=-1)  # [B, G, D]
        t_shift, t_scale, *_ = t_modulation.chunk(6, dim=-1)
        x = modulate(hidden, shift, scale, groups=tokens.groups, eps=EPS).to(hidden.dtype)
        y = modulate(text, t_shift, t_scale, groups=(text.shape[1],), eps=EPS).to(text.dtype)
        (projected,) = project_shared(x, tokens, img.qkv)
        ours = img.split(projected, tokens.rope)
        theirs = txt.split(txt.qkv(y), None)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(ours, theirs, strict=True))
        return q, k, v, (modulation, t_modulation)

    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        hidden, text, *_ = flow
        streams, words, img, txt = tokens.groups, (text.shape[1],), self.img, self.txt
        modulation, t_modulation = others
        gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)[2:]
        t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = t_modulation.chunk(6, dim=-1)[2:]
        seen, read = seen.flatten(2).tensor_split([hidden.shape[1]], dim=1)
        hidden = add_gated(hidden, img.proj(seen, tokens.lengths), gate, groups=streams)
        text = add_gated(text, txt.proj(read), t_gate, groups=words)

        x = modulate(hidden, mlp_shift, mlp_scale, groups=streams, eps=EPS).to(hidden.dtype)
        y = modulate(text, t_mlp_shift, t_mlp_scale, groups=words, eps=EPS).to(text.dtype)
        hidden = add_gated(hidden, img.mlp(x, tokens, gate=mlp_gate), mlp_gate, groups=streams)
        return hidden, add_gated(text, txt.mlp(y, tokens, gate=t_mlp_gate), t_mlp_gate, groups=words)

    def reads(self, linear: str) -> str:
        return "vectors" if linear.endswith(".mod") else "text" if linear.startswith("txt.") else "streams"


class SingleBlock(Block):
    """Streams and text are one sequence; attention and feed-forward run side by side."""

    carried = 2
    grouped = (2,)
    attends = ("joint",)

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.width, self.inner = width, config.inner
        self.heads = Heads(config)
        self.mod = Linear(width, 3 * width)
        self.linear1 = Linear(width, 3 * width + config.inner)
        self.linear2 = Linear(width + config.inner, width)

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        hidden, text, vectors = flow
        groups = (*tokens.groups, text.shape[1])
        active = F.silu(torch.cat([vectors, vectors[:, tokens.text_group, None]], dim=1))
        shift, scale, gate = self.mod(active).chunk(3, dim=-1)  # [B, G + 1, D]
        both = torch.cat([hidden, text], dim=1)
        x = modulate(both, shift, scale, groups=groups, eps=EPS).to(both.dtype)
        qkv, mlp = self.linear1(x, tokens.lengths).split([3 * self.width, self.inner], dim=-1)
        return *self.heads.split(qkv, tokens.rope), (both, mlp, gate)

    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        (hidden, text, *_), (both, mlp, gate) = flow, others
        y = self.linear2(torch.cat([seen.flatten(2), F.gelu(mlp, approximate="tanh")], dim=-1), tokens.lengths)
        groups = (*tokens.groups, text.shape[1])
        hidden, text = add_gated(both, y, gate, groups=groups).tensor_split([hidden.shape[1]], dim=1)
        return hidden, text

    def reads(self, linear: str) -> str:
        return "vectors" if linear == "mod" else "both"


# -- the ends


class Embedder(nn.Module):
    """An MLP that makes a vector of the model's width."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Embed(nn.Module):
    """Latents, timesteps and text to what the blocks take."""

    def __init__(self, config: FluxConfig, streams: Sequence[str]) -> None:
        super().__init__()
        width = config.width
        self.img_in = nn.Linear(config.in_channels, width)
        self.txt_in = Linear(config.joint_attention_dim, width)
        self.time_in = Embedder(TIME_FREQUENCIES, width)
        self.guidance_in = Embedder(TIME_FREQUENCIES, width) if config.guidance_embeds else None
        self.vector_in = Embedder(config.pooled_projection_dim, width)
        self.stream_embedding = stream_embeddings(streams[1:], width)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        *,
        layout: StreamLayout,
        dtype: torch.dtype,
    ) -> Flow:
        vectors = self.time_in(sinusoid(timesteps)) + self.vector_in(pooled.float())[:, None]  # [B, G, D]
        if self.guidance_in is not None:
            vectors = vectors + self.guidance_in(sinusoid(torch.tensor(GUIDANCE, device=x.device)))
        return self.embed(x, layout).to(dtype), self.txt_in(text.to(dtype)), vectors

    def embed(self, x: Tensor, layout: StreamLayout) -> Tensor:
        """[B, N] → [B, T, D]."""
        biases = [0.0, *(self.stream_embedding[name] for name in layout.names[1:])]
        patches = [self.img_in(patchify(part.float())) for part in layout.unpack(x)]
        pairs = zip(patches, layout.segments, strict=True)
        return torch.cat([patch + biases[segment.stream] for patch, segment in pairs], dim=1)


def patchify(x: Tensor) -> Tensor:
    """[B, C, F, H, W] → [B, L, C·patch]."""
    (_, _, f, h, w), (pf, ph, pw) = x.shape, PATCH
    split = x.unflatten(4, (w // pw, pw)).unflatten(3, (h // ph, ph)).unflatten(2, (f // pf, pf))
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: Grid) -> Tensor:
    """[B, L, C·patch] → [B, C·F·H·W]."""
    return x.unflatten(2, (-1, *PATCH)).unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(1)


class Head(nn.Module):
    """Tokens to velocity, each stream by itself."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.in_channels)

    def forward(self, hidden: Tensor, text: Tensor, vectors: Tensor, *, layout: StreamLayout) -> Tensor:
        shift, scale = self.modulation(F.silu(vectors)).chunk(2, dim=-1)  # [B, G, D]
        y = self.linear(modulate(hidden, shift, scale, groups=layout.group_lengths, eps=EPS))
        parts = y.split(layout.segment_lengths, dim=1)
        return torch.cat([unpatchify(part, grid) for part, grid in zip(parts, layout.grids, strict=True)], dim=1)


class FluxModel(Backbone):
    """FLUX.1 dev and schnell: double blocks `0, 1, …`, then single blocks `s0, s1, …`."""

    family = "flux"
    lora_targets = ("img.qkv", "img.proj", "img.mlp.0", "img.mlp.2", "linear1", "linear2")
    patch = PATCH
    carried = 2
    grouped = (2,)

    def __init__(
        self, config: FluxConfig, *, streams: Sequence[str], rgb_attends_aux: bool = True, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.config, self.streams, self.kernel = config, tuple(streams), kernel
        self.fields = fields(config)
        self.width, self.heads = config.width, config.num_attention_heads
        self.rgb_attends_aux = rgb_attends_aux
        self.embed = Embed(config, self.streams)
        double = {str(index): DoubleBlock(config) for index in range(config.num_layers)}
        single = {f"s{index}": SingleBlock(config) for index in range(config.num_single_layers)}
        self.blocks = nn.ModuleDict(double | single)
        self.head = Head(config)

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        rope = torch.cat([rope_table(part, self.config.axes_dims_rope, device) for part in layout.segments])
        kernel = pick_kernel(self.kernel, device, self.matmul_dtype, self.config.attention_head_dim)
        return Tokens.of(layout, rope, kernel=kernel, rgb_attends_aux=self.rgb_attends_aux)

    def flow_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        with torch.device("meta"):
            return (
                torch.empty(batch, layout.tokens, self.width, dtype=dtype),
                torch.empty(batch, self.config.text_length, self.width, dtype=dtype),
                torch.empty(batch, len(layout.groups), self.width),
            )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep in fp32 norms, whatever makes or reads vectors, and the thin ends, which meet fp32 latents."""
        module, _, leaf = name.rpartition(".")
        matmul = leaf in ("weight", "bias") and module.split(".")[-1] in ("qkv", "proj", "0", "2", "linear1", "linear2")
        return dtype if matmul or module == "embed.txt_in" else torch.float32

    def end_reads(self, name: str) -> str:
        return {"embed.txt_in": "text", "embed.img_in": "streams", "head.linear": "streams"}.get(name, "vectors")

    def rebuild_buffers(self) -> None:
        """Do nothing: positions are computed at each call."""


def fields(config: FluxConfig) -> tuple[Field, ...]:
    """Return T5's text, whose padding is attended as any token, and CLIP's one vector."""
    return (
        Field("text", width=config.joint_attention_dim, length=config.text_length),
        Field("pooled", width=config.pooled_projection_dim),
    )
