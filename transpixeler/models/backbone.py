"""Define the backbone: three named parts, run over several streams, cut and wrapped by those names.

In: packed noisy latents, a timestep for each time group, the fields that the family declares. Out: what is predicted.
The pipeline, FSDP, recompute, compile and LoRA know this class and no concrete model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from transpixeler.config.sections import UserError
from transpixeler.models.attention import companions_attention, self_attention
from transpixeler.models.context import Context
from transpixeler.models.divided import Flowing, companions_part, rgb_part
from transpixeler.models.family import Field
from transpixeler.models.pieces import ByToken
from transpixeler.models.rgb_memory import RgbMemory
from transpixeler.models.streams import Grid, StreamLayout
from transpixeler.models.tokens import Tokens

# The flow: the flat tuple of tensors that runs from block to block and from stage to stage, the same for LoRA and for
# full fine-tuning. A plain tuple: pipelining wants no other. Its first `carried` tensors are what blocks change: the
# streams' tokens, and text that flows. Where RGB runs forward only, the companions' tokens come first, then RGB's.
Flow = tuple[Tensor, ...]
Compute = Callable[[Flow, Tokens], Flow]
RunBlock = Callable[["Block", Flow, Tokens], Flow]
QKV = tuple[Tensor, Tensor, Tensor, Flow]  # of the attention among streams, and what the rest of the block takes more


class Block(nn.Module, ABC):
    """One block; `recompute`, when set, decides what of `compute` is kept for the backward pass."""

    recompute: Callable[..., Flow] | None = None
    keeps: Callable[[Flow, Tokens], bool] | None = None  # tells of which flows nothing is recomputed after all
    compiled_inside: bool = False  # what is recomputed is a graph of its own
    chunk: int = 0  # tokens of a microbatch that go through `finish` at a time, where that costs nothing; 0 for all
    carried: int = 1  # tensors of the flow that it changes, the first ones; the same for all blocks of a model
    grouped: tuple[int, ...] = (1,)  # places in the flow of what has a row for each time group, [B, G, …]
    # its attentions: among streams, to text, or "joint": both in one; "image": to an image encoder's tokens
    attends: tuple[str, ...] = ("streams", "text")

    def forward(self, flow: Flow, tokens: Tokens) -> Flow:
        """Return the flow with its carried tensors changed."""
        if tokens.rgb_known:
            return self._beside_known_rgb(flow, tokens)
        if tokens.rgb_forward_only:
            return self._forward_only_rgb(flow, tokens)
        if (recompute := self._recompute(flow, tokens)) is None:
            changed = self.compute(flow, tokens)
        else:
            tokens = tokens._replace(copy_scope=False)  # nothing is kept: copying saves nothing
            changed = recompute(self._twice(self.compute), flow, tokens)
        return (*changed, *flow[len(changed) :])

    def _recompute(self, flow: Flow, tokens: Tokens) -> Callable[..., Flow] | None:
        return None if self.keeps is not None and self.keeps(flow, tokens) else self.recompute

    def _twice(self, compute: Compute) -> Compute:
        """Return what a recomputation calls; a compiler needs no telling what is discarded, and drops it by itself."""
        compiled = self.compiled_inside or torch.compiler.is_compiling()
        return compute if compiled else _Recomputed(compute)

    def compile_inside(self) -> None:
        """Compile what is recomputed, and not what recomputes it: no graph can hold hooks on saved tensors."""
        self.compiled_inside = True
        for name in ("compute", "companions"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def compute(self, flow: Flow, tokens: Tokens) -> Flow:
        """Return the carried tensors of the flow, changed."""
        q, k, v, others = self.qkv(flow, tokens)
        seen = self_attention(q, k, v, tokens, self.text_lengths(flow))
        del q, k, v  # before the rest, which needs the memory
        return self.finish_by_token(flow, seen, others, tokens)

    def finish_by_token(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        """Return the carried tensors of the flow, changed by what was seen, `chunk` tokens at a time."""
        count = len(flow)

        def run(part: Tokens, inputs: Flow) -> Flow:
            return self.finish(inputs[:count], inputs[count], inputs[count + 1 :], part)

        places, texts = frozenset((0, count)), frozenset(range(1, self.carried))
        changes = tuple(range(self.carried))
        return ByToken(run, self, tokens, places, texts, changes, self.chunk_for(tokens))(*flow, seen, *others)

    def chunk_for(self, tokens: Tokens) -> int:
        """Return `chunk` where pieces cost nothing: not where they would be computed again without being asked to."""
        return 0 if tokens.keeps_inside else self.chunk

    @abstractmethod
    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        """Return queries, keys and values `[B, T, H, d]` of the attention among streams, and what `finish` takes more.

        Text that flows comes after the streams.
        """

    @abstractmethod
    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        """Return the carried tensors of the flow, changed by what was seen `[B, T, H, d]`; others: made by `qkv`.

        It acts on each token by itself, and may be given some of them. others: then the same for all tokens.
        """

    def text_lengths(self, flow: Flow) -> Tensor | None:
        """Return how many tokens of text that flows are valid, [B]; None where all are."""
        return None

    def _forward_only_rgb(self, flow: Flow, tokens: Tokens) -> Flow:
        """Run the companions, which see RGB's keys and values, and RGB, and text that flows, without autograd."""
        if (recompute := self._recompute(flow, tokens)) is None:
            rest, q, k, v, *others = self.companions(flow, tokens)
        else:
            again = self._twice(self.companions)
            rest, q, k, v, *others = recompute(again, flow, tokens._replace(copy_scope=False))
        near, first = rgb_part(flow, tokens, self), tokens.rgb()
        known = (k, v) if tokens.rgb_returned else ()
        with torch.no_grad():
            seen = self_attention(q, k, v, first, self.text_lengths(near))
            del q, k, v
            rgb = self.finish_by_token(near, seen, tuple(others), first)
        return rest, *rgb, *flow[self.carried + 1 :], *known

    def _beside_known_rgb(self, flow: Flow, tokens: Tokens) -> Flow:
        """Run the companions alone, beside RGB's keys and values, which come last in the flow."""
        *others, k, v = flow
        return self._companions(tuple(others), k, v, tokens), *others[1:]

    def companions(self, flow: Flow, tokens: Tokens) -> Flow:
        """Return the companions' tokens, changed, and what `qkv` makes of RGB's.

        A recomputation makes RGB's keys and values again from its tokens, and nothing else of RGB.
        """
        with torch.no_grad():
            rgb_q, rgb_k, rgb_v, rgb_others = self.qkv(rgb_part(flow, tokens, self), tokens.rgb())
        return self._companions(flow, rgb_k, rgb_v, tokens), rgb_q, rgb_k, rgb_v, *rgb_others

    def _companions(self, flow: Flow, rgb_k: Tensor, rgb_v: Tensor, tokens: Tokens) -> Tensor:
        """Return the companions' tokens, changed beside RGB's keys and values."""
        far, rest = companions_part(flow, tokens, self), tokens.companions()
        q, k, v, others = self.qkv(far, rest)
        seen = companions_attention(q, k, v, rgb_k, rgb_v, tokens, self.text_lengths(far))
        del q, k, v
        return self.finish_by_token(far, seen, others, rest)[0]

    def reads(self, linear: str) -> str:
        """Return what a linear of this block, by its name in it, reads.

        One of "streams", "joined" (streams that lie in its channels), "text", "both", "image" and "vectors".
        """
        return "streams"

    def repeats(self, module: str) -> int:
        """Return how often a linear or convolution of this block, by its name in it, acts for each token."""
        return 1

    def parts(self) -> Sequence[nn.Module]:
        """Return the modules in it whose shards are gathered apart from the others', where it is a large block."""
        return ()


class _Recomputed:
    """A block's `compute`, which is told from its second call on that its output is discarded."""

    def __init__(self, compute: Compute) -> None:
        self.compute, self.recomputing = compute, False

    def __call__(self, flow: Flow, tokens: Tokens) -> Flow:
        tokens, self.recomputing = tokens._replace(recomputing=self.recomputing), True
        return self.compute(flow, tokens)


class Head(nn.Module, ABC):
    """The last part of a model: tokens to what is predicted, first by themselves, then each in its place."""

    chunk: int = 0  # tokens of a microbatch that it takes at a time; 0 for all

    def forward(self, *flow: Tensor, layout: StreamLayout) -> Tensor:
        """Return what is predicted, packed [B, N]."""
        return self.pack(self.values(*flow, groups=layout.group_lengths), layout)

    def values_by_token(self, flow: Flow, tokens: Tokens, facts: Flowing) -> Tensor:
        """Return what `values` does, `chunk` tokens at a time."""

        def run(part: Tokens, inputs: Flow) -> Flow:
            return (self.values(*inputs, groups=part.groups),)

        texts = frozenset(range(1, facts.carried))
        return ByToken(run, self, tokens, frozenset((0,)), texts, chunk=self.chunk)(*flow)[0]

    @abstractmethod
    def values(self, *flow: Tensor, groups: Sequence[int]) -> Tensor:
        """Return [B, T, n], the numbers of each token's patch. groups: tokens of each time group."""

    @abstractmethod
    def pack(self, values: Tensor, layout: StreamLayout) -> Tensor:
        """Put the numbers of all tokens in their places, [B, N]; nothing trained is in here."""


class Backbone(nn.Module, ABC):
    """A video diffusion transformer in three named parts: `embed`, `blocks`, `head`.

    1. The constructor works under `torch.device("meta")`; blocks are an `nn.ModuleDict` keyed by the original index,
       linears that a LoRA may target are `models.linear.Linear`.
    2. `embed(x, timesteps, *fields, layout=…, dtype=…)` returns a `Flow` in the matmuls' dtype; each block is a
       `Block`; `head` is a `Head`, which returns what is predicted. `positions` gives what blocks need of the layout.
    3. `flow_meta`, `dtype_of` and the geometry below.
    Streams, LoRA, pipelines, sharding, recompute, compile, quantization, costs and sampling then work as they are.
    """

    embed: nn.Module | None
    blocks: nn.ModuleDict
    head: Head | None
    streams: tuple[str, ...]
    fields: tuple[Field, ...]
    patch: Grid
    family: ClassVar[str]  # the name of the folder in families/
    lora_targets: tuple[str, ...]  # patterns of linears in a block that an adapter is put on by default
    width: int  # of a token between blocks
    heads: int
    carried: int = 1  # as `Block.carried`
    grouped: tuple[int, ...] = (1,)  # as `Block.grouped`
    text_attentions: int = 0  # of text's tokens among themselves, in `embed`
    rgb_attends_aux: bool = True
    rgb_forward_only: bool = False  # RGB sees itself alone and nothing trained acts on it: it has no backward pass
    rgb_memory: RgbMemory | None = None  # where RGB is the same in several forward passes: its keys and values
    undivided: ClassVar[str] = ""  # why neither stages nor ranks can share one sample; empty where they can
    zero_start: ClassVar[tuple[str, ...]] = ()  # parameters that are zero in a new model
    many_layouts: ClassVar[bool] = False  # its samples have dozens, each of which would be compiled by itself
    matmul_dtype: torch.dtype = torch.float32
    run_block: RunBlock | None = None  # runs each block, where something is to be done before and after
    context: Context | None = None  # ranks that share each sequence: between the ends each holds a part of it

    # -- to be given by each model

    @abstractmethod
    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        """Return what blocks must know of the sequence, with positions that all streams share."""

    @abstractmethod
    def flow_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        """Return meta tensors of what flows between stages."""

    @abstractmethod
    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a base parameter keeps when matmuls run in `dtype`."""

    @abstractmethod
    def rebuild_buffers(self) -> None:
        """Forget what was computed on another device; called after `to_empty`."""

    def end_reads(self, name: str) -> str:
        """Return what a linear of `embed` or `head` reads, by its name, as `Block.reads` does."""
        return "streams"

    def end_repeats(self, name: str) -> int:
        """Return how often it acts for each token, as `Block.repeats` does."""
        return 1

    # -- the same for all models

    def forward(self, *flow: Tensor, layout: StreamLayout) -> Tensor | Flow:
        """Run the parts here: `(x [B, N], timesteps [B, G], *fields)` or a flow in, what is predicted or a flow out."""
        if self.embed is not None:
            flow = self.between_ends(self.embed(*flow, layout=layout, dtype=self.matmul_dtype), layout)
        tokens = self.tokens(layout, flow[0].device)
        runs = [partial(self._run, block) for block in self.block_list()]
        if self.rgb_memory is not None:
            flow, tokens = self.rgb_memory.run(runs, flow, tokens)
        else:
            for run in runs:
                flow = run(flow, tokens)
        return flow if self.head is None else self._end(flow, tokens, layout)

    def _run(self, block: Block, flow: Flow, tokens: Tokens) -> Flow:
        return block(flow, tokens) if self.run_block is None else self.run_block(block, flow, tokens)

    def tokens(self, layout: StreamLayout, device: torch.device) -> Tokens:
        """Return what blocks must know of the sequence and of how this model runs it."""
        tokens = self.positions(layout, device)._replace(rgb_forward_only=self.rgb_forward_only)
        if self.context is None:
            return tokens
        texts = self.flow_meta(layout, 1, self.matmul_dtype)[1 : self.carried]
        return tokens.on_rank(layout, self.context, text=sum(text.shape[1] for text in texts))

    def lengths(self, layout: StreamLayout) -> tuple[int, ...]:
        """Tokens of each stream on this rank."""
        if self.context is None:
            return layout.lengths
        return tuple(sum(map(self.context.count, own)) for own in layout.segments_by_stream)

    def meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        """Return meta tensors of what flows between this rank's stages and others'."""
        return self.between_ends(tuple(t.to("meta") for t in self.flow_meta(layout, batch, dtype)), layout)

    def between_ends(self, flow: Flow, layout: StreamLayout) -> Flow:
        """Return what blocks take of what `embed` made."""
        if self.context is not None:
            texts = [self.context.cut(text, (text.shape[1],)) for text in flow[1 : self.carried]]
            flow = (self.context.cut(flow[0], layout.segment_lengths), *texts, *flow[self.carried :])
        return self.divided(flow, layout)

    def divided(self, flow: Flow, layout: StreamLayout) -> Flow:
        """Cut RGB's tokens from the companions' where RGB runs forward only; text that flows goes with RGB."""
        if not self.rgb_forward_only:
            return flow
        hidden, first = flow[0], self.lengths(layout)[0]
        texts = [text.detach() for text in flow[1 : self.carried]]
        own = torch.contiguous_format  # or a batch of one keeps the whole's strides, which torch 2.11 compares
        companions, rgb = (part.clone(memory_format=own) for part in (hidden[:, first:], hidden.detach()[:, :first]))
        return companions, rgb, *texts, *flow[self.carried :]

    def _end(self, flow: Flow, tokens: Tokens, layout: StreamLayout) -> Tensor:
        """Turn tokens into the packed prediction, RGB's by itself where it runs forward only."""
        assert self.head is not None
        if not self.rgb_forward_only:
            values = self.head.values_by_token(flow, tokens, self)
        else:
            values = self.head.values_by_token(companions_part(flow, tokens, self), tokens.companions(), self)
            with torch.no_grad():
                if tokens.rgb_known:  # it is given: nobody asks for it
                    rgb = values.new_zeros(len(values), tokens.lengths[0], values.shape[2])
                else:
                    rgb = self.head.values_by_token(rgb_part(flow, tokens, self), tokens.rgb(), self)
            values = torch.cat([rgb, values], dim=1)
        return self.head.pack(values if tokens.shared is None else tokens.shared.gather(values), layout)

    @property
    def changed(self) -> int:
        """Count the flow's first tensors that blocks change."""
        return self.carried + self.rgb_forward_only

    @property
    def differentiated(self) -> int:
        """Count the flow's first tensors whose gradients go back from block to block."""
        return 1 if self.rgb_forward_only else self.carried

    def keep(self, *, embed: bool, blocks: Iterable[int], head: bool) -> None:
        """Delete the parts that live on other stages; what stays keeps its name. blocks: their places, from 0."""
        keys = list(self.blocks)
        wanted = {keys[place] for place in blocks}
        for key in keys:
            if key not in wanted:
                del self.blocks[key]
        self.embed = self.embed if embed else None
        self.head = self.head if head else None

    @property
    def trains_conditions(self) -> bool:
        """Tell whether the flow beyond what blocks change needs gradients; a stream's embedding is in the tokens."""
        parts = self.embed.named_parameters() if self.embed is not None else ()
        return any(parameter.requires_grad for name, parameter in parts if "stream" not in name)

    def block_list(self) -> list[Block]:
        """Return the blocks that are here, in order."""
        return [cast(Block, block) for block in self.blocks.values()]

    def layout(self, shape: Sequence[int]) -> StreamLayout:
        """Lay out all streams of this model with the same latent shape (C, F, H, W)."""
        return StreamLayout.equal(self.streams, shape, self.patch)


def apply_dtypes(model: Backbone, dtype: torch.dtype) -> None:
    """Matmuls in `dtype`, and base parameters but for the model's fp32 islands; adapters and embeddings stay fp32."""
    model.matmul_dtype = dtype
    for name, parameter in model.named_parameters():
        wanted = model.dtype_of(name, dtype)
        if parameter.dtype != wanted and parameter.itemsize > 1:  # what is quantized stays so
            parameter.data = parameter.data.to(wanted)


def set_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Train what matches one of the name patterns and freeze the rest; return the trainable names."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            kinds = sorted(
                {name.replace(name.split(".")[1], "*", 1) if name.startswith("blocks.") else name for name in names}
            )
            raise UserError(f"model.trainable: {pattern!r} matches no parameter; there are {', '.join(kinds)}")
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(chosen))
    return chosen
