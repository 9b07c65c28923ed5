"""Shared by the programs in tools/: run one with one-line errors, and print what it did and what it left out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transpixeler.config.sections import UserError
from transpixeler.data.names import printable

REASONS_SHOWN = 10


def run(tool: str, work: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a tool and return its exit code: 0 done, 2 the user's input is wrong, 130 stopped."""
    try:
        work(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{tool}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def torchrun(processes: int) -> list[str]:
    """Return the arguments of `python` that launch a program on several processes."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def processes() -> int:
    """Return one process for each GPU; without GPUs two, enough for a tiny model."""
    import torch

    return torch.cuda.device_count() or 2


def folder_given(path: Path, what: str) -> Path:
    """Return the folder, or raise an error that says what was expected there."""
    if not path.is_dir():
        raise UserError(f"{path}: {'is not a folder' if path.exists() else 'does not exist'}; give {what}")
    return path


def check_counts(**options: int | None) -> None:
    """Raise an error that names the option of a count that is given and counts nothing."""
    for name, count in options.items():
        if count is not None and count < 1:
            raise UserError(f"--{name} must be at least 1, and is {count}")


def figures_table(
    corner: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[float | None]]], *, widths: tuple[int, int]
) -> str:
    """Lay out figures for a terminal, None for what is not there. widths: of a title, and of a figure."""
    title, width = widths
    lines = ["", f"{corner:{title}} {' '.join(f'{head:>{width}}' for head in heads)}"]
    for name, values in rows:
        cells = [f"{'–':>{width}}" if value is None else f"{value:{width}.3f}" for value in values]
        lines.append(f"{name:{title}} {' '.join(cells)}")
    return "\n".join([*lines, ""])


def summary(done: str, left_out: Sequence[tuple[str, str]]) -> None:
    """Print what was done, and what was left out with its reason."""
    print(done)
    if left_out:
        print(f"{len(left_out)} left out:")
    for name, reason in left_out[:REASONS_SHOWN]:
        print(f"  {printable(name)}: {printable(reason)}")
    if len(left_out) > REASONS_SHOWN:
        print(f"  … and {len(left_out) - REASONS_SHOWN} more")
