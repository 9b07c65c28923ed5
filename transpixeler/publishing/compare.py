"""The folders of two or more runs go in; one page comes out that lays them beside each other.

Samples stand side by side by prompt and step, curves lie over each other in one colour a run, and two tables show what
differs in the configs and what was reached last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.files import write_text, writing_to
from transpixeler.publishing import page, report
from transpixeler.publishing.page import Embedding
from transpixeler.runs.lock import is_trained

PAGE = "compare.html"
NAMES_ONLY = ("run_name", "output_dir")  # keys that say where a run is, not what it is


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the page, into `out` if that is a folder, and return its path."""
    for run in runs:
        report.check_run(run)
    places = [run.resolve() for run in runs]
    if twice := [str(run) for run, place in zip(runs, places) if places.count(place) > 1]:
        raise UserError(f"report: {' and '.join(twice)} are one run; give each once")
    made = out / PAGE if out.is_dir() else out
    with writing_to(made, "--out"):
        write_text(made, render(gather(runs, made)))
    return made


def gather(runs: Sequence[Path], made: Path) -> dict[str, Any]:
    """Collect what the page shows of all runs into one JSON value."""
    embedding = Embedding(made)
    found = [report.gather(run, embedding, live=float(is_trained(run))) for run in runs]
    kept = ("config", "steps", "last", "seconds", "evals", "samples")
    shown = [
        {key: one[key] for key in kept} | {"label": label, "place": str(run), "state": one["live"]["words"]}
        for one, label, run in zip(found, _labels(runs), runs)
    ]
    merged = {name: one for run in found for name, one in run["words"].items()}
    return {"runs": shown, "differences": differences([one["config"] for one in found]), "words": merged}


def render(data: Mapping[str, Any]) -> str:
    """Return the page of a gathered value."""
    title = ", ".join(run["label"] for run in data["runs"])
    return page.build(title, styles=report.STYLES, scripts=(*report.SCRIPTS, "compare.js"), value=data)


def _labels(runs: Sequence[Path]) -> list[str]:
    """Return the runs' names, with as much of their place before them as tells those of one name apart."""
    places = [run.resolve().parts for run in runs]
    length = 1
    while max(Counter(place[-length:] for place in places).values()) > 1:
        length += 1
    return ["/".join(place[-length:]) for place in places]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """List the keys that are not the same in all configs, each with its value in every one."""
    flat = [dict(loading.flattened(config)) for config in configs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in NAMES_ONLY]
    rows = [(key, [report.brief(one.get(key)) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]
