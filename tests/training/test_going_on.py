"""Going on from a checkpoint in another way: a new run with its steps from zero, or a fresh optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.trainings import exact, metrics, run, tensors
from transpixeler import cli
from transpixeler.runs.folder import ORIGIN

SHORT = ("train.max_steps=2", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def first(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps. Nobody goes on in this folder, only from it."""
    return run(demo, tmp_path_factory.mktemp("first"), *SHORT)


def command(demo: Path, output: Path, *words: str) -> Path:
    """Run `train` as a user does, for no further step unless words say so; return the latest run."""
    from tests.training.trainings import FAST

    keys = (f"output_dir={output}", *FAST, *SHORT)
    assert cli.main(["train", str(demo / "config.yaml"), *keys, *words]) == 0
    return (output / "latest").resolve()


def test_restarted_steps_keep_weights_and_optimizer_and_begin_the_order_anew(
    demo: Path, first: Path, tmp_path: Path
) -> None:
    before = sorted(str(path) for path in first.rglob("*"))
    still = ("optim.lr=0", "optim.weight_decay=0", "optim.force_lr=0")
    again = command(demo, tmp_path / "again", *still, "--resume", str(first), "--restart-steps")
    assert again != first and sorted(str(path) for path in first.rglob("*")) == before, "the first run is as it was"
    assert [line["samples"] for line in exact(again)] == [line["samples"] for line in exact(first)]
    assert [line["step"] for line in metrics(again)] == [line["step"] for line in metrics(first)]
    old, new = tensors(first, 2, tmp_path), tensors(again, 2, tmp_path)
    weights = [name for name in old if name.startswith("model.")]
    assert weights and all(torch.equal(old[name], new[name]) for name in weights)
    assert {int(new[name]) for name in new if name.endswith(".step")} == {4}, "Adam counts on"


def test_weights_alone_meet_a_fresh_optimizer(demo: Path, first: Path, tmp_path: Path) -> None:
    words = (
        "--resume",
        str(first),
        "--restart-steps",
        "--weights-only",
        "optim.name=sgd",
        "optim.lr=0",
        "optim.force_lr=0",
    )
    again = command(demo, tmp_path / "again", *words)
    old, new = tensors(first, 2, tmp_path), tensors(again, 2, tmp_path)
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("model."))
    assert not [name for name in new if "exp_avg" in name]


def test_weights_alone_go_on_in_the_run_at_its_step(demo: Path, tmp_path: Path) -> None:
    mine = run(demo, tmp_path, *SHORT)
    folder = command(demo, tmp_path, "--resume", str(mine), "--weights-only", "train.max_steps=4")
    assert folder == mine and [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    new = tensors(folder, 4, tmp_path)
    assert {int(new[name]) for name in new if name.endswith(".step")} == {2}, "Adam counts from zero"


def test_a_resumed_run_of_which_no_step_is_left_says_how_to_train_more(
    demo: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(demo, first.parent, "--resume", str(first))
    assert "2 done: none is left; raise train.max_steps or train.epochs to train more" in capsys.readouterr().err


def test_other_clips_are_no_hindrance_to_restarted_steps(demo: Path, first: Path, tmp_path: Path) -> None:
    words = ("--resume", str(first), "--restart-steps", f"data.train=[{{path: {demo / 'data/train'}, repeats: 2}}]")
    assert command(demo, tmp_path / "again", *words).is_dir()


def test_a_restarted_run_that_was_killed_at_once_begins_with_the_same_checkpoint(
    demo: Path, first: Path, tmp_path: Path
) -> None:
    whole = command(demo, tmp_path / "whole", "--resume", str(first), "--restart-steps")
    killed = tmp_path / "killed" / "run"  # what stands there from its first moment
    killed.mkdir(parents=True)
    for name in ("config.yaml", ORIGIN):
        (killed / name).write_bytes((whole / name).read_bytes())
    folder = command(demo, tmp_path / "killed", "--resume", str(killed))
    assert exact(folder) == exact(whole)
    old, new = tensors(whole, 2, tmp_path), tensors(folder, 2, tmp_path)
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--restart-steps",), "--restart-steps: says how --resume goes on; add --resume RUN"),
        (("--weights-only",), "--weights-only: says how --resume goes on; add --resume RUN"),
        (("--resume", "FIRST", "--restart-steps", "lora.rank=8"), "was trained with another model: lora.rank"),
        (("--resume", "FIRST", "--restart-steps", "optim.name=sgd"), "optim.name: 'adamw' there, 'sgd' here"),
        (("--resume", "EMPTY", "--restart-steps"), "has no checkpoint to begin with"),
        (("--resume", "nowhere", "--restart-steps"), "--resume: nowhere is no folder"),
    ],
)
def test_what_cannot_be_begun_with_is_one_line(
    demo: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    (empty := tmp_path / "empty").mkdir()
    (empty / "config.yaml").write_bytes((first / "config.yaml").read_bytes())
    named = [word.replace("FIRST", str(first)).replace("EMPTY", str(empty)) for word in words]
    keys = (f"output_dir={tmp_path / 'out'}", *SHORT)
    assert cli.main(["train", str(demo / "config.yaml"), *keys, *named]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transpixeler:")]
    assert said in line and not [*(tmp_path / "out").glob("*/config.yaml")]


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("--resume_from_checkpoint", "`--resume`"),
        ("--resume_from_checkpoint=latest", "`--resume`"),
        ("--reset_dataloader", "--restart-steps"),
        ("--reset_optimizer", "--weights-only"),
        ("--cache_only", "transpixeler cache CONFIG"),
        ("--deepspeed", "torchrun"),
    ],
)
def test_options_of_other_programs_are_answered_with_ours(
    capsys: pytest.CaptureFixture[str], word: str, ours: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "my.yaml", word])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert word.partition("=")[0] in last and ours in last
