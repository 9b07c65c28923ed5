"""What a user writes becomes a config."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support.any_config import configs, fast, leaves, load, plain, values
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError

ROOT = Path(__file__).parents[2]

# --- any config ------------------------------------------------------------------------------------------------------


def nested(key: str, value: Any) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@fast
@given(configs)
def test_a_config_written_back_reads_as_an_equal_one(config: Config) -> None:
    assert load(loading.dump(config)) == config


def test_a_file_of_nothing_is_the_defaults() -> None:
    assert load("") == load("# nothing here\n") == load({}) == loading.from_overrides([])


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
    config = loading.load("../mine.yaml", ["output_dir=out", "model.fuse=[./a.safetensors]"])
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
    assert loading.from_overrides([f"{key}={typed(value)}"]) == load(nested(key, value))


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
    found: Any = loading.from_overrides([override])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_an_override_reaches_into_a_list() -> None:
    config = load({"data": {"train": [{"path": "/a"}, {"path": "/b"}]}}, overrides=("data.train.1.repeats=5",))
    assert [source.repeats for source in config.data.train] == [1, 5]


@pytest.mark.parametrize("brief", ["clips", {"path": "clips"}, ["clips"]], ids=["path", "source", "list"])
def test_an_override_reaches_into_a_data_set_that_is_written_in_brief(brief: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {"train": brief}}))
    (source,) = loading.load(tmp_path / "a.yaml", ["data.train.0.repeats=3", "data.train.0.name=x"]).data.train
    assert (source.path, source.repeats, source.name) == (str(tmp_path / "clips"), 3, "x")


def test_an_override_of_one_name_leaves_the_others_of_a_default() -> None:
    assert loading.from_overrides(["streams.seg=_mask"]).streams == {"rgb": "", "seg": "_mask"}
    assert load("", overrides=("streams.depth=_depth", "streams.seg=null")).streams == {"rgb": "", "depth": "_depth"}
    assert load("objective:\n", overrides=("objective.tasks.rgb_to_aux=1",)).objective.tasks == {
        "joint": 1.0,
        "rgb_to_aux": 1.0,
    }
    assert loading.from_overrides(["data.frames.1=81"]).data.frames == (1, 81)
    assert Config().streams == {"rgb": "", "seg": "_seg"}


def test_an_override_reaches_into_a_stream_that_is_a_bare_suffix() -> None:
    scaled = "streams.seg.scale=2"
    in_file = load("streams: {rgb: '', seg: _seg, depth: _d}", overrides=(scaled,))
    for found in (in_file, loading.from_overrides([scaled])):
        assert found.suffixes["seg"] == "_seg" and found.scales[:2] == (1, 2)
    with pytest.raises(UserError, match=r"streams.rgb.scale: the others are laid over rgb"):
        loading.from_overrides(["streams.rgb.scale=2"])
    with pytest.raises(UserError, match=r"streams.seg.scale: 9 is out of range"):
        loading.from_overrides(["streams.seg={suffix: _seg, scale: 9}"])


def test_the_last_override_wins() -> None:
    assert loading.from_overrides(["seed=1", "seed=2"]).seed == 2
