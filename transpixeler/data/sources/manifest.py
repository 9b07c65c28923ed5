"""Read a manifest (csv, jsonl, parquet): a path in, candidates out row by row, so that it may exceed memory."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from transpixeler.config import UserError
from transpixeler.data.names import normal
from transpixeler.data.sources.candidate import BadSample, Candidate

MANIFEST_ENDINGS = (".csv", ".jsonl", ".parquet")
CLAIMS = ("num_frames", "height", "width", "fps")
NUMBER = re.compile(r"\d{1,18}(/\d{1,18}|(\.\d{0,24})?(e[+-]?\d{1,2})?)", re.ASCII | re.IGNORECASE)
PRIMARY_ALIASES = ("video", "path")  # names that other tools give the first stream's column

Row = Mapping[str, Any] | str  # a row, or the reason why it cannot be read


def manifest_candidates(
    path: Path, name: str, streams: Iterable[str], *, rgba: bool, columns: Mapping[str, str] | None = None
) -> Iterator[Candidate | BadSample]:
    """Yield a candidate for each row; a row that cannot be one is named by its number. columns: as `data.columns`."""
    streams, columns = tuple(streams), columns or {}
    for number, row in rows(path, text=columns.get("text", "text")):
        where = f"{path}:{number}"
        found = row if isinstance(row, str) else _candidate(row, path.parent, name, streams, rgba=rgba, columns=columns)
        yield BadSample(f"{name}/row {number}", where, found) if isinstance(found, str) else found


def _candidate(
    row: Mapping[str, Any],
    folder: Path,
    name: str,
    streams: tuple[str, ...],
    *,
    rgba: bool,
    columns: Mapping[str, str],
) -> Candidate | str:
    paths = []
    for stream in streams[:1] if rgba else streams:
        names = (stream, *PRIMARY_ALIASES) if stream == streams[0] else (stream,)
        names = (columns[stream],) if stream in columns else names
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if not isinstance(value, str) or not value.strip():
            return f"no path in column {' or '.join(map(repr, names))}"
        paths.append((stream, folder / value.strip()))
    if rgba:
        paths = [(stream, paths[0][1]) for stream in streams]
    told = columns.get("text", "text")
    text = row.get(told)
    if not isinstance(text, str):
        return f"no caption in column {told!r}"
    claims: dict[str, Fraction] = {}
    for key in CLAIMS:
        value, column = row.get(columns.get(key, key)), columns.get(key, key)
        if value in (None, ""):
            continue
        if (number := _number(value)) is None:
            return f"column {column!r} is {str(value)[:40]!r}, not a number above 0"
        claims[key] = number
    first = Path(_relative(paths[0][1], folder))
    if not first.name:
        return f"its {streams[0]} path names no file"
    stem = normal(str(first.with_suffix("")))
    return Candidate(f"{name}/{stem}", tuple(paths), text, claims)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix().lstrip("/")


def _number(value: Any) -> Fraction | None:
    """Read a number above 0 such as `24`, `23.976`, `1e3` or `24000/1001`; of bounded length, as it is kept exactly."""
    text = str(value).strip()
    if not NUMBER.fullmatch(text):
        return None
    try:
        number = Fraction(text)
    except ZeroDivisionError:
        return None
    return number if number > 0 else None


def rows(path: Path, *, text: str = "text") -> Iterator[tuple[int, Row]]:
    """Yield (number, row or the reason why it cannot be read), one at a time. text: the captions' column."""
    readers = {".csv": partial(_csv_rows, text=text), ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    try:
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _csv_rows(path: Path, *, text: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
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
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"not JSON: {error}"
                continue
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
