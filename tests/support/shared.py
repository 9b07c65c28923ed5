"""Share an expensive folder among the processes of a test session: the first that asks makes it, the others wait."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Listing = dict[str, tuple[int, int]]  # path → size, time of the last change


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of the whole session, which pytest-xdist's workers have in common."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def made_once(folder: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Lend `folder`, which `make(folder)` fills once; whoever returns it changed has written where others read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that failed while it made this
            make(folder)
            done.touch()
    before = listing(folder)
    yield folder
    changed = sorted(dict(before.items() ^ listing(folder).items()))
    assert not changed, f"a test wrote into {folder}, which other tests read: {changed[:5]}"


def settle(folder: Path) -> None:
    """Date all files back by an hour, or the first reader would note in the cache that they have settled."""
    hour_ago = time.time() - 3600
    for file in folder.rglob("*"):
        os.utime(file, (hour_ago, hour_ago), follow_symlinks=False)


def listing(folder: Path) -> Listing:
    """Return every file below a folder with what changes when somebody writes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
