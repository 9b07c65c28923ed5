"""Make one HTML file of styles, scripts, a body and a value: it needs no network and no file but its videos.

All pages are built here, from the files in assets/. Scripts draw from the value, which is JSON, so that no text in it
can become a part of the page.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "page.html"
EMBEDDED_FILE, EMBEDDED_ALL = 1 << 20, 12 << 20  # most bytes of one video and of all that a page embeds
DRAWN_BODY = (
    '<nav aria-label="Parts of this page"><div id="nav"></div></nav>\n'
    '<main id="main"><noscript>This page draws itself with JavaScript, which is switched off here.</noscript></main>'
)


def build(title: str, *, styles: Sequence[str], scripts: Sequence[str], value: Any, body: str = DRAWN_BODY) -> str:
    """Return a page. body: HTML, in which all texts from outside are escaped already."""
    parts = {
        "title": html.escape(title),
        "styles": "".join(map(_asset, ("page.css", *styles))),
        "body": body,
        "value": as_json(value),
        "scripts": "".join(map(_asset, ("page.js", *scripts))),
    }
    return re.sub(
        r"<!-- (\w+) -->", lambda found: parts[found[1]], _asset(TEMPLATE)
    )  # what is filled in is not looked at


def as_json(value: Any) -> str:
    """Return JSON that nothing in it can end the script of; NaN and infinity, which it has not, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def address(path: Path, page: Path) -> str:
    """Return the address of a file as a page names it: relative, with every odd character quoted."""
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


class Embedding:
    """Small videos go into the page, until it holds enough; the others are named by their address."""

    def __init__(self, page: Path) -> None:
        self.page, self.left = page, EMBEDDED_ALL

    def source(self, path: Path) -> str:
        """Return what the page plays a file from."""
        size = path.stat().st_size
        if size > min(self.left, EMBEDDED_FILE):
            return address(path, self.page)
        self.left -= size
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
