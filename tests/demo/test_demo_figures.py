"""The demo's model really learned: its VAE, its base on held-out captions, and an adapter trained on it in a minute."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tooling import torchrun

from tests.support.shared import made_once, session_folder
from tests.support.toolbox import TOOLS
from transpixeler.config.sections import UserError
from transpixeler.demo.model import ASSETS, random_parts, trained_parts
from transpixeler.demo.scenes import Format, Scene, scenes
from transpixeler.demo.write import write_demo
from transpixeler.evaluation import metrics

SQUARE = Format(64, 64, 17, Fraction(16))
HELD_OUT = tuple(scenes(40, formats=[SQUARE], held_out=True, seed=3))


@pytest.fixture(scope="module", autouse=True)
def _tools_are_importable() -> None:
    sys.path.insert(0, str(TOOLS))


# --- the measurements ------------------------------------------------------------------------------------------------


def test_colour_direction_and_silhouette_are_read_off_what_was_drawn() -> None:
    import demo_figures
    import demo_measures

    for scene in HELD_OUT:
        true = demo_figures.true_streams(scene)
        assert all(demo_measures.follows(true["rgb"], scene.attributes).values())
        assert demo_measures.silhouette_iou(true["rgb"], true["seg"].mean(-1) / 255) > 0.9


def test_what_is_wrong_is_measured_as_wrong() -> None:
    import demo_figures
    import demo_measures

    for scene in HELD_OUT[:10]:
        true = demo_figures.true_streams(scene)
        backwards, dyed = true["rgb"][::-1], true["rgb"][..., [1, 2, 0]]
        if scene.attributes.color == "white":
            dyed = dyed * np.uint8([1, 0, 0])
        assert not demo_measures.follows(backwards, scene.attributes)["direction"]
        assert not demo_measures.follows(dyed, scene.attributes)["color"]
        moved = np.roll(true["seg"].mean(-1) / 255, 16, axis=2)
        assert demo_measures.silhouette_iou(true["rgb"], moved) < 0.6
        assert demo_measures.silhouette_iou(true["rgb"], 0 * moved) == 0
    black = np.zeros((17, 64, 64, 3), np.uint8)
    assert demo_measures.silhouette_iou(black, black[..., 0] / 255) == 0
    assert not any(demo_measures.follows(black, HELD_OUT[0].attributes).values())


# --- the weights -----------------------------------------------------------------------------------------------------


def test_the_weights_are_small_and_have_a_card() -> None:
    assert sum(file.stat().st_size for file in ASSETS.glob("*.safetensors")) <= 8 * 2**20
    assert "never seen an alpha" in (ASSETS / "README.md").read_text().replace("\n  ", " ")


def test_the_vae_gives_held_out_clips_back_and_a_random_one_does_not() -> None:
    import demo_figures
    import demo_vae

    def psnr(vae: torch.nn.Module, scene: Scene, name: str) -> float:
        video = demo_figures.true_streams(scene)[name]
        return metrics.psnr(demo_vae.round_trip(vae, [video])[0] / np.float32(255), video / np.float32(255))

    trained, fresh = trained_parts(ASSETS).vae, random_parts(0).vae
    for name in ("rgb", "seg"):
        assert np.mean([psnr(trained, scene, name) for scene in HELD_OUT[:8]]) >= 26
        assert psnr(fresh, HELD_OUT[0], name) < 15


def test_random_text_features_tell_every_attribute_of_a_held_out_caption() -> None:
    import train_demo_weights

    assert train_demo_weights.text_separation(trained_parts(ASSETS)) == 1.0
    deaf = random_parts(0)
    with torch.no_grad():
        deaf.text_encoder.shared.weight.fill_(1.0)
    assert train_demo_weights.text_separation(deaf) < 0.7


def test_the_transformer_begins_by_looking_at_what_is_near() -> None:
    import train_demo_weights

    def felt(transformer: torch.nn.Module) -> torch.Tensor:
        """How much the first of four tokens in a column depends on each."""
        latents = torch.randn(1, 16, 1, 8, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
        text = torch.zeros(1, 4, transformer.config.text_dim)
        out = transformer(latents, torch.tensor([500]), text, return_dict=False)[0]
        (slope,) = torch.autograd.grad(out[..., :2, :].square().sum(), latents)
        return slope.unflatten(3, (4, 2)).square().sum((0, 1, 2, 4, 5)).sqrt()

    transformer = random_parts(0).transformer
    before = felt(transformer)
    train_demo_weights.look_near(transformer)
    after = felt(transformer)
    assert after[1] > 2.5 * after[3] and before[1] < 1.2 * before[3]


def test_the_vae_s_training_lowers_its_error_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    import demo_vae

    monkeypatch.setattr(demo_vae, "SCENES", 4)
    phases = tuple(demo_vae.Phase(frames=f, side=16, batch=4, steps=16, lr=3e-3) for f in (1, 5))

    def error(vae: torch.nn.Module) -> float:
        videos = [demo_vae.views(scene)[1][:5] for scene in HELD_OUT[:2]]
        return float(np.mean([(a.astype(float) - b) ** 2 for a, b in zip(demo_vae.round_trip(vae, videos), videos)]))

    whole, start = demo_vae.fresh_vae(0), error(demo_vae.fresh_vae(0))
    demo_vae.train_vae(whole, tmp_path / "whole", seed=0, phases=phases)
    assert error(whole) < 0.8 * start
    parts = [demo_vae.fresh_vae(0) for _ in range(2)]
    demo_vae.train_vae(parts[0], tmp_path / "parts", seed=0, phases=phases[:1])
    demo_vae.train_vae(parts[1], tmp_path / "parts", seed=0, phases=phases)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts[1].state_dict().values()))
    assert any(not torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts[0].state_dict().values()))


# --- an adapter, as `make demo` trains it, for a minute --------------------------------------------------------------

# On fewer and shorter clips, in smaller batches at a higher rate, it learns nearly as much in a fraction of the time.
LESS = (
    "data.frames=[9]",
    "train.global_batch=4",
    "train.max_steps=100",
    "optim.lr=3e-3",
    "eval.every_epochs=0",
    "eval.before_first_step=false",
    "checkpoint.every_steps=0",
)
MEASURED = ("sample.steps=4", "--captions", "5")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, float]]:
    """Lend what `tools/demo_figures.py` says in its last line of an adapter that was trained for a minute."""
    with made_once(session_folder(tmp_path_factory) / "shared/taught", _teach_and_measure) as folder:
        yield json.loads((folder / "figures.json").read_text())


def _teach_and_measure(folder: Path) -> None:
    write_demo(folder, train_clips=32, eval_clips=1)
    launch("-m", "transpixeler", "train", folder / "config.yaml", *LESS, ranks=1)
    said = launch(TOOLS / "demo_figures.py", folder / "output/latest", *MEASURED, "--picture", folder / "f.png")
    assert (folder / "f.png").read_bytes().startswith(b"\x89PNG")
    (folder / "figures.json").write_text(said.splitlines()[-1])


def launch(*words: object, ranks: int = 2) -> str:
    """Under torchrun; what they print."""
    command = [sys.executable, *torchrun(ranks), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_captions_are_followed_with_an_adapter_and_without(figures: dict[str, float]) -> None:
    assert figures["color_base"] >= 0.85 and figures["direction_base"] >= 0.85
    assert figures["color"] >= 0.85 and figures["direction"] >= 0.85 and figures["rgb_drift"] < 0.08


@pytest.mark.slow
def test_the_adapter_lays_alpha_on_the_shape_and_the_base_does_not(figures: dict[str, float]) -> None:
    assert figures["alpha_iou"] >= 0.85 and figures["alpha_iou_base"] < 0.2
    assert figures["channel_spread"] <= 0.02 < figures["channel_spread_base"]


@pytest.mark.slow
def test_the_same_adapter_mattes_a_given_video_and_the_base_does_not(figures: dict[str, float]) -> None:
    assert figures["matte_seg_iou"] >= 0.8 and figures["matte_seg_iou_base"] < 0.2
    assert figures["matte_seg_mad"] < 0.5 * figures["matte_seg_mad_base"]


# --- the tools that go on where they stopped -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_weights_are_made_from_nothing_and_measured_again(tmp_path: Path, monkeypatch, capsys) -> None:
    """The tool's whole way at a thousandth of its length, twice: the second time only what comes last is done."""
    import demo_vae
    import train_demo_weights as tool

    phases = tuple(demo_vae.Phase(frames=f, side=16, batch=2, steps=2, lr=1e-3) for f in (1, 5))
    monkeypatch.setattr(demo_vae, "SCENES", 4)
    monkeypatch.setattr(tool, "train_vae", functools.partial(demo_vae.train_vae, phases=phases))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = [str(tmp_path), "--clips", "32", "--steps", "2", "--nproc", "1", "--captions", "1"]
    for _ in range(2):
        tool.main(words)
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said["bytes"] <= tool.MAX_BYTES and {"vae_psnr_rgb", "color", "direction"} <= said.keys()
    assert "2 steps of 32" in (tmp_path / "weights/README.md").read_text()
    assert trained_parts(tmp_path / "weights").vae.config.latents_std
    with pytest.raises(UserError, match="begun with clips 32, not 33"):
        tool.main([str(tmp_path), "--clips", "33"])


def test_a_sweep_measures_each_row_once_and_never_one_that_was_cut_short(tmp_path: Path, monkeypatch, capsys) -> None:
    import demo_sweep

    asked: list[str] = []

    def answer(*words: object) -> str:
        command = " ".join(map(str, words))
        asked.append(command)
        if " train " in command:
            folder = tmp_path / "pair/output" / command.rpartition("run_name=")[2]
            folder.mkdir(parents=True)  # a run of this name that exists is refused
            if len(asked) == 2:
                raise KeyboardInterrupt
            (folder / "step9").mkdir()
        return json.dumps({"alpha_iou": 0.5, "alpha_iou_base": 0.1})

    monkeypatch.setattr(demo_sweep, "_run", answer)
    words = [str(tmp_path), "--only", "rank 4", "--only", "scope all"]
    with pytest.raises(KeyboardInterrupt):
        demo_sweep.main(words)
    demo_sweep.main(words)
    assert sum(" train " in command for command in asked) == 3
    before = len(asked)
    demo_sweep.main(words)
    assert len(asked) == before
    printed = capsys.readouterr().out
    assert "| nothing: the base | 0.100 |" in printed and "| rank 4 | 0.500 |" in printed
    with pytest.raises(UserError, match="choose another folder"):
        demo_sweep.main([*words, "--captions", "7"])
    with pytest.raises(UserError, match="there is no row 'rank 5'"):
        demo_sweep.main([str(tmp_path), "--only", "rank 5"])
