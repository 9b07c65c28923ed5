"""A checkpoint knows what it was trained from: another base or other clips do not pass for the same experiment."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.ranks import RanksFailed, run_ranks
from tests.training.trainings import FAST
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.parallel import sight
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import opening
from transpixeler.training import identity, trainer
from transpixeler.training.identity import Identity

NOW = Identity("code", "base", {name: {"clips": 3, "names": "n", "records": "r"} for name in ("train", "eval")})


def differences(there: dict[str, Any] | None, *overrides: str, changed: tuple[str, ...] = ()) -> list[str]:
    config = loading.from_overrides(["model.path=/some/base", *overrides])
    return list(identity.compare(there, NOW, config, dict.fromkeys(changed, "was 1, is 2")))


def then(**other: Any) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(NOW, **other))


def other_train(**other: Any) -> dict[str, Any]:
    return then(data={**NOW.data, "train": {**NOW.data["train"], **other}})


def test_the_same_is_not_spoken_of_and_an_old_checkpoint_is() -> None:
    assert differences(then()) == []
    assert "before base and clips were fingerprinted" in differences(None)[0]


def test_other_code_and_other_held_out_clips_are_told() -> None:
    assert "other code" in differences(then(code="old"))[0]
    held_out = {**NOW.data, "eval": {**NOW.data["eval"], "clips": 5}}
    assert differences(then(data=held_out)) == [
        "data.eval: 5 clips then, 3 now: its losses do not compare with earlier ones"
    ]


@pytest.mark.parametrize(
    ("there", "told", "allowed"),
    [
        (then(base="other"), "model.path: the weights in /some/base are not those", "base"),
        (other_train(clips=4), "data.train: 4 clips then, 3 now", "data"),
        (other_train(names="x"), "data.train: 3 clips as then, but others", "data"),
        (other_train(records="x"), "data.train: the same clips, but their files", "data"),
    ],
)
def test_another_base_or_other_clips_are_refused_unless_allowed(there: dict, told: str, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"--resume: {told}.*train.allow_changed=\[{allowed}\]"):
        differences(there)
    assert [line.startswith(told) for line in differences(there, f"train.allow_changed=[{allowed}]")] == [True]


def test_clips_that_differ_by_the_config_are_told_there() -> None:
    assert differences(other_train(clips=4), changed=("data.frames",)) == []


def test_a_large_base_is_known_by_a_block_of_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "SMALL_FILE", 1000)
    tensors = {name: torch.randn(4, 5000) for name in ("a", "b")}
    save_file(tensors, tmp_path / "model.safetensors")
    first = identity.base_fingerprint([tmp_path])
    assert identity.base_fingerprint([tmp_path / "model.safetensors"]) == first
    save_file(tensors | {"b": tensors["b"] * 1.001}, tmp_path / "model.safetensors")
    assert identity.base_fingerprint([tmp_path]) != first


# --- as commands -----------------------------------------------------------------------------------------------------


def train(config: Path, output: Path, *words: str) -> int:
    return cli.main(["train", str(config), f"output_dir={output}", "run_name=mine", *FAST, *words])


def test_a_base_that_was_changed_and_clips_that_were_removed_are_refused_on_resume(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = Path(shutil.copytree(demo, tmp_path / "demo"))
    assert train(own / "config.yaml", tmp_path, "train.max_steps=1", "train.global_batch=4") == 0
    resume = ("train.max_steps=2", "train.global_batch=4", "--resume")
    weights = next((own / "model/transformer").glob("*.safetensors"))
    before = weights.read_bytes()
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    assert train(own / "config.yaml", tmp_path, *resume) == 2
    assert "model.path: the weights in" in capsys.readouterr().err
    weights.write_bytes(before)
    for file in list((own / "data/train").glob("001*")):
        file.unlink()
    assert train(own / "config.yaml", tmp_path, *resume) == 2
    assert "data.train: " in capsys.readouterr().err
    assert train(own / "config.yaml", tmp_path, *resume, "train.allow_changed=[data]") == 0
    state = json.loads((tmp_path / "mine/checkpoints/global_step00000002/state.json").read_text())
    assert state["identity"]["data"]["train"]["clips"] < 24


# --- hosts -----------------------------------------------------------------------------------------------------------


def _with_another_base(rank: int, world_size: int, path: Path, overrides: tuple[str, ...], other: Path) -> str:
    config = loading.load(path, [*overrides, *([f"model.path={other}"] if rank else [])])
    return str(trainer.train(config, Runtime(rank, world_size, rank, torch.device("cpu"))))


def test_a_host_with_another_base_is_named(demo: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(demo / "model", tmp_path / "model"))
    weights = next((other / "transformer").glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    words = (f"output_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", *FAST, "train.max_steps=1")
    with pytest.raises(RanksFailed, match=r"UserError: model.path: .* holds other weights for rank 1 on"):
        run_ranks(_with_another_base, 2, demo / "config.yaml", words, other)
    assert not (tmp_path / "cache").exists()  # it is told before hours of encoding


def _with_other_clips(rank: int, world_size: int, folders: list[Path]) -> str:
    config = loading.from_overrides([f"data.train=[{{path: {folders[rank]}}}]"])
    try:
        identity._check_sources(config, Runtime(rank, world_size, rank, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return ""


def test_hosts_that_see_other_clips_are_told_so(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, names in ((one, "ab"), (same, "ab"), (other, "a")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.mp4").write_bytes(b"frames")
    assert run_ranks(_with_other_clips, 2, [one, same]) == ["", ""]
    for said in run_ranks(_with_other_clips, 2, [one, other]):
        assert said.startswith((f"data.train: {one}", f"data.train: {other}"))
        assert "holds other files for rank 1" in said
    (same / "b.mp4").write_bytes(b"longer frames")
    assert "holds other files" in run_ranks(_with_other_clips, 2, [one, same])[0]


def test_a_caption_of_the_same_length_is_another(tmp_path: Path) -> None:
    told = []
    for caption in ("a red circle", "a big circle"):
        (tmp_path / "a.txt").write_text(caption)
        (tmp_path / "clips.jsonl").write_text(f'{{"rgb": "{"a" * 5000}.mp4", "text": "{caption}"}}')
        told.append([identity.source_fingerprint(source) for source in (tmp_path, tmp_path / "clips.jsonl")])
    assert told[0][0] != told[1][0] and told[0][1] != told[1][1]


def _with_other_code(rank: int, world_size: int, path: Path, overrides: tuple[str, ...]) -> str:
    if rank:
        identity.code_fingerprint = lambda: "other"
    config = loading.load(path, overrides)
    return str(trainer.train(config, Runtime(rank, world_size, rank, torch.device("cpu"))))


def test_a_host_with_other_code_is_refused_before_anything_is_encoded(demo: Path, tmp_path: Path) -> None:
    words = (f"output_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", *FAST, "train.max_steps=1")
    with pytest.raises(RanksFailed, match=r"UserError: rank 1 on \S+ runs other code of transpixeler than rank 0 on"):
        run_ranks(_with_other_code, 2, demo / "config.yaml", words)
    assert not (tmp_path / "cache").exists()


def _with_own_folder(rank: int, world_size: int, folders: list[Path]) -> str:
    sight.SECONDS = 0.5
    config = loading.from_overrides([f"output_dir={folders[rank]}", "run_name=mine"])
    with pytest.raises(UserError) as told:
        opening.open_run(config, Runtime(rank, world_size, rank, torch.device("cpu")), None)
    return str(told.value)


def test_hosts_that_do_not_share_the_run_folder_are_told_so(tmp_path: Path) -> None:
    for said in run_ranks(_with_own_folder, 2, [tmp_path / "a", tmp_path / "b"]):
        assert "is not there for 1 ranks on" in said and "all hosts must share the folder" in said
