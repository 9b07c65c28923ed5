"""Video files that the writers make, read back through PyAV: every frame, colour and alpha is what went in."""

import gc
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from transpixeler.config.sections import UserError
from transpixeler.data.media.write import write_mp4, write_png_sequence, write_prores4444, write_webm_alpha

RATES = [Fraction(16), Fraction(24), Fraction(30000, 1001), Fraction(60)]


def read(path: Path, layout: str, *, decoder: str | None = None) -> np.ndarray:
    with av.open(path) as container:
        stream = container.streams.video[0]
        if decoder is None:
            return np.stack([frame.to_ndarray(format=layout) for frame in container.decode(stream)])
        context = av.CodecContext.create(decoder, "r")
        packets = [packet for packet in container.demux(stream) if packet.size]
        frames = [frame for packet in (*packets, None) for frame in context.decode(packet)]
        return np.stack([frame.to_ndarray(format=layout) for frame in frames])


def error(found: np.ndarray, drawn: np.ndarray) -> int:
    assert found.shape == drawn.shape
    return int(np.abs(found.astype(int) - drawn.astype(int)).max())


def noise(*, channels: int, frames: int = 9, height: int = 34, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def translucent(frames: int = 9) -> np.ndarray:
    """One colour a frame and every alpha there is, so that a premultiplied or rescaled colour shows."""
    clip = np.empty((frames, 32, 64, 4), np.uint8)
    clip[..., :3] = np.random.default_rng(1).integers(0, 256, (frames, 1, 1, 3))
    clip[..., 3] = np.resize(np.arange(256), (32, 64))
    return clip


@pytest.mark.parametrize("fps", RATES, ids=str)
def test_a_grey_matte_comes_back_from_mp4_frame_for_frame(tmp_path: Path, fps: Fraction) -> None:
    matte = np.repeat(noise(channels=1, frames=33), 3, axis=3)
    write_mp4(tmp_path / "a_seg.mp4", matte, fps=fps)
    assert error(read(tmp_path / "a_seg.mp4", "rgb24"), matte) <= 2
    with av.open(tmp_path / "a_seg.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (33, fps)
        assert stream.duration * stream.time_base == 33 / fps


def test_every_grey_keeps_its_place_in_mp4(tmp_path: Path) -> None:
    ramp = np.resize(np.arange(256, dtype=np.uint8), (1, 16, 256))[..., None].repeat(3, axis=3)
    write_mp4(tmp_path / "ramp.mp4", ramp, fps=Fraction(16))
    found = read(tmp_path / "ramp.mp4", "rgb24")
    assert error(found, ramp) <= 2
    assert found.min() == 0 and found.max() == 255


def test_mp4_says_how_its_colours_are_meant(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", noise(channels=3), fps=Fraction(16))
    with av.open(tmp_path / "a.mp4") as container:
        frame = next(container.decode(video=0))
        assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 1, 1)
        assert container.streams.video[0].codec_context.profile == "High"


WRITERS = {"a.mp4": (write_mp4, 3), "a.mov": (write_prores4444, 4), "a.webm": (write_webm_alpha, 4)}


@pytest.mark.parametrize("name", WRITERS)
def test_every_video_says_that_its_colour_is_bt709(tmp_path: Path, name: str) -> None:
    """Matrix, primaries and transfer, in the container and in what its frames carry."""
    write, channels = WRITERS[name]
    write(tmp_path / name, noise(channels=channels), fps=Fraction(16))
    with av.open(tmp_path / name) as container:
        told = container.streams.video[0].codec_context
        container_says = (told.colorspace, told.color_primaries, told.color_trc, told.color_range)
        frame = next(container.decode(video=0))
        assert container_says == (1, 1, 1, 1)
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)


def test_lossless_mp4_keeps_colour_at_an_odd_size(tmp_path: Path) -> None:
    clip = noise(channels=3, height=33, width=51)
    write_mp4(tmp_path / "a.mp4", clip, fps=Fraction(16), lossless=True)
    assert error(read(tmp_path / "a.mp4", "rgb24"), clip) <= 2


def test_flat_colours_come_back_from_mp4(tmp_path: Path) -> None:
    clip = translucent()[..., :3]
    write_mp4(tmp_path / "a.mp4", clip, fps=Fraction(16))
    assert error(read(tmp_path / "a.mp4", "rgb24"), clip) <= 3


def test_prores_keeps_straight_colour_and_alpha(tmp_path: Path) -> None:
    clip = translucent()
    write_prores4444(tmp_path / "a.mov", clip, fps=Fraction(24))
    assert error(read(tmp_path / "a.mov", "rgba"), clip) <= 2


def test_prores_keeps_noise_in_its_alpha(tmp_path: Path) -> None:
    clip = translucent()
    clip[..., 3] = noise(channels=1, height=32, width=64)[..., 0]
    write_prores4444(tmp_path / "a.mov", clip, fps=Fraction(24))
    assert error(read(tmp_path / "a.mov", "rgba")[..., 3], clip[..., 3]) <= 2


def test_prores_alpha_is_finer_than_eight_bits(tmp_path: Path) -> None:
    clip = np.full((1, 32, 64, 4), 30000, np.uint16)
    clip[0, ..., 3] = np.linspace(20000, 22000, 32 * 64).reshape(32, 64)
    write_prores4444(tmp_path / "a.mov", clip, fps=Fraction(24))
    alpha = read(tmp_path / "a.mov", "rgba64le")[..., 3]
    assert error(alpha, clip[..., 3]) <= 65535 / 1023
    assert len(np.unique(alpha)) > 3 * len(np.unique(clip[..., 3] // 257))


def test_webm_keeps_straight_colour_and_alpha(tmp_path: Path) -> None:
    clip = translucent(frames=33)
    clip[5:, ..., 3] = noise(channels=1, frames=28, height=32, width=64)[..., 0]
    write_webm_alpha(tmp_path / "a.webm", clip, fps=Fraction(30000, 1001))
    found = read(tmp_path / "a.webm", "rgba", decoder="libvpx-vp9")
    assert error(found[..., 3], clip[..., 3]) <= 2
    assert error(found[..., :3], clip[..., :3]) <= 3


def test_webm_is_tagged_for_browsers_and_its_alpha_needs_the_right_decoder(tmp_path: Path) -> None:
    write_webm_alpha(tmp_path / "a.webm", translucent(), fps=Fraction(16))
    with av.open(tmp_path / "a.webm") as container:
        stream = container.streams.video[0]
        tags = {name.lower(): value for name, value in stream.metadata.items()}
        assert tags["alpha_mode"] == "1" and stream.average_rate == 16
    assert (read(tmp_path / "a.webm", "rgba")[..., 3] == 255).all()


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [3, 4])
def test_png_frames_are_exact(tmp_path: Path, kind: str, channels: int) -> None:
    clip = noise(channels=channels, frames=3, height=33, width=51).astype(kind)
    clip = clip * 257 - (clip > 128) if kind == "uint16" else clip
    write_png_sequence(tmp_path / "frames", clip)
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    layouts = {("uint8", 3): "rgb24", ("uint8", 4): "rgba", ("uint16", 3): "rgb48le", ("uint16", 4): "rgba64le"}
    for file, frame in zip(files, clip):
        assert (read(file, layouts[kind, channels])[0] == frame).all()


@pytest.mark.parametrize("write", [write_mp4, write_webm_alpha])
def test_an_odd_size_is_refused_where_the_format_halves_it(tmp_path: Path, write) -> None:
    clip = noise(channels=3 if write is write_mp4 else 4, height=32, width=51)
    with pytest.raises(UserError, match=r"a\.mp4: 51x32 is an odd size"):
        write(tmp_path / "a.mp4", clip, fps=Fraction(16))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_mp4, write_webm_alpha, write_prores4444])
def test_no_frames_is_an_error_that_names_the_file(tmp_path: Path, write) -> None:
    with pytest.raises(UserError, match=r"a\.mp4: there are no frames"):
        write(tmp_path / "a.mp4", iter(()), fps=Fraction(16))
    with pytest.raises(UserError, match="frames: there are no frames"):
        write_png_sequence(tmp_path / "frames", iter(()))
    assert not any(tmp_path.iterdir())


def test_a_png_sequence_never_mixes_with_what_is_there(tmp_path: Path) -> None:
    write_png_sequence(tmp_path / "frames", noise(channels=4))
    with pytest.raises(UserError, match="already exists"):
        write_png_sequence(tmp_path / "frames", noise(channels=4, frames=2))
    assert len(list((tmp_path / "frames").iterdir())) == 9


def test_a_source_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    def failing():
        yield from noise(channels=4)
        raise OSError("the source went away")

    write_prores4444(tmp_path / "a.mov", translucent(), fps=Fraction(16))
    before = (tmp_path / "a.mov").read_bytes()
    with pytest.raises(OSError, match="went away"):
        write_prores4444(tmp_path / "a.mov", failing(), fps=Fraction(16))
    with pytest.raises(OSError, match="went away"):
        write_png_sequence(tmp_path / "frames", failing())
    assert [file.name for file in tmp_path.iterdir()] == ["a.mov"]
    assert (tmp_path / "a.mov").read_bytes() == before


def test_frames_are_let_go_as_they_are_written(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def frames():
        nonlocal most
        for i in range(60):
            frame = np.full((32, 32, 3), i, np.uint8)
            alive.append(weakref.ref(frame))
            most = max(most, sum(ref() is not None for ref in alive))
            yield frame
            del frame

    gc.collect()
    write_mp4(tmp_path / "a.mp4", frames(), fps=Fraction(16))
    assert most <= 4


@pytest.mark.parametrize("write", [write_mp4, write_webm_alpha, write_prores4444])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, write) -> None:
    clip = translucent(frames=17)[..., : 3 if write is write_mp4 else 4]
    write(tmp_path / "a", clip, fps=Fraction(16))
    write(tmp_path / "b", clip, fps=Fraction(16))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
