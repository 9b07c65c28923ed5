"""A run's folder goes in, RUN/report.html comes out: what was trained, how it went and what it makes, on one page.

Reads only what stands in the folder, so that it works on any machine, while the run goes on and after it has died.
The page draws itself from one JSON value and asks nothing of a network; videos too large to hold it names by their
place in the folder.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from transpixeler import configfile
from transpixeler.config import Config, SourceConfig, UserError
from transpixeler.files import write_text
from transpixeler.runs.folder import CONFIG, MANIFEST, METRICS, sampled
from transpixeler.runs.metrics_file import read_records
from transpixeler.sampling.files import FACTS

PAGE = "report.html"
POINTS = 1200  # of a curve; more are averaged in groups, as no screen shows them
EMBED_FILE, EMBED_ALL = 1 << 20, 12 << 20  # bytes of videos that the page holds itself
ASSETS = Path(__file__).parent / "assets"
UNDRAWN = ("step", "samples")  # of a step's line


def write_report(run: Path) -> Path:
    """Writes the page anew and returns where it is."""
    for name in (CONFIG, METRICS):
        if not (run / name).is_file():
            raise UserError(f"{run}: holds no {name}, so it is no run's folder; give OUTPUT_DIR/latest or /RUN")
    page = run / PAGE
    write_text(page, render(gather(run)))
    return page


def gather(run: Path) -> dict[str, Any]:
    """All that the page shows, as one JSON value."""
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    manifest = _json(run / MANIFEST)
    lines = read_records(run / METRICS)
    steps = [line for line in lines if "loss" in line]
    return {
        "name": run.resolve().name,
        "config": config,
        "changed": _changed(config),
        "manifest": manifest,
        "skipped": manifest.get("skipped", []),
        "steps": thinned(steps),
        "last": {key: value for key, value in (steps[-1] if steps else {}).items() if key not in UNDRAWN},
        "seconds": sum(line.get("seconds", 0) for line in steps),
        "evals": [line for line in lines if "eval" in line],
        "samples": list(_samples(run)),
    }


def render(data: Mapping[str, Any]) -> str:
    """The template with its scripts and the value in it; nothing in the value can end the script that holds it."""
    value = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = (ASSETS / "report.html").read_text(encoding="utf-8")
    for name in ("chart.js", "report.js"):
        page = page.replace(f"/* {name} */", (ASSETS / name).read_text(encoding="utf-8"))
    return page.replace("<!-- title -->", html.escape(data["name"])).replace("<!-- data -->", value)


# --- numbers ---------------------------------------------------------------------------------------------------------


def thinned(steps: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Curves by name: the steps' numbers, each point the mean of as many steps as keep it under POINTS."""
    size = max(1, math.ceil(len(steps) / POINTS))
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    flat = [[_numbers(line) for line in group] for group in groups]
    names = dict.fromkeys(name for group in flat for line in group for name in line)
    curves = {name: [_mean(line.get(name) for line in group) for group in flat] for name in names}
    return {"step": [group[-1]["step"] for group in groups]} | curves


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """A step's line with its lists spread out: `loss_by_t.0`."""
    spread: dict[str, Any] = {}
    for name, value in line.items():
        if name in UNDRAWN:
            continue
        spread |= {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: value for name, value in spread.items() if isinstance(value, int | float)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(f"{sum(known) / len(known):.6g}") if known else None


def _finite(value: Any) -> Any:
    """JSON for browsers knows no NaN: what is no number is nothing."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _changed(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The keys that were set to something else than their default."""
    default = dict(_flat(configfile.plain(Config())))
    return [(key, _set(value)) for key, value in _flat(config) if default.get(key) != value]


def _set(value: Any) -> Any:
    """Of a list of data sets or rules what was said of each, without what nobody said."""
    if not isinstance(value, list):
        return value
    unset = configfile.plain(SourceConfig(""))
    short = [{k: v for k, v in p.items() if unset.get(k) != v} if isinstance(p, dict) else p for p in value]
    return [part["path"] if isinstance(part, dict) and list(part) == ["path"] else part for part in short]


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree or key == "streams":
        yield key, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{key}.{name}" if key else name)


# --- files -----------------------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _samples(run: Path) -> Iterator[dict[str, Any]]:
    """Every sample of every step that has videos left; those of the latest are held by the page as far as they fit."""
    left = EMBED_ALL
    made = [(step, folder) for step, place in sampled(run).items() for folder in sorted(place.glob("*/"), reverse=True)]
    for step, folder in made:
        facts = _json(folder / FACTS)
        if not facts or folder.name.startswith("."):
            continue
        videos = {}
        for name, file in facts["files"].items():
            if file.endswith(".mp4") and (folder / file).is_file():
                videos[name], used = _source(folder / file, run, left)
                left -= used
        if videos:
            yield facts | {"name": folder.name, "step": step, "videos": videos}


def _source(path: Path, run: Path, left: int) -> tuple[str, int]:
    """What a page names a video by, and how much it grows by that."""
    size = path.stat().st_size
    if size > min(left, EMBED_FILE):
        return path.relative_to(run).as_posix(), 0
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}", size
