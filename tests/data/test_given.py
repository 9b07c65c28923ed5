"""A picture that a prompt gives: encoders see what videos are made from, and a file that changes meanwhile is told."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.data.given import GivenPicture, read_given
from transpixeler.data.media.write import write_mp4
from transpixeler.data.prompts import GivenFiles
from transpixeler.models.family import open_model

SIZE = (5, 64, 48)
DRAWS = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "file", "tasks", "filled"),
    [
        ("rgb", "clip.mp4", "rgb_to_aux: 1", False),
        ("image", "still.png", "images_to_videos: 1", False),
        ("image", "alpha.png", "images_to_videos: 1", True),
        ("image", "alpha.png", "image_to_video: 1", False),
        ("image", "clip.mp4", "image_to_video: 1", False),
    ],
)
def test_a_given_picture_is_the_first_frame_that_is_read(
    name: str, file: str, tasks: str, filled: bool, demo: Path, tmp_path: Path
) -> None:
    film = [DRAWS.integers(0, 256, (70, 90, 3), np.uint8) for _ in range(8)]
    write_mp4(tmp_path / "clip.mp4", film, fps=Fraction(12))
    Image.fromarray(film[0]).save(tmp_path / "still.png")
    Image.fromarray(DRAWS.integers(0, 256, (70, 90, 4), np.uint8)).save(tmp_path / "alpha.png")
    words = [
        "objective.tasks={joint: 0, rgb_to_aux: 0, aux_to_rgb: 0}",
        f"objective.tasks={{{tasks}}}",
        "data.fill=black",
    ]
    config = loading.load(demo / "config.yaml", words)
    model, given = open_model(config.model), GivenFiles(**{name: str(tmp_path / file)})
    found = GivenPicture.of(given, name, config, model, SIZE)
    expected = read_given(given, config, model, SIZE).seen
    assert expected is not None and np.array_equal(found.read(), expected) and expected.shape == (64, 48, 3)
    assert found.filled == filled and len(found.key) == 32


def test_a_picture_that_is_edited_after_its_key_was_made_is_refused(demo: Path, tmp_path: Path) -> None:
    config, given = loading.load(demo / "config.yaml"), GivenFiles(image=str(tmp_path / "a.png"))
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "a.png")
    found = GivenPicture.of(given, "image", config, open_model(config.model), SIZE)
    Image.new("RGB", (64, 64), (40, 40, 200)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"--image: .*a\.png was changed while this started; start again"):
        found.read()
