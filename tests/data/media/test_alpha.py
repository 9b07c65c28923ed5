"""Every format gives its alpha and colour; animations are cut by time; hidden colour follows the fill policy."""

import itertools
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.media import HEIGHT, WIDTH, clip_of, marked, marks, pair, scene
from transpixeler.config.sections import DataConfig
from transpixeler.data.media.decode import frame_numbers, probe, read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.write import write_png_sequence, write_prores4444, write_webm_alpha
from transpixeler.data.sources.pairs import decode_pair


def ghost(number: int) -> np.ndarray:
    """A red disc over hidden green; its edge is soft, and it moves."""
    y, x = np.mgrid[:64, :96]
    alpha = (20 - np.hypot(y - 32, x - 30 - number)).clip(0, 1)
    return (np.dstack([alpha > 0, alpha == 0, 0 * alpha, alpha]) * 255).astype(np.uint8)


def write_animation(path: Path, frames: list[np.ndarray]) -> None:
    first, *rest = map(Image.fromarray, frames)
    options = {"lossless": True, "exact": True} if path.suffix == ".webp" else {"disposal": 2}
    first.save(path, save_all=True, append_images=rest, duration=40, loop=0, **options)


WRITERS = {
    "a.mov": lambda path, frames: write_prores4444(path, frames, fps=Fraction(25)),
    "a.webm": lambda path, frames: write_webm_alpha(path, frames, fps=Fraction(25)),
    "a": lambda path, frames: write_png_sequence(path, frames),
    "a.webp": write_animation,
    "a.gif": write_animation,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_alpha_format_gives_its_alpha_and_its_colour(name: str, tmp_path: Path) -> None:
    frames = [ghost(i) for i in range(6)]
    WRITERS[name](tmp_path / name, frames)
    media = probe(tmp_path / name)
    assert media.alpha and media.frames == 6
    rgb, alpha = read_rgba(tmp_path / name, [1, 4], height=64, width=96, fill=Fill())
    for k, number in enumerate((1, 4)):
        solid = frames[number][..., 3] > 250
        off = np.abs(alpha[k, ..., 0].astype(int) - frames[number][..., 3])
        assert off.mean() < (3 if name.endswith("gif") else 1)
        core = np.hypot(*np.mgrid[-32:32, -30 - number : 66 - number]) < 14
        assert np.abs(rgb[k][core & solid].astype(int) - [255, 0, 0]).max() <= 12


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_an_animation_without_delays_is_taken_frame_by_frame(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    first, *rest = (Image.fromarray(marked(number)) for number in range(9))
    first.save(path, save_all=True, append_images=rest, duration=0, lossless=True)
    media = probe(path)
    assert media.frames == media.frames_at(Fraction(16)) == 9 and not media.fps
    clip = clip_of(5, start=Fraction(2, 16), height=HEIGHT, width=WIDTH)
    for frames in decode_pair(pair(path, path), clip).values():
        assert marks(frames) == [2, 3, 4, 5, 6]


def delay_frames(path: Path, delay: Fraction) -> None:
    """Give every frame of an APNG this delay as a fraction, as other programs do; Pillow before 11 rounds it."""
    content = bytearray(path.read_bytes())
    at = 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if content[at + 4 : at + 8] == b"fcTL":
            struct.pack_into(">HH", content, at + 28, delay.numerator, delay.denominator)
            struct.pack_into(">I", content, at + 8 + length, zlib.crc32(content[at + 4 : at + 8 + length]))
        at += 12 + length
    path.write_bytes(content)


@pytest.mark.parametrize("count", [3, 24, 100])
@pytest.mark.parametrize("fps", [12, 16, 24, 30, 50, 60])
@pytest.mark.parametrize("ending", ["webp", "png", "gif"])
def test_an_animation_at_its_own_rate_shows_each_frame_once(ending: str, fps: int, count: int, tmp_path: Path) -> None:
    """WebP counts in milliseconds, GIF in hundredths, APNG in fractions of a second."""
    path, tick = tmp_path / f"a.{ending}", {"webp": 1, "png": Fraction(1, fps), "gif": 10}[ending]
    ends = [round(Fraction(1000 * k, fps) / tick) * tick for k in range(count + 1)]
    first, *rest = (Image.fromarray(marked(number)) for number in range(count))
    delays = [float(after - before) for before, after in itertools.pairwise(ends)]
    first.save(path, save_all=True, append_images=rest, duration=delays, lossless=True)
    if ending == "png":
        delay_frames(path, Fraction(1, fps))
    media = probe(path)
    assert media.frames == media.frames_at(Fraction(fps)) == count
    assert ending == "gif" or abs(media.fps / fps - 1) < (1e-2 if count == 3 else 1e-3)
    assert frame_numbers(path, clip_of(count, fps=fps)) == tuple(range(count))
    assert frame_numbers(path, clip_of(count - 2, start=Fraction(2, fps), fps=fps)) == tuple(range(2, count))


@pytest.mark.parametrize("ending", ["webp", "png"])
def test_an_animation_is_opened_once_for_a_clip_and_once_for_its_times(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{ending}"
    write_animation(path, [ghost(number) for number in range(12)])
    alone = np.concatenate([read_frames(path, [number], height=64, width=96) for number in range(12)])
    opened, whole = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **more: opened.append(args) or whole(*args, **more))
    for start in range(4):
        numbers = frame_numbers(path, clip_of(5, start=Fraction(start, 25), fps=25))
        assert numbers == tuple(range(start, start + 5))
        assert np.array_equal(read_frames(path, numbers, height=64, width=96), alone[start : start + 5])
    assert len(opened) == 1 + 4


@pytest.mark.parametrize("policy", ["keep", "black", "color", "extend"])
def test_what_is_hidden_follows_the_fill_policy(policy: str, tmp_path: Path) -> None:
    write_png_sequence(tmp_path / "a", [ghost(0)] * 2)
    fill = Fill.of(DataConfig(fill=policy, fill_color=(10, 20, 200)))
    rgb, alpha = read_rgba(tmp_path / "a", [0], height=32, width=48, fill=fill)
    hidden = rgb[0][alpha[0, ..., 0] == 0].astype(int)
    expected = {"keep": (0, 255, 0), "black": (0, 0, 0), "color": (10, 20, 200), "extend": (255, 0, 0)}[policy]
    assert np.abs(np.median(hidden, axis=0) - expected).max() <= 1
    if policy != "keep":
        assert np.abs(hidden - expected).max() <= 1
        edge = rgb[0][(alpha[0, ..., 0] > 8) & (alpha[0, ..., 0] < 247)].astype(int)
        assert len(edge) and np.abs(edge - [255, 0, 0]).max() <= 2, "hidden green bled into the edge"


def test_a_frame_that_shows_nothing_extends_to_black(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32, 4), (9, 99, 9, 0), np.uint8)).save(tmp_path / "a.png")
    rgb, alpha = read_rgba(tmp_path / "a.png", [0], height=16, width=16, fill=Fill("extend"))
    assert not rgb.any() and not alpha.any()


def test_images_of_every_mode_are_one_frame(tmp_path: Path) -> None:
    picture = scene(48, 64)
    deep = Image.fromarray((picture[..., 0].astype(np.uint16) << 8) + 7)
    modes = {
        "rgb.png": Image.fromarray(picture),
        "deep.png": deep,
        "grey.jpg": Image.fromarray(picture).convert("L"),
        "print.jpg": Image.fromarray(picture).convert("CMYK"),
        "palette.bmp": Image.fromarray(picture).quantize(256),
        "b.webp": Image.fromarray(picture),
        "c.tiff": Image.fromarray(picture),
    }
    for name, image in modes.items():
        image.save(tmp_path / name)
        assert probe(tmp_path / name).image
        found = read_frames(tmp_path / name, [0], height=48, width=64)[0].astype(int)
        assert np.abs(found - picture).mean() < 6, name


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.int16])
def test_an_image_of_numbers_that_no_picture_has_is_refused(kind: type, tmp_path: Path) -> None:
    """As 16 bits, depth in metres or of 32 bits would be black."""
    depth = np.linspace(0, 30_000, 32 * 32).reshape(32, 32)
    Image.fromarray(depth.astype(np.uint16)).save(tmp_path / "a.tiff")
    assert np.ptp(read_frames(tmp_path / "a.tiff", [0], height=32, width=32)) > 110
    Image.fromarray(depth.astype(kind)).save(tmp_path / "a.tiff")
    for use in (probe, lambda path: read_frames(path, [0], height=32, width=32)):
        with pytest.raises(BadMedia, match="save it as 8 or 16 bits"):
            use(tmp_path / "a.tiff")


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    picture = scene(48, 96)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    media = probe(tmp_path / "a.png")
    assert (media.height, media.width) == (96, 48)
    found = read_frames(tmp_path / "a.png", [0], height=96, width=48)[0]
    assert np.array_equal(found, np.rot90(picture, -1))
