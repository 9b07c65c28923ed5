"""What the benches share: both sides by turns in one process, medians and spreads, one JSON line, one line of record.

A bench times ours and its rivals alternately, so that whatever else the machine does meets all of them alike. Its last
line on the terminal is a JSON object; the same figures, with machine and versions, become a line of `results.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.md")
VERSIONS = ("torch", "diffusers", "torchao", "av")


@dataclass(frozen=True)
class Times:
    """Seconds of every repeat of one action."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the middle half's width, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (self.median,) * 3
        return (high - low) / 2 / self.median

    def __str__(self) -> str:
        return f"{self.median:.4g} s ± {self.spread:.0%}"


def parser(description: str) -> argparse.ArgumentParser:
    """A bench's options: how often, and whether the figures are written down."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--repeats", type=int, default=7, help="how often each side runs")
    found.add_argument("--no-record", action="store_true", help="leave results.md as it is")
    return found


def alternate(actions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, Times]:
    """Each action's times; every round runs all of them, each round begins with another one."""
    names = list(actions)
    for name in names * warmup:
        actions[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            taken[name].append(seconds(actions[name]))
    for name in names:
        print(f"{name:24} {Times(tuple(taken[name]))}", flush=True)
    return {name: Times(tuple(values)) for name, values in taken.items()}


def seconds(action: Callable[[], object]) -> float:
    """Of one call, the accelerator's queue emptied before and after."""
    _synchronize()
    start = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - start


def ratio(times: Mapping[str, Times], above: str, below: str) -> float:
    """Median over median, to three figures."""
    return round(times[above].median / times[below].median, 3)


def wan_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the blocks that a bench runs, and of one stream's tokens."""
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--head", type=int, default=128, help="width of one head")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 16), help="one stream's frames, rows, columns")
    parser.add_argument("--rank", type=int, default=64)


def wan_config(args: argparse.Namespace, *, text_dim: int) -> dict[str, int]:
    return {
        "num_attention_heads": args.width // args.head,
        "attention_head_dim": args.head,
        "ffn_dim": args.width * 9 // 2,
        "num_layers": args.blocks,
        "text_dim": text_dim,
    }


def finish(bench: str, figures: Mapping[str, object], *, record: bool, argv: Sequence[str] | None = None) -> None:
    """The last line of a bench, and its line in `results.md`."""
    line = json.dumps(dict(figures))
    if record:
        command = " ".join([bench, *(sys.argv[1:] if argv is None else argv)])
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(f"| {date.today()} | `{command}` | {machine()} | `{line}` |\n")
    print(line, flush=True)


def machine() -> str:
    """What it ran on and with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [f"{cores} cores {platform.machine()}", device, f"Python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # a bench that needs it says so by itself
    return ", ".join(found)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
