"""RGBA files of the demo become pairs: the same frames, straight colour, nothing hidden, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from split_rgba import random_color, unpremultiplied

from tests.support.toolbox import FPS, PAIR, SCENES, all_frames, multiplied, scanned, stack, tool
from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import probe
from transpixeler.data.media.fill import Fill, looks_premultiplied
from transpixeler.data.media.write import write_png_sequence, write_prores4444, write_webm_alpha
from transpixeler.data.sources.pairs import decode_pair, scan
from transpixeler.demo.scenes import FILL, Attributes, Format, Scene, scenes
from transpixeler.demo.write import write_rgba

split_rgba = tool("split_rgba")
SMALL = Format(64, 64, 5, FPS)


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


@pytest.mark.parametrize(("write", "near"), [(write_prores4444, 3), (write_webm_alpha, 8)])  # 4:2:0 blurs colour
def test_premultiplied_colour_is_found_and_undone(tmp_path: Path, write: Callable[..., None], near: int) -> None:
    rgba = stack(Scene(Attributes("square", "cyan", "left", "half transparent"), SMALL, 14, (40, 32), 16, 1))
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
    assert np.abs(left - wanted).mean() > 5 * np.abs(undone - wanted).mean()


@pytest.mark.parametrize("seed", range(6))
def test_any_colour_tells_premultiplied_from_straight(seed: int) -> None:
    for scene in scenes(8, formats=[Format(64, 64, 17, FPS)], held_out=False, seed=seed):
        if scene.attributes.shape == "square":
            continue  # whose edges lie along the pixels: all that is soft is alike, and tells nothing
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
    scene = scenes(1, formats=[SMALL], held_out=False, seed=4)[0]
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
    hidden, color = rgba[..., 3] == 0, (180, 90, 40)
    rgba[..., :3] = color
    rgba[hidden, :3] = (200, 0, 200)  # what must not be learned
    write_png_sequence(tmp_path / "clip", rgba)
    means = {}
    for fill in ("extend", "black", "color", "random", "keep"):
        out = tmp_path / fill
        assert split_rgba(tmp_path / "clip", "--out", out, "--fill", fill, "--color", "9,99,199", "--lossless") == 0
        means[fill] = all_frames(out / "clip.mp4")[hidden].mean(0)
    expected = {"extend": color, "black": FILL, "color": (9, 99, 199), "random": random_color("clip"),
                "keep": (200, 0, 200)}  # fmt: skip
    for fill, wanted in expected.items():
        assert np.abs(means[fill] - wanted).max() < 4, fill


def test_scaling_lets_no_hidden_colour_into_the_edge(tmp_path: Path) -> None:
    rgba = stack(scenes(1, formats=[Format(96, 96, 3, FPS)], held_out=False, seed=5)[0])
    color = np.array((180, 90, 40), np.uint8)
    rgba[..., :3] = np.where(rgba[..., 3:] > 0, color, 255 - color)
    write_png_sequence(tmp_path / "clip", rgba)
    assert split_rgba(tmp_path / "clip", "--out", tmp_path / "o", "--short-side", "32", "--lossless") == 0
    rgb = all_frames(tmp_path / "o/clip.mp4")
    assert rgb.shape[1:3] == (32, 32)
    assert np.abs(rgb.astype(int) - color).max() <= 6


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


def test_exr_is_split_as_the_picture_that_it_is_the_light_of(tmp_path: Path) -> None:
    from transpixeler.data.media.exr import write_exr_sequence
    from transpixeler.data.media.light import decoded

    rgba = stack(SCENES[0])
    light, alpha = decoded(rgba[..., :3] / 255, "srgb"), rgba[..., 3:] / np.float32(255)
    for mode, color in (("straight", light), ("premultiplied", light * alpha)):
        write_exr_sequence(tmp_path / "in" / mode, np.concatenate([color, alpha], 3), fps=Fraction(24), alpha_mode=mode)
    assert split_rgba(tmp_path / "in", "--out", tmp_path / "out", "--lossless", "--fill", "black") == 0
    for mode in ("straight", "premultiplied"):
        rgb, seg = (all_frames(tmp_path / "out" / f"{mode}{suffix}.mp4").astype(int) for suffix in ("", "_seg"))
        seen = rgba[..., 3] > 60
        assert np.abs(seg[..., 0] - rgba[..., 3]).max() <= 3
        assert np.abs(rgb - rgba[..., :3])[seen].max() <= 6


def test_numbered_images_in_a_folder_are_a_clip_unless_they_are_said_to_be_stills(tmp_path: Path, capsys) -> None:
    from PIL import Image

    folder = tmp_path / "in"
    folder.mkdir()
    for number, frame in enumerate(stack(SCENES[0])):
        Image.fromarray(frame).save(folder / f"fire.{1001 + number}.png")
    (folder / "fire.TXT").write_text("fire")
    (folder / "fire.psd").write_bytes(b"x")
    assert split_rgba(folder, "--out", tmp_path / "a", "--fps", "24") == 0
    (sample,) = scanned(tmp_path / "a").samples
    assert (sample.media.frames, sample.media.fps, sample.caption) == (len(stack(SCENES[0])), 24, "fire")
    assert "note: 1 × file of a kind that is not read: *.psd" in capsys.readouterr().out
    assert split_rgba(folder / "fire.####.png", "--out", tmp_path / "b") == 0
    assert scanned(tmp_path / "b").samples[0].caption == "fire"
    assert split_rgba(folder, "--out", tmp_path / "c", "--stills") == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir())[:2] == ["fire.1001.png", "fire.1001_seg.png"]
