"""A list of prompts makes what each of its lines alone would make, goes on where it was killed, and shows all of it."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.ranks import run_ranks
from tests.training.trainings import Forked
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.data import given
from transpixeler.data.media import decode
from transpixeler.data.media.write import write_mp4, write_png
from transpixeler.data.prompts import GivenFiles
from transpixeler.files import clear_unfinished
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling import command, made
from transpixeler.sampling.files import write_sample
from transpixeler.sampling.requests import Request
from transpixeler.sampling.saves import load_saved
from transpixeler.sampling.sheet import write_sheet

SAMPLE = ("sample.steps=1", "sample.guidance=2", "sample.size=[64,64,5]", "sample.formats=[png]")


def listed(folder: Path, *objects: dict[str, Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


def sample(run: Path, out: Path, *words: str) -> list[Path]:
    assert cli.main(["sample", str(run), *SAMPLE, *words, "--out", str(out)]) == 0
    return sorted(path for path in out.iterdir() if path.is_dir())


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sample.json").read_text())


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_line_makes_what_it_would_make_alone(run: Path, demo: Path, tmp_path: Path) -> None:
    clip = next(path for path in sorted((demo / "data/eval").glob("*_seg.mp4")) if decode.probe(path).frames > 4)
    link = tmp_path / "matte.mp4"
    link.symlink_to(clip)
    line = {"prompt": "a blue cube", "seed": 41, "negative": "grey", "size": [48, 64, 1]}
    objects = [{"prompt": "a red ball"}, line, {"prompt": "", "alpha": "matte.mp4", "seed": 3}]
    plain, sized, painted = sample(run, tmp_path / "list", "--prompts", listed(tmp_path, *objects))
    assert plain.name == "000-a-red-ball-seed0" and sized.name == "001-a-blue-cube-seed41"
    told = facts(sized)
    assert (told["width"], told["height"], told["frames"], told["negative_prompt"]) == (48, 64, 1, "grey")
    assert facts(painted)["given"] == ["seg"] and facts(painted)["alpha"] == str(link)
    alone = sample(run, tmp_path / "sized", "--prompt", "a blue cube", "--seed", "41", "--size", "48x64x1",
                   "sample.negative_prompt=grey")[0]  # fmt: skip
    other = sample(run, tmp_path / "usual", "--prompt", "a blue cube", "--seed", "41", "--size", "48x64x1")[0]
    by_option = sample(run, tmp_path / "painted", "--prompt", "", "--seed", "3", "--alpha", str(clip))[0]
    assert pixels(sized) == pixels(alone) != pixels(other)
    assert pixels(painted) == pixels(by_option)


def pixels(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.mp4"))]


def test_several_videos_of_a_line_count_up_from_its_seed(run: Path, tmp_path: Path) -> None:
    lines = listed(tmp_path, {"prompt": "a", "seed": 5, "size": [32, 32, 1]}, {"prompt": "b", "size": [32, 32, 1]})
    made = sample(run, tmp_path / "out", "--prompts", lines, "--count", "2", "--seed", "100")
    assert [facts(folder)["seed"] for folder in made] == [5, 6, 102, 103]
    assert Image.open(tmp_path / "out/sheet.png").width < 2.5 * (32 + 4)  # a row for each prompt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "x", "size": [60, 64, 5]}, ":2: size: 60×64 is not a multiple of 16×16 pixels"),
        ({"prompt": "x", "rgb": "nowhere.mp4"}, ":2: rgb: HERE/nowhere.mp4 is missing"),
        ({"prompt": "x", "alpha": "short.mp4"}, ":2: alpha: HERE/short.mp4 has 3 frames at 16 fps, not 5; try"),
        (
            {"prompt": "x", "last": "a.png"},
            ":2: last: needs the first frame too; give it with HERE/prompts.jsonl:2: image",
        ),
        (
            {"prompt": "x", "rgb": "short.mp4", "alpha": "short.mp4"},
            ":2: alpha: every stream is given and none is left",
        ),
        (
            {"prompt": "x", "reference": "a.png"},
            ":2: rgb: HERE/a.png has 1 frames at 16 fps, not 5",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_line_that_cannot_be_made_is_told_before_the_model_is_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, line: dict[str, Any], said: str
) -> None:
    write_png(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    write_mp4(tmp_path / "short.mp4", np.zeros((3, 64, 64, 3), np.uint8), fps=Fraction(16))
    path = listed(tmp_path, {"prompt": "good"}, line)
    assert cli.main(["sample", str(run), *SAMPLE, "--prompts", path, "--out", str(tmp_path / "out")]) == 2
    assert said.replace("HERE", str(tmp_path)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reference_is_what_the_trained_tasks_are_given(demo: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    write_mp4(tmp_path / "clip.mp4", np.zeros((5, 64, 64, 3), np.uint8), fps=Fraction(16))
    for tasks, file, kind in (
        ("rgb_to_aux: 1", "clip.mp4", "rgb"),
        ("aux_to_rgb: 1, joint: 1", "clip.mp4", "alpha"),
        ("image_to_video: 1", "a.png", "image"),
        ("last_to_video: 1", "a.png", "last"),
    ):
        none = "joint: 0, rgb_to_aux: 0, aux_to_rgb: 0"
        words = [f"objective.tasks={{{none}}}", f"objective.tasks={{{tasks}}}"]
        config = loading.load(demo / "config.yaml", words)
        asked = GivenFiles(reference=str(tmp_path / file))
        found = given.check_given_files(asked, config, open_model(config.model), (5, 64, 64))
        assert found == GivenFiles(**{kind: str(tmp_path / file)})
    words = [f"objective.tasks={{{none}}}", "objective.tasks={rgb_to_aux: 1, aux_to_rgb: 1}"]
    for overrides, said in (
        (words, "its tasks are given alpha, rgb"),
        ([*words[:1], "objective.tasks.joint=1"], "none"),
    ):
        config = loading.load(demo / "config.yaml", overrides)
        with pytest.raises(UserError, match=f"reference: {said}"):
            given.check_given_files(asked, config, open_model(config.model), (5, 64, 64))


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_call_that_is_killed_goes_on_to_the_same_files(run: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"a ball of colour {n}", "negative": "grey" if n % 2 else ""} for n in range(4)]
    words = ["--prompts", listed(tmp_path, *lines)]
    whole, out = tmp_path / "whole/made", tmp_path / "killed/made"  # of one name, which the page shows
    sample(run, whole, *words)
    process = Forked(["sample", str(run), *SAMPLE, *words, "--out", str(out)], tmp_path / "said")
    while not list(out.glob("000-*/sample.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_ino for path in out.glob("*/sample.json")}
    assert 0 < len(kept) < 4, "killed too late to tell anything"
    (out / ".003-a-ball-of-colour-3-seed3.0123456789ab.tmp").mkdir(exist_ok=True)  # what a kill in a writer leaves
    sample(run, out, *words, "--resume")
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_ino for path in kept} == kept


def test_resume_goes_by_what_was_asked_for_and_by_what_is_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def again(*words: str, resume: bool = True) -> str:
        sample(run, tmp_path / "out", *base, *words, *(["--resume"] if resume else []))
        return next((line for line in capsys.readouterr().err.splitlines() if "made already" in line), "")

    base = ["--prompt", "a", "--prompt", "b", "--size", "32x32x1"]
    again(resume=False)
    assert again() == "2 of 2 videos are made already"
    assert again("sample.guidance=3") == "0 of 2 videos are made already"  # under the same names
    assert (
        again("sample.guidance=3", "sample.rgb_memory=off", "parallel.recompute=full")
        == "2 of 2 videos are made already"
    )
    assert again("sample.guidance=3", "--no-ema") == "0 of 2 videos are made already"
    assert again("sample.guidance=3", "--no-ema", "--format", "mov") == "0 of 2 videos are made already"
    words = ("sample.guidance=3", "--no-ema", "--format", "mov")
    for damage in ("rgb.mp4", "rgba.mov", "still.png"):
        path = tmp_path / "out/000-a-seed0" / damage
        path.write_bytes(path.read_bytes()[:-1])
        assert again(*words) == "1 of 2 videos are made already"
    (tmp_path / "out/001-b-seed1/sample.json").write_text("{")
    assert again(*words) == "1 of 2 videos are made already"
    assert again(*words) == "2 of 2 videos are made already"


def test_another_file_under_the_same_name_is_another_request(run: Path, tmp_path: Path) -> None:
    def made_from(colour: int, *words: str) -> bytes:
        write_mp4(tmp_path / "clip.mp4", np.full((5, 64, 64, 3), colour, np.uint8), fps=Fraction(16), lossless=True)
        (folder,) = sample(run, tmp_path / "out", "--alpha", str(tmp_path / "clip.mp4"), *words)
        return (folder / "seg.mp4").read_bytes()

    black = made_from(0)
    assert made_from(0, "--resume") == black != made_from(255, "--resume")


def test_a_request_is_told_by_the_images_of_a_sequence_and_by_what_reads_them(run: Path, tmp_path: Path) -> None:
    for place, colour in (("a", 0), ("b", 9)):
        (tmp_path / place).mkdir()
        for number in range(5):
            write_png(tmp_path / place / f"fire.{number:04}.png", np.full((64, 64, 3), colour, np.uint8))

    def digest(place: str, *words: str) -> str:
        saved = load_saved(str(run), words)
        files = GivenFiles(rgb=str(tmp_path / place / "fire.####.png"))
        one = Request("000", "a", 0, (64, 64, 5), given=files)
        return made.asked_for([one], saved, open_model(saved.config.model))[0]

    write_png(tmp_path / "plate.png", np.zeros((64, 64, 3), np.uint8))
    laid_over = ("sample.formats=[composite]", f"sample.background={tmp_path / 'plate.png'}")
    before = digest("a", *laid_over)
    write_png(tmp_path / "plate.png", np.ones((64, 64, 3), np.uint8))
    assert digest("a", *laid_over) != before
    same = digest("a")
    others = digest("b"), digest("a", "data.transfer=rec709"), digest("a", "data.sequence_fps=8")
    assert same == digest("a") and same not in others
    (tmp_path / "a/fire.0004.png").unlink()
    assert digest("a") != same


def test_ways_to_save_memory_in_training_do_not_stop_sampling(run: Path, tmp_path: Path) -> None:
    words = ("parallel.recompute=offload", "parallel.host_gb=1")
    assert sample(run, tmp_path / "out", "--prompt", "a", "--size", "32x32x1", *words)


def _resume_on_ranks(rank: int, world_size: int, run: Path, out: Path) -> list[str]:
    runtime = Runtime(rank, world_size, rank, torch.device("cpu"))
    options = command.SampleOptions(prompts=("a red ball", "a blue cube"), out=str(out), resume=True)
    return [path.name for path in command.sample_command(load_saved(str(run), SAMPLE), runtime, options).own]


def test_ranks_make_only_what_is_left_of_a_list(run: Path, tmp_path: Path) -> None:
    _, lost = sample(run, tmp_path, "--prompt", "a red ball", "--prompt", "a blue cube")
    shutil.rmtree(lost)
    assert run_ranks(_resume_on_ranks, 2, run, tmp_path) == [[lost.name], []]
    assert facts(lost)["prompt"] == "a blue cube"
    assert run_ranks(_resume_on_ranks, 2, run, tmp_path) == [[], []]


def answer(folder: Path, name: str, digest: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "rgb.mp4").write_bytes(b"12")
    (folder / name / "sample.json").write_text(json.dumps({"asked": digest, "bytes": {"rgb.mp4": 2}}))


def wanted(names: Sequence[str]) -> list[Request]:
    return [Request(name, "", 0, (1, 1, 1)) for name in names]


def test_a_sample_that_will_be_replaced_does_not_count(tmp_path: Path) -> None:
    answer(tmp_path, "0", "A")
    assert made.find_made(tmp_path, wanted(["0", "1"]), ["B", "A"]) == {}
    answer(tmp_path, "1", "B")
    assert made.find_made(tmp_path, wanted(["0", "1"]), ["B", "A"]) == {0: tmp_path / "1", 1: tmp_path / "0"}
    assert made.find_made(tmp_path, wanted(["1", "2"]), ["B", "A"]) == {0: tmp_path / "1", 1: tmp_path / "0"}
    answer(tmp_path, "2", "A")
    assert made.find_made(tmp_path, wanted(["1", "2"]), ["B", "A"]) == {0: tmp_path / "1", 1: tmp_path / "2"}
    assert made.find_made(tmp_path / "nowhere", wanted(["1"]), ["B"]) == {}


def test_only_what_a_kill_left_of_these_names_is_removed(tmp_path: Path) -> None:
    keeps = [".mine.tmp", ".b.0123456789ab.tmp", "a", ".a.0123456789abc.tmp", ".a.0123456789ab.txt"]
    for name in (*keeps, ".a.0123456789ab.tmp", ".a.ba9876543210.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".a.0123456789ab.new").touch()
    clear_unfinished(tmp_path, {"a"})
    assert {path.name for path in tmp_path.iterdir()} == set(keeps)
    clear_unfinished(tmp_path / "nowhere", {"a"})


# --- the sheet -------------------------------------------------------------------------------------------------------


def test_a_sheet_shows_every_sample_in_order(tmp_path: Path) -> None:
    folders = []
    for number, (height, width) in enumerate([(64, 64), (32, 64), (64, 32)]):
        rgb = np.full((3, height, width, 3), 60 + 60 * number, np.uint8)
        streams = {"rgb": rgb, "seg": np.full_like(rgb, 255)}
        folders.append(tmp_path / f"{number}")
        write_sample(folders[-1], streams, fps=Fraction(16), formats=[], alpha_mode="straight", facts={})
    assert write_sheet(tmp_path, [*folders, tmp_path / "elsewhere"], columns=2) == tmp_path / "sheet.png"
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4 + 2 * (64 + 4 + 16), 4 + 2 * (64 + 4), 3)
    corners = [(4 + 16, 4), (4 + 16, 4 + 68), (4 + 84 + 16, 4)]
    assert [int(sheet[y, x, 0]) for y, x in corners] == [60, 120, 180]
    assert (sheet[4:18] < 128).any(), "a name stands above each"
    assert write_sheet(tmp_path, folders[:1]) is None


def test_a_call_leaves_a_sheet_of_all_that_was_asked_for(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path / "out", "--prompt", "a", "--size", "32x32x1")
    assert not (tmp_path / "out/sheet.png").exists()
    sample(run, tmp_path / "out", "--prompt", "a", "--prompt", "b", "--size", "32x32x1", "--resume")
    assert Image.open(tmp_path / "out/sheet.png").width == 2 * (32 + 4) + 4
