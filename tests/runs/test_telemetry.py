"""What training measures goes to a file, a terminal and boards; a disk that is full stops nobody."""

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from transpixeler.config import loading
from transpixeler.config.sections import LogConfig
from transpixeler.data.media.write import write_browser_mp4
from transpixeler.runs.boards import Clip, Settings, TensorBoard
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

    telemetry = Telemetry(tmp_path, LogConfig(), step=0, total=1, name="x")
    (board,) = telemetry.boards
    assert isinstance(board, TensorBoard)
    board.writer.close()
    board.writer = Full()
    for step in (1, 2):
        telemetry.scalars(step, {"loss": 1.0})
    telemetry.close()
    assert board.writer is None


PROMPT = "a *star* <b>falls</b>\n# and | ends"
CONFIG = loading.from_overrides(["optim.lr=2e-3", "lora.targets=[a, b]"])
SETTINGS = Settings(loading.dump(CONFIG), loading.changed(CONFIG))


def moving() -> np.ndarray:
    frames = np.zeros((7, 40, 1000, 3), np.uint8)
    frames[..., 0] = np.arange(7)[:, None, None] * 40
    return frames


def test_videos_prompts_and_settings_stand_on_the_board(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(tmp_path, LogConfig(), step=0, total=1, name="x", settings=SETTINGS)
    clip = Clip("000", PROMPT, {"rgb": tmp_path / "rgb.mp4"}, {"iou": 0.5, "mad": None})
    telemetry.samples(3, [clip], read=lambda file: moving(), fps=8)
    telemetry.close()
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {"samples/000/rgb"}
    (video,) = board.Images("samples/000/rgb")
    gif = Image.open(io.BytesIO(video.encoded_image_string))
    assert (gif.format, gif.n_frames, gif.info["duration"], video.step) == ("GIF", 7, 120, 3)
    assert gif.size == (video.width, video.height) == (334, 14)
    gif.seek(6)
    assert abs(gif.convert("RGB").getpixel((5, 5))[0] - 240) <= 4
    (prompts,), (config,) = (board.Tensors(f"{tag}/text_summary") for tag in ("samples/prompts", "run/config"))
    assert prompts.tensor_proto.string_val[0].decode() == "    000  a *star* <b>falls</b> # and | ends  iou 0.5"
    shown = config.tensor_proto.string_val[0].decode().splitlines()
    assert "    optim:" in shown and all(line.startswith("    ") for line in shown)
    told = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optim.lr" in told and b"lora.targets" in told and b"optim.betas" not in told


def test_a_run_that_goes_on_does_not_tell_its_settings_again(tmp_path: Path) -> None:
    Telemetry(tmp_path, LogConfig(), step=2, total=3, name="x", settings=SETTINGS).close()
    (events,) = tmp_path.glob("events*")
    assert b"optim.lr" not in events.read_bytes()


def test_wandb_gets_the_same_videos_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_browser_mp4(tmp_path / "rgb.mp4", moving()[:, :32, :48], fps=Fraction(8), exact=True, facts={})
    telemetry = Telemetry(
        tmp_path, LogConfig(tensorboard=False, wandb="fx"), step=0, total=2, name="x", settings=SETTINGS
    )
    clip = Clip("000", PROMPT, {"rgb": tmp_path / "rgb.mp4"}, {"iou": 0.5})
    for step in (1, 2):
        telemetry.scalars(step, {"train/loss": 1.0 / step})
        telemetry.samples(step, [clip], read=lambda file: moving(), fps=8)
    telemetry.close()
    kept = [file for file in tmp_path.rglob("media/**/*") if file.is_file()]
    videos = [file for file in kept if file.suffix == ".mp4" and "samples" in str(file)]
    assert videos and all(file.read_bytes() == (tmp_path / "rgb.mp4").read_bytes() for file in videos)
    tables = [json.loads(file.read_text()) for file in kept if file.name.endswith(".table.json")]
    last = max(tables, key=lambda table: len(table["data"]))
    assert last["columns"] == ["step", "sample", "prompt", "rgb", "iou"]
    assert [row[:3] for row in last["data"]] == [[1, "000", PROMPT], [2, "000", PROMPT]]
