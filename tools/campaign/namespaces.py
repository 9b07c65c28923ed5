"""Make two hosts of this one machine: Linux namespaces with a name, mounts and a network of their own, and one cable.

Out: two `Host`s, each with the words that run a command there. The machine's own network, names and mounts stay as they
are: what is mounted on a host or taken down there is seen on that host alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CABLE = "cable"  # the name of the network device on both hosts
NAMES = ("first", "second")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TOOLS = ("ip", "mount", "nsenter", "unshare")  # of iproute2 and util-linux


@dataclass(frozen=True)
class Host:
    """One host: its name, and a process that keeps its namespaces."""

    name: str
    holder: subprocess.Popen[bytes]

    def words(self, *words: object) -> list[str]:
        """Return the words that run a command on this host."""
        kinds = ("--net", "--uts", "--mount")
        return ["nsenter", "--target", str(self.holder.pid), *kinds, "--", *map(str, words)]

    def run(self, *words: object) -> None:
        """Run a command on this host to its end; raise if it failed."""
        subprocess.run(self.words(*words), check=True, capture_output=True)

    def show(self, other: Path, *, at: Path) -> None:
        """Let this host alone see another file or folder in a place."""
        self.run("mount", "--bind", other, at)

    def plug(self, state: str) -> None:
        """Set this end of the cable `up` or `down`."""
        self.run("ip", "link", "set", CABLE, state)

    def processes(self) -> list[int]:
        """Return the processes that run on this host."""
        own = _network(self.holder.pid)
        running = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [process for process in running if own and _network(process) == own]

    def kill(self) -> None:
        """Kill everything that runs on this host, which stays itself."""
        for process in self.processes():
            if process != self.holder.pid:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def close(self) -> None:
        """Kill everything that still runs on this host, and end it."""
        self.kill()
        self.holder.kill()
        self.holder.communicate()


def lacking() -> str:
    """Return what this machine lacks for hosts and mounts of our own, or ""."""
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(absent)} (of iproute2 and util-linux) not installed"
    if os.geteuid():
        return "not root, who alone may make network and mount namespaces"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "ip", "link"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Lend two hosts that know each other's names and see the same files. folder: for the list of their names."""
    hosts = tuple(Host(name, _hold()) for name in NAMES)
    one, other = hosts
    try:
        one.run("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", other.holder.pid)
        known = folder / "hosts"
        lines = ("127.0.0.1 localhost", *map(" ".join, zip(ADDRESSES, NAMES, strict=True)))
        known.write_text("".join(f"{line}\n" for line in lines))
        for host, address in zip(hosts, ADDRESSES, strict=True):
            host.run("hostname", host.name)
            host.show(known, at=Path("/etc/hosts"))
            host.run("ip", "address", "add", f"{address}/24", "dev", CABLE)
            host.run("ip", "link", "set", "lo", "up")
            host.plug("up")
        yield one, other
    finally:
        for host in hosts:
            host.close()


def _hold() -> subprocess.Popen[bytes]:
    """Start a process in new namespaces; it ends when this one does, as its input then ends."""
    words = ["unshare", "--net", "--uts", "--mount", "cat"]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write(b"ready\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == b"ready\n"  # the namespaces are there
    return holder


def _network(process: int) -> str:
    """Return which network a process is in, or "" if it has ended."""
    try:
        return str(Path(f"/proc/{process}/ns/net").readlink())
    except OSError:
        return ""
