"""Tell which programs read an export: an adapter and a format go in, the programs that load all of it come out.

Some loaders take more for granted than an adapter holds; what can be added for them without a change is added here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.peft_config import most
from transpixeler.models.family import Family

DIFFUSERS, COMFYUI = "diffusers", "ComfyUI"
OTHER_WEIGHTS = frozenset((".sft", ".bin", ".pth", ".pt", ".ckpt", ".gguf"))  # ends of files that nothing here writes


def readers(adapter: Adapter, format: str) -> tuple[str, ...]:
    """Return the other programs that read an adapter in a format, and apply all of it as it was trained."""
    loaders = adapter.family.names.loaders
    if not adapter.is_plain:
        known = not adapter.is_dora and not adapter.own_streams  # our nodes know pairs alone, shared by their streams
        return loaders.joint_read_by.get(format, ()) if known else ()
    found = [p for p in loaders.read_by.get(format, ()) if _applies_all(adapter, p, format)]
    if format in loaders.whole_blocks and with_whole_blocks(adapter) is None:
        return tuple(program for program in found if program != DIFFUSERS)
    return tuple(found)


def _applies_all(adapter: Adapter, program: str, format: str) -> bool:
    """Tell whether a program applies all that an adapter holds, of the sizes that it has."""
    width = adapter.family.names.loaders.widths.get(format) if program == DIFFUSERS else None
    if width and any(adapter.up(target).shape[0] % width for target in adapter.targets):
        return False  # it would cut the rows of several linears in other places
    if not adapter.is_dora and not adapter.must_fuse:
        return True
    if program == COMFYUI:  # its factor for a row is over the norm of the base's row, not of the adapted one
        by_row = any((m := adapter.magnitude(target)) is not None and m.ndim == 1 for target in adapter.targets)
        return adapter.norms_of_base or not by_row
    return program == DIFFUSERS and format == DIFFUSERS and not adapter.must_fuse


def is_one_file(path: str | Path) -> bool:
    """Tell from a place to write whether one file is asked for, or a folder."""
    return Path(path).suffix == ".safetensors"


def model_readers(family: Family, path: Path) -> tuple[str, ...]:
    """Return the other programs that read a whole model that was written to a file or a folder."""
    return family.names.loaders.model_read_by.get("file" if is_one_file(path) else "folder", ())


def listing(programs: Sequence[str]) -> str:
    """Return what an export says of its readers; this project itself reads all that it writes."""
    return f"read by {', '.join((*programs, 'transpixeler'))}" + ("" if programs else ", and by no other program")


def with_whole_blocks(adapter: Adapter) -> Adapter | None:
    """Add pairs of zeros to a plain adapter for what it leaves alone in its blocks; None where that cannot be had.

    Their rank is the usual one: readers take the most frequent for all of which nothing else is said.
    """
    if adapter.is_dora:
        return None  # the norms of what it leaves alone are the base's
    names = [target.split(".", 2) for target in adapter.targets]
    linears = adapter.family.names.block_linears
    if not adapter.is_plain or any(name[-1] not in linears for name in names):
        return None
    sizes: dict[str, int] = {}
    for target, (*_, part) in zip(adapter.targets, names):
        sizes |= zip(linears[part], (adapter.down(target).shape[1], adapter.up(target).shape[0]))
    if len(sizes) < 2:
        return None
    rank, alpha = most(map(adapter.rank, adapter.targets), 0), most(adapter.alphas.values(), 0.0)
    tensors, alphas, scopes = dict(adapter.tensors), dict(adapter.alphas), dict(adapter.scopes)
    for block, part in itertools.product(range(1 + max(int(name[1]) for name in names)), linears):
        if (target := f"blocks.{block}.{part}") not in alphas:
            inner, outer = (sizes[side] for side in linears[part])
            tensors |= {f"{target}.lora_A": torch.zeros(rank, inner), f"{target}.lora_B": torch.zeros(outer, rank)}
            alphas[target], scopes[target] = alpha, "all"
    return replace(adapter, tensors=tensors, alphas=alphas, scopes=scopes)
