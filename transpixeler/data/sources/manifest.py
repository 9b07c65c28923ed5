"""Read a manifest (csv, tsv, jsonl, json, parquet) or a folder of such shards: a path in, candidates out row by row.

It may exceed memory, but for a list in JSON.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.data.names import normal
from transpixeler.data.sources.candidate import (
    NOT_GIVEN,
    TEXT_COLUMN,
    BadSample,
    Candidate,
    Features,
    TextRow,
    latent_column,
)
from transpixeler.data.sources.folder import KNOWN_ENDINGS
from transpixeler.data.sources.plain import PlainReader, PlainRow, above, stem

MANIFEST_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SHARD_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")  # .json beside them describes the set
CLAIMS = ("num_frames", "height", "width", "fps")
NUMBER = re.compile(r"\d{1,18}(/\d{1,18}|(\.\d{0,24})?(e[+-]?\d{1,2})?)", re.ASCII | re.IGNORECASE)
DECODER = json.JSONDecoder()
PRIMARY_ALIASES = ("video", "path")  # names that other tools give the first stream's column

Row = Mapping[str, Any] | str  # a row, or the reason why it cannot be read


def manifest_candidates(
    path: Path, name: str, streams: Iterable[str], *, rgba: bool, columns: Mapping[str, str] | None = None
) -> Iterator[Candidate | PlainRow | TextRow | BadSample]:
    """Yield a candidate for each row; a row that cannot be one is named by its number. columns: as `data.columns`.

    path: a manifest, or a folder of shards, which are read in the order of their names.
    """
    streams, columns = tuple(streams), columns or {}
    shards = shards_of(path) if path.is_dir() else (path,)
    ours = [latent_column(stream, streams[0]) for stream in streams]
    featured = {name for name in (columns.get(own, own) for own in (*ours, TEXT_COLUMN)) if name}
    names = [_names(number, stream, columns) for number, stream in enumerate(streams[:1] if rgba else streams)]
    text, claims = columns.get("text", "text"), {key: columns.get(key, key) for key in CLAIMS}
    for shard in shards:
        plain = PlainReader(
            shard.parent, name, streams, names=names, text=text, claims=partial(_claims, columns=claims)
        )
        for number, row in rows(shard, text=text):
            gives = isinstance(row, str) or not (
                featured.isdisjoint(row) or all(row.get(column) in (None, "") for column in featured)
            )
            if not isinstance(row, str) and not gives and (found := plain(row)):
                yield found
                continue
            told = f"{shard.name} " * (shard != path) + f"row {number}"
            how = {"told": told if gives else "", "rgba": rgba, "columns": columns}
            found = row if isinstance(row, str) else _found(row, shard.parent, name, streams, **how)
            yield BadSample(f"{name}/{told}", f"{shard}:{number}", found) if isinstance(found, str) else found


def shards_of(folder: Path) -> tuple[Path, ...]:
    """Return the shards of a manifest that a folder holds, sorted by name: none, if it holds media or other folders."""
    shards = []
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  a folder may hold millions of files
            if kind in KNOWN_ENDINGS or (entry.is_dir() and not entry.name.startswith(".") and entry.name != "cache"):
                return ()
            if kind in SHARD_ENDINGS and not entry.name.startswith("."):
                shards.append(folder / entry.name)
    return tuple(sorted(shards))


def _found(
    row: Mapping[str, Any],
    folder: Path,
    name: str,
    streams: tuple[str, ...],
    *,
    told: str,
    rgba: bool,
    columns: Mapping[str, str],
) -> Candidate | TextRow | str:
    """Return the sample or the text that a row names, or the reason why it names none. told: "" without features."""
    features = _features(row, folder, streams, told=told, columns=columns) if told else NOT_GIVEN
    if isinstance(features, str):
        return features
    paths = _video_paths(row, folder, streams[:1] if rgba else streams, columns)
    own, text = features.latents or paths, columns.get("text", "text")
    if (
        isinstance(row.get(text), str)
        and isinstance(own, str)
        and features.text
        and _tells_no_video(row, streams, columns)
    ):
        return TextRow(f"{name}/{told}", row[text], features)
    if isinstance(own, str):
        return own
    if rgba and not features.latents:
        own = [(stream, own[0][1]) for stream in streams]
    if not isinstance(row.get(text), str):
        return f"no caption in column {text!r}"
    claims = _claims(row, columns)
    if isinstance(claims, str):
        return claims
    named = own if isinstance(paths, str) else paths
    first = stem(str(named[0][1]), above(folder))
    if not first:
        return f"its {streams[0]} path names no file"
    if features.latents and named is paths:
        claims = {}  # they are the video's, of which the latents may be a part
    return Candidate(f"{name}/{normal(first)}", tuple(own), row[text], claims, features)


def _video_paths(
    row: Mapping[str, Any], folder: Path, streams: Iterable[str], columns: Mapping[str, str]
) -> list[tuple[str, Path]] | str:
    """Return the file of each stream, or the reason why there is none."""
    paths = []
    for number, stream in enumerate(streams):
        names = _names(number, stream, columns)
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if not isinstance(value, str) or not value.strip():
            return f"no path in column {' or '.join(map(repr, names))}"
        paths.append((stream, folder / value.strip()))
    return paths


def _names(number: int, stream: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the columns that may hold a stream's path."""
    names = (stream, *PRIMARY_ALIASES) if number == 0 else (stream,)
    return (columns[stream],) if stream in columns else names


def _tells_no_video(row: Mapping[str, Any], streams: Iterable[str], columns: Mapping[str, str]) -> bool:
    return not any(row.get(name) for name in (*(columns.get(stream, stream) for stream in streams), *PRIMARY_ALIASES))


def _features(
    row: Mapping[str, Any], folder: Path, streams: Sequence[str], *, told: str, columns: Mapping[str, str]
) -> Features | str:
    """Return the files of features that a row names, or the reason why they cannot be used."""
    found: dict[str, Path] = {}
    ours = [latent_column(stream, streams[0]) for stream in streams]
    for name in (*ours, TEXT_COLUMN):
        column = columns.get(name, name)
        value = row.get(column) if column else None
        if value is None or value == "":
            continue
        if not isinstance(value, str) or not value.strip():
            return f"column {column!r} is {str(value)[:40]!r}, not the path of a file"
        found[name] = folder / value.strip()
    lacking = [name for name in ours if name not in found]
    if lacking and len(lacking) < len(ours):
        return f"no path in column {columns.get(lacking[0], lacking[0])!r}: give the latents of all streams, or of none"
    latents = () if lacking else tuple((stream, found[name]) for stream, name in zip(streams, ours))
    return Features(told, latents, found.get(TEXT_COLUMN))


def _claims(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Fraction] | str:
    """Return what a row says of its first file's length, size and rate, or the reason why it cannot be read."""
    claims: dict[str, Fraction] = {}
    for key in CLAIMS:
        value = row.get(column := columns.get(key, key))
        if value in (None, ""):
            continue
        if (number := _number(str(value))) is None:
            return f"column {column!r} is {str(value)[:40]!r}, not a number above 0"
        claims[key] = number
    return claims


@lru_cache(maxsize=4096)  # the clips of a set are alike, and fractions are slow
def _number(value: str) -> Fraction | None:
    """Read a number above 0 such as `24`, `23.976`, `1e3` or `24000/1001`; of bounded length, as it is kept exactly."""
    text = value.strip()
    if not NUMBER.fullmatch(text):
        return None
    try:
        number = Fraction(text)
    except ZeroDivisionError:
        return None
    return number if number > 0 else None


def rows(path: Path, *, text: str = "text") -> Iterator[tuple[int, Row]]:
    """Yield (number, row or the reason why it cannot be read), one at a time. text: the captions' column."""
    readers = {
        ".csv": partial(_csv_rows, text=text),
        ".tsv": partial(_csv_rows, text=text, delimiter="\t"),
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    try:
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _csv_rows(path: Path, *, text: str, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            if text not in (reader.fieldnames or ()):
                names = ", ".join(map(str, reader.fieldnames or ())) or "none"
                raise UserError(
                    f"{path}: the first line names no column {text!r} (columns: {names[:200]}); data.columns can say "
                    "which column stands for it"
                )
            for row in reader:
                yield reader.line_num, "the row has more cells than columns" if None in row else _decoded(row)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not csv: {error}") from error


def _decoded(row: dict[str, Any]) -> Row:
    broken = any("�" in value for value in row.values() if isinstance(value, str))
    return "the row is not UTF-8" if broken else row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = _json(line)
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON: {error}"
                continue
            may_be_broken = "�" in line or "\\u" in line
            if isinstance(row, dict):
                yield number, _decoded(row) if may_be_broken else row
            else:
                yield number, "not a JSON object"


def _json(line: str) -> Any:
    """Return the value of a line as `json.loads` does, which looks for blanks at both ends first."""
    if line[0] == "{":
        row, end = DECODER.raw_decode(line)
        if line[end:] in ("", "\n"):
            return row
    return json.loads(line)


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of one list, counted from 1."""
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(held, list):
        raise UserError(f"{path}: holds no list; a manifest in JSON is a list of objects, one a row")
    for number, row in enumerate(held, 1):
        yield number, _decoded(row) if isinstance(row, dict) else "not a JSON object"


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet manifests need pyarrow; pip install 'transpixeler[parquet]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        text = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a parquet file that can be read: {text}") from error
