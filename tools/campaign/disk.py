"""Fill the disk, or make it read-only, under training, caching and sampling, and go on once there is room.

The disk is a file system in memory of this program's own, in mounts that nobody else sees. Whatever is hit must end
with exit code 1 (2 where it could not even begin) and one line. Training's checkpoints must all be whole then; once
there is room, `--resume` must come to the same adapter, bit for bit, as a training that nothing hit, every record of
the cache must be whole, and a sample must have the same bytes as one that nothing hit. A round does each of them once.
It needs root and `mount`, `nsenter` and `unshare`; without them it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from campaign import QUIET, SMALL, Figures, main, write_demo
from forked import Command, finished, running
from namespaces import lacking

from transpixeler.runs import checkpoint

STEPS = 12
SECONDS = 600.0  # that a command may take, on a machine that others use too
ROOM = 64 << 20  # bytes of the disk when there is room
TRAIN = (*QUIET, *SMALL, f"train.max_steps={STEPS}", "checkpoint.every_steps=2", "run_name=run")
SAMPLE = ("--prompt", "a red circle", "--steps", "1", "--size", "64x64x9", "--format", "png")
OWN_MOUNTS = "CAMPAIGN_OWN_MOUNTS"  # in the environment, when this program runs in mounts of its own


@dataclass(frozen=True)
class Disk:
    """A small file system in memory."""

    folder: Path

    @property
    def _filler(self) -> Path:
        return self.folder / "filler"

    def resize(self, size: int) -> None:
        """Change the room, also below what is used."""
        _mount("-o", f"remount,size={size}", self.folder)

    def fill(self, *, left: int = 0) -> None:
        """Use all room but some bytes."""
        with self._filler.open("wb") as file:
            while True:
                free = os.statvfs(self.folder)
                try:
                    return os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))
                except OSError as fault:  # whoever else writes was quicker
                    if fault.errno != errno.ENOSPC or not free.f_bavail:
                        raise

    def make_read_only(self) -> None:
        """Refuse to open files for writing; what is open already stays so, as after an error of a real disk."""
        _mount("--bind", self.folder, self.folder)
        _mount("-o", "remount,bind,ro", self.folder)

    def mend(self) -> None:
        """Let it be written again, with room."""
        if os.statvfs(self.folder).f_flag & os.ST_RDONLY:
            subprocess.run(["umount", str(self.folder)], check=True)
        self._filler.unlink(missing_ok=True)
        self.resize(ROOM)


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """Lend a disk that is mounted on a new folder."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={ROOM}", "campaign", folder)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return how the commands ended."""
    draw = random.Random(arguments.seed)
    config, said = write_demo(folder / "demo"), folder / "said"
    finished(said, "cache", config, *SMALL)
    finished(said, "train", config, *TRAIN, f"output_dir={folder / 'whole'}")
    finished(said, "sample", folder / "whole" / "run", *SAMPLE, "--out", folder / "whole" / "samples")
    figures: Figures = {"hit": 0, "unharmed": 0, "codes": {}, "whole_checkpoints": 0, "bitwise": 0, "wrong": 0}
    hits: dict[str, Callable[[Disk], None]] = {"full": Disk.fill, "read-only": Disk.make_read_only}
    for number in range(arguments.rounds):
        for kind, hit in hits.items():
            for what, work in {"train": train, "cache": cache, "sample": sample}.items():
                with disk(folder / f"{what} {kind} {number}") as place:
                    work(config, folder, place, Hit(f"{what}, {kind}", hit, draw, figures))
    return figures


@dataclass(frozen=True)
class Hit:
    """A way to spoil a disk, and the name under which its outcome is counted."""

    name: str
    strike: Callable[[Disk], None]
    draw: random.Random
    figures: Figures

    def outcome(self, command: Command) -> int:
        """Wait for a command, count its exit code and whether it said why, and return the code."""
        self.expect(command.ended(SECONDS), "it ends", command)
        code = command.codes()[0]
        assert code is not None
        told = [line for line in command.lines() if line.startswith("transpixeler: ")]
        traced = any(line.startswith("Traceback") for line in command.lines())
        self.expect(code in (0, 1, 2) and len(told) == bool(code) and not traced, "it says why in one line", command)
        self.figures["codes"][f"{self.name}: {code}"] = self.figures["codes"].get(f"{self.name}: {code}", 0) + 1
        self.figures["hit" if code else "unharmed"] += 1
        return code

    def expect(self, true: bool, what: str, command: Command | None = None) -> None:
        """Count what did not come true, and print it."""
        if not true:
            self.figures["wrong"] += 1
            said = "\n".join(command.lines()[-30:]) if command else ""
            print(f"{self.name}: not so: {what}\n{said}", file=sys.stderr, flush=True)

    def compare(self, one: bytes, other: bytes, what: str) -> None:
        """Count whether two files are the same."""
        self.figures["bitwise"] += one == other
        self.expect(one == other, f"{what} is the same")


def train(config: Path, folder: Path, place: Disk, hit: Hit) -> None:
    """Hit the disk that a training writes to, at a random step; mend it, go on and compare."""
    words = ["train", config, *TRAIN, f"output_dir={place.folder}"]
    run, step = place.folder / "run", hit.draw.randint(3, STEPS - 1)
    with running(folder / "said", *words) as command:
        _wait(command, lambda: _lines(run / "metrics.jsonl") >= step)
        time.sleep(hit.draw.uniform(0, 0.05))
        hit.strike(place)
        hit.expect(hit.outcome(command) == 1, "exit code 1", command)
    for found in checkpoint.candidates(run / "checkpoints"):
        checkpoint.check(found)
        hit.figures["whole_checkpoints"] += 1
    place.mend()
    finished(folder / "said", *words, "--resume")
    adapter = f"run/step{STEPS}/adapter_model.safetensors"
    hit.compare((folder / "whole" / adapter).read_bytes(), (place.folder / adapter).read_bytes(), "the adapter")


def cache(config: Path, folder: Path, place: Disk, hit: Hit) -> None:
    """Hit the disk of a cache after some of its bytes; mend it, go on and read every record."""
    words = ["cache", config, *SMALL, f"data.cache_dir={place.folder / 'cache'}"]
    with running(folder / "said", *words) as command:
        size = hit.draw.randrange(1, 100_000)
        if hit.strike is Disk.fill:
            place.fill(left=size)
        else:
            _wait(command, lambda: _bytes(place.folder / "cache") >= size)
            hit.strike(place)
        code = hit.outcome(command)
        hit.expect(code == 1 or hit.strike is not Disk.fill, "exit code 1", command)
    place.mend()
    finished(folder / "said", *words)
    told = finished(folder / "said", *words, "--verify")
    hit.expect("every record is whole" in told, f"every record is whole: {told[-500:]}")


def sample(config: Path, folder: Path, place: Disk, hit: Hit) -> None:
    """Sample to a disk that is hit before there is a video; mend it, sample again and compare."""
    words = ["sample", folder / "whole" / "run", *SAMPLE, "--out", place.folder / "samples"]
    hit.strike(place)
    with running(folder / "said", *words) as command:
        hit.expect(hit.outcome(command) > 0, "it is refused", command)
    place.mend()
    finished(folder / "said", *words)
    for file in sorted((folder / "whole" / "samples").rglob("*.png")):
        other = place.folder / "samples" / file.relative_to(folder / "whole" / "samples")
        hit.expect(other.read_bytes() == file.read_bytes(), f"{file.name} is the same")


def _wait(command: Command, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached() and not command.ended() and time.monotonic() < deadline:
        time.sleep(0.002)


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*")) if folder.is_dir() else 0


if __name__ == "__main__":
    if OWN_MOUNTS not in os.environ and not lacking():
        os.environ[OWN_MOUNTS] = "yes"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    raise SystemExit(main("disk", __doc__, campaign, rounds=3, lacking=lacking))
