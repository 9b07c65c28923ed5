"""Exactly the wanted frames, of any file, in the same place for every stream."""

import itertools
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.media import HEIGHT, WIDTH, marked, marks, packet_at, write_marked, write_timed
from transpixeler.config import DataConfig
from transpixeler.data.media import container
from transpixeler.data.media.decode import BadMedia, Clip, frame_numbers, probe, read_frames, read_rgba
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.write import write_mp4, write_png_sequence, write_prores4444, write_webm_alpha
from transpixeler.data.sources.pairs import Sample, decode_pair

RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60)]
UNEVEN = np.cumsum([0] + [40, 25, 17, 90, 33, 41, 8, 66] * 15).tolist()  # milliseconds


def clip_of(frames: int, *, start: Fraction = Fraction(0), fps: int = 16, height: int = 16, width: int = 48) -> Clip:
    return Clip("a", start, frames, Fraction(fps), height, width)


def pair(rgb: Path, seg: Path) -> Sample:
    return Sample("a", (("rgb", rgb), ("seg", seg)), "a caption", 0, False, probe(rgb))


def on_display(times: list[Fraction], moments: list[Fraction]) -> list[int]:
    """The last frame that begins by each moment or a millisecond later, found the slow way."""
    return [max(i for i, time in enumerate(times) if time <= moment + Fraction(1, 1000)) for moment in moments]


# --- pairs cannot slip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("fps", RATES, ids=str)
def test_both_streams_show_the_same_frames_and_the_right_ones(fps: Fraction, ending: str, tmp_path: Path) -> None:
    rgb, seg, count = tmp_path / f"a.{ending}", tmp_path / "a_seg.mp4", round(5 * fps)
    codec = "mpeg4" if ending == "avi" else "libx264"
    write_marked(rgb, range(count), fps=fps, codec=codec)
    write_marked(seg, range(count), fps=fps, options={"g": "7"})
    for start in (Fraction(0), Fraction(25, 16)):
        clip = clip_of(49, start=start)
        found = {stream: marks(frames) for stream, frames in decode_pair(pair(rgb, seg), clip).items()}
        moments = [start + Fraction(k, 16) for k in range(49)]
        assert found["rgb"] == found["seg"] == on_display([i / fps for i in range(count)], moments)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_both_streams_show_the_same_frames_at_a_variable_rate(ending: str, tmp_path: Path) -> None:
    rgb, seg = tmp_path / f"a.{ending}", tmp_path / f"a_seg.{ending}"
    for path in (rgb, seg):
        write_timed(path, map(marked, range(len(UNEVEN))), UNEVEN, Fraction(1, 1000))
    clip = clip_of(33, start=Fraction(1, 2))
    found = {stream: marks(frames) for stream, frames in decode_pair(pair(rgb, seg), clip).items()}
    times = [Fraction(time, 1000) for time in UNEVEN]
    assert found["rgb"] == found["seg"] == on_display(times, [Fraction(1, 2) + Fraction(k, 16) for k in range(33)])


@pytest.mark.parametrize("fps", [*RATES, None], ids=str)
def test_a_pair_that_is_shifted_by_one_frame_is_seen(fps: Fraction | None, tmp_path: Path) -> None:
    """The broken twin: were the streams to slip by one frame, the markers would tell."""
    rgb, seg = tmp_path / "a.mp4", tmp_path / "a_seg.mp4"
    for shift, path in enumerate((rgb, seg)):
        numbers = range(shift, shift + len(UNEVEN))
        if fps:
            write_marked(path, numbers, fps=fps)
        else:
            write_timed(path, map(marked, numbers), UNEVEN, Fraction(1, 1000))
    found = decode_pair(pair(rgb, seg), clip_of(25))
    assert [b - a for a, b in zip(marks(found["rgb"]), marks(found["seg"]))] == [1] * 25


def test_a_slow_source_repeats_frames(tmp_path: Path) -> None:
    write_marked(tmp_path / "a.mp4", range(20), fps=Fraction(8))
    assert frame_numbers(tmp_path / "a.mp4", clip_of(6)) == (0, 0, 1, 1, 2, 2)


def test_the_last_frame_lasts_to_the_end(tmp_path: Path) -> None:
    for fps, frames in [(Fraction(30), 61), (Fraction(24), 50), (Fraction(60000, 1001), 124), (Fraction(16), 33)]:
        for ending in ("mp4", "mkv"):
            path = tmp_path / f"a.{ending}"
            write_marked(path, range(frames), fps=fps)
            media = probe(path)
            assert media.frames == frames and abs(media.fps / fps - 1) < 1e-4
            room = media.frames_at(Fraction(16))
            assert room == -(-frames * 16 // fps)
            assert frame_numbers(path, clip_of(room))[-1] < frames


KINDS = {
    "b_frames.mp4": ("libx264", "yuv420p", {"g": "30", "bf": "3"}),
    "open_gop.mkv": ("libx264", "yuv420p", {"x264-params": "open-gop=1:keyint=10:bframes=3"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=16"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "11", "g": "16"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "20", "cpu-used": "8", "deadline": "realtime"}),
    "vp8.webm": ("libvpx", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}),
    "intra.mov": ("prores_ks", "yuv422p10le", {}),
    "old.avi": ("mpeg4", "yuv420p", {"bf": "2", "g": "12"}),
    "stream.ts": ("libx264", "yuv420p", {"g": "12"}),
    "palette.gif": ("gif", "gray", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_set_of_frames_is_what_a_whole_decoding_gives(name: str, tmp_path: Path) -> None:
    codec, pixels, options = KINDS[name]
    write_marked(tmp_path / name, range(70), fps=Fraction(25), codec=codec, pixels=pixels, options=options)
    assert probe(tmp_path / name).frames == 70
    random = np.random.default_rng(0)
    for size in (1, 2, 9, 40):
        wanted = sorted(random.choice(70, size, replace=False).tolist())
        assert marks(read_frames(tmp_path / name, wanted, height=16, width=48)) == wanted


@pytest.mark.parametrize("options", [{"use_editlist": "0"}, {"movflags": "frag_keyframe+empty_moov"}], ids=str)
def test_an_mp4_may_begin_late_or_in_fragments(options: dict[str, str], tmp_path: Path) -> None:
    write_marked(tmp_path / "a.mp4", range(40), fps=Fraction(24), options={"g": "9"}, container_options=options)
    assert marks(read_frames(tmp_path / "a.mp4", [0, 7, 21, 39], height=16, width=48)) == [0, 7, 21, 39]


@pytest.mark.parametrize("cut", [1, 2.5, 6.5, 7.5, 8.5, 10, 11.5])
@pytest.mark.parametrize("name", ["closed.mp4", "open_gop.mp4", "open_gop_hevc.mp4"])
def test_an_mp4_may_be_cut_in_its_header(name: str, cut: float, tmp_path: Path) -> None:
    """Trimmed without encoding it anew: the frames before the cut are there and are not shown."""
    codec, options = {
        "closed.mp4": ("libx264", {"g": "12"}),
        "open_gop.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3"}),
        "open_gop_hevc.mp4": (
            "libx265",
            {"x265-params": "log-level=none:keyint=12:min-keyint=12:open-gop=1:bframes=4"},
        ),
    }[name]
    write_marked(tmp_path / name, range(40), fps=Fraction(25), codec=codec, options=options)
    trim(tmp_path / name, tmp_path / "cut.mp4", Fraction(cut) / 25)
    count = probe(tmp_path / "cut.mp4").frames
    shown = [*range(40 - count, 40)]
    assert abs(shown[0] - cut) <= 1
    for wanted in (range(count), [0], [3], range(5, count, 7)):
        assert marks(read_frames(tmp_path / "cut.mp4", wanted, height=16, width=48)) == [shown[k] for k in wanted]


def trim(source: Path, path: Path, seconds: Fraction) -> None:
    import av

    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(source) as whole, av.open(path, "w", container_options=options) as out:
        stream = whole.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size:
                packet.pts -= round(seconds / packet.time_base)
                packet.dts -= round(seconds / packet.time_base)
                packet.stream = copy
                out.mux(packet)


@pytest.mark.parametrize("name", ["intra.mov", "old.avi"])
def test_a_frame_that_the_decoder_had_to_guess_is_named(name: str, tmp_path: Path) -> None:
    codec, pixels, options = KINDS[name]
    path, coarse = tmp_path / name, np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    film = [np.roll(coarse, number, 1).repeat(12, 0).repeat(12, 1) for number in range(20)]
    write_timed(path, film, range(20), Fraction(1, 25), codec=codec, pixels=pixels, options=options)
    position, size = packet_at(path, 12)
    data = bytearray(path.read_bytes())
    data[position + size // 3 : position + 2 * size // 3] = np.random.default_rng(1).bytes(2 * size // 3 - size // 3)
    path.write_bytes(data)
    assert read_frames(path, range(9), height=16, width=32).shape == (9, 16, 32, 3)
    with pytest.raises(BadMedia, match=r"is damaged: frame 1\d is a guess"):
        read_frames(path, range(8, 20), height=16, width=32)


def test_a_frame_beyond_the_end_is_named(tmp_path: Path) -> None:
    write_marked(tmp_path / "a.mp4", range(5), fps=Fraction(24))
    with pytest.raises(BadMedia, match="has 5 frames, so there is no frame 5"):
        read_frames(tmp_path / "a.mp4", [5], height=16, width=48)


MEASURE = """
import sys
from pathlib import Path
from transpixeler.data.video import read_frames
read_frames(Path(sys.argv[1]), range(100, 133), height=96, width=160)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_the_packets_of_a_file_are_read_once_for_all_its_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scanned = tmp_path / "a.mkv", []
    write_timed(path, map(marked, range(len(UNEVEN))), UNEVEN, Fraction(1, 1000))
    scan = container._scanned
    monkeypatch.setattr(container, "_scanned", lambda *of: scanned.append(of) or scan(*of))
    sample, clips = pair(path, path), [clip_of(5, start=Fraction(k), height=HEIGHT, width=WIDTH) for k in range(4)]
    scanned.clear()  # what looking at the file took
    before = [decode_pair(sample, clip)["seg"] for clip in clips]
    assert len(scanned) == 1
    write_timed(path, map(marked, range(len(UNEVEN) - 9)), UNEVEN[9:], Fraction(1, 1000))
    after = [decode_pair(sample, clip)["seg"] for clip in clips]
    assert len(scanned) == 2 and any(marks(a) != marks(b) for a, b in zip(after, before)), "it has changed"


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 1200):
        picture = np.random.default_rng(0).integers(0, 256, (180, 320, 3), dtype=np.uint8)
        path = tmp_path / f"{count}.mp4"
        shown = (np.roll(picture, i, 1) for i in range(count))
        write_timed(path, shown, range(count), Fraction(1, 30), options={"preset": "ultrafast", "crf": "40"})
        done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert abs(peaks[1] - peaks[0]) < 15, f"{peaks} MB: 900 more frames as RGB are 148 MB"


# --- one scale, one crop ---------------------------------------------------------------------------------------------


def scene(height: int, width: int) -> np.ndarray:
    """Grey waves of all lengths, without colour so that no chroma subsampling blurs the comparison."""
    y, x = np.mgrid[:height, :width]
    grey = 128 + 60 * np.sin(x * x / 90 + y / 9) + 50 * np.cos(y * y / 70)
    return grey.clip(0, 255).astype(np.uint8)[:, :, None].repeat(3, 2)


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


# --- colour ----------------------------------------------------------------------------------------------------------

COLORS = np.array([[255, 255, 255], [0, 0, 0], [220, 40, 30], [30, 200, 60], [40, 60, 230], [128, 128, 128]], np.uint8)
BARS = COLORS.repeat(16, 0)[None].repeat(64, 0)
LIMITED, FULL = 1, 2
BT709, BT601, BT2020 = 1, 5, 9
UNTOLD, SRGB, BT2020_10, PQ, HLG = 2, 13, 14, 16, 18


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("matrix", [BT709, BT601, BT2020])
@pytest.mark.parametrize("span", [LIMITED, FULL])
def test_matrix_and_range_of_a_file_are_respected(pixels: str, matrix: int, span: int, tmp_path: Path) -> None:
    import av

    with av.open(tmp_path / "a.mkv", "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "1"})
        stream.height, stream.width, stream.pix_fmt = *BARS.shape[:2], pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, span
        frame = av.VideoFrame.from_ndarray(BARS, format="rgb24")
        frame = frame.reformat(format=pixels, dst_colorspace=matrix, dst_color_range=span)
        frame.pts = 0
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


# --- alpha and fill --------------------------------------------------------------------------------------------------


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


# --- images ----------------------------------------------------------------------------------------------------------


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


def test_markers_are_read_back() -> None:
    assert marks(np.stack([marked(n) for n in (0, 1, 2047, 4095)])) == [0, 1, 2047, 4095]
    assert marked(5).shape == (HEIGHT, WIDTH, 3)
