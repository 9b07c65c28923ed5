"""Compare the files of a sample: with each other, and with what a manifest says of the first.

In: media. Out: BadMedia, which says what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from transpixeler.data.media.clip import Media
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.files import files_of, numbers_of, spans_files


def check_claims(declared: Mapping[str, Fraction], media: Media) -> None:
    """Compare a file with what its manifest says about it."""
    if not declared:
        return
    found = {"num_frames": media.frames, "height": media.height, "width": media.width, "fps": media.fps or None}
    for key, claim in declared.items():
        value = found[key]
        if value is not None and value != claim and abs(value / claim - 1) > (1 / 200 if key == "fps" else 0):
            raise BadMedia(f"the manifest says {key} {float(claim):g}, the file has {float(value):g}")


def check_twin(primary: str, media: Media, twin: Media) -> None:
    """Refuse a stream whose frame count, size or rate differs from the first stream's."""
    if twin is media:  # as remembered media are where files are alike
        return
    if twin.frames != media.frames:
        raise BadMedia(f"has {twin.frames} frames, {primary} has {media.frames}")
    if (twin.width, twin.height) != (media.width, media.height):
        raise BadMedia(f"is {twin.width}×{twin.height}, {primary} is {media.width}×{media.height}")
    if not media.image and media.fps != twin.fps and media.fps and twin.fps and abs(twin.fps / media.fps - 1) > 1 / 100:
        raise BadMedia(f"runs at {float(twin.fps):.3f} fps, {primary} at {float(media.fps):.3f}")


def check_numbers(primary: str, path: Path, twin: Path) -> None:
    """Refuse two image sequences whose numbers in the names do not go together, wherever each begins to count."""
    if not (spans_files(path) and spans_files(twin)):
        return
    files, others = files_of(path), files_of(twin)
    counts = zip(numbers_of(files) or (), numbers_of(others) or ())
    shifts = [other - number for number, other in counts]
    for k, shift in enumerate(shifts):
        if shift != shifts[0]:
            raise BadMedia(f"has {others[k].name} as its frame {k}, {primary} has {files[k].name}")
