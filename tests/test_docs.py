"""README and the guides show only what exists: commands, targets, keys, files, links. Their cheap commands run."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tests.support.pages import (
    DOCS,
    INDEX,
    PAGES,
    ROOT,
    Command,
    anchors,
    blocks,
    commands,
    inline,
    languages,
    links,
    rows,
    scripts,
    text,
)
from tests.test_house import ORDER
from transpixeler import arguments, cli, usage
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data.prompts import prompt_lines

README = ROOT / "README.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"[a-z]+", re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[0]))
SECTIONS = [field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default)]
LANGUAGES = {"sh", "bash", "text", "yaml", "python", "dockerfile"}
OTHERS = {"touch", "tensorboard", "docker", "hf", ".venv/bin/basedpyright"}  # programs that are not ours
OF_MAKE = {
    "MAKEFLAGS",
    "MFLAGS",
    "MAKEOVERRIDES",
    "MAKELEVEL",
    "ARGS",
    "CONFIG",
    "NPROC",
    "DIST",
}  # of make test
CHEAP = {"plan", "inspect", "eval", "sample", "export", "report"}
CHEAP_CACHE = ("--list", "--verify")
KILOBYTES = 1000

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- the pages themselves --------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert README.stat().st_size <= 8 * KILOBYTES


@by_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(there), f"{target} has no heading #{anchor}"


@by_page
def test_every_path_of_the_repository_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.-])((?:tests|tools|configs|\.ci)/[\w./-]*\w/?)", text(page))
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_readme_and_index_lead_to_every_guide() -> None:
    guides = {page.name for page in DOCS.glob("*.md")} - {INDEX.name}
    assert guides <= {target for target, _ in links(INDEX)}
    assert guides <= {Path(target).name for target, _ in links(README)}


def test_every_config_of_ours_is_shown() -> None:
    shown = {Path(target).name for page in PAGES for target, _ in links(page)}
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= shown


def test_pictures_are_small_and_shown() -> None:
    pictures = [path for path in DOCS.iterdir() if path.suffix != ".md"]
    shown = {(page.parent / target).resolve() for page in PAGES for target, _ in links(page)}
    assert pictures and set(pictures) <= shown
    assert max(path.stat().st_size for path in pictures) <= 150 * KILOBYTES


def test_the_guides_are_shipped() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.findall(r'"([^"]+)"', re.findall(r"^transpixeler = \[(.*)\]$", project, re.MULTILINE)[0])
    unshipped = [path.name for path in DOCS.iterdir() if not any(fnmatch(f"docs/{path.name}", p) for p in patterns)]
    assert unshipped == []


@by_page
def test_every_block_says_its_language(page: Path) -> None:
    assert languages(page) <= LANGUAGES


# --- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_of_commands_is_that_of_the_command_line() -> None:
    helps = {name: parser.format_help() for name, parser in _subparsers().items()}
    named = {cells[0].strip("`").split()[0]: " ".join(cells) for cells in rows(DOCS / "commands.md", "command |")}
    assert sorted(named) == sorted(helps)
    for name, row in named.items():
        unknown = [option for option in re.findall(r"`?(--[a-z-]+)", row) if option not in helps[name]]
        assert not unknown, f"{name} has no {unknown}"


def _subparsers() -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = [action for action in arguments.make_parser()._actions if action.choices]
    assert isinstance(subparsers.choices, dict)
    return subparsers.choices


def test_the_table_of_targets_is_that_of_the_makefile() -> None:
    named = [name for cells in rows(DOCS / "commands.md", "make |") for name in re.findall(r"`([a-z]+)`", cells[0])]
    assert sorted(named) == sorted(TARGETS)


def test_the_benches_are_those_that_there_are() -> None:
    (row,) = [cells[1] for cells in rows(DOCS / "commands.md", "make |") if cells[0] == "`bench`"]
    files = (ROOT / "tools" / "bench").glob("*.py")
    there = {
        path.stem
        for path in files
        if path.stem != "side" and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert set(re.findall(r"`([a-z]+)`", row)) == there


def test_the_table_of_sections_is_that_of_the_config() -> None:
    named = [key for cells in rows(DOCS / "commands.md", "section |") for key in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(Config))


def test_the_table_of_packages_is_in_the_order_of_the_house() -> None:
    cells = [cells[0] for cells in rows(DOCS / "contributing.md", "package |")]
    assert [name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)] == [*ORDER[:-1]]


def test_every_message_that_is_quoted_is_one_of_the_code() -> None:
    """A message of the code holds names and numbers in place of a guide's `…`, N and examples."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "transpixeler").rglob("*.py"))
    whole = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that go over several lines
    quoted = [quote for cells in _symptoms() for quote in re.findall(r'"([^"]+)"', cells[0])]
    parts = [part.strip(" :;") for quote in quoted for part in re.split(r"…|\bN\b|\S*[\d/*]\S*|\b(?:seg|rgb)\b", quote)]
    assert len(quoted) > 10 and [part for part in parts if " " in part and part not in whole] == []


def _symptoms() -> list[list[str]]:
    lines = text(DOCS / "troubleshooting.md").splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]


# --- config ----------------------------------------------------------------------------------------------------------


def keys(cls: type = Config, key: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield f"{key}{field.name}"
        if dataclasses.is_dataclass(field.default):
            yield from keys(type(field.default), f"{key}{field.name}.")


@by_page
def test_every_key_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?![\w/])", text(page)))
    unknown = {name for name in named - set(keys()) if not name.endswith((".txt", ".py", ".json", ".md"))}
    assert unknown == set()


@by_page
def test_every_setting_in_the_text_can_be_set(page: Path) -> None:
    for code in inline(page):
        words = [code] if ": " in code else code.split()
        found = [re.fullmatch(rf"((?:{'|'.join(SECTIONS)})\.\w+|streams)(?:=|: )(.+)", word) for word in words]
        for setting in filter(None, found):
            before = ['streams={rgb: "", seg: _seg}', "lora.scope=all"] if setting[1] == "streams" else []
            loading.from_overrides([*before, f"{setting[1]}={setting[2]}"])


@by_page
def test_every_config_that_is_shown_loads(page: Path, workspace: Path) -> None:
    shown_configs = [block for block in blocks(page, "yaml") if not block.startswith("apiVersion:")]
    for number, shown in enumerate(shown_configs):
        assert yaml.safe_load(shown)["base"].startswith("configs/"), "a config that is shown says its base"
        path = workspace / f"{page.stem}-{number}.yaml"
        path.write_text(shown, encoding="utf-8")
        assert loading.load(path).data.train


def test_lists_of_prompts_that_are_shown_can_be_read(tmp_path: Path) -> None:
    shown = [block for page in PAGES for block in blocks(page, "text") if block.startswith('{"prompt"')]
    assert shown
    for number, block in enumerate(shown):
        (tmp_path / f"{number}.jsonl").write_text(block, encoding="utf-8")
        assert len(prompt_lines(str(tmp_path / f"{number}.jsonl"), key="--prompts")) == len(block.splitlines())


# --- commands --------------------------------------------------------------------------------------------------------

COMMANDS = list({command.words: command for page in PAGES for command in commands(page)}.values())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the shown commands find in the working folder, besides a demo."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    config = next(block for block in blocks(DOCS / "training.md", "yaml") if "data: {train: pairs}" in block)
    (folder / "my.yaml").write_text(config, encoding="utf-8")
    (folder / "demo").mkdir()
    (folder / "demo" / "config.yaml").write_text(f"base: {ROOT}/configs/wan2.1-t2v-1.3b-joint.yaml\n")
    return folder


@pytest.fixture
def there(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace


def our_words(words: Sequence[str]) -> list[list[str]]:
    """Return the arguments of each `transpixeler` that a shell line calls, by itself, under torchrun or from make."""
    words = list(words)
    if words[0] == "make":
        plain = {key: value for key, value in os.environ.items() if key not in OF_MAKE}
        lines = subprocess.run(["make", "--dry-run", *words[1:]], capture_output=True, text=True, env=plain)
        assert lines.returncode == 0, lines.stderr
        called = [shlex.split(line) for line in lines.stdout.splitlines() if "-m transpixeler " in line]
        return [word for line in called for word in our_words(line)]
    if words[0] == "transpixeler":
        return [words[1:]]
    if "-m" in words:
        module = words.index("-m")
        return [words[module + 2 :]] if words[module + 1] == "transpixeler" else []
    if words[0] == "docker" and "transpixeler" in words[:-1]:
        return [words[words.index("transpixeler") + 1 :]] if "run" in words else []
    return []


def check(command: Command) -> None:
    """Fail unless every program, option, key and file of a shown command is there."""
    words = command.words
    assert words[0] in {"transpixeler", "torchrun", "make", "python", *OTHERS}, f"{words[0]} is not known here"
    if words[0] == "python" and words[1] != "-m":
        tool_parser(Path(words[1])).parse_intermixed_args(words[2:])
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    for found in our_words(words):
        parsed = cli._parse(found)
        config = getattr(parsed, "config", "")
        if config.endswith(".yaml") and not config.startswith("/"):
            loading.load(config, parsed.overrides)
        elif overrides := getattr(parsed, "overrides", []):
            loading.from_overrides(overrides)


def tool_parser(path: Path) -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location(path.stem, ROOT / path)
    assert spec is not None and spec.loader is not None and (ROOT / path).exists(), f"{path} is not there"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module._parser()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_that_is_shown_exists(command: Command, there: Path) -> None:
    check(command)


@pytest.mark.parametrize(
    "words",
    [
        "transpixeler trian my.yaml",
        "transpixeler train my.yaml --resumed",
        "transpixeler train my.yaml optim.lrr=1",
        "transpixeler train your.yaml",
        "transpixeler export demo/output/latest --format comfy --out a",
        "make trian",
        "make train CONFIG=your.yaml",
        "make train CONFIG=my.yaml ARGS=train.max_step=1",
        "make sample ARGS='output/latest --promt x'",
        "python tools/split.py a --out b",
        "python tools/split_rgba.py a",
        "tranpixeler plan my.yaml",
    ],
)
def test_a_command_that_does_not_exist_is_caught(words: str, there: Path) -> None:
    with pytest.raises((SystemExit, AssertionError, UserError)):
        check(Command(README, tuple(shlex.split(words))))


@by_page
def test_scripts_are_scripts(page: Path) -> None:
    for script in scripts(page):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        (launch,) = re.findall(r"-m transpixeler (.*?) \"", script.replace("\\\n", " "))
        assert cli._parse(shlex.split(launch)).command == "train"


def test_manifests_start_what_exists() -> None:
    shown = [block for page in PAGES for block in blocks(page, "yaml") if block.startswith("apiVersion:")]
    assert shown
    for manifest in shown:
        replicas = yaml.safe_load(manifest)["spec"]["pytorchReplicaSpecs"]
        for container in (one for each in replicas.values() for one in each["template"]["spec"]["containers"]):
            (script,) = container["args"]
            assert container["command"] == ["bash", "-c"]
            assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
            (launch,) = re.findall(r"-m transpixeler (.*?) \$resume", script)
            assert cli._parse(shlex.split(launch)).command == "train"


@by_page
def test_python_that_is_shown_can_run(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(name and importlib.util.find_spec(name.split(".")[0]) for name in names)


@pytest.mark.parametrize("line", [line for lines in usage.EXAMPLES.values() for line in lines])
def test_every_example_of_a_help_exists(line: str, there: Path) -> None:
    check(Command(README, tuple(shlex.split(line.partition(" > ")[0]))))


# --- what is shown runs ----------------------------------------------------------------------------------------------


def cheap() -> list[list[str]]:
    """Return the shown commands that need the demo and nothing else, each once."""
    return [
        list(command.words[1:]) for command in COMMANDS if command.words[0] == "transpixeler" and _is_cheap(command)
    ]


def _is_cheap(command: Command) -> bool:
    words = command.words[1:]
    of_demo = len(words) > 1 and words[1].startswith("demo/")
    sends_nothing = words[0] == "push" and "--dry-run" in words
    reads = words[0] == "cache" and any(option in words for option in CHEAP_CACHE)
    return of_demo and (words[0] in CHEAP or sends_nothing or reads)


@pytest.fixture(scope="module")
def at_home(demo: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after `make demo`: the demo, a run of it that is the latest, and two to compare."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(demo, folder / "demo")
    for name in (run.name, "first", "second"):
        shutil.copytree(run, folder / "demo" / "output" / name)
    (folder / "demo" / "output" / "latest").symlink_to(run.name)
    return folder


@pytest.mark.parametrize("words", cheap(), ids=shlex.join)
def test_a_cheap_command_runs_as_it_is_shown(words: list[str], at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at_home)
    assert cli.main(words) == 0


def test_every_kind_of_cheap_command_is_shown() -> None:
    assert {words[0] for words in cheap()} == CHEAP | {"cache", "push"}
