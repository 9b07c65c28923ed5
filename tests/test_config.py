"""What a user writes becomes a config, and what a user gets wrong becomes one line that helps."""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.any_config import TEXT, configs, values
from transpixeler import cli, configfile
from transpixeler.config import Config, UserError

ROOT = Path(__file__).parents[1]

EXAMPLES = int(os.environ.get("CONFIG_EXAMPLES", "20"))  # more, and others, to look for faults that these do not show
fast = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    derandomize="CONFIG_EXAMPLES" not in os.environ,
)


# --- any config ------------------------------------------------------------------------------------------------------


def plain(config: object) -> dict:
    """Dataclasses as dicts, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def leaves(tree: dict, key: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}{name}.")
        else:
            yield key + name, value


def nested(key: str, value: Any) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def load(*files: object, overrides: tuple[str, ...] = ()) -> Config:
    """Files a.yaml, b.yaml …, of which the last is loaded; text is written as it is, all else as YAML."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in zip("abcdefgh", files):
            text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
            (Path(folder) / f"{name}.yaml").write_text(text, encoding="utf-8")
        return configfile.load(Path(folder) / f"{'abcdefgh'[len(files) - 1]}.yaml", overrides)


@fast
@given(configs)
def test_a_config_written_back_reads_as_an_equal_one(config: Config) -> None:
    assert load(configfile.dump(config)) == config


def test_a_file_of_nothing_is_the_defaults() -> None:
    assert load("") == load("# nothing here\n") == load({}) == configfile.from_overrides([])


# --- merging ---------------------------------------------------------------------------------------------------------


SECTIONS = ("train", "checkpoint", "save", "log", "parallel", "model")  # no key here limits another
texts = st.fixed_dictionaries({name: values(type(getattr(Config(), name))).map(plain) for name in SECTIONS})


@st.composite
def partial(draw: st.DrawFn) -> dict:
    """Some keys of some sections."""
    whole = dict(leaves(draw(texts)))
    kept = draw(st.sets(st.sampled_from(sorted(whole)), max_size=12))
    tree: dict = {}
    for key in kept:
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = whole[key]
    return tree


@fast
@given(partial(), partial())
def test_the_later_file_wins_and_what_it_leaves_alone_stays(earlier: dict, later: dict) -> None:
    merged = dict(leaves(plain(load(earlier, {"base": "a.yaml", **later}))))
    expected = dict(leaves(plain(load({})))) | dict(leaves(plain_of(earlier))) | dict(leaves(plain_of(later)))
    assert {key: merged[key] for key in expected if key != "output_dir"} == {
        key: value for key, value in expected.items() if key != "output_dir"
    }


def plain_of(tree: dict) -> dict:
    """The tree's own keys as the config holds them."""
    known = dict(leaves(plain(load(tree))))
    kept: dict = {}
    for key, _ in leaves(tree):
        section, _, name = key.partition(".")
        kept.setdefault(section, {})[name] = known[key]
    return kept


@fast
@given(partial(), partial(), partial())
def test_bases_may_be_grouped_in_any_way(a: dict, b: dict, c: dict) -> None:
    flat = load(a, b, c, {"base": ["a.yaml", "b.yaml", "c.yaml"]})
    left = load(a, b, c, {"base": ["a.yaml", "b.yaml"]}, {"base": ["d.yaml", "c.yaml"]})
    right = load(a, b, c, {"base": ["b.yaml", "c.yaml"]}, {"base": ["a.yaml", "d.yaml"]})
    chain = load(a, {"base": "a.yaml", **b}, {"base": "b.yaml", **c})
    assert flat == left == right == chain


def test_lists_are_replaced_whole_and_dicts_key_by_key() -> None:
    base = {"data": {"frames": [1, 33]}, "lora": {"ranks": {"ffn.0": 16, "ffn.2": 16}}}
    config = load(base, {"base": "a.yaml", "data": {"frames": [81]}, "lora": {"ranks": {"ffn.0": 64, "ffn.2": None}}})
    assert config.data.frames == (81,) and config.lora.ranks == {"ffn.0": 64}


def test_a_section_whose_keys_are_all_commented_out_takes_nothing_away() -> None:
    assert load({"lora": {"rank": 8}}, "base: a.yaml\nlora:\n#  rank: 16\n").lora.rank == 8


@pytest.mark.parametrize("text", ["lora:\n#  rank: 16\n", "lora:\n", "lora: {}\n", ""])
def test_an_override_reaches_into_a_section_without_keys(text: str) -> None:
    assert load(text, overrides=("lora.rank=8", "lora.ranks.ffn=4")).lora == dataclasses.replace(
        Config().lora, rank=8, ranks={"ffn": 4}
    )


def test_null_brings_a_default_back() -> None:
    assert load({"lora": {"alpha": 4, "rank": 8}}, "base: a.yaml\nlora: {alpha: null, rank: ~}\n").lora == Config().lora


def test_null_brings_a_table_s_default_back() -> None:
    base = {"lora": {"ranks": {"ffn.0": 16}}, "objective": {"tasks": {"rgb_to_aux": 1.0}}}
    for config in (
        load(base, {"base": "a.yaml", "lora": {"ranks": None}, "objective": {"tasks": None}}),
        load(base, overrides=("lora.ranks=null", "objective.tasks=null")),
    ):
        assert config.lora.ranks == {} and config.objective.tasks == {"joint": 1.0}
    ours, none = 'streams: {rgb: "", alpha: _alpha}\n', {"base": "a.yaml", "streams": None}
    assert load(ours, none).streams == Config().streams
    assert load(ours, none, f"base: b.yaml\n{ours}").streams == {"rgb": "", "alpha": "_alpha"}


def test_an_alias_is_a_value_of_its_own() -> None:
    text = "data:\n  train: &set [{path: a}]\n  eval: *set\n"
    config = load(text, overrides=("data.train.0.repeats=3",))
    assert (config.data.train[0].repeats, config.data.eval[0].repeats) == (3, 1)


def test_yaml_merge_keys_work() -> None:
    config = load("save: &often {every_steps: 10}\ncheckpoint: {<<: *often, keep: 2}\n")
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (10, 2)


def test_words_that_yaml_takes_for_booleans_are_read_as_written() -> None:
    assert load("parallel: {compile: on}\n").parallel.compile == "on"
    assert load("parallel: {compile: off}\n").parallel.compile == "off"


def test_paths_stand_relative_to_the_file_that_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/base.yaml").write_text("data: {train: clips}\nmodel: {path: Wan-AI/Wan2.1-T2V-1.3B-Diffusers}\n")
    (tmp_path / "mine.yaml").write_text("base: base/base.yaml\ndata: {eval: held_out, cache_dir: /fast/cache}\n")
    monkeypatch.chdir(tmp_path / "base")
    config = configfile.load("../mine.yaml", ["output_dir=out", "model.fuse=[./a.safetensors]"])
    assert config.data.train[0].path == str(tmp_path / "base/clips")
    assert Path(config.data.eval[0].path).resolve() == tmp_path / "held_out"
    assert config.data.cache_dir == "/fast/cache"
    assert config.output_dir == str(tmp_path / "base/out")
    assert config.model.path == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert config.model.fuse == (str(tmp_path / "base/a.safetensors"),)


# --- overrides -------------------------------------------------------------------------------------------------------


def typed(value: Any) -> str:
    """A value as one would type it after `key=`."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).removesuffix("...\n")


@fast
@given(texts, st.data())
def test_an_override_equals_the_same_value_in_the_file(tree: dict, data: st.DataObject) -> None:
    key, value = data.draw(st.sampled_from([(k, v) for k, v in leaves(tree) if "{" not in k and "." in k]))
    if isinstance(value, str) and (value.lstrip().startswith(("[", "{")) or value.strip() in ("", "~", "null")):
        return  # on the command line these are YAML
    if key.count(".") > 1:  # a name of the user's in a table may have dots of its own
        return
    assert configfile.from_overrides([f"{key}={typed(value)}"]) == load(nested(key, value))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run_name=007", "run_name", "007"),
        ("run_name=a: b, #1", "run_name", "a: b, #1"),
        ("run_name=", "run_name", ""),
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=3", "optim.lr", 3.0),
        ("lora.alpha=null", "lora.alpha", None),
        ("parallel.compile=on", "parallel.compile", "on"),
        ("parallel.recompute=2", "parallel.recompute", 2),
        ("parallel.recompute=full", "parallel.recompute", "full"),
        ("lora.scope=[seg]", "lora.scope", ("seg",)),
        ("data.frames=[1, 81]", "data.frames", (1, 81)),
        ("data.resolutions=[480, [832, 480]]", "data.resolutions", (480, (832, 480))),
        ("objective.tasks={joint: 0.5, rgb_to_aux: 1}", "objective.tasks", {"joint": 0.5, "rgb_to_aux": 1.0}),
        ("objective.stream_weights.seg=2", "objective.stream_weights", {"seg": 2.0}),
    ],
)
def test_an_override_is_read_by_the_type_of_its_key(override: str, key: str, value: object) -> None:
    found: Any = configfile.from_overrides([override])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_an_override_reaches_into_a_list() -> None:
    config = load({"data": {"train": [{"path": "/a"}, {"path": "/b"}]}}, overrides=("data.train.1.repeats=5",))
    assert [source.repeats for source in config.data.train] == [1, 5]


@pytest.mark.parametrize("brief", ["clips", {"path": "clips"}, ["clips"]], ids=["path", "source", "list"])
def test_an_override_reaches_into_a_data_set_that_is_written_in_brief(brief: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {"train": brief}}))
    (source,) = configfile.load(tmp_path / "a.yaml", ["data.train.0.repeats=3", "data.train.0.name=x"]).data.train
    assert (source.path, source.repeats, source.name) == (str(tmp_path / "clips"), 3, "x")


def test_an_override_of_one_name_leaves_the_others_of_a_default() -> None:
    assert configfile.from_overrides(["streams.seg=_mask"]).streams == {"rgb": "", "seg": "_mask"}
    assert load("", overrides=("streams.depth=_depth", "streams.seg=null")).streams == {"rgb": "", "depth": "_depth"}
    assert load("objective:\n", overrides=("objective.tasks.rgb_to_aux=1",)).objective.tasks == {
        "joint": 1.0,
        "rgb_to_aux": 1.0,
    }
    assert configfile.from_overrides(["data.frames.1=81"]).data.frames == (1, 81)
    assert Config().streams == {"rgb": "", "seg": "_seg"}


def test_the_last_override_wins() -> None:
    assert configfile.from_overrides(["seed=1", "seed=2"]).seed == 2


# --- what a user gets wrong ------------------------------------------------------------------------------------------


# (what the file says, overrides, what the one line must name)
MISTAKES = {
    "bad YAML": ("train: {max_steps: 3", [], ["mine.yaml:1", "not valid YAML"]),
    "a tab": ("train:\n\tmax_steps: 3\n", [], ["mine.yaml:2", "not valid YAML"]),
    "an impossible date": ("run_name: 2024-13-45\n", [], ["mine.yaml", "not valid YAML"]),
    "a value that holds itself": ("data: {train: &x [*x]}\n", [], ["mine.yaml:1", "recursive"]),
    "brackets without end": ("a: " + "[" * 1000, [], ["mine.yaml", "not valid YAML"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", [], ["mine.yaml:2", "single document"]),
    "not UTF-8": (b"run_name: \xff\n", [], ["mine.yaml", "cannot be read"]),
    "a list for a file": ("- seed\n", [], ["mine.yaml", "key: value", "a list"]),
    "a key twice": ("seed: 1\nseed: 2\n", [], ["mine.yaml:2", "'seed'", "twice"]),
    "a key that is no text": ("1: x\n", [], ["mine.yaml:1", "1 is not text"]),
    "a key that is a list": ("? [a]\n: x\n", [], ["mine.yaml:1", "is not text"]),
    "an unknown key": ("optim: {lrr: 1}\n", [], ["optim.lrr", "did you mean `lr`?", "mine.yaml"]),
    "an unknown section": ("optimizer: {lr: 1}\n", [], ["optimizer", "did you mean `optim`?", "mine.yaml"]),
    "an unknown key like none": ("zzz: 1\n", [], ["zzz", "known here", "model", "mine.yaml"]),
    "text for a number": ("optim: {lr: fast}\n", [], ["optim.lr", "a number", "'fast'", "mine.yaml"]),
    "not a number": ("optim: {lr: .nan}\n", [], ["optim.lr", "a number", "nan", "mine.yaml"]),
    "no end to a number": (f"optim: {{lr: 1{'0' * 400}}}\n", [], ["optim.lr", "a number", "mine.yaml"]),
    "a fraction for a count": ("train: {max_steps: 1.5}\n", [], ["train.max_steps", "whole number", "1.5"]),
    "true for a count": ("train: {max_steps: true}\n", [], ["train.max_steps", "whole number", "True"]),
    "text for true": ("data: {upscale: maybe}\n", [], ["data.upscale", "true or false", "'maybe'"]),
    "a number for text": ("run_name: 7\n", [], ["run_name", "text", "7", "quotes", "mine.yaml"]),
    "a value for a section": ("optim: 3\n", [], ["optim", "key: value", "3", "mine.yaml"]),
    "a value for a list": ("data: {frames: 33}\n", [], ["data.frames", "a list", "33", "mine.yaml"]),
    "a list too short": ("optim: {betas: [0.9]}\n", [], ["optim.betas", "2 values", "1", "mine.yaml"]),
    "an unknown choice": ("model: {quantize: fp9}\n", [], ["model.quantize", "'fp9'", "fp8", "mine.yaml"]),
    "one of several kinds": ("parallel: {recompute: x}\n", [], ["parallel.recompute", "'x'", "full", "mine.yaml"]),
    "every no-th block": ("parallel: {recompute: 0}\n", [], ["parallel.recompute: 0", "number ≥ 1", "mine.yaml"]),
    "an empty list": ("data: {frames: []}\n", [], ["data.frames", "empty", "mine.yaml"]),
    "a side of nothing": ("data: {resolutions: [64, [832, 0]]}\n", [], ["data.resolutions.1", "0 ", "16", "mine.yaml"]),
    "nothing trained": ("{lora: {enabled: false}, model: {trainable: []}}\n", [], ["model.trainable", "empty"]),
    "a start without a LoRA": ("lora: {enabled: false, init_from: a}\n", [], ["lora.init_from", "model.fuse"]),
    "a path for a name": ("run_name: ../clips\n", [], ["run_name", "'../clips'", "mine.yaml"]),
    "nothing to lay over": ("sample: {formats: [composite]}\n", [], ["sample.background", "composite", "mine.yaml"]),
    "rates that follow nothing": ("optim: {lr: 0, groups: [{pattern: '*', lr: 1}]}\n", [], ["optim.lr", "above 0"]),
    "out of range": ("lora: {rank: 0}\n", [], ["lora.rank", "0", "≥ 1", "mine.yaml"]),
    "out of range, inside a list": ("data: {train: [{path: a, repeats: 0}]}\n", [], ["data.train.0.repeats", "≥ 1"]),
    "a required key": ("data: {train: [{repeats: 2}]}\n", [], ["data.train.0.path", "must be given", "mine.yaml"]),
    "frames of another count": ("data: {frames: [1, 32]}\n", [], ["data.frames.1", "32", "4k+1", "mine.yaml"]),
    "frames of another count, one set's": (
        "data: {train: [{path: a, frames: [32]}]}\n",
        [],
        ["data.train.0.frames.0", "32", "4k+1", "mine.yaml"],
    ),
    "a colour out of range": ("data: {fill_color: [0, 0, 300]}\n", [], ["data.fill_color.2", "300", "≤ 255"]),
    "a rank of nothing": ("lora: {ranks: {ffn.0: 0}}\n", [], ["lora.ranks.ffn.0", "≥ 1", "mine.yaml"]),
    "no such stream": ("lora: {scope: [depth]}\n", [], ["lora.scope", "'depth'", "rgb, seg", "mine.yaml"]),
    "one stream, scope aux": ('streams: {rgb: ""}\n', [], ["lora.scope", "lora.scope=all"]),
    "a stream's name with a dot": ('streams: {rgb: "", seg.v2: _s}\n', [], ["streams", "'seg.v2'", "mine.yaml"]),
    "a stream's name with a comma": ('streams: {rgb: "", "a,b": _s}\n', [], ["streams", "'a,b'", "letters"]),
    "a stream's name with a folder": ('streams: {rgb: "", ../a: _s}\n', [], ["streams", "'../a'", "letters"]),
    "a stream named as a format": ('streams: {rgb: "", composite: _s}\n', [], ["streams", "'composite'", "another"]),
    "a base that is missing": ("base: not_there.yaml\n", [], ["not_there.yaml", "no such file", "mine.yaml"]),
    "a base that is a folder": ("base: .\n", [], ["folder", "mine.yaml"]),
    "a base that is a number": ("base: 3\n", [], ["base", "a file", "3", "mine.yaml"]),
    "a base that is itself": ("base: mine.yaml\n", [], ["base", "circle", "mine.yaml"]),
    "no equals sign": ("", ["optim.lr"], ["optim.lr", "key=value", "command line"]),
    "no key": ("", ["=3"], ["'=3'", "key=value", "command line"]),
    "a key with a hole": ("", ["optim..lr=3"], ["optim..lr", "key=value", "command line"]),
    "an unknown key, overridden": ("", ["optim.lrr=3"], ["optim.lrr", "did you mean `lr`?", "command line"]),
    "a wrong type, overridden": ("", ["optim.lr=fast"], ["optim.lr", "a number", "'fast'", "command line"]),
    "a name of a default, overridden": ("", ["streams.seg="], ["streams", "the same suffix", "on the command line"]),
    "a key below a value": ("seed: 3\n", ["seed.x=3"], ["seed", "holds a value"]),
    "no such place in a list": (
        "data: {train: [{path: a}]}\n",
        ["data.train.1.repeats=3"],
        ["data.train.1", "no place in a list of 1"],
    ),
    "a place in a list of none": ("", ["data.train.0.repeats=3"], ["data.train.0", "no place in a list of 0"]),
    "a word for a place in a list": ("data: {train: [{path: a}]}\n", ["data.train.x=3"], ["data.train.x", "no place"]),
}


def said(path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the real command line answers with."""
    assert cli.main(["cache", str(path), *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, overrides, named = MISTAKES[name]
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = said(file, overrides, capsys)
    assert [part for part in named if part not in line] == [], line


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path / 'no.yaml'}: no such file" in said(tmp_path / "no.yaml", [], capsys)
    assert f"{tmp_path}: a folder" in said(tmp_path, [], capsys)
    assert "cannot be read" in said(tmp_path / ("x" * 300), [], capsys)


def test_a_circle_of_bases_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, base in (("a", "b"), ("b", "[c]"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base.replace('b', 'b.yaml').replace('c', 'c.yaml')}\n")
    line = said(tmp_path / "a.yaml", [], capsys)
    assert f"{tmp_path / 'b.yaml'} → {tmp_path / 'c.yaml'} → {tmp_path / 'b.yaml'}" in line


def test_a_fault_names_the_file_that_brought_it_in(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lora: {rank: 0, alpha: 2}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nlora: {alpha: 4}\n")
    with pytest.raises(UserError, match=r"lora\.rank.*base\.yaml"):
        configfile.load(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"lora\.rank.*the command line"):
        configfile.load(tmp_path / "mine.yaml", ["lora.rank=-1"])


@fast
@given(configs, st.data())
def test_no_text_ever_ends_in_a_traceback(config: Config, data: st.DataObject) -> None:
    lines = configfile.dump(config).splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(lines) - 1))
        noise = data.draw(st.one_of(st.text("ab01:-[]{},#&*!|>'\"%@` ~.\n\t", max_size=6), st.text(max_size=6)))
        cut = data.draw(st.integers(0, len(lines[place])))
        lines[place] = lines[place][:cut] + noise + lines[place][cut + data.draw(st.integers(0, 6)) :]
    try:
        load("\n".join(lines))
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), error


@settings(fast, max_examples=4 * EXAMPLES)
@given(st.sampled_from([key for key, _ in leaves(plain(Config()))]), TEXT)
def test_no_override_ever_ends_in_a_traceback(key: str, text: str) -> None:
    try:
        configfile.from_overrides([f"{key}={text}"])
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), error


def test_a_misspelt_key_answers_in_a_blink(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optim: {lrr: 1}\n")
    command = [sys.executable, "-m", "transpixeler", "cache", str(tmp_path / "mine.yaml")]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 2 and "did you mean `lr`?" in done.stderr and "Traceback" not in done.stderr
    assert statistics.median(seconds) < 0.3, seconds
