"""Every file of a source is in a sample or is named with its reason."""

import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.media import write_marked
from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.sources.pairs import Scan, scan, source_names

STREAMS = {"rgb": "", "seg": "_seg"}


def add(folder: Path, clip: Path, *names: str, caption: str | None = "a caption") -> None:
    """Files of these names, and a caption for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(clip, folder / name)
    if caption is not None:
        (folder / names[0]).with_suffix(".txt").write_text(caption, encoding="utf-8")


def found(*sources: SourceConfig | Path, streams: dict[str, str] = STREAMS, **data: object) -> Scan:
    sources = tuple(s if isinstance(s, SourceConfig) else SourceConfig(str(s)) for s in sources)
    return scan(sources, streams, DataConfig(**data))


def reasons(result: Scan) -> dict[str, str]:
    return {bad.id: bad.reason for bad in result.bad}


# --- folders ---------------------------------------------------------------------------------------------------------


def test_pairs_are_found_in_all_subfolders(clip: Path, tmp_path: Path) -> None:
    add(tmp_path / "set", clip, "b.mp4", "b_seg.mp4")
    add(tmp_path / "set" / "more" / "deep", clip, "a.mp4", "a_seg.mov", caption="  two words\n")
    result = found(tmp_path / "set")
    assert [sample.id for sample in result.samples] == ["set/b", "set/more/deep/a"] and not result.bad
    sample = result.samples[1]
    assert sample.caption == "two words" and dict(sample.paths)["seg"].name == "a_seg.mov"
    assert sample.media.frames == 20 and sample.media.fps == 16


def test_only_the_ending_of_a_name_counts(clip: Path, tmp_path: Path) -> None:
    add(tmp_path, clip, "my_seg_video.mp4", "my_seg_video_seg.mp4")
    add(tmp_path, clip, "_seg.mp4", "_seg_seg.mp4")
    names = [sample.id.split("/")[1] for sample in found(tmp_path).samples]
    assert names == ["_seg", "my_seg_video"]


def test_any_number_of_streams_of_any_suffix(clip: Path, tmp_path: Path) -> None:
    add(tmp_path, clip, "a.mp4", "a.matte.mp4", "a_d.mp4", "a_d_d.mp4")
    streams = {"rgb": "", "matte": ".matte", "near": "_d", "far": "_d_d"}
    (sample,) = found(tmp_path, streams=streams).samples
    assert {stream: path.name for stream, path in sample.paths} == {
        "rgb": "a.mp4",
        "matte": "a.matte.mp4",
        "near": "a_d.mp4",
        "far": "a_d_d.mp4",
    }


def test_images_are_samples_of_one_frame(tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((32, 48, 3), 90, np.uint8))
    picture.save(tmp_path / "a.jpg")
    picture.save(tmp_path / "a_seg.png")
    (tmp_path / "a.txt").write_text("grey")
    (sample,) = found(tmp_path).samples
    assert sample.media.image


def test_a_folder_of_images_is_one_video(tmp_path: Path) -> None:
    for folder, alpha in (("walk", 3), ("walk_seg", 3), ("ghost", 4)):
        (tmp_path / folder).mkdir()
        for number in range(12):
            Image.fromarray(np.full((32, 48, alpha), number, np.uint8)).save(tmp_path / folder / f"f{number}.png")
    for name in ("walk", "ghost"):
        (tmp_path / f"{name}.txt").write_text("walks")
    result = found(tmp_path)
    assert [(sample.id.split("/")[1], sample.media.frames) for sample in result.samples] == [("walk", 12)]
    assert "no seg file ghost_seg" in result.bad[0].reason
    shutil.rmtree(tmp_path / "walk_seg")
    result = found(SourceConfig(str(tmp_path), rgba=True))
    assert [sample.id.split("/")[1] for sample in result.samples] == ["ghost"]
    assert "no alpha channel" in result.bad[0].reason


def add_sequence(folder: Path, *names: str) -> None:
    """A folder of images of these names, with a caption where it is no companion."""
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / name)
    if not folder.name.endswith("_seg"):
        folder.with_suffix(".txt").write_text("walks")


def numbered(*numbers: int) -> list[str]:
    return [f"{number:05d}.png" for number in numbers]


PAIRED = {
    "from zero and from one": (numbered(0, 1, 2), numbered(1, 2, 3)),
    "with and without padding": ([f"f_{n}.png" for n in (9, 10, 11)], numbered(9, 10, 11)),
    "every fifth frame": (numbered(0, 5, 10), [f"shot2-{n}.jpg" for n in (0, 5, 10)]),
    "times in milliseconds": (numbered(0, 33, 67, 100), numbered(0, 33, 67, 100)),
    "names without numbers": (["a.png", "b.png", "d.png"], numbered(0, 1, 2)),
    "names of two numbers": (["0.033.png", "0.067.png", "1.100.png"], numbered(0, 1, 2)),
}


@pytest.mark.parametrize("name", PAIRED)
def test_image_sequences_are_paired_by_the_numbers_in_their_names(name: str, tmp_path: Path) -> None:
    rgb, seg = PAIRED[name]
    add_sequence(tmp_path / "ring", *rgb)
    add_sequence(tmp_path / "ring_seg", *seg)
    assert [sample.media.frames for sample in found(tmp_path).samples] == [len(rgb)]


SLIPPED = {
    "other gaps": (numbered(0, 1, 3, 4), numbered(0, 1, 2, 3), "lacks frame 2: 00001.png is followed by 00003.png"),
    "a gap in the companion": (numbered(0, 1, 2), numbered(1, 2, 4), "lacks frame 3: 00002.png is followed by"),
    "the same gap": (numbered(0, 1, 3), numbered(0, 1, 3), "lacks frame 2"),
    "other steps": (numbered(0, 2, 4), numbered(0, 1, 2), "has 00001.png as its frame 1, rgb has 00002.png"),
    "other times": (numbered(0, 33, 67), numbered(0, 33, 66), "has 00066.png as its frame 2, rgb has 00067.png"),
    "one number twice": (["1.png", "1.jpg", "2.png"], numbered(0, 1, 2), "has frame 1 twice: 1.jpg and 1.png"),
}


@pytest.mark.parametrize("name", SLIPPED)
def test_image_sequences_that_would_slip_are_refused(name: str, tmp_path: Path) -> None:
    rgb, seg, reason = SLIPPED[name]
    add_sequence(tmp_path / "ring", *rgb)
    add_sequence(tmp_path / "ring_seg", *seg)
    (bad,) = found(tmp_path).bad
    assert bad.reason.startswith(reason)


def test_what_is_missing_is_named(clip: Path, tmp_path: Path) -> None:
    add(tmp_path / "s", clip, "alone.mp4")
    add(tmp_path / "s", clip, "both.mov")
    add(tmp_path / "s", clip, "mute.mp4", "mute_seg.mp4", caption=None)
    add(tmp_path / "s", clip, "blank.mp4", "blank_seg.mp4", caption=" \n")
    add(tmp_path / "s", clip, "orphan_seg.mp4", caption=None)
    add(tmp_path / "s", clip, "twice.mp4", "twice_seg.mp4", "twice.mov")
    (tmp_path / "s" / "words.txt").write_text("of nothing")
    add(tmp_path / "s", clip, "latin.mp4", "latin_seg.mp4")
    (tmp_path / "s" / "latin.txt").write_bytes("café".encode("latin-1"))
    result = found(tmp_path / "s")
    assert not result.samples
    expected = {
        "s/alone": "no seg file alone_seg.*",
        "s/both": "no seg file both_seg.*; if the rgb file holds alpha, set rgba: true for its source",
        "s/mute": "no caption mute.txt",
        "s/blank": "its caption is empty",
        "s/orphan": "seg file without its rgb file orphan.*",
        "s/twice": "more than one rgb file: twice.mov and twice.mp4",
        "s/words": "caption without a rgb file words.*",
    }
    assert reasons(result) | expected == reasons(result)
    assert "latin.txt is not UTF-8" in reasons(result)["s/latin"]


def test_names_that_are_not_utf8_are_named_as_escapes(clip: Path, tmp_path: Path) -> None:
    cafe, root = os.fsdecode("café".encode("latin-1")), tmp_path / "s"
    try:
        (tmp_path / cafe).touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    add(root, clip, f"{cafe}.mp4", f"{cafe}_seg.mp4")
    add(root / cafe, clip, "a.mp4", "a_seg.mp4")
    add(root, clip, f"{cafe} alone.mp4")
    add(root, clip, "b.mp4", "b_seg.mp4")
    row = {"rgb": "s/b.mp4", "seg": f"s/{cafe}_seg.mp4", "text": "t"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row))
    result = found(root, tmp_path / "l.jsonl")
    assert [sample.id for sample in result.samples] == ["s/b"]
    assert reasons(result) == {
        r"s/caf\udce9": "its name is not UTF-8; rename it",
        r"s/caf\udce9/a": "its name is not UTF-8; rename it",
        r"s/caf\udce9 alone": r"no seg file caf\udce9 alone_seg.*",
        "l/s/b": "its name is not UTF-8; rename it",
    }
    json.dumps([(bad.id, bad.path, bad.reason) for bad in result.bad], ensure_ascii=False).encode()


def test_streams_that_differ_are_named(clip: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    for name in ("short", "fast", "small", "empty", "broken", "sound"):
        add(root, clip, f"{name}.mp4")
    write_marked(root / "short_seg.mp4", range(19), fps=Fraction(16))
    write_marked(root / "fast_seg.mp4", range(20), fps=Fraction(24))
    first, *rest = (Image.fromarray(np.full((16, 16, 3), i * 9, np.uint8)) for i in range(20))
    first.save(root / "small_seg.gif", save_all=True, append_images=rest, duration=60)
    (root / "empty_seg.mp4").touch()
    (root / "broken_seg.mp4").write_bytes(b"not a video at all")
    write_sound(root / "sound_seg.mp4")
    told = reasons(found(root))
    assert told["s/short"] == "has 19 frames, rgb has 20"
    assert told["s/fast"] == "runs at 24.000 fps, rgb at 16.000"
    assert told["s/small"] == "is 16×16, rgb is 96×32"
    assert told["s/empty"] == "is empty"
    assert told["s/broken"].startswith("cannot be read")
    assert told["s/sound"] == "has no video stream"
    assert len(told) == 6


def write_sound(path: Path) -> None:
    import av

    with av.open(path, "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def test_bad_samples_can_be_made_fatal(clip: Path, tmp_path: Path) -> None:
    add(tmp_path, clip, "a.mp4")
    add(tmp_path, clip, "b.mp4")
    with pytest.raises(UserError, match=r"2 of 2 samples cannot be used, the first is .*/a .*no seg file a_seg"):
        found(tmp_path, on_bad="error")


def test_the_order_does_not_depend_on_the_file_system(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "cab":
        add(tmp_path / name, clip, f"{name}.mp4", f"{name}_seg.mp4")
    forward = found(tmp_path)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
    assert found(tmp_path) == forward


def test_links_that_go_in_circles_end(clip: Path, tmp_path: Path) -> None:
    add(tmp_path / "s", clip, "a.mp4", "a_seg.mp4")
    (tmp_path / "s" / "again").symlink_to(tmp_path / "s")
    assert len(found(tmp_path / "s").samples) == 1


def test_sources_of_one_name_keep_their_samples_apart(clip: Path, tmp_path: Path) -> None:
    for parent in ("x", "y"):
        add(tmp_path / parent / "clips", clip, "a.mp4", "a_seg.mp4")
    sources = [SourceConfig(str(tmp_path / parent / "clips")) for parent in ("x", "y", "x")]
    assert source_names(sources) == ("clips", "clips-2", "clips-3")
    assert {sample.id for sample in found(*sources).samples} == {"clips/a", "clips-2/a", "clips-3/a"}


def test_rgba_needs_two_streams_at_most(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rgba gives two streams"):
        found(SourceConfig(str(tmp_path), rgba=True), streams={"rgb": "", "seg": "_seg", "depth": "_depth"})


def test_a_source_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        found(tmp_path / "nowhere")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(UserError, match="a folder or a manifest"):
        found(tmp_path / "a.xlsx")


def test_control_characters_of_names_never_reach_a_terminal(clip: Path, tmp_path: Path) -> None:
    red = "\x1b[31m\x9b\u202eevil\x07"
    add(tmp_path / red, clip, f"{red}.mp4", f"{red}_seg.mp4")
    add(tmp_path, clip, f"{red}.mp4", caption=None)
    result = found(tmp_path)
    (good,) = result.samples
    shown = [good.id, *(text for bad in result.bad for text in (bad.id, bad.path, bad.reason))]
    assert len(result.bad) == 1 and all(text.isprintable() for text in shown), shown
    assert all(r"\x1b[31m\x9b\u202eevil\x07" in text for text in shown)
