"""Attention of all families: queries, keys and values `[B, T, H, d]` go in, the same shape comes out.

The kernel is chosen here, and so is who sees whom: `rgb_attends_aux`, masks of text, and how much text counts beside
several streams. Some models attend their text's padding, hundreds of equal rows; `fold_padding` makes one key of them
that counts for all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transpixeler.config.sections import UserError
from transpixeler.models.streams import Run
from transpixeler.models.tokens import Tokens

KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "math": [SDPBackend.MATH],
    "fa3": [SDPBackend.FLASH_ATTENTION],
    "fa4": [SDPBackend.FLASH_ATTENTION],
}
# Newer flash kernels, which torch takes from a package in place of its own for the rest of the process.
PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn"}
# cuDNN's backward pass on Hopper was reported to give NaN where a row's scores are far below zero and the number of
# keys leaves this remainder: torch then chooses among the others.
CUDNN_TILE, CUDNN_REMAINDER = 128, 64
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_OPS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
# The operators whose outputs are dear to recompute and small to keep.
SAVED_OPS = (
    *(getattr(torch.ops.aten, op).default for op in _OPS if hasattr(torch.ops.aten, op)),
    torch.ops.higher_order.flex_attention,
)


def available_kernels(device: torch.device) -> tuple[str, ...]:
    """List the values of `model.attention` that run forward and backward on a device."""
    if device.type == "cuda":
        return ("sdpa", "flash", "cudnn", "efficient", "math", "flex", *PACKAGES)
    return ("sdpa", "flash", "math")


def pick_kernel(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve `model.attention` for a device.

    auto: torch chooses, which knows what each version of cuDNN computes right; where `train.deterministic` asks for the
    same bits each time, the fastest kernel whose backward pass gives them.
    """
    if kernel == "auto" and torch.are_deterministic_algorithms_enabled() and device.type == "cuda":
        return "flash" if _runs("flash", device, dtype, head_dim) else "math"
    if kernel == "auto":
        return "sdpa"
    if kernel in PACKAGES and kernel in available_kernels(device):
        _activate(kernel)
    if kernel not in available_kernels(device) or not _runs(kernel, device, dtype, head_dim):
        others = [name for name in available_kernels(device) if name not in PACKAGES]
        there = [name for name in others if _runs(name, device, dtype, head_dim)]
        what = f"{str(dtype).removeprefix('torch.')} and heads of {head_dim} on this {device.type}"
        raise UserError(f"model.attention: {kernel} does not run in {what}; there are {', '.join(('auto', *there))}")
    return kernel


def _activate(kernel: str) -> None:
    """Put a package's kernel in the place of torch's flash attention, if it is not there already."""
    package, kernels = PACKAGES[kernel], torch.nn.attention
    try:
        if kernels.current_flash_attention_impl() != kernel.upper():
            kernels.activate_flash_attention_impl(kernel.upper())
    except (ImportError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"model.attention: {kernel} comes from the package {package}, which does not serve here ({error}); "
            "install it for this version of torch and CUDA, or set model.attention=auto"
        ) from error


@cache
def _runs(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Try it once on a few zeros: only torch knows what a machine, a dtype and a size of heads exclude."""
    if kernel in ("sdpa", "math", "flex"):  # which take all
        return True
    x = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's reasons, one a kernel
        try:
            attention(x, x, x, kernel).sum().backward()
        except RuntimeError:
            return False
    return True


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: str = "sdpa", bias: Tensor | None = None) -> Tensor:
    """Softmax attention; a bias, `[keys]`, `[B, keys]` or `[H, queries, keys]`, is added to the logits."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # One row for all queries: torch broadcasts it, and pads no more than this row where a kernel wants it aligned.
    mask = None if bias is None else bias.to(q.dtype)
    if mask is not None:
        mask = mask[None] if mask.ndim == 3 else mask.expand(len(q), -1)[:, None, None]
    if q.is_meta:  # keep no scores, as kernels of devices do; what torch picks on meta would
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return flash(q, k, v, attn_mask=None if mask is None else mask.detach())[0].transpose(1, 2)
    if mask is not None:  # which not every kernel takes, so torch chooses one that does
        same_bits = q.is_cuda and torch.are_deterministic_algorithms_enabled()
        with _backends("math" if same_bits else "sdpa", k.shape[2], cuda=q.is_cuda):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    if kernel == "flex":
        return _flex()(q, k, v).transpose(1, 2)
    with _backends(kernel, k.shape[2], cuda=q.is_cuda):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def self_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, text_lengths: Tensor | None = None) -> Tensor:
    """Attend over the sequence `[B, T, H, d]`: every token sees every token, or RGB does not see the companions.

    Text that flows through the blocks comes after the streams, `text_lengths` [B] of it valid, all where None. Its keys
    share a softmax with those of all streams, which would outweigh it: each counts T/L₀ times for whoever sees all.
    Ranks that share the sequence give their own tokens' and get what those saw.
    """
    if (shared := tokens.shared) is None:
        return _among_streams(q, k, v, tokens, text_lengths)
    q, k, v = shared.to_heads(q, k, v)
    return shared.to_tokens(_among_streams(q, k, v, tokens.whole(), text_lengths))


def _among_streams(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, text_lengths: Tensor | None) -> Tensor:
    streams, first = sum(tokens.lengths), tokens.lengths[0]
    text = q.shape[1] - streams
    everyone, rgb, far = tokens.runs, tokens.runs[:1], tokens.runs[1:]
    if tokens.rgb_attends_aux or len(tokens.lengths) == 1:
        return _attend_in_time(q, k, v, tokens, everyone, everyone, text, tokens.text_weight, text_lengths)
    near_q, near_k, near_v = (_first_and_text(x, first, streams) for x in (q, k, v))
    own = _attend_in_time(near_q, near_k, near_v, tokens, rgb, rgb, text, 1.0, text_lengths)
    others = q[:, first:streams]
    rest = _attend_in_time(others, k, v, tokens, far, everyone, text, tokens.text_weight, text_lengths)
    return torch.cat([own[:, :first], rest, own[:, first:]], dim=1)


def companions_attention(
    q: Tensor, k: Tensor, v: Tensor, rgb_k: Tensor, rgb_v: Tensor, tokens: Tokens, text_lengths: Tensor | None = None
) -> Tensor:
    """Attend from the companions' tokens to themselves and to those of RGB, then of text that flows.

    The result is what `self_attention` gives the companions. tokens: of the whole sequence.
    """
    if (shared := tokens.shared) is None:
        return _from_companions(q, k, v, rgb_k, rgb_v, tokens, text_lengths)
    far, whole = shared.companions(), tokens.whole()
    (q,), (k, v) = far.to_heads(q), far.to_heads(k, v)  # apart, or queries would keep the other two alive
    rgb_k, rgb_v = shared.rgb().to_heads(rgb_k, rgb_v)
    return far.to_tokens(_from_companions(q, k, v, rgb_k, rgb_v, whole, text_lengths))


def _from_companions(
    q: Tensor, k: Tensor, v: Tensor, rgb_k: Tensor, rgb_v: Tensor, tokens: Tokens, text_lengths: Tensor | None
) -> Tensor:
    first = tokens.lengths[0]
    text = rgb_k.shape[1] - first
    k, v = (torch.cat([near[:, :first], far, near[:, first:]], 1) for near, far in ((rgb_k, k), (rgb_v, v)))
    far, everyone = tokens.runs[1:], tokens.runs
    return _attend_in_time(q, k, v, tokens, far, everyone, text, tokens.text_weight, text_lengths)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, bias: Tensor | None = None) -> Tensor:
    """Attend to keys that are no part of the sequence; see `attention` for the bias and `length_bias` for a mask."""
    return attention(q, k, v, tokens.kernel, bias)


def length_bias(lengths: Tensor, keys: int) -> Tensor:
    """[B] valid keys of each sample → [B, keys]: 0 for those, minus infinity beyond."""
    beyond = torch.arange(keys, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill_(beyond, -torch.inf)


def _first_and_text(x: Tensor, first: int, streams: int) -> Tensor:
    return torch.cat([x[:, :first], x[:, streams:]], dim=1) if x.shape[1] > streams else x[:, :first]


def _attend_in_time(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    asking: Sequence[Sequence[Run]],
    seen: Sequence[Sequence[Run]],
    text: int,
    weight: float,
    lengths: Tensor | None,
) -> Tensor:
    """Attend from each latent frame to the frames up to it, where the model does, and to text.

    asking, seen: the streams of the queries and of the keys. Text may ask too: it stands at the first frame. There is
    one softmax for each frame, over the keys that it sees: a mask would cost the scores of all pairs.
    """
    ours, theirs = ([run for stream in part for run in stream] for part in (asking, seen))
    if len({run.frame for run in theirs}) <= 1:
        return _attend_with_text(q, k, v, tokens.kernel, text, weight, lengths)
    counts = [*(run.tokens for run in ours), q.shape[1] - sum(run.tokens for run in ours)]
    frames = [*(run.frame for run in ours), min(run.frame for run in theirs)]
    of_keys = [*(run.tokens for run in theirs), text]
    queries, keys, values = q.split(counts, dim=1), k.split(of_keys, dim=1), v.split(of_keys, dim=1)
    found = list(queries)
    for frame in sorted(set(frames)):
        own = [place for place, one in enumerate(frames) if one == frame]
        there = [*(place for place, run in enumerate(theirs) if run.frame <= frame), len(theirs)]
        near_q = torch.cat([queries[p] for p in own], dim=1)
        near_k, near_v = (torch.cat([part[p] for p in there], dim=1) for part in (keys, values))
        out = _attend_with_text(near_q, near_k, near_v, tokens.kernel, text, weight, lengths)
        for place, part in zip(own, out.split([counts[p] for p in own], dim=1), strict=True):
            found[place] = part
    return torch.cat(found, dim=1)


def _attend_with_text(
    q: Tensor, k: Tensor, v: Tensor, kernel: str, text: int, weight: float, lengths: Tensor | None
) -> Tensor:
    """Attend to keys whose last `text` count `weight` times each."""
    if not text or (weight == 1 and lengths is None):
        return attention(q, k, v, kernel)
    if (copies := text_copies(weight, masked=lengths is not None)) > 1:  # any kernel takes them
        k, v = (torch.cat([x, *[x[:, -text:]] * (copies - 1)], dim=1) for x in (k, v))
        return attention(q, k, v, kernel)
    bias = torch.zeros(len(k) if lengths is not None else 1, k.shape[1], device=k.device)
    bias[:, -text:] = math.log(weight)
    if lengths is not None:
        bias[:, -text:] += length_bias(lengths, text)
    return attention(q, k, v, kernel, bias)


def text_copies(weight: float, *, masked: bool) -> int:
    """Return how many copies of text's keys count for their weight; 1 where a bias on their logits does."""
    return 1 if masked or weight != round(weight) else round(weight)


def fold_padding(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cut rows `[B, T, D]` after the first from which all are equal, and make the bias that lets it count for them.

    n equal keys take the share of one whose logit is higher by log n.
    Only where it is a gain: on a GPU the kernels without a bias are the fast ones, and reading the rows would wait.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows, None
    different = (rows[:, :-1] != rows[:, -1:]).any(-1).any(0).nonzero()
    kept = int(different[-1]) + 2 if len(different) else 1
    folded = rows.shape[1] - kept + 1
    if folded == 1:
        return rows, None
    bias = torch.zeros(kept, dtype=torch.promote_types(rows.dtype, torch.float32))
    bias[-1] = math.log(folded)
    return rows[:, :kept], bias


def unfold_padding(rows: Tensor, length: int) -> Tensor:
    """`[B, length, D]` again, of whatever was made of folded rows."""
    return torch.cat([rows, rows[:, -1:].expand(-1, length - rows.shape[1], -1)], dim=1)


def allowed(kernel: str, keys: int) -> list[SDPBackend]:
    """Return torch's kernels for so many keys on a GPU; empty where torch is free to choose."""
    if kernel == "sdpa":
        return WITHOUT_CUDNN if keys % CUDNN_TILE == CUDNN_REMAINDER else []
    return KERNELS[kernel]


def _backends(kernel: str, keys: int, *, cuda: bool) -> AbstractContextManager:
    if kernel == "sdpa" and not cuda:
        return nullcontext()
    backends = allowed(kernel, keys)
    return sdpa_kernel(backends) if backends else nullcontext()


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex() -> Callable[..., Tensor]:
    """Flex is fast only when compiled; inside a compiled block it is compiled already."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()
