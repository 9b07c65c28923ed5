"""A tiny model learns whole clips and frame by frame, and samples; ranks share clips; the rest is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.families.pyramid.folder import write_folder
from tests.support.ranks import run_ranks
from tests.training.trainings import as_killed, exact, metrics, run_here
from transpixeler import cli
from transpixeler.config.loading import load
from transpixeler.config.sections import UserError
from transpixeler.data.media.decode import probe
from transpixeler.models.family import open_model
from transpixeler.parallel.mesh import Layout
from transpixeler.sampling.saves import find_save
from transpixeler.training.preflight import check_model

CONFIG = """\
output_dir: output
model: {path: model}
streams: {rgb: ""}
data: {train: data/train, eval: data/eval, cache_dir: data/cache, fps: 16, resolutions: [64], frames: [17]}
lora: {enabled: false}
objective: {density: uniform, caption_dropout: 0}
optim: {lr: 0.005, warmup_steps: 0, schedule: constant}
train: {max_steps: 2, global_batch: 4, micro_batch: 1}
checkpoint: {every_steps: 0}
save: {every_epochs: 0}
eval: {every_epochs: 0, before_first_step: false, times: [0.3, 0.7], samples: 0}
sample: {size: [64, 64, 17], steps: 1, guidance: 1, scheduler: euler, shift: auto}
log: {tensorboard: false}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    place = tmp_path_factory.mktemp("pyramid")
    write_folder(place / "model")
    shape = [Format(64, 64, 17, Fraction(16))]
    write_pairs(place / "data/train", scenes(4, formats=shape, held_out=False, seed=0))
    write_pairs(place / "data/eval", scenes(1, formats=shape, held_out=True, seed=0))
    (place / "config.yaml").write_text(CONFIG)
    assert cli.main(["cache", str(place / "config.yaml"), "streams={rgb: '', seg: _seg}"]) == 0
    return place


def train(world: Path, output: Path, *overrides: str) -> Path:
    assert cli.main(["train", str(world / "config.yaml"), f"output_dir={output}", *overrides]) == 0
    return (output / "latest").resolve()


def train_on(world: Path, output: Path, ranks: int, *overrides: str) -> Path:
    settings = (f"output_dir={output}", "optim.name=sgd", *overrides)
    return Path(run_ranks(run_here, ranks, world / "config.yaml", settings, None)[0])


# -- learning and sampling


@pytest.mark.parametrize("history", ["off", "on"])
def test_a_tiny_model_learns_and_samples(history: str, world: Path, tmp_path: Path) -> None:
    """The held-out loss, mean over stages and times, falls to less than a quarter."""
    keys = ("train.max_steps=30", "eval.every_steps=30", "eval.before_first_step=true", f"objective.history={history}")
    run = train(world, tmp_path, *keys)
    told = [line["eval"]["eval"]["loss"]["rgb"].values() for line in metrics(run) if "eval" in line]
    start, end = (sum(losses) for losses in told)
    assert end < 0.25 * start, (start, end)
    words = ["sample", str(run), "--prompt", "a red circle"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "sample.guidance=3", "sample.first_guidance=7"]) == 0
    (video,) = (tmp_path / "out").rglob("*.mp4")
    assert probe(video).frames == 17
    image = str(next((world / "data/eval").glob("*.mp4")))
    asked = cli.main([*words, "--image", image, "--out", str(tmp_path / "image")])
    assert asked == (0 if history == "on" else 2)
    if history == "on":
        facts = json.loads(next((tmp_path / "image").rglob("sample.json")).read_text())
        assert facts["given"] == ["first frame of rgb"]


def test_a_run_with_a_companion_goes_on_bit_for_bit(world: Path, tmp_path: Path) -> None:
    keys = ("streams={rgb: '', seg: _seg}", "objective.tasks={joint: 1, rgb_to_aux: 1}", "checkpoint.every_steps=1")
    keys = (*keys, "data.sync_group=2", "train.global_batch=8", "lora={enabled: true, rank: 4}")
    straight = train(world, tmp_path / "straight", *keys)
    first = as_killed(straight, 1, tmp_path / "parts")
    second = train(world, tmp_path / "parts", *keys, "--resume", str(first))
    assert exact(second) == exact(straight) and len(metrics(second)) == 2


def test_an_adapter_says_that_it_has_no_history(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("lora={enabled: true, rank: 4, scope: all}", "objective.history=off", "train.max_steps=1")
    run = train(world, tmp_path / "run", *keys)
    alone = shutil.copy(find_save(str(run)).path / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    image = str(next((world / "data/eval").glob("*.mp4")))
    words = ["sample", str(alone), "--model", str(world / "model"), "--prompt", "a", "--image", image]
    settings = ["sample.size=[64,64,17]", "sample.steps=1", "sample.guidance=1", "sample.scheduler=euler"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), *settings, "sample.shift=auto"]) == 2
    assert "--image: with objective.history=off all frames are made at once" in capsys.readouterr().err


# -- ranks that share clips


def test_clips_are_shared_on_any_layout(world: Path, tmp_path: Path) -> None:
    """The samples that share a clip lie on both ranks, and losses are the same as on one."""
    keys = ("data.sync_group=2", "train.global_batch=8")
    one = train(world, tmp_path / "one", *keys, "optim.name=sgd")
    two = train_on(world, tmp_path / "two", 2, *keys, "parallel.replicate=2")
    for first, second in zip(metrics(one), metrics(two), strict=True):
        assert first["samples"] == second["samples"] and set(Counter(first["samples"]).values()) == {2}
        assert first["samples"][:4] == first["samples"][4:], "each of two ranks has each clip once"
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)
        assert first["loss_rgb"] == pytest.approx(second["loss_rgb"], abs=1e-6)


# -- what does not apply


REFUSED = {
    "train.global_batch=6": "train.global_batch: 6 samples are no runs of 4, which cover the sizes; 8 would be",
    "data.sync_group=4": "train.global_batch: 4 samples are no 4 runs of 4 that share their clips; 16 would be",
    "train.micro_batch=2": "train.micro_batch: each sample of Pyramid Flow has a layout of its own",
    "train.micro_tokens=999": "train.micro_tokens: each sample of Pyramid Flow has a layout of its own",
    "streams={rgb: '', seg: {suffix: _seg, scale: 2}}": "streams.seg.scale: the stages of Pyramid Flow go by",
    **{
        f"objective.tasks={{{task}: 1}}": f"objective.tasks.{task}: Pyramid Flow learns to go on"
        for task in ("image_to_video", "last_to_video", "interpolate", "extend")
    },
    "objective.shift=3": "objective.shift: 3 is for one way, and each stage of this model has its own; set 1",
    "sample.shift=3": "sample.shift: 3 is for one way, and each stage of this model has its own; set auto",
    "sample.scheduler=unipc": "sample.scheduler: unipc does not go with what this model learns; set it to euler",
    "data.resolutions=[[96, 64]]": "96×64 is not a multiple of 64×64 pixels, which this model needs",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_does_not_apply_is_one_line_before_anything_is_cached(
    setting: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    words = ["train", str(world / "config.yaml"), f"data.cache_dir={cache}", f"output_dir={tmp_path}", setting]
    if setting.startswith("data.resolutions"):
        words[0] = "inspect"  # sizes that do not fit are rounded where none is said exactly
        words[-1] = "data.sizes=[[96, 64, 17]]"
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert REFUSED[setting] in said and "\n" not in said
    assert not cache.exists() and not (tmp_path / "latest").exists()


def test_a_plan_counts_the_longest_lesson_and_offers_no_pipeline(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(world / "config.yaml"), "--device", "a100", "--gpus", "4", "--json"]
    assert cli.main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["buckets"][0]["tokens"] == 16 + 16 + 4  # a frame, the one before, and the first at half the sides
    layouts = [" ".join(one["settings"]) for one in made["layouts"]]
    assert layouts and not any("pipeline=2" in one or "context" in one for one in layouts)


@pytest.mark.parametrize(("key", "layout"), [("pipeline", Layout(2, 1, 1)), ("context", Layout(1, 1, 1, 2))])
def test_pipelines_and_shared_sequences_are_refused(key: str, layout: Layout, world: Path) -> None:
    made = load(world / "config.yaml", [f"parallel.{key}=2"])
    with pytest.raises(UserError, match=f"^parallel.{key}: .* set it to 1$"):
        check_model(made, layout, open_model(made.model), {})


NOT_GIVEN = {
    "--between": "--between: this model goes on from a first frame alone",
    "--extend": "--extend: this model goes on from a first frame alone",
    "--last": "--last: needs the first frame too",
    "--image --last": "--last: this model goes on from first frames alone",
}


@pytest.mark.parametrize("options", NOT_GIVEN)
def test_a_sample_is_given_no_frames_but_the_first(
    options: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = str(next((world / "data/eval").glob("*.mp4")))
    files = [word for option in options.split() for word in (option, clip)]
    settings = ("sample.scheduler=euler", "sample.shift=auto", "sample.size=[64,64,17]")
    words = ["sample", "--model", str(world / "model"), "--prompt", "a", "--out", str(tmp_path / "out"), *files]
    assert cli.main([*words, *settings]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"transpixeler: {NOT_GIVEN[options]}; ") and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_makes_all_at_once_takes_none_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transpixeler.demo.model import write_model

    write_model(tmp_path / "wan", seed=0)
    words = ["sample", f"model.path={tmp_path / 'wan'}", "--prompt", "a", "--out", str(tmp_path / "out")]
    for setting in ("data.sync_group=2", "objective.history=on", "sample.first_guidance=7"):
        assert cli.main([*words, setting]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"transpixeler: {setting.split('=')[0]}: ") and "makes all frames at once" in said
        assert "\n" not in said and not (tmp_path / "out").exists()


def test_features_of_another_tool_are_read(world: Path, tmp_path: Path) -> None:
    """Texts under that tool's names; a latent that is not normalised is refused."""
    text = {"prompt_embed": torch.randn(1, 128, 24), "prompt_attention_mask": torch.arange(128)[None] < 6}
    torch.save(text | {"pooled_prompt_embed": torch.randn(1, 20)}, tmp_path / "text.pt")
    torch.save(torch.randn(1, 4, 3, 8, 8), tmp_path / "latent.pt")
    torch.save(torch.randn(1, 4, 3, 8, 8) * 3.0986 - 0.2343, tmp_path / "raw.pt")
    rows = [{"video": "a.mp4", "text": "a", "latent": "latent.pt", "text_fea": "text.pt"}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "raw.jsonl").write_text("\n".join(json.dumps({**row, "latent": "raw.pt"}) for row in rows))
    keys = ["data.eval=[]", f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=1"]
    assert train(world, tmp_path / "run", f"data.train={tmp_path}/rows.jsonl", *keys)
    raw = ["train", str(world / "config.yaml"), f"output_dir={tmp_path}/raw", f"data.train={tmp_path}/raw.jsonl"]
    assert cli.main([*raw, *keys, "data.on_bad=error"]) == 2
