"""The values of an inspected data set: a card for each sample, and what was found in all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transpixeler.data.buckets import Bucket
from transpixeler.data.sources.candidate import BadSample, Note
from transpixeler.data.sources.samples import Sample

NOT_FITTING = (
    "data.resolutions and data.frames say which sizes and lengths do; set them, such as data.frames=[17], or name a "
    "config in place of a folder"
)
FLAGS = {
    "blank alpha": "the matte is empty in every frame that was looked at",
    "all opaque": "the matte hides nothing, so there is nothing to learn from it",
    "static alpha": "the matte stays the same while the picture moves",
    "colored alpha": "the matte has colours: perhaps the wrong file, or a picture",
    "hidden color": "the colour under zero alpha is not the fill that data.fill names",
}


@dataclass(frozen=True)
class Card:
    """A sample as the page shows it: a strip of frames for each stream, as image bytes."""

    sample: Sample
    strips: tuple[tuple[str, bytes], ...]
    flags: tuple[str, ...]
    shown: int = 1  # frames of a strip
    histogram: tuple[float, ...] = ()  # of the matte, shares of four levels each


@dataclass(frozen=True)
class Used:
    """The frames of a video that its clips take, at the rate of training."""

    ranges: tuple[tuple[int, int], ...]  # [first, last), apart from each other and in order
    frames: int  # that there are
    rate: str = ""  # that they are counted at, where it is not the video's own

    @property
    def count(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def __str__(self) -> str:
        return f"{self.count} of {self.frames} frames used{f' at {self.rate} fps' if self.rate else ''}"


@dataclass(frozen=True)
class Inspection:
    """Everything that was found, for the terminal and for exit codes."""

    samples: int
    bad: tuple[BadSample, ...]
    dropped: tuple[tuple[str, str], ...]
    buckets: tuple[tuple[Bucket, int], ...]
    flags: tuple[tuple[str, int], ...]
    page: Path
    expected: str  # the files that make a sample
    notes: tuple[Note, ...] = ()
    used: tuple[tuple[str, Used], ...] = ()  # by sample id, of each video

    @property
    def frames(self) -> tuple[int, int]:
        """Return how many frames of all videos are used, and how many there are."""
        return sum(used.count for _, used in self.used), sum(used.frames for _, used in self.used)

    def lines(self) -> Iterator[str]:
        """Yield what the page says, without its pictures."""
        yield f"{self.samples} samples can be used, {len(self.bad)} cannot"
        if not self.samples:
            yield f"expected {self.expected}"
        yield from (f"  {bad.id}: {bad.reason} ({bad.path})" for bad in self.bad)
        yield from (f"  {note}" for note in self.notes)
        yield f"{sum(count for _, count in self.buckets)} clips in {len(self.buckets)} buckets"
        yield from (f"  {bucket}: {count}" for bucket, count in self.buckets)
        if self.samples and not self.buckets:
            yield f"no clip fits: {NOT_FITTING}"
        used, frames = self.frames
        if frames:
            yield f"{used:,} of {frames:,} frames of the videos are used ({share(used, frames)})"
        if self.dropped:
            yield f"{len(self.dropped)} clips dropped"
            yield from (f"  {count} × {reason}" for reason, count in Counter(r for _, r in self.dropped).most_common())
        yield from (f"{count} samples flagged: {flag} ({FLAGS[flag]})" for flag, count in self.flags if count)
        yield f"page: {self.page}"


def share(part: int, whole: int) -> str:
    """Return a part in percent; what is not all of it is never 100 %."""
    return f"{min(99, round(100 * part / whole)) if part < whole else 100} %"
