"""What training measures goes to a file, a terminal and boards; a disk that is full stops nobody."""

import json
from pathlib import Path

import numpy as np
import pytest

from transpixeler.config.sections import LogConfig
from transpixeler.runs.telemetry import Telemetry


def test_a_full_disk_loses_no_line_of_metrics_and_stops_nobody(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, LogConfig(tensorboard=False), step=0, total=3, name="x")
    telemetry.write({"step": 1})
    there = telemetry.metrics
    with Path("/dev/full").open("ab", buffering=0) as telemetry.metrics:
        for step in (2, 3):
            telemetry.write({"step": step})
    telemetry.metrics = there
    telemetry.write({"step": 4})
    telemetry.close()
    told = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told == [1, 2, 3, 4]


def test_lines_that_a_full_disk_never_took_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry(tmp_path, LogConfig(tensorboard=False), step=0, total=2, name="x")
    telemetry.metrics.close()
    with Path("/dev/full").open("ab", buffering=0) as telemetry.metrics:
        for step in (1, 2):
            telemetry.write({"step": step})
        telemetry.close()
    kept, lost = caplog.messages
    assert "kept until there is room" in kept and "its last 2 lines are lost" in lost


def test_a_board_that_cannot_write_is_left(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    telemetry = Telemetry(tmp_path, LogConfig(tensorboard=False), step=0, total=1, name="x")
    telemetry.board = Full()
    for step in (1, 2):
        telemetry.scalars(step, {"loss": 1.0})
    telemetry.close()
    assert telemetry.board is None


def test_videos_stand_on_the_board(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = np.zeros((7, 40, 1000, 3), np.uint8)
    frames[..., 0] = np.arange(7)[:, None, None] * 40
    telemetry = Telemetry(tmp_path, LogConfig(), step=0, total=1, name="x")
    telemetry.video(3, "samples/star", frames, fps=8)
    telemetry.close()
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {"samples/star"}
    (video,) = board.Images("samples/star")
    import io

    gif = Image.open(io.BytesIO(video.encoded_image_string))
    assert (gif.format, gif.n_frames, gif.info["duration"], video.step) == ("GIF", 7, 120, 3)
    assert gif.size == (video.width, video.height) == (334, 14)
    gif.seek(6)
    assert abs(gif.convert("RGB").getpixel((5, 5))[0] - 240) <= 4
