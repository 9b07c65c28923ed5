"""A manifest names the files of each sample; a row that cannot be used is named, whatever it says."""

import csv
import json
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.sources.test_pairs import STREAMS, add, found, reasons
from tests.support.media import write_marked
from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.media.probe import Probes
from transpixeler.data.sources import pairs
from transpixeler.data.sources.pairs import scan


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_manifests_name_the_files_of_each_stream(ending: str, clip: Path, tmp_path: Path) -> None:
    add(tmp_path / "videos", clip, "a.mp4", "mask of a.mp4", "b.mp4", caption=None)
    rows = [
        {"video": "videos/a.mp4", "seg": "videos/mask of a.mp4", "text": "größer, “a”\nb", "num_frames": 20, "fps": 16},
        {"video": "videos/a.mp4", "seg": "videos/a.mp4", "text": "the same video again", "num_frames": 20, "fps": 16},
        {"video": "videos/b.mp4", "seg": "videos/none.mp4", "text": "x", "num_frames": 20, "fps": 16},
        {"video": "videos/b.mp4", "seg": "videos/b.mp4", "text": "y", "num_frames": 21, "fps": 16},
        {"video": "videos/b.mp4", "seg": "videos/b.mp4", "text": "z", "num_frames": 20, "fps": 24},
        {"video": "videos/b.mp4", "seg": "", "text": "z", "num_frames": 20, "fps": 24},
    ]
    write_rows(tmp_path / f"list.{ending}", rows)
    result = found(tmp_path / f"list.{ending}")
    assert [sample.id for sample in result.samples] == ["list/videos/a", "list/videos/a~2"]
    assert result.samples[0].caption == "größer, “a”\nb"
    told = [bad.reason for bad in result.bad]
    assert "is missing" in told
    assert "the manifest says num_frames 21, the file has 20" in told
    assert "the manifest says fps 24, the file has 16" in told
    assert "no path in column 'seg'" in told


def test_a_folder_of_shards_is_one_source(clip: Path, tmp_path: Path) -> None:
    add(tmp_path / "videos", clip, "a.mp4", "b.mp4", "c.mp4", caption=None)
    (tmp_path / "shards" / "cache").mkdir(parents=True)
    names = {"0.jsonl": "ab", "1.csv": "c", "2.jsonl": "ax"}
    for shard, videos in names.items():
        paths = [f"../videos/{name}.mp4" for name in videos]
        write_rows(tmp_path / "shards" / shard, [{"rgb": path, "seg": path, "text": "t"} for path in paths])
    (tmp_path / "shards" / "README.md").write_text("of the set")
    result = found(tmp_path / "shards")
    assert [sample.id.rpartition("/")[2] for sample in result.samples] == ["a", "a~2", "b", "c"]
    (bad,) = result.bad
    assert bad.reason == "is missing" and bad.id == "shards/../videos/x"
    (tmp_path / "shards" / "2.jsonl").write_text("no row\n")
    (bad,) = found(tmp_path / "shards").bad
    assert bad.id == "shards/2.jsonl row 1" and bad.path.endswith("2.jsonl:1") and "not JSON" in bad.reason


@pytest.mark.parametrize("other", ["a.mp4", "a.txt", "more"])
def test_a_folder_that_holds_more_than_shards_is_a_folder_of_pairs(other: str, clip: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "list.jsonl", [{"rgb": str(clip), "seg": str(clip), "text": "t"}])
    assert len(found(tmp_path).samples) == 1
    (tmp_path / other).mkdir() if other == "more" else (tmp_path / other).touch()
    assert not found(tmp_path).samples


def test_repeats_of_a_video_take_no_other_samples_id(tmp_path: Path) -> None:
    names = ["clip", "clip", "clip~2", "clip", "clip~2", "clip~4", "clip"]
    for name in set(names):
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    rows = [{"rgb": f"{name}.png", "seg": f"{name}.png", "text": str(n)} for n, name in enumerate(names)]
    write_rows(tmp_path / "l.jsonl", rows)
    captions = {sample.id: sample.caption for sample in found(tmp_path / "l.jsonl").samples}
    ids = ["clip", "clip~2", "clip~2~2", "clip~3", "clip~2~3", "clip~4", "clip~5"]
    assert captions == {f"l/{name}": str(n) for n, name in enumerate(ids)}


def test_a_manifest_may_name_streams_by_their_own_names(clip: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "l.jsonl", [{"rgb": str(clip), "seg": str(clip), "text": "absolute paths"}])
    assert len(found(tmp_path / "l.jsonl").samples) == 1


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_columns_may_have_names_of_their_own(ending: str, clip: Path, tmp_path: Path) -> None:
    columns = {"rgb": "file", "seg": "mask", "text": "prompt", "num_frames": "length"}
    row = {"file": str(clip), "mask": str(clip), "prompt": "a caption", "length": 20, "video": "none.mp4"}
    write_rows(tmp_path / f"l.{ending}", [row, row | {"length": 21}, row | {"mask": ""}, row | {"length": "many"}])
    source = SourceConfig(str(tmp_path / f"l.{ending}"))
    result = scan([source], STREAMS, DataConfig(columns=columns), probe=Probes(tmp_path / "cache"))
    assert [sample.caption for sample in result.samples] == ["a caption"]
    assert {bad.reason for bad in result.bad} == {
        "the manifest says num_frames 21, the file has 20",
        "no path in column 'mask'",
        "column 'length' is 'many', not a number above 0",
    }


def test_a_csv_without_the_captions_column_says_what_can_name_it(clip: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "l.csv", [{"rgb": str(clip), "seg": str(clip), "prompt": "x"}])
    with pytest.raises(UserError, match=r"no column 'text' \(columns: rgb, seg, prompt\); data.columns can say"):
        found(tmp_path / "l.csv")


def test_a_row_whose_path_is_no_file_is_named(clip: Path, tmp_path: Path) -> None:
    names = [".", "", "/", "..", "a\0b.mp4", "x" * 5000, "a.mp4"]
    write_rows(tmp_path / "l.jsonl", [{"rgb": name, "seg": name, "text": "t"} for name in names])
    shutil.copy(clip, tmp_path / "a.mp4")
    result = scan([SourceConfig(str(tmp_path / "l.jsonl"))], STREAMS, DataConfig(), probe=Probes(tmp_path / "cache"))
    assert [sample.id for sample in result.samples] == ["l/a"] and len(result.bad) == len(names) - 1
    assert reasons(result)["l/row 1"] == "its rgb path names no file"


def test_a_caption_that_no_encoder_takes_is_named(clip: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "l.jsonl", [{"rgb": str(clip), "seg": str(clip), "text": "half \ud83d"}])
    assert list(reasons(found(tmp_path / "l.jsonl")).values()) == ["its caption is not UTF-8"]


CLAIMS = ['"1e300000000"', '"1e999"', "NaN", '"NaN"', "1e999", '"1/0"', '"-4"', f'"{"9" * 99}"']


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_is_no_count_is_named_at_once(claim: str, clip: Path, tmp_path: Path) -> None:
    """As a fraction, 1e300000000 would have 300 million digits."""
    add(tmp_path, clip, "a.mp4")
    (tmp_path / "l.jsonl").write_text(f'{{"rgb": "a.mp4", "text": "t", "num_frames": {claim}}}\n')
    (reason,) = reasons(found(tmp_path / "l.jsonl", streams={"rgb": ""})).values()
    assert "column 'num_frames' is" in reason and "not a number above 0" in reason


@pytest.mark.parametrize("name", ["x" * 300, "nul\0.mp4", "folder.mp4", "a.mp4/b.mp4", "\ud800.mp4"])
def test_a_path_that_is_no_file_is_named(name: str, clip: Path, tmp_path: Path) -> None:
    add(tmp_path, clip, "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for rgb, seg in ((name, "a.mp4"), ("a.mp4", name)):
        (tmp_path / "l.jsonl").write_text(json.dumps({"rgb": rgb, "seg": seg, "text": "t"}) + "\n")
        result = found(tmp_path / "l.jsonl")
        assert not result.samples and len(result.bad) == 1
    with pytest.raises(UserError):
        found(tmp_path / name / "list.csv")


def test_a_manifest_of_rgba_files(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32, 4), 99, np.uint8)).save(tmp_path / "a.png")
    write_rows(tmp_path / "l.csv", [{"rgb": "a.png", "text": "one file"}])
    (sample,) = found(SourceConfig(str(tmp_path / "l.csv"), rgba=True)).samples
    assert sample.rgba and [stream for stream, _ in sample.paths] == ["rgb", "seg"]


def test_a_manifest_is_read_row_by_row(tmp_path: Path) -> None:
    from transpixeler.data.sources.manifest import manifest_candidates

    with (tmp_path / "l.jsonl").open("w") as file:
        for i in range(3):
            file.write(json.dumps({"rgb": f"{i}.mp4", "seg": "s.mp4", "text": "t"}) + "\n")
        file.write("not json\n")
    rows = manifest_candidates(tmp_path / "l.jsonl", "l", STREAMS, rgba=False)
    assert next(rows).id == "l/0"
    assert [row.id for row in rows] == ["l/1", "l/2", "l/row 4"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "l.parquet").touch()
    with pytest.raises(UserError, match=r"need pyarrow; pip install 'transpixeler\[parquet\]'"):
        found(tmp_path / "l.parquet")


def test_a_csv_without_captions_is_refused_at_its_head(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("rgb,seg\na.mp4,b.mp4\n")
    with pytest.raises(UserError, match=r"no column 'text' \(columns: rgb, seg\)"):
        found(tmp_path / "l.csv")


PLAIN = {"rgb": "a/clip.mp4", "seg": "a/clip_seg.mp4", "text": " words "}
ROWS = [
    PLAIN,
    PLAIN | {"text": ""},
    PLAIN | {"text": None},
    PLAIN | {"text": "\ud800"},
    PLAIN | {"rgb": "./a//clip.mp4"},
    PLAIN | {"rgb": "a/lost.mp4"},
    PLAIN | {"rgb": "", "video": "a/clip.mp4"},
    PLAIN | {"seg": "a/short.mp4"},
    PLAIN | {"seg": 7},
    PLAIN | {"num_frames": 20, "fps": "16"},
    PLAIN | {"num_frames": 21},
    PLAIN | {"height": "tall"},
    {"video": "a/clip.mp4", "seg": "a/clip_seg.mp4", "text": "words"},
]


def test_rows_that_are_taken_as_they_are_give_what_the_longer_look_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of known files, and each fault that a plain row may have, with the probes' memory and without."""
    (tmp_path / "a").mkdir()
    for name, count in (("clip", 20), ("clip_seg", 20), ("short", 12)):
        path = tmp_path / "a" / f"{name}.mp4"
        write_marked(path, range(count), fps=Fraction(16))
        os.utime(path, (1e9, 1e9))  # so that it counts as settled
    manifest = tmp_path / "set.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    sources, streams = (SourceConfig(str(manifest)),), {"rgb": "", "seg": "_seg"}
    first = Probes(tmp_path / "cache")
    wanted = scan(sources, streams, DataConfig(), probe=first)
    first.save()
    again = Probes(tmp_path / "cache")
    looked, whole = list[object](), pairs.examined
    monkeypatch.setattr(pairs, "examined", lambda offer, **how: (looked.append(offer), whole(offer, **how))[1])
    found = scan(sources, streams, DataConfig(), probe=again)
    assert list(found.samples) == list(wanted.samples) and found.bad == wanted.bad
    assert again.opened == 0
    assert len(found.samples) == 4 and len(found.bad) == 9
    assert len(looked) == len(ROWS) - 3, "plain rows of known files take no longer look"
