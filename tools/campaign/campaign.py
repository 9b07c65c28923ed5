"""Shared by the campaign's programs: their options, the demo that they work on, and the lines of results.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.md")
QUIET = ("save.every_epochs=0", "eval.before_first_step=false", "eval.every_epochs=0", "log.tensorboard=false")
SMALL = ("data.frames=[1, 9]", "train.global_batch=2", "train.micro_batch=2", "optim.warmup_steps=0", "lora.rank=4")
Figures = dict[str, Any]


def main(
    name: str,
    doc: str | None,
    work: Callable[[argparse.Namespace, Path], Figures],
    *,
    rounds: int,
    unit: str = "rounds",
    lacking: Callable[[], str] = str,
) -> int:
    """Run a campaign in a temporary folder, append its figures, and return 1 if something went wrong in it.

    unit: what `rounds` counts, as the option is named.
    lacking: return what this machine lacks for the campaign, or ""; with anything lacking, say so and return 2.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument(f"--{unit}", dest="rounds", type=int, default=rounds, help=f"how many (default: {rounds})")
    parser.add_argument("--no-record", action="store_true", help="do not append the figures to results.md")
    arguments = parser.parse_args()
    if absent := lacking():
        print(f"{name}: skipped: {absent}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        figures = work(arguments, Path(folder))
    line = json.dumps({"campaign": name, "seed": arguments.seed, unit: arguments.rounds, **figures})
    print(line)
    if not arguments.no_record:
        made = f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(f"{made}:\n\n```\n{line}\n```\n\n")
    return 1 if figures["wrong"] else 0


def write_demo(folder: Path) -> Path:
    """Write a small demo and return its config."""
    from transpixeler.demo.write import write_demo

    write_demo(folder, train_clips=10, eval_clips=2)
    return folder / "config.yaml"


def command(*words: object, ranks: int = 1) -> list[str]:
    """Return the words that start a command of transpixeler, on several ranks under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, "-m", "transpixeler", *map(str, words)]


@contextmanager
def started(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process in a session of its own, and kill all of it at the end."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a process and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def finished(words: Sequence[str]) -> str:
    """Run a process to its end and return what it printed; raise if it failed."""
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return the environment of every process: this checkout, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def fresh(folder: Path, copy_of: Path) -> Path:
    """Replace a folder by a copy of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(copy_of, folder, symlinks=True))
