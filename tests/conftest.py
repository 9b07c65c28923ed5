"""What several test files stand on: a small demo with its cache, made once."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _heard() -> None:
    """What an earlier test let go to a terminal can be read by `caplog` again."""
    logging.getLogger("transpixeler").propagate = True


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder whose clips are all in the cache: 10 clips of 4 buckets. Nobody writes into it."""
    from tests.support.ranks import run_ranks
    from transpixeler.demo.write import write_demo

    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder, train_clips=10, eval_clips=2)
    run_ranks(_cache, 2, folder)
    return folder


@pytest.fixture(scope="session")
def run(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps whose adapter can be seen. Nobody writes into it."""
    from tests.support.ranks import run_ranks

    return Path(run_ranks(_train, 1, demo / "config.yaml", tmp_path_factory.mktemp("runs"))[0])


def _train(rank: int, world_size: int, path: Path, output: Path) -> str:
    import torch

    from transpixeler import configfile
    from transpixeler.parallel.runtime import Runtime
    from transpixeler.training import trainer

    overrides = [f"output_dir={output}", "train.max_steps=2", "optim.lr=0.1", "optim.warmup_steps=0", "optim.ema=0.9"]
    overrides += ["eval.before_first_step=false", "eval.every_epochs=0", "log.tensorboard=false"]
    config = configfile.load(path, overrides)
    return str(trainer.train(config, Runtime(rank, world_size, rank, torch.device("cpu"))))


def _cache(rank: int, world_size: int, folder: Path) -> None:
    import torch

    from transpixeler import configfile
    from transpixeler.data.encode import encode_missing
    from transpixeler.families.wan.model import WanModel
    from transpixeler.parallel.runtime import Runtime

    config = configfile.load(folder / "config.yaml")
    encode_missing(config, WanModel, Runtime(rank, world_size, rank, torch.device("cpu")))
