"""Convert the names of modules that get an adapter: PEFT's `target_modules` in, names of lora.targets out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from migrate_keys import Migration, Table, Value

from transpixeler.models.family import Family

WHOLE = re.compile(r"all-linear|Wan(Attention|Transformer)Block")  # PEFT's word for all, and classes of whole blocks
BLOCKS = (0, 7, 24)  # some of a model's, to try an expression on
READS_TEXT = "it reads the text, which is no companion's: lora.scope: all would be needed"


def targets(table: Table, migration: Migration, family: Family) -> None:
    """Set lora.scope and lora.targets: as `target_modules` says, else every linear of a block, as it was there."""
    linears = tuple(family.names.block_linears) or family.lora_targets
    readers = [name for name in linears if name not in family.lora_targets]
    if not migration.pair:
        migration.set("lora.scope", "all")
    if "target_modules" in table.values:
        table.apply(
            "target_modules", lambda given: _given(given, migration, linears, readers if migration.pair else ())
        )
    elif not migration.pair:
        migration.set("lora.targets", list(linears))
    elif readers:
        both = f"{readers[0]} and .{readers[-1].rpartition('.')[2]}"
        migration.notes.append(f"{both}, which read the text, are not adapted, because lora.scope is aux")
    if not family.names.block_linears:
        migration.notes.append("linears of text tokens are not adapted unless lora.targets names them")


def _given(given: Value, migration: Migration, linears: Sequence[str], banned: Sequence[str]) -> None:
    """Carry over a list of names or one expression; name each part that says nothing of a block's linears."""
    if not isinstance(given, str | list) or not all(isinstance(one, str) for one in given):
        raise ValueError(given)
    chosen: set[str] = set()
    for one in [given] if isinstance(given, str) else given:
        named = _by_name(one, linears) or (_by_expression(one, linears) if isinstance(given, str) else set())
        if not named:
            migration.leave("adapter.target_modules", one, _reason(linears))
        for name in sorted(named & set(banned)):
            migration.leave(f"adapter.target_modules: {name}", one, READS_TEXT)
        chosen |= named - set(banned)
    if chosen:
        migration.set("lora.targets", [name for name in linears if name in chosen])


def _by_name(one: str, linears: Sequence[str]) -> set[str]:
    """Return the linears that a name stands for: its own, or the end of theirs."""
    return {name for name in linears if WHOLE.fullmatch(one) or f".{name}".endswith(f".{one}")} if one else set()


def _by_expression(one: str, linears: Sequence[str]) -> set[str]:
    """Return the linears whose whole name a regular expression matches, in every block alike."""
    try:
        wanted = re.compile(one)
    except (re.error, OverflowError, RecursionError):
        return set()
    found = [{name for name in linears if wanted.fullmatch(f"blocks.{number}.{name}")} for number in BLOCKS]
    return found[0] if all(names == found[0] for names in found) else set()


def _reason(linears: Sequence[str]) -> str:
    return (
        f"it is not the name of a block's linear layer, the same in every block; lora.targets takes "
        f"{', '.join(linears)} and patterns of them, and without it the model's own choice is adapted"
    )
