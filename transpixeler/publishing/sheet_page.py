"""The folders of samples go in; one page comes out that plays them all, beside the sheet of pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.files import write_text, writing_to
from transpixeler.publishing import page, report, words
from transpixeler.publishing.page import Embedding
from transpixeler.publishing.received import SAMPLE_SHAPE, read_table
from transpixeler.sampling.files import FACTS

logger = logging.getLogger("transpixeler")

PAGE = "sheet.html"


def write_sheet_page(folder: Path, samples: Sequence[Path]) -> Path:
    """Write FOLDER/sheet.html of samples in their order, and return its path."""
    made = folder / PAGE
    shown = list(_samples(samples, Embedding(made)))
    text = page.build(
        folder.resolve().name,
        styles=report.STYLES,
        scripts=(*report.SCRIPTS, "sheet.js"),
        value={"name": folder.resolve().name, "samples": shown, "words": words.plain()},
    )
    with writing_to(made, "--out"):
        write_text(made, text)
    return made


def _samples(folders: Sequence[Path], embedding: Embedding) -> Iterator[dict[str, Any]]:
    """Yield what the page shows of each sample that is on this machine's disk."""
    for folder in folders:
        if not (folder / FACTS).is_file():
            continue
        try:
            facts = read_table(folder / FACTS, SAMPLE_SHAPE)
        except UserError as fault:
            logger.warning("%s; the sample is left out", fault)
            continue
        yield report.shown_sample(folder, facts, embedding)
