"""Write files and folders so that nobody, on this machine or another, ever sees them half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transpixeler.config.sections import Fault, UserError


@contextmanager
def whole(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there replaces `path`, or is removed on an error.

    synced: fsync the file before it gets its name, so that it survives a power cut.
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


def clear_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove what `whole` left of these names in a folder when it was killed; nobody else may be writing them."""
    for left in folder.glob(".*.*.*") if folder.is_dir() else ():
        found = re.fullmatch(r"\.(.+)\.[0-9a-f]{12}\.(tmp|old|new)", left.name, re.DOTALL)
        if found and found[1] in names:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _admit(made: Path, plain: Path) -> None:
    """Give safetensors' files, which only their owner may read, the mode that a new file such as `plain` gets."""
    closed = [file for file in (made, *made.rglob("*")) if file.lstat().st_mode == stat.S_IFREG | 0o600]
    if closed:
        plain.touch()
        for file in closed:
            file.chmod(stat.S_IMODE(plain.stat().st_mode))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole and synced, if it does not hold the text yet; file names in it need not be UTF-8."""
    content = text.encode("utf-8", errors="surrogateescape")
    if path.is_file() and path.read_bytes() == content:
        return
    with whole(path, synced=True) as unfinished:
        unfinished.write_bytes(content)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; name a file that is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, holds no JSON object")
    return content


def shown_path(path: str | Path) -> str:
    """Return a path as a user reads it best: relative to the working folder where that is shorter."""
    given = os.fspath(path)
    try:
        near = os.path.relpath(given)
    except (OSError, ValueError):  # the working folder is gone, or the path cannot be one
        return given
    return near if len(near) < len(given) else given


def near(text: str) -> str:
    """Return a text for a terminal with the paths below the working folder written from there."""
    try:
        here = str(Path.cwd())
    except OSError:  # it was removed
        return text
    return text if here == "/" else re.sub(rf"(?<![^\s'\"`(=,:]){re.escape(here)}/(?=[^\s/])", "", text)


def printable(text: str) -> str:
    """Return text for a terminal: control characters, which could act on it, and broken ones are shown as escapes."""
    acts = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if c not in "\n\t" and unicodedata.category(c) in acts else c for c in text
    )


# The place cannot be written at all; any other error is one that comes while writing, such as a full disk.
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG)


@contextmanager
def writing_to(place: Path, option: str) -> Iterator[None]:
    """Turn an error of writing below `place` into one line; `option` says where the user named the place."""
    from safetensors import SafetensorError  # of a full disk: its writer raises no OSError

    try:
        yield
    except SafetensorError as error:
        raise Fault(f"{option}: writing to {place} failed: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_PLACE:
            raise UserError(f"{option}: {place} cannot be written: {reason}; name another place") from error
        raise Fault(f"{option}: writing to {place} failed: {reason}") from error


def check_place(place: Path, option: str) -> None:
    """Refuse a folder that cannot be written, before there is work to lose."""
    with writing_to(place, option):
        there = next(part for part in (place, *place.absolute().parents) if part.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def refuse_file(place: Path, option: str) -> None:
    """Refuse a file where a folder is to be; `option` says where the user named it."""
    if place.is_file():
        raise UserError(f"{option}: {shown_path(place)} is a file; give a folder")


def sync(path: Path) -> None:
    """Fsync a file's bytes, or a folder's new and renamed entries, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
