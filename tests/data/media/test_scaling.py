"""Every stream is scaled and cropped alike, turned as its header says, and its colours are those that were meant."""

from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.media import scene, write_timed
from transpixeler.data.media.decode import probe, read_frames
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.write import write_mp4


def pillow_crop(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = max(height / picture.shape[0], width / picture.shape[1])
    tall, wide = max(height, round(picture.shape[0] * scale)), max(width, round(picture.shape[1] * scale))
    resized = np.asarray(Image.fromarray(picture).resize((wide, tall), Image.Resampling.BICUBIC))
    top, left = (tall - height) // 2, (wide - width) // 2
    return resized[top : top + height, left : left + width]


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (64, 64), (240, 400)], ids=str)
def test_scaling_is_antialiased_as_pillow_does_it(size: tuple[int, int], tmp_path: Path) -> None:
    picture = scene(270, 480)
    Image.fromarray(picture).save(tmp_path / "a.png")
    found = read_frames(tmp_path / "a.png", [0], height=size[0], width=size[1])[0]
    off = np.abs(found.astype(int) - pillow_crop(picture, *size))
    assert off.mean() < 1.5
    shifted = np.abs(np.roll(found, 1, 1).astype(int) - pillow_crop(picture, *size))
    assert shifted.mean() > 5 * off.mean(), "a slip of one pixel would be seen"


def test_the_crop_is_the_same_for_every_pixel_format(tmp_path: Path) -> None:
    picture = scene(180, 322)
    Image.fromarray(picture).save(tmp_path / "a.png")
    reference = read_frames(tmp_path / "a.png", [0], height=80, width=96)[0].astype(int)
    for name, codec, pixels in [
        ("a420.mkv", "ffv1", "yuv420p"),
        ("a422.mkv", "ffv1", "yuv422p"),
        ("a444.mkv", "ffv1", "yuv444p"),
        ("a444p10.mkv", "ffv1", "yuv444p10le"),
        ("agrey.mkv", "ffv1", "gray"),
        ("argb.mov", "qtrle", "rgb24"),
    ]:
        write_timed(tmp_path / name, [picture] * 2, range(2), Fraction(1, 25), codec=codec, pixels=pixels)
        found = read_frames(tmp_path / name, [1], height=80, width=96)[0]
        assert np.abs(found - reference).mean() < 1.0, name


def test_odd_sizes_are_read_whole(tmp_path: Path) -> None:
    picture = scene(93, 151)
    write_timed(tmp_path / "a.mkv", [picture] * 3, range(3), Fraction(1, 25), codec="ffv1", pixels="yuv420p")
    media = probe(tmp_path / "a.mkv")
    assert (media.height, media.width) == (93, 151)
    found = read_frames(tmp_path / "a.mkv", [2], height=48, width=80)[0].astype(int)
    assert np.abs(found - pillow_crop(picture, 48, 80)).mean() < 1.5


def write_with_matrix(path: Path, picture: np.ndarray, turn: tuple[int, int, int, int]) -> None:
    write_mp4(path, [picture] * 4, fps=Fraction(24))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 0x10000 & 0xFFFFFFFF for value in turn)
    matrix = (a, b, 0, c, d, 0, 0, 0, 0x40000000)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in matrix)
    path.write_bytes(data)


MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("degrees", MATRICES)
def test_rotation_in_the_header_is_obeyed(degrees: int, tmp_path: Path) -> None:
    """A phone writes the sensor's picture and says how to turn it: clockwise by so many degrees."""
    picture = scene(64, 96)
    picture[:20, :20] = 255
    write_with_matrix(tmp_path / "a.mp4", picture, MATRICES[degrees])
    upright = np.rot90(picture, -degrees // 90)
    media = probe(tmp_path / "a.mp4")
    assert (media.height, media.width) == upright.shape[:2]
    found = read_frames(tmp_path / "a.mp4", [1], height=media.height, width=media.width)[0].astype(int)
    assert np.abs(found - upright).mean() < 2


@pytest.mark.parametrize("turn", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)])
def test_a_picture_that_its_header_mirrors_is_refused(turn: tuple[int, int, int, int], tmp_path: Path) -> None:
    write_with_matrix(tmp_path / "a.mp4", scene(64, 96), turn)
    for use in (probe, lambda path: read_frames(path, [0], height=64, width=96)):
        with pytest.raises(BadMedia, match="mirrors the picture; re-encode it"):
            use(tmp_path / "a.mp4")


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    def anamorphic(context: object) -> None:
        context.sample_aspect_ratio = Fraction(4, 3)

    write_timed(tmp_path / "a.mkv", [scene(96, 144)] * 2, range(2), Fraction(1, 25), prepare=anamorphic)
    media = probe(tmp_path / "a.mkv")
    assert (media.height, media.width) == (96, 192)


COLORS = np.array([[255, 255, 255], [0, 0, 0], [220, 40, 30], [30, 200, 60], [40, 60, 230], [128, 128, 128]], np.uint8)

BARS = COLORS.repeat(16, 0)[None].repeat(64, 0)

LIMITED, FULL = 1, 2

BT709, BT601, BT2020 = 1, 5, 9

WEIGHTS = {BT709: (0.2126, 0.0722), BT601: (0.299, 0.114), BT2020: (0.2627, 0.0593)}  # of red and blue in luma

UNTOLD, SRGB, BT2020_10, PQ, HLG = 2, 13, 14, 16, 18


def planes(picture: np.ndarray, pixels: str, matrix: int, span: int) -> list[np.ndarray]:
    """Convert a picture by the standards' formulas, since not every PyAV knows all matrices when it writes."""
    red, green, blue = np.moveaxis(picture / 255, 2, 0)
    of_red, of_blue = WEIGHTS[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = [(blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)]
    bits = 10 if pixels.endswith("10le") else 8
    unit, white = 1 << (bits - 8), (1 << bits) - 1
    luma = luma * white if span == FULL else luma * 219 * unit + 16 * unit
    chroma = [one * (white if span == FULL else 224 * unit) + 128 * unit for one in chroma]
    apart = 1 if "444" in pixels else 2
    kind = np.uint8 if bits == 8 else np.uint16
    return [np.rint(one).astype(kind) for one in (luma, *(one[::apart, ::apart] for one in chroma))]


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("matrix", [BT709, BT601, BT2020])
@pytest.mark.parametrize("span", [LIMITED, FULL])
def test_matrix_and_range_of_a_file_are_respected(pixels: str, matrix: int, span: int, tmp_path: Path) -> None:
    import av

    with av.open(tmp_path / "a.mkv", "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "1"})
        stream.height, stream.width, stream.pix_fmt = *BARS.shape[:2], pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, span
        frame = av.VideoFrame(stream.width, stream.height, pixels)
        for plane, values in zip(frame.planes, planes(BARS, pixels, matrix, span), strict=True):
            padded = np.zeros((plane.height, plane.line_size), np.uint8)
            padded[:, : values.shape[1] * values.itemsize] = np.ascontiguousarray(values).view(np.uint8)
            plane.update(padded)
        frame.colorspace, frame.color_range, frame.pts = matrix, span, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    found = read_frames(tmp_path / "a.mkv", [0], height=64, width=96)[0]
    assert np.abs(found[32, 8::16].astype(int) - COLORS).max() <= 4


def tag(transfer: int, context: object) -> None:
    context.colorspace, context.color_primaries, context.color_trc = BT2020, BT2020, transfer


def write_tagged(path: Path, transfer: int, *, codec: str, pixels: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    write_timed(
        path,
        [BARS] * 3,
        range(3),
        Fraction(1, 25),
        codec=codec,
        pixels=pixels,
        options=options,
        prepare=partial(tag, transfer),
    )


def write_tagged_outside(path: Path, transfer: int) -> None:
    """The container says it, the codec's own header does not."""
    import av

    plain = path.with_name("plain.mp4")
    options = {"x265-params": "log-level=none"}
    write_timed(plain, [BARS] * 3, range(3), Fraction(1, 25), codec="libx265", options=options)
    with av.open(plain) as source, av.open(path, "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        tag(transfer, copy.codec_context)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                out.mux(packet)


TAGGERS = {
    "codec.mkv": lambda path, transfer: write_tagged(path, transfer, codec="libx265", pixels="yuv420p10le"),
    "intra.mov": lambda path, transfer: write_tagged(path, transfer, codec="prores_ks", pixels="yuv422p10le"),
    "container.mp4": write_tagged_outside,
}


@pytest.mark.parametrize("name", TAGGERS)
def test_hdr_is_refused_and_no_other_transfer_is(name: str, tmp_path: Path) -> None:
    for transfer in (BT709, UNTOLD, SRGB, BT2020_10):
        TAGGERS[name](tmp_path / name, transfer)
        assert probe(tmp_path / name).frames == 3
    for transfer, kind in ((PQ, "PQ"), (HLG, "HLG")):
        TAGGERS[name](tmp_path / name, transfer)
        with pytest.raises(BadMedia, match=rf"is HDR \({kind}\).*convert it to SDR BT\.709"):
            probe(tmp_path / name)
