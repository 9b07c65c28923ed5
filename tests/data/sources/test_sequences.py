"""Numbered images in a folder are clips or stills by one rule, and no file is passed over in silence."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.test_pairs import STREAMS, add, found, reasons
from tests.support.media import marked, marks
from transpixeler.config.sections import SourceConfig
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.files import files_of
from transpixeler.data.sources.folder import FRAMES, HIDDEN, NOT_READ, STILLS, UNTAKEN
from transpixeler.data.sources.pairs import Scan, decode_pair


def add_images(folder: Path, *names: str, caption: str = "") -> None:
    """Write images that carry their own number; caption: the name of a file with one."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(marked(number)).save(folder / name)
    if caption:
        (folder / caption).write_text("fire")


def numbered(form: str, count: int = 8, first: int = 1001) -> list[str]:
    return [form.format(number) for number in range(first, first + count)]


def notes(result: Scan) -> dict[str, int]:
    return {note.text: note.count for note in result.notes if not note.text.startswith("image sequence")}


FORMS = {
    "a dot": ("fire.{:04}.png", "fire_seg.{:04}.png", "fire.####.png"),
    "an underscore": ("fire_{:04}.png", "fire_seg_{:04}.png", "fire_####.png"),
    "the suffix last": ("fire.{:04}.png", "fire.{:04}_seg.png", "fire.####.png"),
    "nothing between": ("fire{:04}.png", "fire_seg{:04}.png", "fire####.png"),
    "numbers of any length": ("fire-{}.png", "fire_seg-{}.png", "fire-####.png"),
    "upper case": ("fire.{:04}.PNG", "fire_seg.{:04}.Png", "fire.####.PNG"),
}


@pytest.mark.parametrize("name", FORMS)
def test_numbered_images_beside_each_other_are_one_clip(name: str, tmp_path: Path) -> None:
    rgb, seg, pattern = FORMS[name]
    add_images(tmp_path, *numbered(rgb), caption="fire.txt")
    add_images(tmp_path, *numbered(seg))
    result = found(tmp_path)
    (sample,) = result.samples
    assert not result.bad and notes(result) == {FRAMES: 16}
    assert sample.id.endswith("/fire") and sample.media.frames == 8 and sample.paths[0][1].name == pattern
    for frames in decode_pair(sample, Clip(sample.id, Fraction(0), 8, Fraction(16), 32, 96)).values():
        assert marks(frames) == list(range(8))


def test_numbered_images_with_captions_of_their_own_are_stills(tmp_path: Path) -> None:
    for number in range(1, 6):
        add_images(tmp_path, f"img_{number:03}.png", f"img_{number:03}_seg.png", caption=f"img_{number:03}.txt")
    result = found(tmp_path)
    assert len(result.samples) == 5 and not result.bad and notes(result) == {}, "nothing to tell where all have one"
    (tmp_path / "img_005.txt").unlink()
    result = found(tmp_path)
    assert [sample.media.frames for sample in result.samples] == [1] * 4
    assert list(reasons(result).values()) == ["no caption img_005.txt"]
    assert notes(result) == {STILLS: 10}


def test_a_still_keeps_its_caption_beside_numbered_ones(tmp_path: Path) -> None:
    """Photo.txt is the caption of photo.png, and of no clip photo_1.png, photo_2.png."""
    add_images(tmp_path, "photo.png", "photo_1.png", "photo_2.png", "photo2.png", "photo3.png", caption="photo.txt")
    result = found(tmp_path, streams={"rgb": ""})
    assert [sample.id.split("/")[1] for sample in result.samples] == ["photo"]
    assert notes(result) == {UNTAKEN.format("_1"): 1, UNTAKEN.format("_2"): 1}
    assert len(result.bad) == 2


def test_a_clip_without_a_caption_is_one_line_that_says_how_it_was_understood(tmp_path: Path) -> None:
    add_images(tmp_path / "s", *numbered("fire.{}.png"), *numbered("fire_seg.{}.png"))
    result = found(tmp_path / "s")
    assert reasons(result) == {
        "s/fire": "no caption fire.txt; its numbered images are one clip, or stills where each has a caption"
    }


def test_images_named_by_numbers_alone_are_one_line_too(tmp_path: Path) -> None:
    """They lack a name, which a folder of their own would give them."""
    add_images(tmp_path / "s", *numbered("{:04}.png"), *numbered("{:04}_seg.png"))
    result = found(tmp_path / "s")
    (reason,) = reasons(result).values()
    assert reason.startswith("no caption ####.txt; its numbered images are one clip") and notes(result) == {FRAMES: 16}


def test_a_gap_in_a_clip_is_named(tmp_path: Path) -> None:
    add_images(tmp_path / "s", *numbered("fire.{}.png"), *numbered("fire_seg.{}.png"), caption="fire.txt")
    (tmp_path / "s" / "fire.1004.png").unlink()
    (told,) = reasons(found(tmp_path / "s")).values()
    assert told == "lacks frame 1004: fire.1003.png is followed by fire.1005.png; add it, or rename the files"


def test_a_folder_of_several_clips_is_no_clip_of_all_of_them(tmp_path: Path) -> None:
    shots = [name for shot in ("fire", "rain") for form in ("{}.{{}}.png", "{}_seg.{{}}.png") for name in
             numbered(form.format(shot))]  # fmt: skip
    add_images(tmp_path / "shots", *shots)
    for shot in ("fire", "rain"):
        (tmp_path / "shots" / f"{shot}.txt").write_text(shot)
    assert [sample.id.split("/")[-1] for sample in found(tmp_path).samples] == ["fire", "rain"]
    for shot in ("fire", "rain"):
        (tmp_path / "shots" / f"{shot}.txt").unlink()
    assert sorted(one.split("/")[-1] for one in reasons(found(tmp_path))) == ["fire", "rain"]


def test_what_else_lies_in_a_folder_of_images_does_not_unmake_the_clip(tmp_path: Path) -> None:
    for folder in ("ring", "ring_seg"):
        add_images(tmp_path / folder, *numbered("{:05}.png", first=0))
        (tmp_path / folder / "Thumbs.db").write_bytes(b"x")
        (tmp_path / folder / ".DS_Store").write_bytes(b"x")
    (tmp_path / "ring.txt").write_text("a ring")
    result = found(tmp_path)
    assert [sample.media.frames for sample in result.samples] == [8] and not result.bad
    assert notes(result) == {NOT_READ.format(".db"): 2, HIDDEN: 2}


# --- rates -----------------------------------------------------------------------------------------------------------


def test_a_sequence_is_resampled_by_the_rate_that_is_given_for_it(tmp_path: Path) -> None:
    add_images(tmp_path / "s", *numbered("fire.{}.png", 12), caption="fire.txt")
    add_images(tmp_path / "s", *numbered("fire_seg.{}.png", 12))
    (tmp_path / "l.jsonl").write_text(
        '{"video": "s/fire.####.png", "seg": "s/fire_seg.####.png", "text": "fire", "fps": 48}'
    )
    clip = Clip("fire", Fraction(0), 4, Fraction(16), 32, 96)
    for source, fps, shown, told in (
        (
            SourceConfig(str(tmp_path / "s")),
            0,
            [0, 1, 2, 3],
            "without a rate, taken image by image as 16 fps (data.fps)",
        ),
        (SourceConfig(str(tmp_path / "s"), sequence_fps=32), 32, [0, 2, 4, 6], "taken at 32 fps"),
        (SourceConfig(str(tmp_path / "l.jsonl"), sequence_fps=32), 48, [0, 3, 6, 9], "taken at 48 fps"),
    ):
        result = found(source)
        (sample,) = result.samples
        assert sample.media.fps == fps and any(told in note.text for note in result.notes)
        assert [marks(frames) for frames in decode_pair(sample, clip).values()] == [shown, shown]
    assert found(tmp_path / "s", sequence_fps=29.97).samples[0].media.fps == Fraction(30000, 1001)


# --- nothing in silence ----------------------------------------------------------------------------------------------


def test_captions_are_found_in_any_case_and_two_of_one_name_are_named(clip: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    for name, ending in (("a", ".TXT"), ("b", ".Txt"), ("c", ".txt")):
        add(root, clip, f"{name}.MP4", f"{name}_seg.Mp4", caption=None)
        (root / f"{name}{ending}").write_text("a caption")
    (root / "c.TXT").write_text("another")
    result = found(root)
    assert [sample.id for sample in result.samples] == ["s/a", "s/b"]
    assert reasons(result) == {"s/c": "more than one caption: c.TXT and c.txt"}


def test_every_file_of_a_folder_is_used_named_or_counted(clip: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    add(root / "more", clip, "a.mp4", "a_seg.mp4")
    for name in ("plate.psd", "more/b.psd", "more/comp.nk", "README", ".DS_Store", "more/._a.mp4"):
        (root / name).write_bytes(b"x")
    (root / "cache").mkdir()
    (root / "cache" / "probes.tsv").write_text("of our own, so not told")
    result = found(root)
    assert len(result.samples) == 1 and not result.bad
    assert notes(result) == {
        NOT_READ.format(".psd"): 2,
        NOT_READ.format(".nk"): 1,
        NOT_READ.format("README"): 1,
        HIDDEN: 2,
    }


def test_companions_that_one_stream_does_not_want_are_counted_not_listed(clip: Path, tmp_path: Path) -> None:
    for number in range(5):
        add(tmp_path / "s", clip, f"{number:03}.mp4", f"{number:03}_seg.mp4")
    shutil.copy(clip, tmp_path / "s" / "alone_seg.mp4")
    result = found(tmp_path / "s", streams={"rgb": ""})
    assert len(result.samples) == 5 and notes(result) == {UNTAKEN.format("_seg"): 5}
    assert reasons(result) == {"s/alone_seg": "no caption alone_seg.txt"}
    assert len(found(tmp_path / "s", streams=STREAMS).samples) == 5


def test_numbers_alone_and_animations_are_no_frames_of_a_clip(tmp_path: Path) -> None:
    add_images(tmp_path / "s", "0001.png", "0002.png", caption="0001.txt")
    first, *rest = (Image.fromarray(np.full((16, 16, 4), 9 * number, np.uint8)) for number in range(3))
    for number in (1, 2):
        first.save(tmp_path / "s" / f"fx_{number}.webp", save_all=True, append_images=rest, duration=40)
    (tmp_path / "s" / "fx.txt").write_text("sparks")
    result = found(tmp_path / "s", streams={"rgb": ""})
    assert [sample.id for sample in result.samples] == ["s/0001"]
    assert "is a sequence of animations" in reasons(result)["s/fx"] and "0002.txt" in reasons(result)["s/0002"]


def test_a_folder_of_many_clips_is_listed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed for each clip, 300 pairs of 100 frames would take five minutes in place of three seconds."""
    for shot in range(20):
        add_images(tmp_path, *numbered(f"shot{shot}.{{}}.PNG", 3))
    os.utime(tmp_path, (1, 1))
    listed, whole = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or whole(path))
    for shot in range(20):
        assert [file.name for file in files_of(tmp_path / f"shot{shot}.####.png")] == numbered(
            f"shot{shot}.{{}}.PNG", 3
        )
    assert len(listed) == 1
    add_images(tmp_path, "shot0.1004.png")
    assert len(files_of(tmp_path / "shot0.####.png")) == 4
    os.utime(tmp_path, (2, 2))
    assert len(files_of(tmp_path / "shot0.####.png")) == 4 and not files_of(tmp_path / "other.####.png")
