"""README and the guides go in as Markdown; their blocks, commands, tables, links and headings come out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "transpixeler" / "docs"
INDEX = DOCS / "README.md"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))

_BLOCK = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """One shell line of a page, as a shell would split it."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {shlex.join(self.words)}"


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of these languages; of any, where none is given."""
    return [body for language, body in _BLOCK.findall(text(page)) if not languages or language in languages]


def languages(page: Path) -> set[str]:
    return {language for language, _ in _BLOCK.findall(text(page))}


def prose(page: Path) -> str:
    return _BLOCK.sub("", text(page))


def scripts(page: Path) -> list[str]:
    return [block for block in blocks(page, "bash") if block.startswith("#!")]


def commands(page: Path) -> Iterator[Command]:
    """Yield every line of the page's shell blocks, and every inline `make …` and `python tools/…`."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield Command(page, tuple(words))
    for code in inline(page):
        if re.match(r"make [a-z]|python tools/[a-z_]+\.py ", code):
            yield Command(page, tuple(shlex.split(code)))


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def rows(page: Path, header: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with these words."""
    content = text(page)
    table = content[content.index(f"| {header}") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def links(page: Path) -> list[tuple[str, str]]:
    """Return (target, anchor) of every link and picture of a page; addresses on the web are left out."""
    found = re.findall(r"\]\(([^)\s]*)\)", text(page))
    return [(target, anchor) for target, _, anchor in (link.partition("#") for link in found) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
