"""Whatever files and rows are called, the answer is a sample or a reason that a terminal can show."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.media.probe import NAME, Probes
from transpixeler.data.media.write import write_png
from transpixeler.data.sources.pairs import Scan, scan

STEMS = [
    "a", "a_seg", "_seg", "b", "b_seg", "c~2", "-", " ", "é", "e\u0301", "x" * 240, "new\nline", "tab\t", "\x1b[2J",
    "%s",    "\u202e", "a\\b", "'\"", "\udce9", "~", "CON", "a.b.c",
]  # fmt: skip
ENDINGS = [".png", ".PNG", ".txt", ".mp4", ".jpg", "", ".json", ".png.txt"]
VALUES = [
    "a.png", "./a.png", "../a.png", "/a.png", "/", "", " ", ".", "..", "~", "x" * 300, "y/" * 3000, "nul\0",
    "folder.png", "a.png/b", "\ud800", "\x1b[31m", "file:a.png", "http://127.0.0.1:9/a.mp4", "-i",
    "|ls", None, 7, -1, 1.5, [], {}, True, "1e999", "1e300000000", "9" * 4000, "NaN",
]  # fmt: skip
COLUMNS = ["rgb", "seg", "text", "num_frames", "height", "fps", "video"]


def scanned(path: Path) -> Scan | None:
    """Scan as training would; every text that results can be shown."""
    try:
        found = scan([SourceConfig(str(path))], {"rgb": "", "seg": "_seg"}, DataConfig())
    except UserError as error:
        assert str(error).isprintable()
        return None
    shown = [text for bad in found.bad for text in (bad.id, bad.path, bad.reason)]
    assert all(text.isprintable() for text in (*shown, *(sample.id for sample in found.samples))), shown
    return found


@pytest.mark.parametrize("seed", range(8))
def test_folders_of_any_names_are_scanned(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    write_png(tmp_path / "whole.png", np.zeros((16, 16, 3), np.uint8))
    contents = [(tmp_path / "whole.png").read_bytes(), b"", b"\xff\xfe\0", b"a caption"]
    for case in range(15):
        folder = tmp_path / f"case{case}"
        folder.mkdir()
        for _ in range(8):
            place = folder / f"{random.choice(STEMS)}{random.choice(ENDINGS)}"
            kind = int(random.integers(10))
            if place.exists() or place.is_symlink():
                folder = place if place.is_dir() and not place.is_symlink() else folder
            elif kind == 0:
                place.mkdir()
            elif kind == 1:
                place.symlink_to(str(random.choice(["..", "nowhere", place.name, "/dev/null"])))
            else:
                place.write_bytes(contents[int(random.choice(4, p=[0.6, 0.1, 0.1, 0.2]))])
        scanned(tmp_path / f"case{case}")


@pytest.mark.parametrize("seed", range(8))
def test_manifests_of_any_values_are_read(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(100 + seed)
    write_png(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "folder.png").mkdir()
    rows = []
    for _ in range(40):
        row = {"rgb": "a.png", "seg": "a.png", "text": "a caption"}
        for column in random.choice(COLUMNS, 2):
            row[str(column)] = VALUES[int(random.integers(len(VALUES)))]
        rows.append(row)
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scanned(tmp_path / "list.jsonl")
    assert found is not None and len(found.samples) + len(found.bad) == 40 and found.bad


def test_a_mutated_memory_of_probes_changes_no_result(tmp_path: Path) -> None:
    random, memory = np.random.default_rng(5), tmp_path / "cache" / NAME
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        write_png(path, np.zeros((16 + number, 32, 3), np.uint8))
        os.utime(path, (1e9, 1e9))
    probes = Probes(memory.parent)
    truth = [probes(path) for path in paths]
    probes.save()
    whole = memory.read_bytes()
    for case in range(100):
        data, spot = bytearray(whole), int(random.integers(len(whole)))
        if case % 3 == 0:
            data[spot] = int(random.choice([*b"0123456789\t\n/", 0, 255]))
        elif case % 3 == 1:
            del data[spot : spot + int(random.integers(1, 30))]
        else:
            data[spot:spot] = whole[int(random.integers(len(whole))) :][:20]
        memory.write_bytes(bytes(data))
        again = Probes(memory.parent)
        assert [again(path) for path in paths] == truth, bytes(data)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "\x1b[31m/a.csv", "a" * 5000])
def test_a_source_of_any_name_that_is_none_is_a_users_mistake(name: str, tmp_path: Path) -> None:
    assert scanned(tmp_path / name) is None
