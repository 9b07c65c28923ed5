"""What a source offers before any file is opened: the values that folders and manifests give and `pairs` examines."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BadSample:
    id: str
    path: str  # a file, or MANIFEST:ROW
    reason: str

    def __post_init__(self) -> None:
        for name in ("id", "path", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """All files of one sample by name; `declared` is what a manifest claims of the first."""

    id: str
    paths: tuple[tuple[str, Path], ...]
    caption: Path | str
    declared: dict[str, Fraction] = field(default_factory=dict)


def printable(name: str) -> str:
    """File names may hold bytes that are not UTF-8; these are shown as escapes, since nothing else could be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def normal(name: str) -> str:
    """One spelling for a name: some file systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
