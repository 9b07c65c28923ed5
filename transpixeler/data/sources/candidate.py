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
class Note:
    """Say what becomes of files that make no sample, or how files were understood; those of one text are counted."""

    text: str
    path: str  # one of them
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("text", "path"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.count:,} × {self.text} ({self.path}{', …' if self.count > 1 else ''})"


def counted(note: Note, others: Note | None) -> Note:
    """Add a note to those of its text; the path that comes first stands for all."""
    return note if others is None else Note(note.text, min(note.path, others.path), note.count + others.count)


TEXT_COLUMN = "text_fea"  # of a manifest: the file with a caption's features


def latent_column(stream: str, first: str) -> str:
    """Return the column of a stream's latents: `latent` for the first stream, else after the stream's name."""
    return "latent" if stream == first else f"{stream}_latent"


@dataclass(frozen=True, slots=True)
class Features:
    """Name the files of a manifest's row that hold what would be encoded."""

    row: str  # as messages say it
    latents: tuple[tuple[str, Path], ...] = ()  # by stream: of all streams, or of none
    text: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.latents or self.text)

    def share_a_file(self, stream: str) -> bool:
        """Tell whether a stream's latents lie in one file with another's, where only a name tells them apart."""
        paths = {name: path.resolve() for name, path in self.latents}
        return list(paths.values()).count(paths[stream]) > 1


NOT_GIVEN = Features("")


@dataclass(frozen=True, slots=True)
class TextRow:
    """Hold a row that gives the features of a text alone, such as the empty caption or a prompt."""

    id: str
    text: str
    features: Features


@dataclass(frozen=True, slots=True)
class Candidate:
    """Name all files of one sample; `declared` is what a manifest claims about the first.

    Where a row gives latents, `paths` are theirs.
    """

    id: str
    paths: tuple[tuple[str, Path], ...]
    caption: Path | str
    declared: dict[str, Fraction] = field(default_factory=dict)
    features: Features = NOT_GIVEN

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", printable(self.id))
