"""Write a manifest (csv, jsonl, parquet): rows in one at a time; a file that takes its name when it is whole, out."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.data.sources.manifest import PRIMARY_ALIASES
from transpixeler.files import whole

BATCH = 1024
ENDINGS = (".csv", ".jsonl", ".parquet")  # that can be written row by row
Put = Callable[[Mapping[str, Any]], None]


def check_manifest(path: Path, *, there: bool) -> Path:
    """Return the path if its ending is a manifest's and, for one to read (`there`), if it exists."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path}: is no manifest; those end in {', '.join(ENDINGS)}")
    if there and not path.is_file():
        raise UserError(f"{path}: does not exist; give a manifest ({', '.join(ENDINGS)})")
    return path


@contextmanager
def rows_into(path: Path, columns: Sequence[str], schema: Any = None) -> Iterator[Put]:
    """Yield a function that writes a row; `schema`: the types of a parquet file, from another file or `schema_of`."""
    with whole(path) as unfinished:
        open_rows = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix.lower()]
        with open_rows(unfinished, columns, schema) as put:
            yield put


def moved(row: Mapping[str, Any], columns: Sequence[str], old: Path, new: Path) -> dict[str, Any]:
    """Return the row with its relative paths rewritten from the old manifest's folder to the new one's."""
    if old.resolve() == new.resolve():
        return dict(row)
    paths = {name: row[name] for name in columns if isinstance(row.get(name), str) and row[name]}
    apart = {name: value for name, value in paths.items() if not Path(value).is_absolute()}
    return dict(row) | {name: os.path.relpath(old.resolve() / value, new.resolve()) for name, value in apart.items()}


def first_path(row: Mapping[str, Any]) -> str | None:
    """Return the path of a row's first stream, whatever the column is called."""
    names = ("rgb", *PRIMARY_ALIASES)
    return next((row[name].strip() for name in names if isinstance(row.get(name), str) and row[name].strip()), None)


@contextmanager
def _csv(path: Path, columns: Sequence[str], _: Any) -> Iterator[Put]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        yield writer.writerow


@contextmanager
def _jsonl(path: Path, _: Sequence[str], __: Any) -> Iterator[Put]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row, ensure_ascii=False, default=str), file=file)


@contextmanager
def _parquet(path: Path, columns: Sequence[str], schema: Any) -> Iterator[Put]:
    import pyarrow
    import pyarrow.parquet as parquet

    waiting: list[Mapping[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            full = [{name: row.get(name) for name in columns} for row in waiting]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(full, schema=schema))
            waiting.clear()

        def put(row: Mapping[str, Any]) -> None:
            waiting.append(row)
            if len(waiting) == BATCH:
                flush()

        yield put
        if waiting:
            flush()


def schema_of(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], types: Mapping[str, str]) -> Any:
    """Infer the types of the parquet file at `path` from all of its rows, as a column's first value may come late.

    `types` are the known ones; a column that is always empty becomes text.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: parquet manifests need pyarrow; pip install 'transpixeler[parquet]'") from error
    schema, left = pyarrow.schema([(name, pyarrow.null()) for name in columns]), iter(rows)
    try:
        while some := list(itertools.islice(left, BATCH)):
            batch = pyarrow.RecordBatch.from_pylist([{name: row.get(name) for name in columns} for row in some])
            schema = pyarrow.unify_schemas([schema, batch.schema], promote_options="permissive")
    except pyarrow.ArrowException as error:
        text = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: parquet cannot hold these columns ({text}); name a file that ends in .jsonl"
        ) from error
    kinds = {field.name: pyarrow.string() if field.type == pyarrow.null() else field.type for field in schema}
    known = {name: pyarrow.type_for_alias(kind) for name, kind in types.items() if name in kinds}
    return pyarrow.schema((kinds | known).items())
