"""Ranks open and hash the files of a set together: any number of them finds the same, and a kill loses little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.support.encoding import config, write_pair
from tests.support.ranks import RanksFailed, fork, run_ranks
from transpixeler.data import catalog, file_memory, kept_survey, keying, sharing
from transpixeler.data.cache import fingerprints
from transpixeler.data.media import probe
from transpixeler.data.ranks import connected
from transpixeler.data.sources import pairs
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime

PAIRS = 12
MEMORIES = (probe.NAME, fingerprints.NAME)
Found = tuple[list[str], bytes, list[tuple[str, str]], list[str], list[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures and videos, one with a torn file and one whose streams differ in length."""
    folder = tmp_path_factory.mktemp("clips") / "clips"
    for number in range(PAIRS):
        write_pair(folder, f"{number:03}", number, frames=5 if number % 4 == 2 else 1)
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:40])
    (folder / "006_seg.mp4").write_bytes((folder / "002.mp4").read_bytes()[:90])
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def look(rank: int, world_size: int, model: Path, data: Path, cache: Path) -> Found:
    """List a set; return what was found, and which files this rank has opened and hashed."""
    opened, hashed = list[str](), list[str]()
    probe_one, hash_one = probe.probe, fingerprints.file_digest
    probe.probe = lambda path: (opened.append(path.name), probe_one(path))[1]
    fingerprints.file_digest = lambda path: (hashed.append(path.name), hash_one(path))[1]
    pairs.WINDOW = keying.WINDOW = 5
    kept_survey.LEAST = 1
    setup = config(model, data, f"data.cache_dir={cache}")
    with connected(Runtime(rank, world_size, rank, torch.device("cpu"))) as ranks:
        folder = open_model(setup.model)
        found = sharing.shared(ranks, lambda helpers: catalog.catalog(setup, folder, helpers), [cache])
    items = found.items["train"]
    return [item.id for item in items], items.keys.tobytes(), [*found.skipped["train"]], opened, hashed


def lines(cache: Path) -> list[list[str]]:
    """Return what is remembered of the set's files; those of the model may be too new for that."""
    every = [(cache / name).read_text().splitlines() for name in MEMORIES]
    return [sorted(line for line in some if "/clips/" in line) for some in every]


@pytest.fixture(scope="module")
def alone(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, list[list[str]]]:
    cache = tmp_path_factory.mktemp("alone")
    (found,) = run_ranks(look, 1, model, data, cache)
    return found, lines(cache)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_finds_the_same_and_each_does_its_part(
    world_size: int, model: Path, data: Path, alone: tuple[Found, list[list[str]]], tmp_path: Path
) -> None:
    found = run_ranks(look, world_size, model, data, tmp_path)
    assert len(alone[0][0]) == PAIRS - 2 == PAIRS - len(alone[0][2])
    assert all(one[:3] == alone[0][:3] for one in found)
    probes, hashes = lines(tmp_path)
    assert hashes == alone[1][1] and set(alone[1][0]) <= set(probes), "the companion of a torn file may be known, too"
    media = [name for one in found for name in one[4] if name.endswith((".png", ".mp4"))]
    assert len(media) == len(set(media)) == 2 * (PAIRS - 2), "each file is hashed once"
    videos = [name for one in found for name in one[3]]
    assert len(videos) == len(set(videos)) and set(alone[0][3]) <= set(videos), "each is opened once"
    for _, _, _, opened, hashed in found:
        assert len(opened) >= PAIRS // world_size and len(hashed) >= PAIRS // world_size
    again = run_ranks(look, world_size, model, data, tmp_path)
    assert all(one[:3] == alone[0][:3] for one in again)
    assert not any(one[3] or one[4] for one in again), "the list of the first start is taken"


def fail(rank: int, world_size: int, model: Path, data: Path, cache: Path) -> None:
    if rank:
        fingerprints.file_digest = lambda path: (_ for _ in ()).throw(PermissionError(13, "not for you", str(path)))
    look(rank, world_size, model, data, cache)


def test_what_one_rank_cannot_read_ends_all(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as told:
        run_ranks(fail, 2, model, data, tmp_path)
    assert str(told.value).count("not for you") >= 2 and "no answer" not in str(told.value)


def slowly(model: Path, data: Path, cache: Path) -> None:
    file_memory.SAVE_SECONDS = file_memory.SAVE_SHARE = 0.0
    probe_one = probe.probe
    probe.probe = lambda path: (time.sleep(0.2), probe_one(path))[1]
    look(0, 1, model, data, cache)


def test_a_kill_loses_what_was_opened_last_alone(model: Path, data: Path, tmp_path: Path) -> None:
    worker, memory = fork(slowly, model, data, tmp_path), tmp_path / probe.NAME
    deadline = time.monotonic() + 60
    while not (memory.exists() and len(memory.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    known = len(memory.read_text().splitlines()) - 1
    assert 5 <= known < 2 * PAIRS - 2
    (found,) = run_ranks(look, 1, model, data, tmp_path)
    assert 0 < len(found[3]) <= 2 * PAIRS - known
