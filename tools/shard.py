"""A manifest goes in that may be larger than memory (csv, jsonl, parquet), shards of it come out.

With --rows the rows stay in order, so many in each shard; with --shards row i goes to shard i mod N, so that all are
alike. Relative paths are rewritten, so that a shard is a source of its own. The same command goes on where it stopped.
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
from tooling import REASONS_SHOWN, run, summary
from tqdm import tqdm

from transpixeler.config import UserError
from transpixeler.data.sources.manifest import rows
from transpixeler.files import write_text

STATE = ".shards.json"
MOST_OPEN = 512


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    source = check_manifest(arguments.manifest, there=True)
    if (arguments.rows is None) == (arguments.shards is None):
        raise UserError("give one of --rows and --shards")
    if min(arguments.rows or 1, arguments.shards or 1) < 1 or (arguments.shards or 1) > MOST_OPEN:
        raise UserError(f"--rows must be at least 1, and --shards from 1 to {MOST_OPEN}")
    _check_state(arguments)
    good = _Good(source, tuple(name for name in arguments.paths.split(",") if name), arguments.out)
    split = _by_rows if arguments.rows else _round_robin
    count = split(good, arguments)
    summary(f"{arguments.out}: {good.count} rows in {count} shards", good.bad)
    if not good.count:
        raise UserError(f"{source}: holds no row")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("manifest", type=Path, help="csv, jsonl or parquet")
    add("--out", type=Path, required=True, help="a folder for NAME-00000.csv and so on, of the source's kind")
    add("--rows", type=int, help="rows in each shard, in order")
    add("--shards", type=int, help="number of shards, filled by turns")
    add("--paths", default="path,video,rgb,seg", help="columns of paths, which are made relative to the shards")
    add("--force", action="store_true", help="replace shards of other options")
    return parser


class _Good:
    """The source's rows one at a time, counted, as they are seen from the shards' folder; bad ones are named."""

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
    """The types of a parquet file, which its shards keep."""
    if source.suffix.lower() != ".parquet":
        return None
    next(rows(source), None)  # says in one line what is wrong with the file
    import pyarrow.parquet as parquet

    return parquet.read_schema(source)


def _check_state(arguments: argparse.Namespace) -> None:
    """Shards that are there count only if they were made of the same source in the same way."""
    facts = arguments.manifest.stat()
    wanted = {"source": arguments.manifest.name, "size": facts.st_size, "time": facts.st_mtime_ns}
    state = json.dumps(wanted | {"rows": arguments.rows, "shards": arguments.shards})
    file = arguments.out / STATE
    if file.exists() and file.read_text(encoding="utf-8") != state:
        if not arguments.force:
            raise UserError(f"{arguments.out}: holds shards of another source or size; choose another, or --force")
        for old in arguments.out.glob(f"{arguments.manifest.stem}-?????{arguments.manifest.suffix.lower()}"):
            old.unlink()
    write_text(file, state)


def _by_rows(good: _Good, arguments: argparse.Namespace) -> int:
    """Finished shards are read past, not written again."""
    source = iter(good)
    for number in itertools.count():
        first = next(source, None)
        if first is None:
            return number
        shard = itertools.chain([first], itertools.islice(source, arguments.rows - 1))
        if good.shard(number).exists():
            for _ in shard:
                pass
            continue
        with rows_into(good.shard(number), good.columns, good.schema) as put:
            for row in shard:
                put(row)
    raise AssertionError("a source ends")


def _round_robin(good: _Good, arguments: argparse.Namespace) -> int:
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
