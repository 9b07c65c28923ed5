"""Add what the files show to a manifest of paths and captions (csv, jsonl, parquet), which may exceed memory.

New columns: num_frames, height, width, aspect_ratio (height / width), resolution (height × width, in pixels) and fps,
those of Open-Sora. Rows whose file cannot be used go to OUT.bad.jsonl with the reason. A stopped run continues with the
same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from manifests import check_manifest, first_path, moved, rows_into, schema_of
from tooling import REASONS_SHOWN, check_counts, run, summary
from tqdm import tqdm

from transpixeler.config.sections import UserError
from transpixeler.data.media.decode import probe
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.sources.manifest import rows
from transpixeler.files import whole

FACTS = {
    "num_frames": "int64",
    "height": "int64",
    "width": "int64",
    "aspect_ratio": "float64",
    "resolution": "int64",
    "fps": "float64",
}
WINDOW = 1024  # rows probed, and then written, at a time


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    check_counts(jobs=arguments.jobs)
    source, out = check_manifest(arguments.manifest, there=True), check_manifest(arguments.out, there=False)
    if source.resolve() == out.resolve():
        raise UserError(f"--out: {out} is the manifest itself; name another")
    paths = tuple(name for name in arguments.paths.split(",") if name)
    part = out.with_name(f".{out.name}.part")
    done = _rows_done(part, source)
    with part.open("a", encoding="utf-8") as file, ThreadPoolExecutor(arguments.jobs) as pool:
        left = itertools.islice(rows(source), done, None)
        bar = tqdm(unit=" rows", initial=done, disable=None)
        while window := list(itertools.islice(left, WINDOW)):
            for line in pool.map(partial(_probed, source=source, out=out, paths=paths), window):
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                bar.update()
            file.flush()
        bar.close()
    good, left_out, bad = _finish(part, out)
    summary(f"{out}: {good} rows" + (f", {bad} more in {_bad_file(out).name}" if bad else ""), left_out)
    if not good:
        raise UserError(f"{source}: no row can be used; the reasons are above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("manifest", type=Path, help="csv, jsonl or parquet, with the columns path (or rgb, or video) and text")
    add("--out", type=Path, required=True, help="csv, jsonl or parquet, by its ending")
    add(
        "--paths",
        default="path,video,rgb,seg,latent,seg_latent,text_fea",
        help="columns of paths, rewritten relative to OUT",
    )
    add("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="files at a time")
    return parser


def _rows_done(part: Path, source: Path) -> int:
    """Return how many rows PART holds; its first line names the source, a torn last line is cut off."""
    facts = source.stat()
    named = {"source": str(source.resolve()), "size": facts.st_size, "time": facts.st_mtime_ns}
    stamp = json.dumps(named | {"columns": list(FACTS)})  # others were measured otherwise
    done = -1
    if part.exists():
        with part.open("rb+") as file:
            if file.readline() == (stamp + "\n").encode():
                done = end = 0
                start = file.tell()
                for line in file:
                    if line.endswith(b"\n"):
                        done, end = done + 1, end + len(line)
                file.truncate(start + end)
    if done < 0:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(stamp + "\n", encoding="utf-8")
    return max(done, 0)


def _probed(numbered: tuple[int, Any], *, source: Path, out: Path, paths: Sequence[str]) -> dict[str, Any]:
    """Return {row} with the file's facts, or {bad: where, reason}."""
    number, row = numbered
    where = f"{source.name}:{number}"
    if isinstance(row, str):
        return {"bad": where, "reason": row}
    name = first_path(row)
    if name is None:
        return {"bad": where, "reason": "no path in column 'path', 'rgb' or 'video'"}
    try:
        media = probe(source.parent / name)
    except BadMedia as error:
        return {"bad": f"{where} ({name})", "reason": str(error)}
    found = {
        "num_frames": media.frames,
        "height": media.height,
        "width": media.width,
        "aspect_ratio": round(media.height / media.width, 6),
        "resolution": media.height * media.width,
        "fps": round(float(media.fps), 6) or None,
    }
    return {"row": moved(row, paths, source.parent, out.parent) | found}


def _finish(part: Path, out: Path) -> tuple[int, list[tuple[str, str]], int]:
    """Write the manifest and the file of bad rows; return the good rows' count, a few bad rows to show, their count."""
    columns = list(dict.fromkeys(name for line in _lines(part) for name in line.get("row", ())))
    found = (line["row"] for line in _lines(part) if "row" in line)
    schema = schema_of(out, found, columns, FACTS) if out.suffix.lower() == ".parquet" else None
    good, shown, bad = 0, [], 0
    with (
        rows_into(out, columns, schema) as put,
        whole(_bad_file(out)) as draft,
        draft.open("w", encoding="utf-8") as bad_rows,
    ):
        for line in _lines(part):
            if "row" in line:
                put(line["row"])
                good += 1
            else:
                bad_rows.write(json.dumps(line, ensure_ascii=False) + "\n")
                bad += 1
                shown += [(line["bad"], line["reason"])] if len(shown) < REASONS_SHOWN else []
    part.unlink()
    if not bad:
        _bad_file(out).unlink()
    return good, shown, bad


def _bad_file(out: Path) -> Path:
    return out.with_name(out.name + ".bad.jsonl")


def _lines(part: Path) -> Iterator[dict[str, Any]]:
    with part.open(encoding="utf-8") as file:
        next(file)
        yield from map(json.loads, file)


if __name__ == "__main__":
    raise SystemExit(run("metadata", main))
