"""The demo's files, opened by the programs that will open them: diffusers, transformers, PyAV and our own config."""

import filecmp
import itertools
import math
import shutil
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.data.media.decode import probe
from transpixeler.demo.model import write_model
from transpixeler.demo.scenes import (
    COLORS,
    DIRECTIONS,
    FILL,
    OPACITIES,
    SHAPES,
    Attributes,
    Format,
    Scene,
    all_attributes,
    center,
    render,
    scenes,
)
from transpixeler.demo.write import FORMATS, write_demo

TRAIN, EVAL = 16, 8


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, train_clips=TRAIN, eval_clips=EVAL)
    return folder


@pytest.fixture(scope="module")
def pipeline(demo: Path):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(demo / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(part: str) -> tuple[Scene, ...]:
    count = {"train": TRAIN, "eval": EVAL}[part]
    return scenes(count, formats=FORMATS, held_out=part == "eval", seed=0)


def media(folder: Path, stem: str, scene: Scene) -> Path:
    return folder / f"{stem}{'.png' if scene.format.frames == 1 else '.mp4'}"


def read(path: Path, layout: str = "rgb24") -> tuple[np.ndarray, Fraction]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        decoder = "libvpx-vp9" if path.suffix == ".webm" else stream.codec_context.name
        context = av.CodecContext.create(decoder, "r")
        context.extradata = stream.codec_context.extradata
        packets = [packet for packet in container.demux(stream) if packet.size]
        frames = [frame for packet in (*packets, None) for frame in context.decode(packet)]
        return np.stack([frame.to_ndarray(format=layout) for frame in frames]), stream.average_rate


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def same(a: Path, b: Path) -> bool:
    return files(a) == files(b) and not filecmp.cmpfiles(a, b, files(a), shallow=False)[1]


# --- the model -------------------------------------------------------------------------------------------------------


def test_diffusers_loads_and_samples_the_pipeline(pipeline) -> None:
    assert [type(part).__name__ for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder)] == [
        "WanTransformer3DModel",
        "AutoencoderKLWan",
        "UMT5EncoderModel",
    ]
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(
        "a red circle drifts left, opaque",
        negative_prompt="色调艳丽",
        height=48,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        max_sequence_length=512,
        generator=generator,
        output_type="np",
    ).frames
    assert frames.shape == (1, 9, 48, 64, 3)
    assert np.isfinite(frames).all() and frames.std() > 0.01


def test_the_model_listens_to_its_caption_and_its_time(pipeline) -> None:
    latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    texts = [pipeline.encode_prompt(a.caption, do_classifier_free_guidance=False)[0] for a in all_attributes()[:2]]
    with torch.no_grad():
        one, other, later = (
            pipeline.transformer(latents, torch.tensor([time]), text).sample
            for time, text in ((500.0, texts[0]), (500.0, texts[1]), (900.0, texts[0]))
        )
    assert (one - other).abs().max() > 1e-3
    assert (one - later).abs().max() > 1e-3


def test_latents_of_new_clips_have_about_unit_scale(pipeline) -> None:
    clips = [np.stack(list(render(scene))) for scene in scenes(4, formats=[FORMATS[0]], held_out=True, seed=9)]
    videos = torch.from_numpy(np.stack(clips)[..., :3]).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(videos).latent_dist.mean
    mean, deviation = (torch.tensor(pipeline.vae.config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    scaled = (latents - mean) / deviation
    assert latents.shape == (4, 16, 5, 8, 8)
    assert abs(scaled.mean()) < 0.3 and 0.5 < scaled.std() < 2


def test_each_word_of_a_caption_is_one_token_and_other_words_are_spelt(demo: Path) -> None:
    from transformers import AutoTokenizer, T5TokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(demo / "model/tokenizer")
    fast = T5TokenizerFast.from_pretrained(demo / "model/tokenizer")
    captions = [attributes.caption for attributes in all_attributes()]
    found = tokenizer(captions).input_ids
    assert found == fast(captions).input_ids
    assert len({tuple(ids) for ids in found}) == len(captions)
    assert tokenizer.tokenize("a red ring drifts up, opaque") == [
        "▁a",
        "▁red",
        "▁ring",
        "▁drifts",
        "▁up",
        ",",
        "▁opaque",
    ]
    assert tokenizer.unk_token_id not in tokenizer("Three Zebras (really!) jump over 7 lazy dogs.").input_ids
    assert all(ids[-1] == tokenizer.eos_token_id == 1 for ids in found)


def test_the_caller_s_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    write_model(tmp_path / "model", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# --- the clips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "eval"])
def test_every_clip_reads_back_as_it_was_drawn(demo: Path, part: str) -> None:
    folder = demo / "data" / part
    for number, scene in enumerate(drawn(part), 1):
        truth = np.stack(list(render(scene)))
        rgb, rate = read(media(folder, f"{number:03d}", scene))
        matte, matte_rate = read(media(folder, f"{number:03d}_seg", scene))
        assert rgb.shape == matte.shape == (*truth.shape[:3], 3)
        assert np.abs(matte.astype(int) - truth[..., 3:]).max() <= 2
        assert np.abs(rgb.astype(int) - truth[..., :3]).mean() < 2
        if scene.format.frames > 1:
            assert rate == matte_rate == scene.format.fps
        assert (folder / f"{number:03d}.txt").read_text() == scene.attributes.caption + "\n"


def test_rgba_forms_hold_the_same_clips_with_their_alpha(demo: Path) -> None:
    folder = demo / "data/rgba"
    clips = [scene for scene in drawn("train") if scene.format.frames > 1][:3]
    assert len(list(folder.glob("*.mov"))) == 3
    for number, scene in enumerate(clips, 1):
        truth = np.stack(list(render(scene)))
        for ending in (".mov", ".webm"):
            assert probe(folder / f"{number:03d}{ending}").alpha
            found, rate = read(folder / f"{number:03d}{ending}", "rgba")
            assert found.shape == truth.shape and rate == scene.format.fps
            assert np.abs(found[..., 3].astype(int) - truth[..., 3]).max() <= 2
        stills = [read(path, "rgba")[0][0] for path in sorted((folder / f"{number:03d}").iterdir())]
        assert (np.stack(stills) == truth).all()


def test_sizes_shapes_and_rates_differ_so_that_buckets_mean_something(demo: Path) -> None:
    formats = {scene.format for scene in drawn("train")}
    assert len({(format.width, format.height) for format in formats}) >= 5
    assert len({format.fps for format in formats}) >= 4
    assert len({format.frames for format in formats}) >= 5
    assert len(list((demo / "data/train").glob("*_seg.png"))) == 2


def test_no_eval_combination_is_trained_on_but_all_its_values_are(demo: Path) -> None:
    trained, kept = ({path.read_text() for path in (demo / "data" / p).glob("*.txt")} for p in ("train", "eval"))
    assert len(trained) == TRAIN and len(kept) == EVAL and not trained & kept
    train_set = [astuple(a) for a in all_attributes() if not a.held_out]
    eval_set = [astuple(a) for a in all_attributes() if a.held_out]
    assert len(train_set) == 234 and len(eval_set) == 46
    for places in itertools.combinations(range(4), 2):
        seen = {tuple(values[p] for p in places) for values in train_set}
        assert {tuple(values[p] for p in places) for values in eval_set} <= seen


def test_depth_is_a_third_stream_that_loads_and_rises_inside_the_shape(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", train_clips=2, eval_clips=1, depth=True)
    config = loading.load(tmp_path / "demo/config.yaml")
    assert config.streams == {"rgb": "", "seg": "_seg", "depth": "_depth"}
    scene = scenes(2, formats=FORMATS, held_out=False, seed=0)[0]
    depth, _ = read(media(tmp_path / "demo/data/train", "001_depth", scene))
    matte, _ = read(media(tmp_path / "demo/data/train", "001_seg", scene))
    assert depth.shape == matte.shape
    solid = matte.max(-1) > 0.9 * matte.max()
    assert depth[matte.max(-1) < 3].max() < 9 and depth[solid].max() > 2 * depth[solid].min() > 0


# --- the renderer ----------------------------------------------------------------------------------------------------

AREAS = {
    "circle": math.pi,
    "square": 1.6**2,
    "triangle": 2.0,
    "ring": math.pi * (1 - 0.4**2),
    "star": 10 * 0.5 * 1.05 * 0.65 * math.sin(math.pi / 5),
}
BELOW = {"triangle": 1 / 3, "star": 0.05}  # the middle of its height, which is where it stands: its centre of mass


@pytest.mark.parametrize("values", itertools.product(SHAPES, DIRECTIONS, OPACITIES))
def test_a_scene_is_what_its_caption_says(values: tuple[str, str, str]) -> None:
    shape, direction, opacity = values
    form = Format(90, 70, 12, Fraction(24))
    scene = Scene(Attributes(shape, "cyan", direction, opacity), form, 16.0, (44.3, 34.6), 30.0, 1.0)
    clip = np.stack(list(render(scene)))
    alpha, color = clip[..., 3], clip[..., :3]
    assert alpha.max() == round(255 * OPACITIES[opacity])
    cyan, brightness = np.array(COLORS["cyan"]), color.max(-1) / max(COLORS["cyan"])
    assert (color[alpha == 0] == FILL).all() and (color[alpha > 0].max(-1) > 0).all()
    assert np.abs(color - np.rint(brightness[..., None] * cyan)).max() <= 1, "one hue, whatever the light"
    assert ((brightness >= 0.5) == (alpha >= 0.5 * alpha.max())).mean() > 0.995, "RGB over black shows the same shape"
    area = alpha.sum((1, 2)) / alpha.max() / scene.radius**2
    assert area == pytest.approx(np.full(12, AREAS[shape]), rel=0.02)
    assert ((alpha > 0) & (alpha < alpha.max())).any((1, 2)).all(), "edges are anti-aliased"
    y, x = np.mgrid[0:70, 0:90] + 0.5
    for number in (0, 11):
        weight = alpha[number] / alpha[number].sum()
        assert (x * weight).sum() == pytest.approx(center(scene, number)[0], abs=0.1)
        below = BELOW.get(shape, 0) * scene.radius
        assert (y * weight).sum() == pytest.approx(center(scene, number)[1] + below, abs=0.1)
    moved = np.subtract(center(scene, 11), center(scene, 0))
    assert moved == pytest.approx(np.array(DIRECTIONS[direction]) * 30 * 11 / 24)


def test_no_shape_leaves_its_frame() -> None:
    for scene in scenes(48, formats=FORMATS, held_out=False, seed=4):
        for number in (0, scene.format.frames - 1):
            x, y = center(scene, number)
            assert scene.radius - 1e-6 <= x <= scene.format.width - scene.radius + 1e-6
            assert scene.radius - 1e-6 <= y <= scene.format.height - scene.radius + 1e-6


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", train_clips=TRAIN, eval_clips=EVAL)
    assert same(demo, tmp_path / "again")
    write_demo(tmp_path / "other", train_clips=TRAIN, eval_clips=EVAL, seed=1)
    clip = "data/train/001.mp4"
    assert (tmp_path / "other" / clip).read_bytes() != (demo / clip).read_bytes()


def test_nothing_unfinished_and_no_path_of_this_machine_stays_behind(demo: Path) -> None:
    assert not [name for name in files(demo) if name.endswith(".tmp") or "/." in name]
    for path in demo.rglob("*"):
        if path.suffix in (".json", ".yaml", ".txt"):
            assert str(demo.parent) not in path.read_text()


def test_its_config_reads_and_finds_its_files(demo: Path) -> None:
    config = loading.load(demo / "config.yaml")
    for path in (config.model.path, config.data.train[0].path, config.data.eval[0].path):
        assert Path(path).is_dir() and Path(path).is_relative_to(demo)
    assert Path(config.output_dir).parent == demo
    assert tuple(config.streams) == ("rgb", "seg")


def test_a_demo_that_stands_is_left_alone(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {name: (demo / name).stat().st_mtime_ns for name in files(demo)}
    with caplog.at_level("INFO", logger="transpixeler"):
        write_demo(demo, train_clips=TRAIN, eval_clips=EVAL)
    assert {name: (demo / name).stat().st_mtime_ns for name in files(demo)} == before
    assert "already there" in caplog.text


def test_files_of_others_are_never_written_over_without_force(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: true\n")
    (tmp_path / "thesis.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"not empty; choose another folder, or .* --force"):
        write_demo(tmp_path, train_clips=1, eval_clips=1)
    assert (tmp_path / "config.yaml").read_text() == "mine: true\n"
    write_demo(tmp_path, train_clips=1, eval_clips=1, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine\n"
    assert "max_steps" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="another demo or an older one"):
        write_demo(tmp_path, seed=1, train_clips=1, eval_clips=1)


def test_a_demo_with_other_weights_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo(tmp_path / "demo", train_clips=1, eval_clips=1)
    monkeypatch.setattr("transpixeler.demo.write.weights_digest", lambda: "others")
    with pytest.raises(UserError, match=r"older one; .*`transpixeler demo .*demo --force`"):
        write_demo(tmp_path / "demo", train_clips=1, eval_clips=1)


def test_a_demo_that_has_lost_a_part_is_written_again(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", train_clips=1, eval_clips=1)
    shutil.rmtree(tmp_path / "demo/data/train")
    write_demo(tmp_path / "demo", train_clips=1, eval_clips=1)
    assert (tmp_path / "demo/data/train/001.mp4").is_file()


def test_no_colour_but_white_is_by_itself_something_like_an_alpha() -> None:
    assert max(np.mean(color) for name, color in COLORS.items() if name != "white") < 0.48 * 255


def test_a_file_in_the_folder_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match="demo: is a file"):
        write_demo(tmp_path / "demo")


def test_a_demo_that_was_cut_short_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("transpixeler.demo.write.write_rgba", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_demo(tmp_path / "demo", train_clips=2, eval_clips=1)
    write_demo(tmp_path / "demo", train_clips=2, eval_clips=1)
    write_demo(tmp_path / "whole", train_clips=2, eval_clips=1)
    assert same(tmp_path / "demo", tmp_path / "whole")
