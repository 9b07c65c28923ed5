"""What is encoded stays encoded: the cache follows the data and the weights, and nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.encoding import Counted, config, picture, run, write_pair, write_pairs
from tests.support.media import packet_at
from tests.support.ranks import run_ranks
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data import encode
from transpixeler.data.cache.records import Cache
from transpixeler.data.dataset import Dataset, Datasets
from transpixeler.data.encode import encode_missing
from transpixeler.data.keys import latent_keys
from transpixeler.data.media.clip import Clip, Media
from transpixeler.data.media.exr import write_exr_sequence
from transpixeler.data.media.fill import KEEP
from transpixeler.data.media.write import write_mp4, write_png
from transpixeler.data.sources.samples import Sample
from transpixeler.families.wan import encoders
from transpixeler.families.wan.encoders import WanVae
from transpixeler.families.wan.family import FAMILY
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime


def test_a_data_set_becomes_latents_texts_and_the_empty_caption(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d")
    data = run(config(model, tmp_path / "d")).train
    assert data.buckets() == {(1, 32, 32): 4, (5, 32, 32): 2}
    vae = encoders.load_vae(model, device=torch.device("cpu"), dtype=torch.float32)
    text = encoders.load_text_encoder(model, device=torch.device("cpu"), dtype=torch.float32)
    for item, number in zip(data.items, range(6)):
        for key, offset in zip(item.latent_keys, (0, 1000)):
            latent = data.cache.get(key)
            assert latent.dtype == torch.bfloat16 and latent.shape == (16, 1 if number % 3 < 2 else 2, 4, 4)
            if number % 3 < 2:  # a PNG of the bucket's own size comes through untouched
                pixels = torch.from_numpy(picture(number + offset))[None, None]
                assert torch.equal(latent, vae.encode(pixels)[0].bfloat16())
        assert torch.equal(
            data.cache.get(item.text_keys[0]), text.encode([f"picture number {number}"])[0]["text"].bfloat16()
        )
    assert data.cache.get(data.empty_text_keys[0]).shape == (1, 64)
    assert len(data.cache) == 6 * 2 + 6 + 1
    assert sorted({path.parent for path in tmp_path.rglob("*.seg")}) == [tmp_path / "d/cache"]


def test_a_changed_caption_re_encodes_one_text(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    run(config(model, tmp_path / "d"))
    assert (counted.videos, len(counted.texts), counted.loads) == (12, 7, ["vae", "text"])
    counted.reset()
    (tmp_path / "d/001.txt").write_text("another")
    run(config(model, tmp_path / "d"))
    assert (counted.videos, counted.texts, counted.loads) == (0, ["another"], ["text"])


def test_a_new_pair_adds_its_own_records(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    before = len(run(config(model, tmp_path / "d")).train.cache)
    counted.reset()
    write_pair(tmp_path / "d", "0005", 77)
    after = run(config(model, tmp_path / "d")).train
    assert (counted.videos, counted.texts) == (2, ["picture number 77"])
    assert len(after.cache) == before + 3 and len(after.items) == 7


def test_touched_moved_and_renamed_files_re_encode_nothing(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    run(config(model, tmp_path / "d"))
    counted.reset()
    os.utime(tmp_path / "d/002.mp4")
    for name in ("001.png", "001_seg.png", "001.txt"):
        (tmp_path / "d" / name).rename(tmp_path / "d" / f"renamed{name[3:]}")
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    assert len(run(config(model, tmp_path / "elsewhere")).train.items) == 6
    assert counted.loads == []


def test_a_changed_stream_re_encodes_that_stream(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    run(config(model, tmp_path / "d"))
    counted.reset()
    write_png(tmp_path / "d/000_seg.png", picture(5000))
    run(config(model, tmp_path / "d"))
    assert (counted.videos, counted.texts) == (1, [])


def test_what_the_encoder_reads_of_a_caption_is_its_key(
    model: Path, tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blanks that it never sees encode nothing anew; a library that mends quotes and was installed later does."""
    write_pairs(tmp_path / "d", 1)
    (tmp_path / "d/000.txt").write_text("a “red” ball")
    monkeypatch.setattr(encoders, "_mender", lambda: str)
    run(config(model, tmp_path / "d"))
    counted.reset()
    (tmp_path / "d/000.txt").write_text("  a “red”\n ball ")
    run(config(model, tmp_path / "d"))
    assert counted.loads == []
    monkeypatch.setattr(encoders, "_mender", lambda: lambda text: text.replace("“", '"').replace("”", '"'))
    run(config(model, tmp_path / "d"))
    assert counted.texts == ["a “red”\n ball"] and counted.videos == 0


def test_two_sets_and_two_runs_share_what_they_share(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    write_pairs(tmp_path / "e", 2)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    both = run(config(model, tmp_path / "d", cache, f"data.eval={tmp_path / 'e'}"))
    assert len(both.train.items) == 6 and len(both.eval.items) == 2
    # six captions, the empty one, and the negative prompt that evaluations will sample with
    assert (counted.videos, len(counted.texts)) == (12, 8)
    assert both.eval.prompts.keys() == {FAMILY.sampling.negative_prompt}
    counted.reset()
    run(config(model, tmp_path / "e", cache, "data.fps=24"))  # images have no rate
    assert counted.loads == []


def test_one_file_with_alpha_gives_both_streams_and_its_fill_policy_counts(
    model: Path, tmp_path: Path, counted: Counted
) -> None:
    (tmp_path / "d").mkdir()
    write_png(tmp_path / "d/a.png", np.concatenate([picture(0), picture(1)[..., :1] // 64 * 85], 2))
    (tmp_path / "d/a.txt").write_text("see through")
    rgba = f"data.train=[{{path: {tmp_path / 'd'}, rgba: true}}]"
    (item,) = run(config(model, tmp_path / "d", rgba)).train.items
    assert len(set(item.latent_keys)) == 2 and counted.videos == 2
    (filled,) = run(config(model, tmp_path / "d", rgba, "data.fill=black")).train.items
    assert not set(filled.latent_keys) & set(item.latent_keys) and filled.text_keys == item.text_keys
    write_pair(tmp_path / "pairs", "a", 0)
    (pair,) = run(config(model, tmp_path / "pairs")).train.items
    (same,) = run(config(model, tmp_path / "pairs", "data.fill=black")).train.items
    assert pair == same  # where no file has alpha there is nothing to fill


def test_the_curve_of_linear_light_and_a_sequence_s_rate_count(model: Path, tmp_path: Path, counted: Counted) -> None:
    """A companion's values know no curve, and a picture's curve is done."""
    for number in range(9):
        for suffix in ("", "_seg"):
            (frame,) = picture(number)[None] / 255.0
            write_exr_sequence(tmp_path / "made", [frame], fps=Fraction(16), alpha_mode="straight")
            (tmp_path / "d").mkdir(exist_ok=True)
            (tmp_path / "made/00000.exr").rename(tmp_path / f"d/fire{suffix}.{number}.exr")
            (tmp_path / "made").rmdir()
    (tmp_path / "d/fire.txt").write_text("fire")
    write_pair(tmp_path / "d", "b", 0)
    pair, fire = run(config(model, tmp_path / "d")).train.items
    assert counted.videos == 4 and fire.bucket == (5, 32, 32)
    same, other = run(config(model, tmp_path / "d", "data.transfer=rec709")).train.items
    assert pair == same and counted.videos == 5
    assert other.latent_keys[1] == fire.latent_keys[1] and other.latent_keys[0] != fire.latent_keys[0]
    same, faster = run(config(model, tmp_path / "d", "data.sequence_fps=24")).train.items
    assert pair == same and counted.videos == 7 and faster.latent_keys[0] != fire.latent_keys[0]


def test_only_animations_have_keys_of_their_own(tmp_path: Path) -> None:
    """They were once cut otherwise; what was encoded of all other files stays valid."""
    (tmp_path / "folder").mkdir()

    def key(name: str, fps: int) -> str:
        media = Media(9, 32, 32, Fraction(fps), Fraction(9, fps) if fps else Fraction(0), alpha=False)
        sample = Sample("a", (("rgb", tmp_path / name),), "a caption", 0, False, media)
        clip = Clip("a", Fraction(1, 8), 5, Fraction(16), 32, 32)
        return latent_keys(sample, clip, digests={tmp_path / name: "f" * 64}, fill=KEEP, vae="v")["rgb"].hex()

    assert key("a.mp4", 25) == key("folder", 0) == "17e1a5c77a86ac3245011581b1d5cbee"
    assert key("a.webp", 0) == "35e95171dc090537258d54332b93eb8f"
    assert key("a.webp", 25) == key("a.gif", 25)
    assert len({key("a.mp4", 25), key("a.webp", 0), key("a.webp", 25)}) == 3


def test_other_weights_encode_anew_beside_the_old(model: Path, tmp_path: Path, counted: Counted) -> None:
    import shutil

    write_pairs(tmp_path / "d", 2)
    shutil.copytree(model, tmp_path / "model")
    run(config(tmp_path / "model", tmp_path / "d"))
    path = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    counted.reset()
    assert len(run(config(tmp_path / "model", tmp_path / "d")).train.cache) == 4 + 3 + 4
    assert (counted.videos, counted.texts) == (4, [])


NOTHING_TO_DO = """
import sys, torch
from pathlib import Path
from transpixeler.config import loading
from transpixeler.data.encode import encode_missing
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"network: {args}")
sys.addaudithook(refuse)
config = loading.from_overrides(sys.argv[1:])
data = encode_missing(config, open_model(config.model), Runtime(0, 1, 0, torch.device("cpu")))
print(len(data.train.items), [name for name in ("diffusers", "transformers") if name in sys.modules])
"""


def test_with_nothing_missing_no_encoder_is_even_imported(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d", 3)
    run(config(model, tmp_path / "d"))
    arguments = [
        f"model.path={model}", f"data.train={tmp_path / 'd'}", "data.resolutions=[32]",
        "data.aspect_ratios=[1.0]", "data.frames=[1,5]",
    ]  # fmt: skip
    found = subprocess.run([sys.executable, "-c", NOTHING_TO_DO, *arguments], capture_output=True, text=True)
    assert found.stdout == "3 []\n", found.stderr


def test_what_cannot_be_used_is_named_and_the_rest_is_encoded(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d", 4)
    (tmp_path / "d/003_seg.png").unlink()
    data = run(config(model, tmp_path / "d")).train
    assert [item.sample_id for item in data.items] == ["d/000", "d/001", "d/002"]
    reason = "no seg file 003_seg.*; if the rgb file holds alpha, set rgba: true for its source"
    assert data.skipped == (("d/003", reason),)
    with pytest.raises(UserError, match=r"d/003.*data\.on_bad"):
        run(config(model, tmp_path / "d", "data.on_bad=error"))


def test_what_is_skipped_is_counted_by_the_kind_of_its_reason() -> None:
    skipped = [
        *((f"d/{n:03d}", f"no seg file {n:03d}_seg.*") for n in range(500)),
        *((f"d/{name}", f"more than one rgb file: {name}.mp4 and {name}.mov") for name in ("my clip", "b", "c(1)")),
        *((f"d/x{n}@{n}+5:32x32", f"{n} frames at 16 fps, the shortest bucket holds 33") for n in (2, 3)),
        ("d/a", "has no video stream"),
        ("d/e", f"cannot be read: cannot open {Path('/a/e.png')!r}"),
        ("d/f", f"cannot be read: cannot open {Path('/a/f.png')!r}"),
    ]
    assert encode._by_kind(skipped) == [
        (500, "d/000", "no seg file 000_seg.*"),
        (3, "d/my clip", "more than one rgb file: my clip.mp4 and my clip.mov"),
        (2, "d/x2@2+5:32x32", "2 frames at 16 fps, the shortest bucket holds 33"),
        (2, "d/e", f"cannot be read: cannot open {Path('/a/e.png')!r}"),
        (1, "d/a", "has no video stream"),
    ]


def test_a_set_of_many_faults_is_summed_up_in_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    skipped = tuple((f"d/{n}", f"{chr(97 + n % 26)} is wrong") for n in range(2_000))
    data = Datasets(*(Dataset((), ("rgb",), b"", Cache(), key, skipped) for key in ("train", "eval")))
    with caplog.at_level("INFO", "transpixeler"):
        encode._summarise(data, [])
    lines = [line for line in caplog.messages if line.startswith("train")]
    assert len(lines) == encode.KINDS_SHOWN + 1
    assert lines[0] == "train  skipped 77: a is wrong (d/0, …)"
    assert lines[-1] == "train  skipped 1230 for other reasons; `plan CONFIG --json` names all"


def test_a_clip_that_gives_no_finite_latent_is_skipped_in_both_sets(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "d", 2)
    whole, dark = WanVae.encode, torch.from_numpy(picture(1001))

    def sometimes(vae: WanVae, video: torch.Tensor) -> torch.Tensor:
        return whole(vae, video) * (float("nan") if torch.equal(video[0, 0], dark) else 1)

    monkeypatch.setattr(WanVae, "encode", sometimes)
    setup = config(model, tmp_path / "d", f"data.eval={tmp_path / 'd'}")
    data = run(setup)
    for one in (data.train, data.eval):
        assert [item.sample_id for item in one.items] == ["d/000"]
        assert "its seg stream gives values that are not finite" in one.skipped[0][1]
    with pytest.raises(UserError, match=r"not finite.*data\.on_bad"):
        run(dataclasses.replace(setup, data=dataclasses.replace(setup.data, on_bad="error")))


def damage_packet(path: Path, number: int) -> None:
    position, size = packet_at(path, number)
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes([255]) * size
    path.write_bytes(data)


def _kept(rank: int, world_size: int, setup: Config) -> tuple[list[str], list[tuple[str, str]]]:
    data = encode_missing(setup, open_model(setup.model), Runtime(rank, world_size, rank, torch.device("cpu"))).train
    assert not data.cache.missing([key for item in data.items for key in item.latent_keys])
    return [item.caption for item in data.items], [*data.skipped]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_companion_drops_its_own_pair_alone(model: Path, tmp_path: Path, world_size: int) -> None:
    """The pair that was to encode the RGB of all is the one that cannot."""
    for number, name in enumerate(("v", "m1", "m2", "m3")):
        write_mp4(tmp_path / f"{name}.mp4", [picture(number + 100 * k) for k in range(5)], fps=Fraction(16))
    damage_packet(tmp_path / "m1.mp4", 2)
    rows = [{"rgb": "v.mp4", "seg": f"m{n}.mp4", "text": f"mask {n}"} for n in (1, 2, 3)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup = config(model, tmp_path / "l.jsonl")
    results = run_ranks(_kept, world_size, setup) if world_size > 1 else [_kept(0, 1, setup)]
    for captions, ((name, reason),) in results:
        assert captions == ["mask 2", "mask 3"] and name.startswith("l/v@")
        assert reason.startswith(f"its seg file {tmp_path / 'm1.mp4'}: ")


def test_no_source_is_the_users_to_mend(model: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train names no source"):
        run(loading.from_overrides([f"model.path={model}"]))


def test_a_large_video_is_decoded_tile_by_tile(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = encoders.load_vae(model, device=torch.device("cpu"), dtype=torch.float32)
    latents = torch.randn(1, 16, 1, 36, 40, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    monkeypatch.setattr(WanVae, "tiled_latents", 100)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 1, 288, 320) and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.1
    monkeypatch.undo()
    assert torch.equal(vae.decode(latents), whole)
