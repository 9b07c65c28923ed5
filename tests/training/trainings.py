"""Short trainings on the demo, in this process's ranks or as the real command, and what is compared of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.ranks import run_ranks
from transpixeler import configfile
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import checkpoint
from transpixeler.training import trainer

ROOT = Path(__file__).parents[2]
FAST = (
    "train.max_steps=8",
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
    config = configfile.load(path, overrides)
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


def layout(pipeline: int, replicate: int, shard: int) -> tuple[str, ...]:
    return (f"parallel.pipeline={pipeline}", f"parallel.replicate={replicate}", f"parallel.shard={shard}")


def start(demo: Path, output: Path, *overrides: str) -> subprocess.Popen:
    words = ["train", str(demo / "config.yaml"), f"output_dir={output}", *FAST, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "transpixeler", *words], env=environment, stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        lines = list(output.glob("latest/metrics.jsonl"))
        if lines and lines[0].read_text().count("\n") >= step:
            return
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
