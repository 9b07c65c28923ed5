"""Find the samples of a folder (NAME.ext, NAME_seg.ext, NAME.txt): a path in, candidates out.

A subfolder of the images of one clip is a video, and so are numbered images without captions of their own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transpixeler.config.sections import UserError
from transpixeler.data.kept import KEPT_ENDING
from transpixeler.data.media.files import IMAGE_ENDINGS, VIDEO_ENDINGS, is_pattern
from transpixeler.data.media.probe import NAME as PROBES
from transpixeler.data.names import normal, printable
from transpixeler.data.sources.candidate import BadSample, Candidate, Note
from transpixeler.data.sources.sequences import SEPARATORS, tell_apart

MEDIA_ENDINGS = VIDEO_ENDINGS | IMAGE_ENDINGS
CAPTION_ENDING = ".txt"
KNOWN_ENDINGS = MEDIA_ENDINGS | {CAPTION_ENDING}
MAY_HOLD_ALPHA = frozenset([".mov", ".mkv", ".webm", ".avi", ".gif", ".png", ".webp", ".tif", ".tiff", ".exr", ".dpx"])
NOT_READ = "file of a kind that is not read: *{}"
HIDDEN = "file or folder whose name begins with a dot"
UNTAKEN = "file NAME{} beside NAME has no caption and is no stream of this config"
FRAMES = "numbered image without a caption of its own, a frame of one clip"
STILLS = "numbered image that is a still, as others of its name have captions of their own"


@dataclass(slots=True)
class Listing:
    """The media and captions of one folder by stem, its subfolders, and notes on what else it holds."""

    media: dict[str, list[Path]] = field(default_factory=dict)
    captions: dict[str, list[Path]] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def folder_candidates(
    root: Path, name: str, streams: Mapping[str, str], *, rgba: bool
) -> Iterator[Candidate | BadSample | Note]:
    """Yield every sample of a folder and its subfolders; files that belong to no sample are named or counted."""
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        if (real := folder.resolve()) in seen:  # links may go in circles
            continue
        seen.add(real)
        listing = listed(folder)
        waiting += listing.folders
        prefix = "/".join((name, *map(normal, folder.relative_to(root).parts)))
        yield from listing.notes
        yield from (_rgba if rgba else _pairs)(listing, prefix, streams)


def listed(folder: Path) -> Listing:
    """List what a folder holds, with each image sequence in it as one pattern."""
    listing, images = Listing(), []
    for path in _entries(folder):
        kind = path.suffix.lower()
        if path.name.startswith("."):
            listing.notes.append(Note(HIDDEN, str(path)))
        elif path.is_dir():
            if is_sequence(path):
                listing.media.setdefault(normal(path.name), []).append(path)
                listing.notes += _odd(_entries(path))
            elif not holds_cache(entry.name for entry in _entries(path)):
                listing.folders.append(path)
        elif kind in IMAGE_ENDINGS:
            images.append(path)
        elif kind in VIDEO_ENDINGS:
            listing.media.setdefault(normal(path.stem), []).append(path)
        elif kind == CAPTION_ENDING:
            listing.captions.setdefault(normal(path.stem), []).append(path)
        else:
            listing.notes += _odd([path])
    _add_images(listing, images)
    return listing


def _add_images(listing: Listing, images: list[Path]) -> None:
    found = tell_apart(images, listing.captions)
    for sequence in found.sequences:
        listing.media.setdefault(sequence.stem, []).append(sequence.pattern)
        listing.notes.append(Note(FRAMES, str(sequence.files[0]), len(sequence.files)))
    for still in found.stills:
        listing.media.setdefault(normal(still.stem), []).append(still)
    for paths in listing.media.values():
        paths.sort()
    if found.captioned:
        listing.notes.append(Note(STILLS, str(found.captioned[0]), len(found.captioned)))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{printable(str(folder))}: cannot be listed: {error.strerror}; check its permissions"
        ) from error


def is_sequence(folder: Path) -> bool:
    """Tell whether a folder is a video: it holds the images of one clip, no other media and no captions."""
    files = [path for path in _entries(folder) if not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    others = (path for path in files if path.suffix.lower() in KNOWN_ENDINGS - IMAGE_ENDINGS)
    if not images or any(others) or any(path.is_dir() for path in files):
        return False
    return len(tell_apart(images, ()).sequences) < 2


def _odd(paths: Iterable[Path]) -> Iterator[Note]:
    """Note the files that are neither media nor captions."""
    for path in paths:
        if path.name.startswith("."):
            yield Note(HIDDEN, str(path))
        elif path.suffix.lower() not in KNOWN_ENDINGS:
            yield Note(NOT_READ.format(path.suffix.lower() or path.name), str(path))


def holds_cache(names: Iterable[str]) -> bool:
    """Tell by the names in it whether a folder is a cache of encoded clips, which lies beside the data."""
    return any(name == PROBES or name.endswith((".seg", KEPT_ENDING)) for name in names)


def _pairs(listing: Listing, prefix: str, streams: Mapping[str, str]) -> Iterator[Candidate | BadSample | Note]:
    """Group files by the name of the first stream's file."""
    primary = next(iter(streams))
    groups: dict[str, dict[str, list[Path]]] = {}
    for stem, paths in listing.media.items():
        base, stream = _split(stem, streams)
        groups.setdefault(base, {})[stream] = paths
    for base, group in groups.items():
        if primary not in group:
            for stream, paths in group.items():
                reason = f"{stream} file without its {primary} file {base}.*"
                yield from (BadSample(f"{prefix}/{base}", str(path), reason) for path in paths)
        elif suffix := _untaken(base, group, groups, listing):
            yield from (Note(UNTAKEN.format(suffix), str(path)) for path in group[primary])
        else:
            yield _candidate(f"{prefix}/{base}", base, group, listing.captions, streams)
    yield from _captions_alone(listing, prefix, groups, f"a {primary} file")


def _untaken(base: str, group: Mapping[str, object], groups: Container[str], listing: Listing) -> str:
    """Return the suffix of a file that nobody asked for: beside a sample's, without a caption or a companion."""
    if len(group) > 1 or base in listing.captions:
        return ""
    for at in range(len(base) - 1, 0, -1):
        if base[at] in SEPARATORS and base[:at] in groups and base[:at] in listing.captions:
            return base[at:]
    return ""


def _captions_alone(listing: Listing, prefix: str, taken: Container[str], wanted: str) -> Iterator[BadSample]:
    for stem, paths in listing.captions.items():
        if stem not in taken:
            yield from (
                BadSample(f"{prefix}/{stem}", str(path), f"caption without {wanted} {stem}.*") for path in paths
            )


def _rgba(listing: Listing, prefix: str, streams: Mapping[str, str]) -> Iterator[Candidate | BadSample]:
    """Yield a candidate for each file with alpha, which stands for all streams."""
    for stem, paths in listing.media.items():
        if _split(stem, streams)[0] != stem and _split(stem, streams)[0] in listing.media:
            reason = "a stream file beside its base, but this source is rgba: one file with alpha gives both streams"
            yield from (BadSample(f"{prefix}/{stem}", str(path), reason) for path in paths)
        else:
            yield _candidate(f"{prefix}/{stem}", stem, dict.fromkeys(streams, paths), listing.captions, streams)
    yield from _captions_alone(listing, prefix, listing.media, "a file")


def _split(stem: str, streams: Mapping[str, str]) -> tuple[str, str]:
    """Split a stem into (base, stream): the longest suffix at its end wins, and a base is never empty."""
    for stream, suffix in sorted(streams.items(), key=lambda item: -len(item[1])):
        if stem.endswith(suffix) and len(stem) > len(suffix):
            return stem[: len(stem) - len(suffix)], stream
    return stem, next(iter(streams))


def _candidate(
    sample: str,
    base: str,
    group: Mapping[str, list[Path]],
    captions: Mapping[str, list[Path]],
    streams: Mapping[str, str],
) -> Candidate | BadSample:
    first = group[next(iter(streams))][0]
    for stream, suffix in streams.items():
        if stream not in group:
            return BadSample(sample, str(first), f"no {stream} file {base}{suffix}.*{_advice(first, streams)}")
        if len(group[stream]) > 1:
            names = " and ".join(path.name for path in group[stream])
            return BadSample(sample, str(first), f"more than one {stream} file: {names}")
    if base not in captions:
        frames = "; its numbered images are one clip, or stills where each has a caption" if is_pattern(first) else ""
        return BadSample(sample, str(first), f"no caption {base}{CAPTION_ENDING}{frames}")
    if len(captions[base]) > 1:
        names = " and ".join(path.name for path in captions[base])
        return BadSample(sample, str(first), f"more than one caption: {names}")
    return Candidate(sample, tuple((stream, group[stream][0]) for stream in streams), captions[base][0])


def _advice(there: Path, streams: Mapping[str, str]) -> str:
    """Suggest `rgba` where a file without companion may hold both streams by itself."""
    if len(streams) == 2 and (there.is_dir() or there.suffix.lower() in MAY_HOLD_ALPHA):
        return f"; if the {next(iter(streams))} file holds alpha, set rgba: true for its source"
    return ""
