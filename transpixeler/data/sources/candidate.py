"""Values for what a source offers before any file is opened: folders and manifests make them, `pairs` examines them."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from transpixeler.data.names import printable


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", printable(self.id))
