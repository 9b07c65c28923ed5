"""The benches run, at sizes that take no time, and end with the figures that they promise."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ranks  # noqa: F401 - its server of processes has the libraries loaded
from transpixeler.parallel import shard

BENCHES = Path(__file__).parents[2] / "tools" / "bench"
Bench = Callable[..., dict[str, Any]]


def _main(name: str, argv: tuple[str, ...], smaller: dict[str, Any], folder: Path) -> str:
    """What a bench prints."""
    sys.path.insert(0, str(BENCHES))
    sys.argv, tempfile.tempdir = [name, *argv, "--no-record"], str(folder)
    module = importlib.import_module(name)
    for constant, value in smaller.items():
        assert hasattr(module, constant), constant
        setattr(module, constant, value)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main()
    return said.getvalue()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Runs one in a process of its own, since it starts threads, groups and ranks."""

    def run(name: str, *argv: object, **smaller: Any) -> dict[str, Any]:
        recorded = (BENCHES / "results.md").read_bytes()
        with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
            said = process.submit(_main, name, tuple(map(str, argv)), smaller, tmp_path).result()
        assert (BENCHES / "results.md").read_bytes() == recorded
        return json.loads(said.splitlines()[-1])

    return run


def test_cache_tells_its_rates(bench: Bench) -> None:
    found = bench("cache", "--count", 8, "--repeats", 1, "--rows", 100, SHAPE=(4, 2, 4, 6), SHARD=8)
    rates = {"x_safetensors", "x_pickle", "records_per_s", "x_limit", "x_safetensors_view", "verified_records_per_s"}
    assert found.keys() == {*rates, "million_open_seconds", "million_resident_mb"}


def test_decode_tells_its_rates(bench: Bench) -> None:
    found = bench("decode", "--repeats", 1, "--frames", 200, 210, SOURCE=(64, 112), HEIGHT=32, WIDTH=56)
    rates = {"x_whole_file", "frames_per_s", "x_whole_file_middle", "frames_per_s_middle"}
    assert found.keys() == {*rates, "mean_difference", "rss_mb_300", "rss_mb_1200"}
    assert found["mean_difference"] < 4  # both are the same pictures


def test_load_tells_waits_and_what_a_million_records_take(bench: Bench) -> None:
    size = ("--records", 300, "--files", 3, "--grid", 4, 6, "--text-dim", 8)
    found = bench("load", *size, "--step", 0.01, "--steps", 2, "--repeats", 2)
    waits = {"wait_share", "wait_ms", "step_seconds", "safetensors_wait_ms", "pickle_wait_ms", "x_safetensors"}
    assert found.keys() >= {*waits, "x_pickle", "x_busy_step", "batch_ms", "open_seconds", "order_seconds"}
    assert found["records"] == 300


def test_checkpoint_tells_stalls_and_what_telling_costs(bench: Bench) -> None:
    found = bench("checkpoint", "--ranks", 1, 2, "--blocks", 1, "--repeats", 1, STEPS_TOLD=2)
    one, other = found["sizes"]
    assert other["parameters"] > one["parameters"] and 12 * other["parameters"] <= other["bytes"]
    assert {"stall_ms", "cost_ms", "rival_ms", "x_rival", "spread"} <= one.keys()
    assert {"stall_share", "cost_share", "rival_share", "tell_ms", "tell_share"} <= found.keys()


def test_pipeline_tells_each_schedules_bubble(bench: Bench) -> None:
    size = ("--ranks", 2, "--microbatches", 2, "--blocks", 4, "--seconds", 0.01, "--repeats", 1)
    found = bench("pipeline", *size, "--weights", 0.5)
    assert found["1f1b_theory"] == found["gpipe_theory"] == round(1 / 3, 4)
    assert found["interleaved_1f1b_theory"] == round(1 / 5, 4)
    splits = ("interleaved_zero_bubble",) if torch.__version__ >= shard.SPLITS_BACKWARD else ()
    for name in ("gpipe", "1f1b", "interleaved_1f1b", *splits):
        assert found[f"{name}_seconds"] > 0 and 0 < found[f"{name}_bubble"] < 1


def test_start_tells_where_the_time_goes(bench: Bench, demo: Path) -> None:
    found = bench("start", "--cached", demo / "config.yaml", "--repeats", 1)
    parts = [found[f"{part}_seconds"] for part in ("torch", "imports", "cache", "build", "weights", "first_step")]
    assert min(parts) >= 0 and sum(parts) < found["seconds"]


def test_the_gpus_bench_runs_every_stage_on_a_cpu(bench: Bench) -> None:
    found = bench("gpu", "--toy", "--repeats", 1)
    assert found["faults"] == [] and found["seconds"] > 0
