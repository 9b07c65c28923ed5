"""Kill training and caching at random moments, go on, and compare with what nobody killed.

A round of training is killed with SIGKILL until it has come to its end, resumed each time; its adapter must then be the
same file, byte for byte, as that of a training that nobody killed. A round of caching is killed and run again; every
record must be whole. Every second training is on two ranks.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from pathlib import Path

from campaign import QUIET, Figures, command, finished, kill, main, started, write_demo

STEPS = 12
KILLS = 3  # of one training; after these it may end
OFTEN = (f"train.max_steps={STEPS}", "checkpoint.every_steps=2", "run_name=run")


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return what was killed and what came of it."""
    draw = random.Random(arguments.seed)
    config = write_demo(folder / "demo")
    figures: Figures = {"kills": 0, "resumed": 0, "trainings": 0, "cachings": 0, "wrong": 0}
    for number in range(arguments.rounds):
        _cache_round(config, draw, figures)
        _train_round(config, folder / f"{number}", draw, figures, ranks=1 + number % 2)
    return figures


def _train_round(config: Path, folder: Path, draw: random.Random, figures: Figures, *, ranks: int) -> None:
    words = ["train", config, *QUIET, *OFTEN]
    start = time.monotonic()
    finished(command(*words, f"output_dir={folder / 'whole'}", ranks=ranks))
    usual = time.monotonic() - start
    killed, resume = folder / "killed", []
    for _ in range(KILLS):
        with started(command(*words, f"output_dir={killed}", *resume, ranks=ranks)) as process:
            figures["kills"] += _kill_within(process, draw.uniform(0.3, 1.0) * usual)
        resume = ["--resume"] if (killed / "run" / "config.yaml").exists() else []
        figures["resumed"] += len(resume)
    finished(command(*words, f"output_dir={killed}", *resume, ranks=ranks))
    adapters = [home / "run" / f"step{STEPS}" / "adapter_model.safetensors" for home in (folder / "whole", killed)]
    figures["trainings"] += 1
    figures["wrong"] += adapters[0].read_bytes() != adapters[1].read_bytes()


def _cache_round(config: Path, draw: random.Random, figures: Figures) -> None:
    with started(command("cache", config, "--rebuild")) as process:
        figures["kills"] += _kill_within(process, draw.uniform(1.0, 6.0))
    finished(command("cache", config))
    figures["cachings"] += 1
    figures["wrong"] += "every record is whole" not in finished(command("cache", config, "--verify"))


def _kill_within(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill a process after some time; return whether it still ran."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return True
    return False


if __name__ == "__main__":
    raise SystemExit(main("kill", __doc__, campaign, rounds=4))
