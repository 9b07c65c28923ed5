"""Define the backbone: three named parts, run over several streams, cut and wrapped by those names.

In: packed noisy latents, a timestep for each time group and the fields that the family declares. Out: packed velocity.
The pipeline, FSDP, recompute, compile and LoRA know this class and no concrete model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from transpixeler.config import UserError
from transpixeler.models.family import Field
from transpixeler.models.streams import Grid, StreamLayout, Tokens

# The flow: the flat tuple of tensors that runs from block to block and from stage to stage, the same for LoRA and for
# full fine-tuning. A plain tuple: pipelining wants no other. Its first `carried` tensors are what blocks change.
Flow = tuple[Tensor, ...]


class Block(nn.Module, ABC):
    """One block; `recompute`, when set, decides what of `compute` is kept for the backward pass."""

    recompute: Callable[..., Flow] | None = None
    carried: int = 1  # tensors of the flow that it changes, the first ones; the same for all blocks of a model
    # its attentions: among streams, to text, or "joint": both in one; "image": to an image encoder's tokens
    attends: tuple[str, ...] = ("streams", "text")

    def forward(self, flow: Flow, tokens: Tokens) -> Flow:
        """Return the flow with its carried tensors changed."""
        if self.recompute is None:
            changed = self.compute(flow, tokens)
        else:
            tokens = tokens._replace(copy_scope=False)  # nothing is kept: copying saves nothing
            compute = self.compute if torch.compiler.is_compiling() else _Recomputed(self.compute)
            changed = self.recompute(compute, flow, tokens)
        return (*changed, *flow[len(changed) :])

    @abstractmethod
    def compute(self, flow: Flow, tokens: Tokens) -> Flow:
        """Return the carried tensors of the flow, changed."""

    def reads(self, linear: str) -> str:
        """Return what a linear of this block, by its name in it, reads.

        One of "streams", "text", "both", "image" and "vectors".
        """
        return "streams"


class _Recomputed:
    """A block's `compute`, which is told from its second call on that its output is discarded.

    A compiler needs no telling: it drops what nothing uses.
    """

    def __init__(self, compute: Callable[[Flow, Tokens], Flow]) -> None:
        self.compute, self.recomputing = compute, False

    def __call__(self, flow: Flow, tokens: Tokens) -> Flow:
        tokens, self.recomputing = tokens._replace(recomputing=self.recomputing), True
        return self.compute(flow, tokens)


class Backbone(nn.Module, ABC):
    """A video diffusion transformer in three named parts: `embed`, `blocks`, `head`.

    1. The constructor works under `torch.device("meta")`; blocks are an `nn.ModuleDict` keyed by the original index,
       linears that a LoRA may target are `models.linear.Linear`.
    2. `embed(x, timesteps, *fields, layout=…, dtype=…)` returns a `Flow` in the matmuls' dtype; each block is a
       `Block`; `head(*flow, layout=…)` returns packed velocity. `positions` gives what blocks need of the layout.
    3. `flow_meta`, `dtype_of` and the geometry below.
    Streams, LoRA, pipelines, sharding, recompute, compile, quantization, costs and sampling then work as they are.
    """

    embed: nn.Module | None
    blocks: nn.ModuleDict
    head: nn.Module | None
    streams: tuple[str, ...]
    fields: tuple[Field, ...]
    patch: Grid
    family: ClassVar[str]  # the name of the folder in families/
    lora_targets: tuple[str, ...]  # patterns of linears in a block that an adapter is put on by default
    width: int  # of a token between blocks
    heads: int
    carried: int = 1  # as `Block.carried`
    rgb_attends_aux: bool = True
    matmul_dtype: torch.dtype = torch.float32

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

    # -- the same for all models

    def forward(self, *flow: Tensor, layout: StreamLayout) -> Tensor | Flow:
        """Run the parts that are here: `(x [B, N], timesteps [B, G], *fields)` or a flow in, velocity or a flow out."""
        if self.embed is not None:
            flow = self.embed(*flow, layout=layout, dtype=self.matmul_dtype)
        tokens = self.positions(layout, flow[0].device)
        for block in self.block_list():
            flow = block(flow, tokens)
        return flow if self.head is None else self.head(*flow, layout=layout)

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
