"""Find the licence of a base: what its own folder says, else the one that its family is published under."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from transpixeler.models.family import Family, License
from transpixeler.publishing.received import NoAliases

CARD = "README.md"
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_NAME = re.compile(r"\w[\w .-]{0,80}")
_WEB = re.compile(r"https://[\w./%~-]{1,200}")
_LONGEST = 1 << 20  # bytes of a card that is looked at


def license_of(path: str, base: str, family: Family) -> License:
    """Return the licence of the model at a path, or of its Hub id where it is not on this machine."""
    folder = Path(path)
    own = _said(folder, base) or _named(folder) if path and folder.is_dir() else None
    return own or family.licenses.get(base) or family.license


def _said(folder: Path, base: str) -> License | None:
    """Return what the head of the folder's card says; None where there is none that can be read."""
    card = folder / CARD
    if not card.is_file() or card.stat().st_size > _LONGEST:
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        head = yaml.load(parts[1], Loader=NoAliases)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(head, dict):
        return None
    said = {key: str(head.get(key) or "") for key in ("license", "license_name", "license_link")}
    if not _ID.fullmatch(said["license"]):
        return None
    name = said["license_name"] if _NAME.fullmatch(said["license_name"]) else ""
    return License(said["license"], name, _link(said["license_link"], base))


def _link(link: str, base: str) -> str:
    """Return an address on the web; that of a file beside the card is in the base's repository."""
    if _WEB.fullmatch(link):
        return link
    return f"https://huggingface.co/{base}/blob/main/{link}" if base and re.fullmatch(r"[\w.-]+", link) else ""


def _named(folder: Path) -> License | None:
    """Return the licence whose text lies in the folder: by its id where it is known, else by its first line."""
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    with file.open("rb") as text:
        lines = [line.strip() for line in text.read(4096).decode("utf-8", "replace").splitlines() if line.strip()]
    first = re.sub(r"[^\w .-]", "", lines[0])[:80].strip() if lines else ""
    if first.lower().startswith("apache license"):
        return License("apache-2.0")
    return License({"mit license": "mit"}.get(first.lower(), "other"), "" if first.lower() == "mit license" else first)
