"""The Python face does what the commands do, loads nothing until it is used, and its guide runs as it is shown."""

from __future__ import annotations

import ast
import importlib
import json
import pydoc
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transpixeler as tp
from tests.support.pages import DOCS, blocks, rows
from tests.support.ranks import run_ranks
from tests.test_house import HEAVY
from transpixeler import api, cli
from transpixeler.data.media.write import write_png_sequence

GUIDE = DOCS / "python.md"
QUICK = {"steps": 1, "size": (64, 64, 5), "guidance": 2, "formats": ("png",)}


def python(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)


def test_the_import_loads_nothing_and_the_first_use_no_heavy_library(tmp_path: Path) -> None:
    heavy = sorted(HEAVY - {"PIL"})
    program = f"""if True:
        import sys
        before = set(sys.modules)
        import transpixeler as tp
        loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
        assert loaded <= {{"transpixeler", *sys.stdlib_module_names}} and "load" in dir(tp), loaded
        for name in tp._PLACES:
            getattr(tp, name)
        assert "torch" in sys.modules and not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules)
    """
    done = python(program, tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_offered_is_what_type_checkers_see_and_the_guide_lists() -> None:
    block = next(node for node in ast.parse(Path(tp.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == tp._PLACES
    listed = [name for row in rows(GUIDE, "name |") for name in re.findall(r"`(\w+)", row[0])]
    assert sorted(listed) == sorted(tp._PLACES)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = tp.lod
    assert importlib.import_module("transpixeler.config") is tp.config  # a module's name is no verb's


def test_help_tells_all_of_it_on_one_screen() -> None:
    shown = pydoc.plain(pydoc.render_doc(tp))
    screen = shown.partition("PACKAGE CONTENTS")[0]
    own = [name for name in tp._PLACES if name not in ("Model", "Sample")]  # which load and sample return
    assert all(f"tp.{name}" in screen for name in own) and "video.rgba" in screen
    assert len(shown.splitlines()) <= 40  # 25 of them are the packages, which pydoc lists after it


def test_the_guide_runs_as_it_is_shown(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "demo")
    cells = [*blocks(GUIDE, "python")]
    cells += ["assert len(losses) == 2 and (run / 'step2').is_dir(), losses", "print(video.folder / 'sample.json')"]
    done = python("\n".join(cells), tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "64×64×17: " in said and "saved " in said and "stepps: unknown key; did you mean `steps`?" in said
    made = sorted(path.parent.name for path in (tmp_path / "demo/made").glob("*/sample.json"))
    assert made == ["000-a-blue-star-seed3", "001-a-green-ring-seed1"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group that a test's calls join is left when the test ends, as it is when a process does."""
    yield
    api._leave()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def test_a_model_makes_the_files_of_the_command_and_their_frames(run: Path, tmp_path: Path, alone: None) -> None:
    words = ["sample.steps=1", "sample.size=[64,64,5]", "sample.guidance=2", "sample.formats=[png]"]
    assert cli.main(["sample", str(run), "--prompt", "a", "--prompt", "b", *words, "--out", str(tmp_path / "a")]) == 0
    model = tp.load(run)
    made = model.sample(["a", "b"], out=tmp_path / "b", **QUICK)
    assert (model.step, model.config.streams["seg"], Path(model.name).name) == (2, "_seg", "ema")
    for sheet in ("sheet.png", "sheet.html"):  # which the command makes for whoever looks
        (tmp_path / "a" / sheet).unlink()
    theirs, ours = (files_of(tmp_path / name) for name in ("a", "b"))
    assert ours == theirs and [video.folder.name for video in made if video.folder] == ["000-a-seed0", "001-b-seed1"]
    again = model.sample(tp.Prompt("b", seed=1), **QUICK)[0]  # the engine serves a second call, and arrays alone
    assert (
        again.folder is None and np.array_equal(again.rgb, made[1].rgb) and not np.array_equal(again.rgb, made[0].rgb)
    )
    assert again.rgba.shape == (5, 64, 64, 4) and again.alpha is not None
    png = sorted((tmp_path / "b/001-b-seed1/png").iterdir())[0]
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(png)), again.rgba[0])
    (tmp_path / "list.jsonl").write_text(json.dumps({"prompt": "b", "seed": 1}))
    assert np.array_equal(model.sample(tmp_path / "list.jsonl", **QUICK)[0].rgb, again.rgb)
    with pytest.raises(tp.UserError, match=r"sample\.size: 60×64 is not a multiple"):
        model.sample("a", size=(60, 64, 5))


def _train(rank: int, world_size: int, config: Path, out: Path) -> tuple[str, list[Any]]:
    heard: list[Any] = []
    overrides = (f"output_dir={out}", "train.max_steps=5", "eval.samples=0", "eval.times=[0.5]", "eval.clips=1")
    callbacks = tp.Callbacks(
        on_step=lambda line: heard.append(line["step"]) or line["step"] == 2,
        on_eval=lambda step, found: heard.append((step, sorted(found))),
        on_save=lambda folder: heard.append(folder.name),
    )
    more = ("save.every_steps=1", "save.every_epochs=0", "log.tensorboard=false", "sample.prompts=[]")
    return str(tp.train(config, *overrides, *more, callbacks=callbacks)), heard


def test_a_clip_is_made_longer_and_its_own_frames_come_back_bit_for_bit(run: Path, tmp_path: Path, alone: None) -> None:
    model, shown = tp.load(run), np.random.default_rng(0).integers(0, 256, (4, 64, 64, 4), np.uint8)
    shown[..., 3] = 255  # straight colour is kept as it is where it is opaque
    write_png_sequence(tmp_path / "clip", shown)
    between = model.sample("a", between=tmp_path / "clip", factor=2, **QUICK)[0]  # in two windows of 5 frames
    assert between.rgb.shape == (7, 64, 64, 3) and between.fps == 16
    assert np.array_equal(between.rgb[::2], shown[..., :3])
    assert not any(np.array_equal(frame, other) for frame in between.rgb[1::2] for other in shown[..., :3])
    write_png_sequence(tmp_path / "three", shown[:3])
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "extend": "three"}')
    with pytest.raises(tp.UserError, match="three has 3 frames at 16 fps; going on from them takes 5"):
        model.sample(tmp_path / "lines.jsonl", **QUICK | {"size": (64, 64, 9)})


def test_callbacks_hear_of_steps_evaluations_and_saves_and_may_end_a_training(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "demo")
    ((folder, heard),) = run_ranks(_train, 1, tmp_path / "demo/config.yaml", tmp_path / "out")
    assert heard[0][0] == 0 and heard[0][1][0] == "eval"
    assert heard[1:] == [1, "step1", 2, "step2", 3, "step3"]  # it ends one step after it was asked to
    assert (Path(folder) / "checkpoints/global_step00000003").is_dir()
    assert not (Path(folder) / "step4").exists()


def test_an_optimizer_that_only_a_runs_config_names_is_not_imported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "step2", tmp_path / "theirs")
    config = tmp_path / "theirs/config.yaml"
    config.write_text(config.read_text().replace("name: adamw", "name: theirs.Optimizer"))
    with pytest.raises(tp.UserError, match="importing it would execute it"):
        tp.read_config(config)
    assert tp.read_config(config, "optim.name=theirs.Optimizer").optim.name == "theirs.Optimizer"


def test_a_folder_of_pairs_is_encoded(demo: Path, tmp_path: Path, alone: None) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    sets = tp.encode(
        demo / "data/eval", f"model.path={demo / 'model'}", "data.resolutions=[64]", "data.frames=[5]", cache
    )
    assert sum(sets.train.buckets().values()) == 2 and not sets.eval.items
    with pytest.raises(tp.UserError, match="overrides are for a file"):
        tp.encode(tp.read_config("", "seed=1"), "seed=2")
