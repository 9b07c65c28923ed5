"""Share what the benches need: options, actions that run by turns, one JSON line, one line of record.

A bench times ours and its rivals alternately, so that whatever else the machine does meets all of them alike. Its last
line on the terminal is a JSON object; the same figures, with machine and versions, become a line of `results.md`,
unless the machine was too noisy for one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import against
import torch
from readings import measure
from rounds import Clock, Rounds

RESULTS = Path(__file__).with_name("results.md")
VERSIONS = ("torch", "diffusers", "torchao", "av")


def parser(description: str | None, *, repeats: int = 7, comparable: bool = False) -> argparse.ArgumentParser:
    """Return a bench's options: how often its sides run, whether figures are recorded, perhaps another checkout."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--repeats", type=int, default=repeats, help="how often each side runs")
    found.add_argument("--no-record", action="store_true", help="leave results.md as it is")
    if comparable:
        found.add_argument("--against", type=Path, metavar="PATH", help="compare with this other checkout, by turns")
    return found


def alternate(
    actions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, clock: Clock = "wall"
) -> Rounds:
    """Return the rounds of these actions: every round runs all of them, each round begins with another one."""
    names = list(actions)
    for name in names * warmup:
        actions[name]()
    rounds = []
    for turn in range(repeats):
        first = turn % len(names)
        rounds.append({name: measure(actions[name]) for name in (*names[first:], *names[:first])})
    found = Rounds(tuple({name: taken[name] for name in names} for taken in rounds), clock)
    for name, times in found.items():
        print(f"{name:24} {times}")
    print(found.rule, flush=True)
    return found


def seconds(action: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    return measure(action).wall


def step_clock() -> Clock:
    """Return the clock for arithmetic alone: on CPUs the time that other programs had a core does not count."""
    return "wall" if torch.cuda.is_available() else "cpu"


def compare(bench: str, args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Print each action's time here over its time in the checkout that `--against` names; the last line is JSON."""
    given = list(sys.argv[1:] if argv is None else argv)
    found = against.compare(bench, given, args.against, repeats=args.repeats, clock=step_clock())
    ratios = {name: rounds.ratio("here", "there") for name, rounds in found.items()}
    for name, rounds in found.items():
        print(f"{name:24} here {rounds['here']}, there {rounds['there']}; {rounds.rule}")
    for name, ratio in ratios.items():
        print(f"{name:24} {against.verdict(ratio)}")
    print(json.dumps({f"x_against_{name}": ratio.figure for name, ratio in ratios.items()}), flush=True)


def wan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the blocks that a bench runs, and of one stream's tokens."""
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--head", type=int, default=128, help="width of one head")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 16), help="one stream's frames, rows, columns")
    parser.add_argument("--rank", type=int, default=64)


def wan_config(args: argparse.Namespace, *, text_dim: int) -> dict[str, int]:
    """Return the model config that these options ask for."""
    return {
        "num_attention_heads": args.width // args.head,
        "attention_head_dim": args.head,
        "ffn_dim": args.width * 9 // 2,
        "num_layers": args.blocks,
        "text_dim": text_dim,
    }


def finish(bench: str, figures: Mapping[str, object], *, record: bool, argv: Sequence[str] | None = None) -> None:
    """Print the last line of a bench, and add its line to `results.md` if every figure could be told."""
    line = json.dumps(dict(figures))
    untold = [name for name, value in figures.items() if isinstance(value, str)]
    if record and untold:
        print(f"results.md stays as it is: the machine was too noisy for {', '.join(untold)}")
    elif record:
        command = " ".join([bench, *(sys.argv[1:] if argv is None else argv)])
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(f"| {date.today()} | `{command}` | {machine()} | `{line}` |\n")
    print(line, flush=True)


def machine() -> str:
    """Return what the bench ran on and with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [f"{cores} cores {platform.machine()}", device, f"Python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # a bench that needs it says so by itself
    return ", ".join(found)
