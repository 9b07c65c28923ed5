"""Find the files of one video: a path in; the file itself, or the numbered images of a sequence folder, out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

from transpixeler.data.media.errors import BadMedia

VIDEO_ENDINGS = frozenset(
    [".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"]
)
IMAGE_ENDINGS = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the path itself, or the images of a sequence folder in natural order."""
    if not path.is_dir():
        return (path,)
    found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    return tuple(sorted(found, key=natural))


def natural(path: Path) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts frame_10 after frame_9."""
    parts = re.split(r"([0-9]+)", path.name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts)


def numbers_of(files: Sequence[Path]) -> tuple[int, ...] | None:
    """Return the frame numbers in the names of a sequence's files; None where the names do not count frames."""
    parts = [re.split(r"([0-9]+)", file.stem) for file in files]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return None
    counters = [values for values in zip(*(map(int, part[1::2]) for part in parts)) if len(set(values)) > 1]
    return counters[0] if len(counters) == 1 else None


def check_gaps(files: Sequence[Path]) -> None:
    """Refuse a sequence that lacks a file: a frame's number is its place, so all later frames would shift."""
    numbers = numbers_of(files) or ()
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    usual = min(steps, default=0)
    even = usual == math.gcd(*steps)  # uneven steps, such as times, tell nothing
    for k, step in enumerate(steps):
        names = files[k].name, files[k + 1].name
        if not step:
            raise BadMedia(f"has frame {numbers[k]} twice: {' and '.join(names)}")
        if even and step > usual:
            missing = numbers[k] + usual
            raise BadMedia(f"lacks frame {missing}: {names[0]} is followed by {names[1]}; add it, or rename the files")
