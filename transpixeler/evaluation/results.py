"""Held-out results go in; numbers for TensorBoard, lines for the log and a table for the terminal come out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHOWN_TIMES = 5  # columns of the table; eval.json has every noise level


def scalars(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield every number under its name on TensorBoard."""
    for name, values in found.items():
        for kind in ("loss", "loss_ema"):
            for stream, by_time in values.get(kind, {}).items():
                yield f"eval/{name}/{kind}_{stream}", mean_over_times(by_time)
                yield from ((f"eval/{name}/{kind}_{stream}/t{t}", value) for t, value in by_time.items())
        yield from ((f"eval/{name}/{metric}", value) for metric, value in values.get("metrics", {}).items())


def summary(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each set of which something was measured."""
    for name, values in found.items():
        parts = [
            f"{kind}_{s} {mean_over_times(t):.4f}"
            for kind in ("loss", "loss_ema")
            for s, t in values.get(kind, {}).items()
        ]
        parts += [f"{metric} {value:.4g}" for metric, value in values.get("metrics", {}).items()]
        if parts:
            yield f"{name}: {', '.join(parts)}"


def mean_over_times(by_time: Mapping[str, float]) -> float:
    """Return the mean of the losses at all noise levels."""
    return math.fsum(by_time.values()) / len(by_time)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out losses, a row for each set and stream, and measures of samples, a row for each set."""
    losses = [(name, stream, times) for name, one in found.items() for stream, times in one.get("loss", {}).items()]
    rows: list[list[str]] = []
    shown: list[str] = []
    for name, stream, by_time in losses:
        if shown != (times := _spread([*by_time])):  # experts are measured at the noise levels of their own
            shown = times
            rows.append(["loss at t", "", "mean", *shown])
        rows.append(
            [name, stream, *(f"{value:.4f}" for value in (mean_over_times(by_time), *(by_time[t] for t in shown)))]
        )
    parts = [_columns(rows)] if rows else []
    measured = {name: one["metrics"] for name, one in found.items() if one.get("metrics")}
    if measured:
        names = list(dict.fromkeys(metric for values in measured.values() for metric in values))
        body = [[name, *(f"{v[m]:.4g}" if m in v else "–" for m in names)] for name, v in measured.items()]
        parts.append(_columns([["samples", *names], *body]))
    return "\n\n".join(parts)


def _spread(times: Sequence[str]) -> list[str]:
    """Return at most SHOWN_TIMES of the noise levels, the lowest and the highest among them."""
    last, count = len(times) - 1, min(SHOWN_TIMES, len(times))
    return [times[round(i * last / max(count - 1, 1))] for i in range(count)]


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Align cells: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = 2 if rows[0][1] == "" else 1  # columns of names
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i < texts else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
