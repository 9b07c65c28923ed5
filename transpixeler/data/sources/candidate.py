"""Values for what a source offers before any file is opened: folders and manifests make them, `pairs` examines them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used, and why."""

    id: str
    path: str  # a file, or MANIFEST:ROW
    reason: str

    def __post_init__(self) -> None:
        for name in ("id", "path", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """Name all files of one sample; `declared` is what a manifest claims about the first."""

    id: str
    paths: tuple[tuple[str, Path], ...]
    caption: Path | str
    declared: dict[str, Fraction] = field(default_factory=dict)


def printable(name: str) -> str:
    """Show bytes of a file name that are not UTF-8 as escapes, since nothing else could be written."""
    return name.encode("utf-8", "backslashreplace").decode()


def normal(name: str) -> str:
    """Return one spelling of a name: some file systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
