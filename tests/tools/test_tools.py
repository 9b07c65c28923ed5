"""The import tools, run as a user runs them on what the demo writes; what is wrong is one line and exit code 2."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import manifests
import pytest
from PIL import Image

from tests.support.toolbox import FPS, SCENES, SINGLE, TOOLS, all_frames, one_line, scanned, stack, tool
from transpixeler.data.media.write import write_mp4
from transpixeler.data.sources import manifest
from transpixeler.demo.write import write_pairs

videomatte, celebv = tool("import_videomatte"), tool("import_celebv_text")
metadata, shard = tool("metadata"), tool("shard")
OPEN_SORA = ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"]


@pytest.mark.parametrize("name", ["split_rgba", "import_videomatte", "import_celebv_text", "metadata", "shard"])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys, name: str) -> None:
    gone = tmp_path / "gone"
    out = tmp_path / "out.jsonl"
    assert tool(name)(gone, "--out", out, *(["--rows", 5] if name == "shard" else [])) == 2
    one_line(capsys, f"{name}: {gone}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("metadata", "--jobs"),
        ("import_videomatte", "--jobs"),
        ("import_celebv_text", "--jobs"),
        ("shard", "--rows"),
        ("shard", "--shards"),
        ("migrate", "--gpus"),
    ],
)
def test_a_count_of_nothing_is_one_line(tmp_path: Path, capsys, name: str, option: str) -> None:
    source = tmp_path / ("mine.toml" if name == "migrate" else "mine.csv")
    source.write_text("path,text\n" if name != "migrate" else "epochs = 1\n")
    folder = {"import_videomatte": tmp_path, "import_celebv_text": tmp_path}.get(name, source)
    assert tool(name)(folder, "--out", tmp_path / "out.jsonl", option, 0) == 2
    one_line(capsys, f"{option} must be at least 1")


def test_a_tool_stands_by_itself() -> None:
    said = subprocess.run([sys.executable, TOOLS / "shard.py", "--help"], capture_output=True, text=True, check=True)
    assert "larger than memory" in said.stdout


# --- import_videomatte -----------------------------------------------------------------------------------------------


@pytest.fixture
def matte_root(tmp_path: Path) -> Path:
    """Three clips of the demo in VideoMatte240K's places, and one picture without its alpha."""
    write_pairs(tmp_path / "pairs", SCENES)
    train = tmp_path / "root/train"
    (train / "fgr").mkdir(parents=True)
    (train / "pha").mkdir()
    for name in ("001", "002", "003"):
        (tmp_path / f"pairs/{name}.mp4").rename(train / f"fgr/{name}.mp4")
        (tmp_path / f"pairs/{name}_seg.mp4").rename(train / f"pha/{name}.mp4")
    (train / "fgr/004.mp4").write_bytes((train / "fgr/001.mp4").read_bytes())
    captions = {"001.mp4": "a star", "train/fgr/002.mp4": ["a ring", "another"], "004": "alone"}
    (train / "video_captions.json").write_text(json.dumps(captions))
    return tmp_path / "root"


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_matching_stems_become_pairs(tmp_path: Path, matte_root: Path, capsys, mode: str) -> None:
    out = tmp_path / "out"
    assert videomatte(matte_root, "--out", out, "--mode", mode) == 0
    told = capsys.readouterr().out
    assert "2 pairs" in told and "003: has no caption" in told and "004: has no alpha" in told
    found = scanned(out)
    assert not found.bad and [sample.caption for sample in found.samples] == ["a star", "a ring"]
    assert (out / "001.mp4").is_symlink() == (mode == "link")
    before = (out / "001_seg.mp4").stat().st_ino
    assert videomatte(matte_root, "--out", out, "--mode", mode, "--caption", "someone") == 0
    assert len(scanned(out).samples) == 3 and (out / "001_seg.mp4").stat().st_ino == before


def test_other_shapes_of_captions_and_slipped_partners(tmp_path: Path, matte_root: Path, capsys) -> None:
    train = matte_root / "train"
    entries = [{"video": f"{n:03d}.mp4", "caption": f"clip {n}"} for n in (1, 2, 3)]
    (train / "video_captions.json").write_text(json.dumps(entries))
    write_mp4(train / "pha/002.mp4", stack(SCENES[1])[:4, ..., :3], fps=Fraction(24))
    assert videomatte(matte_root, "--out", tmp_path / "out") == 0
    assert "002: 002.mp4 has 4 frames" in capsys.readouterr().out
    assert [sample.caption for sample in scanned(tmp_path / "out").samples] == ["clip 1", "clip 3"]


def test_a_choice_of_pictures_is_asked_for(tmp_path: Path, matte_root: Path, capsys) -> None:
    (matte_root / "train/fgr_blur").mkdir()
    assert videomatte(matte_root, "--out", tmp_path / "out") == 2
    one_line(capsys, "holds fgr, fgr_blur; choose one folder of pictures with --fgr")
    (matte_root / "train/video_captions.json").write_text("[1, 2]")
    assert videomatte(matte_root, "--out", tmp_path / "out", "--fgr", "fgr") == 2
    one_line(capsys, "is neither {name: caption} nor a list of objects")


# --- import_celebv_text ----------------------------------------------------------------------------------------------


@pytest.fixture
def celeb_root(tmp_path: Path) -> Path:
    root = tmp_path / "celeb"
    for number, part in ((1, "a"), (2, "b")):
        write_mp4(root / f"videos/{part}/id{number}.mp4", stack(SCENES[number])[..., :3], fps=FPS)
        for kind in ("action", "emotion"):
            (root / f"texts/{kind}").mkdir(parents=True, exist_ok=True)
            (root / f"texts/{kind}/id{number}.txt").write_text(f"{kind} of {number}\nmore {kind} of {number}\n")
    (root / "videos/a/id0.mp4").write_bytes(b"broken")
    (root / "texts/action/id0.txt").write_text("a caption")
    return root


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_caption_is_a_row_of_one_stream(tmp_path: Path, celeb_root: Path, capsys) -> None:
    out = tmp_path / "lists/celeb.jsonl"
    assert celebv(celeb_root, "--out", out) == 0
    assert "8 captions of 2 clips" in (told := capsys.readouterr().out) and "id0: cannot be read" in told
    found = scanned(out, SINGLE)
    assert not found.bad and len(found.samples) == 8
    assert {sample.caption for sample in found.samples} >= {"action of 1", "more emotion of 2"}


def test_a_stopped_import_goes_on_and_takes_in_what_is_new(tmp_path: Path, celeb_root: Path, capsys) -> None:
    out, whole = tmp_path / "celeb.jsonl", tmp_path / "whole.jsonl"
    assert celebv(celeb_root, "--out", whole, "--captions", "3") == 0
    assert celebv(celeb_root, "--out", out, "--captions", "3") == 0
    lines = out.read_text().splitlines(keepends=True)
    out.unlink()
    (tmp_path / ".celeb.jsonl.part").write_text("".join(lines[:4]) + lines[4][:20])  # killed within the second clip
    write_mp4(celeb_root / "videos/c/id3.mp4", stack(SCENES[0])[..., :3], fps=FPS)
    (celeb_root / "texts/action/id3.txt").write_text("later")
    assert celebv(celeb_root, "--out", out, "--captions", "3") == 0
    assert rows_of(out)[:6] == rows_of(whole) and rows_of(out)[6]["text"] == "later"
    assert celebv(celeb_root, "--out", out, "--captions", "2") == 2
    assert "was made with" in capsys.readouterr().err


def test_only_the_beginning_of_clips_is_cut_without_encoding_anew(tmp_path: Path, celeb_root: Path) -> None:
    out = tmp_path / "short.jsonl"
    assert celebv(celeb_root, "--out", out, "--seconds", "0.25", "--captions", "1") == 0
    rows = {Path(row["video"]).stem: row for row in rows_of(out)}
    assert [rows[name]["num_frames"] for name in ("id1", "id2")] == [4, 4]
    cut, source = (all_frames(path) for path in (tmp_path / rows["id1"]["video"], celeb_root / "videos/a/id1.mp4"))
    assert (cut == source[:4]).all() and not scanned(out, SINGLE).bad


# --- metadata and shard ----------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder of the demo's pairs with a manifest of the pictures, a file that is none, and one that is gone."""
    write_pairs(tmp_path / "data", SCENES)
    (tmp_path / "data/bad.mp4").write_text("no video")
    names = ["001.mp4", "bad.mp4", "002.mp4", "gone.mp4", "003.mp4"]
    rows = [{"path": name, "text": f"café, {name}", "extra": str(i)} for i, name in enumerate(names)]
    with (tmp_path / "data/list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "data/list.csv"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_files_are_measured_and_the_result_is_a_source(tmp_path: Path, listed: Path, capsys, ending: str) -> None:
    out = tmp_path / f"other/measured.{ending}"
    assert metadata(listed, "--out", out) == 0
    told = capsys.readouterr().out
    assert "3 rows, 2 more in" in told and "gone.mp4): is missing" in told
    found = scanned(out, SINGLE)
    assert not found.bad and [sample.caption for sample in found.samples] == [f"café, 00{n}.mp4" for n in (1, 2, 3)]
    if ending == "jsonl":
        row = rows_of(out)[1]
        assert (row["num_frames"], row["height"], row["width"], row["fps"]) == (9, 48, 32, 24.0)
        assert row["aspect_ratio"] == 48 / 32 and row["resolution"] == 48 * 32 and row["extra"] == "2"
        assert list(row)[:2] == ["path", "text"] and list(row)[3:] == OPEN_SORA[2:]


def test_what_was_measured_otherwise_is_measured_anew(tmp_path: Path, listed: Path) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    facts = listed.stat()
    stamp = {"source": str(listed.resolve()), "size": facts.st_size, "time": facts.st_mtime_ns}
    row = {"row": {"path": "data/001.mp4", "text": "", "aspect_ratio": 32 / 48}}
    (tmp_path / ".out.jsonl.part").write_text(f"{json.dumps(stamp)}\n{json.dumps(row)}\n")
    assert metadata(listed, "--out", whole) == 0 and metadata(listed, "--out", out) == 0
    assert rows_of(out) == rows_of(whole)


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert metadata(listed, "--out", whole) == 0
    module = sys.modules["tools_metadata"]
    looked, seen = module.probe, []

    def once(path: Path) -> object:
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return looked(path)

    monkeypatch.setattr(module, "WINDOW", 1)
    monkeypatch.setattr(module, "probe", once)
    assert metadata(listed, "--out", out, "--jobs", "1") == 130 and not out.exists()
    assert metadata(listed, "--out", out, "--jobs", "1") == 0
    assert seen.count("001.mp4") == 1 and rows_of(out) == rows_of(whole)


def test_no_usable_row_is_an_error(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no path"}\n')
    for ending in ("jsonl", "parquet"):
        assert metadata(tmp_path / "a.jsonl", "--out", tmp_path / f"b.{ending}") == 2
        one_line(capsys, "no row can be used")


def test_a_column_may_be_empty_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Stills have no rate, and the first film comes late."""
    monkeypatch.setattr(manifests, "BATCH", 2)
    write_pairs(tmp_path, SCENES[:1])
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    rows = [{"path": "a.png", "text": "still", "none": None}] * 5
    rows += [{"path": "001.mp4", "text": "film", "score": 1}, {"path": "001.mp4", "text": "film", "score": 0.5}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert metadata(tmp_path / "a.jsonl", "--out", tmp_path / "b.parquet") == 0
    found = [row for _, row in manifest.rows(tmp_path / "b.parquet")]
    assert [row["fps"] for row in found] == [None] * 5 + [16.0] * 2
    assert [row["score"] for row in found[4:]] == [None, 1, 0.5] and not any(row["none"] for row in found)
    (tmp_path / "a.jsonl").write_text('{"path": "a.png", "x": 1}\n{"path": "a.png", "x": "one"}\n')
    capsys.readouterr()
    assert metadata(tmp_path / "a.jsonl", "--out", tmp_path / "c.parquet") == 2
    one_line(capsys, "parquet cannot hold these columns")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("how", [("--rows", "2"), ("--shards", "2")])
def test_shards_together_hold_every_row_once(tmp_path: Path, listed: Path, ending: str, how: tuple[str, str]) -> None:
    source, out = tmp_path / f"data/all.{ending}", tmp_path / "shards/x"
    assert metadata(listed, "--out", source) == 0
    assert shard(source, "--out", out, *how) == 0
    files = sorted(path for path in out.iterdir() if not path.name.startswith("."))
    assert [path.name for path in files] == [f"all-0000{n}.{ending}" for n in (0, 1)]
    found = [scanned(path, SINGLE) for path in files]
    assert not any(part.bad for part in found)
    assert sorted(sample.caption for part in found for sample in part.samples) == [
        f"café, 00{n}.mp4" for n in (1, 2, 3)
    ]


def test_finished_shards_stay_and_shards_of_other_options_are_not_mixed(tmp_path: Path, listed: Path, capsys) -> None:
    out = tmp_path / "shards"
    assert shard(listed, "--out", out, "--rows", "2") == 0
    (out / "list-00001.csv").unlink()
    before = (out / "list-00000.csv").stat().st_mtime_ns
    assert shard(listed, "--out", out, "--rows", "2") == 0
    assert (out / "list-00000.csv").stat().st_mtime_ns == before and (out / "list-00001.csv").exists()
    capsys.readouterr()
    assert shard(listed, "--out", out, "--rows", "3") == 2
    one_line(capsys, "holds shards of another source or size")
    assert shard(listed, "--out", out, "--rows", "3", "--force") == 0
    assert not (out / "list-00002.csv").exists()
