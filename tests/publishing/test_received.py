"""A run's folder that came from someone else sends nothing from outside it, and damage in it is one clear line."""

from __future__ import annotations

import base64
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.publishing.test_report import write_run
from tests.support.saves import TERMS, contents, save_adapter
from transpixeler import cli
from transpixeler.config.sections import UserError
from transpixeler.publishing import hub, report

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"
SAMPLE = "samples/step00000030/000"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("made") / "flames", steps=3)
    save_adapter(folder / "step30")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run, with secrets beside it that nobody may be sent."""
    for name in ("id_rsa", "secret.mp4"):
        (tmp_path / name).write_bytes(SECRET)
    return Path(shutil.copytree(made, tmp_path / "runs/flames"))


def sent(run: Path) -> bytes:
    """Everything that a push would send and that the report holds."""
    return b"".join(contents(hub.pack(str(run), TERMS)).values()) + report.write_report(run).read_bytes()


def told_files(run: Path, *names: object) -> None:
    facts = json.loads((run / SAMPLE / "sample.json").read_text())
    facts["files"] |= {f"more{number}": name for number, name in enumerate(names)}
    (run / SAMPLE / "sample.json").write_text(json.dumps(facts))


def link(place: Path, target: Path) -> None:
    if place.is_dir():
        shutil.copytree(place, target)
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


# --- files from outside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["above", "absolute", "link", "by the folder's name"])
@pytest.mark.parametrize("name", ["id_rsa", "secret.mp4"])
def test_a_sample_names_no_file_but_its_own(run: Path, tmp_path: Path, name: str, way: str) -> None:
    (run / SAMPLE / f"linked-{name}").symlink_to(tmp_path / name)
    ways = {
        "above": f"../../../../../{name}",
        "absolute": str(tmp_path / name),
        "link": f"linked-{name}",
        "by the folder's name": f"../000/linked-{name}",
    }
    told_files(run, ways[way])
    found = sent(run)
    assert SECRET not in found and base64.b64encode(SECRET) not in found
    assert b"a star, 000" in found, "the sample's own files are shown all the same"


@pytest.mark.parametrize("place", [SAMPLE, "samples/step00000030", "samples"])
def test_a_folder_of_samples_that_is_a_link_is_left_out(run: Path, tmp_path: Path, place: str) -> None:
    link(run / place, tmp_path / "elsewhere")
    (next((tmp_path / "elsewhere").rglob("rgb.mp4"))).write_bytes(SECRET)
    found = sent(run)
    assert SECRET not in found and base64.b64encode(SECRET) not in found


@pytest.mark.parametrize("names", [[5], [None], [["rgb.mp4"]], [{}], [""], ["."], [".."], ["a\0b"], ["x" * 5000]])
def test_what_is_no_name_is_no_file(run: Path, names: list[object]) -> None:
    told_files(run, *names)
    assert b"a star, 000" in sent(run)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "config.yaml"])
def test_a_saves_file_that_leads_elsewhere_is_refused(run: Path, tmp_path: Path, file: str) -> None:
    shutil.copy(run / "step30" / file, tmp_path / file)
    link(run / "step30" / file, tmp_path / file)
    with pytest.raises(UserError, match=f"{file}.* leads out of") as refused:
        hub.pack(str(run), TERMS)
    assert "\n" not in str(refused.value)


def test_a_save_that_leads_elsewhere_is_refused(run: Path, tmp_path: Path) -> None:
    link(run / "step30", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"leads out of"):
        hub.pack(str(run), TERMS)


def test_a_model_holds_no_file_from_elsewhere(run: Path, tmp_path: Path) -> None:
    (run / "step30/transformer").mkdir()
    (run / "step30/transformer/config.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match=r"config\.json.* leads out of"):
        hub.pack(str(run), TERMS)


@pytest.mark.parametrize("file", ["manifest.json", "metrics.jsonl"])
def test_what_a_run_says_of_itself_is_not_read_elsewhere(run: Path, tmp_path: Path, file: str) -> None:
    shutil.copy(run / file, tmp_path / file)
    link(run / file, tmp_path / file)
    for act in (lambda: hub.pack(str(run), TERMS), lambda: report.write_report(run)):
        with pytest.raises(UserError, match=f"{file}.* leads out of"):
            act()


def test_a_received_config_builds_on_no_file_of_this_machine(run: Path, tmp_path: Path) -> None:
    (tmp_path / "private.yaml").write_text("sample: {prompts: [a private prompt]}\n")
    (run / "step30/config.yaml").write_text(f"base: {tmp_path / 'private.yaml'}\n")
    with pytest.raises(UserError, match=r"config\.yaml: base"):
        hub.pack(str(run), TERMS)


def test_a_link_within_the_run_and_a_file_that_the_user_names_are_fine(run: Path, tmp_path: Path) -> None:
    (run / "best").symlink_to("step30")
    (tmp_path / "mine").symlink_to(run / "step30")
    for source in (run / "best", tmp_path / "mine", run / "step30/adapter_model.safetensors"):
        assert "adapter_model.safetensors" in hub.pack(str(source), TERMS).files


# --- damage ----------------------------------------------------------------------------------------------------------

ODD: tuple[object, ...] = ([], {"x": {"y": [5]}}, 5, "x", None, 10**400, "\ud800", 1e999)
ODD_WITHIN: tuple[object, ...] = ([5], 10**400, None, "x")


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def damaged(text: bytes) -> Iterator[bytes]:
    """Bytes that are no text, no JSON or no YAML, or not what was expected at the top."""
    yield from (b"", text[: len(text) // 2], text[:-3], text.replace(b"e", b"\0", 3), b"\xff\xfe" + text)
    yield from (b"[]", b"null", b"5", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000)
    yield from (b'{"a": %s}' % (b"9" * 5000), b"{x: " * 500, b"a: &a [*a]", b"a: &a [1]\nb: *a", b"? [a]\n: b", b"1: 2")
    yield from (
        b"a: !!python/object:os.system x",
        b"a: 2024-01-01",
        b"a: !!binary aGk=",
        json.dumps({"a": deep(400)}).encode(),
    )


def changed(value: Any, odds: tuple[object, ...] = ODD) -> Iterator[Any]:
    """A value with one part after another replaced by something odd."""
    yield from odds
    if isinstance(value, dict):
        for key, part in value.items():
            yield from (value | {key: odd} for odd in changed(part, ODD_WITHIN))
        yield value | {"": 1, "\x1b[31m": "\x1b[2J", "deep": deep(400)}
    elif isinstance(value, list) and value:
        yield from ([odd, *value[1:]] for odd in changed(value[0], ODD_WITHIN[:2]))


def outcome(act: Callable[[], object]) -> str:
    """What is wrong with how a command ends; nothing where it is done, or says in one line why not."""
    try:
        act()
    except UserError as error:
        return f"several lines: {error}" if "\n" in str(error) else ""
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def write_value(file: Path, value: Any) -> None:
    if file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(value, allow_unicode=False), encoding="utf-8")
    else:
        file.write_text(json.dumps(value) + "\n")


@pytest.mark.parametrize(
    ("place", "commands"),
    [
        ("manifest.json", ("report", "push")),
        ("metrics.jsonl", ("report", "push")),
        (f"{SAMPLE}/sample.json", ("report", "push")),
        ("config.yaml", ("report",)),
        ("step30/config.yaml", ("push",)),
        ("step30/adapter_config.json", ("push",)),
    ],
)
def test_damage_is_one_line_or_passed_over(run: Path, place: str, commands: tuple[str, ...]) -> None:
    file = run / place
    whole = file.read_bytes()
    if file.suffix == ".yaml":
        value = yaml.safe_load(whole)
        value = {key: value[key] for key in ("model", "streams", "lora", "sample", "data", "seed")}
    else:
        value = json.loads(whole.splitlines()[1] if file.suffix == ".jsonl" else whole)
    acts = {"report": lambda: report.write_report(run), "push": lambda: hub.listing(hub.pack(str(run), TERMS))}
    wrong, tried = [], 0
    tries: list[Callable[[], object]] = [lambda text=text: file.write_bytes(text) for text in damaged(whole)]
    tries += [lambda odd=odd: write_value(file, odd) for odd in changed(value)]
    for attempt in tries:
        try:
            attempt()
        except (ValueError, RecursionError):
            continue
        tried += 1
        wrong += [f"{command}: {said}" for command in commands if (said := outcome(acts[command]))]
    assert tried >= 40 and not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(sorted(set(wrong))[:30])


KEYS = ("step", "scopes", "fuse", "zeros", "scope", "folded", "streams", "ema")
HEADERS = (
    "",
    "x",
    "{",
    "[]",
    "[5]",
    "5",
    "null",
    '{"a": []}',
    '{"a": null}',
    "9" * 5000,
    "[" * 100_000,
    "\x1b[31m",
    "1e999",
)


@pytest.mark.parametrize("key", KEYS)
def test_a_damaged_header_is_one_line(run: Path, key: str) -> None:
    file = run / "step30/adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    wrong = []
    for text in HEADERS:
        save_file(tensors, file, metadata=header | {f"transpixeler.{key}": text})
        said = outcome(lambda: hub.listing(hub.pack(str(run), TERMS)))
        wrong += [f"{text[:20]!r}: {said}"] if said else []
    assert not wrong, "\n".join(wrong)


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_commands_print_no_control_character(run: Path, capsys: pytest.CaptureFixture) -> None:
    odd = run / "samples/step00000030/\x1b[2Jodd"
    (run / SAMPLE).rename(odd)
    facts = json.loads((odd / "sample.json").read_text())
    (odd / "sample.json").write_text(json.dumps(facts | {"prompt": "a\x1b[31m \x9b2J \u202e red \0 ball"}))
    assert cli.main(["push", str(run), "--repo", "me/flames", "--dry-run"]) == 0
    (run / "manifest.json").write_text('{"clips": "\x1b[31m"}')
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["report", str(run / "\x1b[31mno")]) == 2
    said = capsys.readouterr()
    shown = (said.out + said.err).replace("\n", "")
    assert "red" in shown and [c for c in shown if unicodedata.category(c) in ("Cc", "Cf")] == []
