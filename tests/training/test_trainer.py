"""A run does what its user expects: its folder, its saves, its answers to signals and to what goes wrong."""

from __future__ import annotations

import importlib.util
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.ranks import RanksFailed, run_ranks
from tests.training.trainings import FAST, difference, layout, metrics, run, run_here, start, wait_for_step
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter
from transpixeler.adapters.on_model import apply_adapter
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.models import lora
from transpixeler.models.weights import load_weights
from transpixeler.parallel.runtime import Runtime
from transpixeler.planning import plan
from transpixeler.runs import checkpoint
from transpixeler.sampling.model import base_weights, make_model
from transpixeler.training import preflight, trainer
from transpixeler.training.estimates import Machine

# --- what the user finds ---------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_design_says(straight: Path) -> None:
    there = {path.relative_to(straight).as_posix() for path in straight.rglob("*")}
    wanted = ("config.yaml", "manifest.json", "metrics.jsonl", "log.txt", "step8/adapter_model.safetensors")
    assert set(wanted) <= there and "step8/ema/adapter_config.json" in there
    assert (straight.parent / "latest").resolve() == straight
    assert loading.load(straight / "config.yaml").train.max_steps == 8
    line = metrics(straight)[-1]
    assert {"seconds", "data_wait", "tokens_per_second", "tflops", "memory_gib"} <= line.keys()


def test_a_mistake_in_the_data_leaves_no_run_behind(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="the source does not exist"):
        run(demo, tmp_path, "run_name=mine", "data.train=[nowhere]")
    assert not (tmp_path / "latest").exists() and not (tmp_path / "mine").exists()
    assert run(demo, tmp_path, "run_name=mine", "train.max_steps=1") == (tmp_path / "latest").resolve()


def test_an_adapter_that_the_disk_refuses_is_told_and_training_goes_on(demo: Path, tmp_path: Path) -> None:
    short = ("run_name=mine", "save.every_steps=1")
    run(demo, tmp_path, *short, "train.max_steps=1")
    folder = tmp_path / "mine"
    (folder / "step2").write_text("a file where the save's folder would be")
    run(demo, tmp_path, *short, "train.max_steps=3", ranks=2, resume="")
    log = (folder / "log.txt").read_text()
    assert "step2 was not written" in log and "training goes on" in log
    assert (folder / "step2").is_file() and (folder / "step3" / "adapter_model.safetensors").exists()


def test_a_stage_that_trains_nothing_saves_means_and_starts_from_an_adapter(demo: Path, tmp_path: Path) -> None:
    first_block = ("lora.targets=[blocks.0.self_attn.*]", "train.max_steps=1", "save.every_steps=1", *layout(2, 1, 1))
    folder = run(demo, tmp_path, *first_block, ranks=2)
    assert (folder / "step1" / "ema" / "adapter_model.safetensors").exists()
    again = run(demo, tmp_path, *first_block, f"lora.init_from={folder / 'step1'}", "optim.lr=1e-12", ranks=2)
    one, other = (load_file(f / "step1" / "adapter_model.safetensors") for f in (folder, again))
    assert difference(one, other) < 1e-9


def published(config: Config, file: Path) -> Path:
    """Write an adapter as the published code does: on ten linears of each block, some of them on all streams."""
    torch.manual_seed(3)
    model, stored = make_model(config), {}
    for name, linear in lora.targets(model).items():
        shapes = {"lora_A": (4, linear.in_features), "lora_B": (linear.out_features, 4)}
        stored |= {f"diffusion_model.{name}.{kind}.weight": 0.2 * torch.randn(s) for kind, s in shapes.items()}
    stored["transformer.modality_embedding"] = 0.2 * torch.randn(1, model.embed.stream_embedding["seg"].shape[0])
    save_file(stored, file)
    file.with_name("adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    return file


@torch.no_grad()
def output(config: Config, adapter: Adapter) -> torch.Tensor:
    model = make_model(config)
    load_weights(model, base_weights(config))
    apply_adapter(model, adapter)
    torch.manual_seed(4)
    x, text = torch.randn(2, 2, 16, 2, 8, 8), torch.randn(2, 512, model.fields[0].width)
    return model(x.flatten(1), torch.rand(2, 2), text, layout=model.layout((16, 2, 8, 8)))


def test_training_starts_and_goes_on_as_the_published_adapter_that_it_starts_from(demo: Path, tmp_path: Path) -> None:
    config = loading.load(demo / "config.yaml")
    file = published(config, tmp_path / "published.safetensors")
    adapter = read_adapter(file)
    one_scope = replace(adapter, scopes=dict.fromkeys(adapter.targets, "all"))
    assert (output(config, adapter) - output(config, one_scope)).abs().max() > 0.01
    words = ("lora.targets=[self_attn.*, cross_attn.*, ffn.*]", "lora.rank=4", f"lora.init_from={file}")
    assert plan.make_plan(
        loading.load(demo / "config.yaml", words), "cpu", Machine(1, 0, 0, "cpu")
    ).trainable_parameters
    words = (*words, "optim.lr=1e-12", "optim.ema=0", "checkpoint.every_steps=1")
    folder = run(demo, tmp_path / "out", *words, "train.max_steps=1")
    file.unlink()  # a resumed run does not ask for it
    run(demo, tmp_path / "out", *words, "train.max_steps=2", resume="")
    for name in ("step1", "step2"):
        assert (output(config, read_adapter(folder / name)) - output(config, adapter)).abs().max() < 1e-4


def test_what_was_there_before_a_run_is_never_removed(demo: Path, tmp_path: Path) -> None:
    """Whatever is wrong with the input: a folder of clips, all runs, one run."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    made = run(demo, tmp_path, "run_name=mine", "train.max_steps=1")
    for words, resume, message in (
        (("run_name=clips",), None, "clips: holds files that are not a run"),
        ((), str(tmp_path), "is no run, as it has no config.yaml"),
        ((), str(tmp_path / "clips"), "is no run"),
        (("data.train=[nowhere]",), str(made), "the source does not exist"),
    ):
        with pytest.raises(RanksFailed, match=message):
            run(demo, tmp_path, *words, resume=resume)
    assert (tmp_path / "clips" / "a.mp4").exists() and (made / "step1" / "adapter_model.safetensors").exists()


def test_a_run_whose_every_checkpoint_is_damaged_is_not_begun_anew(demo: Path, tmp_path: Path) -> None:
    folder = run(demo, tmp_path, "train.max_steps=1")
    for found in checkpoint.candidates(folder / "checkpoints"):
        (found / checkpoint.MANIFEST).unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RanksFailed, match=r"no checkpoint in .* is valid"):
        run(demo, tmp_path, "train.max_steps=2", resume="")
    assert (folder / "metrics.jsonl").read_bytes() == before and (folder / "step1").is_dir()


def test_a_run_name_is_not_taken_twice(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, "run_name=mine", "train.max_steps=1")
    with pytest.raises(RanksFailed, match="a run of this name exists; add --resume"):
        run(demo, tmp_path, "run_name=mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.global_batch=5",
            r"train.global_batch: 5 samples do not divide over 2 data ranks .*; 4 would, .* 5 divide over 1:",
        ),
        ("train.max_steps=0", "train.epochs: set it or train.max_steps"),
        ("model.path=", "model.path: set it"),
        ("data.train=[]", "data.train: set it"),
        ("objective.tasks={rgb_to_depth: 1}", "objective.tasks.rgb_to_depth: not a task"),
    ],
)
def test_a_config_that_cannot_train_is_told_before_anything_is_loaded(demo: Path, override: str, message: str) -> None:
    from transpixeler.parallel.mesh import Layout

    config = loading.load(demo / "config.yaml", [override])
    with pytest.raises(UserError, match=message):
        preflight.check(config, Layout(1, 2, 1))


def test_a_project_of_wandb_without_wandb_is_told_before_anything_is_made(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else there(name, *of))
    config = loading.load(demo / "config.yaml", [f"output_dir={tmp_path}", "run_name=mine", "log.wandb=project"])
    with pytest.raises(UserError, match=r"log.wandb: needs wandb; pip install 'transpixeler\[wandb\]'"):
        trainer.train(config, Runtime(0, 1, 0, torch.device("cpu")))
    assert not list(tmp_path.iterdir())


# --- the base stays --------------------------------------------------------------------------------------------------


def _frozen_before_and_after(rank: int, world_size: int, path: Path, overrides: tuple[str, ...]) -> tuple[int, int]:
    from transpixeler.parallel import mesh
    from transpixeler.runs import controls, opening

    config = loading.load(path, overrides)
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    place = opening.open_run(config, runtime, None)
    with controls.listening(place, runtime) as asked:
        it = trainer.Trainer(config, runtime, mesh.resolve(config.parallel, world_size), place, asked)
        frozen = {n: p.clone() for n, p in it.engine.named_parameters() if not p.requires_grad}
        it.train()
        it.close()
        same = sum(torch.equal(frozen[n], p) for n, p in it.engine.named_parameters() if n in frozen)
    return same, len(frozen)


def test_every_frozen_weight_is_bit_identical_after_training(demo: Path, tmp_path: Path) -> None:
    overrides = (f"output_dir={tmp_path}", *FAST, "train.max_steps=3")
    ((same, frozen),) = run_ranks(_frozen_before_and_after, 1, demo / "config.yaml", overrides)
    assert same == frozen > 100


# --- asked to save, asked to stop ------------------------------------------------------------------------------------


def test_save_quit_ends_a_run_with_a_checkpoint(demo: Path, tmp_path: Path) -> None:
    process = start(demo, tmp_path, "train.max_steps=500")
    wait_for_step(process, tmp_path, 2)
    (tmp_path / "latest" / "save_quit").touch()
    assert process.wait(300) == 0
    folder = (tmp_path / "latest").resolve()
    last = metrics(folder)[-1]["step"]
    checkpoint.check(folder / "checkpoints" / checkpoint.folder_name(last))
    assert last < 500 and not (folder / "save_quit").exists()


def test_sigusr1_saves_and_goes_on(demo: Path, tmp_path: Path) -> None:
    process = start(demo, tmp_path, "train.max_steps=24", "checkpoint.every_steps=0")
    wait_for_step(process, tmp_path, 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == 0, process.stderr.read()
    steps = [checkpoint.step_of(f) for f in checkpoint.candidates((tmp_path / "latest" / "checkpoints").resolve())]
    assert len(steps) == 2 and steps[0] == 24 and steps[1] < 24


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(demo: Path, tmp_path: Path) -> None:
    import resource

    often = ("checkpoint.every_steps=2", "checkpoint.asynchronous=false", "train.max_steps=400")
    process = start(demo, tmp_path, *often, "lora.rank=8")
    wait_for_step(process, tmp_path, 3)
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, unlimited[1]))  # no file grows further
    wait_for_step(process, tmp_path, 8)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0, process.stderr.read()
    assert metrics(tmp_path / "latest")[-1]["step"] < 400
    log = (tmp_path / "latest" / "log.txt").read_text()
    assert "was not written" in log and "training goes on" in log and " GB are free there" in log
    assert "File too large" in log or "a file was cut off" in log
    found = checkpoint.candidates((tmp_path / "latest" / "checkpoints").resolve())
    for folder in found:
        checkpoint.check(folder)
    assert found


def _nonfinite(rank: int, world_size: int, path: Path, overrides: tuple[str, ...]) -> str:
    """Train with a base that overflows."""
    from transpixeler.models import noising

    original = noising.Noising.errors
    noising.Noising.errors = lambda *arguments: original(*arguments) * float("inf")
    try:
        run_here(rank, world_size, path, overrides, None)
    except trainer.TrainingFailed as error:
        return str(error)
    return ""


def test_steps_that_are_not_finite_end_the_run_with_a_checkpoint(demo: Path, tmp_path: Path) -> None:
    overrides = (f"output_dir={tmp_path}", *FAST, "train.nonfinite_limit=3", "checkpoint.every_steps=0")
    for message in run_ranks(_nonfinite, 2, demo / "config.yaml", overrides):
        assert "3 steps in a row were not finite" in message
    folder = (tmp_path / "latest").resolve()
    checkpoint.check(folder / "checkpoints" / checkpoint.folder_name(3))
    assert "samples train/" in (folder / "log.txt").read_text()
