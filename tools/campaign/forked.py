"""Start commands of transpixeler in a fraction of a second: forked from a server that has imported everything already.

In: a command's words, the number of its ranks, and the hosts of `namespaces` that they run on, if any. Out: processes
that can be killed like any other; what they say goes into a file each. A start with its imports takes seconds, and most
of a campaign of kills would be that.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from namespaces import ADDRESSES, CABLE, Host

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["preloaded"])


@dataclass(frozen=True)
class Command:
    """The processes of one command, one for each rank."""

    processes: list[ForkServerProcess]
    said: Path  # a file for each rank: `said.0`

    def kill(self, *ranks: int) -> None:
        """Kill some ranks with SIGKILL, or all of them."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    def ended(self, seconds: float = 0.0) -> bool:
        """Return whether all ranks have ended, after waiting for them at most so long each."""
        for process in self.processes:
            process.join(seconds)
        return not any(process.is_alive() for process in self.processes)

    def codes(self) -> list[int | None]:
        """Return the exit codes; that of a killed rank is negative."""
        return [process.exitcode for process in self.processes]

    def lines(self, rank: int = 0) -> list[str]:
        """Return what a rank has said."""
        file = self.said.with_name(f"{self.said.name}.{rank}")
        return file.read_text(errors="replace").splitlines() if file.exists() else []


@contextmanager
def running(said: Path, *words: object, ranks: int = 1, hosts: Sequence[Host] = ()) -> Iterator[Command]:
    """Start a command of transpixeler, and kill what is left of it at the end. hosts: one for each rank."""
    said.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(word) for word in words]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if hosts:
        shared |= {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": CABLE}
    processes = []
    for rank in range(ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": "0" if hosts else str(rank)}
        host = hosts[rank].holder.pid if hosts else 0
        arguments_of_rank = (arguments, own if ranks > 1 else {}, f"{said}.{rank}", host)
        processes.append(_server.Process(target=_run, args=arguments_of_rank))
    command = Command(processes, said)
    for process in processes:
        process.start()
    try:
        yield command
    finally:
        command.kill()
        command.ended(60)


def finished(said: Path, *words: object, ranks: int = 1, seconds: float = 900.0) -> str:
    """Run a command to its end and return what it said; raise if it failed."""
    with running(said, *words, ranks=ranks) as command:
        whole = command.ended(seconds)
        text = "\n".join(line for rank in range(ranks) for line in command.lines(rank))
        if not whole or any(command.codes()):
            raise RuntimeError(f"{' '.join(map(str, words))} ended with {command.codes()}:\n{text[-3000:]}")
    return text


def _run(words: Sequence[str], environment: dict[str, str], said: str, host: int) -> None:
    """Be the command: its host, its environment, its output, its exit code. host: a process there, or 0."""
    from transpixeler import cli

    file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if host:
        _enter(host)
    os.environ |= environment
    raise SystemExit(cli.main(words))


def _enter(host: int) -> None:
    """Move this process to the network and the name of a host; files are the same on all."""
    for kind in ("net", "uts"):
        namespace = os.open(f"/proc/{host}/ns/{kind}", os.O_RDONLY)
        assert not ctypes.CDLL(None).setns(namespace, 0)
        os.close(namespace)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
