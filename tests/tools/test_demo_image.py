"""The command that continues RGBA images measures what it says; what it teaches is a matter of longer trainings."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tooling import run

from tests.support.toolbox import TOOLS
from transpixeler.demo.scenes import COLORS, Format, scenes

SCENES = scenes(14, formats=[Format(64, 64, 17, Fraction(16))], held_out=True, seed=5)


@pytest.fixture(scope="module", autouse=True)
def _tools_are_importable() -> None:
    sys.path.insert(0, str(TOOLS))


def test_the_truth_goes_on_and_what_is_wrong_does_not() -> None:
    import demo_image
    from demo_figures import true_streams

    truths = [true_streams(scene) for scene in SCENES]
    for number, true in enumerate(truths):
        right = demo_image.measured(true, true)
        assert right["alpha_iou_truth"] == 1 and right["alpha_iou"] > 0.9 and right["center_off"] == 0
        assert right["color"] == right["position"] == right["opacity"] == right["color_and_position"] == 1
        strange = truths[demo_image.stranger(SCENES, number)]
        assert not demo_image.measured(strange, true)["color_and_position"]
        moved = {name: np.pad(video[:, :, :-12], ((0, 0), (0, 0), (12, 0), (0, 0))) for name, video in true.items()}
        assert not demo_image.measured(moved, true)["position"]
        dyed = {**true, "rgb": true["rgb"][..., [1, 2, 0]] // np.uint8([1, 1, 2])}
        assert not demo_image.measured(dyed, true)["color"]
        assert not demo_image.measured({**true, "seg": true["seg"] // 2}, true)["opacity"]
        assert demo_image.measured({**true, "seg": 0 * true["seg"]}, true)["alpha_iou_truth"] == 0
    black = {name: 0 * video for name, video in truths[0].items()}
    assert not demo_image.measured(black, truths[0])["color_and_position"]


def test_captions_say_no_colour_and_a_stranger_has_another_one() -> None:
    import demo_image

    for number, scene in enumerate(SCENES):
        caption = demo_image.colorless(scene.attributes)
        assert not any(color in caption for color in COLORS) and scene.attributes.shape in caption
        assert SCENES[demo_image.stranger(SCENES, number)].attributes.color != scene.attributes.color


def test_a_given_frame_that_was_changed_by_a_bit_is_found() -> None:
    import demo_image

    given = {0: torch.randn(4, 1, 2, 2), 1: torch.randn(4, 1, 2, 2)}
    made = [torch.cat([part, torch.randn(4, 2, 2, 2)], dim=1) for part in given.values()]
    assert demo_image.given_kept(made, given)
    made[1][0, 0, 0, 0] = torch.nextafter(made[1][0, 0, 0, 0], torch.tensor(9.0))
    assert not demo_image.given_kept(made, given)


def test_the_whole_way_in_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import demo_image

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    few = ("train.max_steps=2", "checkpoint.every_steps=1", "optim.warmup_steps=0")
    monkeypatch.setattr(demo_image, "STAGES", {"taught": (*demo_image.STAGES["taught"], *few)})
    words = [str(tmp_path), "--clips", "8", "--captions", "2", "sample.steps=2"]
    for _ in range(2):  # the second time nothing is trained again
        assert run("demo_image", demo_image.main, words) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said["given_latents_bit_equal"] == 1 and said["given_pixels_off"] <= 1
        assert {"alpha_iou", "color_and_position", "color_and_position_control"} <= said.keys()
        assert said["position_vae"] == 1 and said["alpha_iou_truth_vae"] > 0.9
    assert (tmp_path / "strips.png").read_bytes().startswith(b"\x89PNG")
    assert run("demo_image", demo_image.main, [str(tmp_path), "--clips", "9"]) == 2
    assert "was begun with" in capsys.readouterr().err
