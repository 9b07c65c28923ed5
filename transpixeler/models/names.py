"""The names of one architecture's weights: a name of one spelling goes in, the same weight's name in another comes out.

Three spellings exist. *Original*: the published checkpoints and ComfyUI files. *Diffusers*: its transformer class.
*Internal*: our module's parameters (`embed.…`, `blocks.3.…`, `head.…`). A family gives one table; each map is a
bijection over it, and a name outside the table raises `UnknownName`, so that nothing is loaded or saved under a guess.

Where one spelling stores in several tensors what another stores in one, a name stands for all: `(to_q+to_k+to_v)` for
their rows one after the other, `(to_q+mlp*4)` where the second has four times the rows of the first, `norm~` for
one whose halves are swapped. `pieces` says which rows of which tensors those are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = "{n}"  # in a row of the table: the number of a block


class UnknownName(KeyError):
    """The name is not one of the family's in the spelling asked for."""


class Row(NamedTuple):
    """One module, or one parameter that is no module's, in each spelling; `{n}` stands for a block's number."""

    internal: str
    original: str
    diffusers: str


class Piece(NamedTuple):
    """Rows that one of our tensors has of a stored one: those from `start` to `stop` of its `of` equal parts."""

    name: str
    share: int = 1  # of our rows
    start: int = 0
    stop: int = 1
    of: int = 1

    def rows(self, count: int) -> slice:
        """Return which rows these are of the stored tensor's `count`."""
        return slice(self.start * count // self.of, self.stop * count // self.of)


def pieces(name: str) -> list[Piece]:
    """Return what a name stands for, in the order of our rows: one whole tensor, where it is a plain name."""
    if joined := re.fullmatch(r"(.*)\((.*)\)(.*)", name):
        before, inside, after = joined.groups()
        parts = [part.partition("*") for part in inside.split("+")]
        return [Piece(f"{before}{part}{after}", int(share or 1)) for part, _, share in parts]
    if "~" in name:
        stored = name.replace("~", "")
        return [Piece(stored, 1, 1, 2, 2), Piece(stored, 1, 0, 1, 2)]
    return [Piece(name)]


def split_rows(tensor: Tensor, name: str) -> dict[str, Tensor]:
    """Return the stored tensors that a name stands for, from the one of ours."""
    parts = pieces(name)
    unit = len(tensor) // sum(part.share for part in parts) if len(parts) > 1 else len(tensor)
    rows = tensor.split([unit * part.share for part in parts])
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for part, own in zip(parts, rows, strict=True):
        found.setdefault(part.name, []).append((part.start, own))
    ordered = {stored: [own for _, own in sorted(of, key=lambda pair: pair[0])] for stored, of in found.items()}
    return {stored: of[0] if len(of) == 1 else torch.cat(of) for stored, of in ordered.items()}


class _Map:
    """A map from names of one spelling to names of another; `{n}` in a name stands for a block's number."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        plain, numbered = {}, []
        for name, target in pairs:
            if BLOCK in name:
                start, end = name.split(BLOCK)
                numbered.append((start, end, target))
            else:
                plain[name] = target
        self.plain = plain
        self.starts = {start for start, _, _ in numbered}
        self.numbered = {(start, end): target for start, end, target in numbered}

    def __call__(self, name: str) -> str:
        if name in self.plain:
            return self.plain[name]
        for start in self.starts:
            match = re.match(r"(0|[1-9]\d*)", name[len(start) :]) if name.startswith(start) else None
            target = match and self.numbered.get((start, name[len(start) + match.end() :]))
            if match and target:
                return target.replace(BLOCK, match[0])
        raise UnknownName(name)


def _no_header(config: Mapping[str, Any]) -> dict[str, str]:
    return {}


@dataclass(frozen=True, eq=False)
class Loaders:
    """Facts of other programs' loaders: the files of a family that they read, and what they take for granted.

    `tools/clients` asks the real programs.
    """

    read_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by format of a plain adapter: programs
    joint_read_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the same of a joint adapter
    model_read_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by layout, file or folder: programs
    alpha_keys: bool = True  # False: `.alpha` is refused, so that the scale goes into the weights
    whole_blocks: frozenset[str] = frozenset()  # formats in which diffusers takes every linear of a block for granted
    widths: Mapping[str, int] = field(default_factory=dict)  # by format: of a model, which diffusers takes for granted
    file_prefix: str = ""  # of the weights in a file of the whole transformer
    file_header: Callable[[Mapping[str, Any]], Mapping[str, str]] = _no_header  # config → header of such a file


@dataclass(frozen=True, eq=False)
class Names:
    """One family's table, and what follows from it. `tables`: internal names of parameters that are no module's."""

    rows: Sequence[Row]
    tables: frozenset[str] = frozenset()
    block_linears: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # of a block, by their sizes' names
    loaders: Loaders = field(default_factory=Loaders)

    @cached_property
    def _maps(self) -> dict[tuple[str, str], _Map]:
        spelled = {kind: [getattr(row, kind) for row in self.rows] for kind in Row._fields}
        spelled["flat"] = [name.replace(".", "_") for name in spelled["original"]]
        return {(a, b): _Map(zip(spelled[a], spelled[b])) for a in spelled for b in spelled if a != b}

    @cached_property
    def _joins(self) -> _Map:
        """Names of stored modules that another spelling has as a part of one, to the name that stands for all."""
        wide = [row.diffusers for row in self.rows if len(pieces(row.diffusers)) > 1]
        return _Map((part.name, name) for name in wide for part in pieces(name))

    def joined(self, module: str) -> str:
        """Return the name that stands for a stored module of diffusers and those beside it, or its own."""
        try:
            return self._joins(module)
        except UnknownName:
            return module

    @cached_property
    def _bare(self) -> dict[str, frozenset[str]]:
        """Names of parameters that are no module's, in each spelling."""
        return {
            kind: frozenset(getattr(r, kind) for r in self.rows if r.internal in self.tables) for kind in Row._fields
        }

    # -- modules

    def module(self, name: str, *, source: str, to: str) -> str:
        """Translate the name of a module: `blocks.0.self_attn.q` from `original` to `diffusers`, say."""
        return name if source == to else self._maps[source, to](name)

    def read_module(self, name: str) -> str:
        """Return the internal name of a module in the original or the diffusers spelling, or of what it is part of."""
        try:
            return self.module(name, source="original", to="internal")
        except UnknownName:
            return self.module(self.joined(name), source="diffusers", to="internal")

    # -- parameters

    def weight_of(self, module: str) -> str:
        """Return the internal name of a module's weight; a table is its own module and its own weight."""
        return module if self._is_bare(module, "internal") else f"{module}.weight"

    def parameter(self, name: str, *, source: str, to: str) -> str:
        """Translate the name of a parameter: `blocks.0.norm3.weight` from `original` to `diffusers`, say."""
        module, leaf = self._split(name, source)
        return self.module(module, source=source, to=to) + leaf

    def _split(self, name: str, spelling: str) -> tuple[str, str]:
        """Split a parameter's name into its module and `.weight` or `.bias`; a table is its own module."""
        if self._is_bare(name, spelling):
            return name, ""
        module, dot, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or self._is_bare(module, spelling):
            raise UnknownName(name)
        return module, dot + leaf

    def _is_bare(self, name: str, spelling: str) -> bool:
        return re.sub(r"(?<=\.)([a-z]?)(0|[1-9]\d*)(?=\.)", rf"\1{BLOCK}", name, count=1) in self._bare[spelling]

    def internal_names(self, stored: Iterable[str]) -> dict[str, str]:
        """Map the internal name of each weight of a file, in either spelling, to the name it is stored under.

        Weights that are parts of one of ours are found under the name that stands for all of them, if all are there. A
        name outside the table stays what it is: whoever compares the names with a model's complains about it.
        """
        there = set(stored)
        names = list(dict.fromkeys(self._whole(name, there) for name in sorted(there)))
        spelling = max(("original", "diffusers"), key=lambda kind: sum(self._is_known(name, kind) for name in names))
        return {self._internal_or_same(name, spelling): name for name in names}

    def _whole(self, name: str, stored: set[str]) -> str:
        module, dot, leaf = name.rpartition(".")
        joined = self.joined(module) + dot + leaf
        return joined if all(part.name in stored for part in pieces(joined)) else name

    def _is_known(self, name: str, spelling: str) -> bool:
        try:
            return bool(self.parameter(name, source=spelling, to="internal"))
        except UnknownName:
            return False

    def _internal_or_same(self, name: str, spelling: str) -> str:
        return self.parameter(name, source=spelling, to="internal") if self._is_known(name, spelling) else name
