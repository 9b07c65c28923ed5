"""Tell image sequences from stills: the images of one folder in; clips, each by its pattern, and stills out.

Numbered images (`fire.1001.png`, `fire_0001.png`, `fire0001.png`) are the frames of one clip, unless one of them has a
caption of its own: then all are stills.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from transpixeler.data.media.files import natural, pattern_of
from transpixeler.data.names import normal

# A name, a number, and perhaps a companion's suffix behind it: fire.1001, fire.1001_seg
NUMBERED = re.compile(r"(?P<head>.*?)(?P<number>[0-9]+)(?P<tail>([._-][^\W\d]+)?)")
SEPARATORS = "._-"
DIGITS = 3  # that a number has at least where nothing separates it from the name: photo2.png is no second frame


class ImageSequence(NamedTuple):
    """The numbered images of one clip."""

    stem: str  # the name that its caption has too
    pattern: Path
    files: tuple[Path, ...]


class Sorted(NamedTuple):
    """The images of one folder, told apart."""

    sequences: tuple[ImageSequence, ...]
    stills: tuple[Path, ...]
    captioned: tuple[Path, ...]  # of the stills: those that are numbered, where some of a name have captions, not all


def tell_apart(images: Iterable[Path], captions: Container[str]) -> Sorted:
    """Sort a folder's images into clips and stills. captions: the names that have one."""
    images = tuple(images)
    stems = {normal(image.stem) for image in images}
    groups: dict[tuple[str, ...], list[tuple[Path, re.Match[str]]]] = {}
    alone: list[Path] = []
    own: set[str] = set()  # heads of stills
    lacking: set[str] = set()  # heads of images without a caption
    for image in images:
        match = NUMBERED.fullmatch(image.stem)
        if match is None or not _counts(match):
            alone.append(image)
            continue
        groups.setdefault((match["head"], match["tail"], image.suffix.lower()), []).append((image, match))
        told = normal(image.stem) in captions or normal(match["head"] + match["number"]) in captions
        (own if told else lacking).add(match["head"])
    sequences, captioned = [], []
    for (head, tail, _), found in groups.items():
        files = [image for image, _ in found]
        stem = normal((head[:-1] if head.endswith(tuple(SEPARATORS)) else head or _hashes(found)) + tail)
        if len(files) > 1 and head not in own and stem not in stems:
            sequences.append(_sequence(stem, found))
        else:
            alone += files
            captioned += files if len(files) > 1 and head in own & lacking else []
    return Sorted(tuple(sequences), tuple(alone), tuple(captioned))


def _hashes(found: Iterable[tuple[Path, re.Match[str]]]) -> str:
    """Return the name of images that have none but their numbers."""
    return "#" * min(len(match["number"]) for _, match in found)


def _counts(match: re.Match[str]) -> bool:
    """Tell whether a number may count frames: all there is, or behind a name of letters and a separator or long."""
    head, number = match["head"], match["number"]
    if not head:
        return True
    return any(map(str.isalpha, head)) and (head[-1] in SEPARATORS or len(number) >= DIGITS)


def _sequence(stem: str, found: Iterable[tuple[Path, re.Match[str]]]) -> ImageSequence:
    files = sorted(found, key=lambda one: natural(one[0]))
    first, match = files[0]
    return ImageSequence(stem, pattern_of(first, match.span("number")), tuple(image for image, _ in files))
