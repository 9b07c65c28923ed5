"""Keep what was found of a set's sources from one start to the next: a config in; a survey, found again or kept, out.

It is kept as columns beside the cache's records. Made anew is what was found with another config or version, or before
a manifest or a file changed.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import transpixeler
from transpixeler.config.loading import plain
from transpixeler.config.sections import Config, SourceConfig
from transpixeler.data.buckets import Bucket, Clips, Reasons
from transpixeler.data.columns import Texts
from transpixeler.data.features.needs import Needs
from transpixeler.data.kept import KEPT_ENDING, Columns, KeptFile
from transpixeler.data.sources.candidate import BadSample, Features, Note, TextRow
from transpixeler.data.sources.samples import Samples, Shape
from transpixeler.data.standing import Standing
from transpixeler.data.survey import Survey

READERS = ("av", "numpy", "pillow")  # packages by which files are read
LEAST = 1000  # samples of a set that is worth a file


def kept_survey(config: Config, name: str, needs: Needs, folder: Path, make: Callable[[], Survey]) -> Survey:
    """Return the survey of a set that a file in `folder` holds, where it is still true; else make and keep it."""
    sources: tuple[SourceConfig, ...] = getattr(config.data, name)
    file = KeptFile(kept_path(folder, name), key_of(config, needs, sources))
    if (held := file.read()) is not None:
        found = _survey(held, f"{file.key} {held.told['standing']}")
        if Standing().add(sources, _samples_of(found), found.others).told == held.told["standing"]:
            return found
    since = time.time_ns()
    found = make()
    if len(found.samples) < LEAST:
        return found
    stands = Standing(since).add(sources, _samples_of(found), found.others).told
    if not stands:
        return found
    file.write({"standing": stands} | _told(found), _columns(found))
    return replace(found, mark=f"{file.key} {stands}")


def kept_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{KEPT_ENDING}"


def key_of(config: Config, needs: Needs, sources: Sequence[SourceConfig]) -> str:
    """Hash all that a survey depends on but for the sources' files."""
    statistics = [part.tolist() for part in needs.statistics or ()]
    asked = plain(config.data), plain(config.streams), config.seed, plain(sources), repr(needs), statistics
    return hashlib.sha256(repr((asked, str(Path.cwd()), program())).encode("utf-8", "surrogatepass")).hexdigest()


@lru_cache(maxsize=1)
def program() -> str:
    """Return the versions of what reads the files, and the sizes and times of this package's own files."""
    own = Path(transpixeler.__file__).parent
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(own.rglob("*.py"))]
    return repr((sys.version, [metadata.version(package) for package in READERS], stamps))


def _samples_of(found: Survey) -> Samples:
    assert isinstance(found.samples, Samples), "of sources"
    return found.samples


def _told(found: Survey) -> dict[str, Any]:
    samples, clips = _samples_of(found), found.clips
    texts = [(one.id, one.text, one.features.row, str(one.features.text)) for one in found.texts]
    return {
        "streams": samples.streams,
        "shapes": samples.shapes,
        "offered": clips.offered,
        "fps": str(clips.fps),
        "bad": [(one.id, one.path, one.reason) for one in found.bad],
        "reasons": list(dict.fromkeys(reason for _, reason in found.dropped)),
        "texts": texts,
        "notes": [(one.text, one.path, one.count) for one in found.notes],
    }


def _columns(found: Survey) -> dict[str, Texts | np.ndarray]:
    samples, clips = _samples_of(found), found.clips
    numbers = {reason: number for number, reason in enumerate(dict.fromkeys(why for _, why in found.dropped))}
    return {
        "ids": samples.ids,
        "records": samples.records,
        "kinds": samples.kinds,
        "sources": samples.sources,
        "flags": samples.flags,
        "owners": clips.owners,
        "numbers": clips.numbers,
        "firsts": clips.firsts,
        "dropped": Texts.of(name for name, _ in found.dropped),
        "why": np.fromiter((numbers[reason] for _, reason in found.dropped), np.int32),
        "others": found.others,
    }


def _survey(held: Columns, mark: str) -> Survey:
    told, columns = held.told, held.columns
    named = columns["ids"], columns["records"], columns["kinds"]
    shapes = tuple(Shape(*shape) for shape in told["shapes"])
    samples = Samples(*named, shapes, columns["sources"], columns["flags"], told["streams"])
    cut = columns["owners"], columns["numbers"], columns["firsts"]
    clips = Clips(samples, *cut, [Bucket(*bucket) for bucket in told["offered"]], Fraction(told["fps"]))
    return Survey(
        samples,
        tuple(BadSample(*one) for one in told["bad"]),
        clips,
        Reasons(columns["dropped"], columns["why"], told["reasons"]) if told["reasons"] else (),
        tuple(TextRow(name, text, Features(row, (), Path(path))) for name, text, row, path in told["texts"]),
        tuple(Note(*one) for one in told["notes"]),
        columns["others"],
        mark,
    )
