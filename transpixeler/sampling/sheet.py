"""Show all samples of a call on one picture: their folders go in, a grid of their middle frames comes out."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transpixeler.config.sections import UserError
from transpixeler.files import read_json, whole
from transpixeler.sampling.files import FACTS, GRID_GAP, STILL, picked_frames

if TYPE_CHECKING:
    from PIL import Image

SHEET = "sheet.png"
CELL = 256  # pixels, the longer side of a picture
WIDEST = 16_384  # pixels of a sheet; more columns than fit have smaller pictures
LABEL = 16  # pixels of a name's height


def write_sheet(folder: Path, samples: Sequence[Path], *, columns: int = 0) -> Path | None:
    """Write FOLDER/sheet.png of samples in their order; returns None where there are not two to compare.

    columns: pictures a row; 0 for about as many as rows.
    """
    pictures = [(path.name, found) for path in samples if (found := _picture(path)) is not None]
    if len(pictures) < 2:
        return None
    from PIL import Image

    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    side = max(16, min(CELL, WIDEST // columns - GRID_GAP))
    for _, picture in pictures:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    wide, tall = (max(picture.size[axis] for _, picture in pictures) + GRID_GAP for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * wide + GRID_GAP, rows * (tall + LABEL) + GRID_GAP), "white")
    for number, (name, picture) in enumerate(pictures):
        x, y = GRID_GAP + number % columns * wide, GRID_GAP + number // columns * (tall + LABEL)
        sheet.paste(_label(name, wide - GRID_GAP), (x, y))
        sheet.paste(picture, (x, y + LABEL))
    with whole(folder / SHEET) as unfinished:
        sheet.save(unfinished, format="PNG")
    return folder / SHEET


def _picture(sample: Path) -> Image.Image | None:
    """Return a sample's middle frame, over a checkerboard where it has alpha; None where the sample is not here."""
    from PIL import Image

    if not (sample / FACTS).is_file():  # on another machine's disk
        return None
    facts = read_json(sample / FACTS)
    try:
        width, height, frames = (int(facts[key]) for key in ("width", "height", "frames"))
        with Image.open(sample / STILL) as still:
            middle = len(picked_frames(frames)) // 2 * (width + GRID_GAP)
            return still.convert("RGB").crop((middle, still.height - height, middle + width, still.height))
    except (KeyError, TypeError, ValueError, OSError) as fault:
        raise UserError(f"{sample}: damaged, its {STILL} cannot be read: {fault}; remove the folder") from None


def _plain(name: str) -> str:
    """Return a name in the letters that Pillow's own font has: those of ASCII."""
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return "".join(c if c.isascii() and c.isprintable() else "." for c in letters)


def _label(name: str, width: int) -> Image.Image:
    """Draw a sample's name; what is too long ends at the picture's edge, and letters that the font lacks are dots."""
    from PIL import Image, ImageDraw, ImageFont

    label = Image.new("RGB", (max(width, 1), LABEL), "white")
    ImageDraw.Draw(label).text((0, 1), _plain(name), fill="black", font=ImageFont.load_default(size=LABEL * 0.7))
    return label
