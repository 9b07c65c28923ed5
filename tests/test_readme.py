"""The README claims what exists: its commands, targets, keys and files."""

import dataclasses
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from transpixeler import arguments, configfile
from transpixeler.config import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with these words."""
    table = README[README.index(f"| {header}") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def blocks(language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> dict[str, str]:
    """Every command of the command line and its help."""
    (subparsers,) = [action for action in arguments.make_parser()._actions if action.choices]
    return {name: parser.format_help() for name, parser in subparsers.choices.items()}


def test_the_table_of_commands_is_that_of_the_command_line() -> None:
    named = {cells[0].strip("`").split()[0]: " ".join(cells) for cells in rows("command |")}
    assert sorted(named) == sorted(commands())
    for name, text in named.items():
        unknown = [option for option in re.findall(r"`?(--[a-z-]+)", text) if option not in commands()[name]]
        assert not unknown, f"{name} has no {unknown}"


def test_the_table_of_targets_is_that_of_the_makefile() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    named = [name for cells in rows("make |") for name in re.findall(r"`([a-z]+)`", cells[0])]
    assert sorted(named) == sorted(set(phony) - {"help"})
    used = re.findall(r"^make ([a-z]+)", "\n".join(blocks()), re.MULTILINE)
    assert set(used) <= set(phony)


def keys(cls: type = Config, key: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield f"{key}{field.name}"
        if dataclasses.is_dataclass(field.default):
            yield from keys(type(field.default), f"{key}{field.name}.")


def test_every_key_that_is_named_exists() -> None:
    sections = "|".join(field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default))
    named = set(re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+)(?![\w/])", README))
    unknown = {name for name in named - set(keys()) if not name.endswith((".txt", ".py", ".json"))}
    assert len(named) > 20 and unknown == set()


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= {Path(link).name for link in links}


def test_the_config_that_is_shown_loads(tmp_path: Path) -> None:
    (shown,) = blocks("yaml")
    content = yaml.safe_load(shown)
    content["base"] = str(ROOT / content["base"])
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content))
    assert configfile.load(tmp_path / "my.yaml").lora.rank == content["lora"]["rank"]


def test_the_slurm_script_is_a_script() -> None:
    (script,) = blocks("bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
