"""The import tools, run as a user runs them on what the demo writes; what is wrong is one line and exit code 2."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from transpixeler import tooling
from transpixeler.config import DataConfig, SourceConfig
from transpixeler.data.fill import Fill, looks_premultiplied, random_color, unpremultiplied
from transpixeler.data.media import Clip
from transpixeler.data.pairs import Scan, decode_pair, scan
from transpixeler.data.synthetic import FILL, Format, Scene, render, scenes
from transpixeler.data.video import probe, read_frames
from transpixeler.data.write import write_mp4, write_png_sequence, write_prores4444, write_webm_alpha
from transpixeler.demo import write_pairs, write_rgba

TOOLS = Path(__file__).parents[1] / "tools"
FPS = Fraction(16)
PAIR, SINGLE = {"rgb": "", "seg": "_seg"}, {"rgb": ""}
SCENES = scenes(3, formats=[Format(48, 32, 5, FPS), Format(32, 48, 9, Fraction(24))], held_out=False, seed=2)


@functools.cache
def tool(name: str) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda *argv: tooling.run(name, module.main, [str(word) for word in argv])


split_rgba, videomatte, celebv = tool("split_rgba"), tool("import_videomatte"), tool("import_celebv_text")
metadata, shard = tool("metadata"), tool("shard")


def scanned(source: Path, streams: dict[str, str] = PAIR) -> Scan:
    return scan([SourceConfig(str(source))], streams, DataConfig())


def all_frames(path: Path) -> np.ndarray:
    media = probe(path)
    return read_frames(path, range(media.frames), height=media.height, width=media.width)


def stack(scene: Scene) -> np.ndarray:
    return np.stack(list(render(scene)))


def multiplied(rgba: np.ndarray) -> np.ndarray:
    return np.concatenate([np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)), rgba[..., 3:]], axis=-1).astype(np.uint8)


def one_line(capsys: pytest.CaptureFixture[str], said: str) -> None:
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["split_rgba", "import_videomatte", "import_celebv_text", "metadata", "shard"])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys, name: str) -> None:
    gone = tmp_path / "gone"
    out = tmp_path / "out.jsonl"
    assert tool(name)(gone, "--out", out, *(["--rows", 5] if name == "shard" else [])) == 2
    one_line(capsys, f"{name}: {gone}")
    assert not out.exists()


def test_a_tool_stands_by_itself() -> None:
    said = subprocess.run([sys.executable, TOOLS / "shard.py", "--help"], capture_output=True, text=True, check=True)
    assert "larger than memory" in said.stdout


# --- split_rgba ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rgba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rgba")
    write_rgba(folder, SCENES[:2])
    return folder


@pytest.mark.parametrize("ending", [".mov", ".webm"])
def test_files_of_the_demo_become_pairs_that_hold_the_same_frames(tmp_path: Path, rgba: Path, ending: str) -> None:
    assert split_rgba(rgba, "--out", tmp_path / "pairs", "--ending", ending, "--fill", "black") == 0
    found = scanned(tmp_path / "pairs")
    assert not found.bad and len(found.samples) == 2
    for scene, sample in zip(SCENES, found.samples):
        wanted = stack(scene)
        rgb, seg = (all_frames(path).astype(int) for _, path in sample.paths)
        assert np.abs(seg[..., 0] - wanted[..., 3]).max() <= 4
        opaque = wanted[..., 3] == wanted[..., 3].max()
        assert np.abs(rgb - wanted[..., :3])[opaque].mean() < 8  # 4:2:0 at the edges of small shapes
        assert sample.caption == scene.attributes.caption and sample.media.fps == scene.format.fps


def test_a_sequence_is_a_clip_and_names_that_are_shared_are_told(tmp_path: Path, rgba: Path, capsys) -> None:
    assert split_rgba(rgba / "001", "--out", tmp_path / "a", "--fps", "24") == 0
    assert scanned(tmp_path / "a").samples[0].media.fps == 24
    assert split_rgba(rgba, "--out", tmp_path / "b") == 0
    told = capsys.readouterr().out
    assert "2 pairs written" in told and "4 left out" in told and "001.mov has this name" in told


@pytest.mark.parametrize("kind", ["webp", "gif", "apng"])
def test_animations_are_clips(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    frames = stack(SCENES[0])
    frames[..., 3] = np.where(frames[..., 3] > 60, 255, 0)  # all that a GIF can hold
    pictures = [Image.fromarray(frame) for frame in frames]
    path = tmp_path / f"a.{'png' if kind == 'apng' else kind}"
    options = {"lossless": True} if kind == "webp" else {"disposal": 2}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0, **options)
    assert split_rgba(path, "--out", tmp_path / "out", "--fill", "keep") == 0
    assert probe(tmp_path / "out/a.mp4").fps == 10
    found = all_frames(tmp_path / "out/a_seg.mp4")[..., 0].astype(int)
    assert np.abs(found - frames[..., 3]).max() <= 4


@pytest.mark.parametrize(("write", "near"), [(write_prores4444, 6), (write_webm_alpha, 16)])  # 4:2:0 blurs colour
def test_premultiplied_colour_is_found_and_undone(tmp_path: Path, write: Callable[..., None], near: int) -> None:
    rgba = stack(SCENES[1])
    write(tmp_path / "in/straight.mov", rgba, fps=FPS)
    write(tmp_path / "in/times.mov", multiplied(rgba), fps=FPS)
    options = ("--fill", "black", "--lossless")
    assert split_rgba(tmp_path / "in", "--out", tmp_path / "auto", *options) == 0
    soft = (rgba[..., 3] > 100) & (rgba[..., 3] < 255)
    straight, undone = (all_frames(tmp_path / f"auto/{name}.mp4")[soft] for name in ("straight", "times"))
    wanted = rgba[..., :3][soft].astype(int)
    assert soft.any() and np.abs(straight - wanted).mean() < near and np.abs(undone - wanted).mean() < near
    assert split_rgba(tmp_path / "in", "--out", tmp_path / "held", "--alpha", "straight", *options) == 0
    left = all_frames(tmp_path / "held/times.mp4")[soft]
    assert np.abs(left - wanted).mean() > 2 * np.abs(undone - wanted).mean()


@pytest.mark.parametrize("seed", range(6))
def test_any_colour_tells_premultiplied_from_straight(seed: int) -> None:
    for scene in scenes(8, formats=[Format(64, 64, 2, FPS)], held_out=False, seed=seed):
        rgba = stack(scene)
        assert looks_premultiplied(multiplied(rgba)) and not looks_premultiplied(rgba)


@pytest.mark.parametrize("level", [0, 5, 12])
def test_black_smoke_is_not_taken_for_premultiplied(level: int) -> None:
    noise = np.random.default_rng(0).integers(-3, 4, (4, 64, 64, 1))
    smoke = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 4, (4, 64, 64))
    dark = np.clip(level + noise, 0, 255).astype(np.uint8).repeat(3, axis=3)
    assert not looks_premultiplied(np.concatenate([dark, smoke[..., None]], axis=3))


@pytest.mark.parametrize("fill", ["keep", "black"])
def test_sources_of_rgba_files_undo_it_too(tmp_path: Path, fill: str) -> None:
    scene = scenes(1, formats=[Format(64, 64, 5, FPS)], held_out=False, seed=4)[0]
    rgba = stack(scene)
    write_prores4444(tmp_path / "a/a.mov", multiplied(rgba), fps=FPS)
    (tmp_path / "a/a.txt").write_text("a")
    found = {}
    for alpha in ("auto", "premultiplied", "straight"):
        data = DataConfig(fill=fill, alpha=alpha)
        (sample,) = scan([SourceConfig(str(tmp_path / "a"), rgba=True)], PAIR, data).samples
        clip = Clip(sample.id, Fraction(0), 5, FPS, 64, 64)
        found[alpha] = decode_pair(sample, clip, fill=Fill.of(data))["rgb"]
    soft = (rgba[..., 3] > 100) & (rgba[..., 3] < 255)
    off = {alpha: np.abs(rgb[soft] - rgba[..., :3][soft].astype(int)).mean() for alpha, rgb in found.items()}
    assert off["auto"] == off["premultiplied"] < 6 and off["straight"] > 10
    assert len({str(Fill.of(DataConfig(alpha=alpha)).parts) for alpha in found}) == 3  # other keys in the cache


def test_unpremultiplied_is_the_inverse_as_far_as_bits_reach() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    rgba[..., 3] = np.maximum(rgba[..., 3], 64)
    assert np.abs(unpremultiplied(multiplied(rgba)).astype(int) - rgba).max() <= 2


def test_hidden_colour_is_filled_as_declared(tmp_path: Path) -> None:
    rgba = stack(SCENES[0])
    hidden = rgba[..., 3] == 0
    rgba[hidden, :3] = (200, 0, 200)  # what must not be learned
    write_png_sequence(tmp_path / "clip", rgba)
    means = {}
    for fill in ("extend", "black", "color", "random", "keep"):
        out = tmp_path / fill
        assert split_rgba(tmp_path / "clip", "--out", out, "--fill", fill, "--color", "9,99,199", "--lossless") == 0
        means[fill] = all_frames(out / "clip.mp4")[hidden].mean(0)
    color = rgba[rgba[..., 3] > 0][0, :3]
    expected = {"extend": color, "black": FILL, "color": (9, 99, 199), "random": random_color("clip"),
                "keep": (200, 0, 200)}  # fmt: skip
    for fill, wanted in expected.items():
        assert np.abs(means[fill] - wanted).max() < 4, fill


def test_scaling_lets_no_hidden_colour_into_the_edge(tmp_path: Path) -> None:
    rgba = stack(scenes(1, formats=[Format(96, 96, 3, FPS)], held_out=False, seed=5)[0])
    rgba[rgba[..., 3] == 0, :3] = 255 - rgba[rgba[..., 3] > 0][0, :3]
    write_png_sequence(tmp_path / "clip", rgba)
    assert split_rgba(tmp_path / "clip", "--out", tmp_path / "o", "--short-side", "32", "--lossless") == 0
    rgb = all_frames(tmp_path / "o/clip.mp4")
    assert rgb.shape[1:3] == (32, 32)
    assert np.abs(rgb.astype(int) - rgba[rgba[..., 3] > 0][0, :3]).max() <= 6


@pytest.mark.parametrize(
    ("alpha", "reason"), [(0, "blank"), (255, "opaque"), ("still", "stands still"), (None, "no alpha channel")]
)
def test_alpha_that_teaches_nothing_is_left_out_with_its_reason(tmp_path: Path, capsys, alpha, reason: str) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 4), dtype=np.uint8)
    rgba[..., 3] = np.eye(32) * 255 if alpha == "still" else alpha or 0
    write_png_sequence(tmp_path / "in/bad", rgba if alpha is not None else rgba[..., :3])
    write_png_sequence(tmp_path / "in/good", stack(SCENES[0]))
    assert split_rgba(tmp_path / "in", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "1 pairs written" in told and "1 left out" in told and reason in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.mp4", "good_seg.mp4"}


def test_pairs_that_are_there_are_not_made_again(tmp_path: Path, rgba: Path, capsys) -> None:
    out = tmp_path / "out"
    assert split_rgba(rgba, "--out", out, "--ending", ".mov") == 0
    (out / "001.mp4").unlink()  # as when it was stopped after the matte
    before = (out / "002.mp4").stat().st_mtime_ns
    assert split_rgba(rgba, "--out", out, "--ending", ".mov") == 0
    assert "1 pairs written, 1 were there" in capsys.readouterr().out
    assert (out / "002.mp4").stat().st_mtime_ns == before and not scanned(out).bad


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
    assert "was begun with" in capsys.readouterr().err


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
        assert row["aspect_ratio"] == pytest.approx(32 / 48, abs=1e-6) and row["extra"] == "2"


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
    assert metadata(tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl") == 2
    one_line(capsys, "no row can be used")


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
