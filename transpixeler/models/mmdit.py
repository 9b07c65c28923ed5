"""An MMDiT as several families have it: text flows through double-stream blocks, then through single-stream ones.

In: packed noisy latents `[B, N]`, timesteps `[B, G]`, text `[B, L, D]`, its true lengths `[B]` where it is masked, and
pooled text. Out: packed velocity `[B, N]`. The sequence is the streams' tokens, then the text's: published code often
has the text first, which a softmax does not mind. Text stands at position 0, where nothing turns.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.models import backbone
from transpixeler.models.attention import pick_kernel
from transpixeler.models.backbone import QKV, Backbone, Block, Flow
from transpixeler.models.family import Field
from transpixeler.models.fused import rotate
from transpixeler.models.linear import FeedForward, Linear, project_seen, project_shared
from transpixeler.models.modulation import add_gated, modulate, sinusoid
from transpixeler.models.patches import patchify, unpatchify
from transpixeler.models.pieces import is_cut
from transpixeler.models.streams import Grid, Segment, StreamLayout, stream_embeddings
from transpixeler.models.tokens import Tokens

EPS = 1e-6
THETA = 10000.0
ROPES = 4  # layouts whose positions are remembered


@dataclass(frozen=True)
class Sizes:
    """The shape of a model."""

    heads: int
    axes: tuple[int, int, int]  # a head's channels for the positions in time, height and width
    layers: int
    single_layers: int
    inner: int  # width of the feed-forward's inside
    channels: int  # of a latent
    time_frequencies: int  # channels of the sinusoids of timestep and guidance
    guidance: float | None = None  # what a distilled model is told; None where it has no place for it
    theta: float = THETA  # slowness of the slowest turn of the positions
    halves: bool = False  # a head's first half turns with its second, in place of neighbouring channels
    causal: bool = False  # no latent frame sees later ones
    channels_last: bool = False  # of the numbers in a patch, those of one cell stand together

    @property
    def head_dim(self) -> int:
        return sum(self.axes)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def rope_table(segment: Segment, axes: Sequence[int], device: torch.device, *, theta: float = THETA) -> Tensor:
    """[f·h·w, head_dim / 2, 2]: cosine and sine of each token's angles. axes: a head's channels for each position."""
    places = torch.cartesian_prod(*segment.positions())
    parts = []
    for axis, dim in enumerate(axes):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts.append(places[:, axis, None] * frequencies)
    angles = torch.cat(parts, dim=1).to(device)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


# -- blocks


class Heads(nn.Module):
    """Split, norm and rotate queries and keys, each head by itself."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.halves = sizes.heads, sizes.halves
        self.q_norm = nn.Parameter(torch.ones(sizes.head_dim))
        self.k_norm = nn.Parameter(torch.ones(sizes.head_dim))

    def split(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, 3·D] → q, k and v [B, T, H, d]; the first tokens turn, as many as `rope` has."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, dim=-1))
        return self._turned(q, self.q_norm, rope).to(v.dtype), self._turned(k, self.k_norm, rope).to(v.dtype), v

    def _turned(self, x: Tensor, norm: Tensor, rope: Tensor | None) -> Tensor:
        x = F.rms_norm(x.float(), norm.shape, norm, EPS)
        if self.halves:  # queries and keys in another order alike: their products do not change
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        if rope is None:
            return x
        if len(rope) == x.shape[1]:
            return rotate(x, rope)
        return torch.cat([rotate(x[:, : len(rope)], rope), x[:, len(rope) :]], dim=1)


class Branch(Heads):
    """One half of a double block: what acts on the streams alone, or on the text alone."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        width = sizes.width
        self.mod = Linear(width, 6 * width)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.mlp = FeedForward(width, sizes.inner)


class TextFlows(Block):
    """A block that changes text too: the flow is the streams' tokens, text, vectors and, of masked text, lengths."""

    carried = 2
    grouped = (2,)
    attends = ("joint",)

    def text_lengths(self, flow: Flow) -> Tensor | None:
        """Return how many tokens of text are valid, where the flow says so."""
        return flow[3] if len(flow) > 3 else None


class DoubleBlock(TextFlows):
    """Streams and text have weights of their own and meet in one softmax."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.img, self.txt = Branch(sizes), Branch(sizes)

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        hidden, text, vectors, *_ = flow
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
        hidden = add_gated(hidden, project_seen(seen, tokens, img.proj), gate, groups=streams)
        text = add_gated(text, txt.proj(read), t_gate, groups=words)

        x = modulate(hidden, mlp_shift, mlp_scale, groups=streams, eps=EPS).to(hidden.dtype)
        y = modulate(text, t_mlp_shift, t_mlp_scale, groups=words, eps=EPS).to(text.dtype)
        hidden = add_gated(hidden, img.mlp(x, tokens, gate=mlp_gate), mlp_gate, groups=streams)
        return hidden, add_gated(text, txt.mlp(y, tokens, gate=t_mlp_gate), t_mlp_gate, groups=words)

    def reads(self, linear: str) -> str:
        return "vectors" if linear.endswith(".mod") else "text" if linear.startswith("txt.") else "streams"


class SingleBlock(TextFlows):
    """Streams and text are one sequence; attention and feed-forward run side by side."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.width, self.inner = width, sizes.inner
        self.heads = Heads(sizes)
        self.mod = Linear(width, 3 * width)
        self.linear1 = Linear(width, 3 * width + sizes.inner)
        self.linear2 = Linear(width + sizes.inner, width)

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        hidden, text, vectors, *_ = flow
        groups = (*tokens.groups, text.shape[1])
        active = F.silu(torch.cat([vectors, vectors[:, tokens.text_group, None]], dim=1))
        modulation = self.mod(active)  # [B, G + 1, 3 · D]
        both, x = self._normed(hidden, text, modulation, groups)
        if is_cut(hidden, self.chunk_for(tokens)):  # `finish` makes the rest piece by piece
            qkv = self.linear1(x, tokens.lengths, rows=slice(0, 3 * self.width))
            return *self.heads.split(qkv, tokens.rope), (modulation,)
        qkv, mlp = self.linear1(x, tokens.lengths).split([3 * self.width, self.inner], dim=-1)
        return *self.heads.split(qkv, tokens.rope), (modulation, both, mlp)

    def _normed(self, hidden: Tensor, text: Tensor, modulation: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return streams and text as one sequence, and that modulated."""
        shift, scale, _ = modulation.chunk(3, dim=-1)
        both = torch.cat([hidden, text], dim=1)
        return both, modulate(both, shift, scale, groups=groups, eps=EPS).to(both.dtype)

    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        (hidden, text, *_), (modulation, *made) = flow, others
        groups = (*tokens.groups, text.shape[1])
        if made:
            both, mlp = made
        else:
            both, x = self._normed(hidden, text, modulation, groups)
            mlp = self.linear1(x, tokens.lengths, rows=slice(3 * self.width, None))
        gate = modulation.chunk(3, dim=-1)[2]
        y = self.linear2(torch.cat([seen.flatten(2), F.gelu(mlp, approximate="tanh")], dim=-1), tokens.lengths)
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

    def __init__(self, sizes: Sizes, patch: Grid, fields: Sequence[Field], streams: Sequence[str]) -> None:
        super().__init__()
        text, pooled, *_ = fields
        self.sizes, self.patch, self.masked = sizes, patch, text.masked
        self.img_in = nn.Linear(sizes.channels * math.prod(patch), sizes.width)
        self.txt_in = Linear(text.width, sizes.width)
        self.time_in = Embedder(sizes.time_frequencies, sizes.width)
        self.guidance_in = Embedder(sizes.time_frequencies, sizes.width) if sizes.guidance is not None else None
        self.vector_in = Embedder(pooled.width, sizes.width)
        self.stream_embedding = stream_embeddings(streams[1:], sizes.width)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        text: Tensor,
        *others: Tensor,
        layout: StreamLayout,
        dtype: torch.dtype,
    ) -> Flow:
        """others: the lengths of masked text, pooled text, and what a model is shown beside the latents."""
        lengths, (pooled, *shown) = others[: self.masked], others[self.masked :]
        words = self.read_text(text.to(dtype), lengths, timesteps[:, layout.text_group])
        return self.embed(x, layout, *shown).to(dtype), words, self.vectors(timesteps, pooled), *lengths

    def vectors(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """[B, G] and [B, width] → [B, G, D]."""
        vectors = self.time_in(self._sinusoid(timesteps))
        if self.guidance_in is not None:
            guidance = torch.tensor(self.sizes.guidance, device=timesteps.device)
            vectors = vectors + self.guided(timesteps, self.guidance_in(self._sinusoid(guidance)))
        return vectors + self.vector_in(pooled.float())[:, None]

    def guided(self, timesteps: Tensor, guidance: Tensor) -> Tensor:
        """Return the guidance's vector [D] for time groups [B, G]: the same for all."""
        return guidance

    def read_text(self, text: Tensor, lengths: Sequence[Tensor], times: Tensor) -> Tensor:
        """[B, L, width of text] → [B, L, D]. lengths: of masked text, [B]. times: [B], of the text."""
        return self.txt_in(text)

    def _sinusoid(self, values: Tensor) -> Tensor:
        return sinusoid(values, self.sizes.time_frequencies)

    def latents(self, x: Tensor, layout: StreamLayout, *shown: Tensor) -> Sequence[Tensor]:
        """Return the latents [B, C, F, H, W] of each segment, as patches are made of them."""
        return layout.unpack(x)

    def embed(self, x: Tensor, layout: StreamLayout, *shown: Tensor) -> Tensor:
        """[B, N] → [B, T, D]. shown: [B, N'] of fields that stand beside the latents."""
        biases = [0.0, *(self.stream_embedding[name] for name in layout.names[1:])]
        last = self.sizes.channels_last
        parts = self.latents(x, layout, *shown)
        patches = [self.img_in(patchify(part.float(), self.patch, channels_last=last)) for part in parts]
        pairs = zip(patches, layout.segments, strict=True)
        return torch.cat([patch + biases[segment.stream] for patch, segment in pairs], dim=1)


class Head(backbone.Head):
    """Tokens to velocity, each stream by itself."""

    def __init__(self, sizes: Sizes, patch: Grid) -> None:
        super().__init__()
        self.patch, self.channels_last = patch, sizes.channels_last
        self.modulation = nn.Linear(sizes.width, 2 * sizes.width)
        self.linear = nn.Linear(sizes.width, sizes.channels * math.prod(patch))

    def values(self, *flow: Tensor, groups: Sequence[int]) -> Tensor:
        hidden, _, vectors, *_ = flow
        shift, scale = self.modulation(F.silu(vectors)).chunk(2, dim=-1)  # [B, G, D]
        return self.linear(modulate(hidden, shift, scale, groups=groups, eps=EPS))

    def pack(self, values: Tensor, layout: StreamLayout) -> Tensor:
        pairs = zip(values.split(layout.segment_lengths, dim=1), layout.grids, strict=True)
        last = self.channels_last
        return torch.cat([unpatchify(part, grid, self.patch, channels_last=last) for part, grid in pairs], dim=1)


class MMDiT(Backbone):
    """Double blocks `0, 1, …`, then single blocks `s0, s1, …`. A family gives `patch`, its sizes and fields."""

    lora_targets = ("img.qkv", "img.proj", "img.mlp.0", "img.mlp.2", "linear1", "linear2")
    embed_class: ClassVar[type[Embed]] = Embed
    carried = TextFlows.carried
    grouped = TextFlows.grouped

    def __init__(
        self, sizes: Sizes, fields: tuple[Field, ...], *, streams: Sequence[str], rgb_attends_aux: bool, kernel: str
    ) -> None:
        """fields: text, pooled text, and those that a family's own `embed_class` takes."""
        super().__init__()
        self.sizes, self.fields, self.streams, self.kernel = sizes, fields, tuple(streams), kernel
        self.width, self.heads = sizes.width, sizes.heads
        self.rgb_attends_aux = rgb_attends_aux
        self.embed = self.embed_class(sizes, self.patch, fields, self.streams)
        double = {str(index): DoubleBlock(sizes) for index in range(sizes.layers)}
        single = {f"s{index}": SingleBlock(sizes) for index in range(sizes.single_layers)}
        self.blocks = nn.ModuleDict(double | single)
        self.head = Head(sizes, self.patch)
        self._ropes: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        axes, theta, key = self.sizes.axes, self.sizes.theta, (layout.segments, device)
        if key not in self._ropes:
            self._ropes[key] = torch.cat([rope_table(part, axes, device, theta=theta) for part in layout.segments])
            if len(self._ropes) > ROPES:
                self._ropes.popitem(last=False)
        self._ropes.move_to_end(key)
        rope = self._ropes[key]
        kernel = pick_kernel(self.kernel, device, self.matmul_dtype, self.sizes.head_dim)
        causal = self.sizes.causal
        return Tokens.of(layout, rope, kernel=kernel, rgb_attends_aux=self.rgb_attends_aux, causal=causal)

    def flow_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        text = self.fields[0]
        with torch.device("meta"):
            lengths = (torch.empty(batch, dtype=torch.int64),) if text.masked else ()
            return (
                torch.empty(batch, layout.tokens, self.width, dtype=dtype),
                torch.empty(batch, text.length or 1, self.width, dtype=dtype),
                torch.empty(batch, len(layout.groups), self.width),
                *lengths,
            )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep in fp32 norms, whatever makes or reads vectors, and the thin ends, which meet fp32 latents."""
        module, _, leaf = name.rpartition(".")
        matmul = leaf in ("weight", "bias") and module.split(".")[-1] in ("qkv", "proj", "0", "2", "linear1", "linear2")
        return dtype if matmul or module == "embed.txt_in" else torch.float32

    def end_reads(self, name: str) -> str:
        return {"embed.txt_in": "text", "embed.img_in": "streams", "head.linear": "streams"}.get(name, "vectors")

    def rebuild_buffers(self) -> None:
        self._ropes.clear()
