"""Prepare one stage's blocks for training, in this order: recompute → compile → shard.

In: a stage on meta. Out: the same stage under the same names, whose blocks keep, recompute, fuse and shard as told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transpixeler.config.sections import ParallelConfig, UserError
from transpixeler.models.attention import SAVED_OPS
from transpixeler.models.backbone import Backbone, Block, Compute, Flow
from transpixeler.models.tokens import Tokens
from transpixeler.parallel.hosted import HostInputs, flat
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.swap import spread

REDUCE_ELEMENTS = 2**26  # one all-reduce carries at most 256 MiB
CHUNK = 8192  # tokens that fill a GPU's matmuls, and whose feed-forward takes under 2 GiB in a model of 14B
GRAPHS = 512  # that a compiled block may have: one a bucket and microbatch, for training and for evaluation


def wrap(
    stage: nn.Module,
    blocks: Sequence[Block],
    config: ParallelConfig,
    mesh: Mesh,
    *,
    waiting: Collection[Block] = (),
    host: HostInputs | None = None,
) -> None:
    """Apply what the config says to a stage.

    waiting: the blocks whose weights are in host memory until used. host: the rank's memory for blocks' inputs.
    """
    mode = recompute_mode(config, mesh.device)
    set_recompute(blocks, mode, host)
    if wants_compile(config, mesh.device):
        compiler = torch.compiler.config  # beyond its limits, of 8 graphs, a block would run uncompiled without a word
        compiler.recompile_limit = max(compiler.recompile_limit, GRAPHS)
        compiler.accumulated_recompile_limit = max(compiler.accumulated_recompile_limit, GRAPHS)
        for block in blocks:  # lengths that are symbols cost speed and still a graph for each bucket
            block.compile_inside() if mode == "offload" else block.compile(dynamic=False)
    if is_sharded(config, mesh):
        _shard(stage, blocks, config, mesh, waiting)


# --- recompute -------------------------------------------------------------------------------------------------------


def recompute_mode(config: ParallelConfig, device: torch.device) -> str | int:
    """Resolve `auto`: a GPU's memory is dear, and a CPU is for small things."""
    split = splits_backward(config)
    if config.recompute == "attention" and split:
        raise UserError(
            f"parallel.recompute: attention does not go with parallel.schedule={config.schedule}, which runs the "
            "backward pass in two parts; set full or none"
        )
    if config.keep_gb and (config.recompute == "none" or isinstance(config.recompute, int)):
        raise UserError(
            f"parallel.keep_gb: {config.keep_gb:g} chooses the blocks that recompute nothing, and so does "
            f"parallel.recompute={config.recompute}; set keep_gb=0, or recompute to what the other blocks "
            "do: attention, full or offload"
        )
    if config.host_gb and config.recompute != "offload":
        raise UserError(
            f"parallel.host_gb: {config.host_gb:g} is for the inputs that parallel.recompute=offload moves, and it is "
            f"{config.recompute}; set recompute=offload, or host_gb=0"
        )
    if config.recompute != "auto":
        return config.recompute
    if device.type != "cuda":
        return "full" if config.keep_gb else "none"
    return "full" if split else "attention"


SPLITS_BACKWARD = "2.13"  # the oldest torch whose split backward pass goes through functions of our own


def splits_backward(config: ParallelConfig) -> bool:
    """Tell whether the schedule takes gradients of inputs and of weights at two times, through one graph twice."""
    return config.pipeline > 1 and config.schedule == "interleaved-zero-bubble"


def check_torch(config: ParallelConfig) -> None:
    """Refuse a schedule that this torch cannot run."""
    if splits_backward(config) and torch.__version__ < SPLITS_BACKWARD:
        raise UserError(
            f"parallel.schedule: {config.schedule} needs torch {SPLITS_BACKWARD} or newer, and this is "
            f"{torch.__version__}; set interleaved-1f1b"
        )


def host_inputs(config: ParallelConfig) -> HostInputs:
    """Return the host memory that `parallel.recompute: offload` may use on a rank."""
    return HostInputs(config.host_gb * 2**30 if config.host_gb else math.inf)


def chunk_tokens(config: ParallelConfig, *, compiled: bool) -> int:
    """Resolve `parallel.chunk`: tokens of a microbatch that are computed at a time; 0 for all.

    compiled: whether blocks are, which `auto` then leaves to the compiler.
    """
    if isinstance(config.chunk, int):
        if splits_backward(config):
            raise UserError(
                f"parallel.chunk: {config.chunk} does not go with parallel.schedule={config.schedule}, which runs the "
                "backward pass in two parts; set auto"
            )
        return config.chunk
    return 0 if config.chunk == "off" or compiled or splits_backward(config) else CHUNK


def set_chunk(model: Backbone, chunk: int) -> None:
    """Let blocks and head take so many tokens of a microbatch at a time; 0 for all."""
    for part in (*model.block_list(), *([] if model.head is None else [model.head])):
        part.chunk = chunk


def set_recompute(blocks: Sequence[Block], mode: str | int, host: HostInputs | None = None) -> None:
    """Decide for each block what its forward keeps for the backward pass. host: for `offload`, if it is shared."""
    if isinstance(mode, int):
        for block in blocks[::mode]:
            block.recompute = _full
        return
    how, host = {"none": None, "full": _full, "attention": _keep_attention}, host or HostInputs()
    for block in blocks:
        block.recompute = partial(host.run, carried=block.carried) if mode == "offload" else how[mode]


def _full(compute: Compute, flow: Flow, tokens: Tokens) -> Flow:
    return checkpoint(flat(compute, tokens), *flow, use_reentrant=False)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Pieces run without gradients: they are computed again, and alone. A compiler asks here without any, too.
    saved = op in SAVED_OPS and (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention(compute: Compute, flow: Flow, tokens: Tokens) -> Flow:
    """Attention is most of a long sequence's forward and little of its memory, so its outputs stay."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(flat(compute, tokens), *flow, use_reentrant=False, context_fn=contexts)


# --- compile ---------------------------------------------------------------------------------------------------------


SHARED_COMPILE = "2.13"  # the oldest torch seen to be right where ranks share a sequence; 2.11 is wrong


def settled(config: ParallelConfig, model: Backbone) -> ParallelConfig:
    """Return the settings of a model whose layouts are too many to compile: it is compiled only where that is asked.

    A schedule that this torch cannot run is refused.
    """
    check_torch(config)
    return replace(config, compile="off") if model.many_layouts and config.compile == "auto" else config


def compiles_shared() -> bool:
    """Tell whether this torch is right where compiled blocks share a sequence."""
    return torch.__version__ >= SHARED_COMPILE


def wants_compile(config: ParallelConfig, device: torch.device) -> bool:
    if splits_backward(config):  # a compiled backward pass cannot be
        if config.compile == "on":
            raise UserError(f"parallel.compile: on does not go with parallel.schedule={config.schedule}; set auto")
        return False
    if config.context > 1 and not compiles_shared():
        if config.compile == "on":
            raise UserError(
                f"parallel.compile: on does not go with parallel.context={config.context} under torch "
                f"{torch.__version__}, whose compiled blocks have wrong gradients there; set auto, or take torch "
                f"{SHARED_COMPILE} or newer"
            )
        return False
    # with offload memory is short, and what computes in pieces takes less of it than what is compiled
    chosen = config.compile == "auto" and device.type == "cuda" and config.recompute != "offload"
    return config.compile == "on" or chosen


# --- shard -----------------------------------------------------------------------------------------------------------


def is_sharded(config: ParallelConfig, mesh: Mesh) -> bool:
    """Weights are gathered when used; otherwise every rank holds its stage whole."""
    return by_fsdp(config, mesh.layout.shard)


def by_fsdp(config: ParallelConfig, shards: int) -> bool:
    """Tell whether weights, and what is trained of them, are FSDP's to keep: on shards, or all in host memory."""
    return shards > 1 or config.offload is True


def swaps(config: ParallelConfig, shards: int) -> bool:
    """Tell whether some blocks' frozen weights wait in host memory, and all else stays where it is."""
    return bool(config.offload) and not by_fsdp(config, shards)


def waiting_places(config: ParallelConfig, count: int) -> list[int]:
    """Return the places of the blocks whose weights wait in host memory, of a whole model of so many."""
    if config.offload is not True and config.offload > count:
        raise UserError(
            f"parallel.offload: {config.offload} of the {count} blocks that the model has; set up to {count}, or true "
            "for all weights and what is trained"
        )
    return spread(count, count if config.offload is True else int(config.offload))


def _shard(
    stage: nn.Module, blocks: Iterable[Block], config: ParallelConfig, mesh: Mesh, waiting: Collection[Block]
) -> None:
    host, device = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda"), OffloadPolicy()
    options = {
        "mesh": mesh.shards,
        # every parameter keeps its own dtype: bf16 base, fp32 islands and adapters; gradients are summed in fp32
        "mp_policy": MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
        # a pipeline runs many microbatches a step: gathering once is worth the memory, unless memory is what lacks
        "reshard_after_forward": mesh.layout.pipeline == 1 or bool(config.offload),
    }
    for block in blocks:
        for part in (*block.parts(), block):
            fully_shard(part, offload_policy=host if block in waiting else device, **options)
    fully_shard(stage, offload_policy=host if config.offload is True else device, **options)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the global count already
            module.set_force_sum_reduction_for_comms(True)


def reduces_often(trained: int, total: int) -> bool:
    """Tell whether shards sum gradients in each microbatch, of a rank that trains so many of its numbers.

    Whole gradients wait for the last one where they are an adapter's; a base's would fill the memory.
    """
    return 10 * trained > total


def reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum gradients over replicas that hold their weights whole: the adapter's bytes, once a step."""
    if dist.get_world_size(group) == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:  # a replica whose samples missed it still joins the sum
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat, group=group)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])  # pyright: ignore[reportPrivateImportUsage]


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > REDUCE_ELEMENTS:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
