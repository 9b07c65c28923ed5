"""Split a manifest (csv, jsonl, parquet), which may be larger than memory, into shards.

--rows N writes N rows into each shard, in order; --shards N sends row i to shard i mod N, so that shards are alike.
Relative paths are rewritten, so that each shard is a source by itself. A stopped run continues with the same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from manifests import check_manifest, moved, rows_into
from tooling import REASONS_SHOWN, check_counts, run, summary
from tqdm import tqdm

from transpixeler.config.sections import UserError
from transpixeler.data.sources.manifest import rows
from transpixeler.files import write_text

STATE = ".shards.json"
MOST_OPEN = 512


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    source = check_manifest(arguments.manifest, there=True)
    if (arguments.rows is None) == (arguments.shards is None):
        raise UserError("give one of --rows and --shards")
    check_counts(rows=arguments.rows, shards=arguments.shards)
    if (arguments.shards or 1) > MOST_OPEN:
        raise UserError(f"--shards must be at most {MOST_OPEN}, and is {arguments.shards}")
    _check_state(arguments)
    source_rows = _Rows(source, tuple(name for name in arguments.paths.split(",") if name), arguments.out)
    split = _by_rows if arguments.rows else _round_robin
    count = split(source_rows, arguments)
    summary(f"{arguments.out}: {source_rows.count} rows in {count} shards", source_rows.bad)
    if not source_rows.count:
        raise UserError(f"{source}: holds no row")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("manifest", type=Path, help="csv, jsonl or parquet")
    add("--out", type=Path, required=True, help="a folder for NAME-00000.csv and so on, of the source's kind")
    add("--rows", type=int, help="rows in each shard, in order")
    add("--shards", type=int, help="number of shards, filled in turn")
    add(
        "--paths",
        default="path,video,rgb,seg,latent,seg_latent,text_fea",
        help="columns of paths, rewritten relative to the shards",
    )
    add("--force", action="store_true", help="replace shards that were made with other options")
    return parser


class _Rows:
    """The readable rows of a source one at a time, counted, with paths relative to the shards; bad rows are listed."""

    def __init__(self, source: Path, paths: Sequence[str], out: Path) -> None:
        self.source, self.paths, self.out = source, paths, out
        self.count, self.bad = 0, list[tuple[str, str]]()
        self.schema = _schema(source)
        first = next((row for _, row in rows(source) if not isinstance(row, str)), {})
        self.columns = list(self.schema.names if self.schema is not None else first)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in tqdm(rows(self.source), unit=" rows", disable=None):
            if isinstance(row, str):
                self.bad.append((f"{self.source.name}:{number}", row if len(self.bad) < REASONS_SHOWN else ""))
            else:
                self.count += 1
                yield moved(row, self.paths, self.source.parent, self.out)

    def shard(self, number: int) -> Path:
        return self.out / f"{self.source.stem}-{number:05d}{self.source.suffix.lower()}"


def _schema(source: Path) -> Any:
    """Return the types of a parquet file, which its shards keep."""
    if source.suffix.lower() != ".parquet":
        return None
    next(rows(source), None)  # raises a one-line error if the file is broken
    import pyarrow.parquet as parquet

    return parquet.read_schema(source)


def _check_state(arguments: argparse.Namespace) -> None:
    """Refuse to continue shards that were made from another source or with other options."""
    facts = arguments.manifest.stat()
    wanted = {"source": arguments.manifest.name, "size": facts.st_size, "time": facts.st_mtime_ns}
    state = json.dumps(wanted | {"rows": arguments.rows, "shards": arguments.shards})
    file = arguments.out / STATE
    if file.exists() and file.read_text(encoding="utf-8") != state:
        if not arguments.force:
            raise UserError(
                f"{arguments.out}: holds shards of another source or size; choose another --out, or --force"
            )
        for old in arguments.out.glob(f"{arguments.manifest.stem}-?????{arguments.manifest.suffix.lower()}"):
            old.unlink()
    write_text(file, state)


def _by_rows(good: _Rows, arguments: argparse.Namespace) -> int:
    """Write shards of so many rows each; finished ones are skipped."""
    source = iter(good)
    number = 0
    while (first := next(source, None)) is not None:
        shard = itertools.chain([first], itertools.islice(source, arguments.rows - 1))
        if good.shard(number).exists():
            for _ in shard:
                pass
        else:
            with rows_into(good.shard(number), good.columns, good.schema) as put:
                for row in shard:
                    put(row)
        number += 1
    return number


def _round_robin(good: _Rows, arguments: argparse.Namespace) -> int:
    """Write all shards at once, row i to shard i mod N."""
    with ExitStack() as stack:
        shards = [
            stack.enter_context(rows_into(good.shard(number), good.columns, good.schema))
            for number in range(arguments.shards)
        ]
        for number, row in enumerate(good):
            shards[number % len(shards)](row)
    return arguments.shards


if __name__ == "__main__":
    raise SystemExit(run("shard", main))
