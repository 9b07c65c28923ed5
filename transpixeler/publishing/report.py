"""A run's folder goes in; RUN/report.html comes out: its config, curves, evaluations and samples on one page.

It reads only the folder, so it works on any machine, during the run and after it. The page draws itself from one JSON
value and needs no network; videos that are too large to embed are linked by their path in the folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transpixeler.adapters.saved import CONFIG
from transpixeler.config import loading
from transpixeler.config.sections import Config, SourceConfig, UserError
from transpixeler.files import write_text, writing_to
from transpixeler.publishing import page, words
from transpixeler.publishing.page import Embedding
from transpixeler.publishing.received import (
    check_within,
    own_samples,
    read_manifest,
    read_metrics,
    read_yaml,
    sample_files,
)
from transpixeler.runs.folder import METRICS
from transpixeler.runs.lock import is_trained

PAGE = "report.html"
CURVE_POINTS = 1200  # more are averaged in groups, as no screen shows them
REFRESH = 30.0  # seconds between readings of a page whose run is trained by another process
NO_CURVES = ("step", "samples")  # keys of a metrics line that are not drawn
STYLES = ("report.css", "player.css")
SCRIPTS = ("chart.js", "player.js", "curves.js")


def write_report(run: Path, *, out: Path | None = None, live: float | None = None) -> Path:
    """Write the page, RUN/report.html or `out`, and return its path.

    live: seconds between writings while the run is trained, as often as the page reads itself again; 0: it has ended;
    None: as the run's lock says.
    """
    check_run(run)
    made = out or run / PAGE
    if live is None:
        live = REFRESH if is_trained(run) else 0.0
    with writing_to(made, "--out"):
        write_text(made, render(gather(run, Embedding(made), live=live)))
    return made


def check_run(run: Path) -> None:
    """Refuse what is no run's folder."""
    for name in (CONFIG, METRICS):
        if not (run / name).is_file():
            raise UserError(f"{run}: holds no {name}, so it is no run's folder; give OUTPUT_DIR/latest or /RUN")


def gather(run: Path, embedding: Embedding | None = None, *, live: float = 0.0) -> dict[str, Any]:
    """Collect everything that a page shows of a run into one JSON value. embedding: of RUN/report.html by default."""
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
        "samples": list(_samples(run, embedding or Embedding(run / PAGE))),
        "words": words.plain(streams if isinstance(streams := config.get("streams"), Mapping) else ()),
        "live": {"live": live, "written": time.time(), "words": _state(steps, manifest, live=live > 0)},
    }


def _state(steps: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], *, live: bool) -> str:
    """Say how far a run has come."""
    done, total = steps[-1]["step"] if steps else 0, manifest.get("steps", 0)
    if total and done >= total:
        return f"done, {total:,} steps"
    return f"{'training' if live else 'stopped'}, step {done:,}{f' of {total:,}' if total else ''}"


def render(data: Mapping[str, Any]) -> str:
    """Return the page of a gathered value."""
    return page.build(data["name"], styles=STYLES, scripts=(*SCRIPTS, "live.js", "report.js"), value=data)


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


def _changed(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """List the keys whose value is not the default."""
    default = dict(loading.flattened(loading.plain(Config())))
    return [(key, brief(value)) for key, value in loading.flattened(config) if default.get(key) != value]


def brief(value: Any) -> Any:
    """Leave out the defaults in a list of data sets or rules."""
    if not isinstance(value, list):
        return value
    unset = loading.plain(SourceConfig(""))
    short = [{k: v for k, v in p.items() if unset.get(k) != v} if isinstance(p, dict) else p for p in value]
    return [part["path"] if isinstance(part, dict) and list(part) == ["path"] else part for part in short]


# --- files -----------------------------------------------------------------------------------------------------------


def _samples(run: Path, embedding: Embedding) -> Iterator[dict[str, Any]]:
    """Yield every sample that has videos, the latest step first; its videos are embedded as far as they fit."""
    made = sorted(own_samples(run), key=lambda sample: (sample[0], sample[1].name), reverse=True)
    for step, folder, facts in made:
        shown = shown_sample(folder, facts | {"step": step}, embedding)
        if shown["videos"]:
            yield shown


def shown_sample(folder: Path, facts: Mapping[str, Any], embedding: Embedding) -> dict[str, Any]:
    """Return what a page shows of a sample; a browser plays the mp4 files of it."""
    files = {name: file for name, file in sample_files(folder, facts).items() if file.suffix == ".mp4"}
    videos = {name: embedding.source(file) for name, file in files.items()}
    return {"streams": []} | dict(facts) | {"name": folder.name, "videos": videos}
