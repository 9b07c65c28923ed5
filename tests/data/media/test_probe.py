"""A file is opened once until it changes, and a memory that is torn or edited is no fact."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from transpixeler.data.media.clip import Media
from transpixeler.data.media.probe import VERSION, Probes, _check
from transpixeler.data.media.write import write_png


def test_a_memory_of_another_version_is_forgotten(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    write_png(image, np.zeros((16, 16, 3), np.uint8))
    os.utime(image, (1e9, 1e9))
    probes = Probes(tmp_path)
    probes(image)
    probes.save()
    memory = tmp_path / "probes.tsv"
    memory.write_text(memory.read_text().replace(f"{VERSION}\n", "0\n", 1))
    again = Probes(tmp_path)
    assert again(image) and again.opened == 1


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
    replace, machines = Path.replace, [Probes(tmp_path / "cache") for _ in range(2)]
    for number, probes in enumerate(machines):
        write_png(tmp_path / f"{number}.png", np.zeros((16, 16, 3), np.uint8))
        os.utime(tmp_path / f"{number}.png", (1e9, 1e9))
        probes(tmp_path / f"{number}.png")

    def late(part: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        machines[1].save()
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", late)
    machines[0].save()
    again = Probes(tmp_path / "cache")
    assert again(tmp_path / "0.png") and not again.opened, "whole, and the later of both"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["probes.tsv"]


def test_a_large_memory_is_no_objects(looked_at: tuple[Path, Path, Media]) -> None:
    """Two million lines as a dict of objects were a gigabyte on every start."""
    image, memory, found = looked_at
    line = memory.read_text().splitlines()[1]
    before = line.split("\t", 1)[1]
    lines = [before.replace("a.png", f"b{number}.png") for number in range(5000)]
    memory.write_text(
        "".join(f"{text}\n" for text in [str(VERSION), line, *(f"{_check(one.encode())}\t{one}" for one in lines)])
    )
    tracemalloc.start()
    again = Probes(memory.parent)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 5000 * 40, "bytes"
    assert again(image) == found and not again.opened
