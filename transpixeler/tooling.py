"""What the programs in tools/ share: a fault becomes one line, a file appears under its name only when it is whole."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transpixeler.config import UserError

REASONS_SHOWN = 10


def run(tool: str, work: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 the user's input is wrong, 130 stopped."""
    try:
        work(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{tool}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under, renamed when all went well and removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Nothing is written where the file already says it."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def torchrun(processes: int) -> list[str]:
    """What comes before a module or a program, after `python`."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def processes() -> int:
    """One a GPU; without, two, for whom a tiny model's step is short enough."""
    import torch

    return torch.cuda.device_count() or 2


def folder_given(path: Path, what: str) -> Path:
    """The folder itself, or a line that says what was expected there."""
    if not path.is_dir():
        raise UserError(f"{path}: {'is not a folder' if path.exists() else 'does not exist'}; give {what}")
    return path


def summary(done: str, left_out: Sequence[tuple[str, str]]) -> None:
    """What was done, and what was left out with its reason."""
    print(done)
    if left_out:
        print(f"{len(left_out)} left out:")
    for name, reason in left_out[:REASONS_SHOWN]:
        print(f"  {name}: {reason}")
    if len(left_out) > REASONS_SHOWN:
        print(f"  … and {len(left_out) - REASONS_SHOWN} more")
