"""What is held of a row of a manifest is bounded, whatever a row says, so that a million fit where ten do."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from fractions import Fraction
from pathlib import Path

import pytest

from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data import columns, file_memory
from transpixeler.data.cache.records import Cache
from transpixeler.data.dataset import Dataset
from transpixeler.data.items import Items
from transpixeler.data.media.clip import Media
from transpixeler.data.media.probe import Probes, stamp_of
from transpixeler.data.sources import pairs, samples
from transpixeler.data.survey import survey
from transpixeler.models.geometry import Geometry

LONG_AGO = 10**18  # nanoseconds
FEW, MANY = 500, 2000
MOST_BYTES = 110  # of a row: 16 for its files among what is known, the rest while it becomes columns and is ordered
STREAMS, GEOMETRY = {"rgb": "", "seg": "_seg"}, Geometry((4, 8, 8), 16, (1, 2, 2))
DATA = DataConfig(resolutions=(480,), frames=(33, 81), upscale=True)


def write_set(folder: Path, rows: int) -> None:
    """Write a manifest of files that are remembered as videos, though they are empty."""
    probes, media = Probes(folder / "cache"), Media(81, 480, 832, Fraction(16), Fraction(81, 16), alpha=False)
    (folder / "files").mkdir(parents=True)
    with (folder / "set.jsonl").open("w") as out:
        for number in range(rows):
            row = {"rgb": f"files/{number:06}.mp4", "seg": f"files/{number:06}_seg.mp4"}
            for name in row.values():
                (folder / name).touch()
                os.utime(folder / name, ns=(LONG_AGO, LONG_AGO))
                probes.remember(folder / name, stamp_of(folder / name) or (0, 0), media)
            out.write(json.dumps(row | {"text": f"caption {number}" + " of many words" * 20}) + "\n")
    probes.save()


def peak(folder: Path) -> int:
    """Return the most bytes that are held while a set is looked through and put in order."""
    sources, how = (SourceConfig(str(folder / "set.jsonl")),), {"geometry": GEOMETRY, "seed": 0}
    gc.collect()
    tracemalloc.start()
    try:
        found = survey(sources, STREAMS, DATA, memory=folder / "cache", **how)
        clips = Items(found.clips, ("set",), (1,))
        order = Dataset(clips, tuple(STREAMS), (), Cache()).order(seed=0, global_batch=4)
        assert order.mean_steps * 4 == len(found.samples) > 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_row_takes_few_bytes_of_memory(in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin holds all texts in memory, which the bound must catch."""
    monkeypatch.setattr(columns, "HELD_BYTES", 1 << (30 if in_memory else 12))  # as large sets have texts in files
    monkeypatch.setattr(file_memory, "BLOCK", 1 << 12)
    for module, name in ((pairs, "WINDOW"), (samples, "AT_ONCE"), (columns, "COMPARED")):
        monkeypatch.setattr(module, name, 64)
    for rows in (FEW, MANY):
        write_set(tmp_path / str(rows), rows)
    peak(tmp_path / str(FEW))  # what is loaded and remembered once does not count
    few, many = (peak(tmp_path / str(rows)) for rows in (FEW, MANY))
    assert ((many - few) / (MANY - FEW) < MOST_BYTES) != in_memory, (few, many)
