"""Files of compositors: OpenEXR, DPX and deep TIFF in, OpenEXR out; what is linear is told from what is not."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.media import scene
from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.media import exr
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import probe, read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.exr import write_exr_sequence
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.light import Light, decoded, encoded, primaries_matrix
from transpixeler.data.sources.pairs import decode_pair, scan

ACESCG = (0.713, 0.293, 0.165, 0.830, 0.128, 0.044, 0.32168, 0.33767)
HALF = 2.0**-11  # what half floats are off by at most, relatively


def write(path: Path, channels: dict[str, np.ndarray], **header: object) -> None:
    import OpenEXR

    head = {"type": OpenEXR.scanlineimage, "compression": OpenEXR.ZIP_COMPRESSION, **header}
    OpenEXR.File(head, {name: np.ascontiguousarray(plane) for name, plane in channels.items()}).write(str(path))


def planes(picture: np.ndarray, names: str = "RGB", kind: type = np.float16) -> dict[str, np.ndarray]:
    return {name: picture[..., n].astype(kind) for n, name in enumerate(names)}


def ramp(channels: int = 3) -> np.ndarray:
    """Every level of each channel, and for alpha each of 255 to 8."""
    levels = np.resize(np.arange(256, dtype=np.uint8), (16, 48))
    picture = np.dstack([levels, levels[:, ::-1], 255 - levels])
    alpha = np.maximum(np.resize(np.arange(255, -1, -5, dtype=np.uint8), (16, 48)), 8)
    return picture if channels == 3 else np.dstack([picture, alpha])


def read(path: Path, **how: object) -> np.ndarray:
    media = probe(path)
    return read_frames(path, [0], height=media.height, width=media.width, **how)[0]


def off(found: np.ndarray, wanted: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - wanted).max())


# --- curves ----------------------------------------------------------------------------------------------------------


def test_curves_are_the_published_ones() -> None:
    """IEC 61966-2-1 and BT.709: values that the standards' formulas give."""
    linear = np.array([0, 0.001, 0.18, 0.5, 1, 4, np.nan, np.inf, -1])
    assert np.allclose(encoded(linear, "srgb"), [0, 0.01292, 0.461356, 0.735357, 1, 1, 0, 1, 0], atol=1e-5)
    assert np.allclose(encoded(linear, "rec709"), [0, 0.0045, 0.409, 0.7055, 1, 1, 0, 1, 0], atol=3e-4)
    assert np.allclose(encoded(linear, "data")[:5], linear[:5])


@pytest.mark.parametrize("curve", ["srgb", "rec709", "data"])
def test_a_curve_and_its_inverse_undo_each_other(curve: str) -> None:
    picture = np.arange(256) / 255
    assert np.abs(encoded(decoded(picture, curve).astype(np.float16), curve) - picture).max() < 1 / 510


def test_acescg_becomes_bt709_by_the_published_matrix() -> None:
    published = [[1.70505, -0.62179, -0.08326], [-0.13026, 1.14080, -0.01055], [-0.02400, -0.12897, 1.15297]]
    assert np.abs(primaries_matrix(ACESCG) - published).max() < 1e-4


def test_a_file_of_other_primaries_is_converted(tmp_path: Path) -> None:
    light = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    write(tmp_path / "a.exr", planes(light, kind=np.float32), chromaticities=ACESCG)
    found = exr.read(tmp_path / "a.exr").rgb
    assert np.allclose(found, light @ primaries_matrix(ACESCG).T, atol=1e-5) and np.abs(found - light).max() > 0.1
    grey = np.full((16, 16, 3), 0.5, np.float32)
    write(tmp_path / "b.exr", planes(grey, kind=np.float32), chromaticities=ACESCG)
    assert np.allclose(exr.read(tmp_path / "b.exr").rgb, grey, atol=1e-4), "white stays white"


# --- OpenEXR in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["srgb", "rec709"])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_linear_light_becomes_the_picture_that_it_was_made_from(kind: type, curve: str, tmp_path: Path) -> None:
    write(tmp_path / "a.exr", planes(decoded(ramp() / 255, curve), kind=kind))
    media = probe(tmp_path / "a.exr")
    assert (media.height, media.width, media.alpha, media.image) == (16, 48, False, True)
    assert off(read(tmp_path / "a.exr", light=Light(curve)), ramp()) <= 1


def test_premultiplied_light_is_undone_before_the_curve(tmp_path: Path) -> None:
    """OpenEXR is premultiplied unless it says otherwise; done after the curve, half alpha would be off by 50 levels."""
    picture = ramp(4)
    light, alpha = decoded(picture[..., :3] / 255, "srgb"), picture[..., 3:] / 255
    write(tmp_path / "a.exr", planes(np.dstack([light * alpha, alpha]), "RGBA", np.float32))
    write(tmp_path / "said.exr", planes(np.dstack([light, alpha]), "RGBA", np.float32), alphaMode="straight")
    size = {"height": 16, "width": 48}
    for name, told in (("a", "auto"), ("a", "premultiplied"), ("said", "auto"), ("said", "straight")):
        rgb, matte = read_rgba(tmp_path / f"{name}.exr", [0], fill=Fill(alpha=told), **size)
        assert off(rgb[0], picture[..., :3]) <= 1 and off(matte[0], picture[..., 3:]) <= 1, (name, told)
    rgb, _ = read_rgba(tmp_path / "a.exr", [0], fill=Fill(alpha="straight"), **size)
    assert off(rgb[0], picture[..., :3]) > 50


def test_the_display_window_is_the_picture(tmp_path: Path) -> None:
    light = decoded(ramp() / 255, "srgb")
    window = {
        "dataWindow": (np.array([-2, 4], np.int32), np.array([45, 19], np.int32)),
        "displayWindow": (np.array([0, 0], np.int32), np.array([59, 29], np.int32)),
    }
    write(tmp_path / "a.exr", planes(light), **window)
    wanted = np.zeros((30, 60, 3), int)
    wanted[4:20, :46] = ramp()[:, 2:]
    assert off(read(tmp_path / "a.exr"), wanted) <= 1


def test_alpha_is_found_by_its_name_in_parts_and_layers(tmp_path: Path) -> None:
    import OpenEXR

    picture = ramp(4)
    light, alpha = decoded(picture[..., :3] / 255, "srgb"), (picture[..., 3] / 255).astype(np.float32)
    noise = np.random.default_rng(0).random(alpha.shape, np.float32)

    def part(channels: dict[str, np.ndarray], name: str) -> object:
        return OpenEXR.Part({"type": OpenEXR.scanlineimage}, channels, name=name)

    def color() -> dict[str, np.ndarray]:
        return planes(light, kind=np.float32)

    layered = {f"ViewLayer.Combined.{name}": plane for name, plane in color().items()}
    parts = [part({"Z": noise}, "depth"), part(color(), "beauty"), part({"Y": alpha}, "Matte")]
    OpenEXR.File(parts).write(str(tmp_path / "parts.exr"))
    OpenEXR.File([part(color(), "rgb"), part({"A": alpha}, "alpha")]).write(str(tmp_path / "two.exr"))
    write(tmp_path / "layers.exr", layered | {"ViewLayer.Combined.A": alpha, "ViewLayer.Depth.Z": noise})
    write(tmp_path / "named.exr", color() | {"matte": alpha, "motion.R": noise, "motion.G": noise, "motion.B": noise})
    for name in ("parts", "two", "layers", "named"):
        assert probe(tmp_path / f"{name}.exr").alpha, name
        rgb, matte = read_rgba(tmp_path / f"{name}.exr", [0], height=16, width=48, fill=Fill(alpha="straight"))
        assert off(rgb[0], picture[..., :3]) <= 1 and off(matte[0], picture[..., 3:]) <= 1, name


def unreadable(folder: Path) -> dict[str, str]:
    """Write files that cannot be used; returns what is said of each."""
    noise = np.random.default_rng(0).random((16, 16), np.float32)
    write(folder / "whole.exr", dict.fromkeys("RGB", (noise * 9).astype(np.uint32)))
    write(folder / "layers.exr", {f"{layer}.{name}": noise for layer in ("key", "rim") for name in "RGB"})
    write(folder / "depth.exr", {"Z": noise})
    write(folder / "wide.exr", dict.fromkeys("RGB", noise), pixelAspectRatio=2.0)
    (folder / "text.exr").write_text("no picture at all")
    (folder / "cut.exr").write_bytes((folder / "wide.exr").read_bytes()[:300])
    (folder / "torn.exr").write_bytes((folder / "wide.exr").read_bytes()[:-30])
    return {
        "whole": "whole numbers in its channel R",
        "layers": r"several layers of colour \(key, rim\)",
        "depth": "no channels R, G and B, nor Y",
        "wide": "pixels of 2:1",
        "text": "cannot be read as OpenEXR",
        "cut": "cannot be read as OpenEXR",
        "torn": "is damaged: its pixels cannot be decoded|cannot be read as OpenEXR: Unable to query scanline",
    }


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    for name, reason in unreadable(tmp_path).items():
        with pytest.raises(BadMedia, match=reason):
            exr.read(tmp_path / f"{name}.exr")


def test_without_the_package_the_way_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.exr", planes(ramp() / 255))
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(BadMedia, match=r"needs the package OpenEXR; pip install 'transpixeler\[exr\]'"):
        probe(tmp_path / "a.exr")
    with pytest.raises(UserError, match=r"pip install 'transpixeler\[exr\]'"):
        write_exr_sequence(tmp_path / "out", [ramp() / 255], fps=Fraction(24), alpha_mode="straight")


def test_a_pair_of_exr_sequences_is_a_picture_and_its_values(tmp_path: Path) -> None:
    """Half a matte stays half: as a picture it would be 188."""
    picture = scene(32, 48)
    for number in range(3):
        write(tmp_path / f"fire.{1001 + number}.exr", planes(decoded(picture / 255, "srgb")))
        write(tmp_path / f"fire_seg.{1001 + number}.exr", {"Y": np.full((32, 48), 0.5, np.float16)})
    (tmp_path / "fire.txt").write_text("fire")
    result = scan([SourceConfig(str(tmp_path))], {"rgb": "", "seg": "_seg"}, DataConfig())
    (sample,) = result.samples
    found = decode_pair(sample, Clip(sample.id, Fraction(0), 3, Fraction(16), 32, 48))
    assert off(found["rgb"], picture) <= 1 and (found["seg"] == 128).all()
    told = [note.text for note in result.notes]
    assert any("shown by the curve of srgb (data.transfer)" in text for text in told)
    assert any("a companion: its values from 0 to 1 as they are" in text for text in told)


# --- OpenEXR out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["straight", "premultiplied"])
def test_exr_out_and_in_again_is_the_same_picture(mode: str, tmp_path: Path) -> None:
    picture = ramp(4)
    light, alpha = decoded(picture[..., :3] / 255, "srgb"), picture[..., 3:] / 255
    frame = np.dstack([light * alpha if mode == "premultiplied" else light, alpha])
    write_exr_sequence(tmp_path / "out", [frame] * 2, fps=Fraction(30000, 1001), alpha_mode=mode)
    rgb, matte = read_rgba(tmp_path / "out", [1], height=16, width=48, fill=Fill(alpha="auto"))
    assert off(rgb[0], picture[..., :3]) <= 1 and off(matte[0], picture[..., 3:]) <= 1
    import OpenEXR

    header = OpenEXR.File(str(tmp_path / "out" / "00001.exr")).header()
    assert header["alphaMode"] == mode and header["framesPerSecond"] == Fraction(30000, 1001)
    assert np.allclose(header["chromaticities"], (0.64, 0.33, 0.3, 0.6, 0.15, 0.06, 0.3127, 0.329))


def test_light_brighter_than_white_comes_through_within_half_precision(tmp_path: Path) -> None:
    light = np.random.default_rng(0).gamma(0.5, 4, (24, 32, 4)).astype(np.float32)
    light[..., 3] = light[..., 3].clip(0, 1)
    write(tmp_path / "in.exr", planes(light, "RGBA", np.float32))
    first = exr.read(tmp_path / "in.exr")
    assert first.alpha is not None and first.premultiplied
    frame = np.dstack([first.rgb, first.alpha])
    write_exr_sequence(tmp_path / "out", [frame], fps=Fraction(24), alpha_mode="premultiplied")
    again = exr.read(tmp_path / "out" / "00000.exr")
    assert again.alpha is not None and again.premultiplied
    assert light.max() > 10 and np.allclose(np.dstack([again.rgb, again.alpha]), light, rtol=HALF, atol=1e-7)
    write_exr_sequence(
        tmp_path / "more", [np.dstack([again.rgb, again.alpha])], fps=Fraction(24), alpha_mode="straight"
    )
    assert (exr.read(tmp_path / "more" / "00000.exr").rgb == again.rgb).all(), "half floats change once at most"


# --- DPX and deep TIFF -----------------------------------------------------------------------------------------------


def write_deep(path: Path, codec: str, layout: str, picture: np.ndarray) -> None:
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = layout, Fraction(1)
    packed = "rgb48le" if picture.shape[2] == 3 else "rgba64le"
    frame = av.VideoFrame.from_ndarray(picture.astype(np.uint16) * 257, format=packed).reformat(format=layout)
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None))))


@pytest.mark.parametrize(
    ("name", "codec", "layout", "channels"),
    [
        ("a.tif", "tiff", "rgb48le", 3),
        ("a.TIFF", "tiff", "rgba64le", 4),
        ("a.dpx", "dpx", "gbrp10be", 3),
        ("a.DPX", "dpx", "rgb48be", 3),
        ("b.dpx", "dpx", "rgba", 4),
    ],
)
def test_deep_files_are_read(name: str, codec: str, layout: str, channels: int, tmp_path: Path) -> None:
    picture = ramp(channels)
    write_deep(tmp_path / name, codec, layout, picture)
    assert probe(tmp_path / name).alpha == (channels == 4)
    rgb, matte = read_rgba(tmp_path / name, [0], height=16, width=48, fill=Fill())
    assert off(rgb[0], picture[..., :3]) <= 1
    assert off(matte[0], picture[..., 3:] if channels == 4 else 255) <= 1


def test_a_dpx_says_what_its_numbers_mean(tmp_path: Path) -> None:
    light = np.rint(decoded(ramp() / 255, "srgb") * 255).astype(np.uint8)
    path = tmp_path / "a.dpx"
    write_deep(path, "dpx", "rgb48be", light)
    header = bytearray(path.read_bytes())
    for transfer, creator, wanted in ((2, b"comp", ramp()), (2, b"Lavc62", light), (4, b"comp", light)):
        header[801], header[160:170] = transfer, creator.ljust(10, b"\0")
        path.write_bytes(header)
        bright = wanted > 60  # below, eight bits of light are too few
        assert off(read(path)[bright], wanted[bright]) <= 3
    header[801] = 3
    path.write_bytes(header)
    with pytest.raises(BadMedia, match="is logarithmic"):
        probe(path)
    path.write_bytes(header[:1000])
    with pytest.raises(BadMedia, match="header is cut off"):
        probe(path)
