"""A small share of the campaign: its own programs, few rounds, and twins that they must find wrong."""

from __future__ import annotations

import importlib
import random
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ranks

CAMPAIGN = Path(__file__).parents[2] / "tools" / "campaign"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(CAMPAIGN), *sys.path])
    return importlib.import_module(name)


def counts() -> dict[str, Any]:
    return {"found": 0, "harmless": 0, "unseen": 0, "wrong": 0, "accepted": 0, "refused": 0, "slowest_s": 0.0}


def test_flips_in_an_adapter_are_found_or_lie_in_its_tensors(run: Path, tmp_path: Path, monkeypatch) -> None:
    flips, figures = load("flips", monkeypatch), counts()
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes((run / "step2" / file.name).read_bytes())
    draw = random.Random(0)
    for _ in range(20):
        flips._flip_adapter(file, draw, figures)
    assert figures["wrong"] == 0 and figures["unseen"] + figures["found"] + figures["harmless"] == 20


def test_flips_in_a_checkpoint_are_found(run: Path, tmp_path: Path, monkeypatch) -> None:
    flips, figures = load("flips", monkeypatch), counts()
    found = next((run / "checkpoints").iterdir())
    folder, draw = Path(shutil.copytree(found, tmp_path / found.name)), random.Random(0)
    for _ in range(40):
        flips._flip_checkpoint(folder, draw, figures)
    assert figures["wrong"] == 0 and figures["found"] > 30
    monkeypatch.setattr(flips.checkpoint, "digest", lambda _: "the same")  # a broken twin: hashes that see nothing
    monkeypatch.setattr(flips.checkpoint, "check", lambda _: None)
    for _ in range(10):
        flips._flip_checkpoint(folder, draw, figures)
    assert figures["wrong"] > 0


@pytest.mark.parametrize(
    ("code", "lines", "wrong"), [(0, "", 0), (2, "transpixeler: one\n", 0), (1, "", 1), (2, "transpixeler: a\n" * 2, 1)]
)
def test_an_answer_is_judged(code: int, lines: str, wrong: int, monkeypatch) -> None:
    inputs, figures = load("inputs", monkeypatch), counts()

    def answer() -> int:
        sys.stderr.write(lines)
        return code

    inputs._judge("a kind", answer, figures)
    assert figures["wrong"] == wrong
    inputs._judge("a kind", lambda: 1 // 0, figures)
    assert figures["wrong"] == wrong + 1


def test_damaged_toml_is_answered(tmp_path: Path, monkeypatch) -> None:
    inputs, figures, draw = load("inputs", monkeypatch), counts(), random.Random(3)
    file, answer = inputs._toml(tmp_path)
    whole = file.read_bytes()
    for _ in range(60):
        file.write_bytes(inputs.mutated(whole, draw))
        inputs._judge("toml", answer, figures)
    assert figures["wrong"] == 0 and figures["accepted"] > 3 and figures["refused"] > 10


# --- kills -----------------------------------------------------------------------------------------------------------


def test_a_training_that_is_killed_comes_to_the_same_end(demo: Path, tmp_path: Path, monkeypatch) -> None:
    kill, forked = load("kill", monkeypatch), load("forked", monkeypatch)
    monkeypatch.setattr(forked, "_server", ranks._server)  # it has imported everything already
    monkeypatch.setattr(kill, "STEPS", 4)
    monkeypatch.setattr(kill, "PROGRESS", 2)
    monkeypatch.setattr(kill, "OFTEN", ("train.max_steps=4", "checkpoint.every_steps=1", "run_name=run"))
    figures = dict.fromkeys(("training_kills", "in_a_start", "in_a_step", "in_a_save", "trainings", "wrong"), 0)
    usual = kill.train_whole(demo / "config.yaml", tmp_path, ranks=1)
    kill.train_round(demo / "config.yaml", tmp_path, random.Random(0), figures, ranks=1, usual=usual)
    assert figures["training_kills"] and figures["trainings"] == 1 and not figures["wrong"], figures


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_a_cut_cable_ends_both_hosts_in_time_with_one_line_each(demo: Path, tmp_path: Path, monkeypatch) -> None:
    namespaces, forked = load("namespaces", monkeypatch), load("forked", monkeypatch)
    if lack := namespaces.lacking():
        pytest.skip(lack)
    monkeypatch.setattr(forked, "_server", ranks._server)
    words = ["train", demo / "config.yaml", f"output_dir={tmp_path}", "run_name=run", "checkpoint.every_steps=1"]
    words += ["train.max_steps=100000", "eval.before_first_step=false", "eval.every_epochs=0"]
    words += ["parallel.timeout_minutes=0.05", "log.tensorboard=false"]
    checkpoints = tmp_path / "run" / "checkpoints"
    with (
        namespaces.two_hosts(tmp_path) as hosts,
        forked.running(tmp_path / "said", *words, ranks=2, hosts=hosts) as command,
    ):
        deadline = time.monotonic() + 100
        while not list(checkpoints.glob("global_step????????")):
            assert not command.ended() and time.monotonic() < deadline, command.lines()
            time.sleep(0.01)
        hosts[1].plug("down")
        assert command.ended(30), "a rank still waits"
    assert command.codes() == [1, 1]
    for rank, host in enumerate(hosts):
        told = [line for line in command.lines(rank) if line.startswith("transpixeler: ")]
        assert len(told) == 1, told
        for part in (f"on {host.name}: another rank", "parallel.timeout_minutes=0.05", "--resume goes on from global_"):
            assert part in told[0]


# --- disks -----------------------------------------------------------------------------------------------------------


def _caches_on_a_full_disk(rank: int, world_size: int, campaign: Path, config: Path, folder: Path) -> list[Any]:
    import contextlib
    import ctypes
    import io

    from transpixeler import cli

    sys.path.insert(0, str(campaign))
    disks = importlib.import_module("disk")
    assert not ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: mounts that nobody else sees
    disks._mount("--make-rprivate", "/")
    words, codes, said = ["cache", str(config), f"data.cache_dir={folder / 'disk' / 'cache'}"], [], io.StringIO()
    with disks.disk(folder / "disk") as place, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        place.fill(left=20_000)
        codes.append(cli.main(words))
        place.mend()
        codes.append(cli.main(words))
        place.make_read_only()
        codes.append(cli.main([*words, "data.resolutions=[48]"]))  # other clips, which the cache lacks
        place.mend()
        codes.append(cli.main([*words, "--verify"]))
    return [codes, [line for line in said.getvalue().splitlines() if line.startswith("transpixeler: ")]]


def test_a_full_disk_and_a_read_only_one_are_told_in_one_line(demo: Path, tmp_path: Path, monkeypatch) -> None:
    if lack := load("namespaces", monkeypatch).lacking():
        pytest.skip(lack)
    codes, said = ranks.run_ranks(_caches_on_a_full_disk, 1, CAMPAIGN, demo / "config.yaml", tmp_path)[0]
    assert codes == [1, 0, 2, 0] and len(said) == 2, said
    assert "no space left" in said[0] and "cannot be written" in said[1]


# --- a soak ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "told"),
    [
        ((0.0, 0, 0), []),
        ((0.03, 0, 0), []),  # MiB in half a second, as noise may be
        ((0.5, 0, 0), ["rss_mib"]),
        ((0.0, 1, 0), ["files"]),
        ((0.0, 0, 1), ["threads"]),
    ],
)
def test_what_grows_after_the_warm_up_is_found(growth: tuple[float, int, int], told: list[str], monkeypatch) -> None:
    soak, draw = load("soak", monkeypatch), random.Random(0)
    mib, files, threads = growth
    looks = [
        soak.Look(500 + number * mib + draw.uniform(0, 5), 20 + files * (number // 50), 4 + threads * (number // 50))
        for number in range(300)
    ]
    assert [line.split()[0] for line in soak.grown(looks)] == told
    here = soak.look(Path("/proc/self"))
    assert here.rss_mib > 10 and here.files > 2 and here.threads > 0
