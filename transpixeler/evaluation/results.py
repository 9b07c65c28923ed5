"""Held-out results go in; numbers for TensorBoard, lines for the log and a table for the terminal come out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any


def scalars(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield every number under its name on TensorBoard."""
    for name, values in found.items():
        for kind in ("loss", "loss_ema"):
            for stream, by_time in values.get(kind, {}).items():
                yield f"eval/{name}/{kind}_{stream}", mean_over_times(by_time)
                yield from ((f"eval/{name}/{kind}_{stream}/t{t}", value) for t, value in by_time.items())
        yield from ((f"eval/{name}/{metric}", value) for metric, value in values.get("metrics", {}).items())


def summary(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each set."""
    for name, values in found.items():
        parts = [
            f"{kind}_{s} {mean_over_times(t):.4f}"
            for kind in ("loss", "loss_ema")
            for s, t in values.get(kind, {}).items()
        ]
        yield f"{name}: {', '.join([*parts, *(f'{m} {v:.4g}' for m, v in values.get('metrics', {}).items())])}"


def mean_over_times(by_time: Mapping[str, float]) -> float:
    """Return the mean of the losses at all noise levels."""
    return math.fsum(by_time.values()) / len(by_time)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out losses by time, a row for each set and stream, then the samples' metrics."""
    losses = {f"{name} {s}": times for name, values in found.items() for s, times in values.get("loss", {}).items()}
    measured = {f"{name} {m}": v for name, values in found.items() for m, v in values.get("metrics", {}).items()}
    width = max((len(name) for name in (*losses, *measured)), default=0)
    lines = []
    times: list[str] = []
    for name, by_time in losses.items():
        if times != [*by_time]:  # experts are measured at the noise levels of their own
            times = [*by_time]
            lines.append(" ".join([f"{'loss at t':{width}}", *(f"{t:>7}" for t in times), "   mean"]))
        values = [*by_time.values(), mean_over_times(by_time)]
        lines.append(" ".join([f"{name:{width}}", *(f"{value:7.4f}" for value in values)]))
    lines += [f"{name:{width}} {value:7.4g}" for name, value in measured.items()]
    return "\n".join(lines)
