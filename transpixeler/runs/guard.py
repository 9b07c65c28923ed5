"""Notice that a run's folder is lost: a network disk that is unmounted leaves an empty folder under the same name.

In: the folder as it was at the start. Out: a reason to stop, before anything is written into another folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FolderGuard:
    """Knows a folder by its device and inode, not by its name."""

    folder: Path
    identity: tuple[int, int]

    def fault(self) -> str:
        """Return why the folder can no longer be written to, or ""."""
        try:
            now = _identity(self.folder)
        except OSError as error:
            return f"{self.folder} is gone ({error.strerror}): was a disk unmounted or the folder moved?"
        if now != self.identity:
            return f"{self.folder} is another folder than at the start: was a disk unmounted or the folder moved?"
        return ""


def guard(folder: Path) -> FolderGuard:
    """Remember a folder as it is now."""
    return FolderGuard(folder, _identity(folder))


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
