"""An evaluation depends on the weights alone, leaves training as it was, and is told once."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.ranks import run_ranks
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.encode import encode_missing
from transpixeler.data.media.write import write_png
from transpixeler.data.order import make_order
from transpixeler.evaluation import clips, heldout, losses
from transpixeler.models.family import open_model
from transpixeler.parallel import devices
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import checkpoint
from transpixeler.sampling.model import open_engine
from transpixeler.sampling.saves import load_saved
from transpixeler.training import trainer
from transpixeler.training.schedule import Schedule


def layout(pipeline: int, replicate: int, shard: int) -> tuple[str, ...]:
    return (f"parallel.pipeline={pipeline}", f"parallel.replicate={replicate}", f"parallel.shard={shard}")


# --- losses ----------------------------------------------------------------------------------------------------------


def _losses(rank: int, world_size: int, run: Path, overrides: tuple[str, ...], twin: str) -> losses.Losses:
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    source = load_saved(str(run), ["objective.tasks={joint: 1, rgb_to_aux: 1}", *overrides])
    data = encode_missing(source.config, open_model(source.config.model), runtime)
    if twin == "noise of the rank":
        draw = clips.draw_noise
        clips.draw_noise = lambda elements, *key: draw(elements, *key, rank)
    mesh = meshes.build(meshes.resolve(source.config.parallel, world_size), runtime)
    engine = open_engine(source, mesh)
    return heldout.Evaluator(source.config, runtime, engine, data.eval).losses()


def difference(one: losses.Losses, other: losses.Losses) -> float:
    assert [*one] == [*other] and all([*one[name]] == [*other[name]] for name in one)
    return max(
        abs(value - other[name][stream][t])
        for name, streams in one.items()
        for stream, times in streams.items()
        for t, value in times.items()
    )


@pytest.fixture(scope="module")
def alone(run: Path) -> losses.Losses:
    return run_ranks(_losses, 1, run, (), "")[0]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, layout(2, 1, 2)),
        (4, layout(1, 4, 1)),
        (4, (*layout(1, 2, 1), "parallel.context=2")),
        (1, ("eval.micro_batch=3",)),
        (1, ("train.global_batch=1",)),
    ],
)
def test_losses_are_the_same_on_any_layout_and_batch(
    run: Path, alone: losses.Losses, ranks: int, overrides: tuple[str, ...]
) -> None:
    for found in run_ranks(_losses, ranks, run, overrides, ""):
        assert difference(found, alone) < 1e-6


def test_noise_that_depends_on_the_rank_is_found(run: Path, alone: losses.Losses) -> None:
    assert difference(run_ranks(_losses, 2, run, layout(1, 2, 1), "noise of the rank")[0], alone) > 1e-3


def test_every_task_that_is_trained_is_evaluated_on_the_streams_that_it_makes(alone: losses.Losses) -> None:
    assert {name: [*streams] for name, streams in alone.items()} == {
        "eval": ["rgb", "seg"],
        "eval/rgb_to_aux": ["seg"],
    }
    assert [*alone["eval"]["seg"]] == ["0.2", "0.5", "0.8"]
    assert all(math.isfinite(v) for streams in alone.values() for times in streams.values() for v in times.values())


def test_clips_are_taken_from_everywhere() -> None:
    assert clips.spread(range(10), 3) == [0, 3, 6]
    assert clips.spread(range(2), 5) == [0, 1]
    assert clips.spread([], 5) == []


# --- when ------------------------------------------------------------------------------------------------------------


def due_steps(total: int, **keys: Any) -> list[int]:
    config = loading.from_overrides([f"eval.{key}={str(value).lower()}" for key, value in keys.items()])
    order = make_order(buckets=[(1, 64, 64)] * 6, repeats=[1] * 6, batches=[2] * 6, seed=0)  # 3 steps an epoch
    due = Schedule(config, order, total).evaluation_due
    return [step for step in range(total + 1) if due(step)]


def test_evaluations_are_due_by_steps_by_epochs_before_the_first_and_at_the_last() -> None:
    assert due_steps(10) == [0, 3, 6, 9, 10]
    assert due_steps(10, every_epochs=2, before_first_step=False) == [6, 10]
    assert due_steps(10, every_epochs=0, every_steps=4) == [0, 4, 8, 10]
    assert due_steps(10, every_epochs=0, before_first_step=False) == []


# --- while training --------------------------------------------------------------------------------------------------

TRAINS = (
    "train.max_steps=4",
    "train.global_batch=4",
    "train.micro_batch=1",
    "optim.lr=0.05",
    "optim.warmup_steps=0",
    "optim.ema=0.5",
    "lora.dropout=0.2",
    "checkpoint.every_steps=2",
    "save.every_steps=0",
    "save.every_epochs=0",
    "log.tensorboard=false",
    "eval.clips=2",
    "eval.times=[0.3, 0.7]",
    "eval.samples=0",
    "sample.prompts=[]",
    "sample.steps=2",
    "objective.tasks={joint: 1, rgb_to_aux: 1}",
)
EVALUATES = ("eval.every_steps=2", "eval.every_epochs=0")
NEVER = ("eval.before_first_step=false", "eval.every_epochs=0")


def _train(rank: int, world_size: int, path: Path, overrides: tuple[str, ...], resume: str | None) -> str:
    torch.manual_seed(0)
    config: Config = loading.load(path, overrides)
    return str(trainer.train(config, Runtime(rank, world_size, rank, torch.device("cpu")), resume=resume))


def train(demo: Path, output: Path, *overrides: str, ranks: int = 1, resume: str | None = None) -> Path:
    words = (*TRAINS, f"output_dir={output}", *overrides)
    return Path(run_ranks(_train, ranks, demo / "config.yaml", words, resume)[0])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder: Path, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    out = scratch / f"{folder.name}.pt"
    dcp_to_torch_save(folder / "checkpoints" / checkpoint.folder_name(step), out)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def evaluated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(demo, tmp_path_factory.mktemp("evaluated"), *EVALUATES, "eval.samples=2", "log.tensorboard=true")


def _asked_within(rank: int, world_size: int, path: Path, words: tuple[str, ...]) -> str:
    """One rank is asked to stop, by signal, in the middle of the evaluation of step 2."""
    measure = losses.HeldOutLosses._errors

    def errors(held: losses.HeldOutLosses, piece: clips.Piece) -> torch.Tensor:
        if rank == 1 and piece is held.held_out.pieces[1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(held, piece)

    losses.HeldOutLosses._errors = errors
    return _train(rank, world_size, path, words, None)


def test_a_stop_within_an_evaluation_leaves_it_to_the_resumed_run(demo: Path, tmp_path: Path) -> None:
    words = (*TRAINS, *EVALUATES, f"output_dir={tmp_path}", "eval.before_first_step=false", "checkpoint.every_steps=0")
    folder = Path(run_ranks(_asked_within, 2, demo / "config.yaml", words)[0])
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert "the evaluation of step 2 is made when" in (folder / "log.txt").read_text()
    checkpoint.check(folder / "checkpoints" / checkpoint.folder_name(2))
    train(demo, tmp_path, *EVALUATES, "eval.before_first_step=false", resume="")
    told = [(line["step"], "eval" in line) for line in lines(folder)]
    assert told == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def _train_on_a_device_that_remembers(rank: int, world_size: int, path: Path, words: tuple[str, ...]) -> str:
    """Of 24 GiB, which encoding and evaluations fill; a step takes next to nothing."""
    peak, measure = [24.0], heldout.Evaluator.losses

    def filled(evaluator: heldout.Evaluator) -> losses.Losses:
        peak[0] = 24.0
        return measure(evaluator)

    heldout.Evaluator.losses = filled
    devices.peak_memory, devices.forget_peak = lambda _: peak[0], lambda _: peak.__setitem__(0, 0.0)
    return _train(rank, world_size, path, words, None)


def test_the_memory_of_a_step_is_not_that_of_what_ran_before(demo: Path, tmp_path: Path) -> None:
    words = (*TRAINS, *EVALUATES, f"output_dir={tmp_path}", "eval.before_first_step=false", "train.max_steps=3")
    folder = Path(run_ranks(_train_on_a_device_that_remembers, 1, demo / "config.yaml", words)[0])
    assert [line["memory_gib"] for line in lines(folder) if "loss" in line] == [0.0] * 3


@pytest.fixture(scope="module")
def spread_out(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(demo, tmp_path_factory.mktemp("spread"), *EVALUATES, *layout(2, 1, 2), ranks=4)


@pytest.mark.parametrize(("ranks", "overrides"), [(1, ()), (4, layout(2, 1, 2))])
def test_training_after_an_evaluation_is_bitwise_what_it_is_without(
    demo: Path, request: pytest.FixtureRequest, tmp_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    disturbed = request.getfixturevalue("evaluated" if ranks == 1 else "spread_out")
    straight = train(demo, tmp_path, *NEVER, *overrides, ranks=ranks)
    ours, theirs = state(disturbed, 4, tmp_path), state(straight, 4, tmp_path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[line["loss"] for line in lines(folder) if "loss" in line] for folder in (disturbed, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_an_evaluation_is_a_line_that_holds_losses_of_both_weights_and_measures(evaluated: Path) -> None:
    found = {line["step"]: line["eval"] for line in lines(evaluated) if "eval" in line}
    assert [*found] == [0, 2, 4]
    assert found[0]["eval"]["loss"] == found[0]["eval"]["loss_ema"]
    assert found[4]["eval"]["loss"] != found[4]["eval"]["loss_ema"] != found[2]["eval"]["loss_ema"]
    assert {"channel_spread", "edge_alignment"} <= found[4]["eval"]["metrics"].keys()
    assert found[4]["eval"]["metrics"]["rgb_drift"] > 0 and "rgb_drift" not in found[0]["eval"]["metrics"]
    folders = sorted((evaluated / "samples").glob("*/0-*"))
    assert [folder.parent.name for folder in folders] == ["step00000000", "step00000002", "step00000004"]
    facts = json.loads((folders[-1] / "sample.json").read_text())
    assert facts["step"] == 4 and facts["ema"] and facts["prompt"] and facts["seed"] == 0
    assert "step 4, held out: eval: loss_rgb" in (evaluated / "log.txt").read_text()
    assert (evaluated / "report.html").stat().st_size > 10_000


def test_evaluations_of_a_sharded_pipeline_see_the_weights_of_the_moment(evaluated: Path, spread_out: Path) -> None:
    """A gathered copy of older weights would show in `loss_ema`."""
    at_start, at_start_there = (line["eval"] for line in (lines(evaluated)[0], lines(spread_out)[0]))
    for name in at_start:
        for kind in ("loss", "loss_ema"):
            assert difference({name: at_start[name][kind]}, {name: at_start_there[name][kind]}) < 1e-6
    last = lines(spread_out)[-1]["eval"]["eval"]
    assert last["loss"] != last["loss_ema"]


ONCE = ("train.max_steps=1", "eval.every_steps=1", "eval.every_epochs=0", "eval.before_first_step=false")


def composites(demo: Path, output: Path, background: Path, *overrides: str) -> int:
    """A training of one step whose videos are laid over a picture, as the command line ends it."""
    words = [*TRAINS, *ONCE, "eval.samples=1", "sample.formats=[composite]", f"sample.background={background}"]
    return cli.main(["train", str(demo / "config.yaml"), *words, f"output_dir={output}", *overrides])


def test_a_background_that_cannot_be_read_is_told_before_the_first_step(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "torn.png").write_bytes(b"no picture")
    assert composites(demo, tmp_path / "runs", tmp_path / "torn.png") == 2
    assert "sample.background" in capsys.readouterr().err and not list((tmp_path / "runs").glob("*/metrics.jsonl"))
    assert "loader" not in [thread.name for thread in threading.enumerate()]
    assert composites(demo, tmp_path / "runs", tmp_path / "torn.png", "eval.samples=0") == 0, "unused"


def test_a_background_that_is_lost_later_costs_its_videos_alone(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, measure = tmp_path / "grey.png", heldout.Evaluator.samples
    write_png(picture, np.full((16, 16, 3), 128, np.uint8))

    def samples(evaluator: heldout.Evaluator, *where: Any) -> dict[str, dict[str, float]]:
        picture.unlink()
        return measure(evaluator, *where)

    monkeypatch.setattr(heldout.Evaluator, "samples", samples)
    assert composites(demo, tmp_path / "runs", picture) == 0
    assert "grey.png is missing" in (tmp_path / "runs/latest/log.txt").read_text()
    assert lines(tmp_path / "runs/latest")[-1]["eval"]["eval"]["metrics"]
    assert not list(tmp_path.glob("runs/*/samples/*/*"))


def test_neither_lost_clips_nor_a_page_that_fails_end_the_training(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, measure = Path(shutil.copytree(demo / "data/eval", tmp_path / "held")), heldout.Evaluator.samples

    def samples(evaluator: heldout.Evaluator, folder: Path, *more: Any) -> dict[str, dict[str, float]]:
        shutil.rmtree(held)
        (folder.parents[1] / "report.html").mkdir()
        return measure(evaluator, folder, *more)

    monkeypatch.setattr(heldout.Evaluator, "samples", samples)
    cache = shutil.copytree(demo / "data/cache", tmp_path / "cache")  # which remembers what it saw of the lost files
    words = [*TRAINS, *ONCE, "eval.samples=1", f"data.eval={held}", f"data.cache_dir={cache}"]
    words.append(f"output_dir={tmp_path / 'runs'}")
    assert cli.main(["train", str(demo / "config.yaml"), *words]) == 0
    latest = tmp_path / "runs/latest"
    measures = lines(latest)[-1]["eval"]["held"]["metrics"]
    assert "channel_spread" in measures and "vae_psnr" not in measures
    said = (latest / "log.txt").read_text()
    assert "is measured without vae_psnr" in said and "report.html was not written" in said
    assert list(latest.glob("step1/*.safetensors"))


def test_matting_is_measured_against_the_clip_s_own_matte(evaluated: Path) -> None:
    measures = lines(evaluated)[-1]["eval"]["eval/rgb_to_aux"]["metrics"]
    assert {"mad", "mse", "sad", "grad", "conn", "iou"} <= measures.keys() and "rgb_drift" not in measures
    assert "mad" not in lines(evaluated)[-1]["eval"]["eval"]["metrics"], "a video from a caption has no reference"


def test_a_resumed_run_tells_each_evaluation_once(demo: Path, tmp_path: Path) -> None:
    folder = train(demo, tmp_path, *EVALUATES, "train.max_steps=2")
    metrics = folder / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)
    assert '"eval"' in kept[-1]
    train(demo, tmp_path, *EVALUATES, "train.max_steps=2", resume="")
    assert metrics.read_text().splitlines(keepends=True) == kept
    metrics.write_text("".join(kept[:-1]))  # as if it was stopped between the step and its evaluation
    train(demo, tmp_path, *EVALUATES, "train.max_steps=2", resume="")
    assert lines(folder)[-1]["eval"]["eval"]["loss"] == json.loads(kept[-1])["eval"]["eval"]["loss"]
