"""Join and leave the process group, and log so that many ranks read like one program.

In: torchrun's environment, or none for a single process. Out: a `Runtime` with rank, device and object collectives.
Everything above asks this value and never reads the environment itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import logging
import os
import random
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented as public
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from transpixeler.config.sections import UserError
from transpixeler.files import near, printable
from transpixeler.parallel.contact import naming_lost_ranks
from transpixeler.parallel.devices import prepare_allocator
from transpixeler.parallel.launch import launch

logger = logging.getLogger("transpixeler")
T = TypeVar("T")
SET_PARENT_DEATH_SIGNAL = 1  # of prctl


@dataclass(frozen=True)
class Runtime:
    """One process among the others: its rank, device and timeout."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)  # of every collective, in every group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return on every rank whether it is so on one: a number is reduced, however many ranks there are."""
        if self.world_size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def least(self, number: int) -> int:
        """Return on every rank the least of all ranks' numbers."""
        if self.world_size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    def faults(self, fault: str) -> list[str]:
        """Return the faults of all ranks, on every rank; a text is sent only where there is one."""
        return [text for text in self.gather(fault) if text] if self.any(bool(fault)) else []

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank. It grows with the ranks: not for every step."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def running(*, timeout_minutes: float = 10.0, device: str | None = None) -> Iterator[Runtime]:
    """Join the process group that torchrun describes, and leave it when the work is done.

    A rank that fails does not leave the group: destroying it waits for the others, who may wait for this rank, and
    then nobody would learn why.
    """
    runtime = start(timeout_minutes=timeout_minutes, device=device)
    failed = True
    try:
        with naming_lost_ranks(runtime.timeout):
            yield runtime
        failed = False
    finally:
        if dist.is_initialized() and not (failed and runtime.world_size > 1):
            dist.destroy_process_group()


def start(*, timeout_minutes: float = 10.0, device: str | None = None) -> Runtime:
    """Join the process group, set this rank's device and start logging."""
    _end_with_launcher()
    raise_file_limit()
    rank, world_size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    local_rank = _from_environment("LOCAL_RANK", 0)
    where = _device(device, local_rank)
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE={world_size} in the environment, but no MASTER_ADDR; launch with torchrun")
    if where.type == "cuda":
        prepare_allocator(os.environ)
        torch.cuda.set_device(where)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        # Object collectives and checkpoint plans are host tensors: they need gloo beside nccl.
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        options: dict[str, Any] = {"device_id": where} if where.type == "cuda" else {}
        if "MASTER_ADDR" not in os.environ:  # no torchrun: a group of one needs no rendezvous
            options |= {"store": HashStore(), "rank": 0, "world_size": 1}
        elif (restarts := launch().restarts) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torch 2.13 leaves the addresses of the failed attempt in this store, and ranks would try to reach them;
            # any other store is new in each attempt, and hosts that came later have counted fewer of these
            shared, _, _ = next(rendezvous("env://", timeout=timeout))
            options |= {"store": PrefixStore(f"restart{restarts}", shared), "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, timeout=timeout, **options)
    log_to_terminal(rank)
    quiet_libraries()
    return Runtime(rank, world_size, local_rank, where, timeout)


def raise_file_limit() -> None:
    """Open as many files as the system allows: sockets to each rank of each group, shards and segments add up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when torchrun dies: without it, ranks would train on and nobody would know of them.

    Only under torchrun: a process that was started from a shell outlives it, as with nohup.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before this call
        os.kill(os.getpid(), signal.SIGTERM)


def main_tells(seconds: float) -> bool:
    """Return whether rank 0 tells an error too, which other ranks with the same one then need not repeat.

    Rank 0 leaves a mark in torchrun's store, which outlives it; the others wait so long for the mark, and no longer
    for a store that does not answer, as when the network is down.
    """
    if "MASTER_ADDR" not in os.environ:
        return False
    limit = datetime.timedelta(seconds=seconds)
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection((address, port), seconds):  # `TCPStore` would log a page for each attempt
            pass
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
        mark = f"transpixeler/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if os.environ.get("RANK", "0") == "0":
            store.set(mark, "")
            return False
        deadline = time.monotonic() + seconds
        while not (told := store.check([mark])) and time.monotonic() < deadline:
            time.sleep(0.1)  # `store.wait` would log a warning when it ends
        return told
    except (OSError, RuntimeError, ValueError, KeyError):  # there is no such store
        return False


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


# --- logging ---------------------------------------------------------------------------------------------------------


class _RankFilter(logging.Filter):
    """Let rank 0 log everything and other ranks only warnings and errors, with their rank in front."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        record.speaker = (f"[rank {self.rank}] " if self.rank else "") + level
        return self.rank == 0 or record.levelno >= logging.WARNING


class _Terminal(logging.Handler):
    """Write log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(printable(near(self.format(record))), file=sys.stderr)


def quiet_libraries() -> None:
    """Silence what torch, torchao, diffusers and transformers say of themselves: nothing that a user can act on."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # FSDP makes views of what passes a block unchanged, and then warns of them; nothing here writes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def log_to_terminal(rank: int) -> None:
    """Log to stderr, in place of an earlier call's handler."""
    for handler in list(logger.handlers):
        if isinstance(handler, _Terminal):
            logger.removeHandler(handler)
    _add(_Terminal(), rank, "%(speaker)s%(message)s")


def log_to_file(path: Path, rank: int) -> logging.Handler:
    """Log to RUN/log.txt too; the caller removes the handler when the run ends."""
    return _add(logging.FileHandler(path, encoding="utf-8"), rank, "%(asctime)s %(speaker)s%(message)s")


def _add(handler: logging.Handler, rank: int, form: str) -> logging.Handler:
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(logging.Formatter(form))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return handler


# --- garbage ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def steady_garbage(every: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage on the same steps on all ranks; whenever one rank collects alone, all others wait for it."""

    def tick(step: int) -> None:
        if step % every == 0:
            gc.collect(1)

    gc.collect()
    gc.freeze()  # what the start has made stays: no later collection looks through it
    gc.disable()
    try:
        yield tick
    finally:
        gc.enable()
        gc.unfreeze()


def run_stamp() -> str:
    """Return a new run's name, which sorts by time; a random end tells two runs of one second apart."""
    now = datetime.datetime.now()
    return f"{now:%Y%m%d-%H%M%S}-{random.SystemRandom().randrange(16**4):04x}"
