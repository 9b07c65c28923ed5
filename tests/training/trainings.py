"""Short trainings on the demo, in this process's ranks or as the real command, and what is compared of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support import ranks
from tests.support.ranks import run_ranks
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import checkpoint
from transpixeler.training import trainer

ROOT = Path(__file__).parents[2]
FAST = (
    "train.max_steps=8",
    "train.global_batch=4",
    "checkpoint.every_steps=4",
    "save.every_steps=0",
    "save.every_epochs=0",
    "log.tensorboard=false",
    "optim.ema=0.5",
    "optim.warmup_steps=0",
    "optim.schedule=constant",
    "objective.tasks={joint: 0.5, rgb_to_aux: 0.5}",
    "eval.before_first_step=false",
    "eval.every_epochs=0",
)
EXACT = ("step", "epoch", "loss", "loss_rgb", "loss_seg", "grad_norm", "lr", "loss_by_t", "samples")


def run_here(rank: int, world_size: int, path: Path, overrides: tuple[str, ...], resume: str | None) -> str:
    """Train on this rank and return the run's folder."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling an 8-bit update costs a minute and changes nothing here
    config = loading.load(path, overrides)
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    return str(trainer.train(config, runtime, resume=resume))


def run(demo: Path, output: Path, *overrides: str, ranks: int = 1, resume: str | None = None) -> Path:
    overrides = (f"output_dir={output}", *FAST, *overrides)
    return Path(run_ranks(run_here, ranks, demo / "config.yaml", overrides, resume)[0])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT} for line in metrics(folder)]


def tensors(folder: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whatever layout wrote it."""
    out = scratch / f"whole-{time.monotonic_ns()}.pt"
    dcp_to_torch_save(folder / "checkpoints" / checkpoint.folder_name(step), out)
    return torch.load(out, weights_only=True)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def as_killed(folder: Path, step: int, place: Path) -> Path:
    """Copy a run into a folder as a kill after a step's checkpoint would have left it."""
    copied = shutil.copytree(folder, place / folder.name, symlinks=True)
    whole = checkpoint.candidates(copied / "checkpoints")
    assert step in map(checkpoint.step_of, whole)
    for later in whole:
        if checkpoint.step_of(later) > step:
            shutil.rmtree(later)
    for saved in copied.glob("step*"):
        if int(saved.name.removeprefix("step")) > step:
            shutil.rmtree(saved)
    lines = [json.dumps(line) for line in metrics(copied) if line["step"] <= step]
    (copied / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return copied


def layout(pipeline: int, replicate: int, shard: int, context: int = 1) -> tuple[str, ...]:
    names = {"pipeline": pipeline, "replicate": replicate, "shard": shard, "context": context}
    return tuple(f"parallel.{name}={count}" for name, count in names.items())


class Forked:
    """A command in its own process, forked from where torch is loaded; used as a `Popen` whose stderr is a file."""

    def __init__(self, words: list[str], said: Path) -> None:
        self._said = said
        self._process = ranks.fork(_command, words, said)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stderr(self) -> BinaryIO:
        return self._said.open("rb")

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"it still runs after {timeout} s"
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, bytes]:
        self.wait(timeout)
        return None, self._said.read_bytes()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _command(words: list[str], said: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    raise SystemExit(cli.main(words))


def start(demo: Path, output: Path, *overrides: str) -> Forked:
    """Start the command, with what it says in a file beside its output."""
    words = ["train", str(demo / "config.yaml"), f"output_dir={output}", *FAST, *overrides]
    return Forked(words, output.with_name(f"{output.name}.said"))


def launch(demo: Path, output: Path, *overrides: str) -> subprocess.Popen:
    """Start the command as a shell does, in an interpreter of its own."""
    words = ["train", str(demo / "config.yaml"), f"output_dir={output}", *FAST, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "transpixeler", *words], env=environment, stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen | Forked, output: Path, step: int) -> None:
    wait_until(process, lambda: steps(output) >= step)


def steps(output: Path) -> int:
    """Return how many steps the latest run in a folder has told of."""
    lines = list(output.glob("latest/metrics.jsonl"))
    return lines[0].read_text().count("\n") if lines else 0


def wait_until(process: subprocess.Popen | Forked, done: Callable[[], bool], seconds: float = 600) -> None:
    """Wait for a training to come that far; one that does not is ended, so that it takes nothing from later tests."""
    deadline = time.monotonic() + seconds
    while not done():
        if process.poll() is not None or time.monotonic() >= deadline:
            end(process)
            raise AssertionError(process.stderr.read())
        time.sleep(0.01)


def end(process: subprocess.Popen | Forked) -> None:
    """Kill a training and, if that is torchrun, its ranks, which have process groups of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # so that torchrun starts no rank again
        for child in children(process):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def children(process: subprocess.Popen | Forked) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
