"""The U-Net's names, as one table. It is no other program's, so that files have the names of our own modules."""

from __future__ import annotations

from collections.abc import Iterator

from transpixeler.families.unet3d.config import MOST_LEVELS
from transpixeler.models.names import Names, Row

_RES = ("vector", "conv1", "norm1", "conv2", "norm2", "shortcut")
_ATTENTION = ("norm", "qkv", "out")
_ENDS = ("embed.conv", "embed.time1", "embed.time2", "embed.null", "head.conv")


def _level(place: str) -> Iterator[str]:
    yield from (f"{place}.{res}.{part}" for res in ("res1", "res2") for part in _RES)
    yield from (f"{place}.{kind}.{part}" for kind in ("spatial", "temporal") for part in _ATTENTION)


def _modules() -> Iterator[str]:
    """Yield the modules of the one block, of as many levels as there may be."""
    yield from (f"start.{part}" for part in _ATTENTION)
    yield from _level("middle")
    yield from (f"last.{part}" for part in _RES)
    for way in ("down", "up"):
        for number in range(MOST_LEVELS):
            yield from (*_level(f"{way}.{number}"), f"{way}.{number}.resample")
    yield "relative"


_ROWS = (
    *(Row(f"blocks.{{n}}.{name}", f"unet.{{n}}.{name}", f"unet.{{n}}.{name}") for name in _modules()),
    *(Row(name, name, name) for name in _ENDS),
)
NAMES = Names(rows=_ROWS, tables=frozenset({"blocks.{n}.relative", "embed.null"}))
