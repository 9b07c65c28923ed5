"""Damage is named and mended; garbage goes and nothing else."""

import os
import re
from pathlib import Path

import pytest

from tests.support.encoding import ALONE, Counted, config, records, run, write_pair, write_pairs
from transpixeler import cli
from transpixeler.config.sections import UserError
from transpixeler.data import encode
from transpixeler.data.cache.records import CacheDamaged
from transpixeler.data.loader import Assembler, Loader
from transpixeler.data.upkeep import cache_command
from transpixeler.models.family import open_model


def damage(cache: Path, how: str) -> None:
    segment = next(cache.glob("*.latent-bfloat16-16x1x4x4.seg"))
    if how == "flipped":
        data = bytearray(segment.read_bytes())
        data[100] ^= 1
        segment.write_bytes(data)
    elif how == "truncated":
        os.truncate(segment, segment.stat().st_size - 10)
    else:
        next(cache.glob("*.idx")).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flipped", r"clip d/000@0\+1:32x32, stream rgb \([0-9a-f]{32}\): its checksum does not match"),
        ("truncated", r"clip d/\d+@0\+1:32x32, stream seg \([0-9a-f]{32}\): its segment is missing or truncated"),
        ("no index", r"all its records: its index is missing"),
    ],
)
def test_verify_names_the_damage_and_the_next_run_mends_it(model: Path, tmp_path: Path, how: str, said: str) -> None:
    write_pair(tmp_path / "d", "000", 0)
    setup = config(model, tmp_path / "d")
    write_pair(tmp_path / "d", "001", 1)
    whole = records(run(setup).train.cache)
    damage(tmp_path / "d/cache", how)
    problems = cache_command(setup, ALONE, verify=True).problems
    assert problems and all("d/cache/" in str(problem.path) for problem in problems)
    assert any(re.search(said, str(problem)) for problem in problems), problems
    assert records(run(setup).train.cache) == whole
    left = cache_command(setup, ALONE, verify=True).problems
    assert len(left) == (2 if how == "no index" else 0)  # segments without an index go with --gc
    cache_command(setup, ALONE, gc=True)
    assert not cache_command(setup, ALONE, verify=True).problems and records(run(setup).train.cache) == whole


@pytest.mark.parametrize("how", ["flipped", "truncated", "no index"])
def test_training_refuses_or_re_encodes_what_is_damaged(model: Path, tmp_path: Path, how: str) -> None:
    write_pairs(tmp_path / "d", 2)
    setup = config(model, tmp_path / "d")
    whole = records(run(setup).train.cache)
    damage(tmp_path / "d/cache", how)
    data = run(setup).train
    with Loader(
        Assembler(data, patch=(1, 2, 2), fields=open_model(setup.model).fields), data.order(seed=0, global_batch=2)
    ) as loader:
        if how == "flipped":
            with pytest.raises(CacheDamaged, match="d/000"):
                next(loader)
        else:
            next(loader)
            assert records(data.cache) == whole


def test_gc_keeps_what_the_config_refers_to_and_returns_the_rest(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    setup = config(model, tmp_path / "d")
    run(setup)
    for name in ("001", "002", "004"):
        for path in list((tmp_path / "d").glob(f"{name}*")):
            path.unlink()
    kept = {key for item in run(setup).train.items for key in (*item.latent_keys, *item.text_keys)}
    report = cache_command(setup, ALONE, gc=True)
    assert report.removed_records == 3 * 3 and report.removed_bytes > 3 * 1024
    counted.reset()
    after = run(setup).train
    assert counted.loads == [] and set(records(after.cache)) == kept | {*after.empty_text_keys}
    assert cache_command(setup, ALONE, gc=True).removed_records == 0


def test_verify_gc_and_rebuild_wait_for_no_writer_but_refuse(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d", 2)
    setup = config(model, tmp_path / "d")
    run(setup)
    with encode.CacheWriter(tmp_path / "d/cache", "other"):
        for what in ("verify", "gc", "rebuild"):
            with pytest.raises(UserError, match="is being written by another run"):
                cache_command(setup, ALONE, **{what: True})
    cache_command(setup, ALONE, gc=True)


def test_a_cache_in_the_place_of_a_file_is_one_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("a file")
    assert cli.main(["cache", str(demo / "config.yaml"), f"data.cache_dir={tmp_path / 'mine'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.cache_dir: " in line and "mine is a file; give a folder" in line


def test_rebuild_gives_the_same_records(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d", 3)
    setup = config(model, tmp_path / "d")
    whole = records(run(setup).train.cache)
    counted.reset()
    rebuilt = cache_command(setup, ALONE, rebuild=True).datasets
    assert counted.videos == 6 and records(rebuilt.train.cache) == whole


def test_list_counts_records_and_bytes(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d")
    setup = config(model, tmp_path / "d")
    run(setup)
    found = {shelf.name: (shelf.records, shelf.bytes) for shelf in cache_command(setup, ALONE, list=True).shelves}
    assert found["latent-bfloat16-16x1x4x4"] == (8, 8 * 16 * 16 * 2)
    assert found["latent-bfloat16-16x2x4x4"] == (4, 4 * 16 * 32 * 2)
    assert found["text-bfloat16-64"][0] == 7
