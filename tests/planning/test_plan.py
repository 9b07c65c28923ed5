"""What `plan` says beforehand is what a real run does: steps and drops exactly, memory nearly, in a blink."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import tiny
from tests.support.bytes_held import BytesHeld
from tests.support.ranks import run_ranks
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data import survey
from transpixeler.data.media.clip import Media
from transpixeler.data.media.probe import Probes
from transpixeler.data.sources.candidate import BadSample
from transpixeler.data.sources.pairs import Scan, scan
from transpixeler.data.sources.samples import Sample
from transpixeler.families.wan import model as wan
from transpixeler.parallel import mesh
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.runtime import Runtime
from transpixeler.planning import layouts, plan, text
from transpixeler.runs import controls, opening
from transpixeler.training import estimates, trainer

WAN_1_3B = {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "in_dim": 16,
            "out_dim": 16, "freq_dim": 256, "text_len": 512, "eps": 1e-6}  # fmt: skip
QUIET = (
    "train.max_steps=2",
    "train.epochs=0",
    "checkpoint.every_steps=0",
    "save.every_steps=0",
    "save.every_epochs=0",
    "log.tensorboard=false",
    "eval.before_first_step=false",
    "eval.every_epochs=0",
)


def planned(config: Config, **options: Any) -> plan.Plan:
    asked = {"gpus": 0, "memory": 0.0, "device": "cpu", "peak": 0.0} | options
    return plan.make_plan(config, *plan.find_machine(config, **asked))


# --- against real runs -----------------------------------------------------------------------------------------------


def _measured(rank: int, world_size: int, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A run's own numbers, and the most bytes that its tensors held at a time while it trained."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.set_num_threads(1)
    config = loading.load(path, overrides)
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    run = opening.open_run(config, runtime, None)
    with controls.listening(run, runtime) as asked:
        made = trainer.Trainer(config, runtime, mesh.resolve(config.parallel, world_size), run, asked)
        made.keeper.finish = lambda controls: None  # a checkpoint holds copies, which on a GPU lie in host memory
        gc.collect()
        whole_text = mock.patch.object(wan, "fold_padding", lambda rows: (rows, None))  # as a GPU computes it
        with BytesHeld() as held, whole_text:
            made.train()
        facts = {
            "peak": held.peak,
            "trained": sum(p.numel() for p in made.state.parameters.values()),
            "weights": sum(p.numel() * p.element_size() for _, p in made.engine.named_parameters()),
            "steps": [made.schedule.order.steps(0), made.schedule.total],
            "dropped": {"train": made.data.train.skipped, "eval": made.data.eval.skipped},
            "buckets": {tuple(key): n for key, n in made.data.train.buckets().items()},
        }
        made.close()
    return facts


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("parallel.recompute=attention", "optim.ema=0.9"),
        ("parallel.recompute=full", "train.micro_batch=4"),
        ("parallel.recompute=full", "train.micro_batch=4", "parallel.keep_gb=0.02"),
        ("lora.enabled=false", "parallel.recompute=full"),
    ],
)
def test_a_run_does_what_was_planned(demo: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """The demo's images and short clips fit no bucket, so some are dropped; two epochs meet every other bucket."""
    epoch = ("train.epochs=2", "train.max_steps=0", "train.global_batch=4")
    overrides = (f"output_dir={tmp_path}", *QUIET, "data.frames=[17]", *epoch, *overrides)
    (run,) = run_ranks(_measured, 1, demo / "config.yaml", overrides)
    made = planned(loading.load(demo / "config.yaml", overrides))
    assert made.trainable_parameters == run["trained"]
    assert [made.steps_first_epoch, made.steps] == run["steps"]
    assert dict(made.dropped) == run["dropped"] and made.dropped["train"]
    assert {tuple(row.bucket): row.clips for row in made.rows} == run["buckets"]
    memory = made.memory[str(made.recompute)]
    assert memory.weights == run["weights"]
    assert memory.total == pytest.approx(run["peak"], rel=0.15)


def test_epochs_give_the_steps_that_training_takes(demo: Path) -> None:
    config = loading.load(demo / "config.yaml", ["train.epochs=3", "train.max_steps=0", "train.global_batch=4"])
    made = planned(config)
    assert made.steps == sum(-(-row.seen * 3 // 4) for row in made.rows)
    assert made.steps_epoch == sum(row.seen for row in made.rows) / 4


def test_what_training_would_refuse_is_refused(demo: Path) -> None:
    for override in ("train.global_batch=1000", "data.train=[]", "objective.tasks={dance: 1}"):
        with pytest.raises(UserError):
            planned(loading.load(demo / "config.yaml", [override]))


# --- large models, from a config alone -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Wan 1.3B, of which there is no weight here, on clips taken to be large."""
    folder = tmp_path_factory.mktemp("wan")
    (folder / "config.json").write_text(json.dumps(WAN_1_3B))
    keys = ["data.sizes=[[832, 480, 17]]", "data.upscale=true", f"model.path={folder}", "lora.rank=128"]
    return loading.load(demo / "config.yaml", [*keys, "train.global_batch=8", "train.micro_batch=1"])


def test_a_published_models_figures_need_no_weights(large: Config) -> None:
    made = planned(large, device="h100")
    assert made.parameters - made.trainable_parameters == pytest.approx(1.419e9, rel=0.001)
    assert made.trainable_parameters == pytest.approx(128 * 1.18e6, rel=0.01)
    assert made.memory["none"].total > made.memory["attention"].total > made.memory["full"].total
    assert made.flop_step / made.seconds_step == pytest.approx(estimates.UTILISATION * 989e12, rel=1e-6)


def test_what_auto_recomputes_on_a_machine_is_said_with_its_reason(large: Config) -> None:
    made = planned(large, device="h100")
    needed = f"{made.memory['none'].total / plan.GIB:.3g} GiB"
    assert f"auto     recompute: none, as it takes {needed} by `plan`'s estimate, and 64 GiB" in text.describe(made)
    asked = planned(replace(large, parallel=replace(large.parallel, recompute="none")), device="h100")
    assert "auto  " not in text.describe(asked) and asked.flop_step == made.flop_step


def test_the_best_layout_of_a_machine_with_room_recomputes_and_shards_nothing(large: Config) -> None:
    best, *_ = planned(large, device="h100", gpus=8).fits
    assert best.settings == (
        "parallel.pipeline=1", "parallel.replicate=8", "parallel.shard=1", "parallel.recompute=none",
    )  # fmt: skip


def test_a_layout_is_named_only_where_it_fits_and_is_what_the_config_would_be(large: Config) -> None:
    made = planned(large, device="4090", gpus=2)
    assert made.fits
    for way in made.fits:
        config = _with(large, way.settings)
        again = planned(config, device="4090", gpus=2)
        assert again.memory[str(again.recompute)] == way.memory
        assert way.memory.total <= layouts.USABLE_MEMORY * 24 * plan.GIB
        assert again.seconds_step == pytest.approx(way.seconds)
    assert [way.seconds for way in made.fits] == sorted(way.seconds for way in made.fits)


def _with(config: Config, settings: Sequence[str]) -> Config:
    values = dict(setting.removeprefix("parallel.").split("=") for setting in settings)
    numbers = {name: int(value) if value.isdigit() else value for name, value in values.items()}
    return replace(config, parallel=replace(config.parallel, **numbers))


def _keys(way: layouts.Fit) -> set[str]:
    return {setting if setting.startswith("model") else setting.partition("=")[0] for setting in way.settings}


def test_a_small_card_gets_ways_to_make_room(large: Config) -> None:
    made = planned(large, device="4090", memory=5)
    assert made.fits and all({"model.quantize=int8", "parallel.offload"} & _keys(w) for w in made.fits)
    nothing = planned(large, device="4090", memory=1)
    assert not nothing.fits and "no layout fits" in text.describe(nothing)


def test_no_more_blocks_wait_than_it_takes(large: Config) -> None:
    made = planned(large, device="4090", memory=6.5)
    (way,) = made.fits
    said = dict(setting.split("=") for setting in way.settings)
    count = int(said["parallel.offload"])
    assert 2 < count < 30 and f"the weights of {count} of 30 blocks wait in host memory" in text.describe(made)
    (more, less) = (_waiting_plan(large, way, number) for number in (count, count - 1))
    assert more.memory[said["parallel.recompute"]] == way.memory
    room = layouts.USABLE_MEMORY * 6.5 * plan.GIB
    assert way.memory.total <= room < less.memory[said["parallel.recompute"]].total
    assert more.seconds_step == way.seconds


def _waiting_plan(config: Config, way: layouts.Fit, count: int) -> plan.Plan:
    settings = [setting for setting in way.settings if "offload=" not in setting]
    changed = _with(config, settings)
    return planned(replace(changed, parallel=replace(changed.parallel, offload=count)), device="4090", memory=6.5)


def test_a_budget_is_used_by_whole_blocks_and_never_exceeded(large: Config) -> None:
    full = planned(replace(large, parallel=replace(large.parallel, recompute="full")), device="h100")
    plain, seconds, found = full.memory["full"], [full.seconds_step], []
    for budget in (2, 8, 30):
        config = replace(large, parallel=replace(large.parallel, recompute="full", keep_gb=budget))
        made = planned(config, device="h100")
        found.append(max(kept.blocks for kept in made.kept_whole))
        assert 0 <= made.memory["full"].activations - plain.activations <= budget * plan.GIB
        seconds.append(made.seconds_step)
        assert "blocks of the first rank that recompute nothing: " in text.describe(made)
        assert all("parallel.recompute=none" not in way.settings for way in made.fits)
    assert found == sorted(set(found)), "the more it may take, the more blocks"
    assert seconds == sorted(set(seconds), reverse=True), "and the less is computed anew"


def test_inputs_without_room_in_host_memory_stay_on_the_gpu(large: Config) -> None:
    kept, seconds = [], []
    for budget in (0, 20, 1, 0.001):
        config = replace(large, parallel=replace(large.parallel, recompute="offload", host_gb=budget))
        made = planned(config, device="h100")
        kept.append(made.memory["offload"].activations)
        seconds.append(made.seconds_step)
    inputs = kept[3] - kept[0]
    assert kept[0] <= kept[1] < kept[2] < kept[3], "0 is no limit"
    assert 0.5 * plan.GIB <= kept[3] - kept[2] <= plan.GIB, "what leaves is the budget, in powers of two"
    assert kept[3] == pytest.approx(made.memory["full"].activations, rel=0.1), "all stay, as with full recompute"
    assert seconds == sorted(seconds, reverse=True) and inputs > plan.GIB


def test_stages_and_shards_divide_what_a_rank_holds(large: Config) -> None:
    whole, cut, staged = (
        planned(_with(large, s), device="h100", gpus=4).memory["full"]
        for s in (
            ("parallel.replicate=4",),
            ("parallel.replicate=1", "parallel.shard=4"),
            ("parallel.replicate=1", "parallel.pipeline=4"),
        )
    )
    assert cut.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    assert cut.weights < 0.45 * whole.weights
    assert staged.optimizer == pytest.approx(whole.optimizer * 7 / 30, rel=0.01), "the first rank, of 30 blocks over 4"


@pytest.mark.parametrize(
    ("adapter", "pipeline", "offload", "kept", "waiting"),
    [
        (True, 1, False, 1 / 4, 1),  # of what is trained; an adapter's gradients wait for the last microbatch
        (False, 1, False, 1 / 4, 1 / 30),
        (False, 2, False, 1 / 8, 1 / 2),  # a schedule lets all of a stage's wait
        (False, 2, True, 0, 1 / 30),
        (True, 1, True, 0, 1),
    ],
)
def test_gradients_are_held_whole_until_they_are_reduced(
    large: Config, adapter: bool, pipeline: int, offload: bool, kept: float, waiting: float
) -> None:
    config = replace(large, lora=replace(large.lora, enabled=adapter))
    config = replace(config, parallel=replace(config.parallel, pipeline=pipeline, shard=4, offload=offload))
    made = planned(config, device="h100", gpus=4 * pipeline)
    assert made.memory["full"].gradients == pytest.approx(4 * made.trainable_parameters * (kept + waiting), rel=0.04)


def test_the_first_rank_of_a_pipeline_holds_the_most_microbatches() -> None:
    config = Config().parallel
    assert [estimates.in_flight(config, 4, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert estimates.in_flight(replace(config, schedule="gpipe"), 4, 0, 8) == 8
    assert estimates.in_flight(config, 1, 0, 8) == 1


def _received(rank: int, world_size: int, schedule: str) -> float:
    """Hidden states of each microbatch that a rank's schedule makes room for."""
    tiny.WAN["num_layers"] = 2 * world_size  # of this process alone
    count = 2 * world_size
    config = tiny.config(f"train.global_batch={count}", f"parallel.pipeline={world_size}", schedule)
    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    joined = mesh.build(mesh.resolve(config.parallel, world_size), here)
    engine = build_engine(config, joined, lambda: tiny.make(config), tiny.seeded(config))
    example = tiny.example(config, 1, range(count))
    watched = (mock.patch.object(torch, name, wraps=getattr(torch, name)) for name in ("empty", "empty_strided"))
    with next(watched) as before_2_13, next(watched) as made:
        engine.forward_backward(example, 1)
    hidden = (1, example.layout.tokens, engine.costs.width)
    calls = [*before_2_13.call_args_list, *made.call_args_list]
    sizes = [call.kwargs.get("size", *call.args[:1]) for call in calls]
    return sum(isinstance(size, Sequence) and tuple(size) == hidden for size in sizes) / count


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b"])
def test_a_schedule_has_room_for_every_microbatch_from_either_side(schedule: str) -> None:
    override = f"parallel.schedule={schedule}"
    parallel = tiny.config(override).parallel
    assert run_ranks(_received, 3, override) == [estimates.receive_buffers(parallel, 3, rank) for rank in range(3)]
    assert estimates.receive_buffers(parallel, 1, 0) == 0


def test_room_for_what_stages_receive_is_planned(large: Config) -> None:
    """Twice the microbatches compute no more at a time on the first of four ranks, but are all received."""
    staged = _with(large, ("parallel.replicate=1", "parallel.pipeline=4"))
    more, less = (
        planned(replace(staged, train=replace(staged.train, global_batch=batch)), device="h100", gpus=4).memory["full"]
        for batch in (8, 4)
    )
    hidden = 2 * 2 * (5 * 30 * 52) * 1536  # 16 bits of two streams
    assert more.activations - less.activations >= 4 * hidden


def test_no_layout_is_told_that_training_refuses() -> None:
    config = loading.from_overrides(["parallel.schedule=interleaved-zero-bubble", "parallel.offload=true"])
    assert {layout.pipeline for layout in layouts.layouts(config, 30, 4)} == {1}


def test_every_layout_of_some_gpus_divides_the_batch() -> None:
    config = loading.from_overrides(["train.global_batch=6"])
    found = list(layouts.layouts(config, 30, 12))
    assert Layout(2, 6, 1) in found and Layout(1, 12, 1) not in found
    assert all(6 % layout.data == 0 and layout.pipeline * layout.data == 12 for layout in found)


def test_every_layout_whose_ranks_share_samples_divides_the_heads() -> None:
    config = loading.from_overrides(["train.global_batch=2"])
    found = list(layouts.layouts(config, 30, 8, heads=12))
    assert Layout(1, 2, 1, 4) in found and Layout(2, 1, 2, 2) in found
    assert {layout.context for layout in found} == {1, 2, 4} and all(layout.ranks == 8 for layout in found)
    assert {layout.context for layout in layouts.layouts(config, 30, 8)} == {1}


def test_samples_are_shared_where_that_is_faster_or_leaner(large: Config) -> None:
    """Eight GPUs have no more than two samples; with eight samples, replicas exchange less."""
    many = planned(large, device="h100", gpus=8)
    assert many.fits[0].layout.context == 1
    plain = [fit for fit in many.fits if fit.layout.context == 1]
    for fit in many.fits:
        leaner = all(p.memory.total > fit.memory.total for p in plain if p.seconds <= fit.seconds)
        assert fit.layout.context == 1 or leaner, fit.settings
    config = _with(large, ("parallel.replicate=2", "parallel.context=4"))
    shared = planned(replace(config, train=replace(config.train, global_batch=2)), device="h100", gpus=8)
    assert shared.fits[0].layout == Layout(1, 2, 1, 4) and "parallel.context=4" in shared.fits[0].settings
    assert "4 GPUs share each sample's tokens and send" in shared.fits[0].why
    alone = next(fit for fit in shared.fits if fit.layout.context == 1)
    assert alone.seconds > 2 * shared.fits[0].seconds  # stages wait for each other


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_activations_of_ranks_that_share_samples_shrink(large: Config, mode: str) -> None:
    """Nearly as much as there are ranks: the latents of a sample are everywhere."""
    config = _with(large, ("parallel.replicate=1",))
    whole, quarter = (
        planned(replace(config, parallel=replace(config.parallel, context=ranks)), device="h100", gpus=ranks).memory
        for ranks in (1, 4)
    )
    assert 3 < whole[mode].activations / quarter[mode].activations < 4.01
    assert whole[mode].weights == quarter[mode].weights


# --- many clips ------------------------------------------------------------------------------------------------------


def test_ten_thousand_clips_that_were_looked_at_take_seconds(
    large: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = Media(81, 720, 1280, Fraction(24), Fraction(81, 24), False)
    samples = tuple(
        Sample(f"s/{n:05}", (("rgb", Path(f"{n}.mp4")), ("seg", Path(f"{n}_seg.mp4"))), f"caption {n}", 0, False, media)
        for n in range(10_000)
    )
    monkeypatch.setattr(survey, "scan", lambda *_, **__: Scan(samples, (BadSample("s/x", "x.mp4", "is missing"),)))
    config = replace(large, data=replace(large.data, cache_dir=str(tmp_path)))
    started = time.process_time()  # of this process, however busy the machine is
    made = planned(config, device="h100", gpus=8)
    assert time.process_time() - started < 4.0
    assert sum(row.clips for row in made.rows) == 10_000 and ("s/x", "is missing") in made.dropped["train"]


def test_a_file_is_opened_once_until_it_changes(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "data" / "train", tmp_path / "train", ignore=shutil.ignore_patterns("cache"))
    config = loading.from_overrides([f"data.train={tmp_path / 'train'}"])
    files = sorted(tmp_path.glob("train/*.mp4"))
    for file in (tmp_path / "train").iterdir():
        os.utime(file, (1e9, 1e9))

    def look() -> tuple[Scan, int]:
        probes = Probes(tmp_path / "cache")
        found = scan(config.data.train, config.suffixes, config.data, probe=probes)
        probes.save()
        return found, probes.opened

    first, opened = look()
    assert first == scan(config.data.train, config.suffixes, config.data) and opened >= len(files)
    assert look() == (first, 0)
    os.utime(files[0], (1.1e9, 1.1e9))
    assert look() == (first, 1)
