"""What a start has found of a set is kept for the next one, and made anew where anything changed that it depends on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.encoding import config, write_pair
from transpixeler.config.sections import Config
from transpixeler.data import catalog, kept_survey, keying
from transpixeler.data.cache.records import Cache
from transpixeler.data.catalog import Catalog
from transpixeler.data.columns import Texts
from transpixeler.data.dataset import Dataset
from transpixeler.data.kept import KeptFile
from transpixeler.data.media.write import write_png
from transpixeler.models.family import open_model

LONG_AGO = 10**18  # nanoseconds
COLUMNS = {
    "words": Texts.of(["größer", "", "\ud800"]),
    "numbers": np.arange(7, dtype=np.int32),
    "no": np.zeros(0, np.int8),
}


@pytest.fixture(autouse=True)
def _small_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_survey, "LEAST", 1)


class Looks:
    """How often sources were looked through and keys were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = [0, 0]
        survey, make = catalog.survey, keying.Keying._make_keys
        monkeypatch.setattr(catalog, "survey", lambda *a, **k: (self._add(0), survey(*a, **k))[1])
        monkeypatch.setattr(keying.Keying, "_make_keys", lambda *a, **k: (self._add(1), make(*a, **k))[1])

    def _add(self, which: int) -> None:
        self.count[which] += 1

    def taken(self) -> tuple[int, int]:
        """Return how often since the last time."""
        found, self.count = self.count, [0, 0]
        return found[0], found[1]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def at_rest(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture(params=["folder", "manifest"])
def setup(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Config:
    """A set of a folder of pairs, or of a manifest whose rows have a fault here and there; and one to measure on."""
    data = tmp_path / "set"
    for number in range(8):
        write_pair(data / "deep" if number == 5 else data, f"{number}", number, frames=5 if number == 3 else 1)
    if request.param == "manifest":
        names = ["0", "3", "deep/5", "7", "7", "lost"]
        ending = {"3": "mp4"}
        rows = [{s: f"../set/{n}{t}.{ending.get(n, 'png')}" for s, t in (("rgb", ""), ("seg", "_seg"))} for n in names]
        (tmp_path / "lists").mkdir()
        told = [json.dumps(row | {"text": f" words {n}"}) for n, row in enumerate(rows)]
        (tmp_path / "lists" / "a.jsonl").write_text("\n".join([*told, "no json", ""]))
    at_rest(tmp_path)
    source = tmp_path / ("lists" if request.param == "manifest" else "set")
    return config(model, source, f"data.eval={source}", f"data.cache_dir={tmp_path / 'cache'}", "data.draw=epoch")


def found(setup: Config) -> Catalog:
    return catalog.catalog(setup, open_model(setup.model))


def order(made: Catalog, setup: Config) -> list[list[int]]:
    data = Dataset(made.items["train"], tuple(setup.streams), (), Cache())
    epochs = data.order(seed=3, global_batch=2, data=setup.data)
    return [batch.tolist() for epoch in range(3) for batch in epochs.batches(epoch)]


def assert_same(one: Catalog, other: Catalog, setup: Config) -> None:
    for name, jobs in one.jobs.items():
        twin = other.jobs[name]
        assert list(jobs.items) == list(twin.items) and list(jobs.items.clips) == list(twin.items.clips)
        assert jobs.items.keys.tobytes() == twin.items.keys.tobytes() and jobs.alone == twin.alone
    assert (one.skipped, one.notes, one.fixed, one.prompts) == (other.skipped, other.notes, other.fixed, other.prompts)
    assert one.fields == other.fields and one.keys() == other.keys() and order(one, setup) == order(other, setup)


def test_a_second_start_takes_what_the_first_has_found(setup: Config, looks: Looks) -> None:
    first = found(setup)
    assert looks.taken() == (2, 2) and len(first.items["train"]) > 3
    assert_same(first, found(setup), setup)
    assert looks.taken() == (0, 0)
    assert_same(first, found(config_with(setup, seed=0)), setup)
    assert looks.taken() == (0, 0), "what clips do not depend on may change"


def config_with(setup: Config, **new: object) -> Config:
    from dataclasses import replace

    return replace(setup, **new, output_dir="elsewhere")


def first_source(setup: Config) -> Path:
    return Path(setup.data.train[0].path)


def media(setup: Config) -> Path:
    return first_source(setup).parent / "set"


def another_picture(setup: Config) -> None:
    write_png(media(setup) / "0_seg.png", np.zeros((32, 32, 3), np.uint8))


def one_gone(setup: Config) -> None:
    (media(setup) / "7.png").unlink()


def one_deep_inside(setup: Config) -> None:
    (media(setup) / "deep" / "5.png").touch()


def another_row(setup: Config) -> None:
    source = first_source(setup)
    if source.name == "set":
        write_pair(source, "9", 9)
    else:
        (source / "b.jsonl").write_text((source / "a.jsonl").read_text().splitlines()[0] + "\n")


def what_was_lost(setup: Config) -> None:
    for tail in ("", "_seg"):
        write_png(media(setup) / f"lost{tail}.png", np.ones((32, 32, 3), np.uint8))


CHANGES = [another_picture, one_gone, one_deep_inside, another_row, what_was_lost]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_or_manifest_is_seen(change: Callable[[Config], None], setup: Config, looks: Looks) -> None:
    found(setup)
    looks.taken()
    change(setup)
    at_rest(first_source(setup).parent / "nowhere")
    after = found(setup)
    assert looks.taken() == (2, 2)
    for path in (media(setup).parent / "cache").glob("*.columns"):
        path.unlink()
    assert_same(after, found(setup), setup)


def test_another_bucket_or_encoder_is_seen(setup: Config, looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    before = found(setup)
    looks.taken()
    data = replace(setup.data, frames=(1,))
    assert len(found(replace(setup, data=data)).items["train"]) < len(before.items["train"])
    assert looks.taken() == (2, 2)
    found(setup)
    looks.taken()
    folder = open_model(setup.model)
    monkeypatch.setattr(type(folder), "vae_fingerprint", lambda *_: "another")
    other = catalog.catalog(setup, folder)
    assert looks.taken() == (0, 2) and other.items["train"].keys.tobytes() != before.items["train"].keys.tobytes()
    found(setup)
    monkeypatch.undo()


def test_files_that_may_still_change_are_looked_at_again(setup: Config, looks: Looks) -> None:
    os.utime(media(setup) / "0.png")
    found(setup)
    found(setup)
    assert looks.taken() == (4, 4)


def test_a_file_with_a_fault_anywhere_is_no_file(tmp_path: Path) -> None:
    kept = KeptFile(tmp_path / "a.columns", "key")
    kept.write({"x": [1, "\ud800"]}, COLUMNS)
    held = kept.read()
    assert held is not None and held.told == {"x": [1, "\ud800"]}
    assert list(held.columns["words"]) == list(COLUMNS["words"]) and not len(held.columns["no"])
    assert held.columns["numbers"].tolist() == list(range(7)) and held.columns["numbers"].dtype == np.int32
    assert KeptFile(kept.path, "other").read() is None and KeptFile(tmp_path / "b", "key").read() is None

    whole, random = kept.path.read_bytes(), np.random.default_rng(0)
    for size in (0, 1, 15, 16, 17, *random.integers(0, len(whole), 40).tolist()):
        kept.path.write_bytes(whole[:size])
        assert kept.read() is None, size
    padding = 0
    for place in range(len(whole)):
        torn = bytearray(whole)
        torn[place] ^= 1 + int(random.integers(255))
        kept.path.write_bytes(torn)
        padding += kept.read() is not None
    assert padding < 5 * 64, "bytes between columns alone stand for nothing"


@pytest.mark.parametrize("header", [b"{}", b"[1]", b"null", b"no json", b"\xff", b"[" * 100_000], ids=range(6))
def test_a_file_that_another_wrote_is_no_file(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.columns").write_bytes(b"columns" + header + f"{len(header):08x}{zlib.crc32(header):08x}".encode())
    assert KeptFile(tmp_path / "a.columns", "key").read() is None


def test_a_torn_file_is_made_again(setup: Config, looks: Looks) -> None:
    first = found(setup)
    looks.taken()
    for path in (media(setup).parent / "cache").glob("*.columns"):
        path.write_bytes(path.read_bytes()[:-40])
    assert_same(first, found(setup), setup)
    assert looks.taken() == (2, 2)
    found(setup)
    assert looks.taken() == (0, 0)
