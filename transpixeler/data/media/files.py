"""Find the files of one video: a path in; the file itself, or the numbered images that it stands for, out.

Such a path is a folder of images, or a pattern: `fire.####.png` stands for fire.1001.png, fire.1002.png and so on.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from transpixeler.data.media.errors import BadMedia

VIDEO_ENDINGS = frozenset(
    [".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"]
)
IMAGE_ENDINGS = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".exr", ".dpx"])
LINEAR_ENDINGS = frozenset([".exr", ".dpx"])  # of files that hold linear light, or may
PATTERN = re.compile(r"[^#]*#+[^#]*")
SETTLED_SECONDS = 2.0


def spans_files(path: Path) -> bool:
    """Tell whether a path stands for numbered images: a folder of them, or a pattern such as fire.####.png."""
    return os.path.isdir(path) or is_pattern(path)  # noqa: PTH112  pathlib takes several times as long


def is_pattern(path: Path) -> bool:
    """Tell whether a name has one run of # for the number of an image, and is no file of its own."""
    return (
        "#" in path.name
        and bool(PATTERN.fullmatch(path.name))
        and path.suffix.lower() in IMAGE_ENDINGS
        and not path.exists()
    )


def pattern_of(file: Path, number: tuple[int, int]) -> Path:
    """Return the pattern of a file's sequence. number: where in its name the number begins and ends."""
    start, end = number
    return file.with_name(f"{file.name[:start]}{'#' * (end - start)}{file.name[end:]}")


def ending_of(path: Path) -> str:
    """Return the ending, in lower case, of a video's file or of its images."""
    files = files_of(path) if path.is_dir() else ()
    return (files[0] if files else path).suffix.lower()


def stem_of(path: Path) -> str:
    """Return the name that a video's caption has too: without an ending, and of a pattern without its number."""
    if path.is_dir():
        return path.name
    return re.sub(r"[._-]?#+", "", path.stem) if is_pattern(path) else path.stem


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the path itself, or the images of a sequence in natural order."""
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS and not p.name.startswith(".")]
    elif is_pattern(path):
        found = _matching(path)
    else:
        return (path,)
    return tuple(sorted(found, key=natural))


def _matching(pattern: Path) -> list[Path]:
    head, tail = re.split("#+", pattern.stem)
    folder, key = pattern.parent, (head, tail + pattern.suffix.lower())
    try:
        changed = folder.stat().st_mtime_ns
    except FileNotFoundError:
        return []
    if time.time_ns() - changed > SETTLED_SECONDS * 1e9:  # else it may change again within one tick of its clock
        return [folder / name for name in _numbered(folder, changed).get(key, ())]
    names = (path.name for path in folder.iterdir() if path.name.startswith(head))
    return [folder / name for name in names if key in _keys(name)]


@functools.lru_cache(maxsize=4)
def _numbered(folder: Path, _: int) -> dict[tuple[str, str], list[str]]:
    """Return a folder's names by what they are without a number: listing it for each sequence would be quadratic."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in folder.iterdir():
        for key in _keys(path.name):
            found.setdefault(key, []).append(path.name)
    return found


def _keys(name: str) -> Iterator[tuple[str, str]]:
    """Yield, for each number in a name, what stands before it and behind it; the ending is in lower case."""
    stem, dot, ending = name.rpartition(".")
    for number in re.finditer("[0-9]+", stem):
        yield stem[: number.start()], stem[number.end() :] + dot + ending.lower()


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
