"""A sample as files, read back through PyAV: its colour, its alpha, its tags, and never a half of it."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from transpixeler.config.sections import UserError
from transpixeler.data.media.write import write_mp4, write_png
from transpixeler.demo.scenes import Format, render, scenes
from transpixeler.sampling.files import alpha_of, checkerboard, over, write_sample

FPS = Fraction(16)
ALL = ("mov", "webm", "png", "png16", "checkerboard")


@pytest.fixture(scope="module")
def streams() -> dict[str, np.ndarray]:
    """A half transparent shape over grey, as a model gives it, and every alpha there is in a corner."""
    scene = scenes(2, formats=[Format(64, 48, 9, FPS)], held_out=False, seed=1)[0]
    rgba = np.stack(list(render(scene)))
    rgba[..., :3] = np.maximum(rgba[..., :3], 60)
    rgba[:, :8, :32, 3] = np.arange(256).reshape(8, 32)
    return {"rgb": rgba[..., :3], "seg": rgba[..., 3:].repeat(3, axis=3)}


def read(path: Path, layout: str = "rgb24", *, decoder: str | None = None) -> np.ndarray:
    with av.open(path) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        context = av.CodecContext.create(decoder, "r") if decoder else container.streams.video[0].codec_context
        return np.stack([f.to_ndarray(format=layout) for p in (*packets, None) for f in context.decode(p)])


def read_png(path: Path) -> np.ndarray:
    with av.open(path) as container:
        pixels = container.streams.video[0].codec_context.pix_fmt
    return read(path, {"rgba64be": "rgba64le"}.get(pixels, pixels))[0]


def error(found: np.ndarray, wanted: np.ndarray) -> int:
    assert found.shape == wanted.shape
    return int(np.abs(found.astype(int) - wanted.astype(int)).max())


def sample(folder: Path, streams: dict[str, np.ndarray], *formats: str, mode: str = "straight", background: str = ""):
    facts = {"prompt": "a “glass” star", "seed": 7}
    return write_sample(folder, streams, fps=FPS, formats=formats, alpha_mode=mode, background=background, facts=facts)


def wanted_rgba(streams: dict[str, np.ndarray], mode: str) -> np.ndarray:
    alpha = streams["seg"][..., :1]
    color = streams["rgb"] if mode == "straight" else np.rint(streams["rgb"] * (alpha / 255.0))
    return np.concatenate([color, alpha], axis=3).astype(np.uint8)


@pytest.mark.parametrize("mode", ["straight", "premultiplied"])
def test_alpha_comes_back_from_every_format_in_the_mode_that_its_file_names(tmp_path: Path, streams, mode: str) -> None:
    files = sample(tmp_path / "s", streams, *ALL, mode=mode)
    wanted = wanted_rgba(streams, mode)
    mov, webm = read(files["mov"], "rgba"), read(files["webm"], "rgba", decoder="libvpx-vp9")
    assert error(mov[..., 3], wanted[..., 3]) <= 2 and error(webm[..., 3], wanted[..., 3]) <= 2
    pngs = sorted(files["png"].iterdir())
    assert error(np.stack([read_png(path) for path in pngs]), wanted) == 0
    assert np.abs(mov[..., :3].astype(int) - wanted[..., :3]).mean() < 1
    assert np.abs(webm[..., :3].astype(int) - wanted[..., :3]).mean() < 2  # 4:2:0 blurs colour at the shape's edge
    for path in (files["mov"], files["webm"]):
        with av.open(path) as container:
            assert {key.lower(): value for key, value in container.metadata.items()}["alpha"] == mode
    assert all(f"alpha\0{mode}".encode() in path.read_bytes()[:200] for path in pngs)


def test_the_modes_differ_in_the_pixels(tmp_path: Path, streams) -> None:
    straight, premultiplied = (
        read(sample(tmp_path / mode, streams, "mov", mode=mode)["mov"], "rgba")
        for mode in ("straight", "premultiplied")
    )
    assert error(straight[..., :3], premultiplied[..., :3]) > 50
    assert premultiplied[..., :3][premultiplied[..., 3] == 0].max() <= 3


def test_sixteen_bits_keep_what_eight_round_away(tmp_path: Path, streams) -> None:
    uneven = streams["seg"].copy()
    uneven[..., 0] = np.minimum(uneven[..., 0].astype(int) + 1, 255)  # channels of a generated matte differ
    files = sample(tmp_path / "s", {"rgb": streams["rgb"], "seg": uneven}, "png16", mode="premultiplied")
    found = np.stack([read_png(path) for path in sorted(files["png16"].iterdir())])
    alpha = uneven.astype(float).mean(-1)
    assert found.dtype == np.uint16
    assert error(found[..., 3], np.rint(alpha * 257)) <= 1
    assert error(found[..., :3], np.rint(streams["rgb"] * alpha[..., None] / 255 * 257)) <= 1


def test_a_webm_says_to_browsers_that_it_has_alpha(tmp_path: Path, streams) -> None:
    with av.open(sample(tmp_path / "s", streams, "webm")["webm"]) as container:
        tags = container.streams.video[0].metadata
        assert {key.lower(): value for key, value in tags.items()}["alpha_mode"] == "1"


def test_every_stream_is_an_mp4_that_browsers_play_while_it_loads(tmp_path: Path, streams) -> None:
    files = sample(tmp_path / "s", streams, "checkerboard")
    for name in ("rgb", "seg", "checkerboard"):
        data = files[name].read_bytes()
        assert 0 < data.find(b"moov") < data.find(b"mdat")
        with av.open(files[name]) as container:
            video = container.streams.video[0]
            assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (video.frames, video.average_rate) == (9, FPS)
    assert error(read(files["seg"]), streams["seg"]) <= 2


def test_a_cut_out_lies_over_a_checkerboard(tmp_path: Path, streams) -> None:
    found = read(sample(tmp_path / "s", streams, "checkerboard", mode="premultiplied")["checkerboard"])
    wanted = over(streams["rgb"], alpha_of(streams["seg"]), checkerboard(48, 64))
    assert np.abs(found.astype(int) - wanted).mean() < 3  # small for the web: near, not exact
    hidden = found[:, 40:, :8][streams["seg"][:, 40:, :8, 0] == 0]
    assert len(hidden) and np.abs(hidden.astype(int).mean() - wanted[:, 40:, :8].mean()) < 40
    assert set(np.unique(checkerboard(16, 16))) == {153, 204}


def test_a_plate_is_a_picture_or_a_video_that_goes_round(tmp_path: Path, streams) -> None:
    write_png(tmp_path / "red.png", np.full((20, 30, 3), (200, 30, 30), np.uint8))
    greys = [np.full((96, 128, 3), level, np.uint8) for level in (40, 120, 200)]
    write_mp4(tmp_path / "greys.mp4", greys, fps=FPS)
    clear = {"rgb": streams["rgb"], "seg": np.zeros_like(streams["seg"])}
    still = read(sample(tmp_path / "a", clear, "composite", background=str(tmp_path / "red.png"))["composite"])
    assert error(still, np.broadcast_to(np.array([200, 30, 30]), still.shape)) <= 4
    moving = read(sample(tmp_path / "b", clear, "composite", background=str(tmp_path / "greys.mp4"))["composite"])
    assert [round(float(level), -1) for level in moving.mean((1, 2, 3))] == [40, 120, 200] * 3


def test_a_plate_that_is_not_there_is_one_clear_line(tmp_path: Path, streams) -> None:
    with pytest.raises(UserError, match=r"sample\.background: .*gone.png is missing"):
        sample(tmp_path / "s", streams, "composite", background=str(tmp_path / "gone.png"))
    assert not any(tmp_path.iterdir())


def test_the_still_shows_first_middle_and_last_of_all_streams(tmp_path: Path, streams) -> None:
    grid = read_png(sample(tmp_path / "s", streams)["still"])
    assert grid.shape == (3 * 48 + 8, 3 * 64 + 8, 3)
    cells = [[grid[y : y + 48, x : x + 64] for x in (0, 68, 136)] for y in (0, 52, 104)]
    for column, number in enumerate((0, 4, 8)):
        assert (cells[0][column] == streams["rgb"][number]).all()
        assert (cells[1][column] == streams["seg"][number]).all()
        wanted = over(streams["rgb"][number], streams["seg"][number, ..., 0], checkerboard(48, 64))
        assert (cells[2][column] == wanted).all()


def test_a_sample_says_what_it_was_made_with(tmp_path: Path, streams) -> None:
    files = sample(tmp_path / "s", streams, "webm", "png", mode="premultiplied")
    facts = json.loads(files["facts"].read_text(encoding="utf-8"))
    there = [(path.name, path) for key, path in files.items() if key != "facts"]
    assert sum(facts.pop("alpha_histogram")) == pytest.approx(1, abs=1e-3)
    assert facts == {
        "prompt": "a “glass” star",
        "seed": 7,
        "streams": ["rgb", "seg"],
        "width": 64,
        "height": 48,
        "frames": 9,
        "fps": "16",
        "alpha_mode": "premultiplied",
        "files": {"rgb": "rgb.mp4", "seg": "seg.mp4", "webm": "rgba.webm", "png": "png", "still": "still.png"},
        "bytes": {name: sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file()) for name, path in there},
    }
    assert all(path.exists() and path.parent == tmp_path / "s" for path in files.values())


def test_one_stream_has_no_alpha_to_show(tmp_path: Path, streams) -> None:
    files = sample(tmp_path / "s", {"rgb": streams["rgb"]}, *ALL)
    assert set(files) == {"rgb", "still", "facts"}
    assert json.loads(files["facts"].read_text())["alpha_mode"] is None
    assert read_png(files["still"]).shape == (48, 3 * 64 + 8, 3)


def test_one_frame_is_a_sample_too(tmp_path: Path, streams) -> None:
    files = sample(tmp_path / "s", {name: frames[:1] for name, frames in streams.items()}, *ALL)
    assert read(files["rgb"]).shape == (1, 48, 64, 3) and read_png(files["still"]).shape == (3 * 48 + 8, 64, 3)


def test_a_sample_is_replaced_whole_or_not_at_all(tmp_path: Path, streams) -> None:
    sample(tmp_path / "s", streams, "png")
    before = {path.name for path in (tmp_path / "s").iterdir()}
    with pytest.raises(UserError, match="background"):
        sample(tmp_path / "s", streams, "webm", "composite", background=str(tmp_path / "gone.png"))
    assert {path.name for path in (tmp_path / "s").iterdir()} == before
    sample(tmp_path / "s", streams, "webm")
    assert {path.name for path in (tmp_path / "s").iterdir()} == before - {"png"} | {"rgba.webm"}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_alpha_is_the_mean_of_the_channels() -> None:
    aux = np.array([[[[10, 20, 31], [255, 255, 255], [0, 0, 1]]]], np.uint8)
    assert alpha_of(aux).tolist() == [[[20, 255, 0]]]
