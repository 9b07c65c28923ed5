"""A file is opened once until it changes, and a memory that is torn or edited is no fact."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from transpixeler.data.file_memory import memory_lines, write_memory
from transpixeler.data.media.clip import Media
from transpixeler.data.media.probe import Probes
from transpixeler.data.media.write import write_png


def test_a_memory_of_another_version_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "probes.tsv").write_text("0\nnonsense\n")
    assert Probes(tmp_path)._memory._known == {}


@pytest.fixture
def looked_at(tmp_path: Path) -> tuple[Path, Path, Media]:
    """An image, the memory of it that was saved, and what is remembered."""
    image, memory = tmp_path / "a.png", tmp_path / "cache" / "probes.tsv"
    write_png(image, np.zeros((16, 16, 3), np.uint8))
    os.utime(image, (1e9, 1e9))
    probes = Probes(memory.parent)
    found = probes(image)
    probes.save()
    return image, memory, found


@pytest.mark.parametrize("text", ["", "\n", "{whole}\nnonsense\n\0\t\t\n", "{whole}\n{line}\n1\t2\t3", "{whole}"])
def test_a_broken_memory_is_read_as_far_as_it_goes(text: str, looked_at: tuple[Path, Path, Media]) -> None:
    image, memory, found = looked_at
    whole, garbled = memory.read_text().rstrip("\n"), "1\t2\t1\t16\t16\t1/0\t0\t0\tb.png"
    memory.write_text(text.format(whole=whole, line=garbled))
    again = Probes(memory.parent)
    assert again(image) == found and again.opened == (0 if "{whole}\n" in text else 1)
    again.save()
    assert [path.name for path in memory.parent.iterdir()] == ["probes.tsv"]


@pytest.mark.parametrize("shift", [-1, 1, 30])
def test_an_edited_line_is_no_fact(shift: int, looked_at: tuple[Path, Path, Media]) -> None:
    """A number that was changed, by hand or by the disk, would be believed for ever."""
    image, memory, found = looked_at
    memory.write_text(memory.read_text().replace("\t16\t", f"\t{16 + shift}\t", 1))
    again = Probes(memory.parent)
    assert again(image) == found and again.opened == 1


def test_two_machines_may_remember_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one saves while this one does, under the same process id."""
    replace = Path.replace

    def late(part: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        write_memory(target, ["theirs"])
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", late)
    assert write_memory(tmp_path / "memory.tsv", ["ours"])
    assert memory_lines(tmp_path / "memory.tsv") == ["ours"]
