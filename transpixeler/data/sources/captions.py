"""Read captions: a text file or a manifest's cell in; clean text, or the reason why it is none, out."""

from __future__ import annotations

from pathlib import Path

from transpixeler.data.media.errors import BadMedia
from transpixeler.data.sources.candidate import printable


def caption_text(path: Path) -> str:
    """Return what a caption file says, as it stands there."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadMedia(f"its caption {path.name} is not UTF-8") from None
    except OSError as error:
        raise BadMedia(f"its caption {path.name} cannot be read: {error.strerror}") from error


def caption_of(caption: Path | str) -> str:
    """Return the caption that a file or a manifest gives, without the blanks around it."""
    text = caption_text(caption) if isinstance(caption, Path) else caption
    if not text.strip():
        raise BadMedia("its caption is empty")
    if printable(text) != text:  # half a pair of surrogates, which JSON can hold
        raise BadMedia("its caption is not UTF-8")
    return text.strip()
