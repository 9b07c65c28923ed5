"""What is encoded stays encoded: the cache follows the data and the weights, and nothing else."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.media import packet_at
from tests.support.ranks import run_ranks
from transpixeler import configfile
from transpixeler.config import Config, UserError
from transpixeler.data import encode, fingerprint
from transpixeler.data.cache.records import Cache, CacheDamaged
from transpixeler.data.catalog import latent_keys
from transpixeler.data.dataset import Dataset, Datasets
from transpixeler.data.encode import encode_missing, share
from transpixeler.data.loader import Assembler, Loader
from transpixeler.data.media.clip import Clip, Media
from transpixeler.data.media.fill import KEEP
from transpixeler.data.media.write import write_mp4, write_png
from transpixeler.data.sources.pairs import Sample
from transpixeler.data.upkeep import cache_command
from transpixeler.families.wan import encoders
from transpixeler.families.wan.encoders import WanTextEncoder, WanVae
from transpixeler.families.wan.model import WanModel
from transpixeler.parallel.runtime import Runtime

PAIRS = 30  # of the set whose encoding is killed
ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transpixeler.demo.model import write_model

    folder = tmp_path_factory.mktemp("wan") / "model"
    write_model(folder, seed=0)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def write_pair(folder: Path, name: str, seed: int, *, frames: int = 1, caption: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, offset in (("", 0), ("_seg", 1000)):
        if frames == 1:
            write_png(folder / f"{name}{suffix}.png", picture(seed + offset))
        else:
            film = [picture(seed + offset + 100_000 * frame) for frame in range(frames)]
            write_mp4(folder / f"{name}{suffix}.mp4", film, fps=Fraction(16))
    (folder / f"{name}.txt").write_text(f"picture number {seed}" if caption is None else caption)


def write_pairs(folder: Path, count: int = 6) -> None:
    for number in range(count):
        write_pair(folder, f"{number:03d}", number, frames=5 if number % 3 == 2 else 1)


def config(model: Path, train: Path, *more: str) -> Config:
    return configfile.from_overrides(
        [
            f"model.path={model}",
            f"data.train={train}",
            "data.resolutions=[32]",
            "data.aspect_ratios=[1.0]",
            "data.frames=[1,5]",
            "train.global_batch=2",
            *more,
        ]
    )


class Counted:
    """What the real encoders were asked for, and how often they were loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.videos, self.texts, self.loads = 0, [], []
        encode_video, encode_text = WanVae.encode, WanTextEncoder.encode
        load_vae, load_text = WanModel.load_vae, WanModel.load_text_encoder

        def videos(vae: WanVae, video: torch.Tensor) -> torch.Tensor:
            self.videos += len(video)
            return encode_video(vae, video)

        def texts(encoder: WanTextEncoder, captions: Sequence[str]) -> list[torch.Tensor]:
            self.texts += captions
            return encode_text(encoder, captions)

        monkeypatch.setattr(WanVae, "encode", videos)
        monkeypatch.setattr(WanTextEncoder, "encode", texts)
        monkeypatch.setattr(WanModel, "load_vae", lambda *a, **k: self.loads.append("vae") or load_vae(*a, **k))
        monkeypatch.setattr(
            WanModel, "load_text_encoder", lambda *a, **k: self.loads.append("text") or load_text(*a, **k)
        )

    def reset(self) -> None:
        self.videos, self.texts, self.loads = 0, [], []


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def run(config: Config) -> Datasets:
    return encode_missing(config, WanModel, ALONE)


def records(cache: Cache) -> dict[bytes, bytes]:
    """Every record's bytes by its key; a key that is there twice fails."""
    found = {}
    for number, file in enumerate(cache.table.files):
        for row in np.flatnonzero(file.valid):
            cache.verify(number, int(row))
            key = file.rows[row]["key"].tobytes()
            assert key not in found, "encoded twice"
            found[key] = cache.view(number, int(row)).flatten().view(torch.uint8).numpy().tobytes()
    return found


# --- what is encoded, and what is not --------------------------------------------------------------------------------


def test_a_data_set_becomes_latents_texts_and_the_empty_caption(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d")
    data = run(config(model, tmp_path / "d")).train
    assert data.buckets() == {(1, 32, 32): 4, (5, 32, 32): 2}
    vae = WanModel.load_vae(model, device=torch.device("cpu"), dtype=torch.float32)
    text = WanModel.load_text_encoder(model, device=torch.device("cpu"), dtype=torch.float32)
    for item, number in zip(data.items, range(6)):
        for key, offset in zip(item.latent_keys, (0, 1000)):
            latent = data.cache.latent(key)
            assert latent.dtype == torch.bfloat16 and latent.shape == (16, 1 if number % 3 < 2 else 2, 4, 4)
            if number % 3 < 2:  # a PNG of the bucket's own size comes through untouched
                pixels = torch.from_numpy(picture(number + offset))[None, None]
                assert torch.equal(latent, vae.encode(pixels)[0].bfloat16())
        assert torch.equal(data.cache.text(item.text_key), text.encode([f"picture number {number}"])[0].bfloat16())
    assert data.cache.text(data.empty_text_key).shape == (1, 64)
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
    assert both.eval.prompts.keys() == {WanModel.sampling.negative_prompt}
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
    assert not set(filled.latent_keys) & set(item.latent_keys) and filled.text_key == item.text_key
    write_pair(tmp_path / "pairs", "a", 0)
    (pair,) = run(config(model, tmp_path / "pairs")).train.items
    (same,) = run(config(model, tmp_path / "pairs", "data.fill=black")).train.items
    assert pair == same  # where no file has alpha there is nothing to fill


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
from transpixeler import configfile
from transpixeler.data.encode import encode_missing
from transpixeler.models.base import model_class
from transpixeler.runtime import Runtime
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"network: {args}")
sys.addaudithook(refuse)
config = configfile.from_overrides(sys.argv[1:])
data = encode_missing(config, model_class("wan"), Runtime(0, 1, 0, torch.device("cpu")))
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


def test_file_hashes_are_read_once_until_a_file_changes(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(file.name)
        os.utime(file, (1e9, 1e9))
    first = fingerprint.FileHashes(tmp_path / "cache")
    digests = first.digests(files, 2)
    again = fingerprint.FileHashes(tmp_path / "cache")
    assert again.digests(files, 2) == digests and (first.read, again.read) == (2, 0)
    files[0].write_text("A")  # the same size, a new time
    third = fingerprint.FileHashes(tmp_path / "cache")
    assert third.digests(files, 2)[files[0]] != digests[files[0]] and third.read == 1
    fourth = fingerprint.FileHashes(tmp_path / "cache")
    fourth.digests(files, 2)
    assert fourth.read == 1  # changed so lately that it may change again unseen


@pytest.mark.parametrize("tail", ["nonsense\n", "f\t1\tx\tc\n", "\xff\xfe\n", "f\t1"])
def test_a_broken_memory_of_hashes_is_read_as_far_as_it_goes(tail: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    os.utime(tmp_path / "a", (1e9, 1e9))
    digests = fingerprint.FileHashes(tmp_path / "cache").digests([tmp_path / "a"], 1)
    with (tmp_path / "cache/hashes.tsv").open("ab") as file:
        file.write(tail.encode("latin-1"))
    again = fingerprint.FileHashes(tmp_path / "cache")
    assert again.digests([tmp_path / "a"], 1) == digests and again.read == 0


# --- what cannot be used ---------------------------------------------------------------------------------------------


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
    skipped = tuple((f"d/{n}", f"{chr(97 + n % 26)} is wrong") for n in range(20_000))
    data = Datasets(*(Dataset((), ("rgb",), b"", Cache(), key, skipped) for key in ("train", "eval")))
    with caplog.at_level("INFO", "transpixeler"):
        encode._summarise(data, [])
    lines = [line for line in caplog.messages if line.startswith("train")]
    assert len(lines) == encode.KINDS_SHOWN + 1
    assert lines[0] == "train  skipped 770: a is wrong (d/0, …)"
    assert lines[-1] == "train  skipped 12304 for other reasons; `plan CONFIG --json` names all"


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
        assert "not finite when its seg stream is encoded" in one.skipped[0][1]
    with pytest.raises(UserError, match=r"not finite.*data\.on_bad"):
        run(dataclasses.replace(setup, data=dataclasses.replace(setup.data, on_bad="error")))


def damage_packet(path: Path, number: int) -> None:
    position, size = packet_at(path, number)
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes([255]) * size
    path.write_bytes(data)


def _kept(rank: int, world_size: int, setup: Config) -> tuple[list[str], list[tuple[str, str]]]:
    data = encode_missing(setup, WanModel, Runtime(rank, world_size, rank, torch.device("cpu"))).train
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
        run(configfile.from_overrides([f"model.path={model}"]))


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(cache: Path, how: str) -> None:
    segment = next(cache.glob("*.latent-bfloat16-16x1x4x4.seg"))
    if how == "flipped":
        data = bytearray(segment.read_bytes())
        data[100] ^= 1
        segment.write_bytes(data)
    elif how == "truncated":
        os.truncate(segment, segment.stat().st_size - 10)
    else:
        next(cache.glob("*.idx")).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flipped", r"clip d/000@0\+1:32x32, stream rgb \([0-9a-f]{32}\): its checksum does not match"),
        ("truncated", r"clip d/\d+@0\+1:32x32, stream seg \([0-9a-f]{32}\): its segment is missing or truncated"),
        ("no index", r"all its records: its index is missing"),
    ],
)
def test_verify_names_the_damage_and_the_next_run_mends_it(model: Path, tmp_path: Path, how: str, said: str) -> None:
    write_pair(tmp_path / "d", "000", 0)
    setup = config(model, tmp_path / "d")
    write_pair(tmp_path / "d", "001", 1)
    whole = records(run(setup).train.cache)
    damage(tmp_path / "d/cache", how)
    problems = cache_command(setup, ALONE, verify=True).problems
    assert problems and all("d/cache/" in str(problem.path) for problem in problems)
    assert any(re.search(said, str(problem)) for problem in problems), problems
    assert records(run(setup).train.cache) == whole
    left = cache_command(setup, ALONE, verify=True).problems
    assert len(left) == (2 if how == "no index" else 0)  # segments without an index go with --gc
    cache_command(setup, ALONE, gc=True)
    assert not cache_command(setup, ALONE, verify=True).problems and records(run(setup).train.cache) == whole


@pytest.mark.parametrize("how", ["flipped", "truncated", "no index"])
def test_training_refuses_or_re_encodes_what_is_damaged(model: Path, tmp_path: Path, how: str) -> None:
    write_pairs(tmp_path / "d", 2)
    setup = config(model, tmp_path / "d")
    whole = records(run(setup).train.cache)
    damage(tmp_path / "d/cache", how)
    data = run(setup).train
    with Loader(Assembler(data, patch=(1, 2, 2)), data.order(seed=0, global_batch=2)) as loader:
        if how == "flipped":
            with pytest.raises(CacheDamaged, match="d/000"):
                next(loader)
        else:
            next(loader)
            assert records(data.cache) == whole


# --- upkeep ----------------------------------------------------------------------------------------------------------


def test_gc_keeps_what_the_config_refers_to_and_returns_the_rest(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d")
    setup = config(model, tmp_path / "d")
    run(setup)
    for name in ("001", "002", "004"):
        for path in list((tmp_path / "d").glob(f"{name}*")):
            path.unlink()
    kept = {key for item in run(setup).train.items for key in (*item.latent_keys, item.text_key)}
    report = cache_command(setup, ALONE, gc=True)
    assert report.removed_records == 3 * 3 and report.removed_bytes > 3 * 1024
    counted.reset()
    after = run(setup).train
    assert counted.loads == [] and set(records(after.cache)) == kept | {after.empty_text_key}
    assert cache_command(setup, ALONE, gc=True).removed_records == 0


def test_verify_gc_and_rebuild_wait_for_no_writer_but_refuse(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d", 2)
    setup = config(model, tmp_path / "d")
    run(setup)
    with encode.CacheWriter(tmp_path / "d/cache", "other"):
        for what in ("verify", "gc", "rebuild"):
            with pytest.raises(UserError, match="is being written by another run"):
                cache_command(setup, ALONE, **{what: True})
    cache_command(setup, ALONE, gc=True)


def test_rebuild_gives_the_same_records(model: Path, tmp_path: Path, counted: Counted) -> None:
    write_pairs(tmp_path / "d", 3)
    setup = config(model, tmp_path / "d")
    whole = records(run(setup).train.cache)
    counted.reset()
    rebuilt = cache_command(setup, ALONE, rebuild=True).datasets
    assert counted.videos == 6 and records(rebuilt.train.cache) == whole


def test_list_counts_records_and_bytes(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "d")
    setup = config(model, tmp_path / "d")
    run(setup)
    found = {shelf.name: (shelf.records, shelf.bytes) for shelf in cache_command(setup, ALONE, list=True).shelves}
    assert found["latent-bfloat16-16x1x4x4"] == (8, 8 * 16 * 16 * 2)
    assert found["latent-bfloat16-16x2x4x4"] == (4, 4 * 16 * 32 * 2)
    assert found["text-bfloat16-64"][0] == 7


# --- many ranks, and their deaths ------------------------------------------------------------------------------------


def test_the_share_is_even_by_cost_and_nothing_is_lost() -> None:
    @dataclasses.dataclass(frozen=True)
    class Job:
        cost: int

    jobs = [Job(int(cost)) for cost in np.random.default_rng(0).integers(1, 100, 200)]
    shares = [share(jobs, rank=rank, ranks=4) for rank in range(4)]
    assert sorted(job.cost for mine in shares for job in mine) == sorted(job.cost for job in jobs)
    loads = [sum(job.cost for job in mine) for mine in shares]
    assert max(loads) - min(loads) < 100 and all(mine == sorted(mine, key=lambda job: -job.cost) for mine in shares)


def _ranks(setup: Config, world_size: int, store: Path, work: Callable[[Runtime], None]) -> list[int]:
    """Forked from here, where everything is imported: what a launcher does, in a moment."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            torch.set_num_threads(1)
            if world_size > 1:
                there = dist.FileStore(str(store), world_size)
                dist.init_process_group("gloo", store=there, rank=rank, world_size=world_size)
            work(Runtime(rank, world_size, rank, torch.device("cpu")))
            code = 0
        finally:
            os._exit(code)
    return children


def _encoding(setup: Config, log: Path) -> Callable[[Runtime], None]:
    """Encodes, and writes a byte to `log` for each video."""

    def work(runtime: Runtime) -> None:
        whole, file = WanVae.encode, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def counting(vae: WanVae, video: torch.Tensor) -> torch.Tensor:
            os.write(file, b".")
            return whole(vae, video)

        WanVae.encode = counting
        encode_missing(setup, WanModel, runtime)

    return work


@pytest.fixture(scope="module")
def many(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, bytes]]:
    """A data set and its cache as an uninterrupted run makes it."""
    folder = tmp_path_factory.mktemp("many")
    write_pairs(folder / "d", PAIRS)
    setup = config(model, folder / "d", f"data.cache_dir={folder / 'whole'}")
    return folder / "d", records(encode_missing(setup, WanModel, ALONE).train.cache)


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_same_records(
    model: Path, many: tuple[Path, dict[bytes, bytes]], tmp_path: Path, world_size: int
) -> None:
    setup = config(model, many[0], f"data.cache_dir={tmp_path}")
    children = _ranks(setup, world_size, tmp_path / "store", _encoding(setup, tmp_path / "log"))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
    assert records(Cache(tmp_path)) == many[1]
    assert len(list(tmp_path.glob("*.idx"))) == world_size


KILLS = int(os.environ.get("CACHE_KILLS", "12"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_killed_at_any_moment_it_goes_on_where_it_was(
    model: Path, many: tuple[Path, dict[bytes, bytes]], tmp_path: Path, world_size: int
) -> None:
    setup = config(model, many[0], f"data.cache_dir={tmp_path / 'cache'}")
    log, rng, kills = tmp_path / "log", np.random.default_rng(world_size), -(-KILLS // 3)
    in_flight, midway = 0, 0
    for number in range(kills):
        target = len(many[1]) * (number + rng.uniform(0, 1)) / (kills + 1)
        children = _ranks(setup, world_size, tmp_path / f"store{number}", _encoding(setup, log))
        deadline = time.monotonic() + 60
        while number % 4 and len(Cache(tmp_path / "cache")) < target and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.02) if number % 4 else rng.uniform(0, 0.5))  # every fourth: before it has begun
        for child in rng.permutation(children):
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        found = records(Cache(tmp_path / "cache"))
        assert all(many[1][key] == value for key, value in found.items())
        in_flight += world_size * 2  # one clip of two streams a rank
        midway += 0 < len(found) < len(many[1])
    children = _ranks(setup, world_size, tmp_path / "store", _encoding(setup, log))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size
    assert records(Cache(tmp_path / "cache")) == many[1]
    assert log.stat().st_size - 2 * PAIRS <= in_flight
    assert midway >= kills // 2


def _told_by_another(rank: int, world_size: int, setup: Config) -> str:
    try:
        encode_missing(setup, WanModel, Runtime(rank, world_size, rank, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return ""


def test_a_fault_of_one_rank_is_told_on_all(model: Path, tmp_path: Path) -> None:
    said = run_ranks(_told_by_another, 2, config(model, tmp_path / "nowhere"))
    assert said[0] == said[1] and "nowhere" in said[0]


def test_a_large_video_is_decoded_tile_by_tile(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = WanModel.load_vae(model, device=torch.device("cpu"), dtype=torch.float32)
    latents = torch.randn(1, 16, 1, 36, 40, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    monkeypatch.setattr(encoders, "TILED_LATENTS", 100)
    tiled = vae.decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 1, 288, 320) and not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.1
    monkeypatch.undo()
    assert torch.equal(vae.decode(latents), whole)
