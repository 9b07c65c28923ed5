"""Fixtures of several test files. The expensive ones are made once a session and shared by all its processes."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import tests.support.families  # noqa: F401 - a family of the tests alone is found from here on
from tests.support.shared import made_once, session_folder, settle
from transpixeler.models.family import open_model

torch.set_num_threads(1)  # results are the same bit for bit, and each worker has a core
# Garbage is looked for in what a test makes, and not each time in all of torch and of pytest's own.
gc.set_threshold(20_000, 20, 20)


_modules = [0]  # how many there were when garbage was last told to leave alone what is there
_thawed = [0]  # times that a training ended, which lets garbage be looked for everywhere again
_thaw = gc.unfreeze
THAWS = 5  # trainings whose garbage may lie about; looking through all that is loaded takes half a second


def pytest_runtest_setup() -> None:
    """Take libraries that were loaded since out of each later search for garbage, of which a training makes several."""
    if len(sys.modules) > _modules[0] + 100:
        gc.collect()
        gc.freeze()
        _modules[0] = len(sys.modules)


def _stay_frozen() -> None:
    """Leave what is loaded out of later searches; now and then, look through all of it once."""
    _thawed[0] += 1
    if _thawed[0] % THAWS == 0:
        _thaw()
        gc.collect()
    gc.freeze()


gc.unfreeze = _stay_frozen


@pytest.fixture(autouse=True)
def _log_is_captured() -> None:
    """Let `caplog` read the package's log, even after a test whose command sent it to a terminal."""
    logging.getLogger("transpixeler").propagate = True


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lend a demo folder whose clips are all in the cache: 10 clips of 4 buckets. Nobody writes into it."""
    with made_once(session_folder(tmp_path_factory) / "shared/demo", _write_cached_demo) as folder:
        yield folder


@pytest.fixture(scope="session")
def run(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lend the folder of a run of two steps whose adapter can be seen. Nobody writes into it."""
    from tests.support.ranks import run_ranks

    def train(output: Path) -> None:
        run_ranks(_train, 1, demo / "config.yaml", output)

    with made_once(session_folder(tmp_path_factory) / "shared/runs", train) as output:
        yield (output / "latest").resolve()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lend the demo's tiny model folder with random weights. Nobody writes into it."""
    from transpixeler.demo.model import write_model

    def write(folder: Path) -> None:
        write_model(folder, seed=0)

    with made_once(session_folder(tmp_path_factory) / "shared/model", write) as folder:
        yield folder


def _write_cached_demo(folder: Path) -> None:
    from tests.support.ranks import run_ranks
    from transpixeler.demo.write import write_demo

    write_demo(folder, train_clips=10, eval_clips=2)
    settle(folder)
    run_ranks(_cache, 2, folder)


def _train(rank: int, world_size: int, path: Path, output: Path) -> str:
    import torch

    from transpixeler.config import loading
    from transpixeler.parallel.runtime import Runtime
    from transpixeler.training import trainer

    overrides = [f"output_dir={output}", "train.max_steps=2", "optim.lr=0.1", "optim.warmup_steps=0", "optim.ema=0.9"]
    overrides += ["eval.before_first_step=false", "eval.every_epochs=0", "log.tensorboard=false"]
    config = loading.load(path, overrides)
    return str(trainer.train(config, Runtime(rank, world_size, rank, torch.device("cpu"))))


def _cache(rank: int, world_size: int, folder: Path) -> None:
    import torch

    from transpixeler.config import loading
    from transpixeler.data.encode import encode_missing
    from transpixeler.parallel.runtime import Runtime

    config = loading.load(folder / "config.yaml")
    encode_missing(config, open_model(config.model), Runtime(rank, world_size, rank, torch.device("cpu")))
