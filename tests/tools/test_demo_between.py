"""The measures of `demo_between`: the truth passes, and a video that holds still or is a step late does not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import tests.support.toolbox  # noqa: F401 - the tools are found from here on
from transpixeler.config import loading
from transpixeler.demo.scenes import Format, scenes
from transpixeler.demo.write import CONFIG
from transpixeler.flow.tasks import tasks, trained
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.video import Video

SCENES = scenes(3, formats=[Format(64, 64, 17, Fraction(16))], held_out=True, seed=2)
KNOWN = tasks(("rgb", "seg"))


def test_only_what_moves_as_the_truth_does_is_right() -> None:
    import demo_between as tool
    from demo_figures import true_streams

    assert tool.made_frames(KNOWN["interpolate"], 17) == [n for n in range(17) if n % 4]
    assert tool.made_frames(KNOWN["extend"], 17) == [*range(5, 17)]
    for scene in SCENES:
        true = true_streams(scene)
        late = {name: np.concatenate([video[:2], video[:-2]]) for name, video in true.items()}
        for name, near in tool.NEAR.items():
            frames = tool.made_frames(KNOWN[name], 17)
            held = {key: video[tool.nearest(frames)] for key, video in true.items()}
            right, wrong = tool.measured(true, true, frames, near), tool.measured(held, true, frames, near)
            assert right["motion"] == right["every"] == 1 and right["center_off"] == 0 and not wrong["motion"], name
        assert not tool.measured(late, true, tool.made_frames(KNOWN["interpolate"], 17), tool.NEAR["interpolate"])[
            "near"
        ]


def test_frames_that_fade_into_each_other_are_no_motion() -> None:
    """Their centre moves as the truth's does, nearly to a pixel; so it is asked that one shape is seen."""
    import demo_between as tool
    from demo_figures import true_streams

    frames = tool.made_frames(KNOWN["interpolate"], 17)
    near = 0
    for scene in scenes(6, formats=[Format(64, 64, 17, Fraction(16))], held_out=True, seed=2):
        true = true_streams(scene)
        faded = tool.faded(true, frames)
        assert all(np.array_equal(faded["rgb"][n], true["rgb"][n]) for n in (0, 4, 8, 12, 16))
        found = tool.measured(faded, true, frames, tool.NEAR["interpolate"])
        assert found["way"] and not found["one"] and not found["motion"] and not found["every"]
        near += int(found["near"])
    assert near >= 3


def test_a_given_latent_that_was_changed_by_a_bit_is_found() -> None:
    import demo_between as tool

    task = KNOWN["interpolate"]
    layout = task.cut(StreamLayout.equal(("rgb", "seg"), (2, 3, 4, 4), (1, 2, 2)).with_beside(task.beside, 9))
    made = torch.randn(layout.elements)
    parts = list(zip(layout.segments, layout.unpack(made[None]), strict=True))
    given = {one.stream: part[0, :, :1].clone() for one, part in parts if not one.alone}
    beside = {one.stream: part[0].clone() for one, part in parts if one.alone}
    video = Video("", "", {}, 0, layout, given, beside)
    assert tool.given_kept(video, made)
    made[-1] = torch.nextafter(made[-1], torch.tensor(9.0))
    assert not tool.given_kept(video, made)
    assert "red" not in tool.still_words(SCENES[0].attributes) and "left" not in tool.still_words(SCENES[0].attributes)


def test_the_whole_base_learns_both_tasks_and_no_other(tmp_path: Path) -> None:
    import demo_between as tool
    from demo_image import KEYS

    (tmp_path / "config.yaml").write_text(CONFIG)
    made = loading.load(tmp_path / "config.yaml", [*KEYS, *(key for keys in tool.STAGES.values() for key in keys)])
    assert {task.name for task in trained(made.objective, tuple(made.streams))} == set(tool.NEAR)
    assert not made.lora.enabled and made.optim.name == "muon" and made.data.frames == (tool.SQUARE.frames,)
