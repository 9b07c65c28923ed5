"""The command `eval` takes a run, an adapter or the base, and puts what it found where it belongs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from transpixeler import cli
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.data.media.decode import probe
from transpixeler.evaluation import command
from transpixeler.sampling.saves import load_for_eval

QUICK = ("eval.samples=1", "sample.prompts=[]", "sample.steps=2", "eval.times=[0.25,0.75]", "eval.clips=1")


def told(out: Path) -> dict[str, Any]:
    return json.loads((out / "eval.json").read_text())


def test_a_run_an_adapter_and_the_base_are_evaluated(
    run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"run": [str(run)], "base": [str(run), "--base"]}
    places["adapter"] = [str(demo / "config.yaml"), "--adapter", str(run / "step2/ema")]
    for name, words in places.items():
        assert cli.main(["eval", *words, *QUICK, "--out", str(tmp_path / name)]) == 0
    table = capsys.readouterr().out
    of_run, of_base, of_adapter = (told(tmp_path / name) for name in ("run", "base", "adapter"))
    assert of_run["eval"] == of_adapter["eval"] and of_run["eval"]["eval"]["loss"] != of_base["eval"]["eval"]["loss"]
    assert "loss at t" in table and "0.25" in table and f"{of_run['eval']['eval']['loss']['seg']['0.25']:.4f}" in table
    assert list((tmp_path / "run/samples").glob("*/seg.mp4"))


def test_an_adapter_is_evaluated_in_the_model_that_it_was_trained_in(run: Path, tmp_path: Path) -> None:
    adapter = read_adapter(run / "step2")
    for name, header in (("ours", {"rgb_attends_aux": "false", "fuse": '["style.safetensors"]'}), ("foreign", {})):
        write_adapter(replace(adapter, metadata={"family": "wan"} | header), tmp_path / name)
    (tmp_path / "mine.yaml").write_text(f"base: {run / 'config.yaml'}\nmodel: {{fuse: [other.safetensors]}}\n")

    def model(name: str, *overrides: str) -> tuple[bool, list[str]]:
        found = load_for_eval(str(tmp_path / "mine.yaml"), overrides, adapter=str(tmp_path / name)).config.model
        return found.rgb_attends_aux, [Path(path).name for path in found.fuse]

    assert model("ours") == (False, ["style.safetensors"])
    assert model("ours", "model.fuse=[]") == (False, [])
    assert model("foreign") == (True, ["other.safetensors"])


def test_each_thing_that_is_evaluated_has_a_place_of_its_own(run: Path, tmp_path: Path) -> None:
    one, other = (Path(shutil.copytree(run, tmp_path / name)) for name in ("one", "other"))
    loose = [tmp_path / name / "mine.safetensors" for name in ("a", "b")]
    for file in loose:
        file.parent.mkdir()
        shutil.copy(one / "step2/adapter_model.safetensors", file)
    places = {
        (one, None): "one/eval/step00000002",
        (one, False): "one/eval/step00000002-raw",
        (other / "step2", None): "other/eval/step00000002",
        (other / "step2/adapter_model.safetensors", None): "other/eval/step00000002-raw",
        (other / "step2/ema/adapter_model.safetensors", None): "other/eval/step00000002",
        (loose[0], None): "eval/a-mine-safetensors",
        (loose[1], None): "eval/b-mine-safetensors",
    }
    for (source, ema), place in places.items():
        found = load_for_eval(str(one / "config.yaml"), [f"output_dir={tmp_path}"], adapter=str(source), ema=ema)
        assert command._default_folder(found) == tmp_path / place, source
    assert command._default_folder(load_for_eval(str(one), [], base=True)) == one / "eval/base"


def test_a_config_is_about_the_run_that_it_names_or_else_the_latest(run: Path, demo: Path, tmp_path: Path) -> None:
    one, other = (Path(shutil.copytree(run, tmp_path / name)) for name in ("one", "other"))
    (tmp_path / "latest").symlink_to("other")
    for words, wanted in (([], other), (["run_name=one"], one)):
        assert load_for_eval(str(demo / "config.yaml"), [f"output_dir={tmp_path}", *words]).run == wanted


def test_what_cannot_be_evaluated_is_one_clear_line(
    run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(demo / "config.yaml")
    assert cli.main(["eval", config, f"output_dir={run.parent}", "run_name=absent"]) == 2
    assert "holds no run absent; train first" in capsys.readouterr().err
    assert cli.main(["eval", config, f"output_dir={tmp_path}"]) == 2
    assert "holds no run yet; train first, or add --adapter PATH or --base" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path)]) == 2
    assert "holds no run; give a run's folder or a config" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "nothing")]) == 2
    assert "no such run or config here; give a run's folder or a YAML file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    assert cli.main(["eval", str(run), f"data.eval={tmp_path / 'empty'}", cache]) == 2
    assert "data.eval holds no usable clip: its source is empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert cli.main(["eval", str(run), "--out", str(tmp_path / "file")]) == 2
    assert "--out: " in (said := capsys.readouterr().err) and "is a file; give a folder" in said
    assert cli.main(["eval", str(run), "data.eval=[]"]) == 2
    assert "data.eval: set it" in capsys.readouterr().err


def test_prompts_of_a_list_are_evaluated_as_their_lines_say(run: Path, demo: Path, tmp_path: Path) -> None:
    matte = next(path for path in sorted((demo / "data/eval").glob("*_seg.mp4")) if probe(path).frames > 4)
    lines = [
        {"prompt": "a red ball", "seed": 9, "negative": "grey", "size": [32, 48, 1]},
        {"prompt": "a blue cube", "alpha": str(matte), "size": [64, 64, 5]},
        {"prompt": "a blue cube", "size": [64, 64, 5]},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [*QUICK, f"sample.prompts_file={tmp_path / 'list.jsonl'}", "sample.steps=1", "--out", str(tmp_path / "out")]
    words += [f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.main(["eval", str(run), *words]) == 0
    _, ball, painted, joint = (
        json.loads(p.read_text()) for p in sorted((tmp_path / "out").glob("samples/*/sample.json"))
    )
    assert (ball["seed"], ball["negative_prompt"], ball["width"], ball["height"]) == (9, "grey", 32, 48)
    assert (painted["given"], painted["task"], painted["metrics"]) == (["seg"], "given", {})
    assert (joint["seed"], joint["given"], joint["task"]) == (painted["seed"] + 1, [], "joint") and joint["metrics"]
    (tmp_path / "list.jsonl").write_text('{"prompt": "x", "size": [1, 1, 1]}')
    assert cli.main(["eval", str(run), *words]) == 2
