"""Lock a run's folder while it trains, so that no second training writes into it.

Two trainings in one folder would write the same partial checkpoint. The lock is the kernel's and ends with the process
that holds it, however that ends; the text in the file only says who that is.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from transpixeler.config.sections import UserError
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")

LOCK = ".lock"


class RunLock:
    """The lock of one run's folder; it ends with `release`, or with the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock; raise `UserError` that names the holder if another training has it."""
        self._file: IO[str] | None = (folder / LOCK).open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).strip() or "another process"
            self._file.close()
            raise UserError(
                f"{folder}: is being trained by {holder}; wait until that ends, or choose another run_name"
            ) from None
        except OSError as error:
            logger.warning(
                "%s: this file system has no locks (%s): make sure that no other training writes into this run",
                folder,
                error.strerror,
            )
        self._write(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        """Let others train this run. The file stays: removing it could free the lock that another has just taken."""
        if self._file is not None:
            self._write("")
            self._file.close()
            self._file = None

    def _write(self, text: str) -> None:
        assert self._file is not None, "the lock is released"
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


def is_trained(folder: Path) -> bool:
    """Tell whether a process on this machine trains a run now. Only a lock that names its holder is tried."""
    path = folder / LOCK
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            if not file.read(1):
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it may not be read, or the file system has no locks
        return False
    return False


def take_lock(folder: Path, runtime: Runtime) -> RunLock | None:
    """Lock a run on rank 0, which alone gets the lock; on failure raise the same error on every rank. Collective."""
    lock, fault = None, ""
    if runtime.is_main:
        try:
            lock = RunLock(folder)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{folder}: cannot be written to: {error.strerror}"
    fault = runtime.broadcast(fault)
    if fault:
        raise UserError(fault)
    return lock
