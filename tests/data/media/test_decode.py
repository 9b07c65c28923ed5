"""Exactly the wanted frames come out of any file, and the streams of a pair cannot slip."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support.media import HEIGHT, WIDTH, clip_of, marked, marks, packet_at, pair, write_marked, write_timed
from transpixeler.data.media import container
from transpixeler.data.media.decode import frame_numbers, probe, read_frames
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.sources.pairs import decode_pair

RATES = [Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60)]

UNEVEN = np.cumsum([0] + [40, 25, 17, 90, 33, 41, 8, 66] * 15).tolist()  # milliseconds


def on_display(times: list[Fraction], moments: list[Fraction]) -> list[int]:
    """The last frame that begins by each moment or a millisecond later, found the slow way."""
    return [max(i for i, time in enumerate(times) if time <= moment + Fraction(1, 1000)) for moment in moments]


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


def test_a_tag_that_is_no_text_does_not_keep_a_file_from_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_marked(path, range(3), fps=Fraction(16))
    whole = path.read_bytes()
    assert b"VideoHandler" in whole
    path.write_bytes(whole.replace(b"VideoHandler", b"Video\xff\xfe\xfa\xfc\xe9er"))
    assert probe(path).frames == 3 and marks(read_frames(path, [0, 1, 2], height=HEIGHT, width=WIDTH)) == [0, 1, 2]


def test_a_frame_beyond_the_end_is_named(tmp_path: Path) -> None:
    write_marked(tmp_path / "a.mp4", range(5), fps=Fraction(24))
    with pytest.raises(BadMedia, match="has 5 frames, so there is no frame 5"):
        read_frames(tmp_path / "a.mp4", [5], height=16, width=48)


MEASURE = """
import sys
from pathlib import Path
from transpixeler.data.media.decode import read_frames
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


def test_markers_are_read_back() -> None:
    assert marks(np.stack([marked(n) for n in (0, 1, 2047, 4095)])) == [0, 1, 2047, 4095]
    assert marked(5).shape == (HEIGHT, WIDTH, 3)
