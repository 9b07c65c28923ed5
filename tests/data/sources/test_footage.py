"""Footage as artists have it: two dozen kinds of RGBA sources in one folder, each used as it was drawn or named."""

import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.media import write_timed
from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.exr import write_exr_sequence
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.light import decoded
from transpixeler.data.media.write import write_mp4, write_png_sequence, write_prores4444, write_webm_alpha
from transpixeler.data.sources.folder import FRAMES, HIDDEN, NOT_READ
from transpixeler.data.sources.pairs import decode_pair, scan
from transpixeler.data.sources.samples import Sample

FRAMES_DRAWN, HEIGHT, WIDTH = 6, 48, 64
FPS = Fraction(24)
COLOR = np.array([200, 120, 60])
STREAMS = {"rgb": "", "seg": "_seg"}
Writer = Callable[[Path, np.ndarray], None]


def drawn(height: int = HEIGHT, width: int = WIDTH, *, hard: bool = False) -> np.ndarray:
    """Draw a soft disc that moves, straight, uint8 [F,H,W,4]; hard: as one bit of alpha holds it."""
    y, x = np.mgrid[:height, :width]
    clip = np.empty((FRAMES_DRAWN, height, width, 4), np.uint8)
    for number, frame in enumerate(clip):
        soft = ((18 - np.hypot(y - height / 2, x - 24 - 2 * number)) / 6).clip(0, 1)
        frame[..., :3] = COLOR
        frame[..., 3] = np.rint((soft > 0.5 if hard else soft) * 255)
    return clip


def multiplied(clip: np.ndarray) -> np.ndarray:
    return np.concatenate([np.rint(clip[..., :3] * (clip[..., 3:] / 255.0)).astype(np.uint8), clip[..., 3:]], axis=3)


def light(clip: np.ndarray, *, premultiplied: bool) -> np.ndarray:
    alpha = clip[..., 3:] / np.float32(255)
    color = decoded(clip[..., :3] / 255, "srgb")
    return np.concatenate([color * alpha if premultiplied else color, alpha], axis=3)


def each(form: str, write: Callable[[Path, np.ndarray], None]) -> Writer:
    """Write a file for each frame; form: their names."""

    def writer(path: Path, clip: np.ndarray) -> None:
        for number, frame in enumerate(clip):
            file = path.parent / form.format(path.name, number + 1001)
            file.parent.mkdir(exist_ok=True)
            write(file, frame)

    return writer


def by_pillow(path: Path, frame: np.ndarray) -> None:
    Image.fromarray(frame).save(path)


def by_ffmpeg(codec: str, layout: str) -> Callable[[Path, np.ndarray], None]:
    def write(path: Path, frame: np.ndarray) -> None:
        encoder = av.CodecContext.create(codec, "w")
        encoder.height, encoder.width = frame.shape[:2]
        encoder.pix_fmt, encoder.time_base = layout, Fraction(1)
        deep = av.VideoFrame.from_ndarray(frame.astype(np.uint16) * 257, format="rgba64le").reformat(format=layout)
        deep.pts = 0
        path.write_bytes(b"".join(bytes(packet) for packet in (*encoder.encode(deep), *encoder.encode(None))))

    return write


def exr_file(path: Path, frame: np.ndarray) -> None:
    """Write float, premultiplied, colour and alpha in parts of their own."""
    import OpenEXR

    planes = light(frame[None], premultiplied=True)[0].astype(np.float32)
    color = {letter: np.ascontiguousarray(planes[..., n]) for n, letter in enumerate("RGB")}
    parts = [
        OpenEXR.Part({"type": OpenEXR.scanlineimage}, color, name="beauty"),
        OpenEXR.Part({"type": OpenEXR.scanlineimage}, {"A": np.ascontiguousarray(planes[..., 3])}, name="alpha"),
    ]
    OpenEXR.File(parts).write(str(path))


def animation(ending: str, **options: object) -> Writer:
    def write(path: Path, clip: np.ndarray) -> None:
        first, *rest = map(Image.fromarray, clip)
        first.save(path.with_name(path.name + ending), save_all=True, append_images=rest, duration=40, **options)

    return write


def timed(ending: str, codec: str, pixels: str, times: Sequence[int], **options: str) -> Writer:
    def write(path: Path, clip: np.ndarray) -> None:
        file = path.with_name(path.name + ending)
        write_timed(file, clip, times, Fraction(1, 240), codec=codec, pixels=pixels, options=options)

    return write


EVEN, UNEVEN = range(0, 60, 10), (0, 10, 25, 30, 48, 60)
PRORES = {"profile": "4444", "alpha_bits": "16"}

# name → how it is written; a name in capitals has its ending in capitals too
USED: dict[str, Writer] = {
    "prores": lambda path, clip: write_prores4444(path.with_suffix(".mov"), clip, fps=FPS),
    "PRORES PREMULTIPLIED": lambda path, clip: write_prores4444(
        path.with_name(path.name + ".MOV"), multiplied(clip), fps=FPS
    ),
    "prores vfr": timed(".mov", "prores_ks", "yuva444p10le", UNEVEN, **PRORES),
    "animation codec": timed(".mov", "qtrle", "argb", EVEN),
    "png in mov": timed(".mov", "png", "rgba", EVEN),
    "ffv1": timed(".mkv", "ffv1", "bgra", UNEVEN),
    "vp9": lambda path, clip: write_webm_alpha(path.with_suffix(".webm"), clip, fps=FPS),
    "webp": animation(".webp", lossless=True, exact=True),
    "apng": animation(".png"),
    "gif": animation(".gif", disposal=2),
    "folder of png": lambda path, clip: write_png_sequence(path, clip),
    "folder of deep png": lambda path, clip: write_png_sequence(path, clip.astype(np.uint16) * 257),
    "flat png": each("{}.{}.png", by_pillow),
    "FLAT PNG": each("{}_{}.PNG", by_pillow),
    "flat webp": each("{}-{}.webp", lambda path, frame: Image.fromarray(frame).save(path, lossless=True, exact=True)),
    "deep tif": each("{}.{}.tif", by_ffmpeg("tiff", "rgba64le")),
    "dpx": each("{}.{}.dpx", by_ffmpeg("dpx", "rgba")),
    "exr half": lambda path, clip: write_exr_sequence(
        path, light(clip, premultiplied=True), fps=FPS, alpha_mode="premultiplied"
    ),
    "exr straight": lambda path, clip: write_exr_sequence(
        path, light(clip, premultiplied=False), fps=FPS, alpha_mode="straight"
    ),
    "exr parts": each("{}.{}.exr", exr_file),
    "odd": lambda path, clip: write_prores4444(path.with_suffix(".mov"), drawn(47, 63), fps=FPS),
    "огонь ✨ 炎": lambda path, clip: write_prores4444(path.with_name(path.name + ".mov"), clip, fps=FPS),
    unicodedata.normalize("NFD", "fumée"): each("{}.{}.png", by_pillow),
    "still": lambda path, clip: by_pillow(path.with_suffix(".png"), clip[0]),
    "still exr": lambda path, clip: exr_file(path.with_suffix(".exr"), clip[0]),
    "STILL DPX": lambda path, clip: by_ffmpeg("dpx", "rgba")(path.with_suffix(".DPX"), clip[0]),
}
CAPTIONS = {  # what artists' editors write, by what is then read
    b"\xef\xbb\xbffire\r\n": "fire",
    b"fire\r\nand smoke\r\n": "fire\nand smoke",
    "\ufefffumée ✨\n".encode(): "fumée ✨",
    b"  plain  ": "plain",
}


def left_out(folder: Path) -> dict[str, str]:
    """Add what cannot be used; returns a part of each reason by id."""
    clip = drawn()
    write_mp4(folder / "opaque.mp4", clip[..., :3], fps=FPS)
    each("{}.{}.png", by_pillow)(folder / "gap", clip)
    (folder / "gap.1003.png").unlink()
    each("{}.{}.exr", exr_file)(folder / "cut", clip)
    (folder / "cut.1001.exr").write_bytes((folder / "cut.1001.exr").read_bytes()[:200])
    (folder / "empty.mov").touch()
    each("{}.{}.png", by_pillow)(folder / "mute", clip)
    write_prores4444(folder / "twice.mov", clip, fps=FPS)
    write_webm_alpha(folder / "twice.webm", clip, fps=FPS)
    for name in ("opaque", "gap", "cut", "empty", "twice", "nothing"):
        (folder / f"{name}.txt").write_text("fire")
    return {
        "footage/opaque": "has no alpha channel, but its source is rgba",
        "footage/gap": "lacks frame 1003",
        "footage/cut": "cannot be read as OpenEXR",
        "footage/empty": "is empty",
        "footage/mute": "no caption mute.txt; its numbered images are one clip",
        "footage/twice": "more than one rgb file: twice.mov and twice.webm",
        "footage/nothing": "caption without a file nothing.*",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "footage"
    folder.mkdir()
    said = list(CAPTIONS)
    for number, (name, write) in enumerate(USED.items()):
        write(folder / name, drawn(hard=name == "gif"))
        ending = ".TXT" if name.isupper() else ".txt"
        (folder / f"{name}{ending}").write_bytes(said[number % len(said)])
    return folder


def seen(sample: Sample) -> dict[str, np.ndarray]:
    media = sample.media
    fps = media.fps or Fraction(16)
    clip = Clip(sample.id, Fraction(0), media.frames_at(fps), fps, media.height, media.width)
    return decode_pair(sample, clip, fill=Fill.of(DataConfig()))


def test_every_kind_of_footage_is_used_as_it_was_drawn_or_named(folder: Path) -> None:
    reasons = left_out(folder)
    for name in ("plate.psd", "comp.nk", ".DS_Store"):
        (folder / name).write_bytes(b"x")
    result = scan([SourceConfig(str(folder), rgba=True)], STREAMS, DataConfig())
    samples = {sample.id.removeprefix("footage/"): sample for sample in result.samples}
    wanted = {unicodedata.normalize("NFC", name): name for name in USED}
    told = {bad.id: bad.reason for bad in result.bad}
    assert samples.keys() == wanted.keys(), told
    assert told.keys() == reasons.keys() and all(reason in told[name] for name, reason in reasons.items()), told
    for number, name in enumerate(wanted):
        sample, odd = samples[name], name == "odd"
        assert sample.caption == list(CAPTIONS.values())[number % len(CAPTIONS)], name
        frames = 1 if name.lower().startswith("still") else FRAMES_DRAWN
        assert sample.media.alpha and sample.media.frames == frames, name
        found, clip = seen(sample), drawn(47, 63) if odd else drawn(hard=name == "gif")
        if "vfr" not in name and name != "ffv1":
            clip = clip[: len(found["rgb"])]
            off = np.abs(found["seg"][..., 0].astype(int) - clip[..., 3])
            assert off.mean() < 1 and off.max() <= (8 if name == "vp9" else 4), name
        solid = found["seg"][..., 0] > 200
        assert solid.sum() > 300 and np.abs(found["rgb"][solid].astype(int) - COLOR).mean() < 4, name
    counts = {note.text: note.count for note in result.notes}
    assert counts[NOT_READ.format(".psd")] == counts[NOT_READ.format(".nk")] == counts[HIDDEN] == 1
    flat = 7 + 3  # clips of numbered images that are used, and that are left out; one of these lacks an image
    assert counts[FRAMES] == flat * FRAMES_DRAWN - 1


@pytest.mark.parametrize("name", ["prores vfr", "ffv1"])
def test_a_variable_rate_is_resampled_by_its_times(name: str, folder: Path) -> None:
    result = scan([SourceConfig(str(folder), rgba=True)], STREAMS, DataConfig())
    (sample,) = (sample for sample in result.samples if sample.id == f"footage/{name}")
    clip = Clip(sample.id, Fraction(0), 5, Fraction(24), HEIGHT, WIDTH)
    shown = decode_pair(sample, clip, fill=Fill.of(DataConfig()))["seg"][..., 0].astype(int)
    wanted = drawn()[[0, 1, 1, 3, 3], ..., 3]  # at 0, 10, 20, 30 and 40 of 240: frames come at 0, 10, 25, 30, 48, 60
    assert np.abs(shown - wanted).max() <= 4
