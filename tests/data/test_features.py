"""What others have encoded is taken into the cache as it is, without an encoder; what does not suit is named."""

import csv
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.encoding import ALONE, Counted, config, run, write_pair, write_pairs
from tests.support.families.cases import CASES
from transpixeler import cli
from transpixeler.config.sections import UserError
from transpixeler.data.dataset import Dataset, Datasets
from transpixeler.data.encode import find_missing
from transpixeler.data.features.export import check_export, export
from transpixeler.data.features.files import open_features
from transpixeler.data.features.needs import Needs
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.sources.candidate import Features
from transpixeler.files import shown_path
from transpixeler.models.family import Field, open_model
from transpixeler.models.geometry import USUAL

ENDS = "objective.tasks={joint: 1, ends_to_videos: 1}"  # its last frames are records of their own
PROMPTS = "sample.prompts=[a thing nobody has]"


@pytest.fixture(scope="module")
def there(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Datasets]:
    """Lend a folder of exported features, and the sets that they were exported from. Nobody writes into it."""
    root = tmp_path_factory.mktemp("features")
    write_pairs(root / "clips")
    write_pair(root / "held", "one", 50, frames=5)
    wanted = config(demo_model, root / "clips", f"data.eval={root / 'held'}", ENDS, PROMPTS)
    made = run(wanted)
    export(made, open_model(wanted.model), root / "features")
    return root / "features", made


@pytest.fixture(scope="module")
def bare(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lend the demo's model without its VAE and its encoders."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(demo_model / "transformer", folder / "transformer")
    shutil.copy(demo_model / "model_index.json", folder)
    return folder


def values(data: Dataset) -> list[tuple[Any, ...]]:
    """Return the records of every clip in order, and of the texts that belong to none."""
    rows = [
        (item.bucket, item.caption, *map(data.cache.get, (*item.latent_keys, *item.text_keys))) for item in data.items
    ]
    texts = {"": data.empty_text_keys} | dict(data.prompts)
    return rows + [(text, *map(data.cache.get, keys)) for text, keys in texts.items()]


def same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    return [len(row) for row in one] == [len(row) for row in other] and all(
        equal(a, b) for row, match in zip(one, other) for a, b in zip(row, match)
    )


def taken(model: Path, folder: Path, cache: Path, *more: str) -> Datasets:
    return run(config(model, folder / "train.jsonl", f"data.cache_dir={cache}", *more))


def test_a_cache_made_of_exported_features_equals_the_encoded_one_without_an_encoder(
    there: tuple[Path, Datasets], bare: Path, tmp_path: Path, counted: Counted
) -> None:
    folder, encoded = there
    data = taken(bare, folder, tmp_path / "c", f"data.eval={folder / 'eval.jsonl'}", ENDS, PROMPTS)
    assert len(data.train.items) == 6 and len(data.eval.items) == 1 and not data.train.skipped
    assert same(values(encoded.train), values(data.train)) and same(values(encoded.eval), values(data.eval))
    assert len(data.train.cache) == len(encoded.train.cache) and counted.loads == []
    assert all(item.origin is None for item in data.eval.items)
    again = config(bare, folder / "train.jsonl", f"data.cache_dir={tmp_path / 'c'}", ENDS, PROMPTS)
    assert not find_missing(again, open_model(again.model), ALONE)[1]
    broken = next((folder / "train").glob("*.safetensors"))
    assert not same(values(encoded.train), [(*row[:2], load_file(broken)["latent"]) for row in values(data.train)])


def test_several_fields_of_a_caption_come_from_one_file(tmp_path: Path) -> None:
    CASES["toy"].write(tmp_path / "toy")
    write_pair(tmp_path / "clips", "one", 1, frames=4)
    both = "data.frames=[4]"
    wanted = config(tmp_path / "toy", tmp_path / "clips", both)
    encoded = run(wanted)
    export(encoded, open_model(wanted.model), tmp_path / "f")
    texts = next((tmp_path / "f/texts").iterdir())
    assert set(load_file(texts)) == {"text", "pooled"}
    assert same(values(encoded.train), values(taken(tmp_path / "toy", tmp_path / "f", tmp_path / "c", both).train))
    save_file({"text": load_file(texts)["text"]}, texts)
    with pytest.raises(UserError, match=r"row 2: its text_fea .* has no tensor pooled; .* are text, pooled|holds no"):
        taken(tmp_path / "toy", tmp_path / "f", tmp_path / "c2", both, "data.on_bad=error")


def test_records_depend_on_the_files_and_not_on_the_encoders(
    there: tuple[Path, Datasets], bare: Path, tmp_path: Path, counted: Counted
) -> None:
    folder = tmp_path / "f"
    shutil.copytree(there[0], folder)
    before = taken(bare, folder, tmp_path / "c")
    shutil.copytree(bare, tmp_path / "other")
    (tmp_path / "other/vae").mkdir()
    (tmp_path / "other/vae/note.safetensors").write_text("another one")
    (folder / "train").rename(folder / "moved")
    text = (folder / "train.jsonl").read_text().replace('"train/', '"moved/')
    (folder / "train.jsonl").write_text(text)
    after = taken(tmp_path / "other", folder, tmp_path / "c")
    assert [item.latent_keys for item in after.train.items] == [item.latent_keys for item in before.train.items]
    file = sorted((folder / "moved").iterdir())[0]
    save_file({name: value * 0.9 for name, value in load_file(file).items()}, file, metadata={"scale": "normalised"})
    changed = taken(bare, folder, tmp_path / "c")
    differ = [a.latent_keys != b.latent_keys for a, b in zip(after.train.items, changed.train.items)]
    assert differ == [True] + 5 * [False] and counted.loads == []


def test_rows_without_features_are_encoded_as_usual(
    there: tuple[Path, Datasets], demo_model: Path, tmp_path: Path, counted: Counted
) -> None:
    rows = [json.loads(line) for line in (there[0] / "train.jsonl").read_text().splitlines()[:2]]
    for row in rows:
        row |= {name: str(there[0] / row[name]) for name in ("latent", "seg_latent", "text_fea")}
    write_pair(tmp_path, "own", 7)
    plain = {"video": "own.png", "seg": "own_seg.png", "text": "encoded here"}
    lines = [rows[0], plain, {**plain, "text": "told", "text_fea": rows[1]["text_fea"]}]
    (tmp_path / "m.json").write_text(json.dumps(lines))
    wanted = config(demo_model, tmp_path / "m.json")
    _, work = find_missing(wanted, open_model(wanted.model), ALONE)
    assert str(work) == "encodes 1 clips and 2 captions and takes 1 clips and 2 captions from features"
    data = run(wanted).train
    assert len(data.items) == 3 and counted.videos == 2 and sorted(counted.texts) == ["", "encoded here"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("kind", ["pt", "npy"])
def test_files_of_other_programs_are_read_through_columns_of_their_names(
    ending: str, kind: str, there: tuple[Path, Datasets], bare: Path, tmp_path: Path
) -> None:
    encoded = there[1].train.items[0]
    latent, seg, text = map(there[1].train.cache.get, (*encoded.latent_keys[:2], *encoded.text_keys))
    assert latent is not None and seg is not None and text is not None
    padded = torch.cat([text, torch.zeros(5, text.shape[1], dtype=text.dtype)])
    save: dict[str, Callable[[torch.Tensor, Path], object]] = {
        "pt": lambda value, path: torch.save(value[None], path),
        "npy": lambda value, path: np.save(path, value.float().numpy()),
    }
    for name, value in (("rgb", latent), ("seg", seg), ("text", padded), ("empty", padded[:1])):
        save[kind](value, tmp_path / f"{name}.{kind}")
    row = {"vae": f"rgb.{kind}", "matte": f"seg.{kind}", "prompt": "a thing", "emb": f"text.{kind}"}
    empty = {"vae": "", "matte": "", "prompt": "", "emb": f"empty.{kind}"}
    manifest = tmp_path / f"m.{ending}"
    if ending in ("csv", "tsv"):
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, row, delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows([row, empty])
    else:
        rows = [json.dumps(one) for one in (row, empty)]
        manifest.write_text(f"[{','.join(rows)}]" if ending == "json" else "\n".join(rows))
    names = "data.columns={latent: vae, seg_latent: matte, text: prompt, text_fea: emb}"
    data = run(config(bare, manifest, names, "data.on_bad=error")).train
    assert same(values(data)[:1], [((1, 32, 32), "a thing", latent, seg, text)])


def test_a_mask_says_how_long_a_text_is(bare: Path, tmp_path: Path) -> None:
    needs = Needs.of(config(bare, tmp_path), open_model(config(bare, tmp_path).model))
    width, mask = 64, torch.tensor([[1, 1, 0, 0]])
    path = tmp_path / "t.pt"
    torch.save({"prompt_embeds": torch.ones(1, 4, width), "prompt_attention_mask": mask}, path)
    assert needs.texts(open_features(path))["text"].shape == (2, width)
    torch.save({"prompt_embeds": torch.ones(1, 4, width), "prompt_attention_mask": mask.flip(1)}, path)
    with pytest.raises(BadMedia, match="no true length of 4 tokens"):
        needs.texts(open_features(path))


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def bad_files(folder: Path, good: torch.Tensor, text: torch.Tensor) -> dict[str, tuple[dict[str, str], str]]:
    """Write files that cannot be used; return a row for each, and what must be said of it."""

    def latent(name: str, value: torch.Tensor, **facts: str) -> dict[str, str]:
        save_file({"latent": value.contiguous()}, folder / f"{name}.safetensors", metadata=facts)
        return {"latent": f"{name}.safetensors", "seg_latent": "seg.safetensors", "text_fea": "t.safetensors"}

    def other(name: str, held: object) -> dict[str, str]:
        (folder / name).write_bytes(pickle.dumps(held) if not isinstance(held, bytes) else held)
        return {"latent": name, "seg_latent": "seg.safetensors", "text_fea": "t.safetensors"}

    def words(name: str, value: torch.Tensor) -> dict[str, str]:
        save_file({"text": value}, folder / f"{name}.safetensors")
        return latent("fine", good) | {"text_fea": f"{name}.safetensors"}

    save_file({"seg_latent": good}, folder / "seg.safetensors")
    save_file({"text": text}, folder / "t.safetensors")
    torch.save({"latent": good, "harm": Harm()}, folder / "zip.pt")
    np.save(folder / "o.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    torch.save(good, folder / "both.pt")
    save_file({"latent": good}, folder / "both.safetensors")
    torch.save(torch.ones(1).expand(good.shape), folder / "spread.pt")
    torch.save(good.float().to_sparse(), folder / "sparse.pt")
    torch.save({"text": text, "text_mask": torch.ones(len(text)).to_sparse()}, folder / "mask.pt")
    nan = good.clone()
    nan[0, 0, 0, 0] = float("nan")
    cut = (folder / "seg.safetensors").read_bytes()[:-8]
    return {
        "channels": (latent("c", good[:4]), "4 channels, where this model's latents have 16"),
        "order": (latent("ord", good.transpose(0, 1)), "1 channels, where"),
        "rank": (latent("r", good[:, 0, 0]), r"has the shape \[16, 4\], not \[channels"),
        "size": (latent("s", good[..., :3]), "of a video of 24×32×1: .* is not a multiple of"),
        "other": (latent("w", torch.cat([good, good], 3)), r"has the shape \[16, 1, 4, 4\], not \[16, 1, 4, 8\]"),
        "nothing": (latent("z", good[:, :0]), "holds nothing"),
        "family": (latent("f", good, family="toy"), "is of the family toy, and the model's is wan"),
        "whole": (latent("i", good.int()), "holds int32 values"),
        "scale": (latent("x", good.float() * 8), "values of another scale: .* normalised"),
        "nan": (latent("n", nan), "values that are not finite"),
        "harm": (other("h.pt", Harm()), "could run code"),
        "zip": ({**latent("fine", good), "latent": "zip.pt"}, "could run code"),
        "array": ({**latent("fine", good), "latent": "o.npy"}, "cannot be read"),
        "torn": (other("torn.safetensors", cut), "cannot be read"),
        "noise": (other("noise.pth", b"nothing of this kind"), "could run code|cannot be read"),
        "ending": (other("l.bin", b""), "ends in .bin; features are read from .safetensors"),
        "gone": ({**latent("fine", good), "latent": "gone.pt"}, "gone.pt does not exist"),
        "one": ({"latent": "fine.safetensors", "text_fea": "t.safetensors"}, "no path in column 'seg_latent': give"),
        "width": (words("t1", text[:, :8].contiguous()), r"text is \[tokens, 64\]"),
        "long": (words("t2", torch.ones(600, 64)), "600 tokens, this model's text at most 512"),
        "slip": ({**latent("fine", good), "latent": "both.pt", "seg_latent": "both.pt"}, "has no tensor latent"),
        "slip by name": (
            {
                **latent("fine", good),
                "latent": "both.safetensors",
                "seg_latent": "../" + folder.name + "/both.safetensors",
            },
            "has no tensor seg_latent, and other streams",
        ),
        "overflow": (words("t4", text.double() * 1e300), "values that are not finite"),
        "spread": ({**latent("fine", good), "latent": "spread.pt"}, "in place of plain floating-point"),
        "sparse": ({**latent("fine", good), "latent": "sparse.pt"}, "in place of plain floating-point"),
        "mask": ({**latent("fine", good), "text_fea": "mask.pt"}, "a mask"),
        "text nan": (words("t3", text * float("nan")), "values that are not finite"),
    }


def test_what_does_not_suit_is_named_with_its_row_and_file(
    there: tuple[Path, Datasets], bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    item = there[1].train.items[0]
    latent, text = map(there[1].train.cache.get, (item.latent_keys[0], item.text_keys[0]))
    assert latent is not None and text is not None
    cases = bad_files(tmp_path, latent.clone(), text.clone())
    rows = [row | {"text": name} for name, (row, _) in cases.items()]
    good = {"latent": "fine.safetensors", "seg_latent": "seg.safetensors", "text_fea": "t.safetensors"}
    rows += [good | {"text": "good"}, {"text": "", "text_fea": "t.safetensors"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = taken(bare, tmp_path, tmp_path / "c").train
    assert [item.caption for item in data.items] == ["good"] and len(data.skipped) == len(cases)
    reasons = [reason for _, reason in data.skipped]
    for number, (name, (row, said)) in enumerate(cases.items(), 1):
        own = [reason for reason in reasons if reason.startswith(f"row {number}:")] or [
            reason for sample, reason in data.skipped if sample.endswith(f"row {number}")
        ]
        assert len(own) == 1 and "\n" not in own[0], name
        assert re.search(said, own[0]), (name, own)
        assert name == "one" or any(Path(file).name in own[0] for file in row.values()), (name, own)
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[list(cases).index("nan")]) + "\n" + json.dumps(rows[-1]))
    with pytest.raises(UserError, match=r"row 1: its latent .*n\.safetensors holds values that are not finite; mend"):
        taken(bare, tmp_path, tmp_path / "c", "data.on_bad=error")


def test_latents_that_fit_no_bucket_are_skipped_by_name_and_never_cut(
    there: tuple[Path, Datasets], bare: Path, tmp_path: Path
) -> None:
    more = ("data.frames=[1]",)
    data = taken(bare, there[0], tmp_path / "c", *more).train
    assert data.buckets() == {(1, 32, 32): 4} and len(data.skipped) == 2
    said = r"row 3: its latents .*000002-002.*safetensors are of 32×32×5, which is no bucket; near are 32×32×1: name "
    assert re.match(said + r"\[32, 32, 5\] in data.sizes", data.skipped[0][1])
    with pytest.raises(UserError, match=r"2 samples fit no bucket, the first is row 3"):
        taken(bare, there[0], tmp_path / "c", *more, "data.on_bad=error")


def test_raw_latents_are_told_by_the_vaes_own_statistics(
    there: tuple[Path, Datasets], demo_model: Path, tmp_path: Path
) -> None:
    told = open_model(config(demo_model, tmp_path).model).latent_statistics()
    assert told is not None
    mean, deviation = (value[:, None, None, None] for value in told)
    needs = Needs(USUAL, {"rgb": 1, "seg": 1}, family="wan", statistics=told)
    data, noticed, own = there[1].train, 0, []
    for key in [key for item in data.items for key in item.latent_keys]:
        latent = data.cache.get(key)
        assert latent is not None
        for value in (latent, latent * deviation + mean):
            path = tmp_path / "one.pt"
            torch.save(value, path)
            try:
                needs.check_values(value, open_features(path), latent=True)
            except BadMedia as reason:
                assert "normalised, (latent - mean) / deviation" in str(reason)
                noticed += value is not latent
                own += [value] * (value is latent)
    count = sum(len(item.latent_keys) for item in data.items)
    assert not own and noticed > count / 2, (noticed, count)


def test_models_that_are_shown_frames_take_no_latents_and_export_none(tmp_path: Path, demo_model: Path) -> None:
    needs = Needs(USUAL, {"rgb": 1}, fields=(Field("shown", width=20, source="clip", mask=4),))
    with pytest.raises(BadMedia, match=r"row 4 gives latents, but this model is also shown given frames \(shown\)"):
        needs.media(Features("row 4", (("rgb", tmp_path / "a.pt"),)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    wanted = config(demo_model, tmp_path)
    with pytest.raises(UserError, match=r"--export: .*full is there already"):
        check_export(tmp_path / "full", wanted, open_model(wanted.model))
    drawn = replace(wanted, data=replace(wanted.data, draw="epoch"))
    with pytest.raises(UserError, match=r"--export: .*one bucket.*set data\.draw=once"):
        check_export(tmp_path / "new", drawn, open_model(drawn.model))


def test_columns_without_a_name_are_left_unread_and_a_lacking_text_says_how_to_give_it(
    there: tuple[Path, Datasets], demo_model: Path, bare: Path, tmp_path: Path, counted: Counted
) -> None:
    write_pair(tmp_path, "own", 7)
    row = {"video": "own.png", "seg": "own_seg.png", "text": "a", "latent": "another-models.pt", "text_fea": "a.pt"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    unread = "data.columns={latent: '', text_fea: ''}"
    assert len(run(config(demo_model, tmp_path / "m.jsonl", unread)).train.items) == 1 and counted.videos == 2
    lines = (there[0] / "train.jsonl").read_text().splitlines()
    (tmp_path / "texts").symlink_to(there[0] / "texts")
    (tmp_path / "train").symlink_to(there[0] / "train")
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:6]))
    with pytest.raises(UserError, match=r'holds no text encoder.*; or give the features .*: {"text": "", "text_fea"'):
        taken(bare, tmp_path, tmp_path / "c")


def test_commands_say_what_is_taken(
    there: tuple[Path, Datasets], bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {bare}}}\noutput_dir: o\ntrain: {{global_batch: 2, max_steps: 1}}\n"
        f"data:\n  train: {there[0]}/train.jsonl\n  cache_dir: c\n"
        "  resolutions: [32]\n  aspect_ratios: [1]\n  frames: [1, 5]\n"
    )
    path = str(tmp_path / "c.yaml")
    assert cli.main(["inspect", path, "--out", str(tmp_path / "i.html")]) == 0
    assert "6 samples can be used, 0 cannot" in capsys.readouterr().out
    assert cli.main(["plan", path]) == 0 and re.search(r"32×32×5 +2 ", capsys.readouterr().out)
    assert not list((tmp_path / "c").glob("*.seg"))
    assert cli.main(["cache", path, "--export", str(tmp_path / "again")]) == 0
    assert f"{shown_path(tmp_path / 'again/train.jsonl')}: 6 rows for data.train" in capsys.readouterr().out
    first = next((tmp_path / "again/train").iterdir())
    assert load_file(first)["latent"].dtype == torch.bfloat16
    with safe_open(first, framework="pt") as file:
        assert file.metadata() == {"format": "transpixeler features 1", "family": "wan", "scale": "normalised"}
