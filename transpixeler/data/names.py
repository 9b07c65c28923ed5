"""Names of files and samples: spelled for comparing, and escaped for showing on a terminal."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"  # format characters that Persian, Indic scripts and emoji are spelled with


def printable(text: str) -> str:
    """Escape control and format characters, which a terminal would obey, and bytes that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(letter if _harmless(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _harmless(letter: str) -> bool:
    return letter.isprintable() or letter in JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")


def is_utf8(text: str) -> bool:
    """Tell whether a text can be written as UTF-8; names of files and escapes in JSON may not."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def normal(name: str) -> str:
    """Return one spelling of a name: some file systems store accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
