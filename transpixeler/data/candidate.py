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


@dataclass(frozen=True, slots=True)
class Candidate:
    """All files of one sample by name; `declared` is what a manifest claims of the first."""

    id: str
    paths: tuple[tuple[str, Path], ...]
    caption: Path | str
    declared: dict[str, Fraction] = field(default_factory=dict)


def normal(name: str) -> str:
    """One spelling for a name: some file systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
