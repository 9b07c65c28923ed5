"""Find the samples of a folder (NAME.ext, NAME_seg.ext, NAME.txt): a path in, candidates out.

A subfolder of nothing but images is a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transpixeler.config import UserError
from transpixeler.data.media.files import IMAGE_ENDINGS, VIDEO_ENDINGS
from transpixeler.data.sources.candidate import BadSample, Candidate, normal

MEDIA_ENDINGS = VIDEO_ENDINGS | IMAGE_ENDINGS
MAY_HOLD_ALPHA = frozenset([".mov", ".mkv", ".webm", ".avi", ".gif", ".png", ".webp", ".tif", ".tiff"])


@dataclass(slots=True)
class Listing:
    """The media and captions of one folder by stem, and its subfolders."""

    media: dict[str, list[Path]] = field(default_factory=dict)
    captions: dict[str, Path] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)


def folder_candidates(
    root: Path, name: str, streams: Mapping[str, str], *, rgba: bool
) -> Iterator[Candidate | BadSample]:
    """Yield every sample of a folder and its subfolders; files that belong to no sample are named."""
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        if (real := folder.resolve()) in seen:  # links may go in circles
            continue
        seen.add(real)
        listing = _listing(folder)
        waiting += listing.folders
        prefix = "/".join((name, *map(normal, folder.relative_to(root).parts)))
        yield from (_rgba if rgba else _pairs)(listing, prefix, streams)


def _listing(folder: Path) -> Listing:
    listing = Listing()
    for path in _listed(folder):
        if path.is_dir():
            if is_sequence(path):
                listing.media.setdefault(normal(path.name), []).append(path)
            else:
                listing.folders.append(path)
        elif path.suffix.lower() in MEDIA_ENDINGS:
            listing.media.setdefault(normal(path.stem), []).append(path)
        elif path.suffix.lower() == ".txt":
            listing.captions[normal(path.stem)] = path
    return listing


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}; check its permissions") from error


def is_sequence(folder: Path) -> bool:
    """Tell whether a folder is a video: it holds images and nothing else, so no captions either."""
    files = _listed(folder)
    return bool(files) and all(path.suffix.lower() in IMAGE_ENDINGS and path.is_file() for path in files)


def _pairs(listing: Listing, prefix: str, streams: Mapping[str, str]) -> Iterator[Candidate | BadSample]:
    """Group files by the name of the first stream's file."""
    primary = next(iter(streams))
    groups: dict[str, dict[str, list[Path]]] = {}
    for stem, paths in listing.media.items():
        base, stream = _split(stem, streams)
        groups.setdefault(base, {})[stream] = paths
    for base, group in groups.items():
        if primary in group:
            yield _candidate(f"{prefix}/{base}", base, group, listing.captions, streams)
        else:
            for stream, paths in group.items():
                reason = f"{stream} file without its {primary} file {base}.*"
                yield from (BadSample(f"{prefix}/{base}", str(path), reason) for path in paths)
    for stem, path in listing.captions.items():
        if stem not in groups:
            yield BadSample(f"{prefix}/{stem}", str(path), f"caption without a {primary} file {stem}.*")


def _rgba(listing: Listing, prefix: str, streams: Mapping[str, str]) -> Iterator[Candidate | BadSample]:
    """Yield a candidate for each file with alpha, which stands for all streams."""
    for stem, paths in listing.media.items():
        if _split(stem, streams)[0] != stem and _split(stem, streams)[0] in listing.media:
            reason = "a stream file beside its base, but this source is rgba: one file with alpha gives both streams"
            yield from (BadSample(f"{prefix}/{stem}", str(path), reason) for path in paths)
        else:
            yield _candidate(f"{prefix}/{stem}", stem, dict.fromkeys(streams, paths), listing.captions, streams)
    for stem, path in listing.captions.items():
        if stem not in listing.media:
            yield BadSample(f"{prefix}/{stem}", str(path), f"caption without a file {stem}.*")


def _split(stem: str, streams: Mapping[str, str]) -> tuple[str, str]:
    """Split a stem into (base, stream): the longest suffix at its end wins, and a base is never empty."""
    for stream, suffix in sorted(streams.items(), key=lambda item: -len(item[1])):
        if stem.endswith(suffix) and len(stem) > len(suffix):
            return stem[: len(stem) - len(suffix)], stream
    return stem, next(iter(streams))


def _candidate(
    sample: str, base: str, group: Mapping[str, list[Path]], captions: Mapping[str, Path], streams: Mapping[str, str]
) -> Candidate | BadSample:
    first = str(group[next(iter(streams))][0])
    for stream, suffix in streams.items():
        if stream not in group:
            return BadSample(sample, first, f"no {stream} file {base}{suffix}.*{_advice(Path(first), streams)}")
        if len(group[stream]) > 1:
            names = " and ".join(path.name for path in group[stream])
            return BadSample(sample, first, f"more than one {stream} file: {names}")
    if base not in captions:
        return BadSample(sample, first, f"no caption {base}.txt")
    return Candidate(sample, tuple((stream, group[stream][0]) for stream in streams), captions[base])


def _advice(there: Path, streams: Mapping[str, str]) -> str:
    """Suggest `rgba` where a file without companion may hold both streams by itself."""
    if len(streams) == 2 and (there.is_dir() or there.suffix.lower() in MAY_HOLD_ALPHA):
        return f"; if the {next(iter(streams))} file holds alpha, set rgba: true for its source"
    return ""
