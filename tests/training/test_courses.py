"""Runs that go on from where few go on: before any update, from an older checkpoint, with means newly turned on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager

from tests.support.ranks import run_ranks
from tests.training import trainings
from transpixeler.adapters import files as adapter_files
from transpixeler.adapters.saved import CONFIG
from transpixeler.config import loading
from transpixeler.config.sections import CheckpointConfig, UserError
from transpixeler.parallel import runtime
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import checkpoint, checkpointer, controls, opening, restore, training_state
from transpixeler.runs import folder as run_folder
from transpixeler.runs.restore import Restored
from transpixeler.training import optim, preflight, room, trainer

ONE = Runtime(0, 1, 0, torch.device("cpu"))


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(found) for found in checkpoint.candidates(folder / "checkpoints")]


def test_what_torch_draws_by_itself_is_drawn_again_after_a_resume(demo: Path, tmp_path: Path) -> None:
    short = ("lora.dropout=0.3", "train.max_steps=4", "checkpoint.every_steps=2")
    whole = trainings.run(demo, tmp_path / "whole", *short)
    killed = trainings.as_killed(whole, 2, tmp_path / "part")
    part = trainings.run(demo, tmp_path / "part", *short, resume=str(killed))
    assert trainings.exact(part) == trainings.exact(whole)


def test_another_course_from_an_older_checkpoint_replaces_the_first(demo: Path, tmp_path: Path) -> None:
    short = ("train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=1", "optim.ema=0")
    kept = ("checkpoint.keep=2",)
    folder = trainings.run(demo, tmp_path, *short, *kept)
    first = load_file(folder / "step4" / "adapter_model.safetensors")
    older = folder / "checkpoints" / checkpoint.folder_name(2)
    trainings.run(demo, tmp_path, *short, "optim.force_lr=0.1", "optim.ema=0.5", resume=str(older))
    second = load_file(folder / "step4" / "adapter_model.safetensors")
    assert trainings.difference(first, second) > 1e-3, "the last save is the first course's"
    state = checkpoint.read_state(folder / "checkpoints" / checkpoint.folder_name(4))
    assert state["config"]["optim"]["force_lr"] == 0.1, "the checkpoint of step 4 is the first course's"
    assert steps(folder) == [4] and steps(folder / "aside") == [4]
    assert (folder / "step4" / "ema").is_dir()


def _train_and_tell_what_is_copied(rank: int, world_size: int, path: Path, overrides: tuple[str, ...]) -> list[str]:
    copied: list[str] = []
    stage = DefaultStager.stage

    def told(self: DefaultStager, tensors: dict[str, torch.Tensor], **options: Any) -> Any:
        copied.extend(tensors)
        return stage(self, tensors, **options)

    with mock.patch.object(DefaultStager, "stage", told):
        trainer.train(loading.load(path, overrides), Runtime(rank, world_size, rank, torch.device("cpu")))
    return copied


def test_replicas_share_the_copying_of_what_all_of_them_hold(demo: Path, tmp_path: Path) -> None:
    short = ("train.max_steps=3", "checkpoint.every_steps=2", "optim.lr=1e-3", "run_name=shared")
    layout = ("parallel.replicate=2", "parallel.shard=2")
    overrides = (f"output_dir={tmp_path}", *trainings.FAST, *short, *layout)
    copied = [set(names) for names in run_ranks(_train_and_tell_what_is_copied, 4, demo / "config.yaml", overrides)]
    assert copied[0] == copied[1] and copied[2] == copied[3] and not copied[0] & copied[2]
    assert min(map(len, copied)) > 0.4 * len(copied[0] | copied[2])
    whole = trainings.tensors(tmp_path / "shared", 2, tmp_path)
    assert set(whole) == copied[0] | copied[2]
    alone = trainings.run(demo, tmp_path / "alone", *short)
    assert trainings.difference(whole, trainings.tensors(alone, 2, tmp_path)) < 1e-4


class Counting(torch.optim.SGD):
    """Works as some of other libraries do: finds its rate itself, keeps it in its groups, counts without tensors."""

    def __init__(self, params: Any, lr: float = 0.1, d0: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["d"] = d0

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["d"] *= 1.5
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    parameter.data.sub_(parameter.grad, alpha=group["lr"] * group["d"] / state["step"])


def test_an_optimizer_of_another_library_resumes_with_all_that_it_knows(demo: Path, tmp_path: Path) -> None:
    short = (
        "optim.name=tests.training.test_courses.Counting",
        "optim.args={d0: 0.5}",
        "train.max_steps=4",
        "checkpoint.every_steps=2",
    )
    whole = trainings.run(demo, tmp_path / "whole", *short)
    killed = trainings.as_killed(whole, 2, tmp_path / "part")
    part = trainings.run(demo, tmp_path / "part", *short, resume=str(killed))
    assert trainings.exact(part) == trainings.exact(whole)
    one, other = (trainings.tensors(folder, 4, tmp_path) for folder in (part, whole))
    assert trainings.difference(one, other) == 0


def _state_before_any_update(rank: int, world_size: int, folder: Path) -> list[int]:
    """Rank 1 trains nothing; the parameter `late` never had a gradient."""
    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    made = {name: torch.nn.Parameter(torch.ones(4)) for name in (("early", "late") if rank == 0 else ())}
    optimizer = torch.optim.AdamW(list(made.items())) if made else None
    if made:
        made["early"].grad = torch.ones(4)
        optimizer.step()
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(), here)
    keeper.save(1, training_state.optimizer_tensors(made, optimizer), {"step": 1}, wait=True)
    found = checkpoint.latest(folder, here)
    fresh = torch.optim.AdamW(list(made.items())) if made else None
    training_state.materialize(fresh)
    restore.forget_unsaved(Restored.read(found), made, fresh)
    restore.load(Restored.read(found), training_state.optimizer_tensors(made, fresh), same_layout=True)
    return [len(fresh.state[p]) for p in made.values()]


def test_a_parameter_that_was_never_updated_resumes_without_state(tmp_path: Path) -> None:
    assert run_ranks(_state_before_any_update, 2, tmp_path) == [[3, 0], []]


def _eight_bits_on_one_rank(rank: int, world_size: int, folder: Path) -> bool:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from tests.support import tiny

    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    made = {"wide": torch.nn.Parameter(torch.ones(64, 128))} if rank == 0 else {}
    optimizer = optim.build(made, tiny.config("optim.name=adamw8bit").optim)
    training_state.materialize(optimizer)
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(), here)
    keeper.save(1, training_state.optimizer_tensors(made, optimizer), {"step": 1}, wait=True)
    found = checkpoint.latest(folder, here)
    restore.load(Restored.read(found), training_state.optimizer_tensors(made, optimizer), same_layout=True)
    return True


def test_a_rank_without_quantized_moments_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    assert run_ranks(_eight_bits_on_one_rank, 2, tmp_path, timeout=120) == [True, True]


def _blocked_save(rank: int, world_size: int, folder: Path) -> tuple[str, str]:
    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(), here)
    if rank == 0:
        (folder / f"{checkpoint.folder_name(1)}.tmp").touch()  # a file where the folder should be made
    here.barrier()
    tensors = {f"model.{rank}": torch.ones(4)}
    return keeper.save(1, tensors, {"step": 1}), keeper.save(2, tensors, {"step": 2}, wait=True)


def test_a_checkpoint_whose_folder_cannot_be_made_is_told_on_all_ranks(tmp_path: Path) -> None:
    for first, second in run_ranks(_blocked_save, 2, tmp_path):
        assert "the checkpoint of step 1 was not written: FileExistsError" in first and not second


def _open_damaged(rank: int, world_size: int, chosen: Path) -> tuple[list[str], str]:
    hashed, digest = [], checkpoint.digest
    checkpoint.digest = lambda file: hashed.append(file.name) or digest(file)
    config = loading.from_overrides([f"output_dir={chosen.parents[2]}"])
    with pytest.raises(UserError) as told:
        opening.open_run(config, Runtime(rank, world_size, rank, torch.device("cpu")), str(chosen))
    return hashed, str(told.value)


def test_a_checkpoint_that_is_named_is_hashed_by_all_ranks_together_and_refused_by_all(tmp_path: Path) -> None:
    chosen = tmp_path / "mine" / "checkpoints" / checkpoint.folder_name(1)
    chosen.mkdir(parents=True)
    (tmp_path / "mine" / CONFIG).touch()
    names = [".metadata", *(f"__{n}_0.distcp" for n in range(4)), "state.json"]
    for name in names:
        (chosen / name).write_text("whole")
    listed = {name: {"size": 5, "blake2b": checkpoint.digest(chosen / name)} for name in names}
    (chosen / checkpoint.MANIFEST).write_text(json.dumps({"format": 1, "files": listed}))
    (chosen / names[-1]).write_text("whale")
    hashed, told = zip(*run_ranks(_open_damaged, 2, chosen), strict=True)
    assert hashed == (names[0::2], names[1::2])
    assert f"{names[-1]} has changed since it was written" in told[0] and told[0] == told[1]


def test_saves_and_samples_of_a_course_that_was_left_are_not_taken_for_the_newest(demo: Path, tmp_path: Path) -> None:
    short = ("save.every_steps=2", "checkpoint.every_steps=2", "checkpoint.keep=3", "train.max_steps=4")
    folder = trainings.run(demo, tmp_path, *short)
    (folder / "samples" / "step00000004" / "0-a").mkdir(parents=True)
    (folder / ".step9.tmp").mkdir()
    older = folder / "checkpoints" / checkpoint.folder_name(2)
    trainings.run(demo, tmp_path, *short, "train.max_steps=3", resume=str(older))
    assert adapter_files.adapter_file(folder).parent.name == "step3"
    assert {f.name for f in folder.glob("step*")} == {"step2", "step3"} and not (folder / ".step9.tmp").exists()
    assert (folder / "aside/step4").is_dir() and (folder / "aside/samples/step00000004/0-a").is_dir()
    trainings.run(demo, tmp_path, *short, resume="")
    assert (folder / "step4").is_dir() and not (folder / "aside/step4").exists()


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (("streams={rgb: '', seg: _seg, more: _seg2}",), ("streams.more=null",), "streams.more: '_seg2' there, None"),
        (("lora.ranks={'*.q': 2}",), ("lora.ranks={'*.q': null}",), r"lora.ranks.\*.q: 2 there"),
    ],
)
def test_what_is_left_out_of_a_config_is_a_change_too(tmp_path: Path, first: tuple, then: tuple, told: str) -> None:
    plain = loading.plain(loading.from_overrides(first))
    restored = Restored(tmp_path, {"config": plain}, Metadata({}))
    assert opening.changes(loading.from_overrides(first), restored) == {}
    with pytest.raises(UserError, match=told):
        opening.changes(loading.from_overrides([*first, *then]), restored)


def release(run: run_folder.Run) -> None:
    """End a run as its process does."""
    assert run.lock is not None
    run.lock.release()


def test_requests_of_a_job_that_was_killed_are_not_those_of_the_next(tmp_path: Path) -> None:
    config = loading.from_overrides([f"output_dir={tmp_path}", "run_name=mine"])
    made = opening.open_run(config, ONE, None)
    (made.folder / "save_quit").touch()
    release(made)
    again = opening.open_run(config, ONE, str(made.folder))
    assert not (again.folder / "save_quit").exists()


def test_resume_alone_means_the_run_that_the_config_names_or_else_the_latest(tmp_path: Path) -> None:
    unnamed, mine, absent = (
        loading.from_overrides([f"output_dir={tmp_path}", *words])
        for words in ((), ("run_name=mine",), ("run_name=absent",))
    )
    release(opening.open_run(mine, ONE, None))  # stopped before its first step, so that it never was the latest
    latest = opening.open_run(unnamed, ONE, None)
    opening.begin(latest, unnamed)
    release(latest)
    assert opening.open_run(unnamed, ONE, "").folder == latest.folder
    assert opening.open_run(mine, ONE, "").folder == tmp_path / "mine"
    with pytest.raises(UserError, match=r"absent is no folder; leave --resume out"):
        opening.open_run(absent, ONE, "")


def test_sigterm_ends_a_run_that_has_not_begun_and_saves_one_that_has(tmp_path: Path) -> None:
    with controls.listening(run_folder.Run(tmp_path), ONE) as asked:
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
        assert left.value.code == 143 and asked.poll() == (False, False)
        asked.started = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.poll() == (True, True)


def _fails_inside(rank: int, world_size: int) -> bool:
    """Check that a group is left alone by a rank that fails, and taken apart by one that does not."""
    os.environ["MASTER_ADDR"] = "localhost"
    for error in (ValueError, None):
        try:
            with runtime.running(device="cpu"):
                if error:
                    raise error
        except ValueError:
            assert dist.is_initialized(), "the others are still waiting in it"
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # what the helper takes apart
    return True


def test_a_rank_that_fails_does_not_wait_for_the_others() -> None:
    assert run_ranks(_fails_inside, 2) == [True, True]


def test_bf16_parameters_do_not_go_with_offload(demo: Path) -> None:
    from transpixeler.config import loading
    from transpixeler.config.sections import UserError

    config = loading.load(demo / "config.yaml", ["optim.bf16_parameters=true", "parallel.offload=true"])
    with pytest.raises(UserError, match=r"optim.bf16_parameters: shards and offload"):
        preflight.check(config, Layout(1, 1, 1))


def test_offload_does_not_go_with_a_backward_pass_in_two_parts() -> None:
    chosen = ["parallel.pipeline=2", "parallel.schedule=interleaved-zero-bubble", "parallel.offload=true"]
    config = loading.from_overrides([*chosen, "model.path=a", "data.train=[b]", "train.epochs=1"])
    with pytest.raises(UserError, match=r"parallel.offload: .* parallel.schedule=interleaved-zero-bubble"):
        preflight.check(config, Layout(2, 1, 1))


def test_outputs_of_flex_are_kept_by_compiled_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["model.attention=flex", "model.path=a", "data.train=[b]", "train.epochs=1"]
    uncompiled, kept = "parallel.compile=off", "parallel.recompute=attention"
    monkeypatch.setattr(room, "KEEPS_FLEX", "2.0")
    for keys in ([kept], [uncompiled]):  # the latter is auto, which chooses another way
        preflight.check(loading.from_overrides([*chosen, *keys]), Layout(1, 1, 1))
    config = loading.from_overrides([*chosen, kept, uncompiled])
    with pytest.raises(UserError, match=r"parallel.recompute: attention cannot keep .* model.attention=flex"):
        preflight.check(config, Layout(1, 1, 1))
    monkeypatch.setattr(room, "KEEPS_FLEX", "99.0")
    with pytest.raises(UserError, match=r"model.attention=flex before torch 99.0, and this is .*; set full"):
        preflight.check(loading.from_overrides([*chosen, kept]), Layout(1, 1, 1))
