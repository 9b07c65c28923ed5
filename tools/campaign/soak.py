"""Train for minutes with buckets, evaluations, samples, saves and checkpoints, and see whether anything grows.

The first third is warm-up. Memory rises and falls with every evaluation, but a leak raises what it falls to. So the
resident memory of the last third (the value that it is below for a tenth of the time) may be above that of the middle
third by 2 % and 4 MiB; open files and threads (their lowest counts) by none. Figures are printed for all three thirds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from campaign import Figures, main, write_demo
from forked import Command, finished, running

EVERY = 0.5  # seconds between two looks at the process
SECONDS = 600.0  # that training may take to begin and to end
RSS_SHARE, RSS_MIB = 1.02, 4.0  # that resident memory may grow after the warm-up
WORDS = (
    *("run_name=run", "train.max_steps=1000000", "train.global_batch=2", "optim.warmup_steps=0"),
    *("eval.every_steps=20", "eval.times=[0.5]", "eval.samples=1", "sample.steps=1", "sample.size=[64, 64, 9]"),
    *("save.every_steps=10", "checkpoint.every_steps=5", "checkpoint.keep=2"),
)


class Look(NamedTuple):
    """The resources of the process at one moment."""

    rss_mib: float
    files: int
    threads: int


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return what training held in each third of its time."""
    config, said = write_demo(folder / "demo"), folder / "said"
    finished(said, "cache", config)
    run = folder / "out" / "run"
    with running(said, "train", config, *WORDS, f"seed={arguments.seed}", f"output_dir={folder / 'out'}") as command:
        _wait_for_a_step(command, run / "metrics.jsonl")
        looks = _watch(command, arguments.rounds * 60.0)
        (run / "save_quit").touch()
        ended = command.ended(SECONDS) and command.codes() == [0]
    figures = thirds(looks) | {"looks": len(looks), "steps": _count_lines(run / "metrics.jsonl")}
    figures |= {"saves": len(list(run.glob("step*"))), "samples": len(list((run / "samples").glob("step*")))}
    faults = [*grown(looks), *([] if ended else [f"it ended with {command.codes()}: {command.lines()[-5:]}"])]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return {**figures, "wrong": len(faults)}


def thirds(looks: Sequence[Look]) -> Figures:
    """Return the figures of each third: the lowest tenth and the most of its memory, least counts of the rest."""
    parts = _parts(looks)
    return {
        "rss_mib": [round(statistics.quantiles((look.rss_mib for look in part), n=10)[0], 1) for part in parts],
        "peak_mib": [round(max(look.rss_mib for look in part), 1) for part in parts],
        "files": [min(look.files for look in part) for part in parts],
        "threads": [min(look.threads for look in part) for part in parts],
    }


def grown(looks: Sequence[Look]) -> list[str]:
    """Return what is more in the last third than the rule allows."""
    found, said = thirds(looks), []
    for name in ("rss_mib", "files", "threads"):
        _, middle, last = found[name]
        limit = middle * RSS_SHARE + RSS_MIB if name == "rss_mib" else middle
        if last > limit:
            said.append(f"{name} grew from {middle} to {last}")
    return said


def _parts(looks: Sequence[Look]) -> list[Sequence[Look]]:
    length = len(looks) // 3
    return [looks[:length], looks[length : 2 * length], looks[2 * length :]]


def _watch(command: Command, seconds: float) -> list[Look]:
    """Look at a process for so long, or until it ends."""
    process, looks = command.processes[0].pid, []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not command.ended():
        looks.append(look(Path(f"/proc/{process}")))
        time.sleep(EVERY)
    return looks


def look(process: Path) -> Look:
    """Return what a process of Linux holds now. process: its folder in /proc."""
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Look(int(status["VmRSS"].split()[0]) / 1024, len(list((process / "fd").iterdir())), int(status["Threads"]))


def _wait_for_a_step(command: Command, metrics: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not _count_lines(metrics) and time.monotonic() < deadline and not command.ended():
        time.sleep(0.1)


def _count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main("soak", __doc__, campaign, rounds=10, unit="minutes"))
