"""The process this rank runs in: its device, its process group, its voice, and the moment it leaves.

Comes from torchrun's environment, or from nothing for a single process. Everything above asks this value for
rank, device and group, and never looks at the environment itself.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from transpixeler.config import UserError

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class Runtime:
    """Where this process stands among the others."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)  # how long it waits for another, in any group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: object) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def running(*, timeout_minutes: float = 10.0, device: str | None = None) -> Iterator[Runtime]:
    """Joins the process group that torchrun describes, and leaves it cleanly.

    A rank that fails leaves it to the end of its process: taking the group apart waits for the others, who may wait
    for this one, and then nobody would learn why.
    """
    runtime = start(timeout_minutes=timeout_minutes, device=device)
    failed = True
    try:
        yield runtime
        failed = False
    finally:
        if dist.is_initialized() and not (failed and runtime.world_size > 1):
            dist.destroy_process_group()


def start(*, timeout_minutes: float = 10.0, device: str | None = None) -> Runtime:
    rank, world_size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank = _from_environment("LOCAL_RANK", 0)
    where = _device(device, local_rank)
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE={world_size} in the environment, but no MASTER_ADDR; launch with torchrun")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        # gloo beside nccl carries host tensors: object collectives and checkpoint plans
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        options: dict = {"device_id": where} if where.type == "cuda" else {}
        if "MASTER_ADDR" not in os.environ:  # alone, without torchrun: a group of one needs no rendezvous
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timeout, **options)
    log_to_terminal(rank)
    quiet_libraries()
    return Runtime(rank, world_size, local_rank, where, timeout)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name}={text!r} in the environment is not a number; launch with torchrun")
    return int(text)


def _device(wanted: str | None, local_rank: int) -> torch.device:
    wanted = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no CUDA device is visible to torch; check the driver, or run on the CPU")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
                f"launch with --nproc-per-node {torch.cuda.device_count()}"
            )
        return torch.device("cuda", local_rank)
    return torch.device(wanted)


# --- voice -----------------------------------------------------------------------------------------------------------


class _RankFilter(logging.Filter):
    """Rank 0 says everything; another rank speaks when something is wrong, and says which it is."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        record.voice = (f"[rank {self.rank}] " if self.rank else "") + level
        return self.rank == 0 or record.levelno >= logging.WARNING


class _Terminal(logging.Handler):
    """Writes above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def quiet_libraries() -> None:
    """What torchao, diffusers and transformers say when they are loaded is nothing that a user can act on."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def log_to_terminal(rank: int) -> None:
    for handler in list(logger.handlers):
        if isinstance(handler, _Terminal):
            logger.removeHandler(handler)
    _add(_Terminal(), rank, "%(voice)s%(message)s")


def log_to_file(path: Path, rank: int) -> logging.Handler:
    """Adds RUN/log.txt; the caller removes the handler when the run ends."""
    return _add(logging.FileHandler(path, encoding="utf-8"), rank, "%(asctime)s %(voice)s%(message)s")


def _add(handler: logging.Handler, rank: int, form: str) -> logging.Handler:
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(logging.Formatter(form))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler


# --- garbage ---------------------------------------------------------------------------------------------------------


@contextmanager
def steady_garbage(every: int) -> Iterator[Callable[[int], None]]:
    """Collects on the same steps on all ranks: a collection on one rank alone makes all the others wait."""

    def tick(step: int) -> None:
        if step % every == 0:
            gc.collect(1)

    gc.collect()
    gc.disable()
    try:
        yield tick
    finally:
        gc.enable()


def run_stamp() -> str:
    """A run's folder name: sorts by time, and two runs of one second differ."""
    now = datetime.datetime.now()
    return f"{now:%Y%m%d-%H%M%S}-{random.SystemRandom().randrange(16**4):04x}"
