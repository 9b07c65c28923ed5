"""Runs a function on several ranks in well under a second: forked from a server that has torch loaded already.

`fn` is a module-level function `fn(rank, world_size, *args)`; what the ranks return comes back in rank order.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_server = mp.get_context("forkserver")
_server.set_forkserver_preload(["tests.support.preload"])
LIMIT_SECONDS = 600.0  # for ranks that hang, on a machine that does much else besides
GRACE_SECONDS = 5.0  # what the others get to report once a rank has failed


class RanksFailed(AssertionError):
    """Carries every failed rank's own traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = LIMIT_SECONDS, grace: float = 0.5
) -> list[Any]:
    """`grace`: seconds that a rank has to leave by itself before it is killed."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = str(Path(folder) / "store")
        pipes, workers = [], []
        for rank in range(world_size):
            receiving, sending = _server.Pipe(duplex=False)
            payload = pickle.dumps((fn, args))
            worker = _server.Process(target=_work, args=(rank, world_size, store, sending, payload), daemon=False)
            worker.start()
            sending.close()
            pipes.append(receiving)
            workers.append(worker)
        try:
            return _collect(pipes, timeout)
        finally:
            for worker in workers:
                worker.join(grace)
                if worker.is_alive():
                    worker.kill()
                    worker.join()


def fork(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a module-level function in a process that is forked from the server, with one thread and no group."""
    worker = _server.Process(target=target, args=args, daemon=False)
    worker.start()
    return worker


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    faults: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(faults) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in faults}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            faults |= dict.fromkeys(waiting.values(), f"no answer (the limit was {timeout:.0f} s)")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                good, value = False, "the process died without a word"
            (results if good else faults)[rank] = value
        if faults:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if faults:
        raise RanksFailed("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(faults.items())))
    return [results[rank] for rank in range(len(pipes))]


def _work(rank: int, world_size: int, store: str, sending: Connection, payload: bytes) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        dist.barrier()  # all are connected, so that one which fails at once leaves no other half-way there
        fn, args = pickle.loads(payload)
        value = fn(rank, world_size, *args)
        sending.send_bytes(pickle.dumps((True, value)))
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        sending.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise SystemExit(1) from None
