"""Read RUN/metrics.jsonl, which holds one JSON object a line for each step and each evaluation.

In: the file's path. Out: its good lines. A line that a crash or a lost disk damaged is left out and named in the log;
a last line without its newline is still being written.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import IO, Any, NamedTuple

from transpixeler.files import write_text

logger = logging.getLogger("transpixeler")

NAMED = 5  # damaged lines that are named before the rest is only counted


class Line(NamedTuple):
    """A whole line of the file."""

    raw: bytes  # with its newline
    record: dict[str, Any]

    @property
    def step(self) -> int:
        return self.record["step"]


def read_lines(path: Path) -> list[Line]:
    """Return the good lines in the file's order; none where there is no file. Name the damaged ones in the log."""
    content = path.read_bytes() if path.is_file() else b""
    good, bad = [], []
    for number, raw in enumerate(content.splitlines(keepends=True), start=1):
        record = _record(raw)
        if record is not None:
            good.append(Line(raw, record))
        elif raw.endswith(b"\n"):
            bad.append(number)
    if bad:
        named = ", ".join(map(str, bad[:NAMED])) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        logger.warning("%s: line %s: damaged and left out", path, named)
    return good


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the content of the good lines."""
    return [line.record for line in read_lines(path)]


def reopen(path: Path, step: int) -> IO[bytes]:
    """Open the file to append to it, without the lines of later steps, which are trained and written again."""
    if path.exists():
        kept = b"".join(line.raw for line in read_lines(path) if line.step <= step)
        write_text(path, kept.decode("utf-8", errors="surrogateescape"))  # which writes the same bytes
    return path.open("ab", buffering=0)


def _record(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
