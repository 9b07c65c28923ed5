"""A run's folder goes in; RUN/report.html comes out: its config, curves, evaluations and samples on one page.

It reads only the folder, so it works on any machine, during the run and after it. The page draws itself from one JSON
value and needs no network; videos that are too large to embed are linked by their path in the folder.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transpixeler.adapters.saved import CONFIG
from transpixeler.config import loading
from transpixeler.config.sections import Config, SourceConfig, UserError
from transpixeler.files import write_text
from transpixeler.publishing.received import (
    check_within,
    own_samples,
    read_manifest,
    read_metrics,
    read_yaml,
    sample_files,
)
from transpixeler.runs.folder import METRICS

PAGE = "report.html"
CURVE_POINTS = 1200  # more are averaged in groups, as no screen shows them
EMBEDDED_FILE, EMBEDDED_ALL = 1 << 20, 12 << 20  # most bytes of one video and of all that the page embeds
ASSETS = Path(__file__).parent / "assets"
NO_CURVES = ("step", "samples")  # keys of a metrics line that are not drawn


def write_report(run: Path) -> Path:
    """Write the page and return its path."""
    for name in (CONFIG, METRICS):
        if not (run / name).is_file():
            raise UserError(f"{run}: holds no {name}, so it is no run's folder; give OUTPUT_DIR/latest or /RUN")
    page = run / PAGE
    write_text(page, render(gather(run)))
    return page


def gather(run: Path) -> dict[str, Any]:
    """Collect everything that the page shows into one JSON value."""
    config = read_yaml(check_within(run / CONFIG, run))
    manifest = read_manifest(run)
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    return {
        "name": run.resolve().name,
        "config": config,
        "changed": _changed(config),
        "manifest": manifest,
        "skipped": manifest.get("skipped", []),
        "steps": thinned(steps),
        "last": {key: value for key, value in (steps[-1] if steps else {}).items() if key not in NO_CURVES},
        "seconds": sum(line.get("seconds", 0) for line in steps),
        "evals": [line for line in lines if "eval" in line],
        "samples": list(_samples(run)),
    }


def render(data: Mapping[str, Any]) -> str:
    """Fill the template with its scripts and the value; nothing in the value can end the script that holds it."""
    value = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = (ASSETS / "report.html").read_text(encoding="utf-8")
    for name in ("chart.js", "report.js"):
        page = page.replace(f"/* {name} */", (ASSETS / name).read_text(encoding="utf-8"))
    return page.replace("<!-- title -->", html.escape(data["name"])).replace("<!-- data -->", value)


# --- numbers ---------------------------------------------------------------------------------------------------------


def thinned(steps: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Return curves by name; each point is the mean of so many steps that at most CURVE_POINTS are left."""
    size = max(1, math.ceil(len(steps) / CURVE_POINTS))
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    flat = [[_numbers(line) for line in group] for group in groups]
    names = dict.fromkeys(name for group in flat for line in group for name in line)
    curves = {name: [_mean(line.get(name) for line in group) for group in flat] for name in names}
    return {"step": [group[-1]["step"] for group in groups]} | curves


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return a metrics line's numbers, with its lists spread out, `loss_by_t.0`, and an expert's own: `loss.high`."""
    spread: dict[str, Any] = {f"loss.{line['expert']}": line["loss"]} if line.get("expert") else {}
    for name, value in line.items():
        if name in NO_CURVES:
            continue
        spread |= {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: value for name, value in spread.items() if isinstance(value, int | float)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(f"{sum(known) / len(known):.6g}") if known else None


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, as browsers' JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _changed(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List the keys whose value is not the default."""
    default = dict(_flat(loading.plain(Config())))
    return [(key, _brief(value)) for key, value in _flat(config) if default.get(key) != value]


def _brief(value: Any) -> Any:
    """Leave out the defaults in a list of data sets or rules."""
    if not isinstance(value, list):
        return value
    unset = loading.plain(SourceConfig(""))
    short = [{k: v for k, v in p.items() if unset.get(k) != v} if isinstance(p, dict) else p for p in value]
    return [part["path"] if isinstance(part, dict) and list(part) == ["path"] else part for part in short]


def _flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree or key == "streams":
        yield key, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{key}.{name}" if key else name)


# --- files -----------------------------------------------------------------------------------------------------------


def _samples(run: Path) -> Iterator[dict[str, Any]]:
    """Yield every sample that has videos, the latest step first; its videos are embedded as far as they fit."""
    left = EMBEDDED_ALL
    made = sorted(own_samples(run), key=lambda sample: (sample[0], sample[1].name), reverse=True)
    for step, folder, facts in made:
        videos = {}
        for name, file in sample_files(folder, facts).items():
            if file.suffix == ".mp4":
                videos[name], used = _source(file, run, left)
                left -= used
        if videos:
            yield facts | {"name": folder.name, "step": step, "videos": videos}


def _source(path: Path, run: Path, left: int) -> tuple[str, int]:
    """Return the source of a video on the page, and how many bytes the page grows by it."""
    size = path.stat().st_size
    if size > min(left, EMBEDDED_FILE):
        return path.relative_to(run).as_posix(), 0
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}", size
