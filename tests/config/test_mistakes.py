"""What a user gets wrong becomes one line that helps."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.any_config import EXAMPLES, TEXT, configs, fast, leaves, load, plain
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError

ROOT = Path(__file__).parents[2]

# (what the file says, overrides, what the one line must name)
MISTAKES = {
    "bad YAML": ("train: {max_steps: 3", [], ["mine.yaml:1", "not valid YAML"]),
    "a tab": ("train:\n\tmax_steps: 3\n", [], ["mine.yaml:2", "not valid YAML"]),
    "an impossible date": ("run_name: 2024-13-45\n", [], ["mine.yaml", "not valid YAML"]),
    "a value that holds itself": ("data: {train: &x [*x]}\n", [], ["mine.yaml:1", "recursive"]),
    "brackets without end": ("a: " + "[" * 1000, [], ["mine.yaml", "not valid YAML"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", [], ["mine.yaml:2", "single document"]),
    "not UTF-8": (b"run_name: \xff\n", [], ["mine.yaml", "is no text in UTF-8", "YAML file"]),
    "a list for a file": ("- seed\n", [], ["mine.yaml", "key: value", "a list"]),
    "a key twice": ("seed: 1\nseed: 2\n", [], ["mine.yaml:2", "'seed'", "twice"]),
    "a key that is no text": ("1: x\n", [], ["mine.yaml:1", "1 is not text"]),
    "a key that is a list": ("? [a]\n: x\n", [], ["mine.yaml:1", "is not text"]),
    "an unknown key": ("optim: {lrr: 1}\n", [], ["optim.lrr", "did you mean `lr`?", "mine.yaml"]),
    "an unknown section": ("optimizer: {lr: 1}\n", [], ["optimizer", "did you mean `optim`?", "mine.yaml"]),
    "an unknown key like none": ("zzz: 1\n", [], ["zzz", "known here", "model", "mine.yaml"]),
    "text for a number": ("optim: {lr: fast}\n", [], ["optim.lr", "a number", "'fast'", "mine.yaml"]),
    "same bits from a kernel that has none": (
        "train: {deterministic: true}\nmodel: {attention: cudnn}\n",
        [],
        ["train.deterministic", "model.attention=cudnn", "flash"],
    ),
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
    "a column of nothing": ("data: {columns: {masks: m}}\n", [], ["data.columns.masks", "seg", "text", "mine.yaml"]),
    "a column without a name": ("data: {columns: {text: ''}}\n", [], ["data.columns.text", "names no column"]),
    "a side of nothing": ("data: {resolutions: [64, [832, 0]]}\n", [], ["data.resolutions.1", "0 ", "16", "mine.yaml"]),
    "nothing trained": ("{lora: {enabled: false}, model: {trainable: []}}\n", [], ["model.trainable", "empty"]),
    "a start without a LoRA": ("lora: {enabled: false, init_from: a}\n", [], ["lora.init_from", "model.fuse"]),
    "a path for a name": ("run_name: ../clips\n", [], ["run_name", "'../clips'", "mine.yaml"]),
    "a name with a NUL": ('run_name: "a\\0b"\n', [], ["run_name", "plain folder name", "mine.yaml"]),
    "a name of 300 letters": (f"run_name: {'n' * 300}\n", [], ["run_name", "plain folder name", "mine.yaml"]),
    "a path with a NUL": ('data: {train: "a\\0b"}\n', [], ["data.train.0.path", "NUL", "mine.yaml"]),
    "a model with a NUL": ('model: {path: "a\\0b"}\n', [], ["model.path", "NUL", "mine.yaml"]),
    "a path of half a letter": ('output_dir: "\\ud800"\n', [], ["output_dir", "not a path", "mine.yaml"]),
    "a name of half a letter": ('run_name: "\\ud800"\n', [], ["run_name", "plain folder name", "mine.yaml"]),
    "nothing to lay over": ("sample: {formats: [composite]}\n", [], ["sample.background", "composite", "mine.yaml"]),
    "rates that follow nothing": ("optim: {lr: 0, groups: [{pattern: '*', lr: 1}]}\n", [], ["optim.lr", "above 0"]),
    "out of range": ("lora: {rank: 0}\n", [], ["lora.rank", "0", "≥ 1", "mine.yaml"]),
    "out of range, inside a list": ("data: {train: [{path: a, repeats: 0}]}\n", [], ["data.train.0.repeats", "≥ 1"]),
    "a required key": ("data: {train: [{repeats: 2}]}\n", [], ["data.train.0.path", "must be given", "mine.yaml"]),
    "no frames": ("data: {frames: [1, 0]}\n", [], ["data.frames.1", "0", "mine.yaml"]),
    "no frames, one set's": ("data: {train: [{path: a, frames: [0]}]}\n", [], ["data.train.0.frames.0", "mine.yaml"]),
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
    "a key below a value": ("seed: 3\n", ["seed.x=3"], ["seed", "is a value"]),
    "no such place in a list": (
        "data: {train: [{path: a}]}\n",
        ["data.train.1.repeats=3"],
        ["data.train.1", "not a position in a list of 1"],
    ),
    "a place in a list of none": ("", ["data.train.0.repeats=3"], ["data.train.0", "not a position in a list of 0"]),
    "a word for a place in a list": (
        "data: {train: [{path: a}]}\n",
        ["data.train.x=3"],
        ["data.train.x", "not a position"],
    ),
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
    (tmp_path / "wan-smoke.yaml").write_text("seed: 1")
    meant = f"did you mean {tmp_path / 'wan-smoke.yaml'}?"
    assert meant in said(tmp_path / "wan_smoke.yaml", [], capsys) and meant not in said(tmp_path / "q.yaml", [], capsys)
    assert f"{tmp_path}: is a folder" in said(tmp_path, [], capsys)
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
        loading.load(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"lora\.rank.*the command line"):
        loading.load(tmp_path / "mine.yaml", ["lora.rank=-1"])


@fast
@given(configs, st.data())
def test_no_text_ever_ends_in_a_traceback(config: Config, data: st.DataObject) -> None:
    lines = loading.dump(config).splitlines()
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
        loading.from_overrides([f"{key}={text}"])
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), error


def test_a_misspelt_key_answers_in_a_blink(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optim: {lrr: 1}\n")
    command = [sys.executable, "-m", "transpixeler", "cache", str(tmp_path / "mine.yaml")]
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        after = os.times()
        work = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(work)  # of a processor, which other processes do not take from it
        assert done.returncode == 2 and "did you mean `lr`?" in done.stderr and "Traceback" not in done.stderr
    assert statistics.median(seconds) < 0.3, seconds
