"""Texts that may hold anything go in; Markdown that shows them as they are comes out."""

from __future__ import annotations

import re
import unicodedata

# Words, numbers and marks that mean nothing to Markdown wherever they stand in a line; all else is shown as code.
_HARMLESS = re.compile(r"[^\W_](?:[^\W_]|[ ,.;()%'’/+=–…↑↓-]|(?<=[^\W_])_(?=[^\W_]))*")
_LIST_OR_LINK = re.compile(r"\d+[.)]|www\.", re.IGNORECASE)
_CONTROL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of what is no visible character


def inline(text: str) -> str:
    """Return a text that may hold anything as words in a line of Markdown: as it is, or as code where it could act."""
    one = line(text)
    return one if _HARMLESS.fullmatch(one) and not _LIST_OR_LINK.search(one) else code(one)


def cell(text: str) -> str:
    """Return a text as the cell of a table, where a bar ends the cell even within code."""
    one = line(text)
    return (one if _HARMLESS.fullmatch(one) and "www." not in one.lower() else code(one)).replace("|", "\\|")


def code(text: str) -> str:
    """Return a text as a code span, which no mark in it can end."""
    one = line(text)
    if not one:
        return ""
    fence = "`" * (1 + max(map(len, re.findall(r"`+", one)), default=0))
    space = " " if one[0] == "`" or one[-1] == "`" else ""
    return f"{fence}{space}{one}{space}{fence}"


def line(text: str) -> str:
    """Return a text in one line, with a mark in the place of each invisible character."""
    visible = "".join("\ufffd" if unicodedata.category(c) in _CONTROL and not c.isspace() else c for c in text)
    return " ".join(visible.split())
