"""Training on buckets that are drawn each epoch, with batches of their own: exact on every layout and after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import RanksFailed
from tests.training.trainings import as_killed, difference, exact, layout, run, tensors
from transpixeler.config import loading
from transpixeler.data.catalog import catalog
from transpixeler.data.encode import find_missing
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime

RULES = "[{size: [0, 0, 17], keep: 0.5, keep_resolution: 0.6, global_batch: 2}, {size: [32, 32, 0], keep: 0.9}]"
DRAWN = (
    "data.resolutions=[64, 32]",
    "data.frames=[9, 17]",
    "data.draw=epoch",
    f"data.buckets={RULES}",
    "train.max_steps=9",
    "checkpoint.every_steps=3",
    "optim.name=sgd",
    "optim.lr=0.5",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def whole(demo: Path, place: Path) -> Path:
    return run(demo, place / "whole", *DRAWN, f"data.cache_dir={place / 'cache'}")


def test_a_step_has_its_buckets_own_batch_and_epochs_hold_other_clips(whole: Path) -> None:
    lines = exact(whole)
    sizes = {len(line["samples"]) for line in lines}
    assert sizes == {2, 4}
    first, second = ({name for line in lines if line["epoch"] == epoch for name in line["samples"]} for epoch in (1, 2))
    assert first != second


@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 1, 1), (1, 1, 2)])
def test_another_layout_takes_the_same_steps(
    demo: Path, place: Path, whole: Path, tmp_path: Path, shape: tuple
) -> None:
    words = (*DRAWN, "train.max_steps=6", f"data.cache_dir={place / 'cache'}", *layout(*shape))
    folder = run(demo, tmp_path, *words, ranks=2)
    ours, theirs = exact(folder), exact(whole)[:6]
    assert {line["epoch"] for line in ours} >= {1, 2}
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    assert difference(tensors(folder, 6, tmp_path), tensors(whole, 6, tmp_path)) < 1e-5


def test_a_stop_in_the_middle_of_an_epoch_changes_nothing(demo: Path, place: Path, whole: Path, tmp_path: Path) -> None:
    words = (*DRAWN, f"data.cache_dir={place / 'cache'}")
    folder = run(demo, tmp_path, *words, resume=str(as_killed(whole, 6, tmp_path)))
    assert exact(folder) == exact(whole)
    assert difference(tensors(folder, 9, tmp_path), tensors(whole, 9, tmp_path)) == 0.0


def test_only_what_the_epochs_draw_is_encoded(demo: Path, tmp_path: Path) -> None:
    words = (*DRAWN, f"data.cache_dir={tmp_path}", "data.eval=[]", "train.max_steps=0", "eval.samples=0")
    encoded, possible = [], set()
    for epochs in (1, 400):
        config = loading.load(demo / "config.yaml", (*words, f"train.epochs={epochs}"))
        data, work = find_missing(config, open_model(config.model), Runtime(0, 1, 0, torch.device("cpu")))
        encoded.append(len(work.clips))
        draws = data.train.order(seed=config.seed, global_batch=4, data=config.data).draws
        assert draws is not None
        possible.add(int((draws.chances() > 0).sum()))
    assert encoded[0] < encoded[1] and possible == {encoded[1]}


def test_held_out_clips_are_drawn_once(demo: Path, tmp_path: Path) -> None:
    config = loading.load(demo / "config.yaml", (*DRAWN, f"data.cache_dir={tmp_path}"))
    found = catalog(config, open_model(config.model))
    names = [item.sample_id for item in found.items["eval"]]
    assert names and len(names) == len(set(names))
    train = [item.sample_id for item in found.items["train"]]
    assert len(train) > len(set(train)), "each may be drawn for several buckets"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.buckets=[{size: [0, 0, 17], global_batch: 3}]",), r"data\.buckets: 3 samples do not divide over 2"),
        (("data.draw=once",), r"keep_resolution is drawn each epoch.*set data\.draw=epoch"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(
    demo: Path, place: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RanksFailed, match=said):
        run(demo, tmp_path, *DRAWN, f"data.cache_dir={place / 'cache'}", *layout(1, 2, 1), *words, ranks=2)
