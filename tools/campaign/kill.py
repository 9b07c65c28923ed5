"""Kill training and caching at random moments, go on, and compare with what nobody killed.

A training is killed with SIGKILL again and again, and resumed each time, until it comes to its end: at a random moment
of its start, in a step, or while a checkpoint is written. Its adapter and the tensors of its last checkpoint must then
be the same, bit for bit, as those of a training that nobody killed. Every second training is on two ranks; where only
one of them is killed (never in a start, where the other would look for it for minutes, as for a host that comes late),
the other must end by itself. The cache is killed while it is built and built again; every record must be whole. A round
is one training and some such buildings.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from campaign import QUIET, SMALL, Figures, main, write_demo
from forked import Command, finished, running

STEPS = 40
CACHINGS = 4  # a round
POLL = 0.01  # seconds between two looks
PROGRESS = 4  # most steps that a training makes before it is killed
ALONE = 330.0  # seconds that a rank has to end by itself when another was killed: a save waits 300 s for its part
OFTEN = (f"train.max_steps={STEPS}", "checkpoint.every_steps=2", "run_name=run", *SMALL)


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return what was killed and what came of it."""
    draw = random.Random(arguments.seed)
    config = write_demo(folder / "demo")
    finished(folder / "said", "cache", config, *SMALL)
    figures: Figures = {"training_kills": 0, "in_a_start": 0, "in_a_step": 0, "in_a_save": 0, "of_one_rank": 0}
    figures |= {"trainings": 0, "caching_kills": 0, "cachings": 0, "wrong": 0}
    usual: dict[int, float] = {}
    for number in range(arguments.rounds):
        ranks = 2 - number % 2  # two at first
        if ranks not in usual:
            usual[ranks] = train_whole(config, folder / f"{ranks}", ranks=ranks)
        train_round(config, folder / f"{ranks}", draw, figures, ranks=ranks, usual=usual[ranks])
        for _ in range(CACHINGS):
            cache_round(config, folder / "said", draw, figures)
        print(f"round {number + 1} of {arguments.rounds}: {figures}", file=sys.stderr, flush=True)
    return figures


def train_whole(config: Path, folder: Path, *, ranks: int) -> float:
    """Train without a kill, and return the seconds it took."""
    start = time.monotonic()
    finished(folder / "said", "train", config, *QUIET, *OFTEN, f"output_dir={folder / 'whole'}", ranks=ranks)
    return time.monotonic() - start


def train_round(config: Path, folder: Path, draw: random.Random, figures: Figures, *, ranks: int, usual: float) -> None:
    """Kill one training until it is done, and compare it with the whole one. usual: seconds that one takes."""
    whole, killed, codes = folder / "whole" / "run", folder / "killed", []
    run, words = killed / "run", ["train", config, *QUIET, *OFTEN, f"output_dir={killed}"]
    codes: list[int | None] = []
    while not (run / f"step{STEPS}").exists():
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        with running(folder / "said", *words, *resume, ranks=ranks) as command:
            _kill_at_a_random_moment(command, run, draw, figures, usual=usual)
        codes = command.codes()
    if any(codes):  # killed after its last save; its last checkpoint may still lack
        finished(folder / "said", *words, "--resume", ranks=ranks)
    figures["trainings"] += 1
    for name in (f"step{STEPS}/adapter_model.safetensors", *_tensors(whole)):
        same = (whole / name).read_bytes() == (run / name).read_bytes()
        _count(figures, "" if same else f"{ranks} ranks: {name} differs")
    shutil.rmtree(killed)


def _tensors(run: Path) -> list[str]:
    """Return the files that hold the tensors of the last checkpoint."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    return [str(file.relative_to(run)) for file in sorted(last.glob("__*.distcp"))]


def _kill_at_a_random_moment(
    command: Command, run: Path, draw: random.Random, figures: Figures, *, usual: float
) -> None:
    metrics, before = run / "metrics.jsonl", _lines(run / "metrics.jsonl")
    kind = draw.choice(("in_a_start", "in_a_step", "in_a_save", "in_a_save"))
    more = draw.randint(1, PROGRESS)
    reached: dict[str, Callable[[], bool]] = {
        "in_a_start": lambda: False,
        "in_a_step": lambda: _lines(metrics) >= before + more,
        "in_a_save": lambda: _lines(metrics) >= before + more and any(run.glob("checkpoints/*.tmp")),
    }
    wait = draw.uniform(0, usual / 2) if kind == "in_a_start" else 600.0
    deadline = time.monotonic() + wait
    while not reached[kind]() and time.monotonic() < deadline and not command.ended():
        time.sleep(POLL)
    time.sleep(0 if kind == "in_a_start" else draw.uniform(0, 0.03))
    if command.ended():  # by itself
        _count(figures, "" if not any(command.codes()) else f"ended with {command.codes()}: {command.lines()[-3:]}")
        return
    figures["training_kills"] += 1
    figures[kind] += 1
    if len(command.processes) > 1 and kind != "in_a_start" and draw.random() < 0.5:
        figures["of_one_rank"] += 1
        command.kill(draw.randrange(len(command.processes)))
        _count(figures, "" if command.ended(ALONE) else f"a rank still ran {ALONE:.0f} s after the other was killed")


def cache_round(config: Path, said: Path, draw: random.Random, figures: Figures) -> None:
    """Kill a caching that begins anew, go on, and let every record be read."""
    cache = config.parent / "data" / "cache"
    with running(said, "cache", config, *SMALL, "--rebuild") as command:
        written, deadline = draw.randrange(1, 1 << 15), time.monotonic() + 600
        wait_for_start = draw.random() < 0.8  # else it is killed before or while the old cache goes
        while wait_for_start and _bytes(cache) < written and time.monotonic() < deadline and not command.ended():
            time.sleep(POLL)
        time.sleep(draw.uniform(0, 0.05 if wait_for_start else 0.5))
        figures["caching_kills"] += not command.ended()
    finished(said, "cache", config, *SMALL)
    figures["cachings"] += 1
    told = finished(said, "cache", config, *SMALL, "--verify")
    _count(figures, "" if "every record is whole" in told else f"cache --verify: {told[-500:]}")


def _count(figures: Figures, fault: str) -> None:
    """Count a fault and print it."""
    if fault:
        figures["wrong"] += 1
        print(fault, file=sys.stderr, flush=True)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _bytes(folder: Path) -> int:
    """Return the size of a folder's files, which may go while they are counted."""
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


if __name__ == "__main__":
    raise SystemExit(main("kill", __doc__, campaign, rounds=4))
