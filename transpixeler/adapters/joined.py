"""Join an adapter's matrices for parts of a linear into those of the whole.

Some programs adapt queries, keys and values one by one where ours are one linear. A file's tensors by key go in, and
come out with the parts' keys replaced by those of the name that stands for all of them (`models.names.pieces`). The
matrices of parts that share nothing stand in blocks along the diagonal, so that ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from transpixeler.adapters.adapter import MAGNITUDE
from transpixeler.adapters.spelling import split_key
from transpixeler.config.sections import UserError
from transpixeler.models.names import Names, Piece, UnknownName, pieces

Part = dict[str, Tensor]  # by kind, as `Key.kind`
_KINDS = {"lora_A", "lora_B", "alpha", MAGNITUDE}


def join_parts(
    file: Path, stored: Mapping[str, Tensor], names: Names, alpha_of: Callable[[int], float]
) -> dict[str, Tensor]:
    """Return the tensors of a file, those of parts joined. alpha_of: the alpha of a rank that has no key of its own."""
    found: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Part]] = {}  # by the whole's name with its prefix, then the part's
    for key, tensor in stored.items():
        whole = _whole(key, names)
        if whole is None:
            found[key] = tensor
            continue
        parts = split_key(key)
        groups.setdefault(whole, {}).setdefault(parts.before + parts.module, {})[parts.kind] = tensor
    for whole, parts in groups.items():
        if odd := [kind for part in parts.values() for kind in part if kind not in _KINDS]:
            raise UserError(
                f"{file}: changes parts of {whole} ({odd[0]}), which is one linear here; only LoRA is read so"
            )
        found |= _joined(file, whole, [(piece, parts.get(piece.name, {})) for piece in pieces(whole)], alpha_of)
    return found


def _whole(key: str, names: Names) -> str | None:
    """Return the name, with its prefix, of what a key's module is a part of; None where it is no part."""
    try:
        parts = split_key(key)
    except UnknownName:
        return None
    joined = parts.module if parts.flat else names.joined(parts.module)
    return parts.before + joined if len(pieces(joined)) > 1 else None


def _joined(
    file: Path, whole: str, parts: list[tuple[Piece, Part]], alpha_of: Callable[[int], float]
) -> dict[str, Tensor]:
    present = [(piece, part) for piece, part in parts if "lora_A" in part and "lora_B" in part]
    if not present or any(len(part) and "lora_A" not in part for _, part in parts):
        raise UserError(f"{file}: {whole} has parts that are no pair of low-rank matrices")
    names = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "alpha": ".alpha", MAGNITUDE: ".dora_scale"}
    made = _shared(parts) or _in_blocks(present, parts, alpha_of)
    if norms := [part[MAGNITUDE].flatten() for _, part in present if MAGNITUDE in part]:
        if len(norms) < len(parts):
            raise UserError(f"{file}: {whole} is a DoRA in some of its parts, which cannot be one linear's")
        made[MAGNITUDE] = torch.cat(norms)
    return {whole + names[kind]: tensor for kind, tensor in made.items()}


def _shared(parts: list[tuple[Piece, Part]]) -> Part | None:
    """Join parts that have one `lora_A`, as those that were written from a whole; None where they differ."""
    first, *others = [part for _, part in parts]
    if "lora_A" not in first or not all(
        "lora_A" in part
        and torch.equal(part["lora_A"], first["lora_A"])
        and _same(part.get("alpha"), first.get("alpha"))
        for part in others
    ):
        return None
    alpha = {"alpha": first["alpha"]} if "alpha" in first else {}
    return {"lora_A": first["lora_A"], "lora_B": torch.cat([part["lora_B"] for _, part in parts]), **alpha}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _in_blocks(
    present: list[tuple[Piece, Part]], parts: list[tuple[Piece, Part]], alpha_of: Callable[[int], float]
) -> Part:
    """Join parts of their own matrices, scale and all; what is left alone gets rows of zeros."""
    piece, part = present[0]
    unit, rank, before = part["lora_B"].shape[0] // piece.share, sum(len(p["lora_A"]) for _, p in present), 0
    rows = []
    for piece, part in parts:
        up = torch.zeros(unit * piece.share, rank)
        if "lora_A" in part:
            own = len(part["lora_A"])
            alpha = float(part["alpha"]) if "alpha" in part else alpha_of(own)
            up[:, before : before + own] = part["lora_B"] * (alpha / own)
            before += own
        rows.append(up)
    down = torch.cat([part["lora_A"] for _, part in present])
    return {"lora_A": down, "lora_B": torch.cat(rows), "alpha": torch.tensor(float(rank))}
