"""A path in, a file or folder under it that nobody, on this machine or another, ever sees half-written."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under.

    When all went well it takes the name from what had it; when not, it is removed. `synced`: a file is on the disk
    before that, so that it outlives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = uuid.uuid4().hex[:12]
    unfinished, old, plain = (path.with_name(f".{path.name}.{own}.{end}") for end in ("tmp", "old", "new"))
    try:
        yield unfinished
        _admit(unfinished, plain)
        if synced:
            sync(unfinished)
        if unfinished.is_dir() and path.is_dir():
            path.replace(old)
        unfinished.replace(path)
    finally:
        for left in (unfinished, old, plain):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _admit(made: Path, plain: Path) -> None:
    """Safetensors leaves its files to their owner alone; they get the mode of any new file here, such as `plain`."""
    closed = [file for file in (made, *made.rglob("*")) if file.lstat().st_mode == stat.S_IFREG | 0o600]
    if closed:
        plain.touch()
        for file in closed:
            file.chmod(stat.S_IMODE(plain.stat().st_mode))


def write_text(path: Path, text: str) -> None:
    """A file that says it already is not touched. Names that are no UTF-8 stand as their bytes."""
    content = text.encode("utf-8", errors="surrogateescape")
    if path.is_file() and path.read_bytes() == content:
        return
    with whole(path, synced=True) as unfinished:
        unfinished.write_bytes(content)


def sync(path: Path) -> None:
    """A file's bytes, or what was renamed or made in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
